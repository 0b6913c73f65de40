"""Compute the low-resolution generator's w from indexed noise blocks, with optional time stretch, blending and loops.

Everything here is a function of the frame number only, independent of the start and of the division into pieces. The
operations act on the embedding, which is linear in the noise: it can be interpolated in time (slow motion), blended
between seeds, or made periodic, with weights that preserve the unit variance of training.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from training import random
from training.longvideogan.lres.generator import TEMPORAL_PADDING, LowResGenerator
from training.random import random_state

AVERAGE_SAMPLES = 1024  # number of embeddings whose mean w truncation uses; its error is 3 % of w's standard deviation
AVERAGE_BATCH = 64
noise_blocks = functools.partial(random.noise_blocks, "lres-noise")  # (seed, channels, start, samples)
LEGACY_SEGMENT = 16  # frames; the published command rounds the length of a video up to a multiple of this


class Latents:
    """w of N videos, by frames counted from each video's origin, which must be a multiple of the temporal scale.

    `keys` are (seed, frame): each video is blended from its own seed at frame 0 to that seed at that frame, and so on
    in ascending order, with weights on a circle, which preserve the variance of a sum of independent embeddings. `loop`
    is a period in frames; it and `temporal_scale` are those of `sampling.Sampling`.
    """

    def __init__(
        self,
        network: LowResGenerator,
        seeds: Sequence[int],
        origins: Sequence[int],
        temporal_scale: float = 1.0,
        keys: Sequence[tuple[int, int]] = (),
        loop: int | None = None,
    ):
        self.network, self.origins = network, list(origins)
        self.num_taps = network.temporal_emb.blur_filters.shape[2]
        self.temporal_scale, self.loop = temporal_scale, loop
        self.period = None if loop is None else round(loop * temporal_scale)  # in noise samples
        self.seeds = [list(seeds), *([seed] * len(self.origins) for seed, _ in keys)]  # per key, per video
        self.key_frames = [0, *(frame for _, frame in keys)]

    def embedding(self, start: int, stop: int) -> Tensor:
        """Return the embeddings of frames [start, stop): (N, embedding channels, stop - start)."""
        frames = np.add.outer(self.origins, np.arange(start, stop))  # N T
        total: Tensor | None = None
        for seeds, weights in zip(self.seeds, self.weights(frames), strict=True):
            if not weights.any():
                continue
            term = self.unmixed(seeds, frames)
            if len(self.seeds) > 1:
                term = term * torch.from_numpy(weights).to(term).unsqueeze(1)
            total = term if total is None else total + term
        assert total is not None
        return total

    def weights(self, frames: np.ndarray) -> np.ndarray:
        """Return the blending weights of the keys at `frames` (N, T): (keys, N, T), with unit norm along keys.

        If two adjacent keys have the same seed the first weight stays 1, since a sum of equal embeddings would grow.
        """
        weights = np.zeros((len(self.seeds), *frames.shape))
        segment = (np.searchsorted(self.key_frames, frames, side="right") - 1).clip(0)
        for key, first in enumerate(self.key_frames):
            inside = segment == key
            if key + 1 == len(self.key_frames):
                weights[key][inside] = 1
                break
            moves = np.array([a != b for a, b in zip(self.seeds[key], self.seeds[key + 1], strict=True)])
            progress = ((frames - first) / (self.key_frames[key + 1] - first)).clip(0) * moves[:, None]
            angle = progress[inside] * (np.pi / 2)
            weights[key][inside], weights[key + 1][inside] = np.cos(angle), np.sin(angle)
        return weights

    def unmixed(self, seeds: Sequence[int], frames: np.ndarray) -> Tensor:
        """Return the embeddings of one seed per video at consecutive `frames` (N, T): (N, embedding channels, T)."""
        if self.temporal_scale == 1:
            return self.samples(seeds, frames[:, 0], frames.shape[1])
        times = (frames if self.loop is None else frames % self.loop) * self.temporal_scale
        # Unwrap the loop, so that the samples to interpolate are consecutive.
        if self.loop is not None:
            times = times + (frames // self.loop - frames[:, :1] // self.loop) * self.period
        whole = np.floor(times).astype(np.int64)
        firsts = whole[:, 0] - 1
        samples = self.samples(seeds, firsts, int((whole[:, -1] - firsts).max()) + 3)
        u = torch.from_numpy(times - whole).to(samples).unsqueeze(1)  # N 1 T
        # Cubic Lagrange interpolation: its error at the highest frequency of the published embedding is below 1e-5.
        cubic = (
            -u * (u - 1) * (u - 2) / 6,
            (u + 1) * (u - 1) * (u - 2) / 2,
            -(u + 1) * u * (u - 2) / 2,
            (u + 1) * u * (u - 1) / 6,
        )
        at = torch.from_numpy(whole - firsts[:, None] - 1).to(samples.device).unsqueeze(1)
        at = at.expand(-1, samples.shape[1], -1)
        return torch.stack([samples.gather(2, at + tap) * weight for tap, weight in enumerate(cubic)]).sum(dim=0)

    def samples(self, seeds: Sequence[int], firsts: Sequence[int] | np.ndarray, count: int) -> Tensor:
        """Return embedding samples [first, first + count) at temporal scale 1; one seed and one first per video."""
        lead = TEMPORAL_PADDING * self.network.temporal_scale
        noise = np.stack(
            [
                self.noise(seed, int(first) + lead, count + self.num_taps - 1)
                for seed, first in zip(seeds, firsts, strict=True)
            ]
        )
        bank = self.network.temporal_emb
        embedding = bank(torch.from_numpy(noise).to(bank.blur_filters))
        if self.period is not None and self.period < self.num_taps:
            gains = periodic_gains(bank.blur_filters.squeeze(1), self.period)
            embedding = embedding * gains.repeat(self.network.noise_channels)[:, None]
        return embedding

    def noise(self, seed: int, start: int, count: int) -> np.ndarray:
        """Return noise samples [start, start + count), periodic in `period`: (noise channels, count)."""
        channels = self.network.noise_channels
        if self.period is None:
            return noise_blocks(seed, channels, start, count)
        pieces, stop = [], start + count
        while start < stop:
            phase = start % self.period
            length = min(stop - start, self.period - phase)
            pieces.append(noise_blocks(seed, channels, phase, length))
            start += length
        return np.concatenate(pieces, axis=1)

    @torch.no_grad()
    def __call__(self, start: int, stop: int) -> Tensor:
        """Return w of frames [start, stop): (N, w channels, stop - start)."""
        return self.network.latent_mapping(self.embedding(start, stop))


class LegacyLatents:
    """w of N videos from noise of the whole video: (N, noise channels, num_noise_frames(length)), from frame 0."""

    def __init__(self, network: LowResGenerator, noise: Tensor):
        self.network, self.noise = network, noise
        self.num_taps = network.temporal_emb.blur_filters.shape[2]

    @torch.no_grad()
    def __call__(self, start: int, stop: int) -> Tensor:
        """Return w of frames [start, stop): (N, w channels, stop - start)."""
        first = start + TEMPORAL_PADDING * self.network.temporal_scale
        last = first + stop - start + self.num_taps - 1
        # The noise is zero-padded; only samples that the video drops depend on the padding.
        noise = self.noise[:, :, max(first, 0) : max(last, 0)]
        before = min(max(-first, 0), last - first)
        noise = torch.nn.functional.pad(noise, [before, last - first - before - noise.shape[2]])
        return self.network.latent_mapping(self.network.temporal_emb(noise))


def periodic_gains(filters: Tensor, period: int) -> Tensor:
    """Return gains that restore the white-noise output variance of (filters, taps) on noise of period `period`.

    Taps a period apart multiply the same noise, so the variance is the squared norm of their sums; without the gains
    the output of a filter longer than the loop would be several times too large.
    """
    folded = torch.nn.functional.pad(filters, [0, -filters.shape[1] % period]).unflatten(1, (-1, period)).sum(dim=1)
    return filters.norm(dim=1) / folded.norm(dim=1)


def legacy_draws(network: LowResGenerator, seeds: Sequence[int], length: int, z_channels: int) -> tuple[Tensor, Tensor]:
    """Draw the published noise of each seed's video, in order: noise of the whole `length`, then z (N, z_channels).

    Each seed has one `torch.Generator` on the network's device. Published videos used the generator of a CUDA device;
    that of a CPU draws other numbers, and so gives other videos.
    """
    like = network.spatial_input
    noise, z = [], []
    for seed in seeds:
        generator = torch.Generator(like.device).manual_seed(seed)
        shape = (1, network.noise_channels, network.num_noise_frames(length))
        noise.append(torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype))
        z.append(torch.randn((1, z_channels), generator=generator, device=like.device, dtype=like.dtype))
    return torch.cat(noise), torch.cat(z)


@torch.no_grad()
def average_w(network: LowResGenerator) -> Tensor:
    """Return the mean of w over independent embeddings, the same for every use of a network: (w channels, 1)."""
    bank = network.temporal_emb
    taps = (bank.blur_filters * bank.output_scale.movedim(1, 0)).squeeze(1).t()  # (taps, filters)
    shape = (AVERAGE_BATCH, network.noise_channels, len(taps))
    total = torch.zeros_like(network.latent_mapping.layer_1.bias)
    for index in range(AVERAGE_SAMPLES // AVERAGE_BATCH):
        noise = random_state("lres-w-average", 0, index).standard_normal(shape).astype(np.float32)
        total += network.latent_mapping((torch.from_numpy(noise).to(taps) @ taps).flatten(1)).sum(dim=0)
    return (total / AVERAGE_SAMPLES).unsqueeze(1)
