"""Wrong units, sizes and rates are reported in one sentence with a remedy."""

import numpy as np
import pytest

from metrics import checks


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.random.RandomState(0).rand(2, 4, 5, 6, 3), r"from .* to 0.9.*save \(x \* 255\).round"),
        (np.random.RandomState(0).rand(2, 4, 5, 6, 3) * 2 - 1, r"save \(x \* 127.5 \+ 128\).clip"),
        (np.full((2, 4, 5, 6, 3), 200.0, np.float32), r"float32 from 200 .*save x.round"),
        (np.zeros((2, 4, 5, 6, 3), np.int64), "holds int64"),
        (np.zeros((2, 3, 4, 5, 6), np.uint8), r"before height and width, so save x.transpose\(0, 2, 3, 4, 1\)"),
        (np.zeros((2, 4, 3, 5, 6), np.uint8), r"save x.transpose\(0, 1, 3, 4, 2\)"),
        (np.zeros((4, 3, 5, 6), np.uint8), r"save x.transpose\(0, 2, 3, 1\)"),
        (np.zeros((2, 4, 5, 6, 1), np.uint8), "are grey, so save x.repeat"),
        (np.zeros((2, 4, 5, 6, 4), np.uint8), r"an alpha channel, so save x\[..., :3\]"),
        (np.zeros((5, 3), np.uint8), r"shape \(5, 3\): make it uint8"),
        (np.zeros((0, 4, 5, 6, 3), np.uint8), "is empty"),
    ],
)
def test_arrays_that_are_no_frames_are_refused(video: np.ndarray, message: str):
    with pytest.raises(ValueError, match=message):
        checks.check_array(video, "a.npz")


@pytest.mark.parametrize("order", [(0, 2, 3, 4, 1), (0, 1, 3, 4, 2)])
def test_the_advice_on_axes_is_right(order: tuple[int, ...]):
    right = np.zeros((2, 4, 5, 6, 3), np.uint8)
    wrong = right.transpose(np.argsort(order))
    with pytest.raises(ValueError, match=str(order).replace("(", r"\(").replace(")", r"\)")):
        checks.check_array(wrong, "a.npz")
    checks.check_array(wrong.transpose(order), "a.npz")


def test_sizes_and_rates_must_agree():
    checks.check_sizes((36, 64), (36, 64), "a", "b")
    with pytest.raises(ValueError, match="height and width of one side are exchanged"):
        checks.check_sizes((36, 64), (64, 36), "a", "b")
    with pytest.raises(ValueError, match="a are 36x64, those of b 72x128: measure at one size"):
        checks.check_sizes((36, 64), (72, 128), "a", "b")
    checks.check_same_rate(30, 29.97, "a", "b")
    checks.check_same_rate(30, None, "a", "b")
    with pytest.raises(ValueError, match="a has 30 frames a second, b 25, .* give --fps=25"):
        checks.check_same_rate(30, 25, "a", "b")
    with pytest.raises(ValueError, match="a has 30 frames per second, but --fps asks for 25"):
        checks.check_rate(30, 25, "a")


def colours(red: float, blue: float, highest: float = 255) -> np.ndarray:
    noise = np.random.RandomState(0).standard_normal((40, 4)) * 5
    return np.array([red, 100, blue, highest]) + noise * [1, 1, 1, 0]


def test_exchanged_colours_and_halved_ranges_are_suspected():
    warning = checks.colour_warning(colours(140, 90), colours(90, 140), "a", "b")
    assert warning and "red and blue seem to be exchanged" in warning
    assert checks.colour_warning(colours(140, 90), colours(120, 95), "a", "b") is None, "another model, not a mistake"
    assert checks.colour_warning(colours(100, 101), colours(101, 100), "a", "b") is None, "no balance to tell by"
    dark = checks.colour_warning(colours(60, 60), colours(30, 30, 127), "a", "b")
    assert dark and "no pixel of b" in dark
    with pytest.raises(ValueError, match="no pixel of a .* above 1, so it was saved from values in"):
        checks.check_range(colours(0, 0, 1), "a")


def test_small_and_repeated_samples_are_said():
    assert checks.size_warning("fvd256_16f", 256, 256) is None
    assert "measured on 255 clips" in str(checks.size_warning("fvd256_16f", 2048, 255))
    assert checks.repeat_warning("a", 9, 9) is None
    assert "only 8 different clips" in str(checks.repeat_warning("a", 8, 9))
