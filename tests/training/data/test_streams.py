"""Streams are the values of their frames, whole numbers or vectors; invalid ones are named."""

import json
import time
import zipfile

import numpy as np
import pytest
import torch

from tests.training.data.test_codes import SHA, write_codes
from tests.training.data.test_dataset import SMALL, identify, make
from training.contract import BatchSpec, FrameClip, Stream
from training.data import streams
from training.data.dataset import BatchStream, ClipDataset, to_device
from training.data.shards import Clip
from training.data.streams import StreamStore, read_stream_file

SHARDS = [{"a": 9, "b/c": 12}, {"e": 10}]
CLIPS = [Clip("a", 9), Clip("b/c", 12), Clip("e", 10)]
LENGTHS = {clip.path: clip.num_frames for clip in CLIPS}


def add(root, **notes):
    """Put streams {clip: values} into the zips of the clips."""
    for path in sorted((root / "0008x0016").glob("*.zip")):
        with zipfile.ZipFile(path, "a") as shard:
            clips = json.loads(shard.read("frame_paths.json"))
            for name, values in notes.items():
                shard.writestr(f"{name}.json", json.dumps({clip: values[clip] for clip in clips if clip in values}))
    return root


@pytest.fixture
def root(tmp_path):
    return make(tmp_path / "data", SHARDS)


def numbers():
    return {clip: [100 * k + t for t in range(n)] for k, (clip, n) in enumerate(LENGTHS.items())}


# ----------------------------------------------------------------------------
# Kinds of values.


def test_names_become_numbers_with_none_first(root):
    moves = {"a": ["none"] + ["right"] * 8, "b/c": [None] + ["forward"] * 11, "e": ["none"] + ["left"] * 9}
    store = StreamStore(add(root, actions=moves), "actions", CLIPS)
    assert store.vocabulary == ["none", "forward", "left", "right"] and store.num_values == 4 and not store.is_vector
    assert [store.read(clip, 0, 3).tolist() for clip in range(3)] == [[0, 3, 3], [0, 1, 1], [0, 2, 2]]
    assert store.read(1, 0, 1).dtype == np.int64
    (root / "dataset.json").write_text('{"fps": 30, "actions": ["none", "left", "right", "forward", "jump"]}')
    store = StreamStore(root, "actions", CLIPS)
    assert store.num_values == 5 and store.read(1, 0, 3, 2).tolist() == [0, 3, 3]
    assert StreamStore(root, "actions", CLIPS, vocabulary=["right", "left", "forward"]).read(0, 0, 2).tolist() == [0, 0]
    with pytest.raises(ValueError, match="has actions 'forward', but the names that are known are left, right"):
        StreamStore(root, "actions", CLIPS, vocabulary=["left", "right"])


@pytest.mark.parametrize("listed", ["left", ["left", "left"], [], [1]])
def test_a_list_of_names_in_dataset_json_is_checked(root, listed):
    add(root, actions={clip: ["left"] * n for clip, n in LENGTHS.items()})
    (root / "dataset.json").write_text(json.dumps({"actions": listed}))
    with pytest.raises(ValueError, match=r"'actions' of .*dataset.json is no list of different names"):
        StreamStore(root, "actions", CLIPS)


def test_whole_numbers_stay(root):
    store = StreamStore(add(root, actions=numbers()), "actions", CLIPS)
    assert store.vocabulary is None and store.num_values == 210
    assert store.read(2, 1, 3, 4).tolist() == [201, 205, 209]


