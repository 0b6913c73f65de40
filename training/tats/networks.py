"""The transformer of TATS: logits of the next code, for codes in order of time, rows, columns after a condition.

Ge et al., "Long Video Generation with Time-Agnostic VQGAN and Time-Sensitive Transformer", ECCV 2022, section 3.2. The
names of the state are those of the release. Ids of the condition come first in the vocabulary, codes after them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from torch_utils.precision import MixedPrecision
from training.modules.attention import KeyValueCache, attend, attend_cached
from training.modules.linear import Linear, pack_linears

INIT_STD = 0.02
SEGMENT = 5  # latent frames of an in-filling model: one, the three between, and the next key frame

Box = Tensor | Sequence[int]  # rows and columns [r0, r1, c0, c1] of a table of positions, (4,) or (N, 4)


def infill_mask(block_size: int, latent_codes: int) -> Tensor:
    """Return which inputs (columns) each input (row) of an in-filling model attends to: bool (P, P).

    Inputs are the condition, a frame of n = `latent_codes` codes, the frames between, and the next key frame without
    its last code. The condition and both key frames see each other; the frames between see them and their own past.
    """
    n, q, k = latent_codes, torch.arange(block_size).unsqueeze(1), torch.arange(block_size)
    future = block_size - n + 1
    seen = (k <= n) | (k >= future) | (k <= q)
    return seen & ~((q >= future) & (k > n) & (k < future))


@functools.lru_cache(maxsize=4)
def mask_on(block_size: int, latent_codes: int, device: torch.device) -> Tensor:
    """Return `infill_mask` on a device, made once."""
    return infill_mask(block_size, latent_codes).to(device)


class Attention(nn.Module):
    """Multi-head attention with separate projections."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.key, self.query = Linear(width, width), Linear(width, width)
        self.value, self.proj = Linear(width, width), Linear(width, width)
        self.heads = heads

    def forward(
        self, x: Tensor, mask: Tensor | None, causal: bool, cache: KeyValueCache | None = None, layer: int = 0
    ) -> Tensor:
        """Attend (N, L, C) to itself and, with `cache`, to the inputs before, which it then holds too."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        if cache is None:
            return self.proj(attend(q, k, v, self.heads, mask, causal))
        return self.proj(attend_cached(q, *cache.write(layer, k, v), mask, causal))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(Linear(width, 4 * width), nn.GELU(), Linear(4 * width, width))

    def forward(
        self, x: Tensor, mask: Tensor | None, causal: bool, cache: KeyValueCache | None = None, layer: int = 0
    ) -> Tensor:
        """Transform (N, L, C); see `Attention`."""
        x = x + self.attn(self.ln1(x), mask, causal, cache, layer)
        return x + self.mlp(self.ln2(x))


class TATSTransformer(MixedPrecision):
    """Logits of codes after a condition; defaults are those of the published models.

    `conditions` is the number of ids of the condition: 0 for the released unconditional models, whose start token is
    the vector of code 0. `unmasked` is 0 for causal attention, else the number of codes of a latent frame for
    in-filling. `table` gives latent frames, rows and columns of a table of positions, which is added to `pos_emb`.
    """

    formats = ("bf16",)

    def __init__(
        self, num_codes: int = 16384, conditions: int = 1, condition_length: int = 1, block_size: int = 1024,
        layers: int = 24, heads: int = 16, width: int = 1024, unmasked: int = 0, table: Sequence[int] | None = None,
    ):  # fmt: skip
        super().__init__()
        table = list(table) if table is not None else None
        self.options = {
            "num_codes": num_codes, "conditions": conditions, "condition_length": condition_length,
            "block_size": block_size, "layers": layers, "heads": heads, "width": width, "unmasked": unmasked,
            "table": table,
        }  # fmt: skip
        if width % heads:
            raise ValueError(f"the width of {width} is not divisible among {heads} heads: use a multiple")
        if table is not None and condition_length != 1:
            raise ValueError(f"a table of positions needs a condition of one id, and this one has {condition_length}")
        self.num_codes, self.conditions, self.condition_length = num_codes, conditions, condition_length
        self.block_size, self.heads, self.unmasked = block_size, heads, unmasked
        vocabulary = conditions + num_codes
        self.pos_emb = nn.Parameter(torch.zeros(1, block_size, width))
        self.tok_emb = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.head: nn.Module = Linear(width, vocabulary, bias=False)
        if table is not None:
            self.vtokens_pos_emb = nn.Parameter(torch.zeros(1, *table, width))
        self.first_output = 0  # the id of the first logit; see `for_sampling`
        self.apply(_initialise)

    def table_rows(self, box: Box | None = None, frames: slice = slice(None)) -> Tensor | None:
        """Return what a table of positions adds to each input: (N or 1, inputs, width), None without a table.

        `box` is a part of its rows and columns, for all or one for each of the batch, None for all of them. Input q
        gets the entry of the code that it predicts.
        """
        if self.options["table"] is None:
            return None
        table = self.vtokens_pos_emb[:, frames]
        boxes = [[0, table.shape[2], 0, table.shape[3]]] if box is None else torch.as_tensor(box).view(-1, 4).tolist()
        return torch.cat([table[:, :, r0:r1, c0:c1].flatten(1, 3) for r0, r1, c0, c1 in boxes])

    def embed(self, ids: Tensor, positions: Tensor | slice, rows: Tensor | None) -> Tensor:
        """Return the vectors of ids (N, L) at positions: (N, L, width); `rows` is from `table_rows`."""
        x = self.tok_emb(ids) + self.pos_emb[:, positions]
        return x if rows is None else x + rows[:, positions]

    def forward(self, ids: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the logits after each of ids (N, L): (N, L, vocabulary); `rows` is from `table_rows`."""
        length = ids.shape[1]
        x = self.embed(ids, slice(0, length), rows)
        mask = mask_on(self.block_size, self.unmasked, x.device)[:length, :length] if self.unmasked else None
        for block in self.blocks:
            x = block(x, mask, mask is None)
        return self.head(self.ln_f(x))

    def feed(
        self, ids: Tensor, positions: Tensor | slice, cache: KeyValueCache, rows: Tensor | None = None,
        mask: Tensor | None = None, causal: bool = False, at: int = -1,
    ) -> Tensor:  # fmt: skip
        """Take the inputs (N, L) at positions after those in `cache`, and return the logits after number `at` of them.

        Each attends to all of the cache, and among themselves to all, to those before with `causal` (for an empty cache
        only), or to those that `mask` allows. Returns (N, vocabulary), of a network from `for_sampling` less.
        """
        x = self.embed(ids, positions, rows)
        for layer, block in enumerate(self.blocks):
            x = cast(Block, block)(x, mask, causal, cache, layer)
        cache.advance(ids.shape[1])
        return self.head(self.ln_f(x[:, at]))

    def for_sampling(self, dtype: torch.dtype = torch.float32, only_codes: bool = True) -> TATSTransformer:
        """Return a copy for `feed` with weights in `dtype`, and, with `only_codes`, without logits of the condition.

        Logit i is that of id `first_output` + i.
        """
        network = cast(TATSTransformer, pack_linears(self, dtype))
        if only_codes and self.conditions:
            head = nn.Linear(1, 1, bias=False, device="meta")
            head.weight = nn.Parameter(cast(nn.Linear, self.head).weight.detach()[self.conditions :], False)
            network.head, network.first_output = pack_linears(nn.Sequential(head), dtype), self.conditions
        return network

    def cache(self, batch: int, capacity: int) -> KeyValueCache:
        """Return an empty cache for `feed`, of at most `capacity` inputs.

        On a CPU it is in single precision whatever the weights are: attention in bfloat16 is slower there.
        """
        like = self.pos_emb
        dtype = torch.float32 if like.device.type == "cpu" and like.dtype == torch.bfloat16 else like.dtype
        return KeyValueCache(len(self.blocks), batch, capacity, like.shape[-1], self.heads, like, dtype)


def _initialise(module: nn.Module) -> None:
    """Draw the weights of a layer as published: N(0, 0.02), biases 0."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def parameter_groups(network: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Return the parameters with and without weight decay, each group sorted by name: the weights of linear layers."""
    decayed = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    named = dict(sorted(network.named_parameters()))
    return [
        {"params": [p for name, p in named.items() if name in decayed], "weight_decay": decay},
        {"params": [p for name, p in named.items() if name not in decayed], "weight_decay": 0.0},
    ]
