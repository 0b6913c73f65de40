"""The super-resolution generator: a low-resolution video -> the same video at high resolution (LongVideoGAN, section
3.2).

A StyleGAN3 synthesis network for each frame, conditioned on nine neighbouring low-resolution frames, which are
resampled to every layer's canvas and concatenated to that layer's input; one latent is shared by all frames.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_utils import misc, persistence
from torch_utils.compilation import region
from torch_utils.ops import convolution, filtered_lrelu, upfirdn2d
from torch_utils.safe_pickle import Record
from training.longvideogan.layers import (
    CLAMP,
    HALF_FORMATS,
    FullyConnectedLayer,
    MixedPrecision,
    Tracker,
    kaiser_lowpass,
    normalize_second_moment,
)
from training.longvideogan.sres.schedule import FILTER_SIZE, MARGIN, Layer, check_pair, layer_schedule

MAGNITUDE_BETA = 0.999
W_AVG_BETA = 0.998
OUTPUT_SCALE = 0.25


@persistence.persistent_class
class Resample(nn.Module):
    """Resample images by an integer factor with a Kaiser filter and a replicated border."""

    filter: Tensor

    def __init__(self, scale: int, up: bool):
        super().__init__()
        self.scale, self.up = scale, up
        taps = kaiser_lowpass(FILTER_SIZE * scale, cutoff=1.0, width=6.0, sampling_rate=4.0 * scale)
        self.register_buffer("filter", taps)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H * scale, W * scale) or (N, C, H / scale, W / scale).

        The replicated border is narrower than the filter, so the outermost samples lose up to 1.5 % of their amplitude;
        trained weights depend on it.
        """
        border = 1 if self.up else self.scale
        x = nn.functional.pad(x, [border] * 4, mode="replicate")
        trim = -self.scale
        if self.up:
            return upfirdn2d.upsample2d(x, self.filter, up=self.scale, padding=trim)
        return upfirdn2d.downsample2d(x, self.filter, down=self.scale, padding=trim)