def test_vectors_numbers_and_objects(root):
    lists = {clip: [[t, 0.5] for t in range(n)] for clip, n in LENGTHS.items()}
    objects = {clip: ["none"] + [{"turn": -1.5, "forward": t} for t in range(1, n)] for clip, n in LENGTHS.items()}
    speeds = {clip: [None] + [t + 0.25 for t in range(1, n)] for clip, n in LENGTHS.items()}
    add(root, poses=lists, actions=objects, speed=speeds)
    poses, actions, speed = (StreamStore(root, name, CLIPS) for name in ("poses", "actions", "speed"))
    assert [store.num_values for store in (poses, actions, speed)] == [2, 2, 1] and poses.is_vector
    assert poses.read(0, 3, 2).tolist() == [[3, 0.5], [4, 0.5]] and poses.read(0, 3, 2).dtype == np.float32
    assert actions.read(1, 0, 3, 5).tolist() == [[0, 0], [5, -1.5], [10, -1.5]]  # forward before turn
    assert speed.read(2, 0, 2).tolist() == [[0], [1.25]] and speed.vocabulary is None


def test_a_shard_of_nothing_but_none_goes_with_any_other(root):
    for name, value, expected in [("one", [1.0, 2.0], [[0, 0]] * 2), ("two", 5, [0, 0]), ("three", "left", [0, 0])]:
        values = {clip: ["none" if clip == "e" else value] * n for clip, n in LENGTHS.items()}
        assert StreamStore(add(root, **{name: values}), name, CLIPS).read(2, 0, 2).tolist() == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2, 3], r"at entry 4 \[1, 2, 3\], where numbers like those of \[0, 1\] were expected"),
        ({"x": 1}, 'at entry 4 {"x": 1}, where numbers'),
        ([float("nan"), 0], r"at entry 4 \[nan, 0.0\], where finite numbers were expected"),
        ([1e300, 0], "where finite numbers were expected"),
        ([True, 0], "where numbers like"),
        ("left", 'at entry 4 "left", where numbers'),
        ([10**400, 0], "a number that is too large"),
    ],
)
def test_bad_vectors_name_clip_and_entry(root, value, message):
    values = {clip: [[0, 1]] * n for clip, n in LENGTHS.items()}
    values["b/c"] = [*values["b/c"][:4], value, *values["b/c"][5:]]
    with pytest.raises(ValueError, match=message) as error:
        StreamStore(add(root, poses=values), "poses", CLIPS)
    if "too large" not in message:
        assert "the poses of clip b/c in" in str(error.value)


@pytest.mark.parametrize(
    ("value", "message"), [(-1, "entry 0 -1, where a whole"), (True, "entry 0 true"), (2**40, "where a whole number")]
)
def test_bad_whole_numbers_name_clip_and_entry(root, value, message):
    with pytest.raises(ValueError, match=f"the actions of clip e in .*{message}"):
        StreamStore(add(root, actions=numbers() | {"e": [value] + [1] * 9}), "actions", CLIPS)


def test_shards_that_differ_in_kind_are_refused(root):
    add(root, actions=numbers() | {"e": ["left"] * 10})
    with pytest.raises(
        ValueError, match=r"in .*partition_0001.zip are names of another form than those in .*_0000.zip"
    ):
        StreamStore(root, "actions", CLIPS)


def test_lengths_and_clips_must_be_those_of_the_frames(root):
    add(root, actions=numbers() | {"e": [1] * 9})
    with pytest.raises(ValueError, match="clip e has 10 frames but 9 actions in"):
        ClipDataset(root, [SMALL], streams=["actions"])
    add(root, speed={"a": [1] * 9, "e": [1] * 10})
    with pytest.raises(ValueError, match="clip b/c has 12 frames but no speed in"):
        ClipDataset(root, [SMALL], streams=["speed"])
    with pytest.raises(ValueError, match="has no wind beside its frames: its zips hold actions, speed; make"):
        ClipDataset(root, [SMALL], streams=["wind"])
    for name in ("index", "../x", "frame_paths", "x_flip"):
        with pytest.raises(ValueError, match="cannot be the name of a stream"):
            ClipDataset(root, [SMALL], streams=[name])


def test_streams_that_are_no_json_are_refused(root):
    for path in (root / "0008x0016").glob("*.zip"):
        with zipfile.ZipFile(path, "a") as shard:
            shard.writestr("actions.json", '{"a": 3')
    with pytest.raises(ValueError, match=r"the actions in .*partition_0000.zip cannot be read"):
        StreamStore(root, "actions", CLIPS)


