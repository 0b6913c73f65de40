"""Convolutions of 3x3 pixels with fewer multiplications, on CPUs (Lavin and Gray 2016, "Fast Algorithms for CNNs").

A tile of m x m outputs of one channel takes (m + 2)^2 multiplications instead of 9 m^2: 4 times fewer for m = 4. Image
and weights are evaluated at m + 2 points along each axis, multiplied and summed over channels at each of them, and
interpolated:

    Y = A^T [(G w G^T) * (B^T x B)] A

so that a convolution is one matrix product for each point. The gradient of the weight has the same products,
dw = G^T [(A dY A^T) * (B^T x B)] G. Taps along time are summed directly. Tiles are computed in blocks, which bounds the
memory and keeps them in the cache.

The result differs from a direct convolution by rounding: about 2e-6 of its norm, against 3e-7, with the points 0, 1,
-1, 1/2, -2 and infinity; those of the literature, 0, 1, -1, 2, -2, give 3e-6.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from torch_utils import onednn
from torch_utils.ops.cpu import kernels

TAPS = 3
TILES = (2, 3, 4)  # outputs of a tile along one axis
POINTS = tuple(map(Fraction, (0, 1, -1, Fraction(1, 2), -2)))  # of a tile of m outputs the first m + 1, and infinity
BLOCK_BYTES = 24 << 20  # of the points of input and output that are computed together; fits into the last cache


class Matrices(NamedTuple):
    """The maps of one axis for tiles of m outputs: A^T (m, m + 2), G (m + 2, 3) and B^T (m + 2, m + 2)."""

    outputs: Tensor
    weights: Tensor
    inputs: Tensor


@functools.cache
def matrices(tile: int) -> Matrices:
    """Return the maps for tiles of `tile` outputs (Toom and Cook; exact fractions, rounded once)."""
    points = POINTS[: tile + 1]
    zero, one = Fraction(0), Fraction(1)
    outputs = [[p**i for p in points] + [one if i == tile - 1 else zero] for i in range(tile)]
    weights, inputs = [], []
    for p in points:
        others = [q for q in points if q != p]
        scale = one
        for q in others:
            scale *= p - q
        weights.append([p**i / scale for i in range(TAPS)])
        inputs.append([*_from_roots(others), zero])
    weights.append([zero] * (TAPS - 1) + [one])
    inputs.append(_from_roots(points))
    return Matrices(*(torch.tensor([[float(v) for v in row] for row in rows]) for rows in (outputs, weights, inputs)))


def _from_roots(roots: Sequence[Fraction]) -> list[Fraction]:
    """Return the coefficients of the product of (x - root), that of x^0 first."""
    result = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *result]
        result = [high - root * low for high, low in zip(shifted, [*result, Fraction(0)], strict=True)]
    return result


class Plan(NamedTuple):
    """Sizes of a convolution: of the output, of a tile, and how many tiles cover a plane."""

    frames: int
    height: int
    width: int
    tile_y: int
    tile_x: int
    tiles_y: int
    tiles_x: int

    @property
    def num_points(self) -> int:
        """Return the number of points of a tile."""
        return (self.tile_y + TAPS - 1) * (self.tile_x + TAPS - 1)


@functools.lru_cache(maxsize=1024)
def make_plan(size: tuple[int, ...], taps: int, padding: tuple[int, ...]) -> Plan:
    """Return the plan for an input of `size` (T, H, W) and `taps` along time: the tiles with the fewest products."""
    frames = size[0] + 2 * padding[0] - taps + 1
    height, width = (size[axis] + 2 * padding[axis] - TAPS + 1 for axis in (1, 2))
    tile_y, tile_x = (min(TILES, key=lambda m: -(-n // m) * (m + TAPS - 1)) for n in (height, width))
    return Plan(frames, height, width, tile_y, tile_x, -(-height // tile_y), -(-width // tile_x))


class Block(NamedTuple):
    """Images, output frames and rows of tiles that are computed together, as ranges."""

    images: range
    frames: range
    rows: range


def blocks(plan: Plan, batch: int, channels: int, taps: int) -> Iterator[Block]:
    """Divide the output: images together if they are small, else frames, else rows of tiles.

    With more than one tap along time, a block has all frames of one image, since adjacent ones share input frames.
    """
    budget = max(1, BLOCK_BYTES // (4 * plan.num_points * channels))  # tiles
    per_frame = plan.tiles_y * plan.tiles_x
    images = max(1, budget // (plan.frames * per_frame)) if taps == 1 else 1
    frames = max(1, budget // per_frame) if taps == 1 else plan.frames
    rows = max(1, budget // (min(frames, plan.frames) * plan.tiles_x))
    for n in range(0, batch, images):
        for t in range(0, plan.frames, frames):
            for y in range(0, plan.tiles_y, rows):
                yield Block(
                    range(n, min(n + images, batch)),
                    range(t, min(t + frames, plan.frames)),
                    range(y, min(y + rows, plan.tiles_y)),
                )


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "channels", "frames", "height", "width")),
        *((name, ctypes.c_int64) for name in ("tiles_y", "tiles_x", "step_y", "step_x", "pad_y", "pad_x", "overlap")),
        *((name, ctypes.c_int64 * 2) for name in ("image_strides", "point_strides")),
        *((name, ctypes.c_float * 64) for name in ("matrix_y", "matrix_x")),
    ]


@functools.cache
def _factors(tile: int, name: str) -> ctypes.Array[ctypes.c_float]:
    """Return a matrix of a tile as the kernel takes it; "gradient" is the transpose of that of the outputs."""
    matrix = matrices(tile).outputs.t() if name == "gradient" else getattr(matrices(tile), name)
    return (ctypes.c_float * 64)(*matrix.flatten().tolist())


def _tile(
    x: Tensor, points: Sequence[Tensor], plan: Plan, block: Block, name: str, padding: Sequence[int], first: int
) -> None:
    """Evaluate a block of x (N, C, T, H, W) at all points, or for "outputs" write the block of x.

    `points` has a view (C, n, t, tiles) for each point, whose t frames are those of x from `first` on.
    """
    channels, images, frames, _ = points[0].shape
    _, _, total, height, width = x.shape
    plane, (stride_c, stride_n, _, _) = height * width, points[0].stride()
    job = _Job(
        *(images, channels, frames, height, width, len(block.rows), plan.tiles_x, plan.tile_y, plan.tile_x),
        *(padding[1] - block.rows.start * plan.tile_y, padding[2], name == "inputs"),
        (ctypes.c_int64 * 2)(channels * total * plane, total * plane),
        (ctypes.c_int64 * 2)(stride_n, stride_c),
        *(_factors(plan.tile_y, name), _factors(plan.tile_x, name)),
    )
    address = x.data_ptr() + 4 * plane * (block.images.start * channels * total + first)
    pointers = (ctypes.c_void_p * len(points))(*(point.data_ptr() for point in points))
    sides = (None, address) if name == "outputs" else (address, None)
    kernels.library().tiles(ctypes.addressof(job), *sides, pointers, torch.get_num_threads())


def _read_inputs(x: Tensor, plan: Plan, block: Block, taps: int, padding: Sequence[int]) -> Tensor:
    """Return the points of the input frames of a block: (points, C, n, t + taps - 1, tiles)."""
    begin, end = block.frames.start - padding[0], block.frames.stop - padding[0] + taps - 1
    first, last = max(begin, 0), min(end, x.shape[2])
    tiles = len(block.rows) * plan.tiles_x
    points = x.new_empty(plan.num_points, x.shape[1], len(block.images), end - begin, tiles)
    points[:, :, :, : first - begin] = 0
    points[:, :, :, last - begin :] = 0
    inside = points[:, :, :, first - begin : last - begin]
    _tile(x, list(inside), plan, block, "inputs", padding, first)
    return points


def _read_gradient(dy: Tensor, plan: Plan, block: Block, taps: int) -> Tensor:
    """Return the points of dy of a block, delayed by each tap: (points, taps, Co, n, t + taps - 1, tiles)."""
    frames, tiles = len(block.frames), len(block.rows) * plan.tiles_x
    shape = (plan.num_points, taps, dy.shape[1], len(block.images), frames + taps - 1, tiles)
    rows = dy.new_empty(shape) if taps == 1 else dy.new_zeros(shape)
    first = rows[:, 0, :, :, :frames]
    _tile(dy, list(first), plan, block, "gradient", (0, 0, 0), block.frames.start)
    for tap in range(1, taps):
        rows[:, tap, :, :, tap : tap + frames] = first
    return rows


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b by the library that is faster on this processor."""
    return onednn.multiply(a, b.t()) if onednn.is_amd() and onednn.has_onednn() else a @ b


