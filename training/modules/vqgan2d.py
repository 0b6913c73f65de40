"""2-D autoencoders of single frames: the VQGAN of taming-transformers, and the small VQ-VAE of RIVER.

Esser et al., "Taming Transformers for High-Resolution Image Synthesis", CVPR 2021: TECO encodes frames with it, and
RIVER, for most datasets, with that of latent diffusion (Rombach et al., CVPR 2022), which is the same network. The
names of the state are those of the releases. Frames of a video are encoded independently of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_utils.ops.convolution import Conv2d
from training.modules.attention import dot_product_attention
from training.modules.autoencoder import Autoencoder, check_divisible
from training.modules.inplace import add, swish
from training.modules.norms import BatchNorm, group_norm
from training.modules.quantizers import Quantizer, make_quantizer


class FrameAutoencoder(Autoencoder):
    """An autoencoder of images, applied to each frame of a video; subclasses define `encode_images`, `decode_images`.

    `stride` is (1, pixels along an edge of a cell). At most `frames_at_once` frames are computed together without
    gradients, so that memory does not grow with the length of a video.
    """

    frames_at_once = 64

    def encode_images(self, images: Tensor) -> Tensor:
        """Return the latents before quantization of images: (N, 3, H, W) -> (N, C, h, w)."""
        raise NotImplementedError

    def decode_images(self, z: Tensor) -> Tensor:
        """Return the images of latents: (N, C, h, w) -> (N, 3, H, W)."""
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        """See `Autoencoder.features`; raises `ValueError` if the stride does not divide the frames."""
        check_divisible(x, (1, self.stride[1], self.stride[1]))
        return self._each_frame(self.encode_images, x)

    def generate(self, z: Tensor) -> Tensor:
        """See `Autoencoder.generate`."""
        return self._each_frame(self.decode_images, z)

    def _each_frame(self, process: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        images = x.transpose(1, 2).flatten(0, 1)  # (N * T, C, H, W)
        size = len(images) if torch.is_grad_enabled() or self.training else self.frames_at_once
        done = torch.cat([process(part) for part in images.split(max(size, 1))])
        return done.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def conv3(inputs: int, outputs: int, bias: bool = True, stride: int = 1, padding: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution."""
    return Conv2d(inputs, outputs, 3, stride, padding, bias=bias)


