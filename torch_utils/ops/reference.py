"""The literal composition of FIR resampling: zero insertion, padding, depthwise convolution, decimation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F


def resample(
    x: torch.Tensor,
    kernels: Sequence[torch.Tensor],
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, int, int, int],
) -> torch.Tensor:
    """Up-sample, filter and decimate x (N, C, H, W) step by step, as defined.

    `kernels` are applied one after another, each [kh, kw] in correlation order with its gain included; up and down
    are (x, y), padding is (x0, x1, y0, y1), counted after zero insertion.
    """
    batch_size, num_channels, height, width = x.shape
    (up_x, up_y), (down_x, down_y) = up, down
    x0, x1, y0, y1 = padding

    x = x.reshape(batch_size, num_channels, height, 1, width, 1)
    x = F.pad(x, [0, up_x - 1, 0, 0, 0, up_y - 1])
    x = x.reshape(batch_size, num_channels, height * up_y, width * up_x)

    x = F.pad(x, [max(p, 0) for p in (x0, x1, y0, y1)])
    x = x[:, :, max(-y0, 0) : x.shape[2] - max(-y1, 0), max(-x0, 0) : x.shape[3] - max(-x1, 0)]

    for kernel in kernels:
        kernel = kernel.to(dtype=x.dtype, device=x.device)
        x = F.conv2d(x, kernel.expand(num_channels, 1, -1, -1), groups=num_channels)
    return x[:, :, ::down_y, ::down_x]
