"""Real videos become a dataset that training reads; broken videos are reported; partitions and reruns are safe."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import iscc_samples
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from dataset_tools.make_dataset_from_videos import find_videos, main, name_clips
from dnnlib import video
from training.data.dataset import ClipDataset
from training.data.frames import VIDEO_SUFFIXES

FOOTAGE = Path(iscc_samples.__file__).parent / "files" / "video"
SIZES = [(36, 64), (72, 128)]


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def make_video(path, level, num_frames=10, height=40, width=60, fps=20):
    path.parent.mkdir(parents=True, exist_ok=True)
    with video.VideoWriter(path, height, width, fps=fps) as writer:
        writer.write(np.full((num_frames, height, width, 3), level, np.uint8))


def test_real_footage_at_two_sizes(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    shutil.copy(FOOTAGE / "demo.mp4", tmp_path / "in" / "deep" / "Demo.MP4")  # 60 s of 144 x 176 at 24 frames a second
    out = tmp_path / "out"
    result = run(tmp_path / "in", out, "--sizes", "36x64,72x128", "--trim-start", 20, "--trim-end", 39, "--fps", 12)
    assert result.exit_code == 0, result.output
    assert "python train_lres.py" in result.output
    dataset = ClipDataset(out, SIZES)
    assert [clip.path for clip in dataset.clips] == ["deep/Demo"] and dataset.fps == 12
    num_frames = dataset.clips[0].num_frames
    assert num_frames in (13, 14)  # seconds 20 to 21.14
    small, large = (dataset.read(0, size, range(num_frames)).astype(float) for size in SIZES)
    # Both sizes show the same: the large one, averaged over 2 x 2 pixels, is the small one up to the filter.
    assert np.abs(large.reshape(num_frames, 36, 2, 64, 2, 3).mean(axis=(2, 4)) - small).mean() < 4
    # And what they show is the middle of the video's own frame at that time.
    source = next(video.iter_video_frames(FOOTAGE / "demo.mp4", start_sec=20.5)).astype(float)
    crop = source[22:121, :176].mean(axis=(0, 1))
    assert np.abs(small[6].mean(axis=(0, 1)) - crop).max() < 8
    description = json.loads((out / "dataset.json").read_text())
    assert description["source"] == "in" and description["split"] == "train"
    assert description["sizes"] == ["0036x0064", "0072x0128"]


def test_videos_are_found_at_any_depth_by_their_suffix(tmp_path):
    names = ["b.mp4", "a/z.WebM", "a/b/c.MTS", "a.b.ts", "a/link/d.mp4", ".hidden.mp4", ".trash/e.mp4", "f.txt", "mp4"]
    for name in names:
        path = tmp_path / "in" / name.replace("link", "target")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "in" / "a" / "target").rename(tmp_path / "target")
    (tmp_path / "in" / "a" / "link").symlink_to(tmp_path / "target")
    (tmp_path / "in" / "linked.mkv").symlink_to(tmp_path / "in" / "b.mp4")
    found = find_videos(tmp_path / "in")
    assert list(name_clips(found, tmp_path / "in")) == ["a/b/c", "a/link/d", "a/z", "a.b", "b", "linked"]
    assert {f".{name}" for name in "avi mkv mov mp4 wmv".split()} <= set(VIDEO_SUFFIXES)


def test_animations_are_videos_and_all_else_is_named(tmp_path):
    for name in ("a.mp4", "b.gif"):
        make_video(tmp_path / "in" / name, 100, fps=25)
    (tmp_path / "in" / "c.srt").touch()
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "cover.jpg")
    result = run(tmp_path / "in", tmp_path / "out", "--sizes", "8x8")
    assert result.exit_code == 0, result.output
    assert "no kind of file that is read (1): c.srt" in result.output
    assert "of which make_dataset_from_frames makes clips (1): cover.jpg" in result.output
    assert {c.path: c.num_frames for c in ClipDataset(tmp_path / "out", [(8, 8)]).clips} == {"a": 10, "b": 10}


def test_partitions_at_once_make_the_same_as_one_run(tmp_path, repo):
    levels = {"a": 40, "b/c": 80, "b/d": 120, "e": 160, "f": 200}
    for name, level in levels.items():
        make_video(tmp_path / "in" / f"{name}.mp4", level)
    options = ["--sizes", "8x8", "--num-partitions", "3"]
    command = [sys.executable, "-m", "dataset_tools.make_dataset_from_videos", tmp_path / "in", tmp_path / "three"]
    runs = [subprocess.Popen([*command, *options, "--partition", str(index)], cwd=repo) for index in (2, 0, 1)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    assert run(tmp_path / "in", tmp_path / "one", *options).exit_code == 0
    one, three = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "one", tmp_path / "three")
    )
    assert one == three
    dataset = ClipDataset(tmp_path / "three", [(8, 8)])
    assert [clip.path for clip in dataset.clips] == list(levels) and dataset.fps == 20
    for index, level in enumerate(levels.values()):
        assert np.abs(dataset.read(index, (8, 8), range(10)).astype(int) - level).max() <= 4


def test_broken_videos_are_named_skipped_and_counted(tmp_path):
    make_video(tmp_path / "in" / "good.mp4", 100)
    (tmp_path / "in" / "noise.avi").write_bytes(b"noise" * 999)
    (tmp_path / "in" / "cut.mkv").write_bytes((FOOTAGE / "demo.mkv").read_bytes()[:200_000])
    arguments = (tmp_path / "in", tmp_path / "out", "--sizes", "8x8")
    result = run(*arguments)
    assert result.exit_code == 1
    assert "noise.avi has no video" in result.output and "cut.mkv ends early" in result.output
    assert "2 of 3 sources are broken; mend them, or accept that by --skip-bad" in result.output
    assert [clip.path for clip in ClipDataset(tmp_path / "out", [(8, 8)]).clips] == ["good"]
    result = run(*arguments, "--skip-bad")
    assert result.exit_code == 0 and "2 of 3 sources are broken and left out" in result.output


VIDEOS = sorted(path for path in FOOTAGE.iterdir() if path.suffix in VIDEO_SUFFIXES)


@pytest.mark.slow
@pytest.mark.parametrize("path", VIDEOS, ids=lambda path: path.suffix)
def test_no_truncated_file_is_stored_in_part(tmp_path, path):
    (tmp_path / "in").mkdir()
    data = path.read_bytes()
    (tmp_path / "in" / path.name).write_bytes(data[: len(data) * 6 // 10])
    result = run(tmp_path / "in", tmp_path / "out", "--sizes", "8x8")
    assert result.exit_code == 1 and f"{path.name}" in result.output and "no clip came of 1 sources" in result.output
    assert not list(tmp_path.glob("out/**/*.zip"))


def test_a_dry_run_lists_the_videos(tmp_path):
    make_video(tmp_path / "in" / "good.mp4", 100)
    (tmp_path / "in" / "noise.avi").write_bytes(b"noise" * 999)
    result = run(tmp_path / "in", tmp_path / "out", "--dry-run", "--num-partitions", 1)
    assert "train  partition 0000  good  40x60, 20 fps, 0.5 s, makes 10 frames\n" in result.output
    assert "partition 0000  noise  broken: " in result.output and "1 clips would be made" in result.output
    assert result.exit_code == 1 and not (tmp_path / "out").exists()


def test_long_edge_takes_the_aspect_of_the_first_video(tmp_path):
    for name, height, width in (("a", 40, 60), ("b", 80, 120), ("c", 60, 40)):
        make_video(tmp_path / "in" / f"{name}.mp4", 100, height=height, width=width)
    result = run(tmp_path / "in", tmp_path / "out", "--long-edge", 32)
    assert result.exit_code == 1
    assert "c.mp4 would be 32x21 with --long-edge 32, but the first video makes it 21x32; give --sizes" in result.output
    assert [clip.path for clip in ClipDataset(tmp_path / "out", [(21, 32)]).clips] == ["a", "b"]
    result = run(tmp_path / "in", tmp_path / "out", "--long-edge", 32, "--height", 8, "--width", 8)
    assert result.exit_code == 2 and "give either --long-edge or a size" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--partition", 2, "--num-partitions", 2), "partition 2 does not exist; 2 partitions are 0 ... 1"),
        (("--trim-start", 1), "after trimming: it is 0.5 s long"),
        (("--long-edge", 5, "--sizes", "8x8"), "give either --long-edge or a size"),
    ],
)
def test_wrong_requests_are_explained_and_write_nothing(tmp_path, options, message):
    make_video(tmp_path / "in" / "a.mp4", 100)
    result = run(tmp_path / "in", tmp_path / "out", *options)
    assert result.exit_code != 0 and message in result.output
    assert not list(tmp_path.glob("out/**/*.zip"))


def test_folders_without_videos_and_videos_that_would_share_a_clip_or_differ_in_rate(tmp_path):
    (tmp_path / "in").mkdir()
    result = run(tmp_path / "in", tmp_path / "out")
    assert result.exit_code == 1 and "holds no videos, whose names end in .3g2, " in result.output
    make_video(tmp_path / "in" / "a.mp4", 100, fps=20)
    make_video(tmp_path / "in" / "b.mp4", 100, fps=25)
    result = run(tmp_path / "in", tmp_path / "out", "--sizes", "8x8")
    assert result.exit_code == 0 and "differ in frame rate: 20 (1 clips), 25 (1 clips); give --fps" in result.output
    make_video(tmp_path / "in" / "a.webm", 100)
    assert run(tmp_path / "in", tmp_path / "two", "--sizes", "8x8").exit_code == 0
    manifest = json.loads((tmp_path / "two" / "manifest.json").read_text())["clips"]
    assert {name: clip["group"] for name, clip in manifest.items()} == {"a.mp4": "a", "a.webm": "a", "b": "b"}


# ----------------------------------------------------------------------------
# Names and commands.


def test_names_that_are_not_utf_8_are_stored_readably_and_end_nothing(tmp_path, repo):
    make_video(tmp_path / "in" / "good.mp4", 100)
    names = [b"caf\xe9.mp4", b"caf%E9.mp4", b"two\nlines.mp4", b"torn\xff.mp4"]
    for name in names[:3]:
        shutil.copy(tmp_path / "in" / "good.mp4", os.fsencode(tmp_path / "in") + b"/" + name)
    Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/" + names[3])).write_bytes(b"noise")
    folder = os.fsencode(tmp_path) + b"/out \xe9"
    options = ["--sizes=18x32", "--num-partitions=2", "--skip-bad"]
    listed = run(tmp_path / "in", os.fsdecode(folder), *options, "--dry-run")
    assert listed.exit_code == 0 and "two%0Alines  40x60" in listed.output
    command = [sys.executable, "-m", "dataset_tools.make_dataset_from_videos", tmp_path / "in", folder, *options]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=repo, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"torn\\xff.mp4 has no video" in done.stderr
    assert done.stdout.rstrip().endswith(b" --dataset=$'" + os.fsencode(tmp_path) + b"/out \\xe9' --preset=toy")
    clips = json.loads(Path(os.fsdecode(folder), "manifest.json").read_text())["clips"]
    assert sorted(clips) == ["caf%E9", "caf%E9_2", "good", "two%0Alines"]
    dataset = ClipDataset(Path(os.fsdecode(folder)), [(18, 32)])
    assert [dataset.read(number, (18, 32), range(10)).shape for number in range(4)] == [(10, 18, 32, 3)] * 4


@pytest.mark.parametrize(
    ("sizes", "preset"), [("18x32,72x128", "toy"), ("36x64,144x256", "labdoom-small"), ("64x64", None)]
)
def test_the_next_command_can_be_pasted_into_a_shell(tmp_path, repo, monkeypatch, sizes, preset):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    make_video(tmp_path / "in" / "a.mp4", 100)
    result = run("in", "it's $HOME", "--sizes", sizes)
    assert result.exit_code == 0, result.output
    command = result.output.splitlines()[-1].partition("Next: ")[2]
    _, script, dataset, option = shlex.split(command)
    assert script == str(repo / "train_lres.py") and dataset == "--dataset=it's $HOME"
    assert option == (f"--preset={preset}" if preset else "--size=64x64")
    if preset == "toy":
        command = f"export PATH={Path(sys.executable).parent}:$PATH; {command} --dry-run"
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and "it's $HOME" in done.stdout, done.stderr


def test_what_is_too_short_after_trimming_is_not_broken(tmp_path):
    make_video(tmp_path / "in" / "a.mp4", 100, num_frames=40)
    make_video(tmp_path / "in" / "b.mp4", 100, num_frames=10)
    arguments = (tmp_path / "in", tmp_path / "out", "--sizes", "8x8", "--trim-start", 1)
    result = run(*arguments, "--dry-run")
    assert result.exit_code == 0 and "b  left out: nothing is left of" in result.output
    result = run(*arguments)
    assert result.exit_code == 0 and "Left out: nothing is left of" in result.output
    assert [clip.path for clip in ClipDataset(tmp_path / "out", [(8, 8)]).clips] == ["a"]


def test_sound_may_be_longer_than_the_pictures(tmp_path):
    make_video(tmp_path / "a.mp4", 100)
    (tmp_path / "in").mkdir()
    sound = ["-f", "lavfi", "-i", "sine=d=8", "-c:v", "copy", "-map", "0", "-map", "1", tmp_path / "in" / "a.mkv"]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", tmp_path / "a.mp4", *sound], check=True)
    assert run(tmp_path / "in", tmp_path / "out", "--sizes", "8x8").exit_code == 0
    assert [clip.num_frames for clip in ClipDataset(tmp_path / "out", [(8, 8)]).clips] == [10]
