"""Published layouts become datasets and back, with their actions, and interrupted runs go on."""

import json
import os
import re
import shlex
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from dataset_tools import (
    make_dataset_from_hdf5,
    make_dataset_from_npz,
    make_dataset_from_videos,
    make_hdf5_from_dataset,
)
from dataset_tools.inspect_findings import command_again
from tests.training.data.clips import drifting, write
from tests.training.data.test_layouts import clips_of, found_layout, write_indexed, write_npz, write_river
from training.data import resizing
from training.data.dataset import ClipDataset

SIZE = (16, 24)


def run(command, *arguments, code=0):
    result = CliRunner().invoke(command.main, [str(word) for word in arguments])
    assert result.exit_code == code, result.output
    return result.output


def smooth(lengths, size=SIZE):
    return [drifting(number, length, size) for number, length in enumerate(lengths)]


def content(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def close(found, wanted):
    """Return whether frames differ only as JPEG does."""
    return found.shape == wanted.shape and np.abs(found.astype(int) - wanted.astype(int)).mean() < 2


def test_shards_of_river_become_a_dataset_and_back(tmp_path):
    clips = smooth([7, 5, 6])
    folder = write_river(tmp_path / "river" / "train", clips)
    output = run(make_dataset_from_hdf5, folder, tmp_path / "made", "--num-partitions=2", "--source-fps=12")
    assert "3 clips, 18 frames are in" in output
    dataset = ClipDataset(tmp_path / "made", [SIZE])
    assert dataset.fps == 12 and [clip.path for clip in dataset.clips] == [
        "shard_0001/000000",
        "shard_0001/000001",
        "shard_0002/000000",
    ]
    for number, clip in enumerate(clips):
        assert close(dataset.read(number, SIZE, range(len(clip))), clip)
    description = json.loads((tmp_path / "made" / "dataset.json").read_text())
    assert description["layout"] == "HDF5 shards of RIVER" and description["resize"] == "river"
    output = run(make_hdf5_from_dataset, tmp_path / "made", tmp_path / "back", "--shard-clips=2")
    assert "make_dataset_from_hdf5" in output
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["shard_0001.hdf5", "shard_0002.hdf5"]
    with h5py.File(tmp_path / "back" / "shard_0002.hdf5") as opened:
        file: Any = opened
        assert sorted(file) == ["0", "len", "videos"] and int(file["len/0"][()]) == 6 and not len(file["videos"])
        assert file["0/5"].compression == "lzf" and file["0/5"].shape == (*SIZE, 3)
    back = found_layout(tmp_path / "back")
    for number, clip in enumerate(clips):
        wanted = dataset.read(number, SIZE, range(len(clip)))
        assert np.array_equal(back.read(number, range(len(clip))), wanted)


def test_shards_that_were_made_are_kept_and_damaged_ones_made_again(tmp_path):
    run(make_dataset_from_hdf5, write_river(tmp_path / "river", smooth([4, 5, 3])), tmp_path / "made")
    arguments = (make_hdf5_from_dataset, tmp_path / "made", tmp_path / "back", "--shard-clips=1", "--skip-made")
    run(*arguments)
    before = content(tmp_path / "back")
    kept = (tmp_path / "back" / "shard_0001.hdf5").stat().st_mtime_ns
    os.truncate(tmp_path / "back" / "shard_0002.hdf5", 1000)
    (tmp_path / "back" / "shard_0003.hdf5").unlink()
    run(*arguments)
    assert content(tmp_path / "back").keys() == before.keys()
    assert (tmp_path / "back" / "shard_0001.hdf5").stat().st_mtime_ns == kept
    assert [clip.num_frames for clip in found_layout(tmp_path / "back").clips] == [4, 5, 3]
    (tmp_path / "back" / "shard_0009.hdf5").write_bytes(b"")
    assert "holds shard_0009.hdf5, which would be read" in run(*arguments, code=1)


def test_indexed_files_become_datasets_and_back(tmp_path):
    clips = smooth([7, 5])
    path = write_indexed(tmp_path / "set.h5", clips)
    write_indexed(path, clips[1:], "test")
    run(make_dataset_from_hdf5, path / "test", tmp_path / "test", "--sizes=8x12", "--split=test")
    dataset = ClipDataset(tmp_path / "test", [(8, 12)])
    assert [clip.num_frames for clip in dataset.clips] == [5]
    assert close(dataset.read(0, (8, 12), range(5)), resizing.resize_tats(clips[1], (8, 12)))
    run(make_dataset_from_hdf5, path, tmp_path / "train")
    for split in ("train", "test"):
        indexed = ("--layout=indexed", f"--split={split}")
        run(make_hdf5_from_dataset, tmp_path / split, tmp_path / "back.h5", *indexed)
    with h5py.File(tmp_path / "back.h5") as opened:
        file: Any = opened
        assert file["train_idx"][:].tolist() == [0, 7, 12] and file["train_data"].shape == (12, *SIZE, 3)
        assert file["test_idx"][:].tolist() == [0, 5] and file["test_data"].shape == (5, 8, 12, 3)
        train = ClipDataset(tmp_path / "train", [SIZE])
        assert np.array_equal(file["train_data"][7:], train.read(1, SIZE, range(5)))
    again = (make_hdf5_from_dataset, tmp_path / "train", tmp_path / "back.h5", "--layout=indexed")
    assert "already holds the split train" in run(*again, code=1)
    before = (tmp_path / "back.h5").stat().st_mtime_ns
    run(*again, "--skip-made")
    assert (tmp_path / "back.h5").stat().st_mtime_ns == before


def test_npz_files_become_a_dataset_with_actions(tmp_path):
    clips = smooth([6, 6, 6])
    for number, clip in enumerate(clips):
        values = {"actions": np.arange(6) % (number + 2), "poses": np.full((6, 3), number + 0.5, np.float32)}
        write_npz(tmp_path / "dmlab" / "train" / "x" / f"{number}.npz", clip, **values)
    run(make_dataset_from_npz, tmp_path / "dmlab" / "train", tmp_path / "made", "--trim-start=0.1", "--source-fps=10")
    dataset = ClipDataset(tmp_path / "made", [SIZE], streams=["actions", "poses"])
    for number, clip in enumerate(clips):
        assert dataset.clips[number].num_frames == 5
        assert close(dataset.read(number, SIZE, range(5)), clip[1:])
        assert dataset.read_stream(number, "actions", 0, 5).tolist() == [t % (number + 2) for t in range(1, 6)]
        assert dataset.read_stream(number, "poses", 4, 1).tolist() == [[number + 0.5] * 3]
    output = run(make_dataset_from_npz, tmp_path / "dmlab" / "train", tmp_path / "x", "--fps=5", code=1)
    assert "has actions, poses, one value for each frame: leave out --fps" in output


def test_videos_of_teco_become_a_dataset_with_actions(tmp_path):
    video = drifting("teco", 8)
    for number in range(2):
        (tmp_path / "habitat" / str(number)).mkdir(parents=True)
        path = write(tmp_path / "habitat" / str(number) / "a.mp4", video)
        if number == 0:
            np.savez(path.with_suffix(".npz"), actions=np.arange(8))
    output = run(make_dataset_from_npz, tmp_path / "habitat", tmp_path / "made")
    assert "2 clips, 16 frames are in" in output
    dataset = ClipDataset(tmp_path / "made", [SIZE], streams=["actions"])
    assert dataset.fps == 12
    assert dataset.read_stream(0, "actions", 0, 8).tolist() == list(range(8))
    assert dataset.read_stream(1, "actions", 0, 8).tolist() == [0] * 8


@pytest.mark.parametrize("command", [make_dataset_from_hdf5, make_dataset_from_npz])
def test_other_footage_is_refused(tmp_path, command):
    (tmp_path / "source").mkdir()
    assert "give" in run(command, tmp_path / "source", tmp_path / "made", code=1)
    write_indexed(tmp_path / "source" / "a.h5", clips_of([3]))
    if command is make_dataset_from_npz:
        assert "which is no layout" in run(command, tmp_path / "source", tmp_path / "made", code=1)
    assert not (tmp_path / "made").exists()


# ----------------------------------------------------------------------------
# Recordings.


def recordings(folder, **files):
    """Write two videos of six frames, and files beside the first."""
    folder.mkdir()
    video = drifting("recording", 6)
    for name in ("first", "second"):
        write(folder / f"{name}.mp4", video)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def actions_of(root, streams=("actions",)):
    dataset = ClipDataset(root, [SIZE], streams=streams)
    found = dataset.read_stream(0, "actions", 0, 6).tolist()
    vocabulary = dataset.streams["actions"].vocabulary
    return found if vocabulary is None else [vocabulary[value] for value in found]


def test_recordings_become_a_dataset_with_actions(tmp_path):
    names = ["left", "none", "right", "left", "left"]
    files = {"first__actions.json": json.dumps(names), "first__poses.csv": "1,2\n" * 6}
    files |= {"second__actions.json": json.dumps(names), "second__poses.csv": "3,4\n" * 6}
    folder = recordings(tmp_path / "own", **files)
    output = run(make_dataset_from_videos, folder, tmp_path / "made", "--sizes=16x24")
    assert "Left out" not in output
    assert actions_of(tmp_path / "made", ("actions", "poses")) == ["none", *names]
    output = run(make_dataset_from_videos, folder, tmp_path / "x", "--sizes=16x24", "--fps=6", code=1)
    assert "one value for each of its frames: leave out --fps and --trim-*" in output
    output = run(make_dataset_from_videos, folder, tmp_path / "y", "--dry-run")
    assert "actions, poses, makes 6 frames" in output


def test_actions_that_lead_out_of_frames_are_moved(tmp_path):
    files = {f"{name}__actions.csv": "1\n2\n3\n4\n5\n6\n" for name in ("first", "second")}
    folder = recordings(tmp_path / "own", **files)
    run(make_dataset_from_videos, folder, tmp_path / "after", "--sizes=16x24", "--action-timing=after")
    assert actions_of(tmp_path / "after") == [0, 1, 2, 3, 4, 5]
    run(make_dataset_from_videos, folder, tmp_path / "into", "--sizes=16x24")
    assert actions_of(tmp_path / "into") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1\n2\n", "has 6 frames, but .*first.actions.csv has 2 actions"),
        ("1\nup\n", "where a whole number was expected|where a name was expected"),
        ("", "holds no actions"),
    ],
)
def test_recordings_with_bad_actions_are_left_out(tmp_path, content, message):
    folder = recordings(tmp_path / "own", first__actions__csv=content)
    output = run(make_dataset_from_videos, folder, tmp_path / "made", "--sizes=16x24", code=1)
    assert re.search(message, output) and "1 of 2 sources are broken" in output
    assert [clip.path for clip in ClipDataset(tmp_path / "made", [SIZE]).clips] == ["second"]


@pytest.mark.parametrize("kind", ["hdf5", "npz"])
def test_the_inspector_prints_the_command_that_made_it(tmp_path, kind):
    if kind == "hdf5":
        command, source = make_dataset_from_hdf5, write_river(tmp_path / "footage", smooth([4, 5]))
    else:
        command, source = make_dataset_from_npz, tmp_path / "footage"
        write_npz(source / "0.npz", smooth([5])[0], actions=np.arange(5))
    run(command, source, tmp_path / "made", "--sizes=8x12", "--source-fps=12", "--resize=stretch")
    facts = json.loads((tmp_path / "made" / "dataset.json").read_text())
    shards = {"0008x0012": sorted((tmp_path / "made" / "0008x0012").glob("*.zip"))}
    words = shlex.split(command_again(tmp_path / "again", facts, shards, []))
    assert words[2] == f"dataset_tools.make_dataset_from_{kind}" and words[3] == "path/to/footage"
    run(command, source, *words[4:])
    assert content(tmp_path / "again") == content(tmp_path / "made")
