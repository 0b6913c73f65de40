"""Random numbers of masked-token samplers: one array a draw as published, or keyed by seed, step and position.

A race draws a code from probabilities p: the code with the largest p / E wins, where E ~ Exp(1) independently for each
code; the winner is distributed as p.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from torch_utils import misc
from training.random import random_state


class Noise(Protocol):
    """The random numbers of a sampler, for positions (N, M) of a grid of which row n belongs to video n."""

    def step(self, label: str) -> None:
        """Begin the step of this name: what is drawn next belongs to it."""
        ...

    def race(self, positions: Tensor, num_codes: int, codes: Tensor | None = None) -> Tensor:
        """Return Exp(1) for each position and code: (N, M, num_codes).

        With `codes` (N, M, k) only for these codes of each position: (N, M, k).
        """
        ...

    def exponential(self, positions: Tensor) -> Tensor:
        """Return Exp(1) for each position: (N, M)."""
        ...

    def normal(self, positions: Tensor) -> Tensor:
        """Return N(0, 1) for each position: (N, M)."""
        ...

    def permutations(self, count: int) -> Tensor:
        """Return a permutation of 0 ... count - 1 for each video: int64 (N, count)."""
        ...


class SequentialNoise:
    """Arrays for the whole batch from one generator, one after the other in the order in which they are asked for.

    The published order; results depend on which videos are made together.
    """

    def __init__(self, generator: np.random.RandomState, num_videos: int, device: torch.device | str = "cpu"):
        self.generator, self.num_videos, self.device = generator, num_videos, device

    def step(self, label: str) -> None:
        """See `Noise`; steps do not matter here."""

    def _upload(self, values: np.ndarray) -> Tensor:
        return misc.upload(values.astype(np.float32), self.device)

    def race(self, positions: Tensor, num_codes: int, codes: Tensor | None = None) -> Tensor:
        """See `Noise`."""
        drawn = self._upload(self.generator.standard_exponential((*positions.shape, num_codes)))
        return drawn if codes is None else drawn.gather(2, codes)

    def exponential(self, positions: Tensor) -> Tensor:
        """See `Noise`."""
        return self._upload(self.generator.standard_exponential(tuple(positions.shape)))

    def normal(self, positions: Tensor) -> Tensor:
        """See `Noise`."""
        return self._upload(self.generator.standard_normal(tuple(positions.shape)))

    def permutations(self, count: int) -> Tensor:
        """See `Noise`."""
        drawn = np.stack([self.generator.permutation(count) for _ in range(self.num_videos)])
        return misc.upload(drawn, self.device, torch.int64)


def mix(x: Tensor) -> Tensor:
    """Scramble int32 values in place, so that each bit depends on all bits of the value.

    The function "lowbias32" of Chris Wellons (2018, "Prospecting for hash functions"; public domain).
    """
    x ^= (x >> 16) & 0xFFFF  # shifts of int32 keep the sign
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - (1 << 32)
    x ^= (x >> 16) & 0xFFFF
    return x


class KeyedNoise:
    """Random numbers keyed by (purpose, seed, index, step, position, code): they depend on nothing else.

    So a number is the same whichever others are drawn, in which order, on which device, and beside which videos.
    Numbers for codes come from a hash of 32 bits, under a key of 64 bits for each seed and step; few others come from
    `random_state`.
    """

    WEYL = 0x9E3779B9 - (1 << 32)  # an odd number without pattern: it spreads successive counters over all bits

    PIECE = 1 << 18  # numbers that are drawn at once

    def __init__(self, purpose: str, seeds: Sequence[int], index: int | str = 0, device: torch.device | str = "cpu"):
        self.purpose, self.seeds, self.index, self.device = purpose, list(seeds), index, device
        self.step("")

    def step(self, label: str) -> None:
        """See `Noise`."""
        self._label = label
        self._keys: Tensor | None = None

    def _generators(self, kind: str) -> list[np.random.RandomState]:
        return [random_state(f"{self.purpose}-{kind}", seed, f"{self.index}:{self._label}") for seed in self.seeds]

    def _hash(self, positions: Tensor, salt: int) -> Tensor:
        """Return a state of each position under the keys of the step: int32 (N, M)."""
        if self._keys is None:
            drawn = [rng.randint(-(1 << 31), 1 << 31, 2, dtype=np.int64) for rng in self._generators("key")]
            self._keys = misc.upload(np.array(drawn, np.int32), self.device)
        state = mix(positions.int() * self.WEYL + (self._keys[:, :1] + salt))
        return mix(state ^ self._keys[:, 1:])

    @staticmethod
    def _to_exponential(x: Tensor) -> Tensor:
        """Return Exp(1) from int32 values, with a resolution of 2^-31 near zero, where races are decided."""
        uniform = (x & 0x7FFFFFFF).float().add_(0.5).mul_(-(2.0**-31))  # in (-1, 0)
        return uniform.clamp_(min=-1 + 2.0**-24).log1p_().neg_()

    def race(self, positions: Tensor, num_codes: int, codes: Tensor | None = None) -> Tensor:
        """See `Noise`."""
        states = self._hash(positions, 0).flatten().unsqueeze(1)
        if codes is None:
            codes = torch.arange(num_codes, device=self.device).unsqueeze(0)
        counters = codes.int().flatten(0, -2) * self.WEYL
        drawn = torch.empty(len(states), counters.shape[1], device=states.device)
        # In pieces that stay in a processor's cache.
        size = max(1, self.PIECE // counters.shape[1]) if drawn.device.type == "cpu" else len(states)
        for start in range(0, len(states), max(size, 1)):
            rows = slice(start, start + size)
            part = counters if len(counters) == 1 else counters[rows]
            drawn[rows] = self._to_exponential(mix(states[rows] ^ part))
        return drawn.view(*positions.shape, -1)

    def exponential(self, positions: Tensor) -> Tensor:
        """See `Noise`."""
        return self._to_exponential(self._hash(positions, 1))

    def normal(self, positions: Tensor) -> Tensor:
        """See `Noise`; by the transformation of Box and Muller."""
        radius = self._to_exponential(self._hash(positions, 2)).mul_(2).sqrt_()
        angle = self._hash(positions, 3).float() * (torch.pi * 2.0**-31)
        return radius * angle.cos_()

    def permutations(self, count: int) -> Tensor:
        """See `Noise`."""
        drawn = np.stack([rng.permutation(count) for rng in self._generators("order")])
        return misc.upload(drawn, self.device, torch.int64)
