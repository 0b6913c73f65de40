"""Matrix products by oneDNN on CPUs, and on which processors they are faster than the BLAS library of PyTorch."""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor


@functools.cache
def has_onednn() -> bool:
    """Return whether this build of torch has oneDNN's operators for linear layers, on a processor that they suit."""
    operators = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return operators and torch.backends.mkldnn.is_available() and platform.machine().lower() in ("x86_64", "amd64")


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
