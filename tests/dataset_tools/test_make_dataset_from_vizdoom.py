"""LabDoom renders the planned clips: both sizes, actions, poses, difficulties, equal bytes for equal seeds."""

import hashlib
import json
import queue
import shlex
import subprocess
import sys
import time
import zipfile

import imageio_ffmpeg
import numpy as np
import psutil
import pytest
from click.testing import CliRunner

from dataset_tools import archive, make_dataset_from_vizdoom
from dataset_tools.inspect_findings import command_again
from dataset_tools.labdoom_maze import DIFFICULTIES, TEXTURES, TILE, build_maze
from training.data.dataset import ClipDataset
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


def notes(root, name, size="0036x0064"):
    with zipfile.ZipFile(root / size / "partition_0000.zip") as shard:
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


def test_the_set_and_each_clip_say_what_they_are(made):
    description = json.loads((made / "dataset.json").read_text())
    expected = {
        "source": "LabDoom",
        "split": "train",
        "seed": 7,
        "walker": "smooth",
        "difficulty": "normal",
        "requested_clips": 2,
        "frames_per_clip": 20,
        "fps": 30,
        "num_clips": 2,
        "num_frames": 40,
        "num_partitions": 1,
    }
    assert {name: description[name] for name in expected} == expected
    clips = json.loads((made / "manifest.json").read_text())["clips"]
    assert clips.keys() == {"train/000000", "train/000001"}
    for index, (name, clip) in enumerate(sorted(clips.items())):
        maze = build_maze(random_state("labdoom-train", 7, index), "train")
        assert clip.items() >= {"difficulty": "normal", "frames": 20, **maze.facts()}.items()
        with zipfile.ZipFile(made / "0036x0064" / clip["shard"]) as shard:
            frames = b"".join(shard.read(f"{name}/frame_{frame:06d}.jpg") for frame in range(20))
        assert clip["sha256"]["0036x0064"] == hashlib.sha256(frames).hexdigest()


def test_mixed_draws_a_difficulty_for_each_clip_that_renders_as_if_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the engine leaves a folder where it runs
    clips = {}
    for difficulty in ("mixed", *DIFFICULTIES):
        plan = make_dataset_from_vizdoom.Plan(((18, 32),), 2, 2, "train", 9, "smooth", difficulty)
        report = make_dataset_from_vizdoom.make_shard(tmp_path / difficulty, plan, 0, queue.SimpleQueue())
        clips[difficulty] = report.clips
    assert len({clip["difficulty"] for clip in clips["mixed"].values()}) == 2
    for difficulty in DIFFICULTIES:
        assert {clip["difficulty"] for clip in clips[difficulty].values()} == {difficulty}
        for path, clip in clips["mixed"].items():
            assert (clip == clips[difficulty][path]) == (clip["difficulty"] == difficulty)


def test_looks_are_drawn_from_so_many_which_all_splits_share(made, tmp_path):
    drawn = {}
    for split in ("train", "val"):
        plan = make_dataset_from_vizdoom.Plan(((18, 32),), 2, 2, split, 9, "smooth", "easy", looks=3)
        for index in range(40):
            look, random = make_dataset_from_vizdoom.draw_look(plan, index)
            drawn.setdefault(split, {}).setdefault(look, set()).add(random.uniform())
    assert drawn["train"] == drawn["val"] and sorted(drawn["train"]) == [0, 1, 2]
    assert len(set.union(*drawn["train"].values())) == 3, "a look is the same wherever it is"

    result = run(tmp_path / "one", "--looks=1", "--difficulty=easy")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "one" / "dataset.json").read_text())["looks"] == 1
    assert "looks" not in json.loads((made / "dataset.json").read_text())

    def shared_colours(root):
        """Share of the pixels of the first clip that have a partner of the same colour, of 512, in the second."""
        dataset = ClipDataset(root, SIZES)
        frames = [dataset.read(index, SIZES[1], range(0, 20, 5)).astype(int) >> 5 for index in range(2)]
        counts = [np.bincount((clip @ [64, 8, 1]).ravel(), minlength=512) / clip[..., 0].size for clip in frames]
        return np.minimum(*counts).sum()

    assert shared_colours(tmp_path / "one") > 0.4 > shared_colours(made)


