"""Real footage becomes a dataset that training reads; broken videos are named; partitions and reruns are safe."""

import json
import shutil
from pathlib import Path

import iscc_samples
import numpy as np
import pytest
from click.testing import CliRunner

from dataset_tools.make_dataset_from_videos import main
from dnnlib import video
from training.dataset import ClipDataset

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


def test_partitions_in_any_order_make_the_same_as_one_and_reruns_replace(tmp_path):
    levels = {"a": 40, "b/c": 80, "b/d": 120, "e": 160, "f": 200}
    for name, level in levels.items():
        make_video(tmp_path / "in" / f"{name}.mp4", level)
    (tmp_path / "in" / "notes.txt").write_text("not a video")
    for partition in (1, 0, 1):
        result = run(
            tmp_path / "in", tmp_path / "two", "--sizes", "8x8", "--partition", partition, "--num-partitions", 2
        )
        assert result.exit_code == 0, result.output
    run(tmp_path / "in", tmp_path / "one", "--height", 8, "--width", 8)
    one, two = (ClipDataset(tmp_path / name, [(8, 8)]) for name in ("one", "two"))
    assert [clip.path for clip in one.clips] == list(levels) == [clip.path for clip in two.clips]
    assert one.fps == 20
    for index, level in enumerate(levels.values()):
        video_one, video_two = (dataset.read(index, (8, 8), range(10)) for dataset in (one, two))
        assert np.array_equal(video_one, video_two) and np.abs(video_one.astype(int) - level).max() <= 4
    again = json.loads((tmp_path / "one" / "dataset.json").read_text())["hashes"]
    run(tmp_path / "in", tmp_path / "one", "--height", 8, "--width", 8)
    assert json.loads((tmp_path / "one" / "dataset.json").read_text())["hashes"] == again


def test_broken_videos_are_named_skipped_and_counted(tmp_path):
    make_video(tmp_path / "in" / "good.mp4", 100)
    (tmp_path / "in" / "noise.avi").write_bytes(b"noise" * 999)
    (tmp_path / "in" / "cut.mkv").write_bytes((FOOTAGE / "demo.mkv").read_bytes()[:200_000])
    arguments = (tmp_path / "in", tmp_path / "out", "--sizes", "8x8")
    result = run(*arguments)
    assert result.exit_code == 1
    assert "noise.avi has no video" in result.output and "cut.mkv ends early" in result.output
    assert "2 of 3 videos are broken; accept that with --skip-bad" in result.output
    assert [clip.path for clip in ClipDataset(tmp_path / "out", [(8, 8)]).clips] == ["good"]
    assert run(*arguments, "--skip-bad").exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sizes", "8"), "'8' is not a frame size"),
        (("--height", 8), "--height and --width go together"),
        (("--height", 8, "--width", 8, "--sizes", "8x8"), "give either --sizes or --height and --width"),
        (("--partition", 2, "--num-partitions", 2), "partition 2 does not exist"),
        (("--num-partitions", 3), "holds 2 videos"),
        (("--trim-start", 1), "is 0.5 s long, so nothing is left after trimming"),
    ],
)
def test_wrong_requests_are_explained_and_write_nothing(tmp_path, options, message):
    for name in ("a", "b"):
        make_video(tmp_path / "in" / f"{name}.mp4", 100)
    result = run(tmp_path / "in", tmp_path / "out", *options)
    assert result.exit_code != 0 and message in result.output
    assert not list(tmp_path.glob("out/**/*.zip"))


def test_videos_that_would_share_a_clip_or_differ_in_rate(tmp_path):
    make_video(tmp_path / "in" / "a.mp4", 100, fps=20)
    make_video(tmp_path / "in" / "b.mp4", 100, fps=25)
    result = run(tmp_path / "in", tmp_path / "out", "--sizes", "8x8")
    assert result.exit_code == 0 and "differ in frame rate: 20 (1 videos), 25 (1 videos); give --fps" in result.output
    make_video(tmp_path / "in" / "a.webm", 100)
    result = run(tmp_path / "in", tmp_path / "out", "--sizes", "8x8")
    assert result.exit_code == 1 and "would make the same clip a; rename one" in result.output
