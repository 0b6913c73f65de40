"""Which codes are visible in a training step, and which are predicted: mask schedules, windows and curricula.

Yoo et al., CVPR 2023, section 3.3. A step draws a masking time t and a window of successive latent frames; of a random
permutation of the window's positions the first are visible, and the last, at most a budget, are predicted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.generation.draft_revise import MASK_SCHEDULES
from training.mebt.options import PRIORS


@dataclass(frozen=True)
class Division:
    """The positions of a step, int64 (N, C) and (N, M), and the number of positions of its window."""

    contexts: Tensor
    targets: Tensor
    num_positions: int

    @property
    def masked_share(self) -> float:
        """Return the share of the window's positions that are not visible."""
        return 1 - self.contexts.shape[1] / self.num_positions

    def each(self, losses: Tensor, average: float = 1.0) -> Tensor:
        """Return the loss of each clip, (N,): the sum of those of its targets, (N, M), over n s^average.

        n are the window's positions, of which a share s is not visible. With 1 it is a mean where all of these are
        targets; with 0 steps count by what they predict.
        """
        return losses.sum(1) / (self.num_positions * self.masked_share**average)


def divide(
    permutations: Tensor, shape: tuple[int, ...], t: float, length: int, start: int = 0, budget: int | None = None,
    schedule: str = "linear", legacy: bool = False,
) -> Division:  # fmt: skip
    """Divide permutations of all positions (N, P) at a masking time t into contexts and targets.

    Only positions of the latent frames [start, start + length) remain. At least one of them is a target; with `legacy`
    all are both, contexts and targets, where t rounds to a time at which none is masked.
    """
    cells = shape[1] * shape[2]
    if length < shape[0]:
        inside = (permutations >= start * cells) & (permutations < (start + length) * cells)
        permutations = permutations[inside].view(len(permutations), -1)
    count = permutations.shape[1]
    share = MASK_SCHEDULES[schedule](torch.tensor(t, dtype=torch.float32))
    masked = min(max(int(torch.ceil(share * count)), 0), count)
    if not masked and legacy:
        return Division(permutations, permutations, count)
    masked = max(masked, 1)
    num_targets = masked if budget is None else min(budget, masked)
    return Division(permutations[:, : count - masked], permutations[:, count - num_targets :], count)


def draw_time(rng: np.random.RandomState, t_range: tuple[float, float], beta: tuple[float, float] | None) -> float:
    """Return a masking time: uniform in a range, or by a Beta distribution."""
    return float(rng.uniform(*t_range) if beta is None else rng.beta(*beta))


def beta_at(step: int, first: tuple[float, float], steps: int) -> tuple[float, float]:
    """Return the parameters of the Beta distribution at a step: from `first` linearly to (1, 1) after `steps`."""
    done = min(step / steps, 1.0)
    a, b = (value - (value - 1) * done for value in first)
    return a, b


def growth_steps(prior: str) -> int:
    """Return the steps in which windows of a prior grow by a latent frame, as published; 0 for those that do not grow.

    Raises `ValueError` for an unknown prior.
    """
    if prior in ("longest", "uniform"):
        return 0
    match = re.fullmatch(r"gaussian(?:([1-9]\d*)_)?2", prior)
    if match is None:
        raise ValueError(f"the prior of windows {prior!r} is unknown: use {', '.join(PRIORS)}")
    return int(match[1] or 30_000)


def window_prior(prior: str, step: float, num_frames: int, growth: float | None = None) -> np.ndarray:
    """Return the probability of windows of 1 ... `num_frames` latent frames at a step: float64 (num_frames,).

    Windows grow around 1 + step / growth, with a deviation of two frames, by default as slowly as published.
    """
    if prior == "longest":
        return np.eye(num_frames)[-1]
    if prior == "uniform":
        return np.full(num_frames, 1 / num_frames)
    growth = float(growth_steps(prior)) if growth is None else growth
    exponent = -(((step - np.arange(num_frames) * growth) / (2 * growth)) ** 2) / 2
    share = np.exp(exponent - exponent.max())  # far beyond the longest window all shares would round to zero
    return share / share.sum()
