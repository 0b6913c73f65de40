"""Latent shards: what the tokenizer gives, rounded to float16, with the moments of all clips."""

import json
import os
import zipfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dataset_tools import encode_dataset, inspect_dataset
from tests.training.data import tiny_tokenizer
from tests.training.data.test_codes import npy, write_zip
from tests.training.data.test_dataset import SMALL, make
from training import registry
from training.contract import BatchSpec, CodeClip, FrameClip, LatentClip
from training.data.dataset import BatchStream, ClipDataset, to_device, to_float
from training.data.latents import LatentsManifest, LatentStore, Moments
from training.network_file import content_hash, save_network

SHARDS = [{"a": 9, "b/c": 12, "d": 3}, {"e": 10, "f": 21}]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(registry, "SYSTEMS", dict(registry.SYSTEMS))
    tiny_tokenizer.register()


def encode(root, network, folder, *arguments, code=0):
    path = folder / "tokenizer.safetensors"
    save_network(network, path)
    command = [str(root), f"--tokenizer={path}", "--device=cpu", "--workers=2", *arguments]
    result = CliRunner().invoke(encode_dataset.main, command)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def root(tmp_path):
    return make(tmp_path / "data", SHARDS)


@pytest.mark.parametrize(
    "options", [{}, {"clip_frames": 1}, {"clip_frames": 6, "stride": (3, 4)}, {"clip_frames": 2, "stride": (2, 8)}]
)
def test_latents_are_those_of_the_frames(root, tmp_path, options):
    network = tiny_tokenizer.tiny_tokenizer(**options)
    output = encode(root, network, tmp_path, "--latents")
    assert "latents are in" in output and "steps of 6x" in output
    stride, length = network.stride[0], network.clip_frames
    stored = ClipDataset(root, [SMALL], latents=content_hash(network))
    every = []
    for clip, number in enumerate(stored.lengths.tolist()):
        if not number:
            continue
        frames = to_float(torch.from_numpy(stored.read(clip, SMALL, range(number)))[None], CPU)
        whole = number // length * length
        parts = list(frames[:, :, :whole].split(length, 2)) if whole else []
        parts += [frames[:, :, whole:]] if whole < number else []
        expected = [network.latents(part)[0].movedim(0, 1) for part in parts]
        found = stored.read_latents(clip, 0, number // stride)
        assert found.dtype == np.float16
        wanted = torch.cat(expected).detach().half()
        torch.testing.assert_close(torch.from_numpy(found.copy()), wanted, rtol=1e-3, atol=1e-5)
        every.append(found.astype(np.float64))
    values = np.concatenate(every)
    facts = stored.facts()
    np.testing.assert_allclose(facts.latents_mean, values.mean((0, 2, 3)), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(facts.latents_std, values.std((0, 2, 3)), rtol=1e-9)
    assert facts.fps == 30 and stored.alignment == stride


def test_moments_do_not_depend_on_the_division(root, tmp_path):
    network = tiny_tokenizer.tiny_tokenizer()
    sha256 = content_hash(network)
    encode(root, network, tmp_path, "--latents")
    one = LatentStore(root, sha256)
    for index in (3, 0, 2, 1):
        many = [f"--out={tmp_path / 'many'}", f"--partition={index}", "--num-partitions=4", "--latents"]
        encode(root, network, tmp_path, *many)
    many = LatentStore(tmp_path / "many", sha256)
    np.testing.assert_allclose(one.mean, many.mean, rtol=1e-12)
    np.testing.assert_allclose(one.std, many.std, rtol=1e-12)
    before = {path: path.read_bytes() for path in many.directory.iterdir()}
    (many.directory / "partition_0001.zip").unlink()
    assert "3 of 4 shards were there already" in encode(root, network, tmp_path, many_out(tmp_path), *NUM, "--latents")
    assert {path: path.read_bytes() for path in many.directory.iterdir()} == before


NUM = ("--num-partitions=4",)


def many_out(tmp_path):
    return f"--out={tmp_path / 'many'}"


def test_moments_of_parts_are_those_of_the_whole():
    values = np.random.RandomState(0).standard_normal((7, 3, 2, 5)).astype(np.float16) * [[[[3]], [[1]], [[0.1]]]] + 40
    whole, parts = Moments.of(values), Moments.none(3)
    for start, stop in ((0, 1), (1, 1), (1, 5), (5, 7)):
        parts = parts + Moments.of(values[start:stop])
    assert parts.count == whole.count == 70
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(parts.std, values.std((0, 2, 3)), rtol=1e-9)


def test_batches_of_frames_tokens_and_latents_are_of_one_window(root, tmp_path):
    network = tiny_tokenizer.tiny_tokenizer(clip_frames=6, stride=(3, 4))
    sha256 = content_hash(network)
    encode(root, network, tmp_path, "--latents")
    encode(root, network, tmp_path)
    dataset = ClipDataset(root, [SMALL], codes=sha256, latents=sha256)
    spec = BatchSpec(6, (FrameClip("video", *SMALL, 0, 6), CodeClip("codes", 0, 2), LatentClip("z", 0, 2)))
    stream = BatchStream(dataset, seed=0, batch_size=4, num_workers=2, x_flip=False)
    for batch in stream.prefetch((n, spec) for n in range(3)):
        assert batch["z"].dtype == torch.float16 and batch["z"].shape == (4, 2, 6, 2, 4)
        sent = to_device(batch, CPU)
        assert sent["z"].dtype == torch.float32 and sent["z"].shape == (4, 6, 2, 2, 4) and sent["z"].is_contiguous()
        with torch.no_grad():
            torch.testing.assert_close(sent["z"], network.latents(sent["video"]), rtol=2e-3, atol=1e-4)
            assert torch.equal(sent["codes"], network.encode(sent["video"]))
    with pytest.raises(AssertionError, match="reaches out"):
        stream.batch(0, BatchSpec(6, (LatentClip("z", 1, 2),)))
    with pytest.raises(ValueError, match="windows of 7 frames do not end where a step"):
        stream.batch(0, BatchSpec(7, (LatentClip("z", 0, 2),)))
    flipped = BatchStream(dataset, seed=0, batch_size=4)
    with pytest.raises(ValueError, match="cannot be mirrored, for their z would not be"):
        flipped.batch(0, BatchSpec(6, (LatentClip("z", 0, 2),)))


def test_latents_alone_are_a_dataset(root, tmp_path):
    network = tiny_tokenizer.tiny_tokenizer()
    out = tmp_path / "out"
    encode(root, network, tmp_path, "--latents", f"--out={out}")
    alone = ClipDataset(out, [], latents=content_hash(network))
    assert alone.lengths.tolist() == [9, 12, 3, 10, 21]
    result = CliRunner().invoke(inspect_dataset.main, [str(out)])
    assert result.exit_code == 0, result.output
    assert "5 clips  55 steps of 6x2x4 latents, a step is 1 frames, a cell 4 pixels" in result.output


# ----------------------------------------------------------------------------
# Refusals.


def test_latents_of_another_tokenizer_are_refused(root, tmp_path):
    network, other = tiny_tokenizer.tiny_tokenizer(), tiny_tokenizer.tiny_tokenizer(1)
    encode(root, network, tmp_path, "--latents")
    sha256 = content_hash(network)
    with pytest.raises(ValueError, match=r"has no latents of this tokenizer .*--tokenizer=FILE --latents"):
        ClipDataset(root, [SMALL], latents=content_hash(other))
    with pytest.raises(ValueError, match="has no tokens of this tokenizer"):
        ClipDataset(root, [SMALL], codes=sha256)
    path = LatentStore(root, sha256).directory / "manifest.json"
    path.write_text(path.read_text().replace(sha256, sha256[:12] + "0" * 52))
    with pytest.raises(ValueError, match="holds latents of another tokenizer"):
        ClipDataset(root, [SMALL], latents=sha256)


def test_a_tokenizer_without_latents_or_with_too_large_ones_is_refused(root, tmp_path, monkeypatch):
    latents = tiny_tokenizer.TinyTokenizer.latents
    monkeypatch.setattr(tiny_tokenizer.TinyTokenizer, "latents", lambda self, video: latents(self, video) * 1e6)
    output = encode(root, tiny_tokenizer.tiny_tokenizer(), tmp_path, "--latents", code=1)
    assert "but stored ones are finite float16 up to 65504" in output and not list(root.glob("latents-*/*.zip"))
    monkeypatch.setattr(tiny_tokenizer.TinyTokenizer, "latents", lambda self, video: latents(self, video)[0])
    assert "makes latents [6, 4, 2, 4]" in encode(root, tiny_tokenizer.tiny_tokenizer(), tmp_path, "--latents", code=1)
    monkeypatch.delattr(tiny_tokenizer.TinyTokenizer, "latents")
    output = encode(root, tiny_tokenizer.tiny_tokenizer(), tmp_path, "--latents", code=1)
    assert "the tokenizer has no latents before quantization; leave out --latents" in output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": [0.0] * 5}, "5 numbers as mean, expected one for each of 6 channels"),
        ({"std": [1.0, None] * 3}, "as std 1, expected a number"),
        ({"channels": 0}, "0 as channels"),
        ({"partitions": {"0000": {"clips": 3}}}, "no entry 'moments'"),
        (
            {"partitions": {"0000": {"clips": 3, "moments": {"count": 1, "mean": [0.0], "squares": [0.0]}}}},
            "1 numbers as mean of partition 0000",
        ),
    ],
)
def test_damaged_manifests_are_refused(root, tmp_path, change, message):
    network = tiny_tokenizer.tiny_tokenizer()
    encode(root, network, tmp_path, "--latents")
    folder = LatentStore(root, content_hash(network)).directory
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        LatentsManifest.read(folder)


