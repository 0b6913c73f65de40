"""Cuts in real videos are found exactly; pans, repeated frames, flashes and dissolves are not taken for cuts."""

import subprocess
import sys
import tracemalloc

import imageio_ffmpeg
import iscc_samples
import numpy as np
import pytest
from PIL import Image

from dataset_tools.shots import ShotDetector
from dnnlib import video

# Looked at frame by frame; the video also has a dissolve, around frame 116.
DEMO_CUTS = [183, 243, 365, 395, 485, 552, 706, 741, 864, 923]


def find(frames, fps=30, sensitivity=1.0):
    detector = ShotDetector(fps, sensitivity)
    for frame in frames:
        detector.add(frame)
    return detector.finish()


def pan(seed, num_frames, speed=3):
    """Return a camera that swings over a picture of coarse noise: uint8 (T, 45, 80, 3)."""
    coarse = np.random.RandomState(seed).randint(0, 256, (3, 7 + speed * num_frames // 16, 3)).astype(np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize((16 * coarse.shape[1], 48), Image.Resampling.BICUBIC))
    return np.stack([picture[:45, speed * step : speed * step + 80] for step in range(num_frames)])


def test_the_cuts_of_real_footage():
    (path,) = [path for path in iscc_samples.videos() if path.name == "demo.mp4"]
    assert find(video.iter_video_frames(path, end_sec=40), fps=24) == DEMO_CUTS


@pytest.mark.parametrize("repeats", [1, 2, 3, 5])
def test_a_cut_between_pans_is_found_and_the_pans_are_none(repeats):
    frames = np.concatenate([pan(0, 30), pan(1, 40), pan(2, 30)]).repeat(repeats, axis=0)
    assert find(frames, fps=30 * repeats) == [30 * repeats, 70 * repeats]


def drift(seed, num_frames, low, high):
    """Return a slow pan over a smooth picture in levels `low` to `high`, each three values: uint8 (T, 48, 80, 3)."""
    coarse = np.random.RandomState(seed).randint(0, 256, (5, 8 + num_frames // 6, 3)).astype(np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize((80 + 2 * num_frames, 48), Image.Resampling.BICUBIC)) / 255
    picture = np.asarray(low) + (np.asarray(high) - low) * picture
    return np.stack([picture[:, 2 * step : 2 * step + 80] for step in range(num_frames)]).astype(np.uint8)


def compress(frames, path, crf=30):
    """Return what H.264 makes of frames, with a key frame each 12."""
    height, width = frames.shape[1:3]
    pipe = f"-v error -f rawvideo -pix_fmt rgb24 -s {width}x{height} -r 30 -i pipe:0 -c:v libx264 -g 12 -crf {crf} -y"
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *pipe.split(), path], input=frames.tobytes(), check=True)
    return video.iter_video_frames(path)


def boxed(frames, share, axis):
    """Return frames with black bars on both sides of an axis, that together take a share of it."""
    place = np.indices(frames.shape)[axis] / frames.shape[axis]
    return np.where(np.abs(place - 0.5) < 0.5 - share / 2, frames, 0).astype(np.uint8)


SHOTS = {
    "dark": (drift(0, 40, 0, 70), drift(1, 40, 0, 70)),
    "darker": (drift(0, 40, 0, 30), drift(1, 40, 0, 30)),
    "of little contrast": (drift(0, 40, 100, 140), drift(1, 40, 100, 140)),
    "equally bright": (drift(0, 40, [150, 50, 70], [230, 130, 150]), drift(1, 40, [20, 100, 150], [100, 180, 230])),
    "letter-boxed": (boxed(drift(0, 40, 20, 200), 0.6, 1), boxed(drift(1, 40, 20, 200), 0.6, 1)),
    "pillar-boxed": (boxed(drift(0, 40, 20, 200), 0.6, 2), boxed(drift(1, 40, 20, 200), 0.6, 2)),
    "flat": (np.full((40, 48, 80, 3), (200, 40, 40), np.uint8), np.full((40, 48, 80, 3), (40, 123, 40), np.uint8)),
}


@pytest.mark.parametrize("kind", SHOTS)
def test_cuts_are_found_in_whatever_light_and_colour(tmp_path, kind):
    one, other = SHOTS[kind]
    assert find(compress(np.concatenate([one, other]), tmp_path / "a.mp4")) == [40]
    assert find(compress(np.concatenate([one, one[::-1]]), tmp_path / "b.mp4")) == []


@pytest.mark.parametrize("speed", [1, 3, 8])
def test_a_pan_over_strong_colours_is_no_cut(tmp_path, speed):
    stripes = np.array([[220, 30, 30], [30, 220, 30], [30, 30, 220], [220, 220, 30], [30, 220, 220]], np.uint8)
    picture = np.broadcast_to(np.tile(stripes.repeat(48, 0), (8, 1)), (48, 5 * 48 * 8, 3))
    frames = np.stack([picture[:, speed * step : speed * step + 80] for step in range(100)])
    assert find(compress(frames, tmp_path / "a.mp4")) == [] and find(pan(0, 100, speed)) == []


def test_cuts_between_stills_are_found():
    stills = np.concatenate([pan(seed, 1).repeat(40, axis=0) for seed in range(3)])
    assert find(stills) == [40, 80]


@pytest.mark.parametrize("length", [1, 2])
def test_a_flash_is_no_cut(length):
    frames = pan(0, 60, speed=1)
    frames[30 : 30 + length] = 255 - (255 - frames[30 : 30 + length]) // 4
    assert find(frames) == []


@pytest.mark.parametrize("length", [4, 12])
def test_a_dissolve_is_no_cut(length):
    one, other = pan(0, 60, speed=1), pan(1, 60, speed=1)
    share = np.clip((np.arange(60) - 30) / length, 0, 1)[:, None, None, None]
    assert find((one * (1 - share) + other * share).astype(np.uint8)) == []


def test_shots_are_at_least_half_a_second_long():
    lengths = [40, 5, 40]
    frames = np.concatenate([pan(seed, length, speed=1) for seed, length in enumerate(lengths)])
    assert find(frames) == [40]
    assert find(frames, fps=8) == [40, 45]


def test_sensitivity_decides_what_counts_as_a_cut():
    one = pan(0, 60, speed=1)
    brighter = np.concatenate([one[:30], one[30:] + (255 - one[30:]) // 8])
    assert find(brighter) == [] and find(brighter, sensitivity=2) == [30]


def test_memory_does_not_grow_with_the_video():
    frames, detector = pan(0, 50), ShotDetector(30)
    tracemalloc.start()
    sizes = []
    for _ in range(2):
        for number in range(300):
            detector.add(frames[number % 50])
        sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert sizes[1] < sizes[0] + 2 * frames[0].nbytes


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[shots\]'"):
        ShotDetector(30)
