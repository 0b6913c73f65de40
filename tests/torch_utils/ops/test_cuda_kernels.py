"""The CUDA kernels, run on a CPU with host_shim.h, compared with the literal composition in double precision."""

import contextlib
import json
import os
import random as pyrandom
import subprocess
import sys
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.torch_utils.ops import cuda_host, literal
from torch_utils.ops import backends, spec
from torch_utils.ops.bias_act import activation_funcs, bias_act
from torch_utils.ops.cpu import kernels as cpu_kernels
from torch_utils.ops.cuda import driver as cuda_driver
from torch_utils.ops.cuda import fir_plan
from torch_utils.ops.cuda import kernels as cuda_kernels
from torch_utils.ops.cuda.bias_act import make_divisor
from torch_utils.ops.cuda.fir_plan import Gpu
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from torch_utils.ops.upfirdn2d import upfirdn2d

pytestmark = pytest.mark.skipif(cuda_host.COMPILER is None, reason="needs g++")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Relative to the largest value of the expected result, or to one if that is larger.
TOLERANCES = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

examples = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def normal(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def running(device, dtype, seed=0):
    """Return where the checks below run their kernels: on a GPU as usual, on a CPU under the shim."""
    return on_host(dtype, seed) if device == "cpu" else contextlib.nullcontext()


@contextlib.contextmanager
def on_host(dtype, seed=0):
    """Run kernels on the CPU with tiles and segments that a GPU would rarely choose; bfloat16 with big offsets."""
    dice = pyrandom.Random(seed)

    def any_plan(problem, gpu):
        tiles = list(fir_plan.make_tiles(problem, gpu.shared_bytes))
        return fir_plan.finish(problem, gpu, dice.choice(tiles)) if tiles else None

    gpu = Gpu(num_sms=dice.choice([1, 10000]), shared_bytes=64 * 1024)
    with (
        mock.patch.object(fir_plan, "make_plan", any_plan),
        mock.patch.object(fir_plan, "STEP_ROWS", dice.choice([1, 3, 8])),
        mock.patch.object(cuda_driver, "LARGE", 0 if dtype == torch.bfloat16 else cuda_driver.LARGE),
        cuda_host.on_host(gpu) as host,
    ):
        yield host


def check(found, expected, dtype, context=""):
    """Compare a result with the expected one in double precision; NaN and infinity must be where they are expected."""
    assert found.shape == expected.shape and found.dtype == dtype, context
    found = found.cpu()
    expected = expected.to(dtype).double()  # beyond the largest half, infinity is right
    found = found.double()
    finite = expected.isfinite()
    assert torch.equal(found.isnan(), expected.isnan()), context
    scale = max(expected[finite].abs().max().item(), 1.0) if finite.any() else 1.0
    torch.testing.assert_close(
        found, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] * scale, equal_nan=True, msg=context or None
    )


# ----------------------------------------------------------------------------------------------------------------------
# Cases.


@st.composite
def images(draw, dtype=None):
    """Return a tensor (N, C, H, W) of any size, type and layout, and its seed."""
    seed = draw(st.integers(0, 2**16))
    dtype = dtype or draw(st.sampled_from(DTYPES))
    shape = [draw(st.integers(1, n)) for n in (2, 6, 19, 23)]
    x = normal(seed, *shape).to(dtype)
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    return x, seed


@st.composite
def filters(draw, seed):
    kind = draw(st.sampled_from(["none", "1d", "1d", "1d", "2d", "row", "column"]))
    taps = draw(st.sampled_from([1, 2, 3, 4, 6, 7, 8, 12, 24]))
    shapes = {"1d": [taps], "2d": [min(taps, 12), draw(st.integers(1, 8))], "row": [1, taps], "column": [taps, 1]}
    return None if kind == "none" else normal(seed, *shapes[kind]) * 0.5


def taps_of(f):
    return (1, 1) if f is None else (f.shape[-1], f.shape[0])


