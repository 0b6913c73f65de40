"""Resampling convolutions compared with their definition, and thin wrappers of PyTorch functions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from torch_utils.ops import conv2d_gradfix, grid_sample_gradfix
from torch_utils.ops.conv2d_resample import conv2d_resample
from torch_utils.ops.fma import fma
from torch_utils.ops.upfirdn2d import setup_filter, upfirdn2d


def random(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def literal(x, w, f, up, down, padding, groups, flip_weight, flip_filter):
    """Up-sample with all the padding, convolve, down-sample: every step as the definition has it."""
    taps_x, taps_y = (1, 1) if f is None else (f.shape[-1], f.shape[0])
    pads = list(padding)
    if up > 1:
        extra = [(t + up - 1) // 2 if i == 0 else (t - up) // 2 for t in (taps_x, taps_y) for i in (0, 1)]
        pads = [p + e for p, e in zip(pads, extra, strict=True)]
    if down > 1:
        extra = [(t - down + 1) // 2 if i == 0 else (t - down) // 2 for t in (taps_x, taps_y) for i in (0, 1)]
        pads = [p + e for p, e in zip(pads, extra, strict=True)]
    x = upfirdn2d(x, f if up > 1 else None, up, 1, pads, flip_filter, up**2, impl="ref")
    x = F.conv2d(x, w if flip_weight else w.flip([2, 3]), groups=groups)
    return upfirdn2d(x, f if down > 1 else None, 1, down, 0, flip_filter, impl="ref")


@st.composite
def cases(draw):
    seed = draw(st.integers(0, 2**16))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (2, 5), (1, 3)]))
    groups = draw(st.sampled_from([1, 2]))
    f = draw(st.sampled_from([None, "2d", "1d", "random"]))
    f = {None: None, "2d": setup_filter([1, 3, 3, 1]), "1d": random(seed + 1, 5), "random": random(seed + 1, 4, 3)}[f]
    options = {
        "up": draw(st.sampled_from([1, 2, 3])),
        "down": draw(st.sampled_from([1, 2, 3])),
        "padding": draw(st.sampled_from([(0, 0, 0, 0), (1, 1, 2, 2), (1, 0, 2, 1), (-1, 2, 1, -1), (2, 2, -1, -1)])),
        "groups": groups,
        "flip_weight": draw(st.booleans()),
        "flip_filter": draw(st.booleans()),
    }
    return random(seed, 2, 4, 11, 12), random(seed + 2, 6, 4 // groups, *kernel), f, options


@settings(max_examples=200, deadline=None)
@given(case=cases())
def test_equals_its_definition(case):
    x, w, f, options = case
    expected = literal(x, w, f, **options)
    y = conv2d_resample(x, w, f, **options)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"up": 2}, {"down": 2}])
@pytest.mark.parametrize("kernel", [1, 3])
def test_gradcheck(options, kernel):
    x, w = random(0, 1, 2, 4, 4).requires_grad_(), random(1, 2, 2, kernel, kernel).requires_grad_()
    f = setup_filter([1, 3, 3, 1]).double()

    def function(x, w):
        return conv2d_resample(x, w, f, padding=kernel // 2, **options)

    assert function(x, w).shape[2:] == (4 * options.get("up", 1) // options.get("down", 1),) * 2
    assert torch.autograd.gradcheck(function, (x, w))
    assert torch.autograd.gradgradcheck(function, (x, w), nondet_tol=1e-12)


def test_convolutions_correlate():
    x, w = random(0, 1, 2, 5, 5), random(1, 3, 2, 3, 3)
    windows = x.unfold(2, 3, 1).unfold(3, 3, 1)
    expected = torch.einsum("nchwij,ocij->nohw", windows, w)
    torch.testing.assert_close(conv2d_gradfix.conv2d(x, w), expected)
    torch.testing.assert_close(conv2d_resample(x, w), expected)
    y = random(2, *expected.shape)
    torch.testing.assert_close((conv2d_gradfix.conv_transpose2d(y, w) * x).sum(), (y * expected).sum())


def test_grid_sample_is_differentiable_twice():
    x, grid = random(0, 1, 1, 4, 4).requires_grad_(), (random(1, 1, 2, 2, 2) * 0.4).requires_grad_()
    assert torch.autograd.gradgradcheck(grid_sample_gradfix.grid_sample, (x, grid))
    # Pixel centres of a 4-wide image lie at -0.75, -0.25, 0.25, 0.75; half a pixel outside, half of it is left.
    corners = torch.tensor([[[[-0.75, -0.75], [0.25, 0.75], [-1.0, 0.25]]]], dtype=torch.float64)
    sampled = grid_sample_gradfix.grid_sample(x, corners)[0, 0, 0]
    torch.testing.assert_close(sampled, torch.stack([x[0, 0, 0, 0], x[0, 0, 3, 2], x[0, 0, 2, 0] / 2]))


def test_fma_broadcasts():
    a, b, c = random(0, 2, 3, 4, 4), random(1, 2, 3, 1, 1), random(2, 2, 1, 4, 4)
    torch.testing.assert_close(fma(a, b, c), a * b + c)
    inputs = [random(3, 2, 2).requires_grad_(), random(4, 2, 1).requires_grad_(), random(5, 2).requires_grad_()]
    assert torch.autograd.gradcheck(fma, inputs) and torch.autograd.gradgradcheck(fma, inputs)
