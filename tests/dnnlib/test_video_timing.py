"""For codecs, containers, rates, lengths and cuts of many kinds: scan = full decode = sum of windows."""

import random
import subprocess
from fractions import Fraction

import imageio_ffmpeg
import numpy as np
import pytest

from dnnlib import video, video_probe

ENCODERS = {
    "h264": "-c:v libx264 -preset veryfast -bf {b} -g {g}",
    "h264-open": "-c:v libx264 -preset veryfast -bf 3 -x264opts open-gop=1:keyint={g}:scenecut=0",
    "hevc": "-c:v libx265 -preset ultrafast -x265-params log-level=none:keyint={g}:open-gop=1:bframes={b}:scenecut=0",
    "vvc": "-c:v libvvenc -preset faster -period 1",
    "av1": "-c:v libsvtav1 -preset 12 -g {g}",
    "vp8": "-c:v libvpx -b:v 1M -auto-alt-ref 1 -lag-in-frames 16 -g {g}",
    "vp9": "-c:v libvpx-vp9 -b:v 1M -auto-alt-ref 1 -lag-in-frames 16 -g {g} -cpu-used 8",
    "mpeg1": "-c:v mpeg1video -q:v 2 -bf 2 -g {g}",
    "mpeg2": "-c:v mpeg2video -q:v 2 -bf 2 -g {g}",
    "mpeg4": "-c:v mpeg4 -q:v 2 -bf {b} -g {g}",
    "theora": "-c:v libtheora -q:v 10 -g {g}",
    "wmv": "-c:v wmv2 -q:v 2 -g {g}",
    "flv": "-c:v flv1 -q:v 2 -g {g}",
    "ffv1": "-c:v ffv1 -g {g}",
    "png": "-c:v png",
    "gif": "-gifflags 0",
}
# Codec, container, frames a second, and what is done to the file: "cut SUFFIX" copies all after a random time into
# another container, "head SUFFIX" all before it, "lost" leaves a frame out, "slow" makes the second half slower.
CASES = [
    "vvc mp4 30 whole",
    "vvc ts 25 whole",
    "vvc mkv 30000/1001 whole",
    "hevc mp4 24 cut mkv",
    "hevc ts 30 cut ts",
    "hevc mkv 60000/1001 cut mp4",
    "h264 avi 25 whole",
    "h264 mp4 30 lost",
    "h264 mp4 24 slow",
    "h264 ts 50 late",
    "h264-open mp4 25 cut mkv",
    "h264-open mkv 24000/1001 late",
    "av1 mkv 30 head mp4",
    "vp8 webm 15 whole",
    "vp9 webm 30 cut mp4",
    "mpeg1 avi 25 whole",
    "mpeg2 mpg 30000/1001 cut mpg",
    "mpeg2 ts 25 late",
    "mpeg4 avi 24 whole",
    "mpeg4 mkv 24 cut mp4",
    "theora ogv 12 whole",
    "wmv wmv 25 cut mkv",
    "wmv mkv 24 head avi",
    "flv flv 30 late",
    "ffv1 mkv 60 lost",
    "ffv1 avi 30 lost",
    "png mov 30000/1001 whole",
    "gif gif 60 whole",
    "gif gif 30 whole",
    "gif gif 24 whole",
]


def draw(number):
    """Return a picture that tells its number: eight bars are the digits of its binary form."""
    bars = np.where((number >> np.arange(64) // 8) & 1, 235, 20).astype(np.uint8)
    return np.broadcast_to(bars[None, :, None], (48, 64, 3))


def read(frames):
    bars = [frame[24, 4::8, 1] > 128 for frame in frames]
    return [int(np.packbits(bar, bitorder="little")[0]) for bar in bars]


def ffmpeg(path, *arguments, content=None):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *arguments, path]
    subprocess.run([str(argument) for argument in command], check=True, input=content)
    return path


def make(folder, case, draws):
    """Make the file of a case; return its path and the number of frames that were encoded."""
    codec, suffix, rate, change, *other = case.split()
    num_frames = 110 if change == "lost" else draws.randint(60, 80)
    encoder = ENCODERS[codec].format(b=draws.choice([0, 1, 3]), g=draws.choice([5, 12, 30])).split()
    filters = {
        "lost": f"select=not(eq(n\\,{draws.randint(5, 100)}))",
        "slow": f"setpts=if(lt(N\\,30)\\,N\\,3*N-60)/({rate})/TB",
    }
    options = ["-vf", filters[change], "-fps_mode", "passthrough"] if change in filters else []
    options += ["-output_ts_offset", "3600"] if change == "late" else []
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "64x48", "-r", rate, "-i", "pipe:0")
    content = b"".join(draw(number).tobytes() for number in range(num_frames))
    path = ffmpeg(folder / f"a.{suffix}", *raw, *options, *encoder, content=content)
    if change in ("cut", "head"):
        seconds = f"{draws.uniform(1, 40) / float(Fraction(rate)):.3f}"
        window = ("-ss", seconds, "-i", path) if change == "cut" else ("-i", path, "-t", seconds)
        path = ffmpeg(folder / f"b.{other[0]}", *window, "-c", "copy")
    return path, num_frames


