"""Frame rates are found from rounded times, constant and variable ones are distinguished, hidden packets skipped."""

import re
import struct
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnnlib import video, video_probe

RATES = (24000 / 1001, 24, 25, 30000 / 1001, 30, 50, 60000 / 1001, 60, 120000 / 1001, 240)
TICKS = (1 / 1000, 1 / 90000, 1 / 15360)


def packets(times, tick=1 / 90000, last=0.0):
    times = np.floor(np.asarray(times) / tick + 1e-6) * tick
    return video_probe.Packets(times - times[0], times[:1], float(times[0]), tick, last, 0, True)


@given(rate=st.sampled_from(RATES), tick=st.sampled_from(TICKS), num=st.integers(2, 3000), start=st.floats(0, 10))
def test_a_constant_rate_is_found_exactly_in_rounded_times(rate, tick, num, start):
    given_times = packets(start + np.arange(num) / rate, tick)
    timing = video_probe.measure(given_times, rate)
    assert (timing.num_frames, timing.fps, timing.is_variable) == (num, rate, False)
    assert timing.duration_sec == pytest.approx(num / rate, abs=tick * 1.01)
    if num / rate > 4:  # long enough to tell 30 from 30000/1001 by the times alone
        assert video_probe.measure(given_times, 0.0).fps == rate


@given(jitter=st.floats(0, 0.07), lost=st.integers(0, 6), seed=st.integers(0, 99))
def test_uneven_and_lost_frames_are_no_variable_rate(jitter, lost, seed):
    random = np.random.RandomState(seed)
    numbers = np.delete(np.arange(700), 100 * np.arange(1, 7)[:lost])
    times = (numbers + random.uniform(-jitter, jitter, len(numbers)) + 1) / 30
    timing = video_probe.measure(packets(times), 0.0)
    assert not timing.is_variable and timing.num_frames == 700 - lost
    assert timing.fps == pytest.approx(30, rel=0.005)


@given(first=st.integers(50, 500), second=st.integers(50, 500), other=st.sampled_from((15, 20, 24, 60)))
def test_two_rates_are_a_variable_rate_of_their_mean(first, second, other):
    steps = np.repeat([1 / 30, 1 / other], [first, second])
    timing = video_probe.measure(packets(np.append(0, np.cumsum(steps)), last=0.5), 0.0)
    assert timing.is_variable
    assert timing.fps == pytest.approx((first + second) / steps.sum(), rel=1e-3)
    assert timing.duration_sec == pytest.approx(steps.sum() + 0.5, rel=1e-3)


def test_one_long_pause_is_a_variable_rate():
    times = np.arange(600) / 30
    assert video_probe.measure(packets(np.where(times > 10, times + 5, times)), 30).is_variable


def test_a_single_frame_has_the_stated_rate():
    assert video_probe.measure(packets([0]), 25) == video_probe.Timing(1, 25, False, 0.04)
    assert video_probe.measure(packets([0], last=0.1), 0.0) == video_probe.Timing(1, 10, False, 0.1)


def ffmpeg(path, *arguments):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *arguments, path], check=True)
    return path


def test_only_frames_that_are_shown_count(tmp_path):
    source = ("-f", "lavfi", "-i", "testsrc2=s=64x64:r=30:d=4")
    vp8 = (
        "-c:v",
        "libvpx",
        "-b:v",
        "200k",
        "-auto-alt-ref",
        "1",
        "-lag-in-frames",
        "16",
        "-passlogfile",
        tmp_path / "p",
    )
    ffmpeg("-", *source, *vp8, "-pass", "1", "-f", "null")
    hidden = ffmpeg(tmp_path / "hidden.webm", *source, *vp8, "-pass", "2")
    text = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", hidden, "-c", "copy", "-f", "framecrc", "-"],
        capture_output=True,
        check=True,
    ).stdout.decode()
    assert sum(not line.startswith("#") for line in text.splitlines()) > 120  # some packets only help others
    timing = video_probe.scan(hidden)
    assert (timing.num_frames, timing.fps, timing.is_variable) == (120, 30, False)

    long = ffmpeg(tmp_path / "long.mp4", *source, "-c:v", "libx264", "-g", "30")
    cut = ffmpeg(tmp_path / "cut.mp4", "-ss", "1.5", "-i", long, "-c", "copy")  # frames 30 to 44 are in the file
    assert video_probe.scan(cut) == video_probe.Timing(75, 30, False, 2.5)

    stream = ffmpeg(
        tmp_path / "stream.ts", "-i", ffmpeg(tmp_path / "a.mpg", *source, "-c:v", "mpeg2video"), "-c", "copy"
    )
    content = stream.read_bytes()
    packet = 188
    stream.write_bytes(content[len(content) // 3 // packet * packet :])  # as a recording that starts anywhere
    frames = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "quiet", "-i", stream, "-f", "rawvideo", "-pix_fmt", "gray", "-"],
        capture_output=True,
        check=True,
    ).stdout
    assert video_probe.scan(stream).num_frames == pytest.approx(len(frames) / 64 / 64, abs=2)


def test_a_file_is_read_anew_when_it_changes(tmp_path):
    for num_frames in (10, 20):
        path = ffmpeg(tmp_path / "a.mp4", "-f", "lavfi", "-i", f"color=s=64x{num_frames * 2}:r=10:d={num_frames / 10}")
        assert video_probe.scan(path).num_frames == num_frames and video_probe.probe(path).height == num_frames * 2


# ----------------------------------------------------------------------------
# Whole files and torn ones.

FILM = ("-f", "lavfi", "-i", "testsrc2=s=64x48:r=25:d=2", "-c:v", "libx264", "-g", "12", "-pix_fmt", "yuv420p")
SOUND = ("-f", "lavfi", "-i", "sine=d=9")


