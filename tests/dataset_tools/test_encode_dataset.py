"""Tokens are those of each clip's frames, independent of partitions, interruptions and repetitions."""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dataset_tools import archive, encode_dataset, inspect_dataset, merge
from dataset_tools.frames import encode_jpeg
from tests.dataset_tools.test_make_dataset_sbatch import array, task
from tests.training.data import tiny_tokenizer
from tests.training.data.test_dataset import SMALL, make
from training import registry
from training.data import codes
from training.data.dataset import ClipDataset, to_float
from training.network_file import content_hash, load_tokenizer, save_network

SHARDS = [{"a": 9, "b/c": 12, "d": 3}, {"e": 10, "f": 21}]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(registry, "SYSTEMS", dict(registry.SYSTEMS))
    tiny_tokenizer.register()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = make(tmp_path_factory.mktemp("encode") / "data", SHARDS)
    for path in (root / "0008x0016").glob("*.zip"):
        with zipfile.ZipFile(path, "a") as shard:
            lengths = {clip: len(names) for clip, names in json.loads(shard.read("frame_paths.json")).items()}
            shard.writestr(
                "actions.json", json.dumps({clip: ["none"] + ["left"] * (n - 1) for clip, n in lengths.items()})
            )
    return root


@pytest.fixture
def tokenizer_file(tmp_path):
    """Return a function that writes a tokenizer with the given options and returns its path."""

    def write(seed=0, **options):
        path = tmp_path / f"tokenizer-{seed}.safetensors"
        save_network(tiny_tokenizer.tiny_tokenizer(seed, **options), path)
        return path

    return write


def run(root, tokenizer, out, *arguments, code=0):
    command = [root, f"--tokenizer={tokenizer}", f"--out={out}", "--device=cpu", "--workers=2", *arguments]
    result = CliRunner().invoke(encode_dataset.main, [str(word) for word in command])
    assert result.exit_code == code, result.output
    return result.output


