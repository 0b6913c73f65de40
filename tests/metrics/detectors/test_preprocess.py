"""Pixels are resized and scaled as published."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics.detectors import preprocess


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_tf1_resizing_interpolates_between_the_pixels_around_i_in_over_out(height: int, width: int, h: int, w: int):
    image = torch.rand(1, 1, height, width, generator=torch.Generator().manual_seed(height * 13 + width))
    found = preprocess.stretch_as_tf1(image, h, w)
    for row in range(h):
        for column in range(w):
            y, x = row * height / h, column * width / w
            expected = 0.0
            for j, wy in ((math.floor(y), 1 - y % 1), (math.floor(y) + 1, y % 1)):
                for i, wx in ((math.floor(x), 1 - x % 1), (math.floor(x) + 1, x % 1)):
                    expected += wy * wx * float(image[0, 0, min(j, height - 1), min(i, width - 1)])
            assert found[0, 0, row, column] == pytest.approx(expected, abs=1e-5)


def test_tf1_resizing_has_no_half_pixel_shift():
    ramp = torch.tensor([[0, 100]], dtype=torch.uint8).expand(1, 1, 2, 2)
    assert preprocess.stretch_as_tf1(ramp, 2, 4)[0, 0, 0].tolist() == [0, 50, 100, 100]
    assert preprocess.stretch(ramp, 2, 4)[0, 0, 0].tolist() == [0, 25, 75, 100]


def test_work_is_exact_inside_and_settings_are_as_before_outside():
    torch.set_float32_matmul_precision("medium")
    seen = []

    def run(part: torch.Tensor) -> torch.Tensor:
        seen.append((len(part), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return part + 1

    try:
        found = preprocess.in_batches(run, torch.arange(5.0), 2, torch.device("cpu"))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert found.tolist() == [1, 2, 3, 4, 5]
    assert seen == [(2, "highest", False), (2, "highest", False), (1, "highest", False)]
