"""Write long videos of tokens: latent frame by latent frame, or key frames and then the frames between them.

Ge et al., ECCV 2022, section 3.2. Nothing here knows a network: `TokenModel` is what a system gives. Tokens of a latent
frame are in raster order, (N, n). All functions are generators without end, and hold a few latent frames.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from training.generation.token_sampling import Draw, draw_sequence


class TokenModel(Protocol):
    """A network that predicts tokens one after another, with the condition that it is given."""

    def begin(self, context: Tensor) -> Tensor:
        """Forget all tokens, take those of the context (N, count), and return the logits of the next one: (N, V)."""
        ...

    def advance(self, tokens: Tensor) -> Tensor:
        """Take the next tokens (N,), and return the logits of those after them: (N, V)."""
        ...


def sliding_window(
    model: TokenModel, uniforms: Callable[[int], Tensor], draw: Callable[[int], Draw], memory: int
) -> Iterator[Tensor]:
    """Yield latent frames without end, each drawn after at most the `memory` ones before it: int64 (N, n).

    `uniforms` gives the uniform numbers (N, n) of a frame, and `draw` how its tokens are drawn. The model sees a frame
    and its context at the same positions always, so that `memory` frames and one more must fit.
    """
    past: deque[Tensor] = deque(maxlen=memory)
    for frame in itertools.count():
        numbers = uniforms(frame)
        if 0 < frame <= memory:  # the context still begins with the first frame, and the model holds it
            logits = model.advance(past[-1][:, -1])
        else:
            none = torch.empty(len(numbers), 0, dtype=torch.int64)
            logits = model.begin(torch.cat([*past], dim=1) if past else none)
        past.append(draw_sequence(logits, model.advance, numbers, draw(frame)))
        yield past[-1]


def filled(
    keys: Iterable[Tensor],
    fill: Callable[[Tensor, Tensor, Sequence[int]], Tensor],
    group: int,
) -> Iterator[Tensor]:
    """Yield key frames (N, n) and, between each and the next, the latent frames that `fill` gives: int64 (N, n).

    `fill` takes the key frames (S, N, n) before and after S segments and the numbers of the segments, and returns the
    frames between them (S, N, count, n). `group` segments are filled together. Of a finite number of keys the last is
    the last frame.
    """
    last: Tensor | None = None
    done = 0
    for some in batched(keys, group):
        ends = [*([last] if last is not None else []), *some]
        last = ends[-1]
        if len(ends) == 1:
            continue
        between = fill(torch.stack(ends[:-1]), torch.stack(ends[1:]), range(done, done + len(ends) - 1))
        for key, frames in zip(ends[:-1], between, strict=True):
            yield key
            yield from frames.unbind(1)
        done += len(ends) - 1
    if last is not None:
        yield last


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of `size` successive items; the last may be shorter, and the first has one more."""
    iterator = iter(items)
    first = list(itertools.islice(iterator, size + 1))
    while first:
        yield first
        first = list(itertools.islice(iterator, size))