@st.composite
def paddings(draw, size, taps, up):
    """Return paddings of an axis that leave at least as many samples as the filter has taps."""
    before = draw(st.integers(-5, 14))
    needed = taps - size * up - before
    return before, draw(st.integers(max(needed, -5), max(needed, -5) + 17))


def quantize(tensor, dtype):
    """Return what the kernels see of an input, in double precision."""
    return None if tensor is None else tensor.to(dtype).double()


@examples
@given(data=st.data())
def test_upfirdn2d(data):
    check_upfirdn2d(data, "cpu")


def check_upfirdn2d(data, device):
    x, seed = data.draw(images())
    f = data.draw(filters(seed + 1))
    up, down = (tuple(data.draw(st.sampled_from([1, 1, 2, 2, 3, 4, 5])) for _ in "xy") for _ in range(2))
    pads = [p for i in (0, 1) for p in data.draw(paddings(x.shape[3 - i], taps_of(f)[i], up[i]))]
    axes = spec.make_axes(x.shape[2:], taps_of(f), up, down, pads)
    flip, gain = data.draw(st.booleans()), data.draw(st.sampled_from([1.0, 4.0, -0.7]))
    with running(device, x.dtype, seed):
        y = cuda_kernels.upfirdn2d(x.to(device), to(device, f), axes, flip, gain)
        check(y, literal.upfirdn2d(x.double(), f, axes, flip, gain), x.dtype)
        assert y.is_contiguous() or y.is_contiguous(memory_format=torch.channels_last)
        assert y.numel() < 2 or x.is_contiguous() or y.is_contiguous(memory_format=torch.channels_last)
        back = axes.transposed()
        dx = cuda_kernels.upfirdn2d(y, to(device, f), back, not flip, gain)
        check(dx, literal.upfirdn2d(y.double().cpu(), f, back, not flip, gain), x.dtype)


def to(device, tensor) -> Any:
    return None if tensor is None else tensor.to(device)


@st.composite
def lrelu_cases(draw):
    x, seed = draw(images())
    fu, fd = draw(filters(seed + 1)), draw(filters(seed + 2))
    up, down = draw(st.sampled_from([1, 2, 2, 3, 4, (1, 2), (4, 1)])), draw(st.sampled_from([1, 2, 2, 3, 4, (2, 1)]))
    up, down = spec.parse_scaling(up), spec.parse_scaling(down)
    taps = [u + d - 1 for u, d in zip(taps_of(fu), taps_of(fd), strict=True)]
    pads = [p for i in (0, 1) for p in draw(paddings(x.shape[3 - i], taps[i], up[i]))]
    first = spec.make_axes(x.shape[2:], taps_of(fu), up, padding=pads)
    second = spec.make_axes(first.out_size, taps_of(fd), down=down)
    gain, slope = draw(st.sampled_from([1.0, 2**0.5, -1.2])), draw(st.sampled_from([0.2, 1.0, 0.0, -0.5, 2.0]))
    clamp = draw(st.sampled_from([-1.0, 0.5, 1e-3]))
    b = normal(seed + 3, x.shape[1]).to(x.dtype) if draw(st.booleans()) else None
    return x, fu, fd, b, first, second, float(up[0] * up[1]), gain, slope, clamp, draw(st.booleans()), seed


@examples
@given(case=lrelu_cases(), write_signs=st.booleans())
def test_filtered_lrelu(case, write_signs):
    check_filtered_lrelu(case, write_signs, "cpu")


