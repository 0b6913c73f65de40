"""Shards are written atomically and reproducibly, and dataset.json lists them."""

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
    return writer.report({25.0: len(names)})


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
    report = write(tmp_path, index=7, actions=["none", "left"])
    hashes = report.hashes
    assert files(tmp_path) == ["0004x0008/partition_0007.zip", "0008x0016/partition_0007.zip"]
    for name, kind in zip(sorted(hashes), ("small", "large"), strict=True):
        assert hashes[name] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        with zipfile.ZipFile(tmp_path / name) as shard:
            assert {info.compress_type for info in shard.infolist()} == {zipfile.ZIP_STORED}
            assert shard.read("b/x/frame_000001.jpg") == f"{kind} one".encode()
            paths = {clip: ["frame_000000.jpg", "frame_000001.jpg"] for clip in ("a", "b/x")}
            assert shard.read("frame_paths.json").decode() == json.dumps(paths, indent=2)
            assert json.loads(shard.read("actions.json")) == {"a": ["none", "left"], "b/x": ["none", "left"]}
    digests = {"0004x0008": b"small 0small one", "0008x0016": b"large 0large one"}
    digests = {size: hashlib.sha256(content).hexdigest() for size, content in digests.items()}
    assert report.clips == {name: {"frames": 2, "sha256": digests} for name in ("a", "b/x")}
    assert report.summary() == {"clips": 2, "frames": 4, "rates": {"25": 2}, "skipped": []}


def test_the_same_frames_make_the_same_bytes_and_a_rerun_replaces(tmp_path):
    first = write(tmp_path)
    content = {name: (tmp_path / name).read_bytes() for name in first.hashes}
    assert write(tmp_path) == first
    assert {name: (tmp_path / name).read_bytes() for name in first.hashes} == content
    assert write(tmp_path, names=("a",)) != first


def test_an_interrupted_shard_leaves_nothing_and_keeps_the_old_one(tmp_path):
    first = write(tmp_path).hashes
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


def test_a_shard_without_clips_leaves_no_zip_and_removes_an_older_one(tmp_path):
    write(tmp_path)
    report = write(tmp_path, names=())
    assert files(tmp_path) == [] and report.hashes == {} and report.summary()["clips"] == 0


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    folder = tmp_path / "0004x0008"
    folder.mkdir()
    (folder / ".partition_0000.77-0123abcd.tmp.zip").write_bytes(b"half")
    (folder / ".partition_0001.78-0123abcd.tmp.zip").write_bytes(b"somebody else's")
    assert files(tmp_path)
    write(tmp_path)
    assert [name for name in files(tmp_path) if "tmp" in name] == ["0004x0008/.partition_0001.78-0123abcd.tmp.zip"]


@given(num_frames=st.integers(0, 12), cuts=st.sets(st.integers(1, 11)), min_frames=st.integers(1, 5))
def test_a_clip_is_stored_shot_by_shot(tmp_path_factory, num_frames, cuts, min_frames):
    cuts = sorted(cut for cut in cuts if cut < num_frames)
    content = [[f"{kind}{frame}".encode() for kind in ("s", "large")] for frame in range(num_frames)]
    expected = [list(part) for part in np.split(np.arange(num_frames), cuts)]
    root = tmp_path_factory.mktemp("shots")
    with archive.ShardWriter(root, SIZES, 0) as writer:
        with writer.clip("v", min_frames, {"level": 3}, frame=list(range(num_frames))) as clip:
            for frame in content:
                clip(frame)
            clip.cuts = cuts
    kept = {f"v/shot_{i:04d}": frames for i, frames in enumerate(expected) if len(frames) >= min_frames}
    assert {name: clip["frames"] for name, clip in writer.report().clips.items()} == {
        k: len(v) for k, v in kept.items()
    }
    assert all(clip["level"] == 3 for clip in writer.report().clips.values())
    dropped = [len(frames) for frames in expected if len(frames) < min_frames]
    assert [count for _, count in writer.dropped] == dropped
    for column, path in enumerate(writer.paths):
        assert path.exists() == bool(kept)
        if kept:
            with zipfile.ZipFile(path) as shard:
                assert json.loads(shard.read("frame.json")) == kept
                stored = {
                    name: [shard.read(f"{name}/frame_{i:06d}.jpg") for i in range(len(f))] for name, f in kept.items()
                }
                assert stored == {name: [content[frame][column] for frame in frames] for name, frames in kept.items()}


