"""Videos written are read back as they were, nothing half-written stays, and failures say what ffmpeg said."""

import os
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest

from dnnlib import video


def moving_bar(num_frames, height, width):
    """Smooth frames, so that compression changes little, whose brightness tells their number."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    frames[..., 0] = np.linspace(40, 220, width)
    frames[..., 1] = np.linspace(220, 40, height)[:, None]
    frames[..., 2] = 30 + 8 * np.arange(num_frames)[:, None, None]
    return frames


def write(path, frames, **options):
    with video.VideoWriter(path, frames.shape[1], frames.shape[2], **options) as writer:
        writer.write(frames[:3])
        writer.write(frames[3:])


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_frames_come_back_in_number_order_and_colour(tmp_path, suffix):
    frames = moving_bar(12, 48, 64)
    path = tmp_path / f"a{suffix}"
    write(path, frames, fps=25)
    info = video.probe(path)
    assert (info.height, info.width, info.fps) == (48, 64, 25) and info.duration_sec == pytest.approx(12 / 25, abs=0.02)
    read = list(video.iter_video_frames(path))
    assert len(read) == 12 and read[0].dtype == np.uint8
    assert np.abs(np.stack(read).astype(int) - frames).mean() < (10 if suffix == ".gif" else 2)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(("enlarge", "height", "width"), [(False, 38, 64), (True, 37 * 16, 63 * 16)])
def test_odd_edges_are_padded_or_pixels_repeated(tmp_path, enlarge, height, width):
    frames = moving_bar(3, 37, 63)
    write(tmp_path / "a.mp4", frames, enlarge=enlarge)
    read = np.stack(list(video.iter_video_frames(tmp_path / "a.mp4")))
    assert read.shape == (3, height, width, 3)
    factor = 16 if enlarge else 1
    centres = read[:, factor // 2 :: factor, factor // 2 :: factor][:, :37, :63]
    assert np.abs(centres.astype(int) - frames).mean() < 3


def test_small_frames_are_enlarged_by_the_least_whole_factor():
    factors = [video.VideoWriter("a.mp4", *size, enlarge=True).factor for size in ((36, 64), (144, 256), (18, 32))]
    assert factors == [4, 1, 8]


def test_a_time_window_and_another_rate(tmp_path):
    write(tmp_path / "a.mp4", moving_bar(24, 32, 32), fps=12, crf=4)

    def numbers(**options):
        return [round((f[..., 2].mean() - 30) / 8) for f in video.iter_video_frames(tmp_path / "a.mp4", **options)]

    assert numbers() == list(range(24))
    assert numbers(start_sec=0.5, end_sec=1.0) == list(range(6, 12))
    assert numbers(start_sec=1.5) == list(range(18, 24))
    assert numbers(fps=24, end_sec=0.25) == [0, 0, 1, 1, 2, 2]
    assert len(numbers(fps=6)) == 12


def test_rotation_and_oblong_pixels_are_undone(tmp_path):
    frames = np.zeros((4, 32, 64, 3), np.uint8)
    frames[:, :, 32:] = 200  # the right half is bright
    write(tmp_path / "a.mp4", frames)
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-display_rotation", "90"]
    subprocess.run([*ffmpeg, "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "turned.mp4"], check=True)
    info = video.probe(tmp_path / "turned.mp4")
    upright = next(video.iter_video_frames(tmp_path / "turned.mp4"))
    assert upright.shape == (64, 32, 3) and (info.height, info.width) == (64, 32)
    assert upright[:24].mean() > 180 and upright[-24:].mean() < 20  # 90 degrees counterclockwise

    wide = [*ffmpeg[:3], "-i", tmp_path / "a.mp4", "-vf", "setsar=2/1", tmp_path / "wide.mp4"]
    subprocess.run(wide, check=True)
    info = video.probe(tmp_path / "wide.mp4")
    assert next(video.iter_video_frames(tmp_path / "wide.mp4")).shape == (32, 128, 3)
    assert (info.height, info.width) == (32, 128)


def test_an_interrupted_writer_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), video.VideoWriter(path, 32, 32) as writer:
        writer.write(moving_bar(5, 32, 32))
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="no frames were written"), video.VideoWriter(path, 32, 32):
        pass
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.mp4"]


def test_an_encoder_that_fails_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"cannot encode .*absent/a.mp4: .*No such file"):
        write(tmp_path / "absent" / "a.mp4", moving_bar(60, 64, 64))
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match=r"use one of .mp4, .webm, .gif"):
        video.VideoWriter(tmp_path / "a.mpq", 32, 32)


def test_what_is_no_video_is_refused_by_name(tmp_path):
    path = tmp_path / "no.mp4"
    path.write_bytes(b"nothing " * 999)
    with pytest.raises(ValueError, match=r"cannot decode .*no.mp4: .*Invalid data"):
        list(video.iter_video_frames(path))
    with pytest.raises(ValueError, match=r"no.mp4 has no video that ffmpeg can read: .*Invalid data"):
        video.probe(path)
    with pytest.raises(ValueError, match="is not a file"):
        video.probe(tmp_path / "absent.mp4")


def test_a_reader_that_stops_early_ends_its_ffmpeg(tmp_path):
    write(tmp_path / "a.mp4", moving_bar(24, 256, 256))
    frames = video.iter_video_frames(tmp_path / "a.mp4")
    next(frames)
    before = _children()
    frames.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert len(_children()) == len(before) - 1


def _children():
    with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as file:
        return file.read().split()