@pytest.mark.parametrize("case", CASES)
def test_scan_and_full_decode_and_windows_agree(tmp_path, case):
    draws = random.Random(case)
    path, num_frames = make(tmp_path, case, draws)
    _, _, rate, change, *_ = case.split()
    timing, whole = video.scan(path), read(video.iter_video_frames(path))
    assert timing.num_frames == len(whole) and video.missing_end(path) is None
    assert timing.is_variable == (change == "slow")
    if change != "slow":
        assert timing.fps == pytest.approx(float(Fraction(rate)), rel=1e-9)
        assert set(np.diff(whole)) <= ({1, 2} if change == "lost" else {1})
    if change in ("whole", "late"):
        assert whole == list(range(num_frames))
    for fps, expected in ((None, whole), (timing.fps / 2, None), (23.976, None)):
        frames = expected or read(video.iter_video_frames(path, fps))
        assert len(frames) == (timing.count(fps) if fps else timing.num_frames)
        for _ in range(3):
            first = draws.randrange(len(frames))
            numbers = range(first, first + draws.randint(1, 12))
            part = read(video.iter_video_frames(path, fps, frames=numbers))
            assert part == frames[first : numbers.stop], (fps, numbers)
    first = draws.randrange(len(whole))
    bounds = [0.0, first / timing.fps, (first + 8) / timing.fps, None]
    parts = [read(video.iter_video_frames(path, None, *bounds[n : n + 2])) for n in range(3)]
    assert sum(parts, []) == whole
    assert change in ("lost", "slow") or parts[1] == whole[first : first + 8]


def test_pictures_that_are_not_coded_repeat_the_one_before(tmp_path):
    """MPEG-4 marks so a frame that equals the one before; the decoder returns nothing for it."""
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "64x48", "-r", "25", "-i", "pipe:0")
    content = b"".join(draw(number).tobytes() for number in range(60))
    path = ffmpeg(tmp_path / "a.avi", *raw, "-c:v", "mpeg4", "-g", "10", "-q:v", "2", content=content)
    data = bytearray(path.read_bytes())
    starts = [n for n in range(len(data)) if data[n : n + 4] == b"\0\0\1\xb6"]
    expected = list(range(60))
    for number in (3, 25, 26, 27, 59):
        bits = np.unpackbits(np.frombuffer(data[starts[number] + 4 : starts[number] + 12], np.uint8))
        coded = 2 + int(np.flatnonzero(bits[2:] == 0)[0]) + 1 + 1 + 5 + 1  # after type, seconds, marker, time, marker
        assert bits[coded] == 1
        bits[coded] = 0
        data[starts[number] + 4 : starts[number] + 12] = np.packbits(bits).tobytes()
        expected[number] = expected[number - 1]
    path.write_bytes(data)
    assert video.scan(path).num_frames == 60
    whole = read(video.iter_video_frames(path))
    assert len(whole) == 60 and all(whole[n] == whole[n - 1] for n in (3, 25, 26, 27, 59))
    for first in (0, 2, 3, 24, 25, 26, 28, 57, 59):
        assert read(video.iter_video_frames(path, frames=range(first, first + 4))) == whole[first : first + 4]


def test_a_window_does_not_start_more_than_one_process(tmp_path, monkeypatch):
    path = ffmpeg(tmp_path / "a.mp4", *"-f lavfi -i testsrc2=s=64x48:r=25:d=4 -c:v libx264 -g 10".split())
    video.scan(path)
    started = []
    run, popen = subprocess.run, subprocess.Popen
    monkeypatch.setattr(video_probe.subprocess, "run", lambda *a, **k: started.append(a) or run(*a, **k))
    monkeypatch.setattr(video.subprocess, "Popen", lambda *a, **k: started.append(a) or popen(*a, **k))
    for first in (0, 30, 80):
        assert len(list(video.iter_video_frames(path, frames=range(first, first + 16)))) == 16
    assert len(started) == 3