def make_resampler(edge: int, rate: int) -> nn.Module:
    """Return the resampler from low-resolution frames of longer edge `edge` to a layer of rate `rate`."""
    if rate == edge:
        return nn.Identity()
    return Resample(-(-edge // rate), up=False) if rate < edge else Resample(-(-rate // edge), up=True)


def fit_canvas(x: Tensor, width: int, height: int) -> Tensor:
    """Centre-crop axes that are too long, replicate the border of those too short: -> (N, C, height, width)."""
    for dim, size in ((2, height), (3, width)):
        if x.shape[dim] > size:
            x = x.narrow(dim, (x.shape[dim] - size) // 2, size)
    dx, dy = width - x.shape[3], height - x.shape[2]
    if dx or dy:
        x = nn.functional.pad(x, [dx // 2, (dx + 1) // 2, dy // 2, (dy + 1) // 2], mode="replicate")
    return x


@persistence.persistent_class
class MappingNetwork(Tracker):
    """z -> w, with a running average of w for truncation (StyleGAN2)."""

    w_avg: Tensor

    def __init__(self, z_channels: int, w_channels: int):
        super().__init__()
        self.register_buffer("w_avg", torch.zeros(w_channels))
        self.fc0 = FullyConnectedLayer(z_channels, w_channels, activation="lrelu", lr_multiplier=0.01)
        self.fc1 = FullyConnectedLayer(w_channels, w_channels, activation="lrelu", lr_multiplier=0.01)

    def forward(self, z: Tensor, truncation: float = 1.0, update_emas: bool = False) -> Tensor:
        """Map (N, z channels) to (N, w channels)."""
        w = self.fc1(self.fc0(normalize_second_moment(z)))
        if update_emas:
            self.track(self.w_avg, w.detach().mean(dim=0), len(w), W_AVG_BETA)
        return w if truncation == 1 else self.w_avg.lerp(w, truncation)


@persistence.persistent_class
class SynthesisLayer(MixedPrecision, Tracker):
    """Modulated convolution, then a leaky ReLU between an up- and a down-sampling filter (StyleGAN3, figure 4b)."""

    _record_init_args = False  # built from a schedule, which also follows from the shapes of the weights

    magnitude_ema: Tensor
    up_filter: Tensor | None
    down_filter: Tensor | None

    def __init__(self, layer: Layer, w_channels: int, fp16: bool):
        super().__init__()
        if fp16:
            # The last layer outputs RGB: the eight bits of bf16 are too few for its intensity levels.
            self.formats, self.half = ("fp16",) if layer.is_rgb else tuple(HALF_FORMATS), "fp16"
        self.is_rgb = layer.is_rgb
        self.up, self.down = layer.up, layer.down
        self.padding = list(layer.padding)
        self.out_shape = [None, layer.out_channels, layer.out_size[1], layer.out_size[0]]
        self.weight = nn.Parameter(torch.randn(layer.out_channels, layer.in_channels, layer.kernel, layer.kernel))
        self.bias = nn.Parameter(torch.zeros(layer.out_channels))
        self.register_buffer("magnitude_ema", torch.ones([]))
        self.register_buffer(
            "up_filter", make_filter(layer.up_taps, layer.in_cutoff, layer.in_half_width, layer.filter_rate)
        )
        self.register_buffer(
            "down_filter", make_filter(layer.down_taps, layer.out_cutoff, layer.out_half_width, layer.filter_rate)
        )
        self.affine = FullyConnectedLayer(w_channels, layer.in_channels, bias_init=1.0)

    def modulated_weights(self, w: Tensor) -> Tensor:
        """Return a convolution kernel for each style, (N, Cout, Cin, k, k) (StyleGAN3, appendix F.1)."""
        style = self.affine(w)
        weight = self.weight
        if self.is_rgb:
            weight = weight * weight[0].numel() ** -0.5
        else:
            weight = weight * weight.square().mean(dim=[1, 2, 3], keepdim=True).rsqrt()
            style = style * style.square().mean().rsqrt()
        weight = weight * style[:, None, :, None, None]
        if not self.is_rgb:
            weight = weight * (weight.square().sum(dim=[2, 3, 4], keepdim=True) + 1e-8).rsqrt()
        return weight * self.magnitude_ema.rsqrt()

    def forward(self, x: Tensor, w: Tensor, update_emas: bool = False, force_fp32: bool = False) -> Tensor:
        """Map x (N*T, Cin, h, w), w (N, w channels) to (N*T, Cout, h', w'); the frames of a video share its kernel."""
        if update_emas:
            self.track_magnitude(self.magnitude_ema, x, MAGNITUDE_BETA)
        return self.filtered(x, w, self.feature_dtype(x, self.weight, force_fp32))

    @region
    def filtered(self, x: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
        """Apply the layer with features of `dtype`."""
        kernels = self.modulated_weights(w).to(dtype)
        padding = kernels.shape[-1] - 1
        videos = x.to(dtype).chunk(len(w))
        videos = [convolution.conv2d(v, k, padding=padding) for v, k in zip(videos, kernels, strict=True)]
        x = torch.cat(videos) if len(w) > 1 else videos[0]  # avoids a copy of a single one
        x = filtered_lrelu.filtered_lrelu(
            x,
            fu=self.up_filter,
            fd=self.down_filter,
            b=self.bias.to(dtype),
            up=self.up,
            down=self.down,
            padding=self.padding,
            gain=1.0 if self.is_rgb else 2**0.5,
            slope=1.0 if self.is_rgb else 0.2,
            clamp=CLAMP,
        )
        misc.assert_shape(x, self.out_shape)
        return x


def make_filter(num_taps: int, cutoff: float, half_width: float, sampling_rate: float) -> Tensor | None:
    """Return the low-pass filter of a layer, None for a single tap."""
    return kaiser_lowpass(num_taps, cutoff, 2 * half_width, sampling_rate) if num_taps > 1 else None


@persistence.persistent_class
class FourierInput(nn.Module):
    """Fixed sinusoids over the first canvas, mixed by a learned matrix; disabled in all published networks."""

    _record_init_args = False  # built from a schedule, which also follows from the shapes of the weights

    features: Tensor

    def __init__(self, layer: Layer, channels: int, cutoff: float = 2.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels))
        frequencies = torch.randn(channels, 2)
        radii = frequencies.norm(dim=1, keepdim=True)
        frequencies = frequencies / (radii * radii.square().exp().pow(0.25)) * cutoff
        phases = torch.rand(channels) - 0.5
        width, height = layer.in_size
        theta = torch.diag(torch.tensor([0.5 * width / layer.in_rate, 0.5 * height / layer.in_rate, 1.0]))[:2]
        grid = nn.functional.affine_grid(theta[None], [1, 1, height, width], align_corners=False)  # 1 h w 2
        waves = torch.sin(2 * torch.pi * (grid @ frequencies.t() + phases))  # 1 h w C
        self.register_buffer("features", waves.permute(0, 3, 1, 2).contiguous())

    def forward(self) -> Tensor:
        """Return (1, channels, h, w)."""
        return torch.einsum("oi,nihw->nohw", self.weight * self.weight.shape[1] ** -0.5, self.features)


@persistence.persistent_class
class SynthesisNetwork(nn.Module):
    """The layers; each takes the output of the previous one and the condition at its own rate."""

    _record_init_args = False  # built from a schedule, which also follows from the shapes of the weights

    def __init__(self, layers: list[Layer], w_channels: int, fourier_channels: int, num_fp16_res: int):
        super().__init__()
        edge = max(layers[-1].out_size)
        self.input = FourierInput(layers[0], fourier_channels) if fourier_channels else None
        self.layer_names = [layer.name for layer in layers]
        for layer in layers:
            fp16 = layer.out_rate * 2**num_fp16_res > edge
            self.add_module(layer.name, SynthesisLayer(layer, w_channels, fp16))

    def forward(self, conditions: list[Tensor], w: Tensor, update_emas: bool, force_fp32: bool) -> Tensor:
        """Map one condition (N*T, C, h, w) per layer and w (N, w channels) to (N*T, 3, H, W)."""
        x = None if self.input is None else self.input().expand(conditions[0].shape[0], -1, -1, -1)
        for name, condition in zip(self.layer_names, conditions, strict=True):
            layer = self.get_submodule(name)
            assert isinstance(layer, SynthesisLayer)
            # Magnitudes are measured before features and condition are rounded to a layer's precision.
            dtype = condition.dtype if update_emas else layer.feature_dtype(condition, layer.weight, force_fp32)
            x = condition if x is None else torch.cat([x.to(dtype), condition.to(dtype)], dim=1)
            x = layer(x, w, update_emas, force_fp32)
        assert x is not None
        return x.to(conditions[0].dtype) * OUTPUT_SCALE


@persistence.persistent_class
class ConditionalStyleGAN3(nn.Module):
    """Synthesis, mapping and the resamplers of the condition; attribute names are those of the published weights."""

    _record_init_args = False  # built from a schedule, which also follows from the shapes of the weights

    def __init__(
        self,
        layers: list[Layer],
        lres_edge: int,
        z_channels: int,
        w_channels: int,
        fourier_channels: int,
        num_fp16_res: int,
    ):
        super().__init__()
        self.synthesis = SynthesisNetwork(layers, w_channels, fourier_channels, num_fp16_res)
        self.mapping = MappingNetwork(z_channels, w_channels)
        self.resamples = nn.ModuleList(make_resampler(lres_edge, layer.in_rate) for layer in layers)
        self.canvases = [layer.in_size for layer in layers]
        self.rates = [layer.in_rate for layer in layers]

    def conditions(self, lres_video: Tensor, context: int) -> list[Tensor]:
        """Map (N, 3, T + 2 context, h, w) to (N*T, 3 * (2 context + 1), h_i, w_i) for each layer i, colour major.

        Every frame is resampled once per rate and then gathered into its windows.
        """
        num_videos, colors, num_frames = lres_video.shape[:3]
        height, width = lres_video.shape[3:]
        edge = max(height, width)
        dx, dy = edge - width, edge - height
        pad = [dx // 2 + MARGIN, (dx + 1) // 2 + MARGIN, dy // 2 + MARGIN, (dy + 1) // 2 + MARGIN]
        frames = lres_video.transpose(1, 2).flatten(0, 1)  # NT 3 h w
        frames = nn.functional.pad(frames, pad, mode="replicate")
        conditions: list[Tensor] = []
        previous, resampled = (0, (0, 0)), frames
        for resample, rate, canvas in zip(self.resamples, self.rates, self.canvases, strict=True):
            if (rate, canvas) == previous:
                conditions.append(conditions[-1])
                continue
            if rate != previous[0]:
                resampled = resample(frames)
            previous = rate, canvas
            x = fit_canvas(resampled, *canvas).unflatten(0, (num_videos, num_frames))
            x = x.unfold(1, 2 * context + 1, 1)  # N T 3 h w window
            conditions.append(x.permute(0, 1, 2, 5, 3, 4).flatten(2, 3).flatten(0, 1))
            assert conditions[-1].shape[1] == colors * (2 * context + 1)
        return conditions


@persistence.persistent_class
class SuperResGenerator(nn.Module):
    """Low-resolution video with context frames -> high-resolution video (LongVideoGAN, section 3.2 and appendix A).

    Frame t of the output depends only on z and on low-resolution frames t .. t + 2 * temporal_context of the input,
    so a video may be computed in any pieces. With the default options, parameter names, shapes and outputs are those
    of the published networks.
    """

    def __init__(
        self,
        height: int = 144,
        width: int = 256,
        lres_height: int = 36,
        lres_width: int = 64,
        temporal_context: int = 4,
        z_channels: int = 512,
        w_channels: int = 512,
        num_layers: int = 14,
        channel_base: int = 32768,
        channel_max: int = 512,
        fourier_channels: int = 0,
        num_fp16_res: int = 4,
    ):
        super().__init__()
        check_pair(height, width, lres_height, lres_width)
        self.options: dict[str, Any] = {
            "height": height,
            "width": width,
            "lres_height": lres_height,
            "lres_width": lres_width,
            "temporal_context": temporal_context,
            "z_channels": z_channels,
            "w_channels": w_channels,
            "num_layers": num_layers,
            "channel_base": channel_base,
            "channel_max": channel_max,
            "fourier_channels": fourier_channels,
            "num_fp16_res": num_fp16_res,
        }
        self.height, self.width = height, width
        self.lres_height, self.lres_width = lres_height, lres_width
        self.temporal_context = temporal_context
        self.z_channels = z_channels
        layers = layer_schedule(
            height, width, num_layers, channel_base, channel_max, 3 * (2 * temporal_context + 1), fourier_channels
        )
        self.SG3 = ConditionalStyleGAN3(
            layers, max(lres_height, lres_width), z_channels, w_channels, fourier_channels, num_fp16_res
        )

    def sample_latent_z(self, batch_size: int, generator: np.random.RandomState | None = None) -> Tensor:
        """Draw a standard normal (batch_size, z_channels), on the device of the network."""
        generator = generator or np.random.RandomState()
        z = torch.from_numpy(generator.standard_normal((batch_size, self.z_channels)))
        return z.to(self.SG3.mapping.w_avg)

    def forward(
        self,
        lres_video: Tensor,
        z: Tensor,
        truncation: float = 1.0,
        update_emas: bool = False,
        force_fp32: bool = False,
    ) -> Tensor:
        """Map lres_video (N, 3, T + 2 context, h, w) and z (N, z_channels) to (N, 3, T, H, W), nominally in [-1, 1].

        `truncation` below 1 interpolates w towards its average. `update_emas` updates the magnitude and w averages.
        `force_fp32` disables half precision on CUDA in the later layers.
        """
        misc.assert_shape(lres_video, [z.shape[0], 3, None, self.lres_height, self.lres_width])
        misc.assert_shape(z, [None, self.z_channels])
        context = self.temporal_context
        assert lres_video.shape[2] > 2 * context, "a super-resolved frame needs all of its context frames"
        w = self.SG3.mapping(z, truncation, update_emas)
        frames = self.SG3.synthesis(self.SG3.conditions(lres_video, context), w, update_emas, force_fp32)
        return frames.unflatten(0, (z.shape[0], -1)).transpose(1, 2)  # N 3 T H W

    # Reading files -----------------------------------------------------------------------------------------------

    @classmethod
    def matches(cls, record: Record) -> bool:
        """Return whether the record is a generator of this kind, saved by Longtake or published."""
        return record.class_name == cls.__name__ or "SG3" in record.children

    @classmethod
    def options_from_record(cls, record: Record) -> dict[str, Any]:
        """Return the constructor options of the network in `record`, for published files from tensor shapes."""
        if "options" in record.attributes:
            return dict(record.attributes["options"])
        attributes, tensors = record.attributes, record.state_dict()
        names = {name.split(".")[2] for name in tensors if name.startswith("SG3.synthesis.L")}
        names = sorted(names, key=lambda name: int(name[1:].split("_")[0]))
        widths = [tensors[f"SG3.synthesis.{name}.weight"].shape[0] for name in names]
        w_channels, z_channels = tensors["SG3.mapping.fc0.weight"].shape
        fourier = tensors.get("SG3.synthesis.input.weight")
        edge = max(attributes["hr_height"], attributes["hr_width"])
        return {
            "height": int(attributes["hr_height"]),
            "width": int(attributes["hr_width"]),
            "lres_height": int(attributes["lr_height"]),
            "lres_width": int(attributes["lr_width"]),
            "temporal_context": int(attributes["temporal_context"]),
            "z_channels": z_channels,
            "w_channels": w_channels,
            "num_layers": len(names) - 1,
            "channel_base": widths[-2] * edge,  # the cutoff of the last hidden layer is edge / 2
            "channel_max": max(widths[:-1]),
            "fourier_channels": 0 if fourier is None else fourier.shape[0],
            "num_fp16_res": int(attributes.get("num_fp16_res", 4)),
        }
