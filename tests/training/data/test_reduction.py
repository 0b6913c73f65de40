"""Reduction of frames by matrix products, against the exact filter and against Pillow."""

import numpy as np
import pytest
from PIL import Image

from training.data import pictures, reduction

RNG = np.random.RandomState(0)


def noise(height, width):
    return RNG.randint(0, 256, (height, width, 3)).astype(np.uint8)


def extremes(height, width):
    return RNG.randint(0, 2, (height, width, 3)).astype(np.uint8) * 255


def blocks(height, width):
    """Edges of full contrast, at which the filter overshoots most."""
    return extremes(-(-height // 16), -(-width // 16)).repeat(16, 0).repeat(16, 1)[:height, :width].copy()


def exactly(frame, height, width):
    """Return what the filter gives in double precision, float64."""
    matrices = []
    for size, outputs in zip(frame.shape[:2], (height, width), strict=True):
        matrix = np.zeros((outputs, size))
        for output, row in enumerate(matrix):
            first, weights = reduction.taps(size, outputs, output)
            row[first : first + len(weights)] = weights
        matrices.append(matrix)
    return np.einsum("ij,jkc,lk->ilc", matrices[0], frame.astype(float), matrices[1], optimize=True).clip(0, 255)


@pytest.mark.parametrize("make", [noise, extremes, blocks])
@pytest.mark.parametrize("source", [(720, 1280), (240, 426), (201, 333), (150, 150)])
@pytest.mark.parametrize("target", [(36, 64), (144, 256), (7, 5), (149, 150)])
def test_pixels_are_those_of_the_exact_filter(make, source, target):
    if not reduction.suits(*source, *target):
        pytest.skip("enlarged along an edge")
    frame = make(*source)
    found = reduction.reduce(frame, [target])[0]
    assert found.shape == (*target, 3) and found.dtype == np.uint8
    assert np.abs(found - exactly(frame, *target)).max() <= reduction.BOUND


@pytest.mark.parametrize("target", [(36, 64), (144, 256)])
def test_pixels_are_those_of_pillow_but_for_its_rounding_between_passes(target):
    frame = (noise(720, 1280) // 2 + 64).astype(np.uint8)  # in a range in which Pillow clips nothing
    pillow = np.asarray(Image.fromarray(frame).resize(target[::-1], Image.Resampling.LANCZOS)).astype(int)
    difference = np.abs(reduction.reduce(frame, [target])[0] - pillow)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.15


@pytest.mark.parametrize(("size", "outputs"), [(1280, 64), (720, 144), (333, 332), (150, 150), (4000, 3)])
def test_sums_are_exact_in_single_precision(size, outputs):
    """Every sum of products is a whole number below 2^24, so that no order of additions changes it."""
    largest = 255.0
    for bits in (reduction._ROW_BITS, reduction._COLUMN_BITS):
        for _, _, weights in reduction._blocks(size, outputs, bits, 6):
            assert (weights == np.rint(weights)).all() and (weights.sum(1) == 2**bits).all()
            assert np.abs(weights).sum(1).max() * largest < 2**24
        largest = 255 * 1.6 * 2**reduction._BETWEEN_BITS


def test_constant_frames_stay_constant():
    for value in (0, 1, 127, 255):
        assert (reduction.reduce(np.full((200, 300, 3), value, np.uint8), [(36, 64)])[0] == value).all()


def test_frames_are_cropped_and_need_not_be_contiguous():
    frame = noise(300, 400)
    found = pictures.center_crop_and_resize(frame[:, ::-1], 36, 64)
    np.testing.assert_array_equal(found, reduction.reduce(frame[37:262, ::-1].copy(), [(36, 64)])[0])


def test_sizes_made_together_are_those_made_one_by_one():
    """Of several crops, one of which is enlarged, and the frame itself."""
    frame, sizes = noise(180, 320), [(36, 64), (144, 256), (64, 64), (7, 300), (360, 640), (180, 320), (36, 64)]
    for size, found in zip(sizes, pictures.resize_to_each(frame, sizes), strict=True):
        np.testing.assert_array_equal(found, pictures.center_crop_and_resize(frame, *size))
        assert found.shape == (*size, 3)
