"""Products and convolutions by oneDNN on CPUs, with weights that are packed once.

On some processors these products are faster than those of PyTorch's BLAS library, and PyTorch packs the weight of a
convolution again in each call.
"""

from __future__ import annotations

import functools
import platform
from typing import NamedTuple

import torch
from torch import Tensor

# Operators that tell whether the processor has the instructions that oneDNN needs for a format.
_SUPPORTED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


@functools.cache
def has_onednn(dtype: torch.dtype = torch.float32) -> bool:
    """Return whether this build of torch has oneDNN's operators for inference, on a processor that they suit.

    In half precision they raise an error on processors without AVX-512 or its successors, where PyTorch's own layers
    are slow but work.
    """
    mkldnn, needed = torch.ops.mkldnn, ["_linear_pointwise", "_reorder_linear_weight", "_convolution_pointwise"]
    needed += [_SUPPORTED[dtype]] if dtype in _SUPPORTED else []
    if not all(hasattr(mkldnn, name) for name in needed) or not torch.backends.mkldnn.is_available():
        return False
    suits = dtype not in _SUPPORTED or getattr(mkldnn, _SUPPORTED[dtype])()
    return suits and platform.machine().lower() in ("x86_64", "amd64")


@functools.cache
def is_amd() -> bool:
    """Return whether the processor is AMD's, for which MKL does not use its fastest code."""
    try:
        with open("/proc/cpuinfo") as file:
            return "AuthenticAMD" in file.read(1 << 12)
    except OSError:
        return "AMD" in platform.processor()


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias by oneDNN, without a graph: (..., in), (out, in), (out,) -> (..., out)."""
    return torch.ops.mkldnn._linear_pointwise(x, dense(weight), bias, "none", [], "")


def dense(weight: Tensor) -> Tensor:
    """Return a weight (out, in), or a copy of it if its rows or columns do not follow each other in memory.

    oneDNN takes a thousand times as long for a part of a larger matrix, such as some frames of a clip.
    """
    return weight if weight.is_mkldnn or weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()


class Convolution(NamedTuple):
    """How a convolution of images moves over them: padding, stride and dilation of each axis, and groups."""

    padding: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


def pack_kernels(weight: Tensor, how: Convolution, shape: torch.Size) -> Tensor:
    """Return a weight (Co, C / groups, kh, kw) in the layout that `convolve` reads fastest for inputs of a shape."""
    padding, stride, dilation, groups = how
    blocked = weight.to_mkldnn(weight.dtype)
    return torch.ops.aten.mkldnn_reorder_conv2d_weight(blocked, padding, stride, dilation, groups, list(shape))


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, how: Convolution) -> Tensor:
    """Return the convolution of images (N, C, H, W) by a weight of `pack_kernels`, without a graph: channels last."""
    padding, stride, dilation, groups = how
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, padding, stride, dilation, groups, "none", [], "")
