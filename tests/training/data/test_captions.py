"""Descriptions of clips become ids, one of several drawn for each clip of a batch."""

import json

import numpy as np
import pytest
import torch

from tests.training.data.test_dataset import SMALL, make
from training.contract import BatchSpec, FrameClip, TextClip
from training.data.dataset import BatchStream, ClipDataset, to_device

SHARDS = [{"a/x": 9, "b/c": 12, "b/d": 9}]
CAPTIONS = {"a/x": "a horse", "b": ["a bike", "two bikes"], "b/d": ["a car"]}
TEXTS = [["a horse"], ["a bike", "two bikes"], ["a car"]]


def ids(text):
    """Return the first six bytes of a text, padded."""
    return list(text.encode().ljust(6)[:6])


@pytest.fixture
def root(tmp_path):
    root = make(tmp_path / "data", SHARDS)
    (root / "captions.json").write_text(json.dumps(CAPTIONS))
    return root


def test_descriptions_are_those_of_the_clips_of_a_batch(root):
    dataset = ClipDataset(root, [SMALL], text_ids=ids)
    assert dataset.texts == TEXTS
    stream = BatchStream(dataset, seed=0, batch_size=6, num_workers=2, x_flip=False)
    halves = [BatchStream(dataset, 0, 6, rank, 2, x_flip=False) for rank in range(2)]
    spec = BatchSpec(4, (FrameClip("video", *SMALL, 0, 4), TextClip("text", 6)))
    seen = set()
    for n, batch in enumerate(stream.prefetch((n, spec) for n in range(8))):
        assert batch["text"].dtype == torch.int64 and batch["text"].shape == (6, 6)
        for (clip, _, _), row in zip(stream.items(n, 4), batch["text"].tolist(), strict=True):
            (text,) = [text for text in TEXTS[clip] if ids(text) == row]
            seen.add(text)
        assert torch.equal(torch.cat([half.batch(n, spec)["text"] for half in halves]), batch["text"])
        assert to_device(batch, torch.device("cpu"))["text"].dtype == torch.int64
    assert seen == {"a horse", "a bike", "two bikes", "a car"}


def test_clips_with_descriptions_are_not_mirrored(root):
    stream = BatchStream(ClipDataset(root, [SMALL], text_ids=ids), seed=0, batch_size=2)
    with pytest.raises(ValueError, match="cannot be mirrored, for their text would not be"):
        stream.batch(0, BatchSpec(2, (TextClip("text", 6),)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "clip a/x of .* has no description; give .*captions.json an entry"),
        ('{"a": "", "b": []}', "clip b/c of .* has no description"),
        ('{"a": 7, "b": "x"}', "is no object that maps clips to texts .*7 as a, expected a text or a list of texts"),
        ("[]", "is no object that maps clips to texts"),
        ("{", "no JSON"),
    ],
)
def test_damaged_descriptions_are_refused(root, content, message):
    (root / "captions.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        ClipDataset(root, [SMALL], text_ids=ids)


def test_ids_of_another_length_are_an_error(root):
    dataset = ClipDataset(root, [SMALL], text_ids=ids)
    with pytest.raises(AssertionError, match="expected 5"):
        dataset.read_text(0, 0.0, 5)
    assert np.array_equal(dataset.read_text(1, 0.99, 6), ids("two bikes"))
