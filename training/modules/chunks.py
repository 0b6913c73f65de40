"""Convolutional networks over a long axis in chunks with margins: equal to the whole, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


def round_up(number: int, step: int) -> int:
    """Return the smallest multiple of `step` that is at least `number`."""
    return -(-number // step) * step


def stream(
    process: Callable[[Tensor], Tensor], pieces: Iterable[Tensor], chunk: int, margin: int,
    axis: int, out_axis: int | None = None, grow: int = 1, shrink: int = 1,
) -> Iterator[Tensor]:  # fmt: skip
    """Yield successive parts of `process` of all pieces, concatenated along `axis`, without holding them all.

    `process` makes `grow` / `shrink` entries along `out_axis` of each entry along `axis`, and an output depends on at
    most `margin` inputs before and after its own. Chunks and margins are multiples of `shrink`. Pieces may have any
    lengths.
    """
    assert chunk > 0 and chunk % shrink == 0 and margin % shrink == 0, (chunk, margin, shrink)
    out_axis = axis if out_axis is None else out_axis
    source, held, base, done, ended = iter(pieces), None, 0, 0, False  # `held` begins with input number `base`
    while True:
        while not ended and (held is None or base + held.shape[axis] < done + chunk + margin):
            piece = next(source, None)
            ended = piece is None
            if piece is not None:
                held = piece if held is None else torch.cat([held, piece], dim=axis)
        end = base + (0 if held is None else held.shape[axis])
        if held is None or done >= end:
            return
        stop = min(done + chunk, end)
        window = held.narrow(axis, 0, min(stop + margin, end) - base)
        first, count = (number * grow // shrink for number in (done - base, stop - done))
        yield process(window).narrow(out_axis, first, count)
        done = stop
        skip = max(done - margin - base, 0)
        held, base = held.narrow(axis, skip, end - base - skip), base + skip
