"""The low-resolution generator: white noise per frame -> a long clip at 36x64 (LongVideoGAN, section 3.1).

Eight channels of white noise are low-passed by a bank of 128 filters of up to 5000 frames, so that the embedding of
a frame has both fast and very slow components. Styles computed from it modulate 3-D convolutions that start at 1/32
of the frame rate and double it five times.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from torch_utils import misc, persistence
from torch_utils.compilation import region
from torch_utils.ops import bias_act, convolution
from torch_utils.safe_pickle import Record
from training.longvideogan.layers import (
    CLAMP,
    FullyConnectedLayer,
    MixedPrecision,
    Tracker,
    Upsample,
    as_tuple,
    center_crop,
    check_square_padding,
    kaiser_lowpass,
    log_uniform,
    normalize_second_moment,
    resample_time,
)

TEMPORAL_PADDING = 8  # padding at each end of every temporal level, in samples of that level
KERNEL = 3  # taps of every convolution along each axis it covers
SPACE_DOUBLES_IN = (1, 3)  # temporal blocks that also double height and width


@persistence.persistent_class
class MagnitudeEMA(Tracker):
    """Running mean square of an input, for its normalisation (StyleGAN3, appendix F.1 "EMA input magnitude")."""

    magnitude_ema: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("magnitude_ema", torch.ones([]))

    def forward(self, x: Tensor, beta: float = 1.0) -> Tensor:
        """Return the scalar gain that normalises `x` to unit magnitude; `beta` < 1 first updates the running mean."""
        if beta != 1.0:
            self.track_magnitude(self.magnitude_ema, x, beta)
        return self.magnitude_ema.rsqrt()


@persistence.persistent_class
class TemporalEmbedding(nn.Module):
    """A bank of Kaiser low-pass filters, each applied to every noise channel (section 3.1, "temporal latent").

    Filter b is stored right-aligned in a row of the longest filter's length; trained weights depend on the alignment.
    Rows are scaled to give unit variance from unit-variance noise.
    """

    blur_filters: Tensor
    output_scale: Tensor

    def __init__(self, num_filters: int, min_taps: int, max_taps: int):
        super().__init__()
        if not 2 <= min_taps <= max_taps:
            raise ValueError(
                f"temporal filters from {min_taps} to {max_taps} frames: the shortest must span at least 2 and no more "
                "than the longest; published are 125 to 5000"
            )
        bank = torch.zeros(num_filters, 1, max_taps)
        for row, footprint in zip(bank, log_uniform(min_taps, max_taps, num_filters), strict=True):
            num_taps = math.ceil(footprint)
            row[0, -num_taps:] = kaiser_lowpass(num_taps, cutoff=2.0, width=12.0, sampling_rate=2 * footprint)
        self.register_buffer("output_scale", bank.square().sum(dim=2).rsqrt().reshape(1, num_filters, 1))
        self.register_buffer("blur_filters", bank)

    def forward(self, noise: Tensor) -> Tensor:
        """Map (N, noise channels, E + max_taps - 1) to (N, noise channels * num_filters, E), noise channel major.

        Correlation by FFT: one transform of the noise is shared by all filters, several times faster than the direct
        5000-tap sum and equal to it to 1e-5.
        """
        num_filters, _, num_taps = self.blur_filters.shape
        length = noise.shape[2] - num_taps + 1
        size = fast_fft_size(noise.shape[2])
        taps = self.blur_filters.squeeze(1).to(noise.dtype) * self.output_scale.to(noise.dtype).squeeze(0)
        spectrum = torch.fft.rfft(noise, n=size).unsqueeze(2) * torch.fft.rfft(taps, n=size).conj()
        return torch.fft.irfft(spectrum, n=size)[..., :length].flatten(1, 2)


def fast_fft_size(length: int) -> int:
    """Return the smallest 2^a 3^b 5^c that is at least `length`."""
    best = 1 << (length - 1).bit_length()
    for fives in range(4):
        for threes in range(6):
            odd = 3**threes * 5**fives
            best = min(best, odd << max(math.ceil(length / odd) - 1, 0).bit_length())
    return best


@persistence.persistent_class
class LatentMapping(nn.Module):
    """Per-frame mapping network: embedding -> w; no latent is shared by the whole video."""

    def __init__(self, embedding_channels: int, w_channels: int):
        super().__init__()
        self.layer_0 = FullyConnectedLayer(embedding_channels, w_channels, activation="lrelu", lr_multiplier=0.01)
        self.layer_1 = FullyConnectedLayer(w_channels, w_channels, activation="lrelu", lr_multiplier=0.01)

    def forward(self, embedding: Tensor) -> Tensor:
        """Map (N, embedding channels, T) to (N, w channels, T)."""
        return self.layer_1(self.layer_0(normalize_second_moment(embedding)))


@persistence.persistent_class
class TemporalDownsample(nn.Module):
    """Downsample a sequence of latents by two with a 12-tap Kaiser low-pass."""

    filter: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("filter", kaiser_lowpass(12, cutoff=1.0, width=6.0, sampling_rate=8.0))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, T) to (N, C, T / 2)."""
        return resample_time(x, self.filter, down=2)