def correlate(x: Tensor, weight: Tensor, padding: tuple[int, int, int]) -> Tensor:
    """Return `conv3d(x, weight, padding=padding)`: x (N, C, T, H, W), weight (Co, C, kt, 3, 3), float32."""
    outputs, inputs, taps = weight.shape[:3]
    x, plan = x.contiguous(), make_plan(tuple(x.shape[2:]), taps, padding)
    map_y, map_x = matrices(plan.tile_y).weights, matrices(plan.tile_x).weights
    kernel = weight.permute(2, 0, 1, 3, 4).reshape(-1, TAPS**2).t()  # 9 kt*Co*C
    kernel = (torch.kron(map_y, map_x) @ kernel).view(-1, taps * outputs, inputs)
    y = x.new_empty(len(x), outputs, plan.frames, plan.height, plan.width)
    for block in blocks(plan, len(x), inputs + outputs, taps):
        _correlate_block(x, kernel, y, plan, block, taps, padding)
    return y


def _correlate_block(
    x: Tensor, kernel: Tensor, y: Tensor, plan: Plan, block: Block, taps: int, padding: tuple[int, int, int]
) -> None:
    """Write a block of y; a function, as the points of a block are freed when it returns and not during the next."""
    columns = _read_inputs(x, plan, block, taps, padding).flatten(2)  # points C n*t*tiles
    outputs, tiles = y.shape[1], len(block.rows) * plan.tiles_x
    length = len(block.images) * len(block.frames) * tiles
    found = []
    for factors, column in zip(kernel, columns, strict=True):
        terms = _multiply(factors, column).view(taps, outputs, -1)
        total = terms[0, :, :length] if taps > 1 else terms[0]
        for tap in range(1, taps):
            total = total + terms[tap, :, tap * tiles : tap * tiles + length]
        found.append(total.view(outputs, len(block.images), len(block.frames), tiles))
    _tile(y, found, plan, block, "outputs", (0, 0, 0), block.frames.start)


def weight_gradient(x: Tensor, dy: Tensor, taps: int, padding: tuple[int, int, int]) -> Tensor:
    """Return the gradient of the weight (Co, C, taps, 3, 3) of `correlate` for dy (N, Co, T, H, W)."""
    x, dy = x.contiguous(), dy.contiguous()
    outputs, inputs, plan = dy.shape[1], x.shape[1], make_plan(tuple(x.shape[2:]), taps, padding)
    gradient = x.new_zeros(plan.num_points, taps * outputs, inputs)
    for block in blocks(plan, len(x), inputs + outputs, taps):
        columns = _read_inputs(x, plan, block, taps, padding)
        rows = _read_gradient(dy, plan, block, taps)
        for total, row, column in zip(gradient, rows, columns, strict=True):
            total += _multiply(row.flatten(0, 1).flatten(1), column.flatten(1).t())
    map_y, map_x = matrices(plan.tile_y).weights, matrices(plan.tile_x).weights
    dw = (torch.kron(map_y, map_x).t() @ gradient.flatten(1)).view(TAPS, TAPS, taps, outputs, inputs)
    return dw.permute(3, 4, 2, 0, 1).contiguous()
