"""Attention of several heads, and the cache of keys and values of a sequence that grows."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

FEW_KEYS = 512  # up to which `explicit_attention` is faster in training in half precision on a CPU
HALF = (torch.bfloat16, torch.float16)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return (N, L, d) as (N, heads, L, d / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    """Return (N, heads, L, d / heads) as (N, L, d)."""
    return x.transpose(-3, -2).flatten(-2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """Return softmax(q k' / sqrt(d / heads)) v of each head: (N, Lq, d), (N, Lk, d), (N, Lk, d) -> (N, Lq, d).

    `mask` is broadcast to (N, heads, Lq, Lk): True where a query sees a key, or floats that are added to the logits.
    With `causal`, query i sees keys 0 ... i. `dropout` is the share of weights that are set to zero. Without keys the
    result is zero.
    """
    if k.shape[-2] == 0:
        return torch.zeros_like(q)
    q, k, v = (split_heads(x, heads) for x in (q, k, v))
    return merge_heads(dot_product_attention(q, k, v, mask, causal, dropout))


def dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """Return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal), in the way whose training is faster.

    On a CPU the backward pass of PyTorch's kernel takes ten times as long in half precision as in single precision
    where keys are few, and most of a training step: `findings/torch_sdpa_bf16_backward.sh`.
    """
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if trained and v.dtype in HALF and v.device.type == "cpu" and k.shape[-2] <= FEW_KEYS:
        return explicit_attention(q, k, v, mask, causal, dropout)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """Return the same by products and a softmax."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if causal:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
        logits = logits.masked_fill(~seen, -math.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask.to(logits)
    return F.dropout(logits.softmax(-1), dropout) @ v


def attend_cached(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Return `attend` for keys and values from a `KeyValueCache`: (N, Lq, d), (N, heads, Lk, d / heads) twice."""
    if keys.shape[-2] == 0:
        return torch.zeros_like(q)
    heads = split_heads(q, keys.shape[1]).to(keys.dtype)
    return merge_heads(F.scaled_dot_product_attention(heads, keys, values, attn_mask=mask, is_causal=causal)).to(
        q.dtype
    )


class KeyValueCache:
    """Keys and values of each layer of a sequence that grows, in tensors that are allocated once.

    They are (N, heads, capacity, d / heads), so that those of a head are read in one piece: on a CPU a single query is
    then twice as fast. `length` positions are filled; all layers share it.
    """

    def __init__(
        self, layers: int, batch: int, capacity: int, width: int, heads: int, like: Tensor,
        dtype: torch.dtype | None = None,
    ):  # fmt: skip
        shape = (layers, batch, heads, capacity, width // heads)
        self.heads = heads
        self.keys = torch.empty(shape, device=like.device, dtype=dtype or like.dtype)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    @property
    def capacity(self) -> int:
        """Return the number of positions that fit."""
        return self.keys.shape[3]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (N, L, d) of a layer behind its `length` filled positions.

        Returns all of the layer, (N, heads, length + L, d / heads) each. Call `advance` after the last layer.
        """
        stop = self.length + keys.shape[1]
        assert stop <= self.capacity, f"{stop} positions in a cache of {self.capacity}"
        self.keys[layer, :, :, self.length : stop] = split_heads(keys, self.heads)
        self.values[layer, :, :, self.length : stop] = split_heads(values, self.heads)
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def advance(self, count: int) -> None:
        """Count `count` more positions as filled."""
        self.length += count

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on."""
        self.length = min(self.length, length)
