"""Layers shared by the low-resolution and super-resolution networks.

LongVideoGAN: Brooks et al., "Generating Long Videos of Dynamic Scenes", NeurIPS 2022. Weights use an equalised
learning rate (Karras et al. 2018): parameters are stored as N(0, 1) and scaled by 1 / sqrt(fan in) when used.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from torch_utils import distributed, misc, persistence
from torch_utils.ops import bias_act, upfirdn2d
from torch_utils.precision import HALF_FORMATS as HALF_FORMATS
from torch_utils.precision import MixedPrecision as MixedPrecision

CLAMP = 256.0  # published limit of every activation; prevents overflow in half precision


def kaiser_lowpass(num_taps: int, cutoff: float, width: float, sampling_rate: float) -> Tensor:
    """Return a windowed-sinc low-pass filter with a Kaiser window and unit DC gain: float32 (num_taps,).

    `cutoff` and the transition `width` are in the units of `sampling_rate` (StyleGAN3, appendix C). The taps equal
    those of `scipy.signal.firwin` bit for bit; importing SciPy would take as long as loading both networks.
    """
    return torch.as_tensor(_lowpass_taps(num_taps, cutoff, width, sampling_rate), dtype=torch.float32)


@functools.lru_cache(maxsize=512)  # a network that is loaded is made twice, first without memory
def _lowpass_taps(num_taps: int, cutoff: float, width: float, sampling_rate: float) -> np.ndarray:
    """Return the filter of `kaiser_lowpass`: float64 (num_taps,)."""
    cutoff, width = 2 * cutoff / sampling_rate, 2 * width / sampling_rate  # as fractions of the Nyquist frequency
    attenuation = 2.285 * (num_taps - 1) * np.pi * width + 7.95  # in dB; both formulas are Kaiser's
    beta = 0.0
    if attenuation > 50:
        beta = 0.1102 * (attenuation - 8.7)
    elif attenuation > 21:
        beta = 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21)
    offset = np.arange(num_taps) - (num_taps - 1) / 2
    taps = cutoff * np.sinc(cutoff * offset) * np.kaiser(num_taps, beta)
    return taps / taps.sum()


def normalize_second_moment(x: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Scale to unit root mean square along `dim`."""
    return x * (x.square().mean(dim=dim, keepdim=True) + eps).rsqrt()


