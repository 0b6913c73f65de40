"""Layers of TECO: residual convolutions and pre-norm transformers.

Yan et al., "Temporally Consistent Transformers for Video Generation", ICML 2023, appendix; details that the paper
leaves out are those of its release. Convolutions take (N, C, H, W), transformers (N, L, width).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torch_utils.ops.convolution import Conv2d
from torch_utils.precision import HALF_FORMATS, MixedPrecision
from training.modules.attention import dot_product_attention
from training.modules.linear import Linear
from training.modules.norms import group_norm
from training.modules.quantizers import TRUNCATED_STD

EPSILON = 1e-6  # of all norms
CAUSAL = "causal"
# Which key a query may see: True where row (query) and column (key) say so, or all up to its own, or all.
Visible = Tensor | Literal["causal"] | None
BRANCH = 0.1  # weight of the residual branch of convolutions


def truncated(layer: nn.Conv2d | nn.Linear | nn.ConvTranspose2d, fan_in: int) -> None:
    """Initialise a layer: weights of variance 1 / fan_in from a normal cut at two standard deviations, no bias."""
    std = fan_in**-0.5 / TRUNCATED_STD
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def conv(inputs: int, outputs: int, size: int, bias: bool = True) -> nn.Conv2d:
    """Return a convolution of stride 1 that keeps the size of images."""
    layer = Conv2d(inputs, outputs, size, padding=size // 2, bias=bias)
    truncated(layer, inputs * size * size)
    return layer


def dense(inputs: int, outputs: int, std: float | None = None) -> nn.Linear:
    """Return a linear layer, whose weights are normal if their standard deviation is given."""
    layer = Linear(inputs, outputs)
    truncated(layer, inputs)
    if std is not None:
        nn.init.normal_(layer.weight, std=std)
    return layer


def small_normal(*shape: int) -> nn.Parameter:
    """Return a parameter from N(0, 0.02^2)."""
    return nn.Parameter(torch.randn(shape) * 0.02)


def layer_norm(width: int) -> nn.LayerNorm:
    """Return the layer norm of every part."""
    return nn.LayerNorm(width, eps=EPSILON)


class ResBlock(nn.Module):
    """x + 0.1 conv(elu(norm(conv(elu(norm(x)))))), with a 1x1 convolution of x where the width changes."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = group_norm(inputs), conv(inputs, outputs, 3)
        self.norm2, self.conv2 = group_norm(outputs), conv(outputs, outputs, 3)
        self.skip = conv(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Transform (N, C, H, W)."""
        h = self.conv1(F.elu(self.norm1(x)))
        return self.skip(x) + BRANCH * self.conv2(F.elu(self.norm2(h)))


def res_blocks(inputs: int, width: int, count: int) -> list[nn.Module]:
    """Return residual blocks in sequence, the first of which changes the width."""
    return [ResBlock(inputs if i == 0 else width, width) for i in range(count)]


def in_precision(part: MixedPrecision, x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which a part computes: its half precision, else what the caller has chosen.

    Norms and the residual stream of transformers stay in float32, as do the results.
    """
    return contextlib.nullcontext() if part.half is None else torch.autocast(x.device.type, HALF_FORMATS[part.half])


def run_block(block: nn.Module, recompute: bool, *inputs: Any) -> Any:
    """Return the output of a block; with `recompute` its activations are not kept, but computed again for gradients."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


# ----------------------------------------------------------------------------
# Transformers.


class KeyValueCache:
    """Keys and values (N, heads, L, width of a head) of the last `capacity` tokens of one attention layer.

    The memory is allocated once. Older tokens are overwritten in turn: attention does not depend on their order.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.count = capacity, 0
        self.keys = self.values = torch.empty(0)

    def push(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the next tokens, and return keys and values of all tokens that are held."""
        num_new = keys.shape[2]
        assert num_new <= self.capacity, (num_new, self.capacity)
        if self.count == 0:
            shape = (*keys.shape[:2], self.capacity, keys.shape[3])
            self.keys, self.values = keys.new_empty(shape), values.new_empty(shape)
        at = self.count % self.capacity
        first = min(num_new, self.capacity - at)
        for held, new in ((self.keys, keys), (self.values, values)):
            held[:, :, at : at + first] = new[:, :, :first]
            held[:, :, : num_new - first] = new[:, :, first:]
        self.count += num_new
        length = min(self.count, self.capacity)
        return self.keys[:, :, :length], self.values[:, :, :length]


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate pairs of channels of (N, heads, L, D) by angles (L, D / 2): Su et al. 2021, eq. 34, in halves."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    """Attention of several heads, softmax(q.k / sqrt(D)) v, where D is the width of a head."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}: use a divisor")
        self.heads = heads
        self.query, self.key, self.value, self.out = (dense(width, width, width**-0.5) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        """Return (N, L, heads * D) as (N, heads, L, D)."""
        # With tensor parallelism a rank has some of the heads.
        return x.unflatten(2, (-1, self.query.out_features // self.heads)).transpose(1, 2)

    def project(self, x: Tensor, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of all heads."""
        return self.query(queries), self.key(x), self.value(x)

    def forward(
        self, x: Tensor, queries: Tensor | None, mask: Visible, angles: Tensor | None, cache: KeyValueCache | None
    ) -> Tensor:
        """Return what `queries` (N, M, width), by default all tokens, find among x (N, L, width): (N, M, width).

        `angles` (L, D / 2) rotate queries and keys. A `cache` holds the keys and values of earlier tokens, and takes
        these.
        """
        q, k, v = (self.split(part) for part in self.project(x, x if queries is None else queries))
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            k, v = cache.push(k, v)
        rows, causal = (mask, False) if isinstance(mask, Tensor) else (None, mask == CAUSAL)
        found = dot_product_attention(q, k, v, rows, causal)
        return self.out(found.transpose(1, 2).flatten(2))


SLOPE = 1.702  # x sigmoid(SLOPE x) is close to GELU


class TransformerLayer(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)), where the MLP has the activation x sigmoid(1.702 x)."""

    def __init__(self, width: int, mlp: int, heads: int):
        super().__init__()
        self.norm1, self.attention = layer_norm(width), Attention(width, heads)
        self.norm2, self.wi, self.wo = layer_norm(width), dense(width, mlp), dense(mlp, width)

    def forward(
        self, x: Tensor, mask: Visible = None, angles: Tensor | None = None, cache: KeyValueCache | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Transform tokens (N, L, width), of which only those numbered `wanted` (N, M) are returned, if given.

        Tokens that are selected see all tokens. See `Attention.forward` for the others.
        """
        normed, queries = self.norm1(x), None
        if wanted is not None:
            assert angles is None and cache is None, "tokens are selected without rotary positions and caches"
            queries, x, mask = take_tokens(normed, wanted), take_tokens(x, wanted), None
        x = x + self.attention(normed, queries, mask, angles, cache)
        return x + self.mlp(self.norm2(x))

    def mlp(self, x: Tensor) -> Tensor:
        """Return the second branch of normed tokens (N, L, width)."""
        h = self.wi(x)
        return self.wo(h * torch.sigmoid(SLOPE * h))


def take_tokens(x: Tensor, wanted: Tensor) -> Tensor:
    """Return the tokens numbered `wanted` (N, M) of (N, L, width): (N, M, width)."""
    return x.gather(1, wanted.unsqueeze(2).expand(-1, -1, x.shape[2]))


class Transformer(nn.Module):
    """A linear layer, an added position code, layers, then a linear layer, GELU (tanh) and layer norm."""

    def __init__(self, inputs: int, width: int, mlp: int, heads: int, layers: int):
        super().__init__()
        self.input = dense(inputs, width)
        self.layers = nn.ModuleList(TransformerLayer(width, mlp, heads) for _ in range(layers))
        self.head, self.norm = dense(width, width), layer_norm(width)
        self.recompute = False  # whether activations are computed again for gradients

    def forward(
        self, x: Tensor, position: Tensor, mask: Visible = None, angles: Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None, wanted: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Transform tokens (N, L, inputs) with position codes (L, width) into (N, L, width); see the layers."""
        return self.features(self.input(x) + position, mask, angles, caches, wanted)

    def features(
        self, x: Tensor, mask: Visible = None, angles: Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None, wanted: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Transform tokens (N, L, width) that have their position codes; see `forward`."""
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            cache = None if caches is None else caches[i]
            x = run_block(layer, self.recompute, x, mask, angles, cache, wanted if i == last else None)
        return self.norm(F.gelu(self.head(x).to(x.dtype), approximate="tanh"))


def sinusoid(length: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return the code of positions 0 ... length - 1: (length, width), all sines, then all cosines.

    Vaswani et al. 2017, section 3.5, with another order of channels.
    """
    frequencies = 10000.0 ** (-2 * torch.arange(width // 2, dtype=torch.float64, device=device) / width)
    angles = torch.arange(length, dtype=torch.float64, device=device).unsqueeze(1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()