def check_filtered_lrelu(case, write_signs, device):
    x, fu, fd, b, first, second, up_gain, gain, slope, clamp, flip, seed = case
    options = (first, second, up_gain, gain, slope, clamp, flip)
    with running(device, x.dtype, seed):
        x_, fu_, fd_, b_ = (to(device, t) for t in (x, fu, fd, b))
        y, signs = cuda_kernels.filtered_lrelu(x_, fu_, fd_, b_, *options, write_signs)
        expected, marks = literal.filtered_lrelu(x.double(), fu, fd, quantize(b, x.dtype), *options, True)
        check(y, expected, x.dtype)
        if not write_signs:
            assert signs.numel() == 0
            return
        # Elements nearly on an edge may fall on either side, others not; those that no output sees may have any sign.
        assert signs.dtype == torch.uint8 and signs.shape == marks.shape
        height, width = ((axis.out_size - 1) * axis.down + axis.taps for axis in (second.y, second.x))
        pairs = zip(literal.unpack(signs.cpu(), width), literal.unpack(marks, width), strict=True)
        negative, clamped = ((found != true)[:, :, :height] for found, true in pairs)
        assert (negative | clamped).double().mean() <= 0.002 + 2 / negative.numel()
        check_signed(y, signs, fd, fu, second.transposed(), first.transposed(), gain * up_gain, slope, not flip)
        v = normal(seed + 4, *x.shape).to(device, x.dtype).contiguous(memory_format=layout_of(x))
        check_signed(v, signs, fu, fd, first, second, gain * up_gain, slope, flip)


def check_signed(v, signs, f1, f2, *options: Any):
    v = v.nan_to_num(0, 0, 0)
    expected = literal.filtered_lrelu_signed(v.double().cpu(), signs.cpu(), f1, f2, *options)
    f1, f2 = to(v.device, f1), to(v.device, f2)
    check(cuda_kernels.filtered_lrelu_signed(v, signs, f1, f2, *options), expected, v.dtype)


def layout_of(x):
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("clamp", [-1.0, 0.5])
@pytest.mark.parametrize("write_signs", [False, True])
def test_not_finite_values_reach_what_they_should(value, clamp, write_signs):
    x, f = normal(0, 1, 2, 20, 22), normal(1, 12).abs()
    x[0, 1, 9, 7] = value
    first = spec.make_axes(x.shape[2:], (12, 12), (2, 2), padding=(9, 8, 9, 8))
    second = spec.make_axes(first.out_size, (12, 12), down=(2, 2))
    options = (f, f, None, first, second, 4.0, 2**0.5, 0.2, clamp, False, write_signs)
    with on_host(x.dtype):
        y, _ = cuda_kernels.filtered_lrelu(x, *options)
        check(y, literal.filtered_lrelu(x.double(), *options)[0], x.dtype)
        y = cuda_kernels.upfirdn2d(x, f, first, False, 1.0)
        check(y, literal.upfirdn2d(x.double(), f, first, False, 1.0), x.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Bias and activation.


@st.composite
def dense_tensors(draw):
    """Return a dense tensor of any rank, with its dimensions in any order in memory, aligned or not; and its seed."""
    seed = draw(st.integers(0, 2**16))
    dtype = draw(st.sampled_from(DTYPES))
    rank = draw(st.integers(1, 5))
    sizes = [draw(st.sampled_from([1, 2, 3, 5, 8, 9, 16])) for _ in range(rank)]
    order = draw(st.permutations(range(rank)))
    start = draw(st.sampled_from([0, 0, 1]))
    memory = normal(seed, int(np.prod(sizes)) + start)[start:].to(dtype)
    base = torch.empty(len(memory) + start, dtype=dtype)[start:].copy_(memory) * 2
    stored = torch.empty(len(memory) + start, dtype=dtype)[start:].copy_(base).view([sizes[i] for i in order])
    return stored.permute([order.index(i) for i in range(rank)]), seed


@examples
@given(data=st.data())
def test_bias_act(data):
    check_bias_act(data, "cpu")


def check_bias_act(data, device):
    x, seed = data.draw(dense_tensors())
    dim = data.draw(st.integers(0, x.ndim - 1))
    act = data.draw(st.sampled_from(list(activation_funcs)))
    b = normal(seed + 1, x.shape[dim]).to(x.dtype) if data.draw(st.booleans()) else None
    options = (dim, act, 0.3, data.draw(st.sampled_from([1.0, 2**0.5, -1.5])), data.draw(st.sampled_from([-1.0, 0.8])))
    dy, ddx = (torch.empty_like(x).copy_(normal(seed + i, *x.shape)) for i in (2, 3))
    wide, wide_b = x.double(), quantize(b, x.dtype)
    on_edge = (literal.bias_act(wide, wide_b, *options[:-1], -1.0).abs() - 0.8).abs() < 1e-5
    x_, b_, dy_, ddx_ = (to(device, t) for t in (x, b, dy, ddx))
    with running(device, x.dtype, seed):
        y = cuda_kernels.bias_act(x_, b_, *options)
        assert y.stride() == torch.empty_like(x).stride()
        check(y, literal.bias_act(wide, wide_b, *options), x.dtype)

        piecewise = act in ("linear", "relu", "lrelu")
        saved, bias = (y, None) if piecewise else (x_, b_)
        dx = cuda_kernels.bias_act_grad(dy_, saved, bias, *options)
        wide_saved, wide_bias = (y.double().cpu(), None) if piecewise else (wide, wide_b)
        expected = literal.bias_act_grad(dy.double(), wide_saved, wide_bias, *options)
        check(dx.cpu().masked_fill(on_edge, 0), expected.masked_fill(on_edge, 0), x.dtype)
        if not piecewise:
            d2x = cuda_kernels.bias_act_grad2(ddx_, dy_, x_, b_, *options)
            expected = literal.bias_act_grad2(ddx.double(), dy.double(), wide, wide_b, *options)
            check(d2x.cpu().masked_fill(on_edge, 0), expected.masked_fill(on_edge, 0), x.dtype)


@pytest.mark.parametrize("act", activation_funcs)
def test_extreme_values_go_through_activations_as_through_pytorch(act):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 90.0, -90.0, 1e-20, 3e38])
    with on_host(x.dtype):
        for clamp in (-1.0, 2.0):
            y = cuda_kernels.bias_act(x, None, 0, act, 0.2, 1.0, clamp)
            torch.testing.assert_close(
                y, literal.bias_act(x, None, 0, act, 0.2, 1.0, clamp), rtol=1e-6, atol=0, equal_nan=True
            )


