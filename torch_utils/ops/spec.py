"""Integer arithmetic of the FIR operators: scaling factors, paddings, output lengths and the transposed operator.

The functions work on Python integers; all implementations, the tests and the benchmarks share them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

Scaling = int | Sequence[int]
Padding = int | Sequence[int]


@dataclass(frozen=True)
class Axis:
    """One axis of an up-sample, filter, down-sample operation.

    `size` samples are followed by `up - 1` zeros each, padded by `pad0` and `pad1` (negative values crop), filtered
    by `taps` coefficients ("valid"), and every `down`-th result from the first is kept.
    """

    size: int
    taps: int
    up: int = 1
    down: int = 1
    pad0: int = 0
    pad1: int = 0

    @property
    def padded_size(self) -> int:
        """Return the number of samples after zero insertion and padding."""
        return self.size * self.up + self.pad0 + self.pad1

    @property
    def out_size(self) -> int:
        """Return the number of output samples."""
        return (self.padded_size - self.taps) // self.down + 1

    @property
    def is_identity(self) -> bool:
        """Return whether a single tap of value one would return the input."""
        return self == Axis(self.size, 1)

    def transposed(self) -> Axis:
        """Return the axis of the transposed operator, which takes the flipped filter."""
        return Axis(
            size=self.out_size,
            taps=self.taps,
            up=self.down,
            down=self.up,
            pad0=self.taps - 1 - self.pad0,
            pad1=self.size * self.up - self.out_size * self.down + self.pad0 - self.up + 1,
        )

    def as_ints(self) -> tuple[int, ...]:
        """Return the fields in order, without the copies that `dataclasses.astuple` makes."""
        return self.size, self.taps, self.up, self.down, self.pad0, self.pad1

    def check(self, name: str) -> None:
        """Raise ValueError if the padded axis has fewer samples than the filter has taps."""
        if self.padded_size < self.taps:
            raise ValueError(
                f"the {name} of the padded input is {self.padded_size} samples "
                f"({self.size} x up {self.up} + padding {self.pad0} + {self.pad1}), but the filter has {self.taps} "
                f"taps: use an input or a padding that gives at least {self.taps} samples"
            )


class Axes(NamedTuple):
    """Both axes of an image in the order (x, y)."""

    x: Axis
    y: Axis

    @property
    def out_size(self) -> tuple[int, int]:
        """Return (H, W) of the result."""
        return self.y.out_size, self.x.out_size

    def transposed(self) -> Axes:
        """Return the axes of the transposed operator, which takes the flipped filter."""
        return Axes(self.x.transposed(), self.y.transposed())

    def check(self) -> None:
        """Raise ValueError if an axis is too short for its filter."""
        self.y.check("height")
        self.x.check("width")

    def as_ints(self) -> list[int]:
        """Return the twelve numbers that `from_ints` takes, as an operator's schema can contain no other type."""
        return [*self.x.as_ints(), *self.y.as_ints()]

    @staticmethod
    def from_ints(values: Sequence[int]) -> Axes:
        """Return the axes of the twelve numbers of `as_ints`."""
        return Axes(Axis(*values[:6]), Axis(*values[6:]))


def make_axes(
    size: Sequence[int],
    taps: tuple[int, int],
    up: tuple[int, int] = (1, 1),
    down: tuple[int, int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
) -> Axes:
    """Return the axes of an image of `size` (H, W); taps and factors are (x, y), padding is (x0, x1, y0, y1)."""
    height, width = size
    x = Axis(width, taps[0], up[0], down[0], padding[0], padding[1])
    return Axes(x, Axis(height, taps[1], up[1], down[1], padding[2], padding[3]))


def parse_scaling(scaling: Scaling) -> tuple[int, int]:
    """Return the factors (x, y) of an int or of a pair [x, y]; ValueError if they are not positive integers."""
    values = _as_ints(scaling)
    if values is not None and len(values) == 1:
        values *= 2
    if values is None or len(values) != 2 or min(values) < 1:
        raise ValueError(f"a scaling factor must be a positive int or a pair [x, y] of them, got {scaling!r}")
    return values[0], values[1]


def parse_padding(padding: Padding) -> tuple[int, int, int, int]:
    """Return (x0, x1, y0, y1) of an int, of [x, y] or of [x0, x1, y0, y1]; ValueError for anything else."""
    values = _as_ints(padding)
    if values is not None and len(values) == 1:
        values *= 4
    if values is not None and len(values) == 2:
        values = [values[0], values[0], values[1], values[1]]
    if values is None or len(values) != 4:
        raise ValueError(f"padding must be an int, [x, y] or [x0, x1, y0, y1] of ints, got {padding!r}")
    return values[0], values[1], values[2], values[3]


def _as_ints(value: int | Sequence[int]) -> list[int] | None:
    try:
        if isinstance(value, Sequence):
            return [operator.index(v) for v in value]
        return [operator.index(value)]
    except TypeError:
        return None


def upsample_padding(taps: int, up: int) -> tuple[int, int]:
    """Return the padding (before, after) with which an up-sampled axis has `up` times its length."""
    return (taps + up - 1) // 2, (taps - up) // 2


def downsample_padding(taps: int, down: int) -> tuple[int, int]:
    """Return the padding (before, after) with which a decimated axis has its length divided by `down`."""
    return (taps - down + 1) // 2, (taps - down) // 2


def same_padding(taps: int) -> tuple[int, int]:
    """Return the padding (before, after) with which filtering keeps the length of an axis."""
    return taps // 2, (taps - 1) // 2