class KernelNorms(NamedTuple):
    """The norms of a kernel for demodulation: the squared norm for each (Co, Ci), and the floor (Co, 1)."""

    energy: Tensor
    floor: Tensor


def kernel_norms(weight: Tensor) -> KernelNorms:
    """Return the norms of a kernel (Co, Ci, kt, kh, kw), each computed in one pass."""
    rows = weight.flatten(1)
    peak = torch.maximum(rows.amax(dim=1), -rows.amin(dim=1))  # largest absolute value
    energy = torch.linalg.vector_norm(weight, dim=[2, 3, 4]).square()
    return KernelNorms(energy, 1e-8 * rows.shape[1] * peak.square().unsqueeze(1))


def demodulation(norms: KernelNorms, style: Tensor) -> Tensor:
    """Return the demodulation factors (N, Co, T) for inputs scaled by `style` (N, Ci, T).

    The published network divides the kernel and the style by their maxima before it adds 1e-8; both cancel except for
    that epsilon, which is rescaled accordingly. It is relative to the largest style of the same frame: relative to that
    of all frames, as published, a frame would depend on the frames that are computed with it.
    """
    energy = style.square()
    epsilon = norms.floor * energy.amax(dim=1, keepdim=True)  # (N, Co, T)
    return (norms.energy @ energy + epsilon).clamp(min=1e-30).rsqrt()