def make(root, size, **options):
    """Render two clips of 20 frames into the folder in this process, as the command would."""
    plan = make_dataset_from_vizdoom.Plan((size,), 2, 20, "train", 7, "smooth", "normal", **options)
    with pytest.MonkeyPatch.context() as context:
        context.chdir(root)  # the engine leaves a folder where it runs
        report = make_dataset_from_vizdoom.make_shard(root, plan, 0, queue.SimpleQueue())
    facts = {name: fact for name, fact in plan.facts().items() if fact is not None}
    archive.describe_dataset(root, [report], 1, ("vizdoom",), **facts)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    roots = {textures: tmp_path_factory.mktemp(textures) for textures in TEXTURES}
    for textures, root in roots.items():
        make(root, (72, 128), textures=textures)
    return roots


def bytes_of(clips):
    """Return the bytes that x264 needs for clips, uint8 (N, T, H, W, 3), one after another at crf 18, 4:4:4."""
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{clips.shape[3]}x{clips.shape[2]}", "-i", "pipe:0"]
    target = ["-c:v", "libx264", "-crf", "18", "-pix_fmt", "yuv444p", "-f", "h264", "pipe:1"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, *target]
    return len(subprocess.run(command, input=clips.tobytes(), stdout=subprocess.PIPE, check=True).stdout)


def test_reduced_textures_show_the_same_walks_in_fewer_bytes_and_colours(sets):
    clips, size, colours = {}, {}, {}
    for textures, root in sets.items():
        for name in ("actions", "poses"):
            assert notes(root, name, "0072x0128") == notes(sets["full"], name, "0072x0128")
        dataset = ClipDataset(root, [(72, 128)])
        clips[textures] = np.stack([dataset.read(index, (72, 128), range(20)) for index in range(2)])
        size[textures] = bytes_of(clips[textures])
        colours[textures] = len(np.unique(clips[textures].reshape(-1, 3), axis=0))
    assert size["full"] > 3 * size["soft"] and size["soft"] > 1.1 * size["flat"], size
    assert colours["full"] > 2 * colours["soft"] and colours["soft"] > 1.1 * colours["flat"], colours
    for textures in ("soft", "flat"):  # surfaces keep their mean colours, so from afar the frames look the same
        far = [clips[name].reshape(2, 20, 2, 36, 2, 64, 3).mean(axis=(3, 5)) for name in ("full", textures)]
        assert np.abs(far[0] - far[1]).mean() < 6


@pytest.mark.parametrize("textures", ["soft", "flat"])
def test_reduced_textures_are_made_again_by_the_command_that_inspection_gives(sets, textures, tmp_path):
    facts = json.loads((sets[textures] / "dataset.json").read_text())
    assert facts["textures"] == textures
    words = shlex.split(command_again(tmp_path, facts, {size: [] for size in facts["sizes"]}, []))
    assert CliRunner().invoke(make_dataset_from_vizdoom.main, [*words[3:], "--workers=1"]).exit_code == 0
    again = json.loads((tmp_path / "dataset.json").read_text())
    assert (again["textures"], again["hashes"]) == (textures, facts["hashes"])


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({}, {"textures": "soft"}),
        ({"textures": "soft"}, {}),
        ({"textures": "flat"}, {"textures": "soft"}),
        ({}, {"looks": 3}),
        ({"looks": 3}, {}),
    ],
)
def test_sets_of_other_textures_or_looks_do_not_mix(before, now, tmp_path):
    make(tmp_path, (18, 32), **before)
    refused = run(tmp_path, "--sizes=36x64", *(f"--{option}={value}" for option, value in now.items()))
    (name,) = before | now
    assert refused.exit_code == 1
    assert f"{name} is {before.get(name)!r}, not {now.get(name)!r}" in refused.output


def test_a_killed_render_leaves_nothing_half_written_and_a_rerun_repeats(made, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "dataset_tools.make_dataset_from_vizdoom", str(out), "--clips=2", "--frames=20000"]
    process = psutil.Popen([*command, "--sizes=18x32,36x64", "--workers=1"], stdout=subprocess.DEVNULL)
    while not list(out.glob("0036x0064/.*.tmp.zip")):
        assert process.poll() is None
        time.sleep(0.05)
    helpers = process.children(recursive=True)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(helper.is_running() and helper.status() != psutil.STATUS_ZOMBIE for helper in helpers):
        assert time.monotonic() < deadline, "processes outlive the one that started them"
        time.sleep(0.05)
    assert not list(out.rglob("[!.]*.zip")) and not list(out.glob("*.json"))
    assert run(out).exit_code == 0
    for path in made.rglob("*"):
        if path.suffix in (".zip", ".json"):
            assert (out / path.relative_to(made)).read_bytes() == path.read_bytes()
    assert not list(out.rglob(".*"))


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


