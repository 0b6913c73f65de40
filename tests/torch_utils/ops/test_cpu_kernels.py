"""The CPU kernels compared with their literal definitions, on random configurations and those of the networks."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.torch_utils.ops import literal
from tests.torch_utils.ops.test_registered import operator_calls
from torch_utils.ops import spec
from torch_utils.ops.bias_act import activation_funcs
from torch_utils.ops.cpu import kernels as cpu_kernels
from torch_utils.ops.spec import Axes

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.fixture(autouse=True, scope="module")
def loaded():
    cpu_kernels.load()


def random(seed, *shape, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def close(found, expected, dtype, scale=None):
    """`expected` was computed in double precision; errors are relative to the largest value that was summed."""
    assert found.dtype == dtype and found.shape == expected.shape
    tolerance = TOLERANCES[dtype]
    bound = tolerance * max(expected.abs().max().item() if expected.numel() else 0.0, scale or 0.0, 1e-30)
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=bound)


@st.composite
def filters(draw, most=9):
    kind = draw(st.sampled_from(["none", "1d", "2d", "row", "column", "outer"]))
    taps_x, taps_y, seed = draw(st.integers(1, most)), draw(st.integers(1, most)), draw(st.integers(0, 2**16))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    f = {
        "none": None,
        "1d": random(seed, taps_x, dtype=dtype),
        "2d": random(seed, taps_y, taps_x, dtype=dtype),
        "row": random(seed, 1, taps_x, dtype=dtype),
        "column": random(seed, taps_y, 1, dtype=dtype),
        "outer": random(seed, taps_y, dtype=dtype).outer(random(seed + 1, taps_x, dtype=dtype)),
    }[kind]
    return f


def size_of(f):
    return (1, 1) if f is None else (f.shape[-1], f.shape[0])


@st.composite
def images(draw, most=20):
    """Any of the dtypes and layouts; the widths around that of a vector and the numbers of images as well."""
    shape = [draw(st.integers(1, 3)), draw(st.integers(1, 19)), draw(st.integers(1, most)), draw(st.integers(1, most))]
    dtype = draw(st.sampled_from(list(TOLERANCES)))
    x = random(draw(st.integers(0, 2**16)), *shape, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if draw(st.booleans()) else x


@st.composite
def padded(draw, size, taps, up):
    """Padding (x0, x1, y0, y1), also negative, that leaves at least one window of samples."""
    pads = []
    for axis in (0, 1):
        before = draw(st.integers(-3 * up[axis], taps[axis] + 5))
        needed = taps[axis] - size[1 - axis] * up[axis] - before
        pads += [before, draw(st.integers(max(needed, -4), max(needed, -4) + 12))]
    return pads


factors = st.tuples(st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=200, deadline=None)
@given(data=st.data(), x=images(), f=filters(), up=factors, down=factors, flip=st.booleans())
def test_upfirdn2d_equals_its_definition(data, x, f, up, down, flip):
    pads = data.draw(padded(x.shape[2:], size_of(f), up))
    gain = data.draw(st.sampled_from([1.0, 2.5, -0.3]))
    axes = spec.make_axes(x.shape[2:], size_of(f), up, down, pads)
    y = cpu_kernels.upfirdn2d(x, f, axes, flip, gain)
    expected = literal.upfirdn2d(x.double(), f, axes, flip, gain)
    close(y, expected, x.dtype, scale=literal.upfirdn2d(x.double().abs(), magnitude(f), axes, flip, abs(gain)).max())
    assert y.stride() == literal.upfirdn2d(x, f, axes, flip, gain).stride()


def magnitude(f):
    return None if f is None else f.abs()


# Factors and taps of the networks, which have code of their own, in both directions and on each axis.
NETWORK_AXES = [(2, 1, 12), (4, 1, 24), (2, 1, 4), (4, 1, 8), (1, 1, 4), (1, 2, 4), (1, 2, 12), (1, 4, 8), (1, 4, 24)]


@settings(max_examples=120, deadline=None)
@given(
    data=st.data(),
    x=images(most=30),
    axis_x=st.sampled_from([*NETWORK_AXES, (1, 1, 1), (1, 3, 5)]),
    axis_y=st.sampled_from([*NETWORK_AXES, (1, 1, 1), (3, 1, 7)]),
)
def test_filters_of_the_networks(data, x, axis_x, axis_y):
    (up_x, down_x, taps_x), (up_y, down_y, taps_y) = axis_x, axis_y
    f = random(taps_x, taps_y, dtype=torch.float32).outer(random(taps_y, taps_x, dtype=torch.float32))
    pads = data.draw(padded(x.shape[2:], (taps_x, taps_y), (up_x, up_y)))
    axes = spec.make_axes(x.shape[2:], (taps_x, taps_y), (up_x, up_y), (down_x, down_y), pads)
    y = cpu_kernels.upfirdn2d(x, f, axes, False, 1.0)
    scale = literal.upfirdn2d(x.double().abs(), f.abs(), axes, False, 1.0).max()
    close(y, literal.upfirdn2d(x.double(), f, axes, False, 1.0), x.dtype, scale=scale)


@st.composite
def activations(draw):
    """up_gain, gain, slope and clamp of a filtered leaky ReLU."""
    gain = draw(st.sampled_from([2**0.5, 1.0, -1.2, 0.0]))
    return 4.0, gain, draw(st.sampled_from([0.2, 1.0, 0.0, -0.5, 1.5])), draw(st.sampled_from([-1.0, 0.7, 0.0]))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), x=images(most=12), options=activations(), flip=st.booleans(), with_bias=st.booleans())
def test_filtered_lrelu_equals_its_definition(data, x, options, flip, with_bias):
    if data.draw(st.booleans()):
        fu, fd, (up, down) = *data.draw(st.tuples(filters(), filters())), data.draw(st.tuples(factors, factors))
    else:
        up, down = ((s, s) for s in data.draw(st.tuples(st.sampled_from([2, 4]), st.sampled_from([1, 2, 4]))))
        fu, fd = (random(s, 6 * s, dtype=torch.float32) / s for s in (up[0], down[0]))
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.to(torch.float32)  # the side that a rounded sum falls on is not defined
    taps = [a + b - 1 for a, b in zip(size_of(fu), size_of(fd), strict=True)]
    pads = data.draw(padded(x.shape[2:], taps, up))
    up_axes = spec.make_axes(x.shape[2:], size_of(fu), up, (1, 1), pads)
    down_axes = spec.make_axes(up_axes.out_size, size_of(fd), (1, 1), down)
    b = random(1, x.shape[1], dtype=x.dtype) if with_bias else None
    axes, wide_b = (up_axes, down_axes), None if b is None else b.double()
    y, signs = cpu_kernels.filtered_lrelu(x, fu, fd, b, *axes, *options, flip=flip, write_signs=True)
    expected, expected_signs = literal.filtered_lrelu(
        x.double(), fu, fd, wide_b, *axes, *options, flip=flip, write_signs=True
    )
    u = literal.upfirdn2d((x + (0 if b is None else b[:, None, None])).double(), fu, up_axes, flip, options[0])
    close(y, expected, x.dtype, scale=10 * u.abs().max().item() * (1 if fd is None else fd.abs().sum().item() ** 2))

    # Sums within a rounding error of a kink may fall on either side of it.
    found, wanted = (literal.unpack(s, up_axes.x.out_size) for s in (signs, expected_signs))
    safe = safely_off_kinks(u, *options[1:], dtype=x.dtype)
    assert torch.equal(found[0] & safe, wanted[0] & safe) and torch.equal(found[1] & safe, wanted[1] & safe)
    without, none = cpu_kernels.filtered_lrelu(x, fu, fd, b, *axes, *options, flip=flip, write_signs=False)
    assert torch.equal(without, y) and none.numel() == 0


@pytest.mark.parametrize("height", range(9, 24))
@pytest.mark.parametrize(("up", "down"), [(3, 2), (2, 2), (1, 2), (1, 3), (3, 4)])
def test_signs_of_rows_that_no_output_needs_are_written(height, up, down):
    """Without a second filter a row between two outputs is needed by neither, which may be the last one of a band."""
    x, f = random(0, 1, 1, height, 5), random(1, 2)  # few planes, which are cut into bands of rows
    up_axes = spec.make_axes(x.shape[2:], (2, 2), (1, up), (1, 1), [1, 1, 1, 0])
    down_axes = spec.make_axes(up_axes.out_size, (1, 1), (1, 1), (1, down))
    arguments = (x, f, None, None, up_axes, down_axes, 1.0, 1.0, 0.2, -1.0)
    _, found = cpu_kernels.filtered_lrelu(*arguments, flip=False, write_signs=True)
    _, expected = literal.filtered_lrelu(*arguments, flip=False, write_signs=True)
    found, expected = (literal.unpack(signs, up_axes.x.out_size) for signs in (found, expected))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def safely_off_kinks(u, gain, slope, clamp, dtype):
    margin = 1e3 * torch.finfo(dtype).eps * u.abs().max()
    v = torch.where(u > 0, u, u * slope) * gain
    return (u.abs() > margin) & ((v.abs() - clamp).abs() > margin)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), v=images(most=12), flip=st.booleans(), slope=st.sampled_from([0.2, 1.0, -0.5]))
def test_signed_equals_its_definition(data, v, flip, slope):
    """The second filter has paddings of its own, as in the transposed direction."""
    if data.draw(st.booleans()):
        f1, f2, (up, down) = *data.draw(st.tuples(filters(), filters())), data.draw(st.tuples(factors, factors))
    else:
        up, down = ((s, s) for s in data.draw(st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([2, 4]))))
        f1, f2 = (random(s, 6 * s, dtype=torch.float32) / s for s in (up[0], down[0]))
    first = spec.make_axes(v.shape[2:], size_of(f1), up, (1, 1), data.draw(padded(v.shape[2:], size_of(f1), up)))
    middle = first.out_size
    second = spec.make_axes(middle, size_of(f2), (1, 1), down, data.draw(padded(middle, size_of(f2), (1, 1))))
    negative, clamped = (random(seed, *v.shape[:2], *middle) > limit for seed, limit in ((1, 0), (2, 1)))
    signs = literal.pack(negative, clamped)
    y = cpu_kernels.filtered_lrelu_signed(v, signs, f1, f2, first, second, 1.3, slope, flip)
    expected = literal.filtered_lrelu_signed(v.double(), signs, f1, f2, first, second, 1.3, slope, flip)
    m = literal.upfirdn2d(v.double().abs(), magnitude(f1), first, flip, 2.0)
    close(y, expected, v.dtype, scale=literal.upfirdn2d(m, magnitude(f2), second, flip, 1.0).max())


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    act=st.sampled_from(list(activation_funcs)),
    dtype=st.sampled_from(list(TOLERANCES)),
    gain=st.sampled_from([1.4, -0.7]),
    clamp=st.sampled_from([-1.0, 0.6]),
)
def test_bias_act_and_its_derivatives(data, shape, act, dtype, gain, clamp):
    order = data.draw(st.permutations(range(len(shape))))
    x = random(0, *shape, dtype=dtype).permute(order) * 2  # dense, in any order of the axes
    dim = data.draw(st.integers(0, len(shape) - 1))
    b = random(1, x.shape[dim], dtype=dtype) if data.draw(st.booleans()) else None
    dy, ddx = (torch.empty_like(x).copy_(random(seed, *x.shape)) for seed in (2, 3))
    options = dim, act, 0.2, gain, clamp
    wide_b = None if b is None else b.double()
    y = cpu_kernels.bias_act(x, b, *options)
    assert y.stride() == x.stride()
    close(y, literal.bias_act(x.double(), wide_b, *options), dtype, scale=3)
    saved, saved_b = (y, None) if act in literal.SLOPES else (x, b)
    dx = cpu_kernels.bias_act_grad(dy, saved, saved_b, *options)
    wide = None if saved_b is None else wide_b
    far = safely_unclamped(saved.double(), wide, *options, dtype)
    close(dx * far, literal.bias_act_grad(dy.double(), saved.double(), wide, *options) * far, dtype, scale=3)
    if act not in literal.SLOPES:
        d2x = cpu_kernels.bias_act_grad2(ddx, dy, x, b, *options)
        expected = literal.bias_act_grad2(ddx.double(), dy.double(), x.double(), wide_b, *options)
        close(d2x * far, expected * far, dtype, scale=5)


def safely_unclamped(saved, b, dim, act, alpha, gain, clamp, dtype):
    """False where rounding decides on which side of the clamp, or of the kink of an exponential, an element is."""
    if act in literal.SLOPES:
        return torch.ones_like(saved, dtype=dtype)
    v = literal.bias_act(saved, b, dim, act, alpha, gain, -1.0)
    u = literal.shifted(saved, b, dim)
    margin = 8 * torch.finfo(dtype).eps
    return (((v.abs() - clamp).abs() > margin) & (u.abs() > margin)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("act", list(activation_funcs))
def test_activations_are_accurate_from_end_to_end(act, dtype):
    large = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 19.9, 20.1, 88, -88, 104, -104, 700, -700, 1e30, -1e30])
    x = torch.cat([torch.linspace(-30, 30, 20001).double(), torch.logspace(-12, 1, 500).double(), large.double()])
    x = torch.cat([x, -x]).to(dtype)
    spec = activation_funcs[act]
    y = cpu_kernels.bias_act(x, None, 0, act, spec.def_alpha, 1.0, -1.0)
    expected = spec.func(x.double(), spec.def_alpha, False)
    torch.testing.assert_close(y.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)


@pytest.mark.parametrize("act", list(activation_funcs))
@pytest.mark.parametrize("clamp", [-1.0, 0.5])
def test_nan_and_infinity_pass_the_activations(act, clamp):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0] * 5)
    y = cpu_kernels.bias_act(x, None, 0, act, 0.2, 1.2, clamp)
    torch.testing.assert_close(y, literal.bias_act(x, None, 0, act, 0.2, 1.2, clamp), equal_nan=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("clamp", [-1.0, 1.0])
@pytest.mark.parametrize("up, taps", [(2, 12), (4, 24), (3, 7)])
def test_not_finite_values_reach_what_they_should_and_no_more(value, clamp, up, taps):
    x, fu, fd = random(0, 1, 9, 24, 30).float(), random(1, taps).float(), random(2, 12).float()
    x[0, 3, 11, 17] = value
    axes = spec.make_axes((24, 30), (taps, taps), (up, up), (1, 1), (9, 8, 9, 8))
    down = spec.make_axes(axes.out_size, (12, 12), (1, 1), (2, 2))
    y = cpu_kernels.upfirdn2d(x, fu, axes, False, 1.0)
    torch.testing.assert_close(y, literal.upfirdn2d(x, fu, axes, False, 1.0), equal_nan=True, rtol=1e-4, atol=1e-4)
    options = axes, down, 4.0, 1.4, 0.2, clamp, False, True
    y, _ = cpu_kernels.filtered_lrelu(x, fu, fd, None, *options)
    expected, _ = literal.filtered_lrelu(x, fu, fd, None, *options)
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-4, atol=1e-3)


def layer(channels=11, size=(40, 66), dtype=torch.float32, batch_size=2):
    """Return a layer of the super-resolution network, wider than a tile of columns."""
    x, b = random(0, batch_size, channels, *size, dtype=dtype), random(1, channels, dtype=dtype)
    fu, fd = random(2, 24).float() / 24, random(3, 12).float() / 12
    up = spec.make_axes(size, (24, 24), (4, 4), (1, 1), (9, 8, 9, 8))
    return x, fu, fd, b, up, spec.make_axes(up.out_size, (12, 12), (1, 1), (2, 2))


def run_everything(tensors, axes):
    """Return results of all kernels on one layer."""
    x, fu, fd, b = tensors
    up, down = axes
    y, signs = cpu_kernels.filtered_lrelu(x, fu, fd, b, up, down, 16.0, 1.4, 0.2, 1.0, False, True)
    back = down.transposed(), up.transposed()
    dx = cpu_kernels.filtered_lrelu_signed(y, signs, fd, fu, *back, 22.4, 0.2, True)
    u = cpu_kernels.upfirdn2d(x, fu, up, False, 4.0)
    column = Axes(spec.Axis(x.shape[3], 1), spec.Axis(x.shape[2], 12, 1, 2, 5, 6))
    d = cpu_kernels.upfirdn2d(x, fd[:, None], column, False, 1.0)
    act = cpu_kernels.bias_act(u, b, 1, "swish", 0.0, 1.4, 1.0)
    return [y, signs, dx, u, d, act, cpu_kernels.bias_act_grad(u, u, b, 1, "swish", 0.0, 1.4, 1.0)]


@pytest.mark.parametrize("channels, batch_size", [(11, 2), (1, 1), (3, 1)])
def test_threads_change_nothing(channels, batch_size):
    *tensors, up, down = layer(channels, batch_size=batch_size)
    results, before = [], torch.get_num_threads()
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            results.append(run_everything(tensors, (up, down)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_instruction_sets_agree(dtype, channels_last):
    *tensors, up, down = layer(dtype=dtype)
    if channels_last:
        tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    results = []
    for name in cpu_kernels.usable_instruction_sets():
        with cpu_kernels.using_instruction_set(name):
            results.append(run_everything(tensors, (up, down)))
    tolerance = 50 * torch.finfo(dtype).eps
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            if a.dtype == torch.uint8:
                assert (a != b).double().mean() < 1e-4
            else:
                assert ((a - b).abs() > tolerance * a.abs().max()).double().mean() < 1e-4


def test_an_instruction_set_that_the_machine_lacks_is_refused():
    with pytest.raises(ValueError, match="unknown instruction set 'mmx': this machine has plain"):
        with cpu_kernels.using_instruction_set("mmx"):
            pass


def test_empty_batches():
    f, axes = random(0, 4), spec.make_axes((6, 6), (4, 4), (2, 2), (1, 1), (2, 1, 2, 1))
    for shape in ((0, 3, 6, 6), (2, 0, 6, 6)):
        assert cpu_kernels.upfirdn2d(torch.ones(shape), f, axes, False, 1.0).shape == (*shape[:2], 12, 12)
        assert cpu_kernels.bias_act(torch.ones(shape), None, 1, "tanh", 0.0, 1.0, -1.0).shape == shape


def test_changed_filters_are_seen():
    x, f = random(0, 1, 1, 8, 8), random(1, 5)
    axes = spec.make_axes((8, 8), (5, 5), padding=(2, 2, 2, 2))
    before = cpu_kernels.upfirdn2d(x, f, axes, False, 1.0)
    f.mul_(2)
    torch.testing.assert_close(cpu_kernels.upfirdn2d(x, f, axes, False, 1.0), 4 * before)


def test_pytorch_accepts_the_kernels():
    for op, arguments in operator_calls():
        torch.library.opcheck(op, arguments)


def test_calls_from_many_threads_at_once():
    x, f = random(0, 9, 7, 20, 20, dtype=torch.float32), random(1, 12, dtype=torch.float32)
    axes = spec.make_axes((20, 20), (12, 12), (2, 2), (1, 1), (6, 5, 6, 5))
    expected, before = cpu_kernels.upfirdn2d(x, f, axes, False, 1.0), torch.get_num_threads()

    def work(_):
        torch.set_num_threads(2)
        return all(torch.equal(cpu_kernels.upfirdn2d(x, f, axes, False, 1.0), expected) for _ in range(10))

    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(8)))
    finally:
        torch.set_num_threads(before)
