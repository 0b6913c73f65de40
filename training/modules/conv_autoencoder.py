"""A small autoencoder of single frames without norms, for latents that are computed and decoded in real time on a CPU.

Frames are folded by two in each direction first, and unfolded last, so that no convolution works at full resolution.
Norms are left out, as they cost more than the convolutions at these sizes; residual branches begin at zero instead
(Zhang et al., "Fixup Initialization", ICLR 2019, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_utils.precision import HALF_FORMATS
from training.modules.autoencoder import Autoencoder
from training.modules.inference import inference_copy
from training.modules.packed_conv import pack_convolutions
from training.modules.quantizers import Quantizer, make_quantizer
from training.modules.vqgan2d import FrameAutoencoder, conv3


class PlainBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))); the last convolution begins at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.conv2 = conv3(width, width), conv3(width, width)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (N, width, H, W)."""
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


def _blocks(width: int, count: int) -> list[nn.Module]:
    return [PlainBlock(width) for _ in range(count)]


class ConvAutoencoder(FrameAutoencoder):
    """An autoencoder of frames whose stride is 2^len(widths).

    `widths` are those of the levels from fine to coarse, each with `blocks` residual blocks in the encoder and in the
    decoder. `embedding_dim` is the number of channels of the latents, `quantizer` the arguments of `make_quantizer`
    besides sizes; by default latents are continuous.
    """

    def __init__(
        self, height: int = 48, width: int = 64, clip_frames: int = 1, widths: Sequence[int] = (48, 96, 128),
        blocks: int = 2, embedding_dim: int = 8, num_codes: int = 0, channels: int = 3,
        quantizer: Mapping[str, Any] = MappingProxyType({"kind": "none"}),
    ):  # fmt: skip
        super().__init__()
        widths = list(widths)
        self.options = {
            "height": height, "width": width, "clip_frames": clip_frames, "widths": widths, "blocks": blocks,
            "embedding_dim": embedding_dim, "num_codes": num_codes, "channels": channels, "quantizer": dict(quantizer),
        }  # fmt: skip
        self.height, self.width, self.clip_frames = height, width, clip_frames
        self.stride = (1, 1 << len(widths))
        levels = list(zip(widths, widths[1:], strict=False))
        layers: list[nn.Module] = [nn.PixelUnshuffle(2), conv3(4 * channels, widths[0]), *_blocks(widths[0], blocks)]
        for fine, coarse in levels:
            layers += [nn.Conv2d(fine, coarse, 4, 2, 1), *_blocks(coarse, blocks)]
        self.encoder = nn.Sequential(*layers, nn.SiLU(), nn.Conv2d(widths[-1], embedding_dim, 1))
        layers = [conv3(embedding_dim, widths[-1]), *_blocks(widths[-1], blocks)]
        for fine, coarse in reversed(levels):
            layers += [nn.SiLU(), conv3(coarse, 4 * fine), nn.PixelShuffle(2), *_blocks(fine, blocks)]
        self.decoder = nn.Sequential(*layers, nn.SiLU(), conv3(widths[0], 4 * channels), nn.PixelShuffle(2))
        self.quantize = make_quantizer(num_codes, embedding_dim, **quantizer)

    @property
    def quantizer(self) -> Quantizer:
        """See `Autoencoder.quantizer`."""
        return self.quantize

    @property
    def last_layer(self) -> Tensor:
        """See `Autoencoder.last_layer`."""
        last = self.decoder[-2]
        assert isinstance(last, nn.Conv2d)
        return last.weight

    def decoding_copy(self) -> Autoencoder:
        """See `Autoencoder.decoding_copy`: convolutions on a CPU have packed weights."""
        other = inference_copy(self)
        decoder = pack_convolutions(self.decoder, torch.float32 if self.half is None else HALF_FORMATS[self.half])
        other.decoder = cast(nn.Sequential, decoder)
        return other

    def encode_images(self, images: Tensor) -> Tensor:
        """See `FrameAutoencoder.encode_images`."""
        return self.in_chosen(self.encoder, images)

    def decode_images(self, z: Tensor) -> Tensor:
        """See `FrameAutoencoder.decode_images`."""
        return self.in_chosen(self.decoder, z)
