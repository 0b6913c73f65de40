"""upfirdn2d and filtered_lrelu on a GPU: convert the operators' arguments to launches of the kernels in fir.cuh."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_utils.ops.cuda import driver, fir_plan
from torch_utils.ops.cuda.bias_act import bias_act
from torch_utils.ops.cuda.driver import Kernel
from torch_utils.ops.cuda.fir_plan import AxisFilters, Problem
from torch_utils.ops.spec import Axes, Axis

DIRECT_THREADS = 256
DIRECT_MAX_BLOCKS = 2**20


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class StreamParams(ctypes.Structure):
    """`Params` of fir.cuh."""

    _fields_ = [
        *_fields(ctypes.c_void_p, "x y b signs filter_x filter_y second_x second_y"),
        *_fields(ctypes.c_int, "in_h in_w out_h out_w planes channels strips segments segment_rows channel_blocks"),
        *_fields(ctypes.c_int, "first_col first_row row_offset grid_h grid_w sign_row sign_byte"),
        *_fields(ctypes.c_float, "gain_x gain_y second_gain gain slope clamp"),
        ("unused", ctypes.c_int),
    ]


class DirectParams(ctypes.Structure):
    """`Params` of upfirdn2d_direct.cu."""

    _fields_ = [
        *_fields(ctypes.c_void_p, "x y filter"),
        ("size", ctypes.c_int64),
        *_fields(ctypes.c_int, "in_h in_w out_h out_w channels"),
        *_fields(ctypes.c_int, "up_x up_y down_x down_y pad_x pad_y taps_x taps_y"),
        ("gain", ctypes.c_float),
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Tensors.


def is_channels_last(x: Tensor) -> bool:
    """Return whether x (N, C, H, W) is channels-last; a tensor in both orders counts as contiguous."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def new_image(x: Tensor, height: int, width: int) -> Tensor:
    """Return an empty image (N, C, height, width) in the layout of x."""
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty([*x.shape[:2], height, width], dtype=x.dtype, device=x.device, memory_format=layout)


def split_filter(f: Tensor | None) -> tuple[Tensor | None, Tensor | None] | None:
    """Return the filters along x and y of f, or None if it is two-dimensional and possibly not separable."""
    if f is None:
        return None, None
    f = f.to(torch.float32).contiguous()
    if f.ndim == 1:
        return f, f
    if f.shape[1] == 1:
        return None, f
    return (f, None) if f.shape[0] == 1 else None


