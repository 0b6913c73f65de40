"""Equal sources give equal bytes, independent of order, workers and failures."""

import functools
import hashlib
import io
import json
import multiprocessing
import os
import signal
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dataset_tools import making
from dataset_tools.making import Footage, Recipe, Source
from dnnlib import video

RECIPE = Recipe(sizes=((4, 8), (8, 16)))
JOB = {
    "partition": None,
    "num_partitions": 3,
    "val_fraction": 0.0,
    "split": "train",
    "workers": 2,
    "skip_bad": False,
    "skip_made": False,
    "dry_run": False,
    "origin": "test",
    "packages": ["numpy"],
}
COUNTS = [5, 1, 9, 3, 4, 2, 150]  # more than is read ahead


def footage(level, num_frames, error, pause_sec, recipe):
    def frames():
        for index in range(num_frames):
            time.sleep(pause_sec)
            yield np.full((12, 24, 3), (level * 20 + index) % 256, np.uint8)
        if error is not None:
            raise error

    return Footage(recipe.fps or 25.0, frames())


def source(name, num_frames=3, level=3, error=None, pause_sec=0.0, group=None):
    return Source(name, group or name, functools.partial(footage, level, num_frames, error, pause_sec))


def sources(pause_sec=0.0):
    return [source(f"v{i}", count, i, pause_sec=pause_sec) for i, count in enumerate(COUNTS)]


def make(root, found, recipe=RECIPE, **options):
    making.make(root, found, recipe, **{**JOB, **options})


def content(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def clips_of(root):
    """Clip -> levels of its frames at the small size."""
    found = {}
    for path in sorted((root / "0004x0008").glob("*.zip")):
        with zipfile.ZipFile(path) as shard:
            for clip, names in json.loads(shard.read("frame_paths.json")).items():
                images = [Image.open(io.BytesIO(shard.read(f"{clip}/{name}"))) for name in names]
                found[clip] = [round(float(np.asarray(image).mean())) for image in images]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    make(root, sources())
    return root


def test_all_frames_are_there_in_order(whole):
    clips = clips_of(whole)
    assert list(clips) == [f"v{i}" for i in range(len(COUNTS))]
    for i, count in enumerate(COUNTS):
        assert np.abs(np.array(clips[f"v{i}"]) - (i * 20 + np.arange(count)) % 256).max() <= 1
    description = json.loads((whole / "dataset.json").read_text())
    assert description["fps"] == 25 and description["num_clips"] == 7 and description["num_frames"] == sum(COUNTS)
    assert description["quality"] == 100 and description["chroma"] == "4:4:4" and description["resampled_fps"] is None
    manifest = json.loads((whole / "manifest.json").read_text())["clips"]
    assert manifest["v2"]["fps"] == 25 and manifest["v2"]["group"] == "v2"


@pytest.mark.parametrize("workers", [1, 5])
def test_workers_change_nothing(tmp_path, whole, workers):
    make(tmp_path, sources(), workers=workers)
    assert content(tmp_path) == content(whole)


def test_partitions_in_any_order_or_at_once_make_what_one_run_makes(tmp_path, whole):
    for name, order in (("forth", [2, 0, 1]), ("again", [1, 1, 0, 2, 0])):
        for index in order:
            make(tmp_path / name, sources(), partition=index)
        assert content(tmp_path / name) == content(whole)
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=make, args=(tmp_path / "once", sources()), kwargs={"partition": i}) for i in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert content(tmp_path / "once") == content(whole)


def test_a_killed_partition_is_made_anew(tmp_path, whole):
    for index in (0, 1):
        make(tmp_path, sources(), partition=index)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=make, args=(tmp_path, sources(pause_sec=0.02)), kwargs={"partition": 2})
    process.start()
    while not list(tmp_path.glob("*/.partition_0002.*")):
        time.sleep(0.01)
    time.sleep(0.3)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = content(tmp_path)
    assert any(".tmp" in path.name for path in before)
    assert set(json.loads(before[Path("dataset.json")])["partitions"]) == {"0000", "0001"}
    make(tmp_path, sources(), partition=2)
    assert content(tmp_path) == content(whole)


def test_more_partitions_than_sources_are_made_and_a_wrong_number_is_refused(tmp_path):
    make(tmp_path, sources()[:2], num_partitions=4)
    assert set(clips_of(tmp_path)) == {"v0", "v1"}
    partitions = json.loads((tmp_path / "dataset.json").read_text())["partitions"]
    assert [partitions[f"{index:04d}"]["clips"] for index in range(4)] == [1, 1, 0, 0]
    with pytest.raises(ValueError, match=r"partition 4 does not exist; 4 partitions are 0 \.\.\. 3"):
        make(tmp_path, sources(), num_partitions=4, partition=4)


