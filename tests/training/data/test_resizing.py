"""Pixels of published systems: golden numbers, and the sizes that come out."""

import re

import numpy as np
import pytest
import torch

from tests import golden_files
from training.data.resizing import RESIZERS, resize_mebt, resize_tats, resize_tats_frames, tats_pixels

SQUARE = (8, 8)


def shape_in(text):
    """Return the last list of numbers in a description such as "..., THWC [3, 10, 14, 3]"."""
    return golden_files.number(re.findall(r"\[[^\]]*\]", text)[-1])


def numbered_frames(entry, numbers):
    """Return frames whose j-th value is (37 j + 11 number) mod 256."""
    height, width = shape_in(entry["frame"].partition(";")[0])
    j = np.arange(height * width * 3)
    a, b = map(int, golden_files.search(r"\((\d+) j \+ (\d+) num\)", entry["frame"]).groups())
    return np.stack([((a * j + b * number) % 256).astype(np.uint8).reshape(height, width, 3) for number in numbers])


def published_units(frames):
    """Return uint8 (T, H, W, 3) as (3, T, H, W) in [-0.5, 0.5]."""
    return frames.transpose(3, 0, 1, 2).astype(np.float32) / 255 - 0.5


@golden_files.entries("tats", "preprocess*")
def test_frames_of_videos_are_those_of_tats(entry, golden):
    for case in entry:
        shape = shape_in(case["video"])
        factor = int(golden_files.search(r"\((\d+) i\)", case["video"])[1])
        video = ((factor * np.arange(np.prod(shape))) % 256).astype(np.uint8).reshape(shape)[:: case["every"]]
        size = (case["resolution"],) * 2
        pixels = tats_pixels(video, size)
        golden_files.check(pixels - 0.5, case["out"], 1e-5)
        rounded = resize_tats(video, size)
        assert np.abs(rounded.transpose(3, 0, 1, 2) / 255 - pixels.numpy()).max() <= 0.501 / 255


@golden_files.entries("mebt", "preprocess*")
def test_frames_of_videos_are_those_of_mebt(entry, golden):
    """It subtracts 0.5 before resizing, which differs by rounding alone."""
    for case in entry:
        shape = shape_in(case["video"])
        factor = int(golden_files.search(r"\((\d+) i\)", case["video"])[1])
        video = ((factor * np.arange(np.prod(shape))) % 256).astype(np.uint8).reshape(shape)[:: case["every"]]
        golden_files.check(tats_pixels(video, (case["resolution"],) * 2) - 0.5, case["out"], 1e-5)


@golden_files.entries("tats", "frame_folder*")
def test_frames_of_folders_are_those_of_tats(entry, golden):
    for case in entry:
        numbers = sorted(int(text) for text in golden_files.search(r"f_([\d,]+)\.png", case["frame"])[1].split(","))
        first = case["start"]
        span = numbers[first : first + case["sequence_length"] * case["every"] : case["every"]]
        frames = resize_tats_frames(numbered_frames(case, span), (case["resolution"],) * 2)
        golden_files.check(published_units(frames), case["pil_lanczos"], 1e-5)


@golden_files.entries("mebt", "frame_image*")
def test_frames_of_lists_are_those_of_mebt(entry, golden):
    for case in entry:
        first = int(golden_files.search(r"v_(\d+)\.\.", case["frame"])[1]) + case["start"]
        frames = numbered_frames(case, range(first, first + case["sequence_length"]))
        golden_files.check(published_units(resize_mebt(frames, (case["resolution"],) * 2)), case["out"], 1e-5)


@pytest.mark.parametrize("name", RESIZERS)
@pytest.mark.parametrize("shape", [(9, 12), (16, 7), (8, 8), (8, 16), (3, 5), (40, 31)])
@pytest.mark.parametrize("size", [(8, 8), (8, 16), (12, 6)])
def test_any_size_comes_out_and_flat_frames_stay_flat(name, shape, size):
    frames = np.full((2, *shape, 3), 77, np.uint8)
    found = RESIZERS[name](frames, size)
    assert found.shape == (2, *size, 3) and found.dtype == np.uint8 and (found == 77).all()


@pytest.mark.parametrize("name", sorted(RESIZERS.keys() - {"tats-frames"}))
def test_frames_of_the_right_size_stay_as_they_are(name):
    frames = np.random.RandomState(0).randint(0, 256, (2, *SQUARE, 3), np.uint8)
    assert np.array_equal(RESIZERS[name](frames, SQUARE), frames)


@pytest.mark.parametrize("name", sorted(RESIZERS.keys() - {"stretch"}))
def test_the_centre_is_kept(name):
    """A frame twice as wide, whose outer quarters are black and whose middle is bright."""
    frames = np.zeros((1, 16, 32, 3), np.uint8)
    frames[:, :, 8:24] = 200
    found = RESIZERS[name](frames, SQUARE)
    assert found[0, :, 1:-1].min() >= 190
    assert torch.from_numpy(found.astype(np.float32)).mean() > 180
