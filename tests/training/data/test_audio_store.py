"""The stream "audio" of datasets: what is read, beside frames, alone and beside tokens, and what is refused."""

import json
import zipfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dataset_tools import inspect_dataset
from dataset_tools.encoding import encode_dataset
from tests.training.data.clips import write
from tests.training.data.sounds import CLIPS, SIZE, audio_of, write_heard
from tests.training.tats import tiny
from training.contract import BatchSpec, FrameClip, Stream
from training.data.audio_store import LISTING, VALUES, AudioStore
from training.data.dataset import BatchStream, ClipDataset, to_device
from training.data.prompts import ClipPrompt
from training.data.shards import Clip
from training.data.spectrograms import NUM_VALUES
from training.network_file import content_hash, save_bundle

LISTED = [Clip(name, count) for name, count in CLIPS.items()]


@pytest.fixture
def root(tmp_path):
    return write_heard(tmp_path / "data")


def test_batches_hold_the_sound_of_their_windows(root):
    dataset = ClipDataset(root, [SIZE], streams=["audio"])
    stream = BatchStream(dataset, 3, 2, x_flip=True)
    spec = BatchSpec(12, (FrameClip("video", *SIZE, 0, 12), Stream("audio", 2, 4, 2)))
    batch = to_device(stream.batch(0, spec), torch.device("cpu"))
    assert batch["audio"].shape == (2, 4, NUM_VALUES) and batch["audio"].dtype == torch.float32
    for found, (clip, start, _) in zip(batch["audio"], stream.items(0, 12), strict=True):
        name, count = LISTED[clip].path, LISTED[clip].num_frames
        np.testing.assert_array_equal(found, audio_of(name, count)[start + 2 : start + 10 : 2].astype(np.float32))
    facts = dataset.facts()
    assert facts.num_values == {"audio": NUM_VALUES} and facts.vectors == {"audio"} and not dataset.vocabularies()


def test_sound_is_read_without_frames(root):
    dataset = ClipDataset(root, [], streams=["audio"])
    assert [clip.path for clip in dataset.clips] == list(CLIPS) and not dataset.sizes
    assert dataset.read_stream(1, "audio", 20, 4).shape == (4, NUM_VALUES)


def test_tokens_take_the_sound_along(root, tmp_path):
    save_bundle(tiny.Bundle({"tokenizer": tiny.tokenizer()}, "tokenizer"), tmp_path / "book.pkl")
    encode_dataset(root, str(tmp_path / "book.pkl"), out=tmp_path / "tokens", workers=1)
    dataset = ClipDataset(tmp_path / "tokens", [], codes=content_hash(tiny.tokenizer()), streams=["audio"])
    np.testing.assert_array_equal(dataset.read_stream(0, "audio", 0, 20), audio_of("a", 20).astype(np.float32))
    result = CliRunner().invoke(inspect_dataset.main, [str(root), "--num-frames=2"])
    assert result.exit_code == 0 and "audio" not in result.output, result.output


def test_prompts_go_on_with_the_last_moment(root):
    dataset = ClipDataset(root, [SIZE], streams=["audio"])
    prompt = ClipPrompt(dataset, [(0, 4), (1, 0)], {"audio": dataset.streams["audio"].read})
    wanted = [audio_of("a", 20)[4:].astype(np.float32), audio_of("b/c", 24).astype(np.float32)]
    found = prompt.padded_stream("audio", 10, 12)
    np.testing.assert_array_equal(found[0, :6], wanted[0][10:])
    assert (found[0, 6:] == found[0, 5]).all()
    np.testing.assert_array_equal(found[1], wanted[1][10:22])
    assert (prompt.padded_stream("audio", 90, 2)[1] == torch.from_numpy(wanted[1][-1])).all()
    with pytest.raises(ValueError, match="context too short"):
        prompt.stream("audio", 10, 12)


# ----------------------------------------------------------------------------
# What is refused.


def test_datasets_without_sound_are_refused(tmp_path):
    silent = write_heard(tmp_path / "silent", is_heard=False)
    with pytest.raises(ValueError, match="has no audio beside its frames; make it from videos .* --audio"):
        ClipDataset(silent, [SIZE], streams=["audio"])
    (tmp_path / "videos").mkdir()
    write(tmp_path / "videos" / "a.mp4")
    with pytest.raises(ValueError, match="read as folder of videos or images, without its sound"):
        ClipDataset(tmp_path / "videos", [(16, 24)], streams=["audio"])
    with pytest.raises(ValueError, match="is no dataset whose audio can be read alone"):
        ClipDataset(tmp_path / "videos", [], streams=["audio"])


def replace(path, **members):
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()} | members
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({VALUES: b"12"}, "audio in .*0000.zip cannot be read .*audio.f16 has 2 bytes"),
        ({LISTING: b'{"a": -1}'}, "audio in .*0000.zip cannot be read"),
        ({LISTING: json.dumps({"c": 20}).encode()}, "clip a has 20 frames but audio for 0 in"),
        ({VALUES: np.full(20 * NUM_VALUES, np.nan, "<f2").tobytes()}, "audio of clip a in .*0000.zip is damaged"),
    ],
)
def test_damaged_sound_is_refused(root, members, words):
    replace(root / "0008x0008" / "partition_0000.zip", **members)
    with pytest.raises(ValueError, match=words):
        AudioStore(root, LISTED).read_all(0)
    result = CliRunner().invoke(inspect_dataset.main, [str(root), "--num-frames=2"])
    assert "streams that systems which read them reject" in result.output
