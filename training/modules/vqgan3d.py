"""The 3-D VQGAN of TATS, which MeBT shares: clips to codes with strides in time and space.

Ge et al., "Long Video Generation with Time-Agnostic VQGAN and Time-Sensitive Transformer", ECCV 2022, section 3.1: no
zero padding and no statistic over time, so that codes of a clip do not depend on where it was cut. Frames are in
[-0.5, 0.5] inside. The names of the state are those of the release.

| part | shape for 16 frames of 128x128, 32 hidden channels, strides (4, 8, 8) |
|---|---|
| encoder | 3 x 16x128x128 -> 64 x 8x64x64 -> 128 x 4x32x32 -> 256 x 4x16x16 |
| decoder | 256 x 4x16x16 -> 256 x 8x32x32 -> 128 x 16x64x64 -> 64 x 16x128x128 -> 3 x 16x128x128 |
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

from torch import Tensor, nn

from torch_utils.ops.convolution import Conv3d
from training.modules.autoencoder import Autoencoder, check_divisible
from training.modules.chunks import Layer, Pointwise, Residual, Windowed, cut, pad, push_all, round_up
from training.modules.inplace import add, swish
from training.modules.norms import make_norm
from training.modules.quantizers import Quantizer, make_quantizer

Stride = tuple[int, int, int]  # frames, height, width

# Latent frames that a stream decodes together: on a CPU more take more memory and little less time, on a GPU each piece
# costs the launches of all kernels.
LATENTS_AT_ONCE = {"cpu": 1, "cuda": 4}
PADDINGS = ("replicate", "constant", "reflect", "circular")


def same_padding(kernel: int, stride: Sequence[int]) -> list[int]:
    """Return the padding of a "same" convolution as `F.pad` takes it: in total kernel - stride, the larger half first.

    A kernel of 4 at stride 1 has 2 in front and 1 behind; at stride 2, 1 and 1.
    """
    totals = [kernel - step for step in reversed(stride)]
    return [side for total in totals for side in (total // 2 + total % 2, total // 2)]


class SameConv3d(nn.Module):
    """Convolution after explicit padding on all axes: the output is the input's size over the stride."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: Stride = (1, 1, 1), padding: str = "replicate"):
        super().__init__()
        if padding not in PADDINGS:
            raise ValueError(f"the padding {padding!r} is unknown: use one of {', '.join(PADDINGS)}")
        self.padding, self.mode = same_padding(kernel, stride), padding
        self.conv = Conv3d(inputs, outputs, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (N, C, T, H, W)."""
        return self.conv(pad(x, self.padding, self.mode))

    def in_chunks(self) -> Layer:
        """Return the same function for successive frames."""
        return Windowed(self.conv, self.conv.kernel_size[0], self.padding, self.mode, self.conv.stride[0])


class SameConvTranspose3d(nn.Module):
    """Transposed convolution of the padded input, cropped to the input's size times the stride."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: Stride):
        super().__init__()
        self.padding = same_padding(kernel, stride)
        self.convt = nn.ConvTranspose3d(inputs, outputs, kernel, stride, padding=kernel - 1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (N, C, T, H, W)."""
        return self.convt(pad(x, self.padding, "replicate"))

    def in_chunks(self) -> Layer:
        """Return the same function for successive frames."""
        # An output needs two inputs at stride 2, and four at stride 1.
        needed = self.convt.kernel_size[0] // self.convt.stride[0] + self.convt.stride[0] - 1
        return Windowed(self.convt, needed, self.padding, "replicate")


class ResBlock3d(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), of equal widths; always with replicate padding."""

    def __init__(self, channels: int, norm: str):
        super().__init__()
        self.norm1 = make_norm(norm, channels)
        self.conv1 = SameConv3d(channels, channels, 3)
        self.norm2 = make_norm(norm, channels)
        self.conv2 = SameConv3d(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (N, C, T, H, W)."""
        h = self.conv1(swish(self.norm1(x)))
        return add(self.conv2(swish(self.norm2(h))), x)

    def in_chunks(self) -> list[Layer]:
        """Return the same function for successive frames."""
        first, second = (Pointwise(lambda x, norm=norm: swish(norm(x))) for norm in (self.norm1, self.norm2))
        return [Residual(first, self.conv1.in_chunks(), second, self.conv2.in_chunks())]


def level_strides(downsample: Sequence[int]) -> list[Stride]:
    """Return the strides of each level: 2 on the axes that still have to be halved, else 1.

    Raises `ValueError` unless `downsample` is three powers of two.
    """
    if len(downsample) != 3 or any(step < 1 or step & (step - 1) for step in downsample):
        raise ValueError(f"strides are {list(downsample)}: they must be three powers of two, such as 4 8 8")
    logs = [step.bit_length() - 1 for step in downsample]
    return [(1 + (logs[0] > level), 1 + (logs[1] > level), 1 + (logs[2] > level)) for level in range(max(logs))]


class DownBlock(nn.Module):
    """A strided convolution, of kernel 4 whatever the stride, and a residual block."""

    def __init__(self, inputs: int, outputs: int, stride: Stride, norm: str, padding: str):
        super().__init__()
        self.down = SameConv3d(inputs, outputs, 4, stride, padding)
        self.res = ResBlock3d(outputs, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (N, C, T, H, W)."""
        return self.res(self.down(x))

    def in_chunks(self) -> list[Layer]:
        """Return the same function for successive frames."""
        return [self.down.in_chunks(), *self.res.in_chunks()]


class UpBlock(nn.Module):
    """A transposed convolution and two residual blocks."""

    def __init__(self, inputs: int, outputs: int, stride: Stride, norm: str):
        super().__init__()
        self.up = SameConvTranspose3d(inputs, outputs, 4, stride)
        self.res1 = ResBlock3d(outputs, norm)
        self.res2 = ResBlock3d(outputs, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (N, C, T, H, W)."""
        return self.res2(self.res1(self.up(x)))

    def in_chunks(self) -> list[Layer]:
        """Return the same function for successive frames."""
        return [self.up.in_chunks(), *self.res1.in_chunks(), *self.res2.in_chunks()]


class Activated(nn.Sequential):
    """A norm and its activation, x * sigmoid(x)."""

    def __init__(self, norm: str, channels: int):
        super().__init__(make_norm(norm, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Transform (N, C, T, H, W)."""
        return swish(self[0](x))


class Encoder3d(nn.Module):
    """Frames (N, channels, T, H, W) -> features (N, hidden * 2^levels, T / t, H / h, W / w)."""

    def __init__(self, hidden: int, downsample: Sequence[int], channels: int, norm: str, padding: str):
        super().__init__()
        self.strides = level_strides(downsample)
        self.conv_blocks = nn.ModuleList(
            DownBlock(hidden << level, hidden << (level + 1), stride, norm, padding)
            for level, stride in enumerate(self.strides)
        )
        self.channels = hidden << len(self.strides)
        self.conv_first = SameConv3d(channels, hidden, 3, padding=padding)
        self.final_block = Activated(norm, self.channels)

    def forward(self, x: Tensor) -> Tensor:
        """Encode frames."""
        x = self.conv_first(x)
        for block in self.conv_blocks:
            x = block(x)
        return self.final_block(x)

    def in_chunks(self) -> list[Layer]:
        """Return the same function for successive frames."""
        blocks = [layer for block in cast(Iterable[DownBlock], self.conv_blocks) for layer in block.in_chunks()]
        return [self.conv_first.in_chunks(), *blocks, Pointwise(self.final_block)]

    def reach(self) -> tuple[int, int]:
        """Return how many frames before and after its own ones a latent frame depends on."""
        first = last = 0
        for stride, *_ in reversed(self.strides):
            first, last = first - 2, last + 2  # a residual block
            front = same_padding(4, (stride,))[0]
            first, last = first * stride - front, last * stride - front + 3
        ratio = math.prod(stride for stride, *_ in self.strides)
        return -(first - 1), last + 1 - (ratio - 1)


class Decoder3d(nn.Module):
    """Features (N, hidden * 2^levels, t, h, w) -> frames; time is doubled at the coarsest levels."""

    def __init__(self, hidden: int, downsample: Sequence[int], channels: int, norm: str):
        super().__init__()
        self.strides = level_strides(downsample)
        levels = len(self.strides)
        widths = [hidden << levels, *(hidden << (levels - level) for level in range(levels))]
        self.final_block = Activated(norm, widths[0])  # applied first; so it is called in the release
        self.conv_blocks = nn.ModuleList(
            UpBlock(widths[level], widths[level + 1], stride, norm) for level, stride in enumerate(self.strides)
        )
        self.conv_last = SameConv3d(widths[-1], channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Decode features."""
        x = self.final_block(x)
        for block in self.conv_blocks:
            x = block(x)
        return self.conv_last(x)

    def in_chunks(self) -> list[Layer]:
        """Return the same function for successive frames."""
        blocks = [layer for block in cast(Iterable[UpBlock], self.conv_blocks) for layer in block.in_chunks()]
        return [Pointwise(self.final_block), *blocks, self.conv_last.in_chunks()]

    def reach(self) -> tuple[int, int]:
        """Return how many latent frames before and after its own one a latent frame's output depends on."""
        ratio = math.prod(stride for stride, *_ in self.strides)
        first, last = -1, ratio  # of the last convolution
        for stride, *_ in reversed(self.strides):
            first, last = first - 4, last + 4  # two residual blocks
            front = same_padding(4, (stride,))[0]
            first, last = -(-first // stride) - front, (last + 3) // stride - front
        return -first, last


class VQGAN3D(Autoencoder):
    """The 3-D VQGAN; defaults are those of the published models for UCF-101, Sky Timelapse and Taichi-HD.

    `norm` is "batch" or "group", `padding` that of the encoder's strided and first convolutions: "replicate",
    "constant", "reflect" or "circular". A group norm needs `hidden` divisible by 16. `quantizer` are the arguments of
    `make_quantizer` besides sizes.
    """

    scale = 0.5

    def __init__(
        self, height: int = 128, width: int = 128, clip_frames: int = 16, downsample: Sequence[int] = (4, 8, 8),
        hidden: int = 32, embedding_dim: int = 256, num_codes: int = 16384, channels: int = 3, norm: str = "batch",
        padding: str = "replicate", quantizer: Mapping[str, Any] = MappingProxyType({"kind": "ema"}),
    ):  # fmt: skip
        super().__init__()
        downsample = list(downsample)
        self.options = {
            "height": height, "width": width, "clip_frames": clip_frames, "downsample": downsample, "hidden": hidden,
            "embedding_dim": embedding_dim, "num_codes": num_codes, "channels": channels, "norm": norm,
            "padding": padding, "quantizer": dict(quantizer),
        }  # fmt: skip
        self.height, self.width, self.clip_frames = height, width, clip_frames
        self.encoder = Encoder3d(hidden, downsample, channels, norm, padding)
        self.decoder = Decoder3d(hidden, downsample, channels, norm)
        self.downsample: Stride = (downsample[0], downsample[1], downsample[2])
        self.stride = (downsample[0], downsample[1])
        self.pre_vq_conv = SameConv3d(self.encoder.channels, embedding_dim, 1)
        self.post_vq_conv = SameConv3d(embedding_dim, self.encoder.channels, 1)
        self.codebook = make_quantizer(num_codes, embedding_dim, **quantizer)
        self.norm, self.padding = norm, padding

    @property
    def quantizer(self) -> Quantizer:
        """See `Autoencoder.quantizer`."""
        return self.codebook

    @property
    def last_layer(self) -> Tensor:
        """See `Autoencoder.last_layer`."""
        return self.decoder.conv_last.conv.weight

    def features(self, x: Tensor) -> Tensor:
        """See `Autoencoder.features`; raises `ValueError` if the strides do not divide the frames."""
        check_divisible(x, self.downsample)
        return self.in_chosen(lambda x: self.pre_vq_conv(self.encoder(x)), x)

    def generate(self, z: Tensor) -> Tensor:
        """See `Autoencoder.generate`."""
        return self.in_chosen(lambda z: self.decoder(self.post_vq_conv(z)), z)

    def encode_stream(self, video: Iterable[Tensor], chunk: int = 64) -> Iterator[Tensor]:
        """Encode pieces of a video (N, 3, T_i, H, W), `chunk` frames at a time: yield codes (N, t_i, h, w).

        The codes are those of the whole video at once, in memory that does not grow with it. Raises `ValueError` for
        networks whose codes depend on all frames, and if the strides do not divide the video.
        """
        self._check_chunks(self.padding)
        return self._encode_stream(video, round_up(chunk, self.downsample[0]))

    def _encode_stream(self, video: Iterable[Tensor], chunk: int) -> Iterator[Tensor]:
        layers = [*self.encoder.in_chunks(), Pointwise(self.pre_vq_conv)]
        for part, end in cut(video, chunk, axis=2):
            check_divisible(part, self.downsample)
            z = self.in_chosen(lambda part, end=end: push_all(layers, part, end), part * self.scale)
            if z is not None:
                yield self.quantizer.encode(z)

    def decode_stream(self, codes: Iterable[Tensor], chunk: int | None = None) -> Iterator[Tensor]:
        """Decode pieces of codes (N, t_i, h, w), `chunk` latent frames at a time: yield frames (N, 3, T_i, H, W).

        The frames are those of decoding all codes at once, in memory that does not grow with their number. By default
        as many latent frames as suit the device. Raises `ValueError` for networks whose frames depend on all codes.
        """
        self._check_chunks("replicate")
        device = next(self.parameters()).device.type
        return self._decode_stream(codes, LATENTS_AT_ONCE.get(device, 4) if chunk is None else chunk)

    def _decode_stream(self, codes: Iterable[Tensor], chunk: int) -> Iterator[Tensor]:
        layers = [Pointwise(self.post_vq_conv), *self.decoder.in_chunks()]
        for part, end in cut(codes, chunk, axis=1):
            x = self.in_chosen(lambda z, end=end: push_all(layers, z, end), self.quantizer.lookup(part))
            if x is not None:
                yield x / self.scale

    def decode_part(self, codes: Tensor, start: int, stop: int) -> Tensor:
        """Return the frames of latent frames [start, stop) of codes (N, t, h, w), by decoding those and a margin.

        They are those of decoding all codes at once.
        """
        self._check_chunks("replicate")
        before, after = self.decoder.reach()
        first, step = max(start - before, 0), self.downsample[0]
        return self.decode(codes[:, first : stop + after])[:, :, (start - first) * step : (stop - first) * step]

    def _check_chunks(self, padding: str) -> None:
        if self.norm == "group":
            raise ValueError("the group norm of this tokenizer spans all frames: it cannot work in chunks")
        if padding == "circular":
            raise ValueError("the circular padding of this tokenizer joins both ends: it cannot encode in chunks")
        assert not self.training, "batch norm of chunks is that of the whole in eval mode only"