def test_broken_sources_are_left_out_whole_and_counted(tmp_path, capsys):
    found = [source("good", 3), source("torn", 9, error=ValueError("torn ends early")), source("fine", 2)]
    with pytest.raises(ValueError, match="1 of 3 sources are broken; mend them, or accept that by --skip-bad"):
        make(tmp_path, found, num_partitions=1)
    output = capsys.readouterr()
    assert "2 clips, 5 frames" in output.out and "Left out: torn ends early" in output.err
    assert set(clips_of(tmp_path)) == {"good", "fine"}
    assert json.loads((tmp_path / "dataset.json").read_text())["partitions"]["0000"]["skipped"] == ["torn ends early"]
    make(tmp_path, found, num_partitions=1, skip_bad=True)
    with pytest.raises(ValueError, match="no clip came of 1 sources"):
        make(tmp_path / "none", found[1:2], skip_bad=True)


def test_short_clips_are_left_out_without_being_broken(tmp_path, capsys):
    make(tmp_path, sources(), Recipe(sizes=((4, 8),), min_frames=4))
    assert list(clips_of(tmp_path)) == ["v0", "v2", "v4", "v6"]
    assert "Left out: v1: 1 of 1 clips have fewer than 4 frames" in capsys.readouterr().err


def test_an_error_of_ours_ends_everything_and_keeps_what_was_there(tmp_path, whole):
    make(tmp_path, sources())
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield np.zeros((12, 24, 3), np.uint8)
        finally:
            closed.set()

    found = [
        source("wrong", 2, error=TypeError("ours")),
        Source("endless", "", lambda recipe: Footage(25.0, endless())),
    ]
    with pytest.raises(TypeError, match="ours"):
        make(tmp_path, found)
    assert closed.wait(10)
    assert content(tmp_path) == content(whole)


def test_reading_ahead_is_bounded():
    num_read = 0

    def endless():
        nonlocal num_read
        while True:
            num_read += 1
            yield np.zeros((12, 24, 3), np.uint8)

    found = [source("first"), Source("second", "", lambda recipe: Footage(25.0, endless()))]
    readers = making._read_ahead(found, RECIPE, workers=2)
    next(readers)
    deadline = time.monotonic() + 10
    while num_read < making._FRAMES_AHEAD and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert making._FRAMES_AHEAD <= num_read <= making._FRAMES_AHEAD + 1
    readers.close()


@given(names=st.sets(st.text("abc/01", min_size=1), min_size=1, max_size=30), fraction=st.floats(0, 0.99))
def test_validation_is_chosen_by_the_hash_of_the_group_alone(names, fraction):
    for name in names:
        number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        assert making._is_val(name, fraction) == (number / 2**64 < fraction)


def test_the_split_stays_when_footage_is_added(tmp_path):
    found = [source(f"v{i}/{part}", 2, group=f"v{i}") for i in range(20) for part in "ab"]
    for name, subset in (("few", found[10:30]), ("many", found)):
        make(tmp_path / name, subset, val_fraction=0.3)
    few, many = ({part: set(clips_of(tmp_path / name / part)) for part in ("train", "val")} for name in ("few", "many"))
    assert few["train"] < many["train"] and few["val"] < many["val"]
    assert few["train"] | few["val"] == {entry.name for entry in found[10:30]}
    assert not {name[:-2] for name in many["train"]} & {name[:-2] for name in many["val"]}  # videos stay together
    for part in ("train", "val"):
        description = json.loads((tmp_path / "many" / part / "dataset.json").read_text())
        assert description["split"] == part and description["val_fraction"] == 0.3
    for index in (2, 0, 1):
        make(tmp_path / "parts", found, val_fraction=0.3, partition=index)
    assert content(tmp_path / "parts") == content(tmp_path / "many")


