"""The network that refines decoded frames: residual channel attention (RCAN, Zhang et al., ECCV 2018), and SSIM.

RIVER's release has it for BAIR at 64x64, against flicker, as it sees the frame before, too. Names are the release's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_utils.ops.convolution import Conv2d


def conv3(inputs: int, outputs: int) -> nn.Conv2d:
    """Return a 3x3 convolution."""
    return Conv2d(inputs, outputs, 3, padding=1)


class ChannelAttention(nn.Module):
    """Channels weighted by a function of their means."""

    def __init__(self, width: int, reduction: int):
        super().__init__()
        self.conv_du = nn.Sequential(
            nn.Conv2d(width, width // reduction, 1), nn.ReLU(), nn.Conv2d(width // reduction, width, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Weigh (N, C, H, W)."""
        return x * self.conv_du(x.mean((2, 3), keepdim=True))


class Residual(nn.Module):
    """x + body(x)."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (N, C, H, W)."""
        return x + self.body(x)


class RCAN(nn.Module):
    """Refine a frame given the one before: (N, 3, H, W) each -> (N, 3, H, W)."""

    def __init__(self, groups: int = 4, blocks: int = 5, width: int = 64, reduction: int = 8, tanh: bool = False):
        super().__init__()
        self.options = {"groups": groups, "blocks": blocks, "width": width, "reduction": reduction, "tanh": tanh}
        if width < reduction:
            raise ValueError(f"a width of {width} cannot be reduced {reduction} times: use a wider network")

        def block() -> Residual:
            return Residual(conv3(width, width), nn.ReLU(), conv3(width, width), ChannelAttention(width, reduction))

        def group() -> Residual:
            return Residual(*(block() for _ in range(blocks)), conv3(width, width))

        self.head = conv3(6, width)
        self.body = nn.Sequential(*(group() for _ in range(groups)), conv3(width, width))
        self.tail = nn.Sequential(conv3(width, 3), nn.Tanh()) if tanh else conv3(width, 3)

    def forward(self, previous: Tensor, frame: Tensor) -> Tensor:
        """See the class."""
        x = self.head(torch.cat([previous, frame], dim=1))
        return self.tail(self.body(x) + x)


def ssim(a: Tensor, b: Tensor, data_range: float = 2.0) -> Tensor:
    """Return the mean SSIM of images (N, C, H, W): (N,).

    As the release measures it: an 11x11 Gaussian window of standard deviation 1.5, and reflected borders.
    """
    places = torch.arange(11, device=a.device, dtype=a.dtype) - 5
    window = torch.exp(-places.square() / (2 * 1.5**2))
    window = window / window.sum()
    channels = a.shape[1]

    def blur(x: Tensor) -> Tensor:
        x = F.pad(x, (5, 5, 5, 5), mode="reflect")
        x = F.conv2d(x, window.expand(channels, 1, 1, -1), groups=channels)
        return F.conv2d(x, window.unsqueeze(1).expand(channels, 1, -1, -1), groups=channels)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a.square(), blur(b * b) - mean_b.square()
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (similarity / ((mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2))).mean((1, 2, 3))


def psnr(a: Tensor, b: Tensor, data_range: float = 2.0) -> Tensor:
    """Return the peak signal-to-noise ratio of images (N, C, H, W) in dB: (N,)."""
    return 10 * torch.log10(data_range**2 / ((a - b).square().mean((1, 2, 3)) + 1e-10))