def test_division_by_multiplication_is_exact():
    rng = np.random.default_rng(0)
    for large, limit in ((False, 2**31), (True, 2**48)):
        values = {2, 3, 7, 641, limit // 2 + 1, limit - 1, *(int(limit ** rng.random()) + 2 for _ in range(2000))}
        for value in values:
            divisor = make_divisor(value, large)
            word = 64 if large else 32
            assert divisor.multiplier < 2**word
            multiples = [value * int(q) + d for q in (1, (limit - 1) // value) for d in (-1, 0)]
            for n in (*multiples, *(int(rng.integers(limit)) for _ in range(5)), limit - 1, 0):
                if 0 <= n < limit:
                    assert (n * divisor.multiplier) >> (word + divisor.shift) == n // value


# ----------------------------------------------------------------------------------------------------------------------
# More elements than 31 bits can count: only the last blocks run, and only the memory they touch is ever there.

LARGE = 2**31 + 2**20


@pytest.fixture
def last_blocks():
    with cuda_host.on_host(Gpu(num_sms=10**6, shared_bytes=64 * 1024)) as host:
        host.blocks = lambda count: range(max(count - 700, 0), count)  # two segments of the filters
        yield host


def test_bias_act_of_a_huge_tensor(last_blocks):
    x = torch.empty(LARGE // 8 + 3, 8, dtype=torch.float16)
    b, tail = normal(0, 8).half(), slice(-500, None)
    x[-5000:] = normal(1, 5000, 8).half()
    y = cuda_kernels.bias_act(x, b, 1, "lrelu", 0.2, 2.0, 1.0)
    check(y[tail], literal.bias_act(x[tail].double(), b.double(), 1, "lrelu", 0.2, 2.0, 1.0), x.dtype)
    assert dict(last_blocks.kernels[0].constants)["INDEX_64"] == 1


def test_filters_of_a_huge_tensor(last_blocks):
    height, width, tail = 30000, LARGE // 30000, (slice(None), slice(None), slice(-9, None), slice(-30, None))
    f = normal(0, 12)
    x = torch.empty(1, 1, height, width, dtype=torch.bfloat16)
    x[:, :, -80:, -400:] = normal(1, 80, 400).bfloat16()
    y = cuda_kernels.upfirdn2d(x, f, spec.make_axes((height, width), (12, 12), padding=(6, 5, 6, 5)), False, 1.0)
    end = x[:, :, -60:, -60:].double()
    expected = literal.upfirdn2d(end, f, spec.make_axes((60, 60), (12, 12), padding=(6, 5, 6, 5)), False, 1.0)
    check(y[tail], expected[tail], x.dtype)
    assert dict(last_blocks.kernels[0].constants)["INDEX_64"] == 1


# ----------------------------------------------------------------------------------------------------------------------
# Stored numbers of the published code, through the registered operators and their derivatives.

GOLDEN = json.loads((cuda_host.HERE.parents[1] / "golden" / "ops.json").read_text())


@pytest.fixture
def registered_on_host(monkeypatch):
    """Make the CUDA kernels on the host the operators' CPU implementations."""
    backends._load.cache_clear()
    for name in ("bias_act", "bias_act_grad", "bias_act_grad2", "upfirdn2d", "filtered_lrelu", "filtered_lrelu_signed"):
        monkeypatch.setattr(cpu_kernels, name, getattr(cuda_kernels, name), raising=False)
    monkeypatch.setattr(cpu_kernels, "load", lambda: None)
    monkeypatch.setattr(cpu_kernels, "supports", cuda_kernels.supports)
    with cuda_host.on_host() as host:
        yield host
    backends._load.cache_clear()


@pytest.mark.parametrize("name", ["upfirdn2d", "bias_act", "filtered_lrelu"])
def test_golden(name, registered_on_host):
    from tests.torch_utils.ops import test_golden

    for index in range(len(GOLDEN[name])):
        getattr(test_golden, f"test_{name}")(index, "cpu")
    assert registered_on_host.kernels


@pytest.mark.filterwarnings("ignore:Input #:UserWarning")
def test_derivatives_by_finite_differences_in_single_precision(registered_on_host):
    check_derivatives("cpu")


def check_derivatives(device):
    """gradcheck and gradgradcheck; steps are wide because single precision is all that the kernels have."""
    x, b, f = normal(0, 1, 2, 3, 4), normal(1, 2), normal(2, 4) * 0.5
    inputs = [t.to(device).requires_grad_() for t in (x, b)]
    f = f.to(device)

    def smooth(x, b):
        return bias_act(x, b, act="swish", impl=device)

    def resampled(x, b):
        return upfirdn2d(x * b[:, None, None], f, up=(2, 1), down=(1, 2), padding=(3, 2, 2, -1), impl=device)

    def layer(x, b):
        # Without the kink, which differences would step over; tests against the reference cover it.
        return filtered_lrelu(x, f, f, b, 2, 2, 3, slope=1.0, impl=device)

    for function in (smooth, resampled, layer):
        assert torch.autograd.gradcheck(function, inputs, eps=1e-2, atol=2e-2, rtol=1e-2, nondet_tol=1e-5)
        assert torch.autograd.gradgradcheck(function, inputs, eps=1e-2, atol=2e-2, rtol=1e-2, nondet_tol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_under_sanitizers():
    """Random cases once more, with every access checked: out of shared memory, registers, tensors, or undefined."""
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    script = f"""
import sys
sys.path.insert(0, {str(cuda_host.HERE.parents[2])!r})
from unittest import mock
from tests.torch_utils.ops import cuda_host, test_cuda_kernels as tests
with mock.patch.object(cuda_host, "FLAGS", cuda_host.SANITIZERS):
    for test in (tests.test_upfirdn2d, tests.test_filtered_lrelu, tests.test_bias_act):
        test()
        print(test.__name__)
"""
    environment = {
        **os.environ,
        "LD_PRELOAD": library.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split() == ["test_upfirdn2d", "test_filtered_lrelu", "test_bias_act"]
