"""Convolutions over a long axis in chunks: each layer keeps the few frames that its next outputs need.

The result is that of the whole at once, nothing is computed twice, and memory does not grow with the length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

TIME = 2  # axis of frames in (N, C, T, H, W)


def round_up(number: int, step: int) -> int:
    """Return the smallest multiple of `step` that is at least `number`."""
    return -(-number // step) * step


def take(x: Tensor, start: int, stop: int | None = None) -> Tensor:
    """Return frames [start, stop) of (N, C, T, H, W)."""
    return x[:, :, start:stop]


class Layer:
    """A part of a network that takes successive frames and returns those of its outputs that are then known."""

    def push(self, x: Tensor | None, end: bool) -> Tensor | None:
        """Take the next frames (N, C, T, H, W), None for none, and return outputs; with `end` all that are left."""
        raise NotImplementedError


class Pointwise(Layer):
    """A function of each frame alone."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function = function

    def push(self, x: Tensor | None, end: bool) -> Tensor | None:
        """See `Layer.push`."""
        return None if x is None else self.function(x)


class Windowed(Layer):
    """A function of windows of `kernel` frames, each `step` frames after the one before.

    `padding` is that of `F.pad` for width, height and frames. `function` takes padded frames; for n more frames than
    `kernel` it returns the outputs of n / step more windows.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], kernel: int, padding: Sequence[int], mode: str, step: int = 1
    ):
        self.function, self.kernel, self.step, self.mode = function, kernel, step, mode
        *self.others, self.front, self.back = padding
        self.held: Tensor | None = None
        self.begun = False

    def push(self, x: Tensor | None, end: bool) -> Tensor | None:
        """See `Layer.push`."""
        held = joined(self.held, x)
        if held is None:
            return None
        # Reflections need a frame more than they add.
        if not self.begun and (held.shape[TIME] > self.front or end):
            held, self.begun = self._pad(held, [0, 0, 0, 0, self.front, 0]), True
        if end:
            held = self._pad(held, [0, 0, 0, 0, 0, self.back])
        count = (held.shape[TIME] - self.kernel) // self.step + 1 if self.begun else 0
        if count <= 0:
            self.held = held
            return None
        self.held = take(held, count * self.step).clone()  # a view would keep all frames
        window = take(held, 0, (count - 1) * self.step + self.kernel)
        return self.function(self._pad(window, [*self.others, 0, 0]))

    def _pad(self, x: Tensor, padding: list[int]) -> Tensor:
        return F.pad(x, padding, mode=self.mode) if any(padding) else x


class Residual(Layer):
    """x + f(x), where f is a chain of layers that returns its outputs later."""

    def __init__(self, *layers: Layer):
        self.layers = layers
        self.waiting: Tensor | None = None

    def push(self, x: Tensor | None, end: bool) -> Tensor | None:
        """See `Layer.push`."""
        self.waiting = joined(self.waiting, x)
        y = push_all(self.layers, x, end)
        if y is None or self.waiting is None:
            return None
        done, self.waiting = take(self.waiting, 0, y.shape[TIME]), take(self.waiting, y.shape[TIME]).clone()
        return done + y


def joined(held: Tensor | None, x: Tensor | None) -> Tensor | None:
    """Return frames and those after them, either of which may be absent."""
    if held is None or x is None:
        return x if held is None else held
    return torch.cat([held, x], dim=TIME)


def push_all(layers: Iterable[Layer], x: Tensor | None, end: bool) -> Tensor | None:
    """Return the outputs of a chain of layers for the next frames, None for none."""
    for layer in layers:
        x = layer.push(x, end)
    return x


def cut(pieces: Iterable[Tensor], size: int, axis: int) -> Iterator[tuple[Tensor, bool]]:
    """Yield the content of pieces of any lengths along `axis` in chunks of `size`, and whether one is the last."""
    held = None
    for piece in pieces:
        held = piece if held is None else torch.cat([held, piece], dim=axis)
        while held.shape[axis] > size:
            yield held.narrow(axis, 0, size), False
            held = held.narrow(axis, size, held.shape[axis] - size)
    if held is not None:
        yield held, True
