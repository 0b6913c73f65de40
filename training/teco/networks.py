"""The networks of TECO: what is new in each frame as a code, its dynamics over time, its prior, and its decoder.

Yan et al., "Temporally Consistent Transformers for Video Generation", ICML 2023, section 3:

| part | of the paper | here |
|---|---|---|
| posterior of z_t given frames t - 1 and t | 3.1, encoder and codebook | `PosteriorEncoder`, `CosineQuantizer` |
| h_t from z_{<t} and actions up to t | 3.2, temporal transformer | `Temporal` |
| p(z_t given h_t) | 3.3, dynamics prior | `MaskGit` |
| p(x_t given z_t, h_t) | 3.2, decoder | `Decoder` |

Frames come as codes x_t of a tokenizer on a grid, z_t has a smaller one. The first `n_cond` frames are not quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_utils.precision import MixedPrecision
from training.modules.quantizers import CosineQuantizer, Quantized
from training.teco.layers import (
    CAUSAL,
    KeyValueCache,
    Transformer,
    Visible,
    conv,
    dense,
    in_precision,
    layer_norm,
    res_blocks,
    run_block,
    sinusoid,
    small_normal,
    truncated,
)

# Codes (N, cells), of which `num_codes` is an unknown one, and numbers of cells (N, M) -> logits (N, M, num_codes).
CodePredictor = Callable[[Tensor, Tensor], Tensor]

NULL_ACTION = -1  # "unknown": the last row of the table
SCHEDULES = "cosine, uniform, pow<exponent>, log, exp"
TRANSFORMER = ("embed_dim", "mlp_dim", "num_heads", "num_layers")
Sizes = Mapping[str, int]  # of a transformer, by these names


class PosteriorEncoder(MixedPrecision):
    """Pairs of embedded frames (N, 2 D, H, W) -> latents (N, E, H / 2^(levels - 1), W / 2^(levels - 1))."""

    formats = ("bf16",)

    def __init__(self, inputs: int, outputs: int, depths: Sequence[int], blocks: int):
        super().__init__()
        self.conv_in = conv(inputs, depths[0], 3)
        self.levels = nn.ModuleList([nn.ModuleList(res_blocks(depths[0], depths[0], 1))])
        for before, width in zip(depths, depths[1:], strict=False):
            self.levels.append(nn.ModuleList(res_blocks(before, width, blocks)))
        self.out = dense(depths[-1], outputs)
        self.recompute = False

    def forward(self, pairs: Tensor) -> Tensor:
        """See the class."""
        with in_precision(self, pairs):
            x = self.conv_in(pairs)
            for i, level in enumerate(self.levels):
                x = F.avg_pool2d(x, 2) if i > 0 else x
                for block in _blocks(level):
                    x = run_block(block, self.recompute, x)
            return self.out(x.movedim(1, -1)).movedim(-1, 1).to(pairs.dtype)


class Decoder(MixedPrecision):
    """h and z (N, 2 E, h, w) -> logits (N, V, H, W) of the tokenizer's codes.

    `depths` are those of the encoder: widths go from last to first. The first convolution has the first one's, as
    published.
    """

    formats = ("bf16",)

    def __init__(self, inputs: int, outputs: int, depths: Sequence[int], blocks: int):
        super().__init__()
        self.conv_in = conv(inputs, depths[0], 3)
        self.levels = nn.ModuleList()
        before = depths[0]
        for width in reversed(depths):
            self.levels.append(nn.ModuleList(res_blocks(before, width, blocks)))
            before = width
        self.norm, self.out = layer_norm(depths[0]), dense(depths[0], outputs)
        self.recompute = False

    def forward(self, latents: Tensor) -> Tensor:
        """See the class."""
        with in_precision(self, latents):
            x = self.conv_in(latents)
            for i, level in enumerate(self.levels):
                x = F.interpolate(x, scale_factor=2.0, mode="nearest") if i > 0 else x
                for block in _blocks(level):
                    x = run_block(block, self.recompute, x)
            return self.out(self.norm(x.movedim(1, -1))).movedim(-1, 1).to(latents.dtype)


def _blocks(level: nn.Module) -> nn.ModuleList:
    assert isinstance(level, nn.ModuleList)
    return level


class Temporal(MixedPrecision):
    """Latents and actions over time -> h, by a transformer that is causal over frames.

    Slot t - 1 of the transformer holds the latent of frame t - 1 and the action into frame t; its output belongs to
    frame t. Before all stands a learned frame. A frame has n tokens, each of `patch` x `patch` latents.

    Positions are those of the release, a sinusoid of the token's number, which limits it to `seq_len` frames, or
    "rotary" over frames, with a sinusoid inside a frame: then each frame sees the last `seq_len` slots of a video of
    any length.
    """

    formats = ("bf16",)

    def __init__(
        self, grid: tuple[int, int], seq_len: int, channels: int, action_channels: int, patch: int, sizes: Sizes,
        positions: str,
    ):  # fmt: skip
        super().__init__()
        width, mlp, heads, layers = (sizes[name] for name in TRANSFORMER)
        self.tokens = grid[0] // patch, grid[1] // patch
        self.num_tokens, self.seq_len, self.width, self.positions = (
            self.tokens[0] * self.tokens[1],
            seq_len,
            width,
            positions,
        )
        self.head_width = width // heads
        self.sos = small_normal(*self.tokens, width)
        self.project = nn.Conv2d(channels + action_channels, width, patch, stride=patch, bias=False)
        self.unproject = nn.ConvTranspose2d(width, channels, patch, stride=patch, bias=False)
        truncated(self.project, (channels + action_channels) * patch * patch)
        truncated(self.unproject, width * patch * patch)
        self.transformer = Transformer(width, width, mlp, heads, layers)

    def slots(self, z: Tensor, actions: Tensor) -> Tensor:
        """Return the tokens of slots: latents (N, T, E, h, w) and embedded actions (N, T, e) -> (N, T n, width)."""
        num_videos, num_frames = z.shape[:2]
        spread = actions[:, :, :, None, None].expand(-1, -1, -1, *z.shape[3:])
        x = self.project(torch.cat([z, spread], dim=2).flatten(0, 1))  # (N T, width, k, k)
        return x.flatten(2).transpose(1, 2).reshape(num_videos, num_frames * self.num_tokens, self.width)

    def begin(self, num_videos: int) -> Tensor:
        """Return the tokens of the learned frame: (N, n, width)."""
        return self.sos.flatten(0, 1).expand(num_videos, -1, -1)

    def run(
        self, x: Tensor, first: int = 0, caches: Sequence[KeyValueCache] | None = None, last_only: bool = False
    ) -> Tensor:
        """Return the features of slots first, first + 1, ...: (N, T n, width) -> (N, T n, width).

        `caches` hold the slots before them. With `last_only` just those of the last slot are returned. Raises
        `ValueError` for slots beyond the trained length, unless positions are rotary.
        """
        num_frames = x.shape[1] // self.num_tokens
        position, angles = self.position(first, num_frames, x.device)
        mask = self.mask(first, num_frames, caches is not None, x.device)
        tokens = torch.arange(x.shape[1], device=x.device)[-self.num_tokens :]
        wanted = tokens.expand(len(x), -1) if last_only else None
        with in_precision(self, x):
            return self.transformer(x, position, mask, angles, caches, wanted)

    def to_latents(self, x: Tensor) -> Tensor:
        """Return features of tokens as h: (N, T n, width) -> (N, T, E, h, w)."""
        frames = x.unflatten(1, (-1, *self.tokens)).flatten(0, 1).movedim(-1, 1)  # (N T, width, k, k)
        return self.unproject(frames).unflatten(0, (len(x), -1))

    def forward(self, z: Tensor, actions: Tensor) -> Tensor:
        """Return h of frames 1, 2, ... after latents (N, T, E, h, w) with the action into the frame after each."""
        x = torch.cat([self.begin(len(z)), self.slots(z, actions)], dim=1)
        return self.to_latents(self.run(x)[:, self.num_tokens :])

    def position(self, first: int, num_frames: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return the added code (T n, width), and the angles of rotary positions, of slots from `first` on."""
        n = self.num_tokens
        if self.positions == "sinusoid":
            if first + num_frames > self.seq_len:
                raise ValueError(
                    f"slot {first + num_frames - 1} lies beyond the trained length of {self.seq_len} frames: slide the "
                    "window, or train with --positions=rotary"
                )
            return sinusoid((first + num_frames) * n, self.width, device)[first * n :], None
        inside = sinusoid(n, self.width, device).repeat(num_frames, 1)
        half = self.head_width // 2
        frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
        frames = torch.arange(first, first + num_frames, dtype=torch.float64, device=device).repeat_interleave(n)
        return inside, (frames.unsqueeze(1) * frequencies).float()

    def mask(self, first: int, num_frames: int, cached: bool, device: torch.device) -> Visible:
        """Return which key a query may see: those of its frame and of the seq_len - 1 before."""
        if cached and num_frames == 1:
            return None  # a cache holds just these
        if self.num_tokens == 1 and num_frames <= self.seq_len:
            return CAUSAL
        assert not cached or first == 0, "several slots are pushed only into an empty cache"
        frame = torch.arange(num_frames, device=device).repeat_interleave(self.num_tokens)
        behind = frame.unsqueeze(1) - frame
        return (behind >= 0) & (behind < self.seq_len)

    def caches(self) -> list[KeyValueCache]:
        """Return empty caches of the layers."""
        return [KeyValueCache(self.seq_len * self.num_tokens) for _ in self.transformer.layers]


