"""Cuts in real videos are found exactly; pans, repeated frames, flashes and dissolves are not taken for cuts."""

import sys
import tracemalloc

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
    """A camera that swings over a picture of coarse noise: uint8 (T, 45, 80, 3)."""
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
