"""FIR resampling by small banded matrices, one per axis: a fast implementation for CPUs without a compiler.

Zero insertion, padding, filtering and decimation of one axis form a banded matrix (its rows are shifted copies of one
phase of the filter). It is divided into dense blocks of rows, each multiplied with the slice of the input that it
uses, so the cost is linear in the length of the axis. Images are processed in chunks that fit into a cache.

A matrix block also multiplies zeros, which would spread NaN and infinity to pixels outside the support of the filter; a
result that is not finite is therefore computed again by the reference implementation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from torch_utils.ops import reference, spec

# Rows of a block. Larger blocks multiply mostly zeros; on long axes the overhead of calls is larger than that.
BLOCK_SIZE = 32
LONG_AXIS = 2048
LONG_AXIS_BLOCK_SIZE = 128

# Bytes of the largest tensor of a chunk of images: it fits into a cache, and malloc reuses its memory, so that no
# intermediate needs newly mapped pages.
CHUNK_BYTES = 1 << 21


@dataclass(frozen=True)
class Block:
    """A dense block (rows, columns) of a banded matrix, and the slices of outputs and inputs that it connects."""

    outputs: slice
    inputs: slice
    matrix: torch.Tensor
    matrix_t: torch.Tensor


class AxisPlan:
    """One axis with its filter: `taps` are float64, in correlation order, with the gain included."""

    def __init__(self, axis: spec.Axis, taps: np.ndarray):
        self.axis = axis
        self.taps = taps
        self.is_identity = axis.is_identity and taps[0] == 1
        self._blocks: dict[tuple[torch.dtype, torch.device], list[Block]] = {}

    @functools.cached_property
    def transposed(self) -> AxisPlan:
        """Return the plan of the transposed operator."""
        return AxisPlan(self.axis.transposed(), self.taps[::-1])

    def blocks(self, dtype: torch.dtype, device: torch.device) -> list[Block]:
        """Return the (cached) blocks of the matrix."""
        key = (dtype, device)
        if key not in self._blocks:
            block_size = BLOCK_SIZE if self.axis.out_size <= LONG_AXIS else LONG_AXIS_BLOCK_SIZE
            num_blocks = math.ceil(self.axis.out_size / block_size)
            edges = [self.axis.out_size * i // num_blocks for i in range(num_blocks + 1)]
            pairs = zip(edges[:-1], edges[1:], strict=True)
            self._blocks[key] = [self._make_block(start, stop, dtype, device) for start, stop in pairs]
        return self._blocks[key]

    def _make_block(self, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Block:
        # Tap t of output o multiplies the padded sample o * down + t, which is input i if that equals i * up + pad0.
        axis = self.axis
        first = max(-((axis.pad0 - start * axis.down) // axis.up), 0)
        last = min(((stop - 1) * axis.down + axis.taps - 1 - axis.pad0) // axis.up, axis.size - 1)
        inputs = slice(first, last + 1) if first <= last else slice(0, 0)
        tap = np.arange(inputs.start, inputs.stop) * axis.up + axis.pad0
        tap = tap - np.arange(start, stop)[:, None] * axis.down  # (outputs, inputs)
        inside = (tap >= 0) & (tap < axis.taps)
        values = np.where(inside, self.taps[np.where(inside, tap, 0)], 0.0)
        matrix = torch.from_numpy(values).to(device=device, dtype=dtype)
        return Block(slice(start, stop), inputs, matrix, matrix.t().contiguous())


class Plan:
    """A separable resampling of images: an AxisPlan along y and one along x."""

    def __init__(self, y: AxisPlan, x: AxisPlan):
        self.y = y
        self.x = x

    @functools.cached_property
    def transposed(self) -> Plan:
        """Return the plan of the transposed operator."""
        return Plan(self.y.transposed, self.x.transposed)

    @property
    def out_size(self) -> tuple[int, int]:
        """Return (H, W) of the result."""
        return self.y.axis.out_size, self.x.axis.out_size


# ----------------------------------------------------------------------------------------------------------------------
# Plans are cached by the values of the filter, so that a filter that was changed in place gets a new one.


def make_plan(
    f: torch.Tensor | None,
    in_size: tuple[int, int],
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, int, int, int],
    flip_filter: bool,
    gain: float,
    dtype: torch.dtype,
) -> Plan | None:
    """Return the (cached) plan for a filter, or None if the filter is not separable.

    in_size is (H, W), up and down are (x, y), padding is (x0, x1, y0, y1). A 2-D filter counts as separable if it is
    an outer product up to the rounding errors of its own dtype and of `dtype`, that of the images. A filter on
    another device is copied to the host in every call.
    """
    if f is None:
        return _make_plan(b"", (), 0.0, in_size, up, down, padding, flip_filter, gain)
    tolerance = outer_product_tolerance(f.dtype, dtype)
    values = f.detach().cpu().double().numpy().tobytes()
    return _make_plan(values, tuple(f.shape), tolerance, in_size, up, down, padding, flip_filter, gain)


@functools.lru_cache(maxsize=512)
def _make_plan(
    values: bytes,
    shape: tuple[int, ...],
    tolerance: float,
    in_size: tuple[int, int],
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, int, int, int],
    flip_filter: bool,
    gain: float,
) -> Plan | None:
    pair = split_filter(np.frombuffer(values).reshape(shape) if shape else None, tolerance, flip_filter, gain)
    if pair is None:
        return None
    taps_y, taps_x = pair
    axis_y = spec.Axis(in_size[0], len(taps_y), up[1], down[1], padding[2], padding[3])
    axis_x = spec.Axis(in_size[1], len(taps_x), up[0], down[0], padding[0], padding[1])
    return Plan(AxisPlan(axis_y, taps_y), AxisPlan(axis_x, taps_x))


def outer_product_tolerance(filter_dtype: torch.dtype, dtype: torch.dtype) -> float:
    """Return the allowed deviation of a 2-D filter from an outer product, relative to its largest tap."""
    return 8 * min(torch.finfo(filter_dtype).eps, torch.finfo(dtype).eps)


def split_filter(
    f: np.ndarray | None, tolerance: float, flip_filter: bool, gain: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the taps (y, x) in correlation order, with the gain; None if a 2-D filter is not an outer product."""
    if f is None:
        taps_y = taps_x = np.ones(1)
    elif f.ndim == 1:
        taps_y = taps_x = f.astype(np.float64)
    else:
        # An outer product equals the column times the row through its largest tap, divided by that tap.
        f = f.astype(np.float64)
        row, column = np.unravel_index(np.abs(f).argmax(), f.shape)
        peak = f[row, column]
        taps_y = f[:, column] if f.shape[0] > 1 else np.ones(1)
        taps_x = f[row, :] if f.shape[0] == 1 else f[row, :] / (peak or 1)
        if not np.abs(np.outer(taps_y, taps_x) - f).max() <= tolerance * abs(peak):
            return None
    # The gain is applied along the axis with more taps, so that the other axis of a column or row filter stays the
    # identity.
    if len(taps_x) > len(taps_y):
        taps_x = taps_x * gain
    else:
        taps_y = taps_y * gain
    return (taps_y, taps_x) if flip_filter else (taps_y[::-1], taps_x[::-1])