def test_damaged_shards_are_refused(root, tmp_path):
    network = tiny_tokenizer.tiny_tokenizer()
    encode(root, network, tmp_path, "--latents")
    store = LatentStore(root, content_hash(network))
    path = store.shards[0]
    with zipfile.ZipFile(path) as archive:
        arrays = {clip.path: archive.read(f"{clip.path}.npy") for clip in store.clips[:3]}
    lengths = {clip.path: clip.num_frames for clip in store.clips[:3]}
    infinite = np.full((9, 6, 2, 4), np.inf, np.float16)
    write_zip(path, {**arrays, "a": npy(infinite)}, lengths)
    with pytest.raises(
        ValueError, match=r"latents of clip a in .* are damaged \(they are not finite\); delete the zip"
    ):
        LatentStore(root, content_hash(network)).read(0, 0, 1)
    result = CliRunner().invoke(inspect_dataset.main, [str(root)])
    assert result.exit_code == 1 and "it is not the one that manifest.json describes" in result.output
    write_zip(path, {**arrays, "a": npy(infinite.astype(np.float32))}, lengths)
    with pytest.raises(ValueError, match=r"float32 of shape .*, but float16 on a grid of 6x2x4 was expected"):
        LatentStore(root, content_hash(network))
    os.truncate(path, 100)
    with pytest.raises(ValueError, match=r"holds no latents that can be read .*--latents"):
        LatentStore(root, content_hash(network))