def process(root, tokenizer, out, *arguments, **variables):
    command = [sys.executable, tiny_tokenizer.__file__, root, f"--tokenizer={tokenizer}", f"--out={out}"]
    environment = {**os.environ, "PYTHONPATH": str(tiny_tokenizer.ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen([str(w) for w in (*command, "--device=cpu", *arguments)], env=environment, text=True)


def content(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, ()),
        ({"clip_frames": 1}, ("--batch=5",)),
        ({"clip_frames": 4}, ("--batch=1", "--workers=1")),
        ({"clip_frames": 6, "stride": (3, 4)}, ()),
        ({"clip_frames": 100}, ()),
        ({"clip_frames": 2, "stride": (2, 8)}, ("--batch=2",)),
    ],
)
def test_tokens_are_those_of_the_frames(root, tokenizer_file, tmp_path, options, arguments):
    path, out = tokenizer_file(**options), tmp_path / "out"
    output = run(root, path, out, *arguments)
    network, sha256 = load_tokenizer(path)
    assert sha256 == content_hash(network)
    folder = out / f"codes-{sha256[:12]}"
    assert f"Next: python -m dataset_tools.inspect_dataset {out}" in output
    assert "5 clips," in output and "frames per second" in output and "MB of frames" in output
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["tokenizer"] == sha256 and manifest["size"] == [8, 16] and manifest["num_partitions"] == 2
    assert manifest["stride"] == list(network.stride) and manifest["fps"] == 30
    dataset, stored = ClipDataset(root, [SMALL]), ClipDataset(out, [], codes=sha256, streams=["actions"])
    assert [clip.path for clip in stored.clips] == ["a", "b/c", "d", "e", "f"]
    stride, length = network.stride[0], network.clip_frames
    for clip, number in enumerate(dataset.lengths.tolist()):
        frames = to_float(torch.from_numpy(dataset.read(clip, SMALL, range(number)))[None], torch.device("cpu"))
        whole = number // length * length
        parts = list(frames[:, :, :whole].split(length, 2)) if whole else []
        parts += [frames[:, :, whole:]] if whole < number and stride == 1 else []
        expected = [network.encode(part)[0] for part in parts]
        assert stored.lengths[clip] == (number if stride == 1 else whole)
        if expected:
            found = stored.read_codes(clip, 0, int(stored.lengths[clip]) // stride)
            assert np.array_equal(found, torch.cat(expected))
        assert stored.read_stream(clip, "actions", 0, 3).tolist() == [0, 1, 1]


def test_all_partitions_make_what_one_run_makes(root, tokenizer_file, tmp_path, repo):
    path = tokenizer_file()
    run(root, path, tmp_path / "one", "--num-partitions=7")
    for index in (3, 0, 6, 1, 2, 5, 4):
        output = run(root, path, tmp_path / "many", f"--partition={index}", "--num-partitions=7")
        assert f"are in partition {index} of {tmp_path / 'many'}" in output and "Next, when all are made" in output
    assert content(tmp_path / "one") == content(tmp_path / "many")
    assert len(content(tmp_path / "one")) == 6, "two partitions have no clips"
    run(root, path, tmp_path / "two", "--num-partitions=7", "--batch=16", "--workers=1")
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert "partition 9 does not exist" in run(root, path, tmp_path / "x", "--partition=9", code=1)


def test_a_slurm_array_can_run_it(root, tmp_path, repo):
    result = task(repo, tmp_path, "encode_dataset", root, "--tokenizer=nothing.pkl", **array(0, 2))
    assert result.returncode == 1 and "nothing.pkl" in result.stderr


def test_a_run_that_was_killed_goes_on_and_makes_the_same_bytes(root, tokenizer_file, tmp_path):
    path = tokenizer_file()
    run(root, path, tmp_path / "whole", "--num-partitions=3")
    running = process(root, path, tmp_path / "killed", "--num-partitions=3", "--batch=1", PAUSE_SEC="0.2")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("codes-*/partition_0000.zip")) and time.monotonic() < deadline:
        time.sleep(0.01)
    while not list((tmp_path / "killed").glob("codes-*/.partition_0001.*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    running.kill()
    assert running.wait() != 0
    (folder,) = (tmp_path / "killed").glob("codes-*")
    assert not (folder / "partition_0001.zip").exists() and list(folder.glob(".partition_0001.*"))
    kept = (folder / "partition_0000.zip").stat()
    assert "1 of 3 shards were there already" in run(root, path, tmp_path / "killed", "--num-partitions=3")
    assert (folder / "partition_0000.zip").stat().st_mtime_ns == kept.st_mtime_ns
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert "3 of 3 shards were there already" in run(root, path, tmp_path / "killed", "--num-partitions=3")


def test_what_is_damaged_or_of_other_frames_is_made_again(root, tokenizer_file, tmp_path):
    data, path = shutil.copytree(root, tmp_path / "data"), tokenizer_file()
    run(data, path, data)
    (folder,) = data.glob("codes-*")
    before = content(folder)
    shard = folder / "partition_0001.zip"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "1 of 2 shards were there already" in run(data, path, data)
    assert content(folder) == before
    shutil.rmtree(data / "0008x0016")
    make(data, [{**SHARDS[0], "d": 4}, SHARDS[1]])
    assert "1 of 2 shards were there already" in run(data, path, data)
    assert ClipDataset(data, [SMALL], codes=load_tokenizer(path)[1]).lengths.tolist() == [9, 12, 4, 10, 21]


def test_other_divisions_are_refused_one_by_one_and_replaced_as_a_whole(root, tokenizer_file, tmp_path):
    path, out = tokenizer_file(), tmp_path / "out"
    run(root, path, out, "--num-partitions=4")
    output = run(root, path, out, "--partition=0", "--num-partitions=2", code=1)
    assert "was made otherwise (num_partitions is 4, not 2); delete it, or give another output folder" in output
    run(root, path, out, "--num-partitions=2")
    run(root, path, tmp_path / "fresh", "--num-partitions=2")
    assert content(out) == content(tmp_path / "fresh")


def test_tokens_of_two_tokenizers_lie_side_by_side(root, tokenizer_file, tmp_path):
    for seed in range(2):
        run(root, tokenizer_file(seed), tmp_path / "out")
    assert len(list((tmp_path / "out").glob("codes-*"))) == 2
    sha256 = load_tokenizer(tokenizer_file(0))[1]
    manifest = codes.codes_folder(tmp_path / "out", sha256) / "manifest.json"
    manifest.write_text(manifest.read_text().replace(sha256, sha256[:12] + "0" * 52))
    assert "holds tokens of another tokenizer" in run(root, tokenizer_file(0), tmp_path / "out", code=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary": 70000}, "a vocabulary of 70000, but stored tokens are below 65536"),
        ({"height": 16, "width": 32}, "no frames of 16x32; sizes found: 0008x0016"),
        ({"clip_frames": 5, "stride": (2, 4)}, "correct its clip_frames or its stride"),
    ],
)
def test_what_cannot_be_encoded_is_refused(root, tokenizer_file, tmp_path, options, message):
    assert message in run(root, tokenizer_file(**options), tmp_path / "out", code=1)
    assert not (tmp_path / "out").exists()


def test_tokens_out_of_the_vocabulary_are_refused_and_nothing_stays(root, tokenizer_file, tmp_path, monkeypatch):
    encode = tiny_tokenizer.TinyTokenizer.encode
    monkeypatch.setattr(tiny_tokenizer.TinyTokenizer, "encode", lambda self, video: encode(self, video) + 30)
    output = run(root, tokenizer_file(), tmp_path / "out", code=1)
    assert "but its vocabulary is 32; correct the tokenizer" in output
    assert not list((tmp_path / "out").rglob("*.zip"))


# ----------------------------------------------------------------------------
# Other tools.


def inspect(root, *arguments, code=0):
    result = CliRunner().invoke(inspect_dataset.main, [str(root), "--num-frames=2", *arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def encoded(tokenizer_file, tmp_path):
    """Return a dataset as the makers make it, with streams and tokens."""
    root = tmp_path / "made"
    pictures = np.random.RandomState(0).randint(0, 256, (4, 6, 8, 16, 3), np.uint8)
    for index in range(2):
        with archive.ShardWriter(root, [(8, 16)], index) as writer:
            for clip in range(2):
                with writer.clip(f"{index}/{clip}", actions=["none"] + ["left"] * 5) as add:
                    for picture in pictures[2 * index + clip]:
                        add([encode_jpeg(picture, 90)])
        archive.describe_dataset(root, [writer.report({30: 2})], 2, [], seed=0, actions=["none", "right", "left"])
    run(root, tokenizer_file(), root)
    return root


def test_inspection_lists_tokens_and_finds_what_is_wrong(encoded):
    (folder,) = encoded.glob("codes-*")
    sha256 = json.loads((folder / "manifest.json").read_text())["tokenizer"]
    output = inspect(encoded)
    assert f"{folder.name}  tokenizer {sha256}" in output
    assert "2 shards  4 clips  24 steps of 2x4 tokens below 32, a step is 1 frames, a token 4 pixels" in output
    path = folder / "partition_0001.zip"
    whole = bytearray(path.read_bytes())
    place = whole.index(b"NUMPY") + 140
    whole[place] ^= 1
    path.write_bytes(whole)
    output = inspect(encoded, code=1)
    assert "tokens or latents that are damaged: " in output and "1/0.npy: its checksum is wrong" in output
    assert f"mend: delete what is damaged, then: python -m dataset_tools.encode_dataset {encoded}" in output
    assert "damaged" not in inspect(encoded, "--quick")
    path.unlink()
    assert "partition_0001.zip is missing, though listed" in inspect(encoded, "--quick", code=1)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["partitions"]["0001"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "1 of 2 partitions have not been made" in inspect(encoded)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "num_partitions": 1}))
    assert "1/0: no frames, 6 in the dataset" in inspect(encoded)


def test_tokens_without_frames_are_inspected_too(encoded):
    (encoded / "0008x0016").rename(encoded.parent / "0008x0016")
    assert "tokens without frames" in inspect(encoded) and "4 clips  24 steps" in inspect(encoded)
    (next(encoded.glob("codes-*")) / "partition_0000.zip").write_bytes(b"")
    assert "1 errors: training would reject this" in inspect(encoded, code=1)


def test_merging_keeps_the_names_of_actions_and_leaves_tokens_alone(encoded):
    before = content(next(encoded.glob("codes-*")))
    result = CliRunner().invoke(merge.main, [str(encoded)])
    assert result.exit_code == 0, result.output
    assert content(next(encoded.glob("codes-*"))) == before
    sha256 = json.loads(before["manifest.json"])["tokenizer"]
    dataset = ClipDataset(encoded, [SMALL], codes=sha256, streams=["actions"])
    assert dataset.read_stream(3, "actions", 0, 2).tolist() == [0, 2]