# ----------------------------------------------------------------------------------------------------------------------
# Resampling a chunk of images, dense (images, H, W, inner): inner is 1 for contiguous tensors, C for channels-last.

Resample = Callable[[torch.Tensor, Plan], torch.Tensor]


def _resample_fast(x: torch.Tensor, plan: Plan) -> torch.Tensor:
    # Products along x are slower, so they are done when there are fewer rows.
    x_first = plan.y.axis.size <= plan.y.axis.out_size
    steps = [(2, plan.x), (1, plan.y)] if x_first else [(1, plan.y), (2, plan.x)]
    steps = [(dim, axis_plan) for dim, axis_plan in steps if not axis_plan.is_identity]
    for dim, axis_plan in steps:
        x = _multiply(x, axis_plan, dim)
    return x if steps else x.clone()


def _multiply(x: torch.Tensor, plan: AxisPlan, dim: int) -> torch.Tensor:
    blocks = plan.blocks(x.dtype, x.device)
    shape = list(x.shape)
    shape[dim] = plan.axis.out_size
    out = x.new_empty(shape)
    outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
    if inner == 1:
        source, target = x.view(outer, -1), out.view(outer, -1)
        for block in blocks:
            torch.mm(source[:, block.inputs], block.matrix_t, out=target[:, block.outputs])
    else:
        source, target = x.view(outer, -1, inner), out.view(outer, -1, inner)
        for block in blocks:
            matrix = block.matrix.expand(outer, -1, -1)
            torch.bmm(matrix, source[:, block.inputs], out=target[:, block.outputs])
    return out


def _resample_literal(x: torch.Tensor, plan: Plan) -> torch.Tensor:
    y, x_ = plan.y.axis, plan.x.axis
    kernels = [torch.from_numpy(plan.x.taps.copy())[None, :], torch.from_numpy(plan.y.taps.copy())[:, None]]
    padding = (x_.pad0, x_.pad1, y.pad0, y.pad1)
    planes = x.permute(0, 3, 1, 2).reshape(1, -1, *x.shape[1:3])  # (1, images * inner, H, W)
    planes = reference.resample(planes, kernels, (x_.up, y.up), (x_.down, y.down), padding)
    return planes.reshape(x.shape[0], x.shape[3], *plan.out_size).permute(0, 2, 3, 1)


