"""A training sample of RIVER: which frames of a clip, noise and time; and the loss (section 3.1 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torch_utils import misc
from training.generation import flow
from training.river.networks import Dropout, VectorField


@dataclass(frozen=True)
class Sample:
    """The target frame of each of N clips, the frames that condition it, noise (N, C, h, w) and time (N,).

    `targets` is int64 (N,), counted in the clip. The reference is the frame before the target. `conditions`, int64
    (N, k), are older, from new to old; a target with one frame before it has that one alone.
    """

    targets: Tensor
    conditions: Tensor
    noise: Tensor
    t: Tensor

    @property
    def distances(self) -> Tensor:
        """Return how many frames each condition lies before the reference: int64 (N, k).

        It is 1 for the only frame before a target, as videos that begin with one frame have that frame twice.
        """
        return (self.targets.unsqueeze(1) - 1 - self.conditions).clamp(min=1)

    @property
    def frames(self) -> Tensor:
        """Return the numbers of target, reference and conditions: int64 (N, 2 + k)."""
        targets = self.targets.unsqueeze(1)
        return torch.cat([targets, targets - 1, self.conditions], dim=1)

    def pick(self, clips: Tensor) -> Tensor:
        """Return those frames of clips: (N, T, ...) -> (N, 2 + k, ...)."""
        rows = torch.arange(len(clips), device=clips.device).unsqueeze(1)
        return clips[rows, self.frames.to(clips.device)]

    def to(self, device: torch.device | str) -> Sample:
        """Return the sample on a device."""
        parts = (self.targets, self.conditions, self.noise, self.t)
        return Sample(*(misc.upload(part, device) for part in parts))


def draw_sample(
    rngs: Sequence[np.random.RandomState], first: int, num_frames: int, num_conditions: int, shape: Sequence[int],
    law: str = "uniform",
) -> Sample:  # fmt: skip
    """Draw a sample of clips of `num_frames`, one generator a clip: targets uniform in [first, num_frames).

    Conditions are uniform over the frames before the reference. `shape` is that of a frame's latents.
    """
    targets, conditions, noise, times = [], [], [], []
    for rng in rngs:
        target = rng.randint(first, num_frames)
        drawn = rng.randint(0, max(target - 1, 1), num_conditions)
        targets.append(target)
        conditions.append(np.sort(drawn)[::-1])
        noise.append(rng.standard_normal(tuple(shape)).astype(np.float32))
        times.append(flow.draw_time(rng, law))
    return Sample(
        torch.tensor(targets), torch.from_numpy(np.array(conditions, np.int64)), torch.from_numpy(np.array(noise)),
        torch.tensor(times, dtype=torch.float32),
    )  # fmt: skip


def published_sample(generator: torch.Generator, num_frames: int, batch: int, shape: Sequence[int]) -> Sample:
    """Draw a sample in the order of the release, by torch's generator: targets from 2 on, one condition a clip."""
    targets = torch.randint(2, num_frames, (batch,), generator=generator)
    conditions = [torch.randint(0, int(target) - 1, (1,), generator=generator) for target in targets]
    noise = torch.randn((batch, *shape), generator=generator)
    t = torch.rand((batch, 1, 1, 1), generator=generator)
    return Sample(targets, torch.stack(conditions), noise, t.flatten())


def flow_losses(
    field: VectorField, picked: Tensor, sample: Sample, sigma: float = flow.SIGMA, actions: Tensor | None = None,
    has_action: Tensor | None = None, drop: Dropout | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the mean squared error of the velocity of each clip (N,), the velocity, and the true one.

    `picked` are the latents of `sample.frames`: (N, 2 + k, C, h, w). Actions are those that lead into the target.
    """
    data, reference, conditions = picked[:, 0], picked[:, 1], picked[:, 2:]
    x_t = flow.interpolate(sample.noise, data, sample.t.view(-1, 1, 1, 1), sigma)
    v = field(x_t, reference, conditions, sample.distances, sample.t, actions, has_action, drop)
    target = flow.velocity(sample.noise, data, sigma)
    return (v - target).square().mean((1, 2, 3)), v, target


class ClipDropout:
    """Dropout whose masks are drawn for each clip by a generator of its own, so that other clips do not change them."""

    def __init__(self, rate: float, generators: Sequence[torch.Generator]):
        self.rate, self.generators = rate, generators

    def __call__(self, x: Tensor) -> Tensor:
        """Set a share of the entries to zero and enlarge the others: (N, ...) -> (N, ...)."""
        mask = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for row, generator in zip(mask, self.generators, strict=True):
            row.bernoulli_(1 - self.rate, generator=generator)
        return x * mask.mul_(1 / (1 - self.rate))
