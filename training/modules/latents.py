"""Latents of frames as systems model them: their scale, frames to latents and back, and the code of a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_utils import distributed
from training.modules.autoencoder import Autoencoder

TIME_SCALE = 200.0


def time_code(t: Tensor, width: int) -> Tensor:
    """Return cosines and sines of 200 t at falling frequencies: (N,) -> (N, width); an odd width ends with zero."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10000) / half))
    angles = (TIME_SCALE * t.float()).unsqueeze(1) * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, width % 2))


class LatentScale(nn.Module):
    """Mean and standard deviation of each channel of the latents, by which they are normalised; at first 0 and 1."""

    mean: Tensor
    std: Tensor
    measured: Tensor

    def __init__(self, channels: int = 4):
        super().__init__()
        self.options = {"channels": channels}
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.register_buffer("measured", torch.zeros((), dtype=torch.int64))

    def set(self, mean: Tensor, std: Tensor) -> None:
        """Take the mean and the standard deviation of each channel, (C,); where nothing varies, 1."""
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6, std, 1.0))
        self.measured.fill_(1)

    @torch.no_grad()
    def measure(self, z: Tensor) -> None:
        """Take the mean and the standard deviation of latents (N, T, C, h, w), over all ranks."""
        values = z.movedim(2, 0).flatten(1).double()
        sums = torch.stack([values.sum(1), values.square().sum(1), torch.full_like(values[:, 0], values.shape[1])])
        total, squares, count = distributed.all_reduce_sum(sums)
        mean = total / count
        self.set(mean, (squares / count - mean.square()).clamp(min=1e-12).sqrt())

    def normalise(self, z: Tensor) -> Tensor:
        """Return latents (..., C, h, w) with mean 0 and standard deviation 1 over the training data."""
        return (z - self.mean[:, None, None]) / self.std[:, None, None]

    def restore(self, z: Tensor) -> Tensor:
        """Undo `normalise`."""
        return z * self.std[:, None, None] + self.mean[:, None, None]


class LatentVideo:
    """Frames to latents and back, by a frozen tokenizer and the scale of its latents."""

    def __init__(self, tokenizer: Autoencoder, scale: LatentScale):
        self.tokenizer, self.scale = tokenizer, scale

    def encode(self, video: Tensor) -> Tensor:
        """Return the normalised latents before quantization: (N, 3, T, H, W) in [-1, 1] -> (N, T, C, h, w)."""
        return self.scale.normalise(self.tokenizer.latents(video).transpose(1, 2))

    def decode(self, z: Tensor) -> Tensor:
        """Quantize and decode latents: (N, T, C, h, w) -> (N, 3, T, H, W)."""
        return self.tokenizer.decode_latents(self.scale.restore(z).transpose(1, 2))

    def for_decoding(self) -> LatentVideo:
        """Return the same with a network that is faster at decoding one frame after another, where there is one."""
        return LatentVideo(self.tokenizer.decoding_copy(), self.scale)
