"""Draw tokens from logits: the filters of published samplers, and draws keyed by seed and position.

A draw is a function of a row's logits and of one uniform number, so it does not depend on the rows beside it, nor on
torch's generators: the first token whose cumulative probability exceeds `uniform` times the total. The uniform numbers
of a video are those of `random_state(purpose, seed, index)`.

Two conventions of nucleus filtering are published (Holtzman et al., ICLR 2020, "The Curious Case of Neural Text
Degeneration"). They differ only where the probabilities before a token sum to exactly `top_p`.

| convention | drops a token if the probabilities before it, from the largest down, |
|---|---|
| `inclusive` (TATS) | exceed `top_p` |
| not `inclusive` (MeBT) | reach `top_p` |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.random import random_state

# ----------------------------------------------------------------------------
# Filters.


def filter_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Return logits (..., V) with -inf below the `top_k`-th largest of each row; those equal to it stay."""
    if not 0 < top_k < logits.shape[-1]:
        return logits
    least = logits.topk(top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    return logits.masked_fill(logits < least, -torch.inf)


def filter_top_p(logits: Tensor, top_p: float, inclusive: bool = True) -> Tensor:
    """Return logits (..., V) with -inf outside the nucleus of each row; 1: all stay.

    The nucleus is the smallest set of most probable tokens whose probabilities sum to `top_p`. It always has the most
    probable one. `inclusive` selects the convention (see the module).
    """
    if top_p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    outside = _outside(ordered, top_p, inclusive)
    return logits.masked_fill(torch.empty_like(outside).scatter_(-1, order, outside), -torch.inf)


def _outside(ordered: Tensor, top_p: float, inclusive: bool) -> Tensor:
    """Return which of the logits of each row, in descending order, are outside the nucleus."""
    before = ordered.softmax(-1).cumsum(-1)[..., :-1]
    outside = torch.zeros_like(ordered, dtype=torch.bool)
    outside[..., 1:] = before > top_p if inclusive else before >= top_p
    return outside


def filter_logits(logits: Tensor, top_k: int | None = None, top_p: float = 1.0, inclusive: bool = True) -> Tensor:
    """Return logits (..., V) with -inf for tokens that may not be drawn: top-k first, then the nucleus of the rest.

    `top_k` None switches both filters off, as in the release of TATS; 0 leaves the nucleus alone.
    """
    if top_k is None:
        return logits
    return filter_top_p(filter_top_k(logits, top_k), top_p, inclusive)


def filter_logits_fast(logits: Tensor, top_k: int | None = None, top_p: float = 1.0) -> Tensor:
    """Return `filter_logits` of the inclusive convention, by sorting the largest values of logits (..., V) alone.

    Of equal logits at the end of the nucleus all stay, where `filter_logits` keeps those with the smaller numbers.
    """
    if top_k is None:
        return logits
    size = logits.shape[-1]
    count = top_k if 0 < top_k < size else size
    ordered = _largest(logits, count)
    least = ordered[..., -1:]
    if top_p < 1:
        if count < size and logits.device.type == "cpu":
            most = int((logits >= least).sum(-1).max())
            if most > count:  # logits that equal the last one add to the sum
                ordered = _largest(logits, most)
                ordered = ordered.masked_fill(ordered < least, -torch.inf)
        least = ordered.masked_fill(_outside(ordered, top_p, True), torch.inf).amin(-1, keepdim=True)
    return logits.masked_fill(logits < least, -torch.inf)


def _largest(logits: Tensor, count: int) -> Tensor:
    """Return the largest values of each row in descending order; on CPUs by NumPy, which uses their vector units."""
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        return logits.topk(count, dim=-1).values
    values, rest = logits.detach().numpy(), logits.shape[-1] - count
    if rest:
        values = np.partition(values, rest, axis=-1)[..., rest:]
    return torch.from_numpy(np.sort(values, axis=-1)).flip(-1)


# ----------------------------------------------------------------------------
# Draws.


def draw_tokens(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a token from each row of logits (..., V), for uniform numbers (...) in [0, 1): int64 (...).

    The token is the first whose cumulative probability exceeds `uniform` times the total; sums are in float64.
    """
    cumulative = logits.softmax(-1, dtype=torch.float32).double().cumsum(-1)
    total = cumulative[..., -1:]
    target = uniforms.to(cumulative).unsqueeze(-1) * total
    # A product that rounds to the total would lead past the last token that may be drawn.
    target = torch.minimum(target, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def uniform_numbers(purpose: str, seeds: Sequence[int], index: int | str, count: int) -> Tensor:
    """Return `count` uniform numbers of draw `index` for each seed: float64 (N, count) in [0, 1)."""
    drawn = [random_state(purpose, seed, index).random_sample(count) for seed in seeds]
    return torch.from_numpy(np.array(drawn).reshape(len(drawn), count))


@dataclass(frozen=True)
class Draw:
    """How a token is drawn from logits: divided by `temperature`, filtered, then drawn; temperature 0: the largest.

    `fast` is for `filter_logits_fast`. Raises `ValueError` for values out of range.
    """

    top_k: int | None = None
    top_p: float = 1.0
    temperature: float = 1.0
    fast: bool = True

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: use a number from 1 on, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: use a number above 0, at most 1, which is all tokens")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}: use a number from 0 on, such as 1")

    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Draw from logits (N, V), for uniform numbers (N,): int64 (N,)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float() / self.temperature
        chosen = filter_logits_fast if self.fast else filter_logits
        return draw_tokens(chosen(logits, self.top_k, self.top_p), uniforms)


def draw_sequence(logits: Tensor, advance: Callable[[Tensor], Tensor], uniforms: Tensor, draw: Draw) -> Tensor:
    """Draw tokens one after another: int64 (N, count) for uniform numbers (N, count).

    `logits` (N, V) are those of the first; `advance` takes tokens (N,) and returns the logits of the next. It is not
    called for the last.
    """
    tokens: list[Tensor] = []
    for column in uniforms.to(logits.device).unbind(1):
        logits = advance(tokens[-1]) if tokens else logits
        tokens.append(draw(logits, column))
    return torch.stack(tokens, dim=1)
