"""Sample a grid of codes by parallel steps: draft all of it, then revise random parts of it.

Masked-token transformers predict masked codes from visible ones. A draft reveals masked positions in steps: the most
confident ones (MaskGIT, Chang et al., CVPR 2022), random ones, or those of a random partition. A revision masks each
part of a random partition in turn and draws it again (Draft-and-Revise, Lee et al., NeurIPS 2022). MeBT (Yoo et al.,
CVPR 2023) and TECO (Yan et al., ICML 2023) sample in these ways.

Nothing here knows a network: it is a function `predict` of a `Query`. Two implementations draw the same codes from the
same random numbers that are keyed by position (`training.generation.noise.KeyedNoise`):

- `Published` computes and draws every target in each step, in the published order of random numbers, and with `legacy`
  also by the published rules;
- `Fast` asks for logits only where they matter: it leaves out steps that fix nothing, chooses positions before it
  predicts them where the choice does not depend on the prediction, and draws a code only where it is kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from training.generation.noise import Noise
from training.generation.token_sampling import filter_top_k, filter_top_p

# Share of the positions that stay masked after a share t of the steps.
MASK_SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "cosine": lambda t: torch.cos(math.pi * t / 2),
    "cosine_plus": lambda t: (1 + torch.cos(math.pi * t)) / 2,
    "linear": lambda t: 1 - t,
    "quadratic": lambda t: (1 - t) ** 2,
    "convex": lambda t: (1 - t) ** 3,
    "square": lambda t: 1 - t**2,
    "cube": lambda t: 1 - t**3,
    "sqrt": lambda t: 1 - torch.sqrt(t),
}
# Weight of the random part in the choice of positions.
CHOICE_SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: 1 - t,
    "constant": lambda t: 1.0,
    "cosine": lambda t: math.cos(math.pi * t / 2),
}
STRATEGIES = ("confidence", "random", "bootstrap")


def num_masked(schedule: str, t: float, count: int) -> int:
    """Return how many of `count` positions stay masked at t in [0, 1].

    In float32, as published: in float64 cos(pi / 2) is above zero, and one position would stay masked for ever.
    """
    share = MASK_SCHEDULES[schedule](torch.tensor(t, dtype=torch.float32))
    return max(int(torch.ceil(share * count)), 0)


# ----------------------------------------------------------------------------
# What is asked of a network.


@dataclass(frozen=True)
class Query:
    """A grid of P positions of N videos of which some are visible; logits are wanted for some of the masked ones.

    Positions are numbers in [0, P), in any order. Positions that are neither visible nor masked do not exist for the
    network.
    """

    codes: Tensor  # int64 (N, P); of masked positions without meaning
    contexts: Tensor  # int64 (N, C): visible positions
    targets: Tensor  # int64 (N, M): masked positions
    wanted: int  # logits are wanted for the first of the targets

    @property
    def wanted_targets(self) -> Tensor:
        """Return the positions whose logits are wanted: (N, wanted)."""
        return self.targets[:, : self.wanted]


# Returns logits (N, m, K) of successive targets, in pieces of any length that together are those wanted.
Predict = Callable[[Query], Iterable[Tensor]]


def from_mask(predict: Callable[[Tensor, Tensor], Tensor]) -> Predict:
    """Return the `Predict` of a network that takes codes (N, P) and a mask (N, P), True where masked.

    It returns logits of all positions: (N, P, K).
    """

    def ask(query: Query) -> Iterator[Tensor]:
        mask = torch.zeros_like(query.codes, dtype=torch.bool).scatter_(1, query.targets, True)
        logits = predict(query.codes, mask)
        yield logits.gather(1, query.wanted_targets.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))

    return ask


# ----------------------------------------------------------------------------
# Draws of codes.


@dataclass(frozen=True)
class Draw:
    """How a code is drawn from logits: divided by `temperature`, then filtered; temperature 0: the largest.

    `top_k` None and `top_p` 1 keep all codes. Raises `ValueError` for values out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}: use a number from 0 on, such as 1")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}: use a number from 1 on, or leave it out for all codes")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: use a number above 0, at most 1, which is all codes")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities (..., K) that logits (..., K) are drawn with."""
        logits = logits.float() / (self.temperature + 1e-8)
        logits = logits if self.top_k is None else filter_top_k(logits, self.top_k)
        return filter_top_p(logits, self.top_p, inclusive=False).softmax(-1)


