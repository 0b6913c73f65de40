"""The networks of TECO prepared for generation: the same results up to rounding, in less time.

- Large linear layers have packed weights, in bfloat16 where the network computes in it; norms, softmax, the residual
  stream and the codebook stay in float32.
- On CPUs keys and values are one product, and the slope of the activation is part of the weights around it.
- The prior's passes over one frame share what depends on h alone, its part of the first linear layer; the part of the
  codes is a table. In the last layer only the cells whose codes are drawn have queries.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_utils.precision import HALF_FORMATS, MixedPrecision
from training.modules.inference import replace
from training.modules.linear import PackedLinear, has_onednn, is_large, pack_linears
from training.teco.layers import SLOPE, Attention, Transformer, TransformerLayer, in_precision
from training.teco.networks import TECO, CodePredictor, MaskGit


class FastPrior(MixedPrecision):
    """`MaskGit` for generation."""

    def __init__(self, prior: MaskGit):
        super().__init__()
        self.half, self.num_codes = prior.half, prior.num_codes
        weight, width = prior.net.input.weight, prior.token_embed.shape[1]
        self.tokens = F.linear(prior.token_embed, weight[:, :width])  # (K + 1, width of the transformer)
        self.h_weight, self.position = weight[:, width:], prior.position() + prior.net.input.bias
        output = nn.Linear(width, self.num_codes, device="meta")
        output.weight, output.bias = nn.Parameter(prior.token_embed[:-1]), prior.bias
        parts = nn.ModuleDict({"net": prior.net, "head": prior.head, "norm": prior.norm, "output": output})
        packed = pack(parts, prior.half)
        self.net, self.head, self.norm, self.output = (packed.get_submodule(name) for name in parts)

    def begin(self, h: Tensor) -> CodePredictor:
        """See `MaskGit.begin`."""
        net = self.net
        assert isinstance(net, Transformer)
        prepared = F.linear(h.flatten(2).transpose(1, 2), self.h_weight) + self.position  # (N, cells, width)

        def predict(codes: Tensor, wanted: Tensor) -> Tensor:
            with in_precision(self, h):
                x = net.features(F.embedding(codes, self.tokens) + prepared, wanted=wanted)
                x = self.norm(F.gelu(self.head(x).to(x.dtype), approximate="tanh"))
                return self.output(x).to(x.dtype)

        return predict


class FastAttention(Attention):
    """`Attention` with one product for keys and values."""

    def __init__(self, attention: Attention):
        nn.Module.__init__(self)
        self.heads, self.query, self.out = attention.heads, attention.query, attention.out
        layers = attention.key, attention.value
        self.key_value = made(
            torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
        )

    def project(self, x: Tensor, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Attention.project`."""
        k, v = self.key_value(x).chunk(2, dim=2)
        return self.query(queries), k, v


class FastLayer(TransformerLayer):
    """`TransformerLayer` whose activation is x sigmoid(x): its slope lies in the weights before and after it."""

    def __init__(self, layer: TransformerLayer):
        nn.Module.__init__(self)
        self.norm1, self.norm2, self.attention = layer.norm1, layer.norm2, FastAttention(layer.attention)
        self.wi, self.wo = (
            made(SLOPE * layer.wi.weight, SLOPE * layer.wi.bias),
            made(layer.wo.weight / SLOPE, layer.wo.bias),
        )

    def mlp(self, x: Tensor) -> Tensor:
        """See `TransformerLayer.mlp`."""
        return self.wo(F.silu(self.wi(x)))


def made(weight: Tensor, bias: Tensor) -> nn.Linear:
    """Return a linear layer of these values."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = (nn.Parameter(value, requires_grad=False) for value in (weight, bias))
    return layer


def prepare(network: TECO) -> TECO:
    """Return a copy for generation, which shares most tensors; make a new one when the weights have changed."""
    with torch.no_grad():
        other = pack_linears(network)
        assert isinstance(other, TECO)
        other.add_module("temporal", pack(network.temporal, network.temporal.half))
        other.add_module("prior", FastPrior(network.prior))
        return other


def pack(part: nn.Module, half: str | None) -> nn.Module:
    """Return a copy of a part whose large linear layers have packed weights, on CPUs in its half precision."""
    if next(part.parameters()).device.type != "cpu" or not has_onednn():
        return pack_linears(part)
    part = copy.deepcopy(part, {id(tensor): tensor for tensor in (*part.parameters(), *part.buffers())})
    for module in list(part.modules()):
        if isinstance(module, Transformer):
            module.layers = nn.ModuleList(FastLayer(cast(TransformerLayer, layer)) for layer in module.layers)
    other = pack_linears(part)
    if half is None or not has_onednn(HALF_FORMATS[half]):
        return other
    replace(part, other, is_large, lambda layer: PackedLinear(layer, HALF_FORMATS[half]))
    return other
