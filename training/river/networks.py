"""The network of RIVER: the velocity field (Davtyan et al., ICCV 2023, section 3.3).

The names of the field's state are those of the release.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_utils.precision import HALF_FORMATS, MixedPrecision
from training.modules.attention import attend, merge_heads, split_heads
from training.modules.inference import inference_copy
from training.modules.latents import time_code
from training.modules.linear import Linear, linear, pack_linears
from training.modules.norms import BatchNorm
from training.river.options import HEADS

MAX_SIDE = 512  # cells of a row or a column that the position tables have
DISTANCE_WIDTH = 256

Dropout = Callable[[Tensor], Tensor]


class ToImage(nn.Module):
    """Arrange tokens row by row: (N, H * W, C) -> (N, C, H, W)."""

    def __init__(self, height: int, width: int):
        super().__init__()
        self.height, self.width = height, width

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x.transpose(1, 2).unflatten(2, (self.height, self.width))


class ToTokens(nn.Module):
    """Undo `ToImage`."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x.flatten(2).transpose(1, 2)


class PositionEncoding(nn.Module):
    """Learned codes of columns, then rows: half of the channels each."""

    def __init__(self, width: int):
        super().__init__()
        self.row_embed, self.col_embed = nn.Embedding(MAX_SIDE, width // 2), nn.Embedding(MAX_SIDE, width // 2)
        for table in (self.row_embed, self.col_embed):
            nn.init.uniform_(table.weight, -1, 1)

    def forward(self, height: int, width: int) -> Tensor:
        """Return the codes of a grid: (height * width, channels)."""
        rows, columns = self.row_embed.weight[:height], self.col_embed.weight[:width]
        codes = torch.cat([columns.expand(height, -1, -1), rows.unsqueeze(1).expand(-1, width, -1)], dim=2)
        return codes.flatten(0, 1)


class SelfAttention(nn.Module):
    """Self-attention with the parameters of `nn.MultiheadAttention`: queries, keys and values have one matrix."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        self.in_proj: nn.Module | None = None  # the same matrix as a layer, for inference
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, drop: Dropout | None = None) -> Tensor:
        """Transform tokens (N, L, C); `drop` is applied to the weights of attention."""
        projected = linear(x, self.in_proj_weight, self.in_proj_bias) if self.in_proj is None else self.in_proj(x)
        q, k, v = projected.chunk(3, dim=2)
        if drop is None:
            return self.out_proj(attend(q, k, v, self.heads))
        q, k, v = (split_heads(part, self.heads) for part in (q, k, v))
        weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(3)
        return self.out_proj(merge_heads(drop(weights) @ v))

    def use_layer(self) -> None:
        """Hold the matrix of queries, keys and values as a layer, which can be packed."""
        layer = nn.Linear(self.in_proj_weight.shape[1], self.in_proj_weight.shape[0], device="meta")
        layer.weight, layer.bias = self.in_proj_weight, self.in_proj_bias
        del self.in_proj_weight, self.in_proj_bias
        self.in_proj = layer


class Layer(nn.Module):
    """A pre-norm transformer layer with a hidden layer of four times the width and the exact GELU."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.self_attn = SelfAttention(width, heads)
        self.linear1, self.linear2 = Linear(width, 4 * width), Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, drop: Dropout | None = None) -> Tensor:
        """Transform tokens (N, L, C); `drop` acts on weights of attention, both results and the hidden layer."""
        keep = drop or (lambda y: y)
        x = x + keep(self.self_attn(self.norm1(x), drop))
        return x + keep(self.linear2(keep(F.gelu(self.linear1(self.norm2(x))))))