def test_what_would_not_fit_is_refused(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    make(one, sources())
    make(two, sources(), val_fraction=0.3)
    with pytest.raises(ValueError, match="one already holds a dataset, which was made without --val-fraction"):
        make(one, sources(), val_fraction=0.3)
    with pytest.raises(ValueError, match="train already holds a dataset, which was made with --val-fraction"):
        make(two, sources())
    with pytest.raises(ValueError, match="would stay and was made otherwise .*quality is 100, not 90"):
        make(one, sources(), Recipe(sizes=RECIPE.sizes, quality=90), partition=1)
    with pytest.raises(ValueError, match="would stay and was made otherwise .*num_sources is 7, not 6"):
        make(one, sources()[1:], partition=1)
    with pytest.raises(ValueError, match="none of 7 sources falls into val; change the fraction"):
        make(tmp_path / "three", sources(), val_fraction=0.0001)
    make(one, sources()[1:])  # all anew
    assert len(clips_of(one)) == 6


def test_a_dry_run_lists_and_writes_nothing(tmp_path, capsys):
    def describe(level, recipe):
        if level == 1:
            raise ValueError("v1 is torn")
        return f"level {level}"

    found = [Source(f"v{i}", f"v{i}", source("").open, functools.partial(describe, i)) for i in range(4)]
    with pytest.raises(ValueError, match="1 of 4 sources are broken"):
        make(tmp_path / "out", found, num_partitions=2, dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "train  partition 0000  v0  level 0",
        "train  partition 0000  v1  broken: v1 is torn",
        "train  partition 0001  v2  level 2",
        "train  partition 0001  v3  level 3",
        f"3 clips would be made in {tmp_path / 'out'}. Next: the same without --dry-run",
    ]
    assert not (tmp_path / "out").exists()


def test_shots_become_clips(tmp_path):
    pytest.importorskip("scenedetect")
    random = np.random.RandomState(0)
    scenes = [random.randint(0, 256, (1, 36, 64, 3)).astype(np.uint8).repeat(count, 0) for count in (30, 4, 40)]
    scenes[1] = scenes[0][:4]  # four more frames of the first
    found = [Source("v", "v", lambda recipe: Footage(25.0, (frame for frame in np.concatenate(scenes))))]
    make(tmp_path, found, Recipe(sizes=((4, 8),), split_shots=True), num_partitions=1)
    assert {name: len(levels) for name, levels in clips_of(tmp_path).items()} == {"v/shot_0000": 34, "v/shot_0001": 40}
    make(tmp_path, found, Recipe(sizes=((4, 8),), split_shots=True, min_frames=35), num_partitions=1)
    assert list(clips_of(tmp_path)) == ["v/shot_0001"]


# ----------------------------------------------------------------------------
# Windows of video files.


@pytest.fixture(scope="module")
def ramp(tmp_path_factory):
    """40 frames at 20 a second, of which each is 5 levels brighter than the one before."""
    path = tmp_path_factory.mktemp("video") / "ramp.mp4"
    with video.VideoWriter(path, 32, 32, fps=20, crf=1) as writer:
        writer.write(np.arange(0, 200, 5, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 32, 32, 3), np.uint8))
    return path


@pytest.mark.parametrize(
    ("recipe", "window", "expected"),
    [
        (Recipe(), (0.0, None), range(40)),
        (Recipe(), (0.5, 1.5), range(10, 30)),
        (Recipe(trim_start=0.25, trim_end=0.5), (0.0, None), range(5, 30)),
        (Recipe(trim_start=0.25, trim_end=0.5), (0.5, 1.5), range(15, 20)),
        (Recipe(fps=10, trim_start=0.5), (0.0, None), range(10, 40, 2)),
    ],
)
def test_trims_apply_inside_the_window(ramp, recipe, window, expected):
    opened = making.open_video(ramp, recipe, *window)
    assert opened.fps == (recipe.fps or 20)
    assert [round(float(frame.mean()) / 5) for frame in opened.frames] == list(expected)


def test_windows_beyond_the_end_and_torn_files_are_refused(tmp_path, ramp):
    with pytest.raises(ValueError, match="nothing is left of .* after trimming: it is 2 s long"):
        making.open_video(ramp, Recipe(trim_start=1, trim_end=1))
    with pytest.raises(ValueError, match="ramp.mp4 ends early: only 40 of 80 frames"):
        list(making.open_video(ramp, Recipe(), 0.0, 4.0).frames)
    torn = tmp_path / "torn.mp4"
    torn.write_bytes(ramp.read_bytes()[:-400])
    with pytest.raises(ValueError, match="torn.mp4"):
        list(making.open_video(torn, Recipe()).frames)


# ----------------------------------------------------------------------------
# Options.


def parse(*arguments) -> Any:
    """Return what a maker's function is given: its recipe and job, or the command's complaint."""
    given = {}

    @click.command()
    @making.maker_options(((2, 4),))
    def command(recipe, job):
        given.update(recipe=recipe, job=job)
        if recipe.quality == 13:
            raise ValueError("unlucky")

    result = CliRunner().invoke(command, arguments)
    return given if result.exit_code == 0 else result.output


def test_options_make_a_recipe_and_a_job():
    given = parse()
    assert given["recipe"] == Recipe(sizes=((2, 4),))
    assert given["job"] == {key: JOB[key] for key in JOB.keys() - {"origin", "packages"}} | {
        "num_partitions": 10,
        "workers": None,
    }
    text = "--height 3 --width 5 --fps 12.5 --trim-start 1 --trim-end 2 --min-frames 9 --split-shots --quality 95"
    given = parse(*text.split(), "--chroma", "4:2:0", "--partition", "2", "--skip-bad", "--val-fraction", "0.1")
    assert given["recipe"] == Recipe(((3, 5),), 12.5, 1.0, 2.0, 9, True, 95, "4:2:0")
    assert given["job"]["partition"] == 2 and given["job"]["skip_bad"] and given["job"]["val_fraction"] == 0.1
    assert parse("--sizes", "1x2,3x4")["recipe"].sizes == ((1, 2), (3, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sizes 8", "'8' is not a frame size"),
        ("--height 8", "--height and --width go together"),
        ("--height 8 --width 8 --sizes 8x8", "give either --sizes or --height and --width"),
        ("--val-fraction 0.1 --split val", "give either --val-fraction or --split"),
        ("--quality 13", "Error: unlucky"),
        ("--quality 101", "101 is not in the range"),
    ],
)
def test_wrong_options_are_explained(arguments, message):
    assert message in parse(*arguments.split())
