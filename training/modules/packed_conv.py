"""Convolutions of small images on CPUs, for inference, with weights that are packed once.

The reference is `torch.nn.Conv2d`; results differ by rounding. PyTorch packs the weight in every call, which takes as
long as the convolution where images have few pixels: benchmarks/linear.py measures it.
"""

from __future__ import annotations

from typing import TypeGuard, cast

import torch
from torch import Tensor, nn

from torch_utils.onednn import Convolution, convolve, pack_kernels
from torch_utils.ops.convolution import Conv2d
from training.modules.inference import inference_copy, replace
from training.modules.linear import can_pack


class PackedConv2d(nn.Module):
    """A convolution for inference: (N, in_channels, H, W) -> (N, out_channels, H', W'), the latter channels last.

    N is at least 1. The layout of the weight depends on the shape of the input and on the number of threads, so that it
    is packed when they are first known and where they change. The result has the dtype of the weight, float32 or a half
    precision.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype = torch.float32):
        super().__init__()
        if not _pads_zeros(conv):
            raise ValueError(f"{conv} pads otherwise than by a number of zeros: it cannot be packed")
        padding = cast(tuple[int, int], conv.padding)
        stride, dilation = cast(tuple[int, int], conv.stride), cast(tuple[int, int], conv.dilation)
        self.how = Convolution(padding, stride, dilation, conv.groups)
        self.weight = conv.weight.detach().to(dtype)
        self.bias = None if conv.bias is None else conv.bias.detach().to(dtype)
        self.key: tuple[torch.Size, int] | None = None
        self.packed = self.weight

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        key = x.shape, torch.get_num_threads()
        if key != self.key:
            self.key, self.packed = key, pack_kernels(self.weight, self.how, x.shape)
        return convolve(x.to(self.weight.dtype), self.packed, self.bias, self.how)


def is_plain(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Return whether a layer is a convolution of images, and none of another class, that can be packed."""
    return isinstance(layer, nn.Conv2d) and type(layer) in (nn.Conv2d, Conv2d) and _pads_zeros(layer)


def _pads_zeros(conv: nn.Conv2d) -> bool:
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def pack_convolutions(network: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a copy of a network for inference in `dtype`, whose convolutions of images have packed weights.

    The network's other tensors are shared with the copy, or cast. The copy has no gradients and cannot be saved; make a
    new one when the weights have changed. Where `can_pack` is false, it keeps `nn.Conv2d`.
    """
    other = inference_copy(network, dtype)
    if can_pack(network, dtype):
        replace(network, other, is_plain, lambda conv: PackedConv2d(conv, dtype))
    return other
