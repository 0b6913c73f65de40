"""The super-resolution discriminator: a few frames at both resolutions -> one logit (LongVideoGAN, section 3.2).

A StyleGAN2 image discriminator: the low-resolution frames are enlarged and concatenated with the high-resolution ones,
and all frames of both become the channels of one image.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from torch_utils import misc, persistence
from torch_utils.compilation import region
from torch_utils.ops import bias_act, conv2d_resample, upfirdn2d
from torch_utils.safe_pickle import Record
from training.longvideogan.layers import CLAMP, HALF_FORMATS, FullyConnectedLayer, MixedPrecision, pad_to_square
from training.longvideogan.sres.schedule import check_pair

FINAL_EDGE = 4


@persistence.persistent_class
class Conv2dLayer(nn.Module):
    """Convolution, optionally downsampled by two after a [1, 3, 3, 1] low-pass, with bias and activation."""

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        activation: str = "lrelu",
        bias: bool = True,
        down: int = 1,
        clamp: float | None = CLAMP,
    ):
        super().__init__()
        self.activation, self.down, self.clamp = activation, down, clamp
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.register_buffer("resample_filter", binomial_filter())

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        """Map (N, Cin, H, W) to `gain` times (N, Cout, H / down, W / down)."""
        act_gain = gain * bias_act.activation_funcs[self.activation].def_gain
        weight = self.weight * self.weight[0].numel() ** -0.5
        if self.activation == "linear" and self.bias is None:
            weight, act_gain = weight * act_gain, 1.0
        f = self.resample_filter if self.down > 1 else None
        padding = weight.shape[2] // 2
        x = conv2d_resample.conv2d_resample(x, weight.to(x.dtype), f=f, down=self.down, padding=padding)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        clamp = None if self.clamp is None else self.clamp * gain
        return bias_act.bias_act(x, bias, act=self.activation, gain=act_gain, clamp=clamp)


def binomial_filter() -> Tensor:
    """Return the filter [1, 3, 3, 1] along each axis with unit sum: (4, 4)."""
    return upfirdn2d.setup_filter([1, 3, 3, 1])


@persistence.persistent_class
class DiscriminatorBlock(MixedPrecision):
    """Residual block that halves the resolution; the first of a network also maps its input to features."""

    def __init__(self, image_channels: int, in_channels: int, out_channels: int, fp16: bool):
        super().__init__()
        if fp16:
            self.formats, self.half = tuple(HALF_FORMATS), "fp16"
        self.register_buffer("resample_filter", binomial_filter())
        self.fromrgb = Conv2dLayer(image_channels, in_channels, 1) if image_channels else None
        self.conv0 = Conv2dLayer(in_channels, in_channels, 3)
        self.conv1 = Conv2dLayer(in_channels, out_channels, 3, down=2)
        self.skip = Conv2dLayer(in_channels, out_channels, 1, "linear", bias=False, down=2, clamp=None)

    def forward(self, x: Tensor, force_fp32: bool = False) -> Tensor:
        """Map (N, Cin, H, W) to (N, Cout, H / 2, W / 2)."""
        x = x.to(self.feature_dtype(x, self.conv0.weight, force_fp32))
        if self.fromrgb is not None:
            x = self.fromrgb(x)
        scale = 0.5**0.5  # for unit variance of the sum; folded into both paths at no cost
        return self.conv1(self.conv0(x), scale) + self.skip(x, scale)


@persistence.persistent_class
class DiscriminatorEpilogue(nn.Module):
    """4x4 features -> logit, in full precision."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2dLayer(channels, channels, 3)
        self.fc = FullyConnectedLayer(channels * FINAL_EDGE**2, channels, activation="lrelu")
        self.out = FullyConnectedLayer(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, 4, 4) to (N, 1)."""
        return self.out(self.fc(self.conv(x.to(self.conv.weight.dtype)).flatten(1)))


@persistence.persistent_class
class BilinearUpsample(nn.Module):
    """Enlarge frames by an integer factor with a triangle filter and zero padding."""

    filter: Tensor

    def __init__(self, scale: int):
        super().__init__()
        self.scale = scale
        rise = torch.arange(1, 2 * scale, 2) / (2 * scale**2)
        self.register_buffer("filter", torch.cat([rise, rise.flip(0)]))

    def forward(self, video: Tensor) -> Tensor:
        """Map (N, C, T, H, W) to (N, C, T, H * scale, W * scale)."""
        x = upfirdn2d.upsample2d(video.flatten(1, 2), self.filter, up=self.scale)
        return x.unflatten(1, video.shape[1:3])


@persistence.persistent_class
class SuperResDiscriminator(nn.Module):
    """Discriminator of frames at both resolutions. Default options are those of the published network."""

    def __init__(
        self,
        num_frames: int = 4,
        height: int = 144,
        width: int = 256,
        lres_height: int = 36,
        lres_width: int = 64,
        channel_base: int = 16384,
        channel_max: int = 512,
        num_fp16_res: int = 4,
    ):
        super().__init__()
        check_pair(height, width, lres_height, lres_width)
        self.options: dict[str, Any] = {
            "num_frames": num_frames,
            "height": height,
            "width": width,
            "lres_height": lres_height,
            "lres_width": lres_width,
            "channel_base": channel_base,
            "channel_max": channel_max,
            "num_fp16_res": num_fp16_res,
        }
        self.num_frames = num_frames
        self.height, self.width = height, width
        self.lres_height, self.lres_width = lres_height, lres_width
        edge = max(height, width)
        fp16_from = max(2 ** (int(math.log2(edge)) + 1 - num_fp16_res), 2 * FINAL_EDGE)

        def channels(resolution: int) -> int:
            return min(channel_base // resolution, channel_max)

        self.resolutions = [edge >> i for i in range(int(math.log2(edge // FINAL_EDGE)))]
        for resolution in self.resolutions:
            image_channels = 6 * num_frames if resolution == edge else 0
            block = DiscriminatorBlock(
                image_channels, channels(resolution), channels(resolution // 2), fp16=resolution >= fp16_from
            )
            self.add_module(f"b{resolution}", block)
        self.b4 = DiscriminatorEpilogue(channels(FINAL_EDGE))
        self.upsample = BilinearUpsample(edge // max(lres_height, lres_width))

    @region
    def forward(self, lres_video: Tensor, video: Tensor, force_fp32: bool = False) -> Tensor:
        """Map lres_video (N, 3, T, h, w), or enlarged (N, 3, T, H, W), and video (N, 3, T, H, W) to logits (N, 1)."""
        misc.assert_shape(video, [None, 3, self.num_frames, self.height, self.width])
        if lres_video.shape[3:] == (self.lres_height, self.lres_width):
            lres_video = self.upsample(lres_video)
        x = torch.cat([lres_video, video], dim=1)  # N 6 T H W
        x = pad_to_square(x).flatten(1, 2)  # N 6T E E
        for resolution in self.resolutions:
            x = getattr(self, f"b{resolution}")(x, force_fp32)
        return self.b4(x)

    @classmethod
    def matches(cls, record: Record) -> bool:
        """Return whether the record is a discriminator of this kind, saved by Longtake or published."""
        return record.class_name == cls.__name__ or "b4" in record.children and "upsample" in record.children

    @classmethod
    def options_from_record(cls, record: Record) -> dict[str, Any]:
        """Return the constructor options of the network in `record`, for published files from tensor shapes."""
        if "options" in record.attributes:
            return dict(record.attributes["options"])
        attributes, tensors = record.attributes, record.state_dict()
        blocks = {
            int(name[1:-13]): tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".conv0.weight")
        }
        edge = max(blocks)
        scale = tensors["upsample.filter"].shape[0] // 2
        height, width = (int(attributes.get(f"hr_{axis}", size)) for axis, size in (("height", 0), ("width", 0)))
        if not height:
            height, width = edge * 9 // 16, edge
        return {
            "num_frames": tensors[f"b{edge}.fromrgb.weight"].shape[1] // 6,
            "height": height,
            "width": width,
            "lres_height": height // scale,
            "lres_width": width // scale,
            "channel_base": blocks[edge] * edge,
            "channel_max": max(blocks.values()),
            "num_fp16_res": int(attributes.get("num_fp16_res", 4)),
        }
