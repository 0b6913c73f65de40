"""The filtered leaky ReLU against its literal composition, finite differences and brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_utils.ops import matmul
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from torch_utils.ops.upfirdn2d import setup_filter


def random(seed, *shape, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def oracle(x, fu, fd, b, up, down, padding, gain, slope, clamp, flip_filter):
    """Zero insertion, explicit padding and sums over taps, in numpy, one axis and one tap at a time."""

    def filter_axis(x, f, axis):
        f = np.ones(1) if f is None else (f if flip_filter else f[::-1])
        size = x.shape[axis] - len(f) + 1
        return np.sum([f[k] * np.take(x, range(k, k + size), axis) for k in range(len(f))], axis=0)

    x = x + (0 if b is None else b[None, :, None, None])
    spread = np.zeros([*x.shape[:2], x.shape[2] * up, x.shape[3] * up])
    spread[:, :, ::up, ::up] = x
    x0, x1, y0, y1 = padding
    x = np.pad(spread, [(0, 0), (0, 0), (max(y0, 0), max(y1, 0)), (max(x0, 0), max(x1, 0))])
    x = x[:, :, max(-y0, 0) : x.shape[2] - max(-y1, 0), max(-x0, 0) : x.shape[3] - max(-x1, 0)]
    x = filter_axis(filter_axis(x, fu, 2), fu, 3) * up**2
    x = np.where(x < 0, x * slope, x) * gain
    x = x if clamp is None else np.clip(x, -clamp, clamp)
    return filter_axis(filter_axis(x, fd, 2), fd, 3)[:, :, ::down, ::down]


@st.composite
def cases(draw):
    seed = draw(st.integers(0, 2**16))
    taps_u, taps_d = draw(st.integers(0, 12)), draw(st.integers(0, 12))
    up, down = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    padding = []
    for size in (width, height):
        before = draw(st.integers(-4, 12))
        needed = max(taps_u, 1) + max(taps_d, 1) - 1 - size * up - before
        padding += [before, draw(st.integers(max(needed, -4), max(needed, -4) + 15))]
    options = {
        "up": up,
        "down": down,
        "padding": padding,
        "gain": draw(st.sampled_from([1.0, 2**0.5, 0.3, -1.2])),
        "slope": draw(st.sampled_from([0.2, 1.0, 0.0, -0.5])),
        "clamp": draw(st.sampled_from([None, 0.5, 0.0])),
        "flip_filter": draw(st.booleans()),
    }
    channels = draw(st.integers(1, 3))
    x = random(seed, draw(st.integers(1, 2)), channels, height, width)
    fu = random(seed + 1, taps_u) if taps_u else None
    fd = random(seed + 2, taps_d) if taps_d else None
    return x, fu, fd, random(seed + 3, channels) if draw(st.booleans()) else None, options


@pytest.mark.parametrize("impl", ["ref", "matmul", "cpu"])
@settings(max_examples=120, deadline=None)
@given(case=cases())
def test_equals_oracle(impl, case):
    *tensors, options = case
    y = filtered_lrelu(*tensors, impl=impl, **options)
    expected = oracle(*(None if t is None else t.numpy() for t in tensors), **options)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_derivatives_equal_the_literal_composition(case):
    x, fu, fd, b, options = case
    if options["clamp"] == 0:
        options["clamp"] = 2.0  # at a clamp of zero everything sits on the edge, where the derivative is a choice
    results = []
    for impl in ("ref", "matmul", "cpu"):
        inputs = [t.clone().requires_grad_() for t in (x, b) if t is not None]
        y = filtered_lrelu(inputs[0], fu, fd, inputs[1] if b is not None else None, impl=impl, **options)
        dy = random(9, *y.shape).requires_grad_()
        grads = torch.autograd.grad(y, inputs, dy, create_graph=True)
        results.append([y, *grads, *torch.autograd.grad(grads[0].square().sum(), dy)])
    for ref, *others in zip(*results, strict=True):
        for fast in others:
            torch.testing.assert_close(fast, ref, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("impl", ["ref", "matmul", "cpu"])
@pytest.mark.parametrize("clamp", [None, 0.7])
@pytest.mark.parametrize("gain", [1.3, -0.8])
def test_gradcheck(impl, clamp, gain):
    x, b = random(0, 1, 2, 4, 5).requires_grad_(), random(1, 2).requires_grad_()
    fu, fd = random(2, 6), random(3, 3, 4) if impl == "ref" else random(3, 4)

    def function(x, b):
        return filtered_lrelu(x, fu, fd, b, 2, 2, [4, 3, 2, 5], gain=gain, clamp=clamp, impl=impl)

    assert torch.autograd.gradcheck(function, (x, b))
    assert torch.autograd.gradgradcheck(function, (x, b))


def test_third_order_derivatives_exist():
    x = random(0, 1, 1, 4, 4).requires_grad_()

    def function(impl):
        y = filtered_lrelu(x, random(1, 6), random(2, 4), None, 2, 2, 5, impl=impl)
        for _ in range(3):
            (y,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return y

    torch.testing.assert_close(function("matmul"), function("ref"))
    torch.testing.assert_close(function("cpu"), function("ref"))


@pytest.mark.parametrize("impl", ["matmul", "cpu"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_many_chunks_and_large_values(impl, channels_last):
    x, b = random(0, 3, 40, 90, 70, dtype=torch.float32) * 1e4, random(1, 40, dtype=torch.float32)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    x.requires_grad_()
    fu, fd = setup_filter(np.hanning(14)[1:-1]), setup_filter(np.hanning(8)[1:-1], separable=True)
    results = []
    for kind in ("ref", impl):
        y = filtered_lrelu(x, fu, fd, b, 2, 2, [9, 8, 7, -6], clamp=9e3, impl=kind)
        results.append((y, *torch.autograd.grad(y, x, torch.ones_like(y))))
    (expected, expected_grad), (y, grad) = results
    assert 3 * 40 * 180 * 140 * 4 > 2 * matmul.CHUNK_BYTES
    if channels_last:
        assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=0.05)
    # Elements within a rounding error of a kink may fall on either side of it.
    assert ((grad - expected_grad).abs() > 1e-4).float().mean() < 1e-4


def test_layer_of_the_published_network_keeps_its_size():
    fu, fd = setup_filter(np.hanning(26)[1:-1]), setup_filter(np.hanning(14)[1:-1])
    y = filtered_lrelu(torch.ones(1, 2, 20, 30), fu, fd, None, up=4, down=2, padding=[17, 16, 17, 16], clamp=256)
    assert y.shape == (1, 2, (80 + 33 - 23 - 11 + 1) // 2, (120 + 33 - 23 - 11 + 1) // 2)
    torch.testing.assert_close(y[0, 0, 15:25, 15:25], torch.full([10, 10], 2**0.5), rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("impl", ["ref", "matmul", "cpu"])
def test_half_precision(impl, dtype, tolerance):
    x, f = random(0, 2, 3, 9, 9, dtype=dtype), setup_filter(np.hanning(14)[1:-1])
    y = filtered_lrelu(x, f, f, x[0, :, 0, 0], 2, 2, 10, impl=impl)
    assert y.dtype == dtype
    expected = filtered_lrelu(x.double(), f, f, x[0, :, 0, 0].double(), 2, 2, 10, impl="ref")
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("impl", ["matmul", "cpu"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("clamp", [None, 1.0])
def test_not_finite_values_are_neither_hidden_nor_spread(impl, value, clamp):
    x, f = random(0, 1, 2, 30, 30, dtype=torch.float32), setup_filter(np.hanning(14)[1:-1])
    x[0, 1, 11, 17] = value
    x.requires_grad_()
    y = filtered_lrelu(x, f, f, None, 2, 2, 10, clamp=clamp, impl=impl)
    expected = filtered_lrelu(x, f, f, None, 2, 2, 10, clamp=clamp, impl="ref")
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-4, atol=1e-5)
    assert (~expected.isfinite()).sum() < 200
    if value != value:
        assert y.isnan().any()


@pytest.mark.parametrize("impl", ["ref", "matmul", "cpu"])
def test_input_is_left_alone(impl):
    x = random(0, 1, 1, 4, 4)
    before = x.clone()
    filtered_lrelu(x, impl=impl)
    assert torch.equal(x, before)


def test_malformed_arguments_are_refused():
    x, f = torch.ones(1, 1, 4, 6), torch.ones(6)
    with pytest.raises(ValueError, match="height of the padded input is 10 samples.*11 taps"):
        filtered_lrelu(x, f, f, up=2, padding=[1, 1, 1, 1])
    with pytest.raises(ValueError, match="clamp"):
        filtered_lrelu(x, clamp=-1)
    with pytest.raises(ValueError, match="unknown impl"):
        filtered_lrelu(x, impl="native")
