"""The transformer of MeBT: latents, contexts and targets, which attend to each other in a list of modes.

Yoo et al., "Towards End-to-End Generative Modeling of Long Videos with Memory-Efficient Bidirectional Transformers",
CVPR 2023, section 3. The names of the state are those of the release.

| mode | queries, which are replaced | keys and values |
|---|---|---|
| latent_enc | latents | contexts |
| latent_self | latents | latents |
| latent_dec | targets | latents |
| lt2l | latents | latents and targets |
| maskgit | contexts and targets | contexts and targets |

Contexts are codes that are visible, targets are positions that are masked, latents are learned vectors. But for
`maskgit`, no mode lets more than the fixed number of latents meet all positions, so that memory and time are linear in
the number of positions. The order of positions within a stream does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torch_utils.precision import MixedPrecision
from training.generation.draft_revise import Query
from training.mebt.modes import MODES, PUBLISHED_MODES, RESIDUALS
from training.modules.attention import attend
from training.modules.linear import Linear

INIT_STD = 0.02
ROWS = 1024  # targets whose block is computed at once in inference: bounds the memory of the wide layer
LOGIT_ROWS = {"cpu": 64, "cuda": 2048}  # targets of all videos whose logits are there at once in inference


class Attention(nn.Module):
    """The projections of an attention of several heads."""

    def __init__(self, width: int, heads: int, dropout: float, residual_dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.key = Linear(width, width)
        self.query = Linear(width, width)
        self.value = Linear(width, width)
        self.proj = Linear(width, width)
        self.resid_drop = nn.Dropout(residual_dropout)

    def forward(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend from normalised queries (N, Lq, d) to keys and values (N, Lk, d); zeros are projected without keys."""
        queries = self.query(q)
        if keys.shape[1]:
            found = attend(queries, keys, values, self.heads, dropout=self.dropout if self.training else 0.0)
        else:
            # Zero, but with zeros as gradients: ranks exchange those of all weights, whatever they have masked.
            found = 0 * queries + keys.sum() + values.sum()
        return self.resid_drop(self.proj(found))


class Block(nn.Module):
    """Attention from one stream to another, and an MLP.

    `residual` "normalised" adds attention to the normalised queries, as in the release, "plain" to the queries.
    """

    def __init__(self, width: int, heads: int, residual: str, attention_dropout: float, residual_dropout: float):
        super().__init__()
        self.residual = residual
        self.ln1 = nn.LayerNorm(width)
        self.ln2 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, attention_dropout, residual_dropout)
        self.mlp = nn.Sequential(
            Linear(width, 4 * width), nn.GELU(), Linear(4 * width, width), nn.Dropout(residual_dropout)
        )

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a stream (..., d)."""
        k = self.ln1(x)
        return self.attn.key(k), self.attn.value(k)

    def attend(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the queries' stream (N, L, d) after attention to keys and values, and after the MLP."""
        q = self.ln1(x)
        y = (q if self.residual == "normalised" else x) + self.attn(q, keys, values)
        return y + self.mlp(self.ln2(y))

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """Return stream x (N, L, d) after attention to the concatenation of other streams (N, L_i, d)."""
        keys, values = self.keys_values(torch.cat(others, dim=1))
        return self.attend(x, keys, values)