def test_the_same_seed_makes_the_same_bytes_and_another_split_replaces_all(made, tmp_path):
    out = tmp_path / "again"
    assert run(out).exit_code == 0
    descriptions = [json.loads((root / "dataset.json").read_text()) for root in (made, out)]
    assert descriptions[0] == descriptions[1] and len(descriptions[0]["hashes"]) == 2
    refused = run(out, "--split", "val", "--clips", 1, "--sizes", "18x32")
    assert refused.exit_code == 1 and "split is 'train', not 'val'" in refused.output
    assert run(out, "--split", "val", "--clips", 1).exit_code == 0
    assert json.loads((out / "dataset.json").read_text())["split"] == "val"
    assert list(notes(out, "poses")) == list(json.loads((out / "manifest.json").read_text())["clips"]) == ["val/000000"]
    assert notes(out, "poses")["val/000000"] != notes(made, "poses")["train/000000"]


def test_the_discrete_walker_writes_action_names(tmp_path):
    assert run(tmp_path, "--walker", "discrete", "--clips", 1, "--frames", 60).exit_code == 0
    actions, poses = (notes(tmp_path, name)["train/000000"] for name in ("actions", "poses"))
    assert actions[0] == "none" and set(actions[1:]) <= {"forward", "left", "right"}
    for action, before, after in zip(actions[1:], poses, poses[1:], strict=False):
        advance = np.hypot(after[0] - before[0], after[1] - before[1])
        turn = (after[2] - before[2] + 180) % 360 - 180
        expected = {"forward": (8, 0), "left": (0, 10), "right": (0, -10)}[action]
        assert (advance, turn) == pytest.approx(expected, abs=0.3)


def test_the_rendered_image_is_as_large_as_the_sizes_need():
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


def test_each_action_led_into_its_frame(tmp_path):
    """As a system reads them: "left" turns left in the very frame, "forward" moves along the heading."""
    result = run(tmp_path / "discrete", "--walker=discrete", "--frames", 160, "--sizes", "18x32")
    assert result.exit_code == 0, result.output
    names = json.loads((tmp_path / "discrete" / "dataset.json").read_text())["actions"]
    dataset = ClipDataset(tmp_path / "discrete", SIZES[:1], streams=["actions", "poses"])
    assert dataset.streams["actions"].vocabulary == names == ["none", "forward", "left", "right"]
    seen = set()
    for clip in range(2):
        actions, poses = (dataset.read_stream(clip, name, 0, 160) for name in ("actions", "poses"))
        assert actions[0] == 0 and poses.dtype == np.float32 and poses.shape == (160, 3)
        turns = (np.diff(poses[:, 2].astype(float)) + 180) % 360 - 180
        steps = np.diff(poses[:, :2].astype(float), axis=0)
        heading = np.radians(poses[1:, 2])
        along = steps[:, 0] * np.cos(heading) + steps[:, 1] * np.sin(heading)
        aside = steps[:, 1] * np.cos(heading) - steps[:, 0] * np.sin(heading)
        for action, turn, forth, sideways in zip(actions[1:].tolist(), turns, along, aside, strict=True):
            seen.add(names[action])
            if names[action] == "forward":
                assert abs(turn) < 1 and 6 < forth < 10 and abs(sideways) < 1
            else:
                assert turn == pytest.approx(10 if names[action] == "left" else -10, abs=1) and abs(forth) < 2
    assert seen == {"forward", "left", "right"}


def test_smooth_actions_are_vectors_of_forward_and_turn(made):
    dataset = ClipDataset(made, SIZES, streams=["actions", "poses"])
    stored = notes(made, "actions")["train/000001"]
    assert dataset.streams["actions"].is_vector and dataset.streams["actions"].num_values == 2
    actions = dataset.read_stream(1, "actions", 0, 20)
    expected = [[0, 0], *([action["forward"], action["turn"]] for action in stored[1:])]
    assert np.array_equal(actions, np.array(expected, np.float32))
    turns = (np.diff(dataset.read_stream(1, "poses", 0, 20)[:, 2]) + 180) % 360 - 180
    assert np.allclose(turns, actions[1:, 1], atol=0.5)
