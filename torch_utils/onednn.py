"""Matrix products by oneDNN on CPUs, and on which processors they are faster than the BLAS library of PyTorch."""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor

# Operators that tell whether the processor has the instructions that oneDNN needs for a format.
_SUPPORTED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


@functools.cache
def has_onednn(dtype: torch.dtype = torch.float32) -> bool:
    """Return whether this build of torch has oneDNN's operators for linear layers, on a processor that they suit.

    In half precision they raise an error on processors without AVX-512 or its successors, where PyTorch's own layers
    are slow but work.
    """
    mkldnn, needed = torch.ops.mkldnn, ["_linear_pointwise", "_reorder_linear_weight"]
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
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
