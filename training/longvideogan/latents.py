"""Where the low-resolution generator's w comes from: numbered noise, and what may be done to it on the way.

Everything here is a function of the frame number alone, so it is the same for every start and every division into
pieces. What is done acts on the embedding, which is linear in the noise: it can be interpolated in time (slow motion),
mixed between seeds, or made periodic, and with the right weights keeps unit variance, which the network was trained on.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from training import random
from training.longvideogan.lres.generator import TEMPORAL_PADDING, LowResGenerator
from training.random import random_state

AVERAGE_SAMPLES = 1024  # embeddings whose mean w truncation pulls towards; leaves 3 % of w's deviation
AVERAGE_BATCH = 64
noise_blocks = functools.partial(random.noise_blocks, "lres-noise")  # (seed, channels, start, samples)
LEGACY_SEGMENT = 16  # frames; the published command rounds the length of a video up to a multiple


class Latents:
    """w of N videos, by frames counted from each video's origin, which must lie at a multiple of the temporal scale.

    `keys` are (seed, frame): from its own seed at frame 0 each video turns into that seed's at that frame, and so on
    in ascending order, by weights on a circle, which keep the variance of a sum of independent embeddings. `loop` is
    a period in frames; it and `temporal_scale` are those of `sampling.Sampling`.
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
        self.period = None if loop is None else round(loop * temporal_scale)  # of the noise
        self.seeds = [list(seeds), *([seed] * len(self.origins) for seed, _ in keys)]  # per key, per video
        self.key_frames = [0, *(frame for _, frame in keys)]

    def embedding(self, start: int, stop: int) -> Tensor:
        """Embeddings of frames [start, stop): (N, embedding channels, stop - start)."""
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
        """How much of each key the videos have at `frames` (N, T): (keys, N, T), unit length along keys.

        Where two neighbouring keys are one seed the video stays as it is, since a sum of equal embeddings would grow.
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
        """Embeddings of one seed per video at `frames` (N, T), which follow each other: (N, embedding channels, T)."""
        if self.temporal_scale == 1:
            return self.samples(seeds, frames[:, 0], frames.shape[1])
        times = (frames if self.loop is None else frames % self.loop) * self.temporal_scale
        # A loop's seam is undone, so that the samples to interpolate follow each other too.
        if self.loop is not None:
            times = times + (frames // self.loop - frames[:, :1] // self.loop) * self.period
        whole = np.floor(times).astype(np.int64)
        firsts = whole[:, 0] - 1
        samples = self.samples(seeds, firsts, int((whole[:, -1] - firsts).max()) + 3)
        u = torch.from_numpy(times - whole).to(samples).unsqueeze(1)  # N 1 T
        # Cubic interpolation by Lagrange: its error at the highest pitch of the published embedding is below 1e-5.
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
        """Embedding samples [first, first + count) of one seed and one first per video, at the noise's own pace."""
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
        """Noise samples [start, start + count), of which every `period` repeat: (noise channels, count)."""
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
        """w of frames [start, stop): (N, w channels, stop - start)."""
        return self.network.latent_mapping(self.embedding(start, stop))


class LegacyLatents:
    """w of N videos whose noise was drawn whole: (N, noise channels, num_noise_frames(length)), from frame 0."""

    def __init__(self, network: LowResGenerator, noise: Tensor):
        self.network, self.noise = network, noise
        self.num_taps = network.temporal_emb.blur_filters.shape[2]

    @torch.no_grad()
    def __call__(self, start: int, stop: int) -> Tensor:
        """w of frames [start, stop): (N, w channels, stop - start)."""
        first = start + TEMPORAL_PADDING * self.network.temporal_scale
        last = first + stop - start + self.num_taps - 1
        # Beyond the noise there are zeros; the video does not depend on them, only samples that it drops do.
        noise = self.noise[:, :, max(first, 0) : max(last, 0)]
        before = min(max(-first, 0), last - first)
        noise = torch.nn.functional.pad(noise, [before, last - first - before - noise.shape[2]])
        return self.network.latent_mapping(self.network.temporal_emb(noise))


def periodic_gains(filters: Tensor, period: int) -> Tensor:
    """What brings each of (filters, taps) back to the variance that it has on white noise, on noise of `period`.

    Taps a period apart meet the same noise, so what counts is the norm of their sums; without this a filter longer
    than the loop would be several times too loud.
    """
    folded = torch.nn.functional.pad(filters, [0, -filters.shape[1] % period]).unflatten(1, (-1, period)).sum(dim=1)
    return filters.norm(dim=1) / folded.norm(dim=1)


def legacy_draws(network: LowResGenerator, seeds: Sequence[int], length: int, z_channels: int) -> tuple[Tensor, Tensor]:
    """The published draws of each seed's video, in order: noise of the whole `length`, then z (N, z_channels).

    Each seed has one `torch.Generator` on the network's device. Published videos came from the generator of a CUDA
    device; that of a CPU draws other numbers, and so shows other videos.
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
    """The mean of w over independent embeddings, the same for every use of a network: (w channels, 1)."""
    bank = network.temporal_emb
    taps = (bank.blur_filters * bank.output_scale.movedim(1, 0)).squeeze(1).t()  # (taps, filters)
    shape = (AVERAGE_BATCH, network.noise_channels, len(taps))
    total = torch.zeros_like(network.latent_mapping.layer_1.bias)
    for index in range(AVERAGE_SAMPLES // AVERAGE_BATCH):
        noise = random_state("lres-w-average", 0, index).standard_normal(shape).astype(np.float32)
        total += network.latent_mapping((torch.from_numpy(noise).to(taps) @ taps).flatten(1)).sum(dim=0)
    return (total / AVERAGE_SAMPLES).unsqueeze(1)
