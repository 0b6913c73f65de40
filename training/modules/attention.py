"""Attention of several heads, and the cache of keys and values of a sequence that grows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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
    parts = (split_heads(x, heads) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*parts, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    return merge_heads(out)


class KeyValueCache:
    """Keys and values (N, capacity, d) of each layer of a sequence that grows, in tensors that are allocated once.

    `length` positions are filled; all layers share it.
    """

    def __init__(
        self, layers: int, batch: int, capacity: int, width: int, like: Tensor, dtype: torch.dtype | None = None
    ):
        shape = (layers, batch, capacity, width)
        self.keys = torch.empty(shape, device=like.device, dtype=dtype or like.dtype)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    @property
    def capacity(self) -> int:
        """Return the number of positions that fit."""
        return self.keys.shape[2]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (N, L, d) of a layer behind its `length` filled positions.

        Returns all of the layer, (N, length + L, d) each. Call `advance` after the last layer.
        """
        stop = self.length + keys.shape[1]
        assert stop <= self.capacity, f"{stop} positions in a cache of {self.capacity}"
        self.keys[layer, :, self.length : stop] = keys
        self.values[layer, :, self.length : stop] = values
        return self.keys[layer, :, :stop], self.values[layer, :, :stop]

    def advance(self, count: int) -> None:
        """Count `count` more positions as filled."""
        self.length += count

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on."""
        self.length = min(self.length, length)