class VectorField(MixedPrecision):
    """The velocity v(x_t; reference, conditions, distances, t) of the next frame's latents, C x h x w.

    A transformer over the cells of the grid and one token of the time, with U-shaped skips. `context_frames` is the
    number of conditioning frames; the release has one. `reference` False leaves the reference frame out. Codes of
    actions, if any, are added to all cells: whole numbers below `num_actions`, or vectors of `action_values`.
    """

    formats = ("bf16",)
    trunk_dtype: torch.dtype | None = None  # of the blocks' weights, if it is another

    def __init__(
        self, state_size: int = 4, state_res: Sequence[int] = (8, 8), inner_dim: int = 768, depth: int = 4,
        mid_depth: int = 5, out_norm: str = "ln", heads: int = 8, reference: bool = True, context_frames: int = 1,
        num_actions: int = 0, action_values: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.options = {
            "state_size": state_size, "state_res": list(state_res), "inner_dim": inner_dim, "depth": depth,
            "mid_depth": mid_depth, "out_norm": out_norm, "heads": heads, "reference": reference,
            "context_frames": context_frames, "num_actions": num_actions, "action_values": action_values,
        }  # fmt: skip
        if out_norm not in HEADS:
            raise ValueError(f"the head {out_norm!r} is unknown: use {' or '.join(HEADS)}")
        if inner_dim % heads or inner_dim % 2:
            raise ValueError(f"the width {inner_dim} must be even and a multiple of the {heads} heads")
        height, width = state_res
        if not 1 <= min(height, width) <= max(height, width) <= MAX_SIDE:
            raise ValueError(f"a grid of {height}x{width} has no position codes: sides may be 1 to {MAX_SIDE}")
        self.state_size, self.state_res, self.inner_dim = state_size, (height, width), inner_dim
        self.reference, self.context_frames = reference, context_frames
        self.num_actions, self.action_values = num_actions, action_values
        inputs = (1 + reference + context_frames) * state_size
        self.position_encoding = PositionEncoding(inner_dim)
        self.project_in = nn.Sequential(ToTokens(), nn.Linear(inputs, inner_dim))
        self.time_projection = nn.Sequential(  # of the distance; so it is called in the release
            nn.Linear(context_frames, DISTANCE_WIDTH), nn.ReLU(), nn.Linear(DISTANCE_WIDTH, inner_dim)
        )
        self.in_blocks = nn.ModuleList(Layer(inner_dim, heads) for _ in range(depth))
        self.mid_blocks = nn.ModuleList(Layer(inner_dim, heads) for _ in range(mid_depth))
        self.out_blocks = nn.ModuleList(
            nn.ModuleList([Linear(2 * inner_dim, inner_dim), Layer(inner_dim, heads)]) for _ in range(depth)
        )
        conv, to_image = nn.Conv2d(inner_dim, state_size, 3, padding=1), ToImage(height, width)
        first = Linear(inner_dim, inner_dim)
        if out_norm == "ln":
            self.project_out = nn.Sequential(first, nn.GELU(), nn.LayerNorm(inner_dim), to_image, conv)
        else:
            self.project_out = nn.Sequential(first, to_image, nn.GELU(), BatchNorm(inner_dim), conv)
        if num_actions:
            self.action_embed = nn.Embedding(num_actions + 1, inner_dim)  # the last: no action
        elif action_values:
            self.action_project = nn.Linear(action_values, inner_dim)
            self.no_action = nn.Parameter(torch.zeros(inner_dim))

    @property
    def takes_actions(self) -> bool:
        """Return whether actions condition the field."""
        return bool(self.num_actions or self.action_values)

    def forward(
        self, x: Tensor, reference: Tensor, conditions: Tensor, distances: Tensor, t: Tensor,
        actions: Tensor | None = None, has_action: Tensor | None = None, drop: Dropout | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the velocity at `x` and the reference (N, C, h, w): (N, C, h, w).

        `conditions` (N, context_frames, C, h, w) are `distances` (N, context_frames) frames before the reference, or
        (N, C, h, w) and (N,) for one. `t` is (N,). `actions` are int64 (N,) or float (N, values), and count only where
        `has_action`, bool (N,), is true; without them there is no action.
        """
        tokens = self.embed(x, reference, conditions, distances)
        if self.takes_actions:
            tokens = tokens + self.action_code(actions, has_action, len(x)).unsqueeze(1)
        tokens = torch.cat([time_code(t, self.inner_dim).unsqueeze(1).to(tokens), tokens], dim=1)
        return self.project_out(self.blocks(tokens, drop)[:, 1:])

    def blocks(self, tokens: Tensor, drop: Dropout | None) -> Tensor:
        """Return `trunk` in the field's precision: half in its products, or throughout with weights that are so."""
        if self.trunk_dtype is not None:
            return self.trunk(tokens.to(self.trunk_dtype), drop).to(tokens.dtype)
        with self.in_half(tokens):
            return self.trunk(tokens, drop).to(tokens.dtype)

    def embed(self, x: Tensor, reference: Tensor, conditions: Tensor, distances: Tensor) -> Tensor:
        """Return the tokens of the cells, with codes of position and distance: (N, h * w, width)."""
        tokens = self.cells(x, reference, conditions) + self.position_encoding(*self.state_res)
        return tokens + self.distance_code(distances).unsqueeze(1)

    def cells(self, x: Tensor, reference: Tensor, conditions: Tensor) -> Tensor:
        """Return the tokens of the cells without codes: (N, h * w, width)."""
        conditions = conditions.flatten(1, 2) if conditions.ndim == 5 else conditions
        return self.project_in(torch.cat([x, reference, conditions] if self.reference else [x, conditions], dim=1))

    def distance_code(self, distances: Tensor) -> Tensor:
        """Return the code of distances (N, context_frames) or (N,): (N, width)."""
        return self.time_projection(distances.reshape(len(distances), -1).float().log())

    def action_code(self, actions: Tensor | None, has_action: Tensor | None, num_videos: int) -> Tensor:
        """Return the code of the actions: (N, width)."""
        none = self.action_embed.weight[-1] if self.num_actions else self.no_action
        if actions is None:
            return none.expand(num_videos, -1)
        code = self.action_embed(actions) if self.num_actions else self.action_project(actions.to(none.dtype))
        return code if has_action is None else torch.where(has_action.unsqueeze(1), code, none)

    def trunk(self, tokens: Tensor, drop: Dropout | None = None, record: list[Tensor] | None = None) -> Tensor:
        """Return the tokens after all blocks: (N, L, width) -> the same; `record` receives those after each block."""
        skips: list[Tensor] = []
        done = [] if record is None else record
        for block in self.in_blocks:
            tokens = block(tokens, drop)
            skips.append(tokens)
            done.append(tokens)
        for block in self.mid_blocks:
            tokens = block(tokens, drop)
            done.append(tokens)
        for narrow, block in self.out_blocks:  # pyright: ignore[reportGeneralTypeIssues]
            tokens = block(narrow(torch.cat([skips.pop(), tokens], dim=2)), drop)
            done.append(tokens)
        return tokens


def prepare(field: VectorField) -> VectorField:
    """Return a copy for evaluation alone, with its precision, which shares all tensors but the packed ones."""
    other = inference_copy(field)
    for module in list(other.modules()):
        if isinstance(module, SelfAttention):
            module.use_layer()
    half = None if other.half is None else HALF_FORMATS[other.half]
    for name in ("in_blocks", "mid_blocks", "out_blocks"):
        setattr(other, name, pack_linears(other.get_submodule(name), half or torch.float32))
    other.trunk_dtype = half
    return other