def film(tmp_path, suffix=".mp4"):
    return ffmpeg(tmp_path / f"film{suffix}", *FILM)


def longer_sound(tmp_path, suffix):
    both = ("-i", film(tmp_path), *SOUND, "-map", "0", "-map", "1", "-c:v", "copy")
    return ffmpeg(tmp_path / f"sound{suffix}", *both)


def longer_subtitles(tmp_path, suffix):
    (tmp_path / "a.srt").write_text("1\n00:00:08,000 --> 00:00:09,500\nend\n")
    both = ("-i", film(tmp_path), "-i", tmp_path / "a.srt", "-map", "0", "-map", "1", "-c:v", "copy")
    return ffmpeg(tmp_path / f"subtitles{suffix}", *both)


def late_pictures(tmp_path, suffix):
    both = (*SOUND, "-itsoffset", "5", "-i", film(tmp_path), "-map", "1", "-map", "0", "-c:v", "copy")
    return ffmpeg(tmp_path / f"late{suffix}", *both)


def late_clock(tmp_path, suffix):
    return ffmpeg(tmp_path / f"hour{suffix}", "-i", film(tmp_path), "-c", "copy", "-output_ts_offset", "3600")


def held_picture(tmp_path, suffix):
    held = ("-bsf:v", "setts=duration=if(eq(N\\,49)\\,8/TB\\,DURATION)", "-bf", "0")
    return ffmpeg(tmp_path / f"held{suffix}", *FILM, *held)


def stale_length(tmp_path, suffix):
    path = film(tmp_path, suffix)
    data = bytearray(path.read_bytes())
    if suffix == ".flv":
        start = data.find(b"duration") + 9
    else:
        start = data.find(b"\x44\x89\x88") + 3  # Matroska's Duration, a double
    data[start : start + 8] = struct.pack(">d", 99e3 if suffix == ".mkv" else 99)
    path.write_bytes(data)
    assert video_probe.probe(path).duration_sec == pytest.approx(99, abs=1)
    return path


@pytest.mark.parametrize(
    ("make", "suffixes"),
    [
        (longer_sound, [".mp4", ".mkv", ".flv", ".avi", ".mov", ".ts"]),
        (longer_subtitles, [".mkv"]),
        (late_pictures, [".mp4", ".mkv", ".ts"]),
        (late_clock, [".mp4", ".mkv", ".ts", ".flv"]),
        (held_picture, [".mp4", ".mkv"]),
        (stale_length, [".flv", ".mkv"]),
    ],
)
def test_a_file_is_whole_if_any_stream_reaches_its_end(tmp_path, make, suffixes):
    for suffix in suffixes:
        path = make(tmp_path, suffix)
        assert video_probe.missing_end(path) is None
        assert video_probe.scan(path).num_frames == 50 and not video_probe.scan(path).is_variable


@pytest.mark.parametrize("suffix", [".mkv", ".flv", ".avi", ".webm", ".wmv"])
@pytest.mark.parametrize("share", [0.35, 0.6])
def test_torn_files_are_told_from_whole_ones(tmp_path, suffix, share):
    encoder = {".webm": ["-c:v", "libvpx", "-deadline", "realtime"], ".wmv": ["-c:v", "wmv2"]}.get(
        suffix, ["-c:v", "libx264", "-g", "12"]
    )
    path = ffmpeg(tmp_path / f"a{suffix}", "-f", "lavfi", "-i", "testsrc2=s=64x48:r=25:d=8", *encoder)
    whole = path.read_bytes()
    assert video_probe.missing_end(path) is None
    path.write_bytes(whole[: round(share * len(whole))])
    reason = video_probe.missing_end(path)
    if suffix == ".avi":  # ffmpeg adapts the length to the size, but marks the last packet
        with pytest.raises(ValueError, match=r"cannot decode .*a.avi"):
            list(video.iter_video_frames(path))
    else:
        assert re.match(r"it states 8.\d s but its last packet ends at|it states \d+ bytes but holds", reason or "")
    if suffix in (".mkv", ".flv"):  # a download whose second part never came
        path.write_bytes(whole[: round(share * len(whole))] + bytes(len(whole) - round(share * len(whole))))
        assert video_probe.missing_end(path)


def test_the_reason_is_given_for_files_without_video(tmp_path):
    path = film(tmp_path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="its end is missing, since copying or recording was cut off .*moov"):
        video_probe.scan(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="the file is empty"):
        video_probe.scan(path)
    with pytest.raises(ValueError, match="it holds audio only"):
        video_probe.scan(ffmpeg(tmp_path / "tone.mp4", *SOUND))


@pytest.mark.parametrize("fps", [24, 30, 60])
@pytest.mark.parametrize("num_frames", [5, 12, 100, 1001])
def test_the_rates_of_our_own_gifs_are_exact(fps, num_frames):
    ticks = np.rint(np.arange(num_frames) * 100 / fps + 1e-9)
    times = video_probe.Packets(ticks / 100, np.zeros(1), 0.0, 0.01, float(np.diff(ticks)[-1]) / 100, 0, True)
    stated = {24: 25, 30: 100 / 3, 60: 100}[fps]
    assert video_probe.measure(times, stated).fps == fps


def test_the_mean_of_a_variable_rate_is_not_rounded_to_a_usual_one():
    steps = np.tile([1 / 25, 1 / 36.0], 200)  # 29.5 a second
    timing = video_probe.measure(packets(np.append(0, np.cumsum(steps)), last=1 / 30), 29.97)
    assert timing.is_variable and timing.fps == pytest.approx(1 / steps.mean(), rel=1e-5)
    assert timing.num_frames == timing.count(timing.fps)