def center_crop(x: Tensor, dim: int, size: int) -> Tensor:
    """Keep the central `size` samples of axis `dim`; of an odd surplus the extra sample is dropped at the end."""
    have = x.shape[dim]
    assert have >= size, f"cannot crop {have} samples to {size}"
    return x if have == size else x.narrow(dim, (have - size) // 2, size)


class Reading(NamedTuple):
    """The mean of `count` values, collected for the update of a running average."""

    average: Tensor
    mean: Tensor
    count: int
    beta: float


class Tracker(nn.Module):
    """A module with running averages in buffers, updated immediately unless readings are collected."""

    readings: list[Reading] | None = None  # a list inside `collect_magnitudes`

    @torch.no_grad()
    def track(self, average: Tensor, mean: Tensor, count: int, beta: float) -> None:
        """Update `average` in place towards the mean over all ranks of `mean`, of the same shape and over `count`
        values.
        """
        if self.readings is not None:
            self.readings.append(Reading(average, mean, count, beta))
        else:
            average.copy_(distributed.all_reduce_mean(mean).lerp(average, beta))

    @torch.no_grad()
    def track_magnitude(self, magnitude_ema: Tensor, x: Tensor, beta: float) -> None:
        """Update the running mean square `magnitude_ema` () towards that of `x`."""
        self.track(magnitude_ema, x.detach().to(magnitude_ema.dtype).square().mean(), x.numel(), beta)


@contextlib.contextmanager
def collect_magnitudes(network: nn.Module) -> Iterator[None]:
    """Defer the updates of the running averages of `network` to the end of the block, and update each of them once.

    The update uses the mean over all calls and all ranks, so it does not depend on the number of calls into which a
    batch is divided. The averages do not change if the block raises.
    """
    trackers = [module for module in network.modules() if isinstance(module, Tracker)]
    for tracker in trackers:
        tracker.readings = []
    try:
        yield
        readings = [tracker.readings for tracker in trackers if tracker.readings]
    finally:
        for tracker in trackers:
            del tracker.readings
    if not readings:
        return
    # One collective for all of them; counts of values exceed what single precision represents exactly.
    sums = [torch.stack([mean.double() * count for _, mean, count, _ in seen]).sum(dim=0) for seen in readings]
    counts = np.array([float(sum(reading.count for reading in seen)) for seen in readings])
    counts = misc.upload(counts, sums[0].device, sums[0].dtype)
    total = distributed.all_reduce_sum(torch.cat([counts, *(value.flatten() for value in sums)]))
    counts, *means = total.split([len(readings), *(value.numel() for value in sums)])
    for (average, _, _, beta), count, mean in zip([seen[0] for seen in readings], counts, means, strict=True):
        mean = (mean / count).reshape(average.shape).to(average.dtype)
        average.copy_(mean.lerp(average, beta))


@persistence.persistent_class
class FullyConnectedLayer(nn.Module):
    """Dense layer with equalised learning rate, on (N, in_features) or on every sample of (N, in_features, T)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: str = "linear",
        bias_init: float = 0.0,
        lr_multiplier: float = 1.0,
    ):
        super().__init__()
        self.activation = activation
        self.lr_multiplier = lr_multiplier
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full([out_features], bias_init / lr_multiplier))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_features[, T]) to (N, out_features[, T])."""
        weight = self.weight * (self.lr_multiplier / self.weight.shape[1] ** 0.5)
        bias = self.bias * self.lr_multiplier if self.lr_multiplier != 1 else self.bias
        y = x.movedim(1, -1) @ weight.t()  # (N[, T], out)
        y = bias_act.bias_act(y, bias, dim=y.ndim - 1, act=self.activation)
        return y.movedim(-1, 1)


def column_filter(taps: Tensor) -> Tensor:
    """Reshape (k,) to (k, 1): a filter along the first of an image's two axes only."""
    return taps.unsqueeze(1)


@persistence.persistent_class
class Upsample(nn.Module):
    """Bilinear x2 upsampling of time or of height and width, with zero padding (so borders are attenuated)."""

    filter: Tensor

    def __init__(self, temporal: bool):
        super().__init__()
        self.temporal = temporal
        self.register_buffer("filter", torch.tensor([0.125, 0.375, 0.375, 0.125]))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, T, H, W) to (N, C, 2T, H, W) or (N, C, T, 2H, 2W)."""
        return resample_time(x, self.filter, up=2) if self.temporal else resample_space(x, self.filter, up=2)


def resample_time(x: Tensor, taps: Tensor, up: int = 1, down: int = 1) -> Tensor:
    """Resample time by a 1-D FIR filter: (N, C, T[, H, W]) -> (N, C, T up / down[, H, W])."""
    flat = x.flatten(3) if x.ndim > 3 else x.unsqueeze(3)  # N C T HW
    if up > 1:
        flat = upfirdn2d.upsample2d(flat, column_filter(taps), up=[1, up])
    if down > 1:
        flat = upfirdn2d.downsample2d(flat, column_filter(taps), down=[1, down])
    return flat.unflatten(3, x.shape[3:]) if x.ndim > 3 else flat.squeeze(3)


def resample_space(x: Tensor, taps: Tensor, up: int = 1, down: int = 1) -> Tensor:
    """Resample height and width by the same 1-D FIR filter: (N, C, T, H, W) -> (N, C, T, H up / down, W up / down)."""
    flat = x.flatten(1, 2)  # N CT H W
    if up > 1:
        flat = upfirdn2d.upsample2d(flat, taps, up=up)
    if down > 1:
        flat = upfirdn2d.downsample2d(flat, taps, down=down)
    return flat.unflatten(1, x.shape[1:3])


def pad_to_square(x: Tensor) -> Tensor:
    """Zero-pad the shorter of the last two axes symmetrically: (..., H, W) -> (..., E, E) with E = max(H, W)."""
    height, width = x.shape[-2:]
    pad_y, pad_x = max(width - height, 0) // 2, max(height - width, 0) // 2
    return nn.functional.pad(x, [pad_x, pad_x, pad_y, pad_y])


def check_square_padding(what: str, height: int, width: int) -> None:
    """Raise ValueError for a size that `pad_to_square` cannot make square."""
    if (height - width) % 2:
        raise ValueError(
            f"{what} of {height}x{width}: height and width must differ by an even number of pixels; "
            f"use {height + 1}x{width} or {height - 1}x{width}"
        )


def log_uniform(low: float, high: float, num: int) -> np.ndarray:
    """Return `num` values from `low` to `high`, equally spaced in their logarithm; both ends exact."""
    values = low * (high / low) ** (np.arange(num) / max(num - 1, 1))
    values[0], values[-1] = low, high
    return values


def as_tuple(values: Sequence[int]) -> tuple[int, ...]:
    """Return a tuple of ints, since options read from JSON are lists."""
    return tuple(int(value) for value in values)