# ----------------------------------------------------------------------------
# What is kept beside the zips.


def test_what_was_parsed_is_kept_and_belongs_to_its_zip(root, monkeypatch):
    add(root, actions=numbers(), poses={clip: [[1.5, t] for t in range(n)] for clip, n in LENGTHS.items()})
    before = {name: StreamStore(root, name, CLIPS) for name in ("actions", "poses")}
    cache = root / "0008x0016" / "partition_0000.actions.npz"
    assert cache.exists()
    with monkeypatch.context() as patch:
        patch.setattr(streams, "_parse_shard", None)
        for name, store in before.items():
            assert np.array_equal(StreamStore(root, name, CLIPS).read(1, 0, 12), store.read(1, 0, 12))
    cache.write_bytes(cache.read_bytes()[:50])
    assert StreamStore(root, "actions", CLIPS).read(1, 0, 2).tolist() == [100, 101]
    make(root.parent / "other", SHARDS)
    add(root.parent / "other", actions={clip: [7] * n for clip, n in LENGTHS.items()})
    (root.parent / "other/0008x0016/partition_0000.zip").replace(root / "0008x0016/partition_0000.zip")
    assert StreamStore(root, "actions", CLIPS).read(1, 0, 2).tolist() == [7, 7]


def test_many_clips_open_fast(tmp_path):
    folder = tmp_path / "0008x0016"
    folder.mkdir()
    for shard in range(20):
        poses = {f"{shard:02d}/{k}": [[k, t, 0.125] for t in range(300)] for k in range(20)}
        with zipfile.ZipFile(folder / f"partition_{shard:04d}.zip", "w") as archive:
            archive.writestr("poses.json", json.dumps(poses))
    clips = [Clip(f"{shard:02d}/{k}", 300) for shard in range(20) for k in range(20)]
    StreamStore(tmp_path, "poses", clips)
    begin = time.process_time()
    assert StreamStore(tmp_path, "poses", clips).read(41, 7, 1).tolist() == [[1, 7, 0.125]]
    assert time.process_time() - begin < 0.4, "a fifth of 2000 clips of 300 frames"


# ----------------------------------------------------------------------------
# Labels.


def test_labels_come_from_a_file_by_clip_or_folder(root):
    (root / "labels.json").write_text('{"a": "horse", "b": "bike", "b/c": "cat", "e": "bike"}')
    store = StreamStore(root, "label", CLIPS)
    assert store.vocabulary == ["bike", "cat", "horse"]
    assert [store.read(clip, 3, 2).tolist() for clip in range(3)] == [[2, 2], [1, 1], [0, 0]]
    (root / "labels.json").write_text('{"a": 4, "b": 1, "e": 0}')
    store = StreamStore(root, "label", CLIPS)
    assert store.num_values == 5 and [int(store.read(clip, 0, 1)[0]) for clip in range(3)] == [4, 1, 0]


