"""The low-resolution discriminator: a whole clip -> one logit (LongVideoGAN, section 3.1 and appendix A).

Residual 3-D blocks downsample space and time together, followed by convolutions along time only.
"""

import math
from collections.abc import Sequence
from typing import Any

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
    as_tuple,
    pad_to_square,
    resample_space,
    resample_time,
)
from training.longvideogan.lres.generator import check_size

SPATIAL_KERNEL = 3
TEMPORAL_KERNEL = 5
FINAL_EDGE = 4  # height and width of the last block's output


@persistence.persistent_class
class Downsample(nn.Module):
    """Low-pass by [1, 3, 3, 1] / 8 and downsampling by two of space, time or both."""

    _downsample_filter: Tensor

    def __init__(self, temporal: bool, spatial: bool):
        super().__init__()
        self.temporal, self.spatial = temporal, spatial
        self.register_buffer("_downsample_filter", torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8)

    def forward(self, x: Tensor) -> Tensor:
        """Halve (N, C, T, H, W) along the axes of this layer."""
        if self.spatial:
            x = resample_space(x, self._downsample_filter, down=2)
        if self.temporal:
            x = resample_time(x, self._downsample_filter, down=2)
        return x


@persistence.persistent_class
class Conv3dLayer(nn.Module):
    """Convolution, downsampling, bias, activation and clamp, with equalised learning rate."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        activation: str = "lrelu",
        bias: bool = True,
        downsample: Downsample | None = None,
    ):
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))
        self._bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.downsample = downsample

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """Map (N, Cin, T, H, W) to `gain` times (N, Cout, T', H', W')."""
        act_gain = gain * bias_act.activation_funcs[self.activation].def_gain
        weight = self.weight * self.weight[0].numel() ** -0.5
        if self.activation == "linear" and self._bias is None:
            weight, act_gain = weight * act_gain, 1.0
        pointwise = weight.shape[2:].numel() == 1
        if self.downsample is not None and pointwise:
            x = self.downsample(x)  # commutes exactly with a 1x1x1 convolution without bias, at 1/4 or 1/8 of the work
        x = convolution.conv3d(x, weight.to(x.dtype), padding=[size // 2 for size in weight.shape[2:]])
        if self.downsample is not None and not pointwise:
            x = self.downsample(x)
        return bias_act.bias_act(x, self._bias, act=self.activation, gain=act_gain, clamp=CLAMP * gain)


@persistence.persistent_class
class DiscriminatorBlock(MixedPrecision):
    """Residual block; the first one of a network also maps RGB to features."""

    formats = ("bf16",)

    def __init__(
        self, in_channels: int, out_channels: int, time_kernel: int, time_down: bool, space_down: bool, from_rgb: bool
    ):
        super().__init__()
        kernel = [time_kernel, SPATIAL_KERNEL, SPATIAL_KERNEL]

        def downsample() -> Downsample | None:
            return Downsample(time_down, space_down) if time_down or space_down else None

        self.conv_vid = Conv3dLayer(3, in_channels, [1, 1, 1]) if from_rgb else None
        self.conv_0 = Conv3dLayer(in_channels, in_channels, kernel)
        self.conv_1 = Conv3dLayer(in_channels, out_channels, kernel, downsample=downsample())
        self.conv_skip = Conv3dLayer(
            in_channels, out_channels, [1, 1, 1], activation="linear", bias=False, downsample=downsample()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, Cin, T, H, W) to (N, Cout, T', H', W'); a block with `from_rgb` takes (N, 3, T, H, W)."""
        x = x.to(self.feature_dtype(x, self.conv_0.weight))
        if self.conv_vid is not None:
            x = self.conv_vid(x)
        scale = 0.5**0.5  # for unit variance of the sum; folded into both paths at no cost
        return self.conv_1(self.conv_0(x), scale) + self.conv_skip(x, scale)


@persistence.persistent_class
class Conv1dLayer(nn.Module):
    """Convolution along time with bias and leaky ReLU, unclamped, with equalised learning rate."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel))
        self._bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, Cin, T) to (N, Cout, T)."""
        weight = self.weight * self.weight[0].numel() ** -0.5
        x = nn.functional.conv1d(x, weight, padding=weight.shape[2] // 2)
        return bias_act.bias_act(x, self._bias, act="lrelu")


@persistence.persistent_class
class DiscriminatorEpilogue(nn.Module):
    """Features of every remaining time step -> temporal convolutions -> one logit; always in full precision."""

    def __init__(self, in_channels: int, num_steps: int, channels: int):
        super().__init__()
        self.conv1d_0 = Conv1dLayer(in_channels, channels, 1)
        self.conv1d_1 = Conv1dLayer(channels, channels, 3)
        self.conv1d_2 = Conv1dLayer(channels, channels, 3)
        self.conv1d_3 = Conv1dLayer(channels, channels, 3)
        self.linear_0 = FullyConnectedLayer(channels * num_steps, channels, activation="lrelu")
        self.linear_1 = FullyConnectedLayer(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, T, 4, 4) to (N, 1)."""
        x = x.to(self.linear_1.weight.dtype).movedim(2, 4).flatten(1, 3)  # N C*4*4 T
        x = self.conv1d_3(self.conv1d_2(self.conv1d_1(self.conv1d_0(x))))
        return self.linear_1(self.linear_0(x.flatten(1)))


@persistence.persistent_class
class LowResDiscriminator(nn.Module):
    """Discriminator of clips of `num_frames` frames. Default options are those of the published network."""

    def __init__(
        self,
        num_frames: int = 128,
        height: int = 36,
        width: int = 64,
        channels: Sequence[int] = (32, 64, 128, 256, 512),
        epilogue_channels: int = 1024,
    ):
        super().__init__()
        check_size(height, width)
        if num_frames < 16 or num_frames % 8:
            nearest = max(16, 8 * round(num_frames / 8))
            raise ValueError(f"clips of {num_frames} frames: the length must be a multiple of 8 from 16; use {nearest}")
        self.options: dict[str, Any] = {
            "num_frames": num_frames,
            "height": height,
            "width": width,
            "channels": (channels := as_tuple(channels)),
            "epilogue_channels": epilogue_channels,
        }
        self.num_frames, self.height, self.width = num_frames, height, width
        edge = max(height, width)
        num_extra = max(0, int(math.log2(edge)) - 6)  # beyond 64, one spatial block per doubling, before the others
        widths = channels[:1] * num_extra + channels
        self.blocks = nn.ModuleList()
        for index, (in_channels, out_channels) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            stage = index - num_extra  # 0 .. 3 are the published blocks
            space_down = stage < 0 or edge > FINAL_EDGE * 2 ** (3 - stage)
            self.blocks.append(
                DiscriminatorBlock(
                    in_channels,
                    out_channels,
                    time_kernel=TEMPORAL_KERNEL if stage > 0 else 1,
                    time_down=stage > 0,
                    space_down=space_down,
                    from_rgb=index == 0,
                )
            )
            edge //= 1 + space_down
        self.epilogue = DiscriminatorEpilogue(channels[-1] * FINAL_EDGE**2, num_frames // 8, epilogue_channels)

    @region
    def forward(self, video: Tensor) -> Tensor:
        """Map (N, 3, num_frames, height, width) to logits (N, 1)."""
        misc.assert_shape(video, [None, 3, self.num_frames, self.height, self.width])
        x = pad_to_square(video)
        for block in self.blocks:
            x = block(x)
        return self.epilogue(x)

    @classmethod
    def matches(cls, record: Record) -> bool:
        """Return whether the record is a discriminator of this kind, saved by Longtake or published."""
        return record.class_name == cls.__name__ or "epilogue" in record.children and "blocks" in record.children

    @classmethod
    def options_from_record(cls, record: Record) -> dict[str, Any]:
        """Return the constructor options of the network in `record`, inferred from tensor shapes for published files.

        A published discriminator pads any frame to a square of its longer edge, so its file does not contain the
        shorter one: the aspect ratio of the published data (9:16) is assumed.
        """
        if "options" in record.attributes:
            return dict(record.attributes["options"])
        tensors = record.state_dict()
        epilogue_channels = tensors["epilogue.conv1d_1.weight"].shape[0]
        num_blocks = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
        edge = int(record.attributes.get("max_edge", 64))
        return {
            "num_frames": 8 * tensors["epilogue.linear_0.weight"].shape[1] // epilogue_channels,
            "height": edge * 9 // 16,
            "width": edge,
            "channels": (
                tensors["blocks.0.conv_0.weight"].shape[0],
                *(tensors[f"blocks.{index}.conv_1.weight"].shape[0] for index in range(num_blocks)),
            ),
            "epilogue_channels": epilogue_channels,
        }
