"""FIR resampling compared with brute force, SciPy and finite differences, in every implementation."""

import numpy as np
import pytest
import scipy.signal
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_utils.ops import matmul, spec
from torch_utils.ops.upfirdn2d import downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d

IMPLS = ["ref", "matmul", "auto", "cuda"]


def random(seed, *shape, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def oracle(x, f, up=(1, 1), down=(1, 1), padding=(0, 0, 0, 0), flip_filter=False, gain=1.0):
    """Return one output pixel at a time, by the definition, on numpy float64 arrays."""
    batch_size, num_channels, height, width = x.shape
    kernel = np.ones([1, 1]) if f is None else (np.outer(f, f) if f.ndim == 1 else f)
    if not flip_filter:
        kernel = kernel[::-1, ::-1]
    x0, x1, y0, y1 = padding
    padded = np.zeros([batch_size, num_channels, height * up[1] + y0 + y1, width * up[0] + x0 + x1])
    for i in range(height):
        for j in range(width):
            row, column = i * up[1] + y0, j * up[0] + x0
            if 0 <= row < padded.shape[2] and 0 <= column < padded.shape[3]:
                padded[:, :, row, column] = x[:, :, i, j]
    rows = range(0, padded.shape[2] - kernel.shape[0] + 1, down[1])
    columns = range(0, padded.shape[3] - kernel.shape[1] + 1, down[0])
    y = np.zeros([batch_size, num_channels, len(rows), len(columns)])
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            window = padded[:, :, row : row + kernel.shape[0], column : column + kernel.shape[1]]
            y[:, :, i, j] = (window * kernel).sum((2, 3)) * gain
    return y


@st.composite
def cases(draw):
    up, down = (draw(st.tuples(st.integers(1, 4), st.integers(1, 4))) for _ in range(2))
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    kind = draw(st.sampled_from(["none", "1d", "2d", "row", "column", "outer"]))
    taps_x, taps_y = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    seed = draw(st.integers(0, 2**16))
    f = {
        "none": None,
        "1d": random(seed + 1, taps_x),
        "2d": random(seed + 1, taps_y, taps_x),
        "row": random(seed + 1, 1, taps_x),
        "column": random(seed + 1, taps_y, 1),
        "outer": random(seed + 1, taps_y).outer(random(seed + 2, taps_x)),
    }[kind]
    kernel_x, kernel_y = (1, 1) if f is None else (f.shape[-1], f.shape[0])
    padding = []
    for size, factor, taps in ((width, up[0], kernel_x), (height, up[1], kernel_y)):
        before = draw(st.integers(-2 * factor, 6))
        padding += [before, draw(st.integers(max(taps - size * factor - before, -6), 9 + taps + 2 * factor))]
    options = {
        "up": up,
        "down": down,
        "padding": tuple(padding),
        "flip_filter": draw(st.booleans()),
        "gain": draw(st.sampled_from([1.0, 2.5, 0.3, -1.5])),
    }
    return random(seed, draw(st.integers(1, 2)), draw(st.integers(1, 3)), height, width), f, options


@pytest.mark.parametrize("impl", ["ref", "matmul", "cpu"])
@settings(max_examples=120, deadline=None)
@given(case=cases())
def test_equals_oracle(impl, case):
    x, f, options = case
    y = upfirdn2d(x, f, impl=impl, **options)
    expected = oracle(x.numpy(), None if f is None else f.numpy(), **options)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", ["ref", "matmul", "cpu"])
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_gradient_is_the_transpose(impl, case):
    x, f, options = case
    x.requires_grad_()
    y = upfirdn2d(x, f, impl=impl, **options)
    dy = torch.from_numpy(np.random.default_rng(5).standard_normal(y.shape))
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close((dx * x).sum(), (dy * y).sum(), rtol=1e-9, atol=1e-9)
    # A random x alone would not notice a wrong gradient where x is small, so one pixel is pushed as well.
    pixel = torch.zeros_like(x)
    pixel.view(-1)[x.numel() // 2] = 1
    torch.testing.assert_close((dx * pixel).sum(), (dy * upfirdn2d(pixel, f, impl=impl, **options)).sum())


@settings(max_examples=200, deadline=None)
@given(case=cases())
def test_transposed_axis_is_an_involution(case):
    x, f, options = case
    taps = 1 if f is None else f.shape[-1]
    pads = options["padding"][:2]
    axis = spec.Axis(x.shape[3], taps, options["up"][0], options["down"][0], *pads)
    back = axis.transposed().transposed()
    assert axis.transposed().out_size == axis.size
    assert (back.size, back.up, back.down, back.pad0, back.out_size) == (
        axis.size,
        axis.up,
        axis.down,
        axis.pad0,
        axis.out_size,
    )


@pytest.mark.parametrize("impl", ["ref", "matmul", "cpu"])
@pytest.mark.parametrize("up, down", [(1, 1), (2, 1), (3, 2), (2, 5)])
def test_equals_scipy_on_long_axes(impl, up, down):
    x, f = random(0, 1, 2, 5, 700), random(1, 13)
    y = upfirdn2d(x, f[None, :], up=(up, 1), down=(down, 1), padding=(12, 12, 0, 0), impl=impl)
    # SciPy's result has no zeros after the last sample.
    expected = scipy.signal.upfirdn(f.numpy(), x.numpy(), up, down)
    common = min(y.shape[3], expected.shape[3])
    assert common >= expected.shape[3]
    np.testing.assert_allclose(y.numpy()[..., :common], expected[..., :common], atol=1e-12)
    np.testing.assert_allclose(y.numpy()[..., common:], 0, atol=1e-12)


@pytest.mark.parametrize("impl", ["matmul", "cpu"])
@pytest.mark.parametrize("shape", [(2, 3, 150, 130), (40, 8, 70, 20), (1, 64, 900, 1)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_blocks_and_chunks(impl, shape, channels_last):
    x, f = random(0, *shape, dtype=torch.float32), random(1, 12, dtype=torch.float32) / 4
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    options = {"up": (1, 2), "down": (1, 3), "padding": (6, 5, 4, -3)}
    y = upfirdn2d(x, f, impl=impl, **options)
    torch.testing.assert_close(y, upfirdn2d(x, f, impl="ref", **options), rtol=1e-5, atol=1e-5)
    if channels_last:
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("impl", ["matmul", "cpu"])
def test_non_contiguous_input(impl):
    x, f = random(0, 9, 3, 10, 12).transpose(0, 1)[:, ::2, 1:, ::3], random(1, 4)
    torch.testing.assert_close(upfirdn2d(x, f, impl=impl), upfirdn2d(x.contiguous(), f, impl="ref"))


@pytest.mark.parametrize("impl", ["ref", "matmul", "cpu"])
@pytest.mark.parametrize("f_shape", [(5,), (3, 4), (6, 1), None])
def test_gradcheck(impl, f_shape):
    x, f = random(0, 1, 2, 5, 4).requires_grad_(), None if f_shape is None else random(1, *f_shape)

    def function(x):
        return upfirdn2d(x, f, up=(2, 3), down=(3, 2), padding=(3, -1, 4, 2), gain=1.7, impl=impl)

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision(impl, dtype, tolerance):
    x, f = random(0, 2, 3, 9, 9, dtype=dtype), setup_filter(range(1, 9))
    y = upsample2d(x, f, impl=impl)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), upsample2d(x.float(), f, impl="ref"), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", ["matmul", "cpu"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_values_stay_where_they_are(impl, value):
    x, f = random(0, 1, 2, 30, 30, dtype=torch.float32), setup_filter([1, 2, 3, 4, 4, 3, 2, 1])
    x[0, 1, 11, 17] = value
    y = upsample2d(x, f, impl=impl)
    expected = upsample2d(x, f, impl="ref")
    assert 0 < (~expected.isfinite()).sum() < 200
    torch.testing.assert_close(y, expected, equal_nan=True)


@pytest.mark.parametrize("impl", ["matmul", "cpu"])
def test_filter_changes_are_seen(impl):
    x, f = random(0, 1, 1, 8, 8), random(1, 5)
    first = upfirdn2d(x, f, impl=impl)
    with torch.no_grad():
        f.mul_(2)
    torch.testing.assert_close(upfirdn2d(x, f, impl=impl), first * 4)
    f.data.mul_(0.5)
    torch.testing.assert_close(upfirdn2d(x, f, impl=impl), first)
    f.data = f.data.flip(0) * 3
    torch.testing.assert_close(upfirdn2d(x, f, impl=impl, flip_filter=True), first * 9)


def test_equal_filters_share_one_plan():
    x = random(0, 1, 1, 8, 8)
    matmul._make_plan.cache_clear()
    for _ in range(3):
        upfirdn2d(x, torch.arange(6.0), impl="matmul")
    assert matmul._make_plan.cache_info().misses == 1


@pytest.mark.parametrize("impl", ["matmul", "cpu"])
def test_inference_mode_leaves_a_usable_cache(impl):
    x, f = random(7, 1, 1, 23, 8), random(8, 5)
    with torch.inference_mode():
        y = upfirdn2d(x, f, impl=impl)
    x.requires_grad_()
    upfirdn2d(x, f, impl=impl).sum().backward()
    torch.testing.assert_close(y.clone(), upfirdn2d(x, f, impl="ref").detach())
    assert x.grad is not None


@pytest.mark.parametrize("impl", ["matmul", "cpu"])
def test_identity_does_not_alias_its_input(impl):
    x = random(0, 1, 1, 4, 4)
    upfirdn2d(x, None, impl=impl).zero_()
    assert x.abs().sum() > 0


def test_transforms_and_compilation_give_the_eager_gradient():
    x, f = random(0, 3, 1, 6, 6), random(1, 4)

    def loss(x):
        return upfirdn2d(x, f, up=2).square().sum()

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    per_image = torch.func.vmap(torch.func.grad(lambda image: loss(image[None])))(x)
    transformed = torch.func.grad(loss)(x)
    x.requires_grad_()
    (eager,) = torch.autograd.grad(loss(x), x)
    for gradient in (torch.autograd.grad(compiled(x), x)[0], transformed, per_image):
        torch.testing.assert_close(gradient, eager)


@pytest.mark.parametrize("impl", ["ref", "matmul", "cpu"])
def test_too_small_input_is_refused(impl):
    x, f = torch.ones(1, 1, 4, 6), torch.ones(8)
    with pytest.raises(ValueError, match="height of the padded input is 7 samples.*8 taps"):
        upfirdn2d(x, f, padding=[2, 2, 2, 1], impl=impl)
    with pytest.raises(ValueError, match="width of the padded input is -2 samples"):
        upfirdn2d(x, None, padding=[-4, -4, 0, 0], impl=impl)
    assert upfirdn2d(x, f, padding=[1, 1, 2, 2], impl=impl).shape == (1, 1, 1, 1)


def test_malformed_arguments_are_refused():
    x = torch.ones(1, 1, 4, 4)
    with pytest.raises(ValueError, match="unknown impl 'fast'.*auto, ref, matmul, cpu, cuda"):
        upfirdn2d(x, None, impl="fast")
    for scaling in (0, 1.5, [1, 2, 3], "2", [2, 0]):
        with pytest.raises(ValueError, match="scaling factor"):
            upfirdn2d(x, None, up=scaling)  # pyright: ignore[reportArgumentType]
    for padding in ([1, 2, 3], 0.5, [1.0, 1], None):
        with pytest.raises(ValueError, match="padding"):
            upfirdn2d(x, None, padding=padding)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="number, .taps. or"):
        setup_filter(torch.ones(2, 2, 2))
    with pytest.raises(ValueError, match="separable filter must be 1-D"):
        setup_filter(torch.ones(2, 2), separable=True)


@pytest.mark.parametrize("function", [upsample2d, downsample2d, filter2d])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("taps", [1, 4, 7, 8, 12])
def test_wrappers_keep_sizes_and_mean(function, impl, taps):
    x, f = torch.ones(1, 2, 24, 36, dtype=torch.float64), setup_filter(torch.ones(taps).double())
    factor = {"upsample2d": 3, "downsample2d": 1 / 3, "filter2d": 1}[function.__name__]
    y = function(x, f, impl=impl) if factor == 1 else function(x, f, 3, impl=impl)
    assert y.shape == (1, 2, round(24 * factor), round(36 * factor))
    centre = y[0, 0, y.shape[2] // 3 : -y.shape[2] // 3, y.shape[3] // 3 : -y.shape[3] // 3]
    if factor != 3:
        torch.testing.assert_close(centre, torch.ones_like(centre))
    elif taps % 3 == 0:
        torch.testing.assert_close(centre, torch.ones_like(centre), rtol=1e-6, atol=1e-6)


def test_column_filter_on_time_leaves_the_other_axis_alone():
    x, f = random(0, 2, 3, 20, 5), random(1, 6)
    y = upsample2d(x, f[:, None], up=(1, 2), impl="matmul")
    assert y.shape == (2, 3, 40, 5)
    single = upsample2d(x[..., 3:4], f[:, None], up=(1, 2), impl="matmul")
    torch.testing.assert_close(y[..., 3:4], single)


@pytest.mark.parametrize("seed", range(3))
def test_setup_filter(seed):
    values = np.random.default_rng(seed).uniform(0.5, 2, 7 + seed)
    f = setup_filter(values, gain=4)
    assert f.ndim == (1 if seed else 2)
    np.testing.assert_allclose(f.sum(), 2 if seed else 4, rtol=1e-6)
    np.testing.assert_allclose(setup_filter(values, normalize=False, separable=True), values, rtol=1e-6)
    np.testing.assert_allclose(setup_filter(values, flip_filter=True, gain=4), f.flip(list(range(f.ndim))), rtol=1e-6)
    assert setup_filter(None).tolist() == setup_filter(3).tolist() == [[1.0]]