def _map_chunks(
    chunk_func: Callable[..., torch.Tensor], tensors: list[torch.Tensor], out_size: tuple[int, int], widest: int
) -> torch.Tensor:
    """Apply chunk_func(*chunks, resample) to chunks of images of (N, C, H, W) tensors of one dtype.

    `widest` is the number of elements of the largest intermediate of one channel of one image.
    Return (N, C, *out_size).
    """
    first = tensors[0]
    batch_size, num_channels = first.shape[:2]
    channels_last = first.is_contiguous(memory_format=torch.channels_last) and not first.is_contiguous()
    if channels_last:
        images = [t.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1) for t in tensors]
    else:
        images = [t.contiguous().view(batch_size * num_channels, *t.shape[2:], 1) for t in tensors]
    num_images, inner = images[0].shape[0], images[0].shape[3]
    dtype = torch.float32 if first.dtype in (torch.float16, torch.bfloat16) else first.dtype
    chunk_size = max(CHUNK_BYTES // (widest * inner * dtype.itemsize), 1) if first.device.type == "cpu" else num_images
    out = first.new_empty([num_images, *out_size, inner])
    for resample in (_resample_fast, _resample_literal):
        for start in range(0, num_images, chunk_size):
            chunks = [t[start : start + chunk_size].to(dtype) for t in images]
            out[start : start + chunk_size] = chunk_func(*chunks, resample)
        if out.sum(dtype=dtype).isfinite():
            break
    return out.permute(0, 3, 1, 2) if channels_last else out.view(batch_size, num_channels, *out_size)


# ----------------------------------------------------------------------------------------------------------------------
# Autograd. The derivatives are again functions of this section, so every order exists; filters have no gradient.


def upfirdn2d(x: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Resample x (N, C, H, W) by a plan for its size; return (N, C, *plan.out_size)."""
    return _Upfirdn2d.apply(x, plan)  # pyright: ignore[reportReturnType]


class _Upfirdn2d(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor, plan: Plan) -> torch.Tensor:
        widest = max(math.prod(x.shape[2:]), math.prod(plan.out_size))
        return _map_chunks(lambda chunk, resample: resample(chunk, plan), [x], plan.out_size, widest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        ctx.plan = inputs[1]

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, None]:
        return _Upfirdn2d.apply(dy, ctx.plan.transposed), None


@dataclass(frozen=True)
class Nonlinearity:
    """Leaky ReLU of `slope`, times `gain`, clamped to +-`clamp` unless that is None."""

    gain: float
    slope: float
    clamp: float | None

    def apply_(self, u: torch.Tensor) -> torch.Tensor:
        """Apply the nonlinearity to u in place."""
        if self.slope != 1:
            F.leaky_relu_(u, self.slope)
        if self.gain != 1:
            u.mul_(self.gain)
        return u if self.clamp is None else u.clamp_(-self.clamp, self.clamp)

    def scale_(self, v: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Return v times the derivative at u; v and u may be overwritten."""
        if self.slope != 1:
            v = torch.where(u > 0, v, v * self.slope)
            F.leaky_relu_(u, self.slope)
        if self.gain != 1:
            v.mul_(self.gain)
        return v if self.clamp is None else v.masked_fill_(u.mul_(self.gain).abs_() > self.clamp, 0)


def filtered_lrelu(x: torch.Tensor, up: Plan, down: Plan, nonlinearity: Nonlinearity) -> torch.Tensor:
    """Resample x (N, C, H, W) by `up`, apply the nonlinearity, resample by `down`.

    Only x is saved for the gradient: the large intermediate is computed again, chunk by chunk.
    """
    return _FilteredLrelu.apply(x, up, down, nonlinearity)  # pyright: ignore[reportReturnType]


class _FilteredLrelu(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor, up: Plan, down: Plan, nonlinearity: Nonlinearity) -> torch.Tensor:
        def run(chunk: torch.Tensor, resample: Resample) -> torch.Tensor:
            return resample(nonlinearity.apply_(resample(chunk, up)), down)

        return _map_chunks(run, [x], down.out_size, math.prod(up.out_size))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        x, ctx.up, ctx.down, ctx.nonlinearity = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, None, None, None]:
        (x,) = ctx.saved_tensors
        dx = _Linearised.apply(dy, x.detach(), ctx.up, ctx.down, ctx.nonlinearity, True)
        return dx, None, None, None


class _Linearised(torch.autograd.Function):
    """The derivative of filtered_lrelu at x along v, or its transpose; x itself is a constant (piecewise linear)."""

    @staticmethod
    def forward(
        v: torch.Tensor, x: torch.Tensor, up: Plan, down: Plan, nonlinearity: Nonlinearity, transpose: bool
    ) -> torch.Tensor:
        first, second = (down.transposed, up.transposed) if transpose else (up, down)

        def run(v_chunk: torch.Tensor, x_chunk: torch.Tensor, resample: Resample) -> torch.Tensor:
            scaled = nonlinearity.scale_(resample(v_chunk, first), resample(x_chunk, up))
            return resample(scaled, second)

        return _map_chunks(run, [v, x], second.out_size, math.prod(up.out_size))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        _, x, ctx.up, ctx.down, ctx.nonlinearity, ctx.transpose = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, dv: torch.Tensor) -> tuple[Any, None, None, None, None, None]:
        (x,) = ctx.saved_tensors
        dv = _Linearised.apply(dv, x, ctx.up, ctx.down, ctx.nonlinearity, not ctx.transpose)
        return dv, None, None, None, None, None
