"""Lanczos reduction of frames by matrix products: each axis is reduced by blocks of its banded matrix.

The filter is Pillow's `LANCZOS`: three lobes, stretched by the ratio of the sizes, cut off and normalised at the edges.
Unlike Pillow, values between the two passes are neither clipped nor rounded to 8 bits, so that results lie within
`BOUND` levels of the exact filter, and not up to 25. All weights and values are whole numbers whose sums stay below
2^24: single precision adds them exactly in any order, so that every processor and BLAS library gives the same pixels.
"""

import functools
from collections.abc import Sequence

import numpy as np

LOBES = 3
BOUND = 0.75  # of which 0.5 by rounding to 8 bits
_ROW_BITS, _COLUMN_BITS = 15, 12  # of the weights of both passes; |weights| of one output sum to less than 1.6
_BETWEEN_BITS = 2  # fractional bits of values between the passes
# Outputs in one product of each pass, and values of a line in one product, for which inputs stay in the cache.
_ROW_BLOCK, _COLUMN_BLOCK, _CHUNK = 4, 8, 480


def suits(height: int, width: int, to_height: int, to_width: int) -> bool:
    """Return whether a size is reduced along both edges, and large enough that products are faster than Pillow."""
    return to_height <= height and to_width <= width and height * width >= 128 * 128


def reduce(frame: np.ndarray, sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Reduce a frame (uint8 H W 3) by a Lanczos filter to (height, width, 3) of each size."""
    rows, columns = frame.shape[:2]
    lines = frame.reshape(rows, columns * 3)
    between = [np.empty((height, columns * 3), np.float32) for height, _ in sizes]
    buffer = np.empty((rows, min(_CHUNK, columns * 3)), np.float32)
    for left in range(0, columns * 3, _CHUNK):
        chunk = slice(left, left + _CHUNK)
        inputs = buffer[:, : columns * 3 - left]
        np.copyto(inputs, lines[:, chunk])  # once for all sizes and blocks, which overlap
        for outputs in between:
            for first, start, weights in _blocks(rows, len(outputs), _ROW_BITS, _ROW_BLOCK):
                block = inputs[start : start + weights.shape[1]]
                np.matmul(weights, block, out=outputs[first : first + len(weights), chunk])
    return [_reduce_lines(lines, width) for lines, (_, width) in zip(between, sizes, strict=True)]


def _reduce_lines(lines: np.ndarray, width: int) -> np.ndarray:
    """Reduce the lines between the passes (float32 height, W x 3), which it changes, to (height, width, 3)."""
    height, columns = len(lines), lines.shape[1] // 3
    lines *= 2.0 ** (_BETWEEN_BITS - _ROW_BITS)
    np.rint(lines, out=lines)
    result = np.empty((height, width * 3), np.float32)
    for first, start, weights in _colour_blocks(columns, width, _COLUMN_BITS, _COLUMN_BLOCK):
        inputs = lines[:, 3 * start : 3 * start + len(weights)]
        np.matmul(inputs, weights, out=result[:, 3 * first : 3 * first + weights.shape[1]])
    result *= 2.0 ** -(_BETWEEN_BITS + _COLUMN_BITS)
    np.rint(result, out=result)
    return np.clip(result, 0, 255, out=result).astype(np.uint8).reshape(height, width, 3)


def taps(size: int, outputs: int, output: int) -> tuple[int, np.ndarray]:
    """Return the first input and the weights, float64, of one of the outputs along an edge."""
    scale = size / outputs
    centre, stretch = (output + 0.5) * scale, max(scale, 1.0)
    first = max(int(centre - LOBES * stretch + 0.5), 0)
    last = min(int(centre + LOBES * stretch + 0.5), size)
    offsets = (np.arange(first, last) - centre + 0.5) / stretch
    weights = np.where(np.abs(offsets) < LOBES, np.sinc(offsets) * np.sinc(offsets / LOBES), 0.0)
    return first, weights / weights.sum()


@functools.lru_cache(maxsize=64)
def _blocks(size: int, outputs: int, bits: int, count: int) -> list[tuple[int, int, np.ndarray]]:
    """Return blocks of `count` rows of the matrix of an edge: first output, first input, weights (outputs, inputs).

    Weights are multiples of 2^-bits, times 2^bits. Partial sums are rounded, so that they sum to exactly one, and the
    errors of neighbours cancel out.
    """
    blocks = []
    for first in range(0, outputs, count):
        found = [taps(size, outputs, output) for output in range(first, min(first + count, outputs))]
        start, stop = found[0][0], max(place + len(weights) for place, weights in found)
        matrix = np.zeros((len(found), stop - start), np.float32)
        for row, (place, weights) in zip(matrix, found, strict=True):
            sums = np.rint(np.cumsum(weights) * 2**bits)
            row[place - start : place - start + len(weights)] = np.diff(sums, prepend=0)
        blocks.append((first, start, matrix))
    return blocks


@functools.lru_cache(maxsize=64)
def _colour_blocks(size: int, outputs: int, bits: int, count: int) -> list[tuple[int, int, np.ndarray]]:
    """Return the blocks with weights (3 inputs, 3 outputs) for lines of three interleaved colours."""
    colours = np.eye(3, dtype=np.float32)
    blocks = _blocks(size, outputs, bits, count)
    return [(first, start, np.ascontiguousarray(np.kron(weights.T, colours))) for first, start, weights in blocks]