def describe(root, index, num_partitions, sizes=SIZES, names=None, seed=3):
    with archive.ShardWriter(root, sizes, index) as writer:
        for name in names if names is not None else [f"clip{index}"]:
            with writer.clip(name) as add:
                add([f"frame of {name}".encode()] * len(sizes))
    report = writer.report({25.0: len(writer.frame_paths)})
    archive.describe_dataset(root, [report], num_partitions, ["numpy"], source="test", split="val", seed=seed)


def content(root):
    return {name: (root / name).read_bytes() for name in files(root)}


def test_partitions_that_finish_together_make_what_one_run_makes(tmp_path):
    context = multiprocessing.get_context("fork")
    together, alone = tmp_path / "together", tmp_path / "alone"
    processes = [context.Process(target=describe, args=(together, index, 6)) for index in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    for index in range(6):
        describe(alone, index, 6)
    assert content(together) == content(alone)
    description = json.loads((together / "dataset.json").read_text())
    names = [f"{size}/partition_{i:04d}.zip" for size in ("0004x0008", "0008x0016") for i in range(6)]
    assert files(together) == sorted([*names, "dataset.json", "manifest.json"])
    assert description.pop("hashes") == {
        name: hashlib.sha256((together / name).read_bytes()).hexdigest() for name in names
    }
    one = {"clips": 1, "frames": 1, "rates": {"25": 1}, "skipped": []}
    assert description == {
        "fps": 25,
        "source": "test",
        "split": "val",
        "seed": 3,
        "sizes": ["0004x0008", "0008x0016"],
        "num_partitions": 6,
        "partitions": {f"{index:04d}": one for index in range(6)},
        "num_clips": 6,
        "num_frames": 6,
        "versions": {"numpy": np.__version__},
    }
    clips = json.loads((together / "manifest.json").read_text())["clips"]
    assert clips["clip4"]["shard"] == "partition_0004.zip" and set(clips["clip4"]["sha256"]) == set(
        description["sizes"]
    )


def test_a_partition_made_again_replaces_what_was_known_of_it(tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    describe(twice, 0, 2, names=["old", "older"])
    for root in (once, twice):
        describe(root, 0, 2)
        describe(root, 1, 2)
    assert content(once) == content(twice)


def test_sizes_made_one_after_the_other_are_described_like_sizes_made_at_once(tmp_path):
    describe(tmp_path / "once", 0, 1)
    for size in SIZES:
        describe(tmp_path / "one by one", 0, 1, [size])
    assert content(tmp_path / "once") == content(tmp_path / "one by one")


def test_making_a_dataset_again_otherwise_removes_the_earlier_shards(tmp_path):
    for index in range(3):
        describe(tmp_path / "again", index, 3)
    for index in range(2):
        describe(tmp_path / "again", index, 2)
        describe(tmp_path / "new", index, 2)
    assert content(tmp_path / "again") == content(tmp_path / "new")


def test_shards_made_otherwise_are_not_mixed(tmp_path):
    facts = {"source": "test", "split": "val"}
    for index in range(2):
        describe(tmp_path, index, 2)
    archive.refuse_mixture(tmp_path, SIZES, range(2), 2, seed=4, **facts)  # all is made anew
    archive.refuse_mixture(tmp_path, SIZES, range(1), 1, seed=4, **facts)  # with fewer partitions
    archive.refuse_mixture(tmp_path, [(2, 4)], range(2), 2, seed=3, **facts)  # one more size of the same
    archive.refuse_mixture(tmp_path, SIZES, [1], 2, seed=3, **facts)  # one partition again
    archive.refuse_mixture(tmp_path / "new", SIZES, [1], 2, seed=3, **facts)
    with pytest.raises(ValueError, match=r"holds 0008x0016/partition_0000.zip and 1 more .* \(seed is 3, not 4\)"):
        archive.refuse_mixture(tmp_path, [(4, 8)], range(2), 2, seed=4, **facts)
    with pytest.raises(ValueError, match=r"partition_0000.zip and 1 more .*num_partitions is 2, not 5"):
        archive.refuse_mixture(tmp_path, SIZES, [1], 5, seed=3, **facts)