def test_labels_are_folders_without_a_file(tmp_path):
    clips = [Clip("run/0", 3), Clip("jump/0", 3), Clip("run/1", 3)]
    store = StreamStore(tmp_path, "label", clips)
    assert store.vocabulary == ["jump", "run"] and [int(store.read(k, 0, 1)[0]) for k in range(3)] == [1, 0, 1]
    assert int(StreamStore(tmp_path, "label", clips[:1], vocabulary=["fly", "run"]).read(0, 0, 1)[0]) == 1
    with pytest.raises(ValueError, match="lie in one folder, whose name is no label"):
        StreamStore(tmp_path, "label", clips[::2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1, "b": 2}', "clip e of .* has no label; give .*labels.json an entry"),
        ('{"a": 1, "b": "x", "e": 0}', "the label of clip a in .* is 1, where a name was expected"),
        ('{"a": -1, "b": 1, "e": 0}', "the label of clip a in .* is -1"),
        ('{"a": [1], "b": [1], "e": [0]}', "are vectors"),
        ("[]", "is no object that maps clips to labels"),
        ("{", "is no object that maps clips to labels"),
    ],
)
def test_bad_labels_are_refused(root, content, message):
    (root / "labels.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        StreamStore(root, "label", CLIPS)


def test_a_clip_in_no_folder_has_no_label(root):
    with pytest.raises(ValueError, match=r"clip a of .* has no label; write .*labels.json"):
        StreamStore(root, "label", CLIPS)


# ----------------------------------------------------------------------------
# Batches.


def test_values_lie_beside_their_frames(root):
    add(
        root,
        actions=numbers(),
        poses={clip: [[t, 0.5, k] for t in range(n)] for k, (clip, n) in enumerate(LENGTHS.items())},
    )
    dataset = ClipDataset(root, [SMALL], streams=["actions", "poses"])
    parts = (FrameClip("video", *SMALL, 0, 6), Stream("actions", 1, 5), Stream("poses", 0, 3, 2))
    stream = BatchStream(dataset, seed=0, batch_size=4, x_flip=False, num_workers=2)
    for batch in stream.prefetch((n, BatchSpec(6, parts)) for n in range(5)):
        assert batch["actions"].shape == (4, 5) and batch["poses"].shape == (4, 3, 3)
        sent = to_device(batch, torch.device("cpu"))
        assert sent["actions"].dtype == torch.int64 and sent["poses"].dtype == torch.float32
        for frames, actions, poses in zip(batch["video"].numpy(), sent["actions"], sent["poses"], strict=True):
            clip, first, _ = identify(frames[0].astype(int))
            assert actions.tolist() == [100 * clip + first + t for t in range(1, 6)]
            assert poses.tolist() == [[first + t, 0.5, clip] for t in (0, 2, 4)]
    for name in ("actions", "poses"):
        with pytest.raises(ValueError, match=f"clips cannot be mirrored, for their {name} would not be"):
            BatchStream(dataset, seed=0, batch_size=4).batch(0, BatchSpec(6, (Stream(name, 0, 1),)))


def test_streams_beside_tokens_are_read_without_frames(root):
    write_codes(root, SHARDS)
    add(root, actions=numbers())
    (root / "0008x0016").rename(root / "0036x0064")  # searched where nothing else has the stream
    folder = root / f"codes-{SHA[:12]}"
    for path, clips in zip(sorted(folder.glob("*.zip")), SHARDS, strict=True):
        with zipfile.ZipFile(path, "a") as shard:
            shard.writestr("actions.json", json.dumps({clip: numbers()[clip] for clip in clips}))
    dataset = ClipDataset(root, [], codes=SHA, streams=["actions"])
    assert dataset.read_stream(1, "actions", 2, 2).tolist() == [102, 103]


# ----------------------------------------------------------------------------
# Files of users.

VOCABULARY = ["none", "forward", "left", "right"]


def write(path, content):
    if path.suffix == ".npy":
        np.save(path, content)
    elif path.suffix == ".npz":
        np.savez(path, **content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", [0, 2, 1, 3]),
        ("a.json", [None, "left", "forward", "right"]),
        ("a.json", ["none", "left", "forward", "right"]),
        ("a.txt", "0\n2\n1\n3\n"),
        ("a.csv", "none\nleft\nforward\n right \n\n"),
        ("a.npy", np.array([0, 2, 1, 3], np.uint8)),
        ("a.npy", np.array(["none", "left", "forward", "right"])),
        ("a.npz", {"actions": np.array([0, 2, 1, 3]), "other": np.zeros(2)}),
        ("a.npz", {"x": np.array([0, 2, 1, 3])}),
    ],
)
def test_actions_of_any_file(tmp_path, name, content):
    found = read_stream_file(write(tmp_path / name, content), "actions", VOCABULARY)
    assert found.dtype == np.int64 and found.tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", ["none", [1, -0.5]]),
        ("a.json", [None, {"turn": -0.5, "forward": 1}]),
        ("a.csv", "none\n1, -0.5\n"),
        ("a.txt", "0 0\n1 -0.5\n"),
        ("a.npy", np.array([[0, 0], [1, -0.5]])),
    ],
)
def test_vectors_of_any_file(tmp_path, name, content):
    found = read_stream_file(write(tmp_path / name, content), "actions", width=2)
    assert found.dtype == np.float32 and found.tolist() == [[0, 0], [1, -0.5]]


