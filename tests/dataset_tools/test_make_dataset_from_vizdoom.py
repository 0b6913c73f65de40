"""LabDoom renders what it planned: both sizes, actions, poses, the same bytes from the same seed."""

import json
import sys
import zipfile

import numpy as np
import pytest
from click.testing import CliRunner

from dataset_tools import make_dataset_from_vizdoom
from dataset_tools.labdoom_maze import TILE, build_maze
from training.dataset import ClipDataset
from training.random import random_state

SIZES = [(18, 32), (36, 64)]


def run(*arguments):
    options = ("--clips", 2, "--frames", 20, "--sizes", "18x32,36x64", "--workers", 1, "--seed", 7)
    return CliRunner().invoke(make_dataset_from_vizdoom.main, [str(argument) for argument in (*options, *arguments)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("labdoom") / "train"
    result = run(out)
    assert result.exit_code == 0, result.output
    assert f"python train_lres.py --dataset={out}" in result.output
    return out


def notes(root, name):
    with zipfile.ZipFile(root / "0036x0064" / "partition_0000.zip") as shard:
        return json.loads(shard.read(f"{name}.json"))


def test_both_sizes_show_bright_varied_footage_that_moves(made):
    dataset = ClipDataset(made, SIZES)
    assert [(clip.path, clip.num_frames) for clip in dataset.clips] == [("train/000000", 20), ("train/000001", 20)]
    assert dataset.fps == 30
    for index in range(2):
        small, large = (dataset.read(index, size, range(20)).astype(float) for size in SIZES)
        assert np.abs(large.reshape(20, 18, 2, 32, 2, 3).mean(axis=(2, 4)) - small).mean() < 6
        assert 60 < large.mean() < 210 and large.std() > 20
        changes = np.abs(np.diff(large, axis=0)).mean(axis=(1, 2, 3))
        assert changes.min() > 1 and changes.max() < 60
    first, second = (dataset.read(index, SIZES[1], range(20)).astype(float) for index in range(2))
    assert np.abs(first - second).mean() > 20


def test_poses_are_the_sum_of_the_actions_and_keep_off_the_walls(made):
    actions, poses = notes(made, "actions"), notes(made, "poses")
    assert actions.keys() == poses.keys() == {"train/000000", "train/000001"}
    for index, clip in enumerate(sorted(actions)):
        assert len(actions[clip]) == len(poses[clip]) == 20 and actions[clip][0] == "none"
        pose = np.array(poses[clip])
        turn = np.array([action["turn"] for action in actions[clip][1:]])
        forward = np.array([action["forward"] for action in actions[clip][1:]])
        assert np.abs((np.diff(pose[:, 2]) - turn + 180) % 360 - 180).max() < 0.02
        direction = np.radians(pose[1:, 2])
        assert np.abs(np.diff(pose[:, 0]) - forward * np.cos(direction)).max() < 0.1
        assert np.abs(np.diff(pose[:, 1]) - forward * np.sin(direction)).max() < 0.1
        maze = build_maze(random_state("labdoom-train", 7, index), "train")
        assert maze.wall_distance(pose[:, 0], pose[:, 1]).min() > 27
        assert maze.open_tiles[(pose[:, 1] // TILE).astype(int), (pose[:, 0] // TILE).astype(int)].all()


def test_the_same_seed_makes_the_same_bytes_and_another_split_another_maze(made, tmp_path):
    assert run(tmp_path / "again").exit_code == 0
    hashes = [json.loads((root / "dataset.json").read_text())["hashes"] for root in (made, tmp_path / "again")]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 2
    assert run(tmp_path / "val", "--split", "val", "--clips", 1).exit_code == 0
    assert json.loads((tmp_path / "val" / "dataset.json").read_text())["split"] == "val"
    assert list(notes(tmp_path / "val", "poses")) == ["val/000000"]
    assert notes(tmp_path / "val", "poses")["val/000000"] != notes(made, "poses")["train/000000"]


def test_the_discrete_walker_writes_action_names(tmp_path):
    assert run(tmp_path, "--walker", "discrete", "--clips", 1, "--frames", 60).exit_code == 0
    actions, poses = (notes(tmp_path, name)["train/000000"] for name in ("actions", "poses"))
    assert actions[0] == "none" and set(actions[1:]) <= {"forward", "left", "right"}
    for action, before, after in zip(actions[1:], poses, poses[1:], strict=False):
        advance = np.hypot(after[0] - before[0], after[1] - before[1])
        turn = (after[2] - before[2] + 180) % 360 - 180
        expected = {"forward": (8, 0), "left": (0, 10), "right": (0, -10)}[action]
        assert (advance, turn) == pytest.approx(expected, abs=0.3)


def test_the_picture_is_as_large_as_the_sizes_need():
    resolution = make_dataset_from_vizdoom._resolution
    assert resolution(((36, 64),)) == (256, 144)
    assert resolution(((36, 64), (144, 256))) == (400, 225)
    assert resolution(((128, 128), (36, 64))) == (320, 240)
    assert resolution(((1080, 1920),)) == (1920, 1080)  # the most there is


def test_absent_packages_are_named_with_the_command_that_brings_them(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vizdoom", None)
    result = run(tmp_path / "out")
    assert result.exit_code == 1
    assert "vizdoom not installed" in result.output and "pip install -e '.[demo]'" in result.output
    assert not (tmp_path / "out").exists()
