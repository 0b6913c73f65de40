"""Linear layers on CPUs: products by oneDNN where it is faster than the BLAS library behind `torch.nn.functional`.

The reference is `torch.nn.functional.linear`; both differ by rounding only. The choice is a function of the processor,
the dtype and the shapes, so that a run that is resumed on the same kind of machine computes the same numbers.
benchmarks/linear.py measures both.

MKL packs the weight again in every call, which dominates products of few rows, and does not use the full width of
AMD's vector units. oneDNN keeps packed weights, but a call costs more, so that small layers stay with MKL.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_utils import distributed
from torch_utils.onednn import has_onednn, is_amd, multiply
from training.modules.inference import inference_copy, replace

# Number of weights from which a packed layer is at least as fast as MKL, for any number of rows.
PACKED_WEIGHTS = 1 << 18
# Multiplications from which a product in training is faster, on processors where MKL is slow.
TRAINED_PRODUCTS = 1 << 25
PACKED_ROWS = 64  # the layout that oneDNN chooses for this number of rows suits all others


class _Linear(torch.autograd.Function):
    """`multiply` with derivatives; the product for the weight is as fast by MKL, which reads transposed operands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return multiply(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (dy,) = gradients
        x, weight = ctx.saved_tensors
        dy = dy.contiguous()
        rows = dy.flatten(0, -2)
        dx = multiply(dy, weight.t()) if ctx.needs_input_grad[0] else None
        dw = rows.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        db = rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return dx, dw, db


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias, differentiable once: (..., in), (out, in), (out,) -> (..., out)."""
    large = weight.device.type == "cpu" and x.numel() * weight.shape[0] >= TRAINED_PRODUCTS
    plain = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    other = torch.compiler.is_compiling() or distributed.is_divided(weight)
    if other or not (large and plain and is_amd() and has_onednn()):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight, bias)  # pyright: ignore[reportReturnType]
    return multiply(x, weight, bias)


class Linear(nn.Linear):
    """`torch.nn.Linear` through `linear`: the same parameters and initial values."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the product: (..., in_features) -> (..., out_features)."""
        return linear(input, self.weight, self.bias)


class PackedLinear(nn.Module):
    """A linear layer for inference, with its weight packed once: (..., in_features) -> (..., out_features)."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features, self.dtype = layer.in_features, layer.out_features, dtype
        weight = layer.weight.detach().to(dtype).contiguous()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product, in the dtype of the weights."""
        return multiply(x.to(self.dtype), self.weight, self.bias)


def pack_linears(network: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a copy of a network for inference in `dtype`, whose large linear layers have packed weights.

    The network's other tensors are shared with the copy, or cast. The copy has no gradients and cannot be saved; make
    a new one when the weights have changed. Small layers, other devices, and builds of torch or processors without the
    operators keep `nn.Linear`, so that the result is the same up to rounding.
    """
    other = inference_copy(network, dtype)
    if can_pack(network, dtype):
        replace(network, other, is_large, lambda layer: PackedLinear(layer, dtype))
    return other


def can_pack(network: nn.Module, dtype: torch.dtype = torch.float32) -> bool:
    """Return whether a network is where packed layers are: on a CPU whose build of torch has their operators."""
    return all(weight.device.type == "cpu" for weight in network.parameters()) and has_onednn(dtype)


def is_large(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a layer is a linear one that is faster when packed."""
    return isinstance(layer, nn.Linear) and layer.weight.numel() >= PACKED_WEIGHTS