def double(x: Tensor) -> Tensor:
    """Repeat each pixel 2x2: (N, C, H, W) -> (N, C, 2 H, 2 W)."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


# ----------------------------------------------------------------------------
# The VQGAN of taming-transformers.


class ResnetBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a 1x1 convolution of x where the width changes."""

    def __init__(self, inputs: int, outputs: int, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.conv1 = group_norm(inputs), conv3(inputs, outputs)
        self.norm2, self.conv2 = group_norm(outputs), conv3(outputs, outputs)
        self.dropout = nn.Dropout(dropout)
        self.nin_shortcut = Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Transform (N, C, H, W)."""
        h = self.conv1(swish(self.norm1(x)))
        return add(self.conv2(self.dropout(swish(self.norm2(h)))), self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """x + self-attention of one head over all positions."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v = (Conv2d(channels, channels, 1) for _ in range(3))
        self.proj_out = Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (N, C, H, W)."""
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # (N, H * W, C)
        found = dot_product_attention(q, k, v)  # scaled by C^-1/2
        return add(self.proj_out(found.transpose(1, 2).unflatten(2, x.shape[2:])), x)


class Downsample(nn.Module):
    """A convolution of stride 2 after zero padding on the right and at the bottom."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3(channels, channels, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        """Halve (N, C, H, W)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """A convolution of the doubled image."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Double (N, C, H, W)."""
        return self.conv(double(x))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if there is any, then a change of resolution."""

    def __init__(self, widths: Sequence[int], attention: bool, dropout: float, resample: nn.Module | None, name: str):
        super().__init__()
        pairs = list(zip(widths, widths[1:], strict=False))
        self.block = nn.ModuleList(ResnetBlock(a, b, dropout) for a, b in pairs)
        self.attn = nn.ModuleList(AttnBlock(b) for _, b in pairs if attention)
        self.resample_name = name
        if resample is not None:
            self.add_module(name, resample)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (N, C, H, W)."""
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        resample = self._modules.get(self.resample_name)
        return x if resample is None else resample(x)


class Middle(nn.Module):
    """A residual block, attention, a residual block."""

    def __init__(self, channels: int, dropout: float):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (N, C, H, W)."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder2d(nn.Module):
    """Images (N, channels, H, W) -> features (N, outputs, H / f, W / f), f = 2^(levels - 1).

    Attention stands where the *nominal* side, `resolution` halved at each level, is in `attention`, whatever the size
    of the images.
    """

    def __init__(
        self, resolution: int, ch: int, ch_mult: Sequence[int], num_res_blocks: int, attention: Sequence[int],
        channels: int, outputs: int, dropout: float,
    ):  # fmt: skip
        super().__init__()
        widths = [ch * factor for factor in ch_mult]
        self.conv_in = conv3(channels, ch)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            before = ch if level == 0 else widths[level - 1]
            resample = Downsample(width) if level < len(widths) - 1 else None
            inner = [before, *[width] * num_res_blocks]
            self.down.append(Level(inner, resolution >> level in attention, dropout, resample, "downsample"))
        self.mid = Middle(widths[-1], dropout)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = conv3(widths[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Encode images."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(swish(self.norm_out(self.mid(x))))


class Decoder2d(nn.Module):
    """Features (N, inputs, h, w) -> images (N, channels, f h, f w); the entries of `up` are used last to first."""

    def __init__(
        self, resolution: int, ch: int, ch_mult: Sequence[int], num_res_blocks: int, attention: Sequence[int],
        channels: int, inputs: int, dropout: float,
    ):  # fmt: skip
        super().__init__()
        widths = [ch * factor for factor in ch_mult]
        self.conv_in = conv3(inputs, widths[-1])
        self.mid = Middle(widths[-1], dropout)
        self.up = nn.ModuleList()
        for level, width in enumerate(widths):
            before = widths[min(level + 1, len(widths) - 1)]
            resample = Upsample(width) if level > 0 else None
            inner = [before, *[width] * (num_res_blocks + 1)]
            self.up.append(Level(inner, resolution >> level in attention, dropout, resample, "upsample"))
        self.norm_out = group_norm(widths[0])
        self.conv_out = conv3(widths[0], channels)

    def forward(self, x: Tensor) -> Tensor:
        """Decode features."""
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(swish(self.norm_out(x)))


class VQGAN2D(FrameAutoencoder):
    """The VQGAN of taming-transformers and latent diffusion; the stride is 2^(len(ch_mult) - 1).

    Widths must be multiples of 32. `quantizer` are the arguments of `make_quantizer` besides sizes.
    """

    def __init__(
        self, height: int = 256, width: int = 256, clip_frames: int = 16, resolution: int = 256, ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4), num_res_blocks: int = 2, attn_resolutions: Sequence[int] = (16,),
        z_channels: int = 256, embedding_dim: int = 256, num_codes: int = 1024, channels: int = 3,
        double_z: bool = False, dropout: float = 0.0, quantizer: Mapping[str, Any] = MappingProxyType({}),
    ):  # fmt: skip
        super().__init__()
        ch_mult, attn_resolutions = list(ch_mult), list(attn_resolutions)
        self.options = {
            "height": height, "width": width, "clip_frames": clip_frames, "resolution": resolution, "ch": ch,
            "ch_mult": ch_mult, "num_res_blocks": num_res_blocks, "attn_resolutions": attn_resolutions,
            "z_channels": z_channels, "embedding_dim": embedding_dim, "num_codes": num_codes, "channels": channels,
            "double_z": double_z, "dropout": dropout, "quantizer": dict(quantizer),
        }  # fmt: skip
        self.height, self.width, self.clip_frames = height, width, clip_frames
        self.stride = (1, 1 << (len(ch_mult) - 1))
        encoded = 2 * z_channels if double_z else z_channels
        trunk = resolution, ch, ch_mult, num_res_blocks, attn_resolutions, channels
        self.encoder = Encoder2d(*trunk, outputs=encoded, dropout=dropout)
        self.decoder = Decoder2d(*trunk, inputs=z_channels, dropout=dropout)
        self.quantize = make_quantizer(num_codes, embedding_dim, **quantizer)
        self.quant_conv = nn.Conv2d(encoded, embedding_dim, 1)
        self.post_quant_conv = nn.Conv2d(embedding_dim, z_channels, 1)

    @property
    def quantizer(self) -> Quantizer:
        """See `Autoencoder.quantizer`."""
        return self.quantize

    @property
    def last_layer(self) -> Tensor:
        """See `Autoencoder.last_layer`."""
        return self.decoder.conv_out.weight

    def encode_images(self, images: Tensor) -> Tensor:
        """See `FrameAutoencoder.encode_images`."""
        return self.in_chosen(lambda images: self.quant_conv(self.encoder(images)), images)

    def decode_images(self, z: Tensor) -> Tensor:
        """See `FrameAutoencoder.decode_images`."""
        return self.in_chosen(lambda z: self.decoder(self.post_quant_conv(z)), z)


# ----------------------------------------------------------------------------
# The small VQ-VAE of RIVER, for CLEVRER.


class PooledResidual(nn.Module):
    """A residual block of two convolutions without bias; a pool of `factor` after the first one and in the shortcut.

    `bn1` and `bn2` are group norms; so they are called in the release.
    """

    def __init__(self, inputs: int, outputs: int, factor: int):
        super().__init__()
        self.conv1, self.bn1 = conv3(inputs, outputs, bias=False), group_norm(outputs)
        self.conv2, self.bn2 = conv3(outputs, outputs, bias=False), group_norm(outputs)
        self.pool = nn.AvgPool2d(factor) if factor > 1 else nn.Identity()
        changes = factor > 1 or inputs != outputs
        shortcut = nn.Conv2d(inputs, outputs, 1, bias=False), self.pool, group_norm(outputs)
        self.downsample = nn.Sequential(*shortcut) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Transform (N, C, H, W)."""
        h = F.leaky_relu(self.bn1(self.pool(self.conv1(x))), 0.2)
        return F.leaky_relu(self.bn2(self.conv2(h)) + self.downsample(x), 0.2)


class Doubling(nn.Module):
    """The doubled image, a convolution without bias, batch norm and leaky ReLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv, self.norm = conv3(channels, channels, bias=False), BatchNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Double (N, C, H, W)."""
        return F.leaky_relu(self.norm(self.conv(double(x))), 0.2)


class AttentiveTrunk(nn.Module):
    """The common middle of RIVER's encoder and decoder: a residual block, self-attention, a residual block."""

    WIDTH = 256

    def __init__(self) -> None:
        super().__init__()
        self.pre_attn_residual = PooledResidual(self.WIDTH, self.WIDTH, 1)
        self.attn_norm = group_norm(self.WIDTH)
        self.attn = nn.MultiheadAttention(self.WIDTH, 1, batch_first=True)
        self.post_attn_residual = PooledResidual(self.WIDTH, self.WIDTH, 1)

    def middle(self, x: Tensor) -> Tensor:
        """Transform (N, 256, H, W)."""
        x = self.pre_attn_residual(x)
        normed = self.attn_norm(x).flatten(2).transpose(1, 2)  # (N, H * W, C)
        found, _ = self.attn(normed, normed, normed, need_weights=False)
        return self.post_attn_residual(x + found.transpose(1, 2).unflatten(2, x.shape[2:]))


class RiverEncoder(AttentiveTrunk):
    """Images (N, channels, H, W) -> latents (N, outputs, H / 8, W / 8)."""

    def __init__(self, channels: int, outputs: int):
        super().__init__()
        self.conv_in = conv3(channels, 32)
        self.residuals = nn.Sequential(*(PooledResidual(width, 2 * width, 2) for width in (32, 64, 128)))
        self.out_norm, self.out_conv = group_norm(self.WIDTH), conv3(self.WIDTH, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Encode images."""
        return self.out_conv(swish(self.out_norm(self.middle(self.residuals(self.conv_in(x))))))


class RiverDecoder(AttentiveTrunk):
    """Latents (N, inputs, h, w) -> images (N, channels, 8 h, 8 w) in [-1, 1]."""

    def __init__(self, inputs: int, channels: int):
        super().__init__()
        self.conv_in = conv3(inputs, self.WIDTH)
        self.residuals = nn.Sequential(
            *(nn.Sequential(PooledResidual(width, width // 2, 1), Doubling(width // 2)) for width in (256, 128, 64))
        )
        self.out_norm, self.out_conv = group_norm(32), conv3(32, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Decode latents."""
        return self.out_conv(swish(self.out_norm(self.residuals(self.middle(self.conv_in(x)))))).tanh()


class RiverVQVAE(FrameAutoencoder):
    """RIVER's own VQ-VAE (Davtyan et al., ICCV 2023): stride 8, fixed widths; defaults are those for CLEVRER."""

    def __init__(
        self, height: int = 128, width: int = 128, clip_frames: int = 16, embedding_dim: int = 4,
        num_codes: int = 8192, channels: int = 3, quantizer: Mapping[str, Any] = MappingProxyType({}),
    ):  # fmt: skip
        super().__init__()
        self.options = {
            "height": height, "width": width, "clip_frames": clip_frames, "embedding_dim": embedding_dim,
            "num_codes": num_codes, "channels": channels, "quantizer": dict(quantizer),
        }  # fmt: skip
        self.height, self.width, self.clip_frames, self.stride = height, width, clip_frames, (1, 8)
        self.encoder = RiverEncoder(channels, embedding_dim)
        self.decoder = RiverDecoder(embedding_dim, channels)
        self.vector_quantizer = make_quantizer(num_codes, embedding_dim, **quantizer)

    @property
    def quantizer(self) -> Quantizer:
        """See `Autoencoder.quantizer`."""
        return self.vector_quantizer

    @property
    def last_layer(self) -> Tensor:
        """See `Autoencoder.last_layer`."""
        return self.decoder.out_conv.weight

    def encode_images(self, images: Tensor) -> Tensor:
        """See `FrameAutoencoder.encode_images`."""
        return self.in_chosen(self.encoder, images)

    def decode_images(self, z: Tensor) -> Tensor:
        """See `FrameAutoencoder.decode_images`."""
        return self.in_chosen(self.decoder, z)
