"""Learning rates of RIVER and of its refiner by step, exactly as published: both begin with 0."""

from __future__ import annotations

import math
from dataclasses import dataclass

from training.optim import Rates


@dataclass(frozen=True)
class PublishedSchedule(Rates):
    """Linear from 0 over `warmup` steps, then a square root that falls to a thousandth of the peak at `steps`."""

    peak: float
    warmup: int
    steps: int

    def at(self, step: int) -> float:
        """See `Rates.at`."""
        if step < self.warmup:
            return self.peak * step / self.warmup
        end = self.peak * 1e-3
        left = 1 - min((step - self.warmup) / max(self.steps - self.warmup, 1), 1.0)
        return (self.peak - end) * math.sqrt(left) + end


@dataclass(frozen=True)
class RefinerSchedule(Rates):
    """Evenly from 0 to the peak, which the last of `warmup` steps has, then half a cosine that ends at `steps`."""

    peak: float
    warmup: int
    steps: int

    def at(self, step: int) -> float:
        """See `Rates.at`."""
        if step < self.warmup:
            return self.peak * step / max(self.warmup - 1, 1)
        done = min((step - self.warmup) / max(self.steps - self.warmup, 1), 1.0)
        return self.peak * (1 + math.cos(math.pi * done)) / 2