def modulated_conv3d(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    gain: Tensor,
    add: Tensor,
    scale: float = 1.0,
    norms: KernelNorms | None = None,
    pad_time: bool = True,
) -> Tensor:
    """3-D convolution whose input channels are scaled by a time-varying style (section 3.1).

    x (N, Ci, T, H, W), weight (Co, Ci, kt, kh, kw), style (N, Ci, T), scalar gain of x -> (N, Co, T, H, W), times
    `scale`, plus `add`, which has that shape or one that broadcasts to it. The style scales input frames; the
    demodulation uses only the style of the output frame, an approximation for kt > 1 that trained weights depend on.
    `norms` are those of the kernel, for callers that reuse them. Without `pad_time` the kt // 2 frames at each end are
    input only.
    """
    padding = [size // 2 for size in weight.shape[2:]]
    border = 0 if pad_time else padding[0]
    padding[0] -= border
    own = style[:, :, border : style.shape[2] - border]
    factors = demodulation(norms or kernel_norms(weight), own)
    # The style scales the input and the demodulation the output, so the kernel is used unchanged.
    y = convolution.conv3d(
        x * (style * (gain * scale))[..., None, None].to(x.dtype), weight.to(x.dtype), padding=padding
    )
    return torch.addcmul(add.to(y.dtype), y, factors[..., None, None].to(y.dtype))


@persistence.persistent_class
class GeneratorBlock(MixedPrecision):
    """Residual block of two modulated convolutions; resampling follows the sum, then bias and activation."""

    formats = ("bf16",)

    def __init__(
        self, in_channels: int, out_channels: int, w_channels: int, time_kernel: int, time_up: bool, space_up: bool
    ):
        super().__init__()
        kernel = [time_kernel, KERNEL, KERNEL]
        self.weight_0 = nn.Parameter(torch.randn(in_channels, in_channels, *kernel))
        self.weight_1 = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))
        self.weight_skip = nn.Parameter(torch.randn(out_channels, in_channels, 1, 1, 1))
        self.bias_0 = nn.Parameter(torch.zeros(in_channels))
        self.bias_1 = nn.Parameter(torch.zeros(out_channels))
        self.affine_0 = FullyConnectedLayer(w_channels, in_channels, bias_init=1.0)
        self.affine_1 = FullyConnectedLayer(w_channels, in_channels, bias_init=1.0)
        self.input_magnitude_ema_0 = MagnitudeEMA()
        self.input_magnitude_ema_1 = MagnitudeEMA()
        self.temporal_upsample = Upsample(temporal=True) if time_up else nn.Identity()
        self.spatial_upsample = Upsample(temporal=False) if space_up else nn.Identity()

    def forward(self, x: Tensor, w: Tensor, size: Sequence[int], magnitude_ema_beta: float = 1.0) -> Tensor:
        """Map x (N, Cin, T, H, W) and w (N, w channels, T) to (N, Cout, *size): resampled, then centre-cropped."""
        x = x.to(self.feature_dtype(x, self.weight_0))
        gain_0 = self.input_magnitude_ema_0(x, magnitude_ema_beta)
        h = self.hidden(x, w, gain_0)
        gain_1 = self.input_magnitude_ema_1(h, magnitude_ema_beta)
        y = self.residual(x, gain_0, h, w, gain_1)
        return self.finish(center_crop(self.temporal_upsample(y), 2, size[0]), size[1:])

    # Parts for streaming, on other ranges of time ------------------------------------------------------------------

    @region
    def hidden(
        self, x: Tensor, w: Tensor, gain: Tensor, norms: KernelNorms | None = None, pad_time: bool = True
    ) -> Tensor:
        """Return the activated output of the first convolution; see `modulated_conv3d`."""
        bias = self.bias_0[:, None, None, None]
        h = modulated_conv3d(x, self.weight_0, self.affine_0(w), gain, bias, norms=norms, pad_time=pad_time)
        return bias_act.bias_act(h, act="lrelu", clamp=CLAMP)

    @region
    def residual(
        self,
        x: Tensor,
        gain_0: Tensor,
        h: Tensor,
        w: Tensor,
        gain_1: Tensor,
        norms: KernelNorms | None = None,
        pad_time: bool = True,
    ) -> Tensor:
        """Return the sum of the skip path from `x` and the second convolution of `h`, scaled to unit variance."""
        scale = 0.5**0.5  # folded into the weights of both paths at no cost
        skip = convolution.conv3d(x, (self.weight_skip * (gain_0 * (scale * x.shape[1] ** -0.5))).to(x.dtype))
        return modulated_conv3d(h, self.weight_1, self.affine_1(w), gain_1, skip, scale, norms, pad_time)

    @region
    def finish(self, y: Tensor, size: Sequence[int]) -> Tensor:
        """Resample and crop height and width to `size`, and activate."""
        y = self.spatial_upsample(y)
        y = center_crop(center_crop(y, 3, size[0]), 4, size[1])
        return bias_act.bias_act(y, self.bias_1, act="lrelu", clamp=CLAMP)


@persistence.persistent_class
class ToRGB(nn.Module):
    """Modulated 1x1x1 convolution to RGB, without demodulation."""

    def __init__(self, in_channels: int, w_channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, in_channels, 1, 1, 1))
        self.bias = nn.Parameter(torch.zeros(3))
        self.affine = FullyConnectedLayer(w_channels, in_channels, bias_init=1.0)
        self.input_magnitude_ema = MagnitudeEMA()

    def forward(self, x: Tensor, w: Tensor, magnitude_ema_beta: float = 1.0) -> Tensor:
        """Map x (N, C, T, H, W) and w (N, w channels, T) to (N, 3, T, H, W)."""
        gain = self.input_magnitude_ema(x, magnitude_ema_beta) * self.weight.shape[1] ** -0.5
        y = nn.functional.conv3d(x.to(self.weight.dtype) * (self.affine(w) * gain)[..., None, None], self.weight)
        return bias_act.bias_act(y, self.bias, act="linear", clamp=CLAMP)


def check_size(height: int, width: int) -> None:
    """Raise ValueError, naming valid sizes, for a frame size that the low-resolution networks do not support."""
    long, short = max(height, width), min(height, width)
    if long < 16 or long & (long - 1) or short * 4 < long:
        nearest = max(16, 1 << round(math.log2(max(long, 1))))
        raise ValueError(
            f"low-resolution frames of {height}x{width}: the longer edge must be a power of two from 16 and the "
            f"shorter at least a quarter of it; use a longer edge of {nearest}, such as {nearest * 9 // 16}x{nearest}"
        )
    check_square_padding("low-resolution frames", height, width)


