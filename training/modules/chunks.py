"""Convolutions over a long axis in chunks: each layer keeps the few frames that its next outputs need.

The result is that of the whole at once, nothing is computed twice, and memory does not grow with the length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from training.modules.inplace import add

TIME = 2  # axis of frames in (N, C, T, H, W)


def round_up(number: int, step: int) -> int:
    """Return the smallest multiple of `step` that is at least `number`."""
    return -(-number // step) * step


def pad(x: Tensor, padding: Sequence[int], mode: str) -> Tensor:
    """Return F.pad(x, padding, mode) of x (N, C, T, H, W), by copies of blocks where that is faster."""
    if not any(padding):
        return x
    if mode != "replicate" or torch.is_grad_enabled() or x.device.type != "cpu":
        return F.pad(x, list(padding), mode=mode)
    left, right, top, bottom, front, back = padding
    frames, height, width = x.shape[2:]
    sizes = frames + front + back, height + top + bottom, width + left + right
    y = x.new_empty(*x.shape[:2], *sizes)
    rows = y[:, :, front : front + frames]
    columns = rows[:, :, :, top : top + height]
    columns[..., left : left + width] = x
    for border, edge in (
        (columns[..., :left], x[..., :1]),
        (columns[..., left + width :], x[..., -1:]),
        (rows[:, :, :, :top], columns[:, :, :, :1]),
        (rows[:, :, :, top + height :], columns[:, :, :, -1:]),
        (y[:, :, :front], rows[:, :, :1]),
        (y[:, :, front + frames :], rows[:, :, -1:]),
    ):
        if border.numel():
            border.copy_(edge.expand_as(border))
    return y


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
        # Padding all axes at once copies once. Reflections need a frame more than they add.
        if x is not None and x.shape[TIME] > max(self.front, self.back):
            front, back = self.front if not self.begun and self.held is None else 0, self.back if end else 0
            held = joined(self.held, pad(x, [*self.others, front, back], self.mode))
            self.begun |= self.held is None
        else:
            held = joined(self.held, None if x is None else pad(x, [*self.others, 0, 0], self.mode))
            if held is not None and end:
                held = pad(held, [0, 0, 0, 0, 0, self.back], self.mode)
        if held is None:
            return None
        if not self.begun and (held.shape[TIME] > self.front or end):
            held, self.begun = pad(held, [0, 0, 0, 0, self.front, 0], self.mode), True
        count = (held.shape[TIME] - self.kernel) // self.step + 1 if self.begun else 0
        if count <= 0:
            self.held = held
            return None
        self.held = take(held, count * self.step).clone()  # a view would keep all frames
        return self.function(take(held, 0, (count - 1) * self.step + self.kernel))


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
        return add(y, done)


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