class ContextCache:
    """Keys and values of visible codes, which depend on code, position and layer alone, kept between passes.

    One for a network and a batch of videos. Memory: layers x 2 x positions x width values for each video.
    """

    def __init__(self, network: MeBT, num_videos: int):
        like, positions = network.pos_emb, network.num_positions
        shape = (len(network.cached_layers), 2, num_videos, positions, network.width)
        self.network = network
        self.values = torch.empty(shape, device=like.device, dtype=like.dtype)
        self.codes = torch.full((num_videos, positions), -1, device=like.device)

    def update(self, codes: Tensor, contexts: Tensor) -> None:
        """Compute what lacks or has changed for codes (N, P) at visible positions (N, C)."""
        wanted = codes.gather(1, contexts)
        rows, columns = (self.codes.gather(1, contexts) != wanted).nonzero(as_tuple=True)
        if not len(rows):
            return
        positions, found = contexts[rows, columns], wanted[rows, columns]
        net = self.network
        for part in range(0, len(rows), ROWS):
            piece = slice(part, part + ROWS)
            x = net.tok_emb(found[piece]) + net.pos_emb[0, positions[piece]]
            for number, layer in enumerate(net.cached_layers):
                for kind, values in enumerate(net.blocks[layer].keys_values(x)):
                    self.values[number, kind, rows[piece], positions[piece]] = values.to(self.values.dtype)
        self.codes[rows, positions] = found

    def read(self, layer: int, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a layer at visible positions (N, C): (N, C, d) each."""
        number = self.network.cached_layers.index(layer)
        rows = torch.arange(len(contexts), device=contexts.device).unsqueeze(1)
        keys, values = (self.values[number, kind][rows, contexts] for kind in range(2))
        return keys, values


class Transformer(nn.Module):
    """The blocks, the last norm and the head; a part of `MeBT`, for the names of the release."""

    def __init__(self, blocks: Sequence[Block], width: int, num_codes: int):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.ln_f = nn.LayerNorm(width)
        self.head = Linear(width, num_codes, bias=False)


class MeBT(MixedPrecision):
    """Codes at visible positions -> logits of the codes at masked positions.

    `shape` is that of the grid in latent frames, rows and columns; positions are numbered in this order. `modes` has
    one entry a layer; layers without are `maskgit`. Raises `ValueError` for arguments that make no network.
    """

    formats = ("bf16",)

    def __init__(
        self, num_codes: int = 16384, shape: Sequence[int] = (4, 16, 16), width: int = 1024, heads: int = 16,
        latents: int = 256, modes: Sequence[str] = (*PUBLISHED_MODES,), layers: int | None = None,
        residual: str = "plain", embedding_dropout: float = 0.0, attention_dropout: float = 0.0,
        residual_dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        layers = len(modes) if layers is None else layers
        _check_arguments(width, heads, modes, layers, residual)
        self.options = {
            "num_codes": num_codes, "shape": list(shape), "width": width, "heads": heads, "latents": latents,
            "modes": list(modes), "layers": layers, "residual": residual, "embedding_dropout": embedding_dropout,
            "attention_dropout": attention_dropout, "residual_dropout": residual_dropout,
        }  # fmt: skip
        self.num_codes, self.width, self.shape = num_codes, width, tuple(shape)
        self.num_positions = math.prod(shape)
        self.modes = [*modes, *["maskgit"] * (layers - len(modes))]
        self.mask_emb = nn.Parameter(torch.zeros(1, 1, width))
        self.sos_emb = nn.Parameter(torch.zeros(1, latents, width))
        self.pos_emb = nn.Parameter(torch.zeros(1, self.num_positions, width))
        self.drop = nn.Dropout(embedding_dropout)
        blocks = [Block(width, heads, residual, attention_dropout, residual_dropout) for _ in range(layers)]
        self.transformer = Transformer(blocks, width, num_codes)
        self.tok_emb = nn.Embedding(num_codes, width)
        self.apply(self._init)
        for embedding in (self.mask_emb, self.sos_emb, self.pos_emb):
            nn.init.normal_(embedding, std=INIT_STD)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=INIT_STD)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def blocks(self) -> list[Block]:
        """Return the blocks, first to last."""
        return [block for block in self.transformer.blocks if isinstance(block, Block)]

    @property
    def cached_layers(self) -> list[int]:
        """Return the layers that read contexts as they were embedded."""
        end = self.modes.index("maskgit") if "maskgit" in self.modes else len(self.modes)
        return [layer for layer in range(end) if self.modes[layer] == "latent_enc"]

    def embed(self, codes: Tensor, contexts: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return latents, contexts and targets, (N, L, d) each, for codes (N, P) and positions (N, C), (N, M)."""
        seen = self.tok_emb(codes.gather(1, contexts)) + self.pos_emb[0, contexts]
        hidden = self.mask_emb + self.pos_emb[0, targets]
        latents = self.sos_emb.expand(len(codes), -1, -1)
        return self.drop(latents), self.drop(seen), self.drop(hidden)

    def hidden(
        self, codes: Tensor, contexts: Tensor, targets: Tensor, wanted: int | None = None,
        cache: ContextCache | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the features of the first `wanted` targets, by default of all: (N, wanted, d).

        `codes` int64 (N, P), `contexts` and `targets` positions int64 (N, C) and (N, M). With a `cache` keys and values
        of contexts are taken from there.
        """
        if cache is not None:
            cache.update(codes, contexts)
        cached = cache is not None and "maskgit" not in self.modes
        latents, seen, hidden = self.embed(codes, contexts[:, :0] if cached else contexts, targets)
        last_reader = max((i for i, mode in enumerate(self.modes) if mode in ("lt2l", "maskgit")), default=-1)
        for number, (mode, block) in enumerate(zip(self.modes, self.blocks, strict=True)):
            if number > last_reader:
                hidden = hidden[:, :wanted]
            if mode == "latent_enc" and cache is not None and number in self.cached_layers:
                latents = block.attend(latents, *cache.read(number, contexts))
            elif mode == "latent_enc":
                latents = block(latents, seen)
            elif mode == "latent_self":
                latents = block(latents, latents)
            elif mode == "latent_dec":
                hidden = self._decode(block, hidden, latents)
            elif mode == "lt2l":
                latents = block(latents, latents, hidden)
            else:
                both = torch.cat([seen, hidden], dim=1)
                seen, hidden = block(both, both).split([seen.shape[1], hidden.shape[1]], dim=1)
        return self.transformer.ln_f(hidden[:, :wanted])

    @staticmethod
    def _decode(block: Block, hidden: Tensor, latents: Tensor) -> Tensor:
        """Return targets after attention to latents; in inference in pieces, as they do not meet."""
        keys, values = block.keys_values(latents)
        if torch.is_grad_enabled() or hidden.shape[1] <= ROWS:
            return block.attend(hidden, keys, values)
        return torch.cat([block.attend(part, keys, values) for part in hidden.split(ROWS, dim=1)], dim=1)

    def forward(self, codes: Tensor, contexts: Tensor, targets: Tensor) -> Tensor:
        """Return the logits of the targets: (N, M, num_codes); see `hidden`."""
        return self.transformer.head(self.hidden(codes, contexts, targets))

    def predict(self, query: Query, cache: ContextCache | None = None) -> Iterator[Tensor]:
        """Answer a query of `training.generation.draft_revise` with few logits at a time."""
        hidden = self.hidden(query.codes, query.contexts, query.targets, query.wanted, cache)
        rows = LOGIT_ROWS.get(hidden.device.type, ROWS) // len(hidden)
        for part in hidden.split(max(rows, 1), dim=1):
            yield self.transformer.head(part)

    def losses(self, codes: Tensor, contexts: Tensor, targets: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy of each target, (N, M), and whether its code is the first of the logits or among
        the first five: (N, M, 2).

        Logits are there for few targets at a time, also for the gradient.
        """
        hidden, wanted = self.hidden(codes, contexts, targets), codes.gather(1, targets)
        pieces = []
        for part, ids in zip(hidden.split(ROWS, dim=1), wanted.split(ROWS, dim=1), strict=True):
            arguments = (part, ids, smoothing)
            if torch.is_grad_enabled() and hidden.shape[1] > ROWS:
                pieces.append(checkpoint(self._losses, *arguments, use_reentrant=False))
            else:
                pieces.append(self._losses(*arguments))
        losses, hits = zip(*pieces, strict=True)
        return torch.cat(losses, dim=1), torch.cat(hits, dim=1)

    def _losses(self, hidden: Tensor, ids: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        logits = self.transformer.head(hidden).float()
        loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none", label_smoothing=smoothing)
        with torch.no_grad():
            best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == ids.unsqueeze(-1)
            hits = torch.stack([best[..., 0], best.any(-1)], dim=-1).float()
        return loss.unflatten(0, ids.shape), hits


def _check_arguments(width: int, heads: int, modes: Sequence[str], layers: int, residual: str) -> None:
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown:
        raise ValueError(f"the mode {unknown[0]!r} is unknown: use {', '.join(MODES)}")
    if not 0 < len(modes) <= layers:
        raise ValueError(f"there are {len(modes)} modes for {layers} layers: give one for each layer, or fewer")
    if width % heads:
        raise ValueError(f"a width of {width} does not divide by {heads} heads: use a multiple")
    if residual not in RESIDUALS:
        raise ValueError(f"the residual {residual!r} is unknown: use {' or '.join(RESIDUALS)}")