def pointer(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor's data, None for None."""
    return None if tensor is None else tensor.data_ptr()


def split_gain(gain: float, x_is_plain: bool, y_is_plain: bool) -> tuple[float, float]:
    """Split a gain into factors (x, y) for the axes that have a filter, equal in magnitude if both have one."""
    if x_is_plain == y_is_plain:
        root = math.sqrt(abs(gain))
        return (math.copysign(root, gain), root) if not x_is_plain else (gain, 1.0)
    return (1.0, gain) if x_is_plain else (gain, 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# Launches.


def run_stream(
    source: str, problem: Problem, x: Tensor, y: Tensor, constants: dict[str, int | str], **params: object
) -> bool:
    """Run the kernel of fir.cuh if the filters fit into its registers; return whether it was run."""
    plan = fir_plan.make_plan(problem, driver.gpu_facts(x.device))
    if plan is None:
        return False
    grid = problem.batch * problem.channels * problem.x.grid_size * problem.y.grid_size
    large = max(x.numel(), y.numel(), grid // 4) >= driver.LARGE
    key = (source, x.dtype, large, *constants.items())
    kernel = plan.kernels.get(key)
    if kernel is None:
        tile = tuple(plan.constants.items())
        kernel = plan.kernels[key] = _stream_kernel(key, tile, plan.threads, plan.shared_bytes)
    values = StreamParams(x=x.data_ptr(), y=y.data_ptr(), **plan.fields, **params)
    driver.launch(kernel, plan.num_blocks, values, x.device)
    return True


@functools.cache
def _stream_kernel(key: tuple, tile: tuple, threads: int, shared_bytes: int) -> Kernel:
    source, dtype, large, *constants = key
    types = (("DTYPE", driver.DTYPES[dtype]), ("INDEX_64", int(large)))
    return Kernel(source, "stream", (*types, *constants, *tile), threads, shared_bytes)


@functools.cache
def _direct_kernel(dtype: torch.dtype, channels_last: bool, flip: bool) -> Kernel:
    constants = {
        "DTYPE": driver.DTYPES[dtype],
        "INDEX_64": 1,
        "CHANNELS_LAST": int(channels_last),
        "FLIP": int(flip),
        "THREADS": DIRECT_THREADS,
    }
    return Kernel("upfirdn2d_direct.cu", "direct", tuple(constants.items()), DIRECT_THREADS)


def run_direct(x: Tensor, f: Tensor | None, axes: Axes, flip: bool, gain: float) -> Tensor:
    """Compute upfirdn2d by the kernel for 2-D filters of any size."""
    height, width = axes.y.out_size, axes.x.out_size
    y = new_image(x, height, width)
    params = DirectParams(
        x.data_ptr(), y.data_ptr(), pointer(f), y.numel(), *x.shape[2:], height, width, x.shape[1],
        *(value for name in ("up", "down", "pad0", "taps") for value in (getattr(axes.x, name), getattr(axes.y, name))),
        gain,
    )  # fmt: skip
    num_blocks = min(fir_plan.ceil_div(y.numel(), DIRECT_THREADS), DIRECT_MAX_BLOCKS)
    driver.launch(_direct_kernel(x.dtype, is_channels_last(x), flip), num_blocks, params, x.device)
    return y


# ----------------------------------------------------------------------------------------------------------------------
# Resampling.


def upfirdn2d(x: Tensor, f: Tensor | None, axes: Axes, flip: bool, gain: float) -> Tensor:
    """Compute `ops.upfirdn2d` of x (N, C, H, W), contiguous or channels-last."""
    filters = split_filter(f)
    if filters is not None and filters[0] is None and _is_column(x, axes) and not is_channels_last(x):
        # As a row of the same memory, neighbouring samples are read by neighbouring threads.
        f = None if f is None else f.reshape(1, -1)
        y = upfirdn2d(x.transpose(2, 3).contiguous(), f, Axes(axes.y, axes.x), flip, gain)
        return y.reshape(*x.shape[:2], -1, 1)
    y = new_image(x, axes.y.out_size, axes.x.out_size)
    if y.numel() == 0 or x.numel() == 0:
        return y.zero_()
    if filters is None:
        f = f.to(torch.float32).contiguous()  # pyright: ignore[reportOptionalMemberAccess]
        done = _stream_2d(x, y, f, axes, flip, gain)
    else:
        done = _stream_separable(x, y, *filters, axes, flip, gain)
    if done:
        return y
    if filters is None or None in filters:
        return run_direct(x, f.to(torch.float32).contiguous(), axes, flip, gain)  # pyright: ignore
    taps = filters[0]
    middle = Axes(axes.x, Axis(axes.y.size, 1))
    rows = run_direct(x.float(), taps, middle, flip, gain)
    return run_direct(rows, taps, Axes(Axis(axes.x.out_size, 1), axes.y), flip, 1.0).to(x.dtype)


def _is_column(x: Tensor, axes: Axes) -> bool:
    return x.shape[3] == 1 and axes.x.is_identity and axes.y.size > 1


def _base_problem(x: Tensor, axis_x: AxisFilters, axis_y: AxisFilters, **options: Any) -> Problem:
    batch, channels = x.shape[:2]
    return Problem(axis_x, axis_y, batch, channels, is_channels_last(x), x.element_size(), **options)


def _first(axis: Axis, plain: bool, step: int = 1, down: int = 1) -> AxisFilters:
    """Return one axis of upfirdn2d as the first filter of a stream, followed by decimation."""
    return AxisFilters(axis.size, axis.out_size, axis.up, axis.taps, axis.pad0, step, down, plain=plain)


def _second(axis: Axis) -> AxisFilters:
    """Return one axis of upfirdn2d as the second filter, which is cheaper: it keeps sums for a few outputs only."""
    return AxisFilters(
        axis.size, axis.out_size, offset=axis.pad0, down=axis.down, taps2=axis.taps, plain=True, second=True
    )


def _stream_2d(x: Tensor, y: Tensor, f: Tensor, axes: Axes, flip: bool, gain: float) -> bool:
    axis_x, axis_y = _first(axes.x, False, step=axes.x.down), _first(axes.y, False, down=axes.y.down)
    problem = _base_problem(x, axis_x, axis_y, filter_2d=True)
    constants: dict[str, int | str] = {"FLIP": int(flip), "BIAS": 0}
    return run_stream("upfirdn2d.cu", problem, x, y, constants, filter_x=pointer(f), gain_x=gain)


def _stream_separable(
    x: Tensor, y: Tensor, fx: Tensor | None, fy: Tensor | None, axes: Axes, flip: bool, gain: float
) -> bool:
    x_is_plain = fx is None and axes.x.up == 1
    y_is_plain = fy is None and axes.y.up == 1
    gain_x, gain_y = split_gain(gain, x_is_plain, y_is_plain)
    axis_x = _first(axes.x, x_is_plain and gain_x == 1, step=axes.x.down)
    if axes.y.up == 1 and axes.y.down > 1:
        axis_y = _second(axes.y)
        params = {"second_y": pointer(fy), "second_gain": gain_y, "gain_y": 1.0}
    else:
        axis_y = _first(axes.y, y_is_plain, down=axes.y.down)
        params = {"filter_y": pointer(fy), "gain_y": gain_y}
    shared = fx is not None and fx is fy and gain_x == gain_y and not axis_y.second
    problem = _base_problem(x, axis_x, axis_y, shared_taps=shared)
    constants: dict[str, int | str] = {"FLIP": int(flip), "BIAS": 0}
    return run_stream("upfirdn2d.cu", problem, x, y, constants, filter_x=pointer(fx), gain_x=gain_x, **params)


# ----------------------------------------------------------------------------------------------------------------------
# Filtered leaky ReLU.


def filtered_lrelu(
    x: Tensor,
    fu: Tensor | None,
    fd: Tensor | None,
    b: Tensor | None,
    up: Axes,
    down: Axes,
    up_gain: float,
    gain: float,
    slope: float,
    clamp: float,
    flip: bool,
    write_signs: bool,
) -> tuple[Tensor, Tensor]:
    """Compute `registered.filtered_lrelu` of x (N, C, H, W), contiguous or channels-last; return result and signs."""
    mid_h, mid_w = up.y.out_size, up.x.out_size
    signs = x.new_empty([0], dtype=torch.uint8)
    if fu is fd is None and all(axis.is_identity for axis in (*up, *down)) and not write_signs and up_gain == 1:
        return bias_act(x, b, 1, "lrelu", slope, gain, clamp), signs
    y = new_image(x, down.y.out_size, down.x.out_size)
    if write_signs:
        # Elements at the end that decimation leaves out belong to no output, and the kernel does not write them.
        left_over = any((axis.padded_size - axis.taps) % axis.down for axis in down)
        make = torch.zeros if left_over else torch.empty
        signs = make([*x.shape[:2], mid_h, (mid_w + 3) // 4], dtype=torch.uint8, device=x.device)
    if y.numel() == 0:
        return y, signs
    folded = gain if gain > 0 else 1.0  # a positive gain commutes with the leaky ReLU and is included in the filter
    constants: dict[str, int | str] = {
        "FLIP": int(flip),
        "BIAS": int(b is not None),
        "MODE": "LRELU_MARKED" if write_signs else "LRELU",
        "CLAMP": int(clamp >= 0),
        "SCALE": int(folded != gain),
        "CONVEX": int(0 < slope <= 1),
        "SHIFT": 0,
    }
    params = {"b": pointer(b), "signs": pointer(signs), "gain": gain, "slope": slope, "clamp": clamp}
    if _stream_fused(x, y, fu, fd, up, down, up_gain * folded, constants, params, int(write_signs)):
        return y, signs
    x = x.float() if b is None else x.float() + b.float()[:, None, None]
    u = upfirdn2d(x, fu, up, flip, up_gain)
    v = F.leaky_relu(u, slope) * gain
    if write_signs:
        signs = pack_signs(~(u > 0), (v.abs() > clamp) if clamp >= 0 else torch.zeros_like(u, dtype=torch.bool))
    if clamp >= 0:
        v = v.clamp(-clamp, clamp)
    return y.copy_(upfirdn2d(v, fd, down, flip, 1.0)), signs


def filtered_lrelu_signed(
    v: Tensor,
    signs: Tensor,
    f1: Tensor | None,
    f2: Tensor | None,
    first: Axes,
    second: Axes,
    gain: float,
    slope: float,
    flip: bool,
) -> Tensor:
    """Compute `filtered_lrelu_signed` of v (N, C, H, W), contiguous or channels-last, and contiguous signs."""
    y = new_image(v, second.y.out_size, second.x.out_size)
    if y.numel() == 0:
        return y
    constants: dict[str, int | str] = {
        "FLIP": int(flip),
        "BIAS": 0,
        "MODE": "SIGNED",
        "CLAMP": 0,
        "SCALE": 0,
        "CONVEX": 0,
        "SHIFT": -second.x.pad0 % 4,
    }
    params = {"signs": pointer(signs), "slope": slope}
    if _stream_fused(v, y, f1, f2, first, second, gain, constants, params, 2):
        return y
    m = upfirdn2d(v.float(), f1, first, flip, gain)
    negative, clamped = unpack_signs(signs, first.x.out_size)
    m = torch.where(negative, m * slope, m).masked_fill_(clamped, 0)
    return y.copy_(upfirdn2d(m, f2, second, flip, 1.0))


def pack_signs(negative: Tensor, clamped: Tensor) -> Tensor:
    """Return two bits for each element of (N, C, H, W), four elements per byte, as in `registered`."""
    codes = F.pad(negative.to(torch.uint8) | clamped.to(torch.uint8) << 1, [0, -negative.shape[3] % 4])
    shifts = torch.arange(0, 8, 2, device=codes.device, dtype=torch.uint8)
    return (codes.contiguous().unflatten(3, (-1, 4)) << shifts).sum(4, dtype=torch.uint8)


def unpack_signs(signs: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return (negative, clamped), bool (N, C, H, width), of the output of `pack_signs`."""
    shifts = torch.arange(0, 8, 2, device=signs.device, dtype=torch.uint8)
    codes = (signs.unsqueeze(4) >> shifts).flatten(3)[..., :width]
    return (codes & 1).bool(), (codes & 2).bool()


def _stream_fused(
    x: Tensor,
    y: Tensor,
    f1: Tensor | None,
    f2: Tensor | None,
    first: Axes,
    second: Axes,
    gain: float,
    constants: dict[str, int | str],
    params: dict[str, object],
    marks: int,
) -> bool:
    filters1, filters2 = split_filter(f1), split_filter(f2)
    if filters1 is None or filters2 is None:
        return False
    (f1x, f1y), (f2x, f2y) = filters1, filters2
    x_is_plain = f1x is None and first.x.up == 1
    y_is_plain = f1y is None and first.y.up == 1
    gain_x, gain_y = split_gain(gain, x_is_plain, y_is_plain)
    problem = _base_problem(
        x,
        _pair(first.x, second.x, x_is_plain and gain_x == 1, f2x),
        _pair(first.y, second.y, y_is_plain, f2y),
        shared_taps=f1x is not None and f1x is f1y and gain_x == gain_y,
        shared_taps2=f2x is not None and f2x is f2y,
        marks=marks,
        any_width=True,
    )
    pointers = {
        "filter_x": pointer(f1x),
        "filter_y": pointer(f1y),
        "second_x": pointer(f2x),
        "second_y": pointer(f2y),
    }
    gains = {"gain_x": gain_x, "gain_y": gain_y, "second_gain": 1.0}
    return run_stream("filtered_lrelu.cu", problem, x, y, constants, **pointers, **gains, **params)


def _pair(first: Axis, second: Axis, plain: bool, f2: Tensor | None) -> AxisFilters:
    """Return one axis of a filtered leaky ReLU."""
    return AxisFilters(
        first.size,
        second.out_size,
        first.up,
        first.taps,
        first.pad0 + second.pad0,
        down=second.down,
        taps2=second.taps,
        plain=plain,
        second=f2 is not None or second.down > 1,
        grid_size=first.out_size,
        grid_pad=second.pad0,
    )
