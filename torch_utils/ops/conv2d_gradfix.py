"""Convolutions under the names that published network pickles import; those of PyTorch are twice differentiable."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from torch_utils.ops import convolution

IntPair = int | tuple[int, int] | list[int]


def conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> torch.Tensor:
    """Correlate input (N, C, H, W) with weight (out, C / groups, kh, kw); see torch.nn.functional.conv2d."""
    return convolution.conv2d(input, weight, bias, stride, padding, dilation, groups)


def conv_transpose2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair = 0,
    output_padding: IntPair = 0,
    groups: int = 1,
    dilation: IntPair = 1,
) -> torch.Tensor:
    """Return the transposed convolution of input (N, C, H, W) with weight (C, out / groups, kh, kw).

    See torch.nn.functional.conv_transpose2d.
    """
    return F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