def race(probabilities: Tensor, exponential: Tensor) -> tuple[Tensor, Tensor]:
    """Return the winners of races, and their probabilities: (..., K), Exp(1) (..., K) -> int64 (...), float32 (...)."""
    ids = (probabilities / exponential).argmax(-1, keepdim=True)
    return ids.squeeze(-1), probabilities.gather(-1, ids).squeeze(-1)


def draw_fast(logits: Tensor, draw: Draw, noise: Noise, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Draw codes of positions (N, m) from logits (N, m, K) as `race` does, from the `top_k` largest alone."""
    k, num_codes = draw.top_k, logits.shape[-1]
    if k is None or k >= num_codes:
        return race(draw.probabilities(logits), noise.race(positions, num_codes))
    values, codes = logits.topk(k + 1, dim=-1)
    if bool((values[..., k] == values[..., k - 1]).any()):  # all codes that equal the smallest may be drawn
        return race(draw.probabilities(logits), noise.race(positions, num_codes))
    few = dataclasses.replace(draw, top_k=None).probabilities(values[..., :k])
    ids, probabilities = race(few, noise.race(positions, num_codes, codes[..., :k]))
    return codes.gather(-1, ids.unsqueeze(-1)).squeeze(-1), probabilities


# ----------------------------------------------------------------------------
# Drafts in steps.


@dataclass(frozen=True)
class Grid:
    """Codes in the making: which positions of a grid are fixed, which are not."""

    codes: Tensor  # int64 (N, P)
    contexts: Tensor  # int64 (N, C): positions whose codes are fixed
    targets: Tensor  # int64 (N, M): positions whose codes are not

    @classmethod
    def empty(cls, num_videos: int, num_positions: int, device: torch.device | str = "cpu") -> Grid:
        """Return a grid without any code."""
        positions = torch.arange(num_positions, device=device).expand(num_videos, -1)
        return cls(torch.zeros_like(positions), positions[:, :0], positions)

    @classmethod
    def given(cls, codes: Tensor, count: int) -> Grid:
        """Return a grid (N, P) of which the codes of the first `count` positions are given."""
        positions = torch.arange(codes.shape[1], device=codes.device).expand(len(codes), -1)
        return cls(codes, positions[:, :count], positions[:, count:])

    def write(self, positions: Tensor, codes: Tensor) -> Grid:
        """Return the grid with other codes (N, m) at positions (N, m)."""
        return dataclasses.replace(self, codes=self.codes.scatter(1, positions, codes))

    def fix(self, order: Tensor, count: int, sort: bool = True) -> Grid:
        """Return the grid with the first `count` of the targets, in an order (N, M), fixed.

        The others stay in ascending order, without `sort` in this one.
        """
        targets = self.targets.gather(1, order)
        rest = targets[:, count:].sort(1).values if sort else targets[:, count:]
        return dataclasses.replace(self, contexts=torch.cat([self.contexts, targets[:, :count]], 1), targets=rest)


@dataclass(frozen=True)
class DraftSettings:
    """How a draft reveals positions.

    | strategy | fixes in a step |
    |---|---|
    | confidence | as many as the schedule says: those with the largest p / E^c, E ~ Exp(1) |
    | random | as many as the schedule says, at random |
    | bootstrap | one position, at random |

    p is the probability of the drawn code, and c is `choice_temperature` times the choice schedule at t. The schedule
    counts `count` positions, by default all of the grid; steps are left out until it has reached the number that is
    masked. Raises `ValueError` for values out of range.
    """

    steps: int = 8
    strategy: str = "confidence"
    schedule: str = "cosine"
    choice_temperature: float = 1.0
    choice_schedule: str = "linear"
    draw: Draw = Draw()
    count: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}: use a number from 1 on, such as 8")
        if not 0 <= self.choice_temperature < math.inf:
            raise ValueError(f"choice_temperature is {self.choice_temperature}: use a number from 0 on, such as 4")
        named = (
            ("strategy", self.strategy, STRATEGIES),
            ("schedule", self.schedule, MASK_SCHEDULES),
            ("choice_schedule", self.choice_schedule, CHOICE_SCHEDULES),
        )
        for name, value, known in named:
            if value not in known:
                raise ValueError(f"{name} is {value!r}: use one of {', '.join(known)}")

    def choice(self, step: int) -> float:
        """Return the exponent of the random part of the choice of positions in a step from 1 on."""
        return self.choice_temperature * CHOICE_SCHEDULES[self.choice_schedule](step / self.steps)

    def num_masked(self, step: int, grid: Grid) -> int:
        """Return how many positions the schedule leaves masked after a step from 1 on."""
        return num_masked(self.schedule, step / self.steps, self.count or grid.codes.shape[1])


def choice_scores(probabilities: Tensor, exponential: Tensor, exponent: float) -> Tensor:
    """Return scores by which positions are fixed, the largest first: (N, M), Exp(1) (N, M) -> (N, M)."""
    return probabilities / probabilities.sum(1, keepdim=True) / exponential**exponent


def descending(scores: Tensor) -> Tensor:
    """Return the order (N, M) of scores from the largest on; the first of equals comes first."""
    return scores.argsort(dim=1, descending=True, stable=True)


class _Steps:
    """The parts of both implementations that are the same."""

    def __init__(self, predict: Predict, noise: Noise):
        self.predict, self.noise = predict, noise

    def ask(self, query: Query) -> Query:
        """Return what is asked of the network instead."""
        raise NotImplementedError

    def answer(self, query: Query, draw: Draw) -> tuple[Tensor, Tensor]:
        """Return the codes drawn for the wanted targets, and their probabilities: (N, wanted) each."""
        raise NotImplementedError

    def draft_parts(self, grid: Grid, parts: int, draw: Draw, label: str = "draft") -> Grid:
        """Fix all masked positions in the parts of a random partition, one after another.

        Raises `ValueError` for more parts than masked positions.
        """
        self.noise.step(label)
        sizes, targets = partition(grid, parts, self.noise)
        for number, size in enumerate(sizes):
            self.noise.step(f"{label}:{number}")
            query = self.ask(Query(grid.codes, grid.contexts, targets, size))
            ids, _ = self.answer(query, draw)
            contexts = torch.cat([grid.contexts, targets[:, :size]], 1)
            targets = targets[:, size:]
            grid = Grid(grid.codes.scatter(1, query.wanted_targets, ids), contexts, targets)
        return grid

    def revise(self, grid: Grid, parts: int, draw: Draw, rounds: int = 1, label: str = "revise") -> Grid:
        """Draw all codes at the targets of a grid again, each part of a random partition from all other codes.

        The grid needs a code at every position; its contexts stay. Raises `ValueError` for more parts than targets.
        """
        codes = grid.codes
        for number in range(rounds):
            self.noise.step(f"{label}:{number}")
            sizes, targets = partition(grid, parts, self.noise)
            pieces = list(targets.split(sizes, dim=1))
            for part, piece in enumerate(pieces):
                self.noise.step(f"{label}:{number}:{part}")
                contexts = torch.cat([grid.contexts, *pieces[part + 1 :], *pieces[:part]], 1)
                ids, _ = self.answer(Query(codes, contexts, piece, piece.shape[1]), draw)
                codes = codes.scatter(1, piece, ids)
        return dataclasses.replace(grid, codes=codes)


class Fast(_Steps):
    """Draft and revise with the least work."""

    def ask(self, query: Query) -> Query:
        """See `_Steps`."""
        return query

    @torch.no_grad()
    def answer(self, query: Query, draw: Draw) -> tuple[Tensor, Tensor]:
        """See `_Steps`; piece by piece, so that neither logits nor random numbers are there for all targets at once."""
        pieces, start = [], 0
        for logits in self.predict(query):
            stop = start + logits.shape[1]
            pieces.append(draw_fast(logits, draw, self.noise, query.targets[:, start:stop]))
            start = stop
        assert start == query.wanted, f"logits of {start} targets, of {query.wanted} were wanted"
        ids, probabilities = zip(*pieces, strict=True)
        return torch.cat(ids, dim=1), torch.cat(probabilities, dim=1)

    def draft(self, grid: Grid, settings: DraftSettings, label: str = "draft") -> Grid:
        """Fix masked positions of a grid in steps; after a bootstrap of few steps some stay masked."""
        bootstrap = settings.strategy == "bootstrap"
        for step in range(1, settings.steps + 1):
            left, num_targets = settings.num_masked(step, grid), grid.targets.shape[1]
            count = 1 if bootstrap else num_targets - left
            if num_targets == 0 or left > num_targets or count == 0:
                continue
            self.noise.step(f"{label}:{step}")
            if settings.strategy == "confidence" and left:
                grid = self._fix_confident(grid, settings, count, settings.choice(step))
            else:
                grid = self._fix_chosen(grid, settings, count)
        return grid

    def _fix_confident(self, grid: Grid, settings: DraftSettings, count: int, exponent: float) -> Grid:
        query = Query(grid.codes, grid.contexts, grid.targets, grid.targets.shape[1])
        ids, probabilities = self.answer(query, settings.draw)
        order = descending(choice_scores(probabilities, self.noise.exponential(grid.targets), exponent))
        kept = order[:, :count]
        return grid.write(grid.targets.gather(1, kept), ids.gather(1, kept)).fix(order, count)

    def _fix_chosen(self, grid: Grid, settings: DraftSettings, count: int) -> Grid:
        """Fix positions whose choice does not depend on the prediction, so that only they are predicted."""
        order = torch.arange(grid.targets.shape[1], device=grid.targets.device).expand_as(grid.targets)
        if count < grid.targets.shape[1]:
            order = descending(self.noise.normal(grid.targets))
        query = Query(grid.codes, grid.contexts, grid.targets.gather(1, order), count)
        ids, _ = self.answer(query, settings.draw)
        return grid.write(query.wanted_targets, ids).fix(order, count)


class Published(_Steps):
    """Draft and revise as published: everything is predicted and drawn in each step, in the published order.

    With `legacy` by the rules of the release of MeBT, else by the same rules as `Fast`. The release scores random
    positions by normal numbers over their sum, so that the smallest come first where the sum is negative, and keeps
    targets in the order of their scores, which decides the order of random numbers that are not keyed.
    """

    def __init__(self, predict: Predict, noise: Noise, legacy: bool = True):
        super().__init__(predict, noise)
        self.legacy = legacy

    def ask(self, query: Query) -> Query:
        """See `_Steps`."""
        return dataclasses.replace(query, wanted=query.targets.shape[1])

    @torch.no_grad()
    def answer(self, query: Query, draw: Draw) -> tuple[Tensor, Tensor]:
        """See `_Steps`."""
        probabilities = draw.probabilities(torch.cat(list(self.predict(query)), dim=1))
        return race(probabilities, self.noise.race(query.wanted_targets, probabilities.shape[-1]))

    def draft(self, grid: Grid, settings: DraftSettings, label: str = "draft") -> Grid:
        """See `Fast.draft`; the codes of positions that stay masked are those that were drawn last."""
        for step in range(1, settings.steps + 1):
            left, num_targets = settings.num_masked(step, grid), grid.targets.shape[1]
            if left > num_targets or num_targets == 0:
                continue
            self.noise.step(f"{label}:{step}")
            query = Query(grid.codes, grid.contexts, grid.targets, num_targets)
            ids, probabilities = self.answer(query, settings.draw)
            grid = grid.write(grid.targets, ids)
            by_confidence = settings.strategy == "confidence"
            scores = probabilities if by_confidence else self.noise.normal(grid.targets)
            count = 1 if settings.strategy == "bootstrap" else num_targets - left
            if count == 0:
                continue
            if by_confidence or self.legacy:
                exponential = self.noise.exponential(grid.targets)
                scores = choice_scores(scores, exponential, settings.choice(step) if by_confidence else 0.0)
            grid = grid.fix(descending(scores), count, sort=not self.legacy)
        return grid


def partition(grid: Grid, parts: int, noise: Noise) -> tuple[list[int], Tensor]:
    """Return the sizes of the parts of a random partition of the targets, and the targets in its order.

    Sizes differ by one at most, the larger ones first. Raises `ValueError` for more parts than targets.
    """
    count = grid.targets.shape[1]
    if not 0 < parts <= count:
        raise ValueError(f"{count} positions cannot be divided into {parts} parts: use 1 to {count}")
    sizes = [count // parts + (number < count % parts) for number in range(parts)]
    return sizes, grid.targets.gather(1, noise.permutations(count))