class MaskGit(MixedPrecision):
    """The prior of one frame's codes: those that are known, and h -> logits of all (Chang et al., CVPR 2022).

    An unknown code is numbered `num_codes`.
    """

    formats = ("bf16",)

    def __init__(
        self, grid: tuple[int, int], num_codes: int, channels: int, vocab_dim: int, sizes: Sizes
    ):  # fmt: skip
        super().__init__()
        width, mlp, heads, layers = (sizes[name] for name in TRANSFORMER)
        self.num_codes = num_codes
        self.token_embed = small_normal(num_codes + 1, vocab_dim)
        self.rows, self.columns = small_normal(grid[0], -(-width // 2)), small_normal(grid[1], width // 2)
        self.net = Transformer(vocab_dim + channels, width, mlp, heads, layers)
        self.head, self.norm = dense(width, vocab_dim, std=0.02), layer_norm(vocab_dim)
        self.bias = nn.Parameter(torch.zeros(num_codes))

    def position(self) -> Tensor:
        """Return the position code of the cells: (h w, width), of rows, then of columns."""
        size = len(self.rows), len(self.columns), -1
        return torch.cat([self.rows.unsqueeze(1).expand(size), self.columns.expand(size)], dim=2).flatten(0, 1)

    def begin(self, h: Tensor) -> CodePredictor:
        """Return the function that predicts the codes of the frame of h."""
        return lambda codes, wanted: self(codes, h, wanted)

    def forward(self, codes: Tensor, h: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Return logits (N, L, K) for codes (N, L) and h (N, E, h, w), L = h w.

        With `wanted` (N, M) only those of these cells: (N, M, K).
        """
        tokens = F.embedding(codes, self.token_embed)
        x = torch.cat([tokens, h.flatten(2).transpose(1, 2)], dim=2)
        with in_precision(self, x):
            x = self.net(x, self.position(), wanted=wanted)
            x = self.norm(F.gelu(self.head(x).to(x.dtype), approximate="tanh"))
            return F.linear(x, self.token_embed[: self.num_codes], self.bias).to(x.dtype)


class TECO(nn.Module):
    """All networks. Frames are codes x (N, T, H, W) and their embeddings by the tokenizer (N, T, D, H, W).

    `encoder`, `decoder`: depths and blocks. `temporal`: embed_dim, mlp_dim, num_heads, num_layers, `prior`: the same
    and vocab_dim, as in the release's configurations.
    """

    def __init__(
        self, grid: Sequence[int] = (16, 16), vocabulary: int = 1024, code_channels: int = 256, seq_len: int = 300,
        encoder: Mapping[str, Any] = MappingProxyType({"depths": (256, 512), "blocks": 2}),
        decoder: Mapping[str, Any] = MappingProxyType({"depths": (256, 512), "blocks": 4}),
        embedding_dim: int = 64, num_codes: int = 1024, proj_dim: int = 32, z_ds: int = 8,
        temporal: Mapping[str, int] = MappingProxyType(dict(zip(TRANSFORMER, (1024, 4096, 16, 8), strict=True))),
        prior: Mapping[str, int] = MappingProxyType(
            {"vocab_dim": 256, **dict(zip(TRANSFORMER, (512, 2048, 8, 8), strict=True))}
        ),
        n_cond: int = 1, use_actions: bool = True, action_dim: int = 6, action_embed_dim: int = 16,
        positions: str = "sinusoid", context: int = 36,
    ):  # fmt: skip
        super().__init__()
        encoder, decoder = ({"depths": list(part["depths"]), "blocks": part["blocks"]} for part in (encoder, decoder))
        self.options = {
            "grid": list(grid), "vocabulary": vocabulary, "code_channels": code_channels, "seq_len": seq_len,
            "encoder": encoder, "decoder": decoder, "embedding_dim": embedding_dim, "num_codes": num_codes,
            "proj_dim": proj_dim, "z_ds": z_ds, "temporal": dict(temporal), "prior": dict(prior), "n_cond": n_cond,
            "use_actions": use_actions, "action_dim": action_dim, "action_embed_dim": action_embed_dim,
            "positions": positions, "context": context,
        }  # fmt: skip
        self.grid, self.vocabulary, self.seq_len, self.n_cond = (grid[0], grid[1]), vocabulary, seq_len, n_cond
        self.use_actions, self.action_dim, self.context = use_actions, action_dim, context
        self.cells = self.check_grid(encoder, decoder, z_ds)
        self.sos_post = small_normal(code_channels, *self.grid)
        self.action_embeds = nn.Embedding(action_dim + 1, action_embed_dim)
        nn.init.normal_(self.action_embeds.weight, std=action_embed_dim**-0.5)
        self.encoder = PosteriorEncoder(2 * code_channels, embedding_dim, **encoder)
        self.codebook = CosineQuantizer(num_codes, embedding_dim, proj_dim)
        self.temporal = Temporal(self.cells, seq_len, embedding_dim, action_embed_dim, z_ds, temporal, positions)
        self.prior = MaskGit(self.cells, num_codes, embedding_dim, prior["vocab_dim"], prior)
        self.decoder = Decoder(2 * embedding_dim, vocabulary, **decoder)

    def check_grid(self, encoder: Mapping[str, Any], decoder: Mapping[str, Any], z_ds: int) -> tuple[int, int]:
        """Return the grid of z; raise `ValueError` if it is not whole, or differs for the decoder."""
        step, other = 1 << (len(encoder["depths"]) - 1), 1 << (len(decoder["depths"]) - 1)
        shown = "x".join(map(str, self.grid))
        if step != other:
            raise ValueError(f"the encoder has {len(encoder['depths'])} depths, the decoder {len(decoder['depths'])}")
        if any(size % (step * z_ds) for size in self.grid):
            raise ValueError(
                f"the tokenizer's grid of {shown} does not divide by {step} (depths) x {z_ds} (z_ds): use another "
                "z_ds, other depths, or frames of another size"
            )
        return self.grid[0] // step, self.grid[1] // step

    # ---- Parts ------------------------------------------------------------------------------------------------------

    def pairs(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """Return each embedded frame after its predecessor, on channels: (N, T, D, H, W) -> (N, T, 2 D, H, W).

        The first one's is `before` (N, 1, D, H, W), by default what was learned for the begin of a video.
        """
        first = self.sos_post.expand(len(x), 1, -1, -1, -1) if before is None else before
        return torch.cat([torch.cat([first, x[:, :-1]], dim=1), x], dim=2)

    def encode(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """Return the latents before quantization, u: (N, T, D, H, W) -> (N, T, E, h, w)."""
        return self.encoder(self.pairs(x, before).flatten(0, 1)).unflatten(0, x.shape[:2])

    def quantize(self, u: Tensor) -> Quantized:
        """Quantize latents (N, T, E, h, w) in float32; codes are (N, T, h, w) and the output (N, T, E, h, w)."""
        with torch.autocast(u.device.type, enabled=False):
            found = self.codebook(u.float().flatten(0, 1))
        shape = u.shape[:2]
        return found._replace(output=found.output.unflatten(0, shape), codes=found.codes.unflatten(0, shape))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor, Quantized]:
        """Return of embedded frames the latents of the first `n_cond`, z of the others, and all quantized.

        (N, T, D, H, W) -> (N, c, E, h, w), (N, T - c, E, h, w).
        """
        u = self.encode(x)
        found = self.quantize(u)
        return u[:, : self.n_cond], found.output[:, self.n_cond :], found

    def lookup(self, codes: Tensor) -> Tensor:
        """Return z of codes: (N, T, h, w) -> (N, T, E, h, w)."""
        return self.codebook.lookup(codes.flatten(0, 1)).unflatten(0, codes.shape[:2])

    def embed_actions(self, actions: Tensor) -> Tensor:
        """Return the vectors of actions (N, T), -1 for unknown ones: (N, T, e). Without actions all have the first."""
        actions = actions % (self.action_dim + 1) if self.use_actions else torch.zeros_like(actions)
        return self.action_embeds(actions)

    def predict(self, cond: Tensor, z: Tensor, actions: Tensor) -> Tensor:
        """Return h of frames c, c + 1, ...: cond (N, c, E, h, w), z (N, T - c, E, h, w), actions (N, T).

        h[:, i] depends on z[:, :i] and actions up to c + i. Any T up to `seq_len` is possible.
        """
        latents = torch.cat([cond, z], dim=1)[:, :-1]
        return self.temporal(latents, self.embed_actions(actions[:, 1:]))[:, self.n_cond - 1 :]

    def forward(self, compute: Callable[[TECO], Any]) -> Any:
        """Return the result of a computation with this network, while parameters that are divided are gathered."""
        return compute(self)

    def decode(self, h: Tensor, z: Tensor) -> Tensor:
        """Return logits of the tokenizer's codes: h, z (N, E, h, w) -> (N, V, H, W)."""
        return self.decoder(torch.cat([h, z], dim=1))
