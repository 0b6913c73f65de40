"""Prediction of latents, one frame after the other (Davtyan et al., ICCV 2023, section 3.2).

The latents of the next frame are the end of a path from noise along the velocity field, which sees the newest frame
(the reference) and one or more of the older ones (conditions), drawn at random again and again while it is integrated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from torch_utils import misc
from training.generation import flow
from training.modules.latents import LatentVideo
from training.random import random_state
from training.river.networks import VectorField

RESAMPLE = ("eval", "step", "frame")


@dataclass(frozen=True)
class Integration:
    """How the path to the next frame is integrated."""

    solver: str = "rk4"
    grid: tuple[float, ...] = (0.0, 1.0)  # its first point is the share of the reference in the beginning
    resample: str = "eval"  # when conditions are drawn: at every evaluation, step or frame
    past_horizon: int = -1  # the newest latents of which conditions are drawn; -1: all
    guidance: float = 1.0  # weight of the actions: v(none) + guidance (v(actions) - v(none))
    legacy: bool = False  # the released rule for the oldest condition, which `oldest` describes
    sigma: float = flow.SIGMA

    @property
    def evaluations(self) -> int:
        """Return how often the network is evaluated for a frame."""
        twice = 2 if self.guidance not in (0.0, 1.0) else 1
        return twice * flow.evaluations(self.solver, len(self.grid) - 1)


class Draws(Protocol):
    """The random numbers of one frame, for N videos."""

    def noise(self, shape: Sequence[int]) -> np.ndarray:
        """Return standard normal numbers: (N, *shape)."""
        ...

    def indices(self, low: int, high: int, count: int) -> np.ndarray:
        """Return whole numbers in [low, high): int64 (N, count)."""
        ...


class SeededDraws:
    """Numbers of seeds and the number of a frame: independent of the videos beside it and the frames before it."""

    def __init__(self, seeds: Sequence[int], frame: int):
        self.rngs = [random_state("river", seed, frame) for seed in seeds]

    def noise(self, shape: Sequence[int]) -> np.ndarray:
        """See `Draws.noise`."""
        return np.stack([rng.standard_normal(tuple(shape)) for rng in self.rngs])

    def indices(self, low: int, high: int, count: int) -> np.ndarray:
        """See `Draws.indices`."""
        return np.stack([rng.randint(low, high, count) for rng in self.rngs])


class StreamDraws:
    """Numbers of two streams in the order of use, shared by all videos and frames."""

    def __init__(self, noise: np.random.RandomState, indices: np.random.RandomState, num_videos: int):
        self.noise_rng, self.index_rng, self.num_videos = noise, indices, num_videos

    def noise(self, shape: Sequence[int]) -> np.ndarray:
        """See `Draws.noise`."""
        return self.noise_rng.standard_normal((self.num_videos, *shape))

    def indices(self, low: int, high: int, count: int) -> np.ndarray:
        """See `Draws.indices`."""
        return np.stack([self.index_rng.randint(low, high, self.num_videos) for _ in range(count)], axis=1)


def oldest(num_latents: int, horizon: int, legacy: bool = False) -> int:
    """Return the number of the oldest latent that may be a condition, of `num_latents` so far.

    With a horizon H, conditions are among the newest H, the reference included. `legacy` is the released rule, which
    has the minimum where the maximum is meant: a horizon up to the number of latents does nothing, and a longer one
    gives negative numbers, which count from the end.
    """
    if horizon < 0:
        return 0
    if legacy:
        return min(0, num_latents - horizon)
    return min(max(0, num_latents - horizon), num_latents - 2)


class Past:
    """The latents of a video so far, (N, C, h, w) each; with a limit the newest alone are kept."""

    def __init__(self, latents: Sequence[Tensor], limit: int | None = None):
        self.latents, self.limit, self.num_dropped = list(latents), limit, 0
        self._trim()

    def __len__(self) -> int:
        return self.num_dropped + len(self.latents)

    def append(self, z: Tensor) -> None:
        """Add the latents of the next frame."""
        self.latents.append(z)
        self._trim()

    def _trim(self) -> None:
        surplus = 0 if self.limit is None else max(len(self.latents) - self.limit, 0)
        del self.latents[:surplus]
        self.num_dropped += surplus


class Conditions:
    """Conditioning frames of the next frame, and how many frames each lies before the reference.

    Drawing raises `IndexError` for numbers of latents that are not there.
    """

    def __init__(self, past: Past, draws: Draws, count: int, settings: Integration):
        self.stacked, self.first, self.total = torch.stack(past.latents, dim=1), past.num_dropped, len(past)
        self.draws, self.count = draws, count
        self.low = oldest(self.total, settings.past_horizon, settings.legacy)
        self.high = self.total - 1

    def redraw(self) -> None:
        """Draw others, each uniformly from its range, and order them from new to old."""
        drawn = np.sort(self.draws.indices(self.low, self.high, self.count), axis=1)[:, ::-1].copy()
        numbers = misc.upload(torch.from_numpy(drawn.astype(np.int64)), self.stacked.device)
        rows = torch.arange(len(drawn), device=self.stacked.device).unsqueeze(1)
        self.frames = self.stacked[rows, numbers - self.first]  # (N, count, C, h, w)
        self.distances = self.total - 1 - numbers  # (N, count)


@torch.no_grad()
def next_latents(
    field: VectorField, past: Past, draws: Draws, settings: Integration, actions: Tensor | None = None
) -> Tensor:
    """Return the latents after at least two others, by at most `settings.evaluations` evaluations: (N, C, h, w).

    `actions` are int64 (N,) or float (N, values).
    """
    reference = past.latents[-1]
    conditions = Conditions(past, draws, field.context_frames, settings)
    noise = misc.upload(np.asarray(draws.noise(reference.shape[1:]), np.float32), reference.device, reference.dtype)

    def evaluate(t: float, y: Tensor) -> Tensor:
        if settings.resample == "eval":
            conditions.redraw()
        times = y.new_full((len(y),), t)
        given = actions if settings.guidance != 0 else None
        v = field(y, reference, conditions.frames, conditions.distances, times, given)
        if actions is None or settings.guidance in (0.0, 1.0):
            return v
        without = field(y, reference, conditions.frames, conditions.distances, times)
        return without + settings.guidance * (v - without)

    if settings.resample == "frame":
        conditions.redraw()
    before_step = conditions.redraw if settings.resample == "step" else None
    begin = flow.interpolate(noise, reference, settings.grid[0], settings.sigma)
    return flow.integrate(evaluate, begin, settings.grid, settings.solver, before_step)


def begin(latents: Tensor, limit: int | None = None) -> Past:
    """Return the past of a video whose context has latents (N, T, C, h, w); a single frame counts twice."""
    frames = list(latents.unbind(1))
    return Past(frames * 2 if len(frames) == 1 else frames, limit)


@torch.no_grad()
def generate_frames(
    field: VectorField, video: LatentVideo, observations: Tensor, num_frames: int, steps: int = 100,
    warm_start: float = 0.0, past_horizon: int = -1, *, solver: str = "rk4", resample: str = "eval",
    draws: Draws | None = None, seed: int = 0, legacy: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Tensor:  # fmt: skip
    """Continue clips as the release does, all in memory: (B, n, 3, H, W) in [-1, 1] -> (B, n + num_frames, 3, H, W).

    `steps` counts points of the grid on [0, 1], so that rk4 takes 4 (steps - 1) evaluations a frame; with `warm_start`
    w, int((1 - w) steps) points on [w, 1] are left. The frames of the context are returned as the tokenizer
    reconstructs them. Conditions are drawn from the newest `past_horizon` latents, all if it is negative. `draws` gives
    the random numbers, by default those of `seed`. `legacy` has the horizon of the release, with its fault.

    Raises `ValueError` if the grid has no points.
    """
    points = flow.published_points(steps, warm_start)
    grid = tuple(flow.time_grid(points, warm_start))
    settings = Integration(solver, grid, resample, past_horizon, legacy=legacy)
    rng = np.random.RandomState(seed)
    draws = draws or StreamDraws(rng, rng, len(observations))
    past = begin(video.encode(observations.transpose(1, 2)))
    for number in range(num_frames):
        past.append(next_latents(field, past, draws, settings))
        if progress is not None:
            progress(number + 1)
    num_kept = observations.shape[1] + num_frames
    return video.decode(torch.stack(past.latents[-num_kept:], dim=1)).transpose(1, 2)
