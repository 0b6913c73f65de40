"""Discriminators of patches: of single frames and of clips.

Isola et al. 2017, in the form of TATS (Ge et al., ECCV 2022, section 3.1); the names of the state are those of the
release.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from training.modules.norms import BatchNorm

MAX_WIDTH = 512


class Judged(NamedTuple):
    """What a discriminator makes of its input."""

    logits: Tensor  # (N, 1, ...), above 0 for real
    features: list[Tensor]  # outputs of all blocks; the last are the logits


class PatchDiscriminator(nn.Module):
    """A chain of convolutions of kernel 4 with zero padding 2: of frames (N, C, H, W), or of clips (N, C, T, H, W).

    `num_layers` convolutions of stride 2 and one of stride 1, each but the first followed by batch norm, then one to
    the logits. Widths double from `width` to at most 512.
    """

    def __init__(self, axes: int, channels: int = 3, width: int = 64, num_layers: int = 3):
        super().__init__()
        assert axes in (2, 3), "frames or clips"
        self.options = {"axes": axes, "channels": channels, "width": width, "num_layers": num_layers}
        conv = nn.Conv2d if axes == 2 else nn.Conv3d
        widths = [min(width << level, MAX_WIDTH) for level in range(num_layers + 1)]
        self.model0 = nn.Sequential(conv(channels, width, 4, 2, padding=2), nn.LeakyReLU(0.2))
        self.num_blocks = num_layers + 2
        for level in range(1, num_layers + 1):
            stride = 2 if level < num_layers else 1
            layer = conv(widths[level - 1], widths[level], 4, stride, padding=2)
            self.add_module(f"model{level}", nn.Sequential(layer, BatchNorm(widths[level]), nn.LeakyReLU(0.2)))
        self.add_module(f"model{num_layers + 1}", nn.Sequential(conv(widths[-1], 1, 4, 1, padding=2)))

    def forward(self, x: Tensor) -> Judged:
        """Judge frames or clips."""
        features = []
        for level in range(self.num_blocks):
            x = self.get_submodule(f"model{level}")(x)
            features.append(x)
        return Judged(x, features)