def test_what_is_asked_for_decides_about_the_rest(tmp_path):
    assert read_stream_file(write(tmp_path / "a.json", [5, 9]), "actions").tolist() == [5, 9]
    assert read_stream_file(write(tmp_path / "a.json", [5, 9]), "speed", width=1).tolist() == [[5], [9]]
    assert read_stream_file(write(tmp_path / "a.json", ["none", None]), "actions").tolist() == [0, 0]
    assert read_stream_file(write(tmp_path / "a.json", ["none"]), "actions", width=3).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.json", [0] * 12 + [7], {"num_values": 4}, "has action 7 at entry 12, but the model knows 0 to 3"),
        ("a.json", [0, -1], {"num_values": 4}, "has at entry 1 -1, where a whole number from 0 on was expected"),
        ("a.npy", np.array([0, 7]), {"vocabulary": VOCABULARY}, "has action 7 at entry 1, but the model knows 0 to 3"),
        (
            "a.json",
            ["left", "jump"],
            {"vocabulary": VOCABULARY},
            "action 'jump' at entry 1, but the model knows none, f",
        ),
        ("a.json", ["left"], {}, "has action 'left' at entry 0, but the model knows no names"),
        ("a.json", ["left"], {"width": 2}, "of names, but the model takes vectors of 2 numbers"),
        ("a.json", [[1, 2, 3]], {"width": 2}, "of 3 numbers each, but the model takes vectors of 2 numbers"),
        ("a.json", [[1, 2]], {"num_values": 4}, "holds vectors, but the model takes whole numbers from 0 to 3"),
        ("a.json", [[1, 2], [3]], {}, r"has at entry 1 \[3\], where numbers like those of \[1, 2\]"),
        ("a.json", [1, "left"], {}, "has at entry 0 1, where a name was expected"),
        ("a.json", [1.5, float("nan")], {}, r"has at entry 1 \[nan\], where finite numbers were expected"),
        ("a.json", {"a": 1}, {}, "it has {'a': 1} as its content, expected a list"),
        ("a.json", "[1,", {}, "cannot be read as actions"),
        ("a.json", [], {}, "holds no actions"),
        ("a.txt", "1\n\n2", {}, "has at entry 1 an empty line"),
        ("a.txt", "1 2\n1 x", {}, 'has at entry 1 "x", where a number was expected'),
        ("a.npy", np.zeros((2, 2, 2)), {}, r"its shape is \[2, 2, 2\]"),
        ("a.npy", np.array([[np.inf]]), {}, "where finite numbers were expected"),
        ("a.npy", np.array([1j]), {}, "its values are complex128"),
        ("a.npz", {"x": np.zeros(2), "y": np.zeros(2)}, {}, "it has the arrays x, y, none of them named actions"),
        ("a.bin", "", {}, "cannot be read as actions; expected .json, .npy, .npz, .csv or .txt"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, options, message):
    with pytest.raises(ValueError, match=message) as error:
        read_stream_file(write(tmp_path / name, content), "actions", **options)
    assert str(tmp_path / name) in str(error.value)


def test_missing_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no file .*a.json; expected actions as"):
        read_stream_file(tmp_path / "a.json", "actions")
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match="cannot be read as actions"):
        read_stream_file(tmp_path / "a.npy", "actions")
    np.save(tmp_path / "b.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read as actions"):
        read_stream_file(tmp_path / "b.npy", "actions")
