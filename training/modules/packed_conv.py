"""Convolutions of small images on CPUs, for inference, with weights that are packed once.

The reference is `torch.nn.Conv2d`; results differ by rounding. PyTorch packs the weight in every call, which takes as
long as the convolution where images have few pixels: benchmarks/linear.py measures it.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

from torch_utils.onednn import Convolution, convolve, has_onednn, pack_kernels
from training.modules.linear import inference_copy, replace


class PackedConv2d(nn.Module):
    """A convolution for inference: (N, in_channels, H, W) -> (N, out_channels, H', W'), the latter channels last.

    The weight is packed for the shape of the first input, and again where the shape changes. The result has the dtype
    of the weight.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype = torch.float32):
        super().__init__()
        if not is_plain(conv):
            raise ValueError(f"{conv} pads otherwise than by a number of zeros: it cannot be packed")
        (top, left), (down, right), (high, wide) = conv.padding, conv.stride, conv.dilation
        assert isinstance(top, int) and isinstance(left, int), "is_plain"
        self.how = Convolution((top, left), (down, right), (high, wide), conv.groups)
        self.weight = conv.weight.detach().to(dtype)
        self.bias = None if conv.bias is None else conv.bias.detach().to(dtype)
        self.shape: torch.Size | None = None
        self.packed = self.weight

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if x.shape != self.shape:
            self.shape, self.packed = x.shape, pack_kernels(self.weight, self.how, x.shape)
        return convolve(x.to(self.weight.dtype), self.packed, self.bias, self.how)


def is_plain(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Return whether a layer is a convolution of images that can be packed."""
    return isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def can_pack(network: nn.Module, dtype: torch.dtype = torch.float32) -> bool:
    """Return whether a network is where packed convolutions are: on a CPU whose build of torch has them."""
    return all(weight.device.type == "cpu" for weight in network.parameters()) and has_onednn(dtype)


def pack_convolutions(network: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a copy of a network for inference in `dtype`, whose convolutions of images have packed weights.

    The network's other tensors are shared with the copy, or cast. The copy has no gradients and cannot be saved; make a
    new one when the weights have changed. Where `can_pack` is false, it keeps `nn.Conv2d`.
    """
    other = inference_copy(network, dtype)
    if can_pack(network, dtype):
        replace(network, other, is_plain, lambda conv: PackedConv2d(conv, dtype))
    return other
