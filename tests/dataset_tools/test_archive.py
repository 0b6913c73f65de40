"""Shards appear whole or not at all, hold the same bytes whenever made, and dataset.json keeps account of them."""

import hashlib
import json
import multiprocessing
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_tools import archive

SIZES = [(4, 8), (8, 16)]


def write(root, index=0, names=("b/x", "a"), **notes):
    with archive.ShardWriter(root, SIZES, index) as writer:
        for name in names:
            with writer.clip(name, **notes) as add:
                add([b"small 0", b"large 0"])
                add([b"small one", b"large one"])
    return writer.hashes


def files(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


@given(st.integers(0, 60), st.integers(1, 12))
def test_partitions_cover_all_items_once_like_array_split(num_items, num_partitions):
    parts = [list(archive.partition(range(num_items), i, num_partitions)) for i in range(num_partitions)]
    assert parts == [part.tolist() for part in np.array_split(np.arange(num_items), num_partitions)]


def test_a_partition_beyond_the_last_is_refused():
    with pytest.raises(ValueError, match="partition 10 does not exist; 10 partitions are 0 ... 9"):
        archive.partition(range(30), 10, 10)


def test_a_shard_holds_stored_frames_and_its_index_at_each_size(tmp_path):
    hashes = write(tmp_path, index=7, actions=["none", "left"])
    assert files(tmp_path) == ["0004x0008/partition_0007.zip", "0008x0016/partition_0007.zip"]
    for name, kind in zip(sorted(hashes), ("small", "large"), strict=True):
        assert hashes[name] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        with zipfile.ZipFile(tmp_path / name) as shard:
            assert {info.compress_type for info in shard.infolist()} == {zipfile.ZIP_STORED}
            assert shard.read("b/x/frame_000001.jpg") == f"{kind} one".encode()
            paths = {clip: ["frame_000000.jpg", "frame_000001.jpg"] for clip in ("a", "b/x")}
            assert shard.read("frame_paths.json").decode() == json.dumps(paths, indent=2)
            assert json.loads(shard.read("actions.json")) == {"a": ["none", "left"], "b/x": ["none", "left"]}


def test_the_same_frames_make_the_same_bytes_and_a_rerun_replaces(tmp_path):
    first = write(tmp_path)
    content = {name: (tmp_path / name).read_bytes() for name in first}
    assert write(tmp_path) == first
    assert {name: (tmp_path / name).read_bytes() for name in first} == content
    assert write(tmp_path, names=("a",)) != first


def test_an_interrupted_shard_leaves_nothing_and_keeps_the_old_one(tmp_path):
    first = write(tmp_path)
    with pytest.raises(KeyboardInterrupt), archive.ShardWriter(tmp_path, SIZES, 0) as writer:
        with writer.clip("new") as add:
            add([b"s", b"l"])
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), archive.ShardWriter(tmp_path, SIZES, 1) as writer:
        with writer.clip("new") as add:
            add([b"s", b"l"])
            raise KeyboardInterrupt
    assert files(tmp_path) == sorted(first)
    for name, digest in first.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest


def test_a_broken_clip_and_an_empty_one_leave_no_trace(tmp_path):
    with archive.ShardWriter(tmp_path, SIZES, 0) as writer:
        with pytest.raises(ValueError, match="broken"), writer.clip("bad") as add:
            add([b"s", b"l"])
            raise ValueError("broken")
        with writer.clip("empty"):
            pass
        with writer.clip("good") as add:
            add([b"s", b"l"])
    for size in ("0004x0008", "0008x0016"):
        with zipfile.ZipFile(tmp_path / size / "partition_0000.zip") as shard:
            assert shard.namelist() == ["good/frame_000000.jpg", "frame_paths.json"]


def describe(root, index, num_partitions):
    hashes = write(root, index, names=(f"clip{index}",))
    archive.describe_dataset(root, hashes, num_partitions, ["numpy"], fps=25, source="test", split="val", seed=3)


def test_partitions_that_finish_together_are_all_accounted_for(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=describe, args=(tmp_path, index, 6)) for index in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    description = json.loads((tmp_path / "dataset.json").read_text())
    assert {key: description[key] for key in ("fps", "source", "split", "seed")} == {
        "fps": 25,
        "source": "test",
        "split": "val",
        "seed": 3,
    }
    assert description["sizes"] == ["0004x0008", "0008x0016"]
    assert description["versions"] == {"numpy": np.__version__}
    names = [f"{size}/partition_{i:04d}.zip" for size in ("0004x0008", "0008x0016") for i in range(6)]
    assert files(tmp_path) == sorted([*names, "dataset.json"])
    for name in names:
        assert description["hashes"][name] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_making_a_dataset_again_with_fewer_partitions_removes_the_rest(tmp_path):
    for index in range(3):
        describe(tmp_path, index, 3)
    for index in range(2):
        describe(tmp_path, index, 2)
    description = json.loads((tmp_path / "dataset.json").read_text())
    assert sorted([*description["hashes"], "dataset.json"]) == files(tmp_path)
    assert len(description["hashes"]) == 4


def test_sizes_of_different_makings_are_not_mixed(tmp_path):
    describe(tmp_path, 0, 1)
    archive.refuse_mixture(tmp_path, [(4, 8), (8, 16)], seed=4)  # all sizes are made anew
    archive.refuse_mixture(tmp_path, [(2, 4)], seed=3)  # one more of the same
    with pytest.raises(ValueError, match=r"0008x0016 that were made otherwise \(seed is 3, not 4\)"):
        archive.refuse_mixture(tmp_path, [(4, 8)], seed=4)