@persistence.persistent_class
class LowResGenerator(nn.Module):
    """Noise of any length -> video of any length at low resolution (LongVideoGAN, section 3.1 and appendix A).

    With the default options, parameter names, shapes and outputs are those of the published networks. A number of
    temporal doublings d gives d + 1 temporal blocks and a temporal scale R = 2^d: the network is equivariant to
    shifts of its noise by R frames, which makes exact streaming possible.
    """

    def __init__(
        self,
        height: int = 36,
        width: int = 64,
        embedding_channels: int = 1024,
        num_filters: int = 128,
        min_filter_taps: int = 125,
        max_filter_taps: int = 5000,
        w_channels: int = 1024,
        input_channels: int = 512,
        temporal_channels: Sequence[int] = (512, 512, 512, 512, 256, 256),
        spatial_channels: Sequence[int] = (128, 128, 64, 64),
        output_scale: float = 0.25,
    ):
        super().__init__()
        check_size(height, width)
        self.options: dict[str, Any] = {
            "height": height,
            "width": width,
            "embedding_channels": embedding_channels,
            "num_filters": num_filters,
            "min_filter_taps": min_filter_taps,
            "max_filter_taps": max_filter_taps,
            "w_channels": w_channels,
            "input_channels": input_channels,
            "temporal_channels": (temporal_channels := as_tuple(temporal_channels)),
            "spatial_channels": (spatial_channels := as_tuple(spatial_channels)),
            "output_scale": output_scale,
        }
        self.height, self.width = height, width
        self.output_scale = output_scale
        self.num_temporal_doublings = len(temporal_channels) - 1
        if not 3 <= self.num_temporal_doublings <= 5:
            raise ValueError(
                f"temporal_channels has {len(temporal_channels)} widths: use 4 to 6, for 3 to 5 temporal doublings"
            )
        if embedding_channels % num_filters:
            raise ValueError(
                f"embedding_channels ({embedding_channels}) must be a multiple of num_filters ({num_filters})"
            )
        self.noise_channels = embedding_channels // num_filters
        self.temporal_scale = 2**self.num_temporal_doublings

        num_extra_pairs = max(0, int(math.log2(max(height, width))) - 6)  # beyond 64, more pairs like the last
        spatial_channels = spatial_channels + spatial_channels[-1:] * (2 * num_extra_pairs)
        scales = [max(1, (max(height, width) // 4) >> level) for level in range(3 + len(spatial_channels) // 2)]
        sizes = [(math.ceil(height / scale), math.ceil(width / scale)) for scale in scales]

        self.spatial_input = nn.Parameter(torch.randn(1, input_channels, 1, *sizes[0]))
        self.block_sizes: list[tuple[int, int]] = []  # height and width of each block's output
        level, channels = 0, input_channels
        self.temporal_layers = nn.ModuleList()
        for index, out_channels in enumerate(temporal_channels):
            space_up = index in SPACE_DOUBLES_IN
            level += space_up
            time_up = index < self.num_temporal_doublings
            self.block_sizes.append(sizes[level])
            self.temporal_layers.append(GeneratorBlock(channels, out_channels, w_channels, KERNEL, time_up, space_up))
            channels = out_channels
        self.spatial_layers = nn.ModuleList()
        for index, out_channels in enumerate(spatial_channels):
            level += index % 2 == 0
            space_up = index % 2 == 0 and scales[level] < scales[level - 1]
            self.block_sizes.append(sizes[level])
            self.spatial_layers.append(GeneratorBlock(channels, out_channels, w_channels, 1, False, space_up))
            channels = out_channels
        self.to_rgb = ToRGB(channels, w_channels)
        self.temporal_emb = TemporalEmbedding(num_filters, min_filter_taps, max_filter_taps)
        self.latent_mapping = LatentMapping(embedding_channels, w_channels)
        self.temporal_downsample_latent = TemporalDownsample()
        self.w_to_temp_input = FullyConnectedLayer(w_channels, input_channels)

    # Lengths -----------------------------------------------------------------------------------------------------

    def num_noise_frames(self, num_frames: int) -> int:
        """Return the number of noise samples that `synthesize` needs for `num_frames` frames."""
        scale = self.temporal_scale
        coarse = math.ceil(num_frames / scale) + 2 * TEMPORAL_PADDING
        return scale * coarse + self.temporal_emb.blur_filters.shape[2] - 1

    def level_lengths(self, num_frames: int) -> list[int]:
        """Return the input length of each temporal block, coarsest first, and the output length of the last one."""
        padded = [
            math.ceil(num_frames / 2**level) + 2 * TEMPORAL_PADDING
            for level in range(self.num_temporal_doublings, -1, -1)
        ]
        return [*padded, num_frames]

    # Synthesis ---------------------------------------------------------------------------------------------------

    def style_tracks(self, w: Tensor, num_frames: int) -> list[Tensor]:
        """Downsample w (N, C, E) to one sequence per temporal block, coarsest first, then the one that later layers
        share.
        """
        lengths = self.level_lengths(num_frames)
        tracks = [center_crop(w, 2, lengths[-1]), center_crop(w, 2, lengths[-2])]
        for length in lengths[-3::-1]:
            w = self.temporal_downsample_latent(w)
            tracks.append(center_crop(w, 2, length))
        return tracks[::-1]

    def synthesize(
        self, noise: Tensor, num_frames: int, legacy_alignment: bool = False, magnitude_ema_beta: float = 1.0
    ) -> Tensor:
        """Map noise (N, noise channels, num_noise_frames(num_frames)) to a video (N, 3, num_frames, height, width).

        Frames are nominally in [-1, 1] and not clamped. `legacy_alignment=False` computes whole multiples of the
        temporal scale and drops the tail, so that the style of frame t always comes from the same noise samples; True
        crops every level to the requested length, as the published network does, which shifts styles against features
        by up to half a temporal scale when `num_frames` is not a multiple of it.
        """
        misc.assert_shape(noise, [None, self.noise_channels, self.num_noise_frames(num_frames)])
        length = num_frames if legacy_alignment else self.temporal_scale * math.ceil(num_frames / self.temporal_scale)
        w = self.latent_mapping(self.temporal_emb(noise))  # N C E
        *tracks, frame_track = self.style_tracks(w, length)
        coarse = self.w_to_temp_input(tracks[0])
        x = (coarse[..., None, None] + self.spatial_input) * 0.5**0.5
        lengths = self.level_lengths(length)[1:]
        sizes = iter(self.block_sizes)
        for block, track, out_length in zip(self.temporal_layers, tracks, lengths, strict=True):
            x = block(x, track, (out_length, *next(sizes)), magnitude_ema_beta)
        for block in self.spatial_layers:
            x = block(x, frame_track, (length, *next(sizes)), magnitude_ema_beta)
        video = self.to_rgb(x, frame_track, magnitude_ema_beta) * self.output_scale
        return video[:, :, :num_frames]

    def forward(self, batch_size: int, num_frames: int, generator: np.random.RandomState | None = None) -> Tensor:
        """Return (batch_size, 3, num_frames, height, width) from noise drawn from `generator`, by default a new one."""
        generator = generator or np.random.RandomState()
        shape = (batch_size, self.noise_channels, self.num_noise_frames(num_frames))
        noise = torch.from_numpy(generator.standard_normal(shape))
        return self.synthesize(noise.to(self.spatial_input), num_frames)

    # Reading files -----------------------------------------------------------------------------------------------

    @classmethod
    def matches(cls, record: Record) -> bool:
        """Return whether the record is a generator of this kind, saved by Longtake or published."""
        return record.class_name == cls.__name__ or "out_height" in record.attributes

    @classmethod
    def options_from_record(cls, record: Record) -> dict[str, Any]:
        """Return the constructor options of the network in `record`, for published files from tensor shapes."""
        if "options" in record.attributes:
            return dict(record.attributes["options"])
        tensors = record.state_dict()
        blocks = {
            kind: [
                tensors[f"{kind}.{i}.bias_1"].shape[0] for i in range(len(tensors)) if f"{kind}.{i}.bias_1" in tensors
            ]
            for kind in ("temporal_layers", "spatial_layers")
        }
        bank = tensors["temporal_emb.blur_filters"]
        w_channels, embedding_channels = tensors["latent_mapping.layer_0.weight"].shape
        return {
            "height": int(record.attributes["out_height"]),
            "width": int(record.attributes["out_width"]),
            "embedding_channels": embedding_channels,
            "num_filters": bank.shape[0],
            "min_filter_taps": int(bank[0].count_nonzero()),
            "max_filter_taps": bank.shape[2],
            "w_channels": w_channels,
            "input_channels": tensors["spatial_input"].shape[1],
            "temporal_channels": tuple(blocks["temporal_layers"]),
            "spatial_channels": tuple(blocks["spatial_layers"]),
            "output_scale": float(record.attributes.get("output_scale", 0.25)),
        }
