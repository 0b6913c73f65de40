"""Grid sampling under the name that published network pickles import; that of PyTorch is twice differentiable."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def grid_sample(input: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Sample input (N, C, H, W) bilinearly at grid (N, h, w, 2) in [-1, 1] with zeros outside; return (N, C, h, w).

    -1 and 1 are the outer edges of the image, not the centres of its outer pixels.
    """
    return F.grid_sample(input, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
