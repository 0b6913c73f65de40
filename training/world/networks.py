"""The network of the world model: the latents of the next frame, from noise, frames of context, and actions.

A diffusion transformer (Peebles and Xie, ICCV 2023) on the cells of one frame. Its blocks are modulated by time,
actions and the poses of the frames of context, which lie on further channels (as in GameNGen, Valevski et al., ICLR
2025), and their second half is convolutional. It predicts the clean latents (Li and He, "Back to Basics", 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_utils.precision import HALF_FORMATS, MixedPrecision
from training.modules.attention import attend
from training.modules.inference import inference_copy
from training.modules.latents import time_code
from training.modules.linear import can_pack, pack_linears
from training.modules.packed_conv import PackedConv2d
from training.world.context import GEOMETRY


class CellConv(nn.Conv2d):
    """A 3x3 convolution of cells in raster order: (N, h * w, inputs) -> (N, h * w, outputs)."""

    def __init__(self, inputs: int, outputs: int, grid: tuple[int, int]):
        super().__init__(inputs, outputs, 3, padding=1)
        self.grid = grid

    def forward(self, input: Tensor) -> Tensor:
        """See the class."""
        return super().forward(input.transpose(1, 2).unflatten(2, self.grid)).flatten(2).transpose(1, 2)


class PackedCellConv(PackedConv2d):
    """`CellConv` for inference; the cells are an image with channels last, which is not copied."""

    def __init__(self, conv: CellConv):
        super().__init__(conv, conv.weight.dtype)
        self.grid = conv.grid

    def forward(self, x: Tensor) -> Tensor:
        """See `CellConv`."""
        return super().forward(x.unflatten(1, self.grid).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)


class Block(nn.Module):
    """Attention over the cells, then two convolutions, each modulated and gated; at first identity.

    `modulation` turns a condition (N, width) into the numbers (N, 6 * width) that do so.
    """

    def __init__(self, width: int, heads: int, grid: tuple[int, int]):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.conv: nn.Module = CellConv(width, 2 * width, grid)
        self.out = nn.Linear(2 * width, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Transform the cells x (N, L, width) under a modulation (N, 6 * width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unsqueeze(1).chunk(6, dim=2)
        q, k, v = self.qkv(self.norm1(x) * (1 + scale1) + shift1).chunk(3, dim=2)
        x = x + gate1 * self.proj(attend(q, k, v, self.heads))
        h = self.conv(self.norm2(x) * (1 + scale2) + shift2)
        return x + gate2 * self.out(F.gelu(h, approximate="tanh"))


class Conditions(NamedTuple):
    """What the condition of N frames says to each block, (N, 6 * width), and the shares (N, 1 + slots) of `skip`."""

    modulations: list[Tensor]
    shares: Tensor | None

    def split(self, count: int) -> list[Conditions]:
        """Return the conditions of `count` equal parts of the frames."""
        shares = [None] * count if self.shares is None else self.shares.chunk(count)
        rows = zip(*(modulation.chunk(count) for modulation in self.modulations), strict=True)
        return [Conditions(list(part), share) for part, share in zip(rows, shares, strict=True)]


class WorldModel(MixedPrecision):
    """Predict the clean latents (N, channels, h, w) of the next frame.

    `slots` frames of context lie on further channels. Actions are numbers below `num_actions`, or vectors of
    `action_values`, of which the newest `history` are seen. `motions` (num_actions, 3) is how each action moves the
    viewer: forwards, to the left, in units of pose, and the turn to the left in radians; zeros where that is unknown.
    """

    formats = ("bf16",)
    motions: Tensor
    block_dtype: torch.dtype | None = None  # of the blocks' weights, if another one than that of the others

    def __init__(
        self, channels: int, grid: Sequence[int], width: int = 160, depth: int = 5, heads: int = 5,
        recent: Sequence[int] = (1, 2, 4, 8), memory: int = 3, history: int = 4, num_actions: int = 0,
        action_values: int = 0, skip: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.options = {
            "channels": channels, "grid": list(grid), "width": width, "depth": depth, "heads": heads,
            "recent": list(recent), "memory": memory, "history": history, "num_actions": num_actions,
            "action_values": action_values, "skip": skip,
        }  # fmt: skip
        if width % (2 * heads):
            raise ValueError(f"the width {width} must be a multiple of twice the {heads} heads")
        height, columns = grid
        self.channels, self.grid, self.width = channels, (height, columns), width
        self.recent, self.memory, self.history = list(recent), memory, history
        self.slots = len(self.recent) + memory
        self.num_actions, self.action_values = num_actions, action_values
        self.embed = nn.Linear((1 + self.slots) * channels, width)
        self.positions = nn.Parameter(torch.randn(height * columns, width) * 0.02)
        self.time = nn.Linear(width, width)
        self.geometry = nn.Linear(self.slots * GEOMETRY + 1, width)
        actions = num_actions or action_values
        self.actions = nn.Linear(history * (actions + 1), width) if actions else None
        self.condition = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList(Block(width, heads, self.grid) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, channels)
        nn.init.zeros_(self.head.weight)
        self.skip = nn.Linear(width, 1 + self.slots) if skip else None
        if self.skip is not None:
            nn.init.zeros_(self.skip.weight)
            nn.init.zeros_(self.skip.bias)
        self.register_buffer("motions", torch.zeros(num_actions, 3))

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, geometry: Tensor, level: Tensor,
        actions: Tensor | None = None, has_action: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the clean latents of noisy ones x (N, C, h, w) at time t (N,).

        `context` (N, slots, C, h, w) has noise of standard deviation `level` (N,) and zeros where there is no frame;
        `geometry` (N, slots, GEOMETRY) is from `training.world.context.geometry`. `actions`, int64 (N, history) or
        float (N, history, values), end with the one that leads into the frame, and count where `has_action`, bool
        (N, history), is true.
        """
        return self.predict(x, context, self.conditions(t, geometry, level, actions, has_action))

    def predict(self, x: Tensor, context: Tensor, conditions: Conditions) -> Tensor:
        """Return the clean latents of `forward` under conditions that are computed already."""
        with self.in_half(x):
            given = torch.cat([x.unsqueeze(1), context], dim=1)
            cells = self.embed(given.flatten(1, 2).flatten(2).transpose(1, 2)) + self.positions
            if self.block_dtype is not None:
                cells = cells.to(self.block_dtype)
            for block, modulation in zip(self.blocks, conditions.modulations, strict=True):
                cells = block(cells, modulation)
            found = self.head(self.norm(cells.to(self.positions))).float().transpose(1, 2).unflatten(2, self.grid)
            shares = conditions.shares
            return found if shares is None else found + torch.einsum("ns,nschw->nchw", shares, given)

    def conditions(
        self, t: Tensor, geometry: Tensor, level: Tensor, actions: Tensor | None = None,
        has_action: Tensor | None = None,
    ) -> Conditions:  # fmt: skip
        """Return all that depends on these arguments of `forward` alone."""
        with self.in_half(geometry):
            known = self.condition(self.cause(t, geometry, level, actions, has_action))
            shares = None if self.skip is None else self.skip(known).float()
            if self.block_dtype is not None:
                known = known.to(self.block_dtype)
            return Conditions([block.modulation(known) for block in cast(list[Block], self.blocks)], shares)

    def cause(
        self, t: Tensor, geometry: Tensor, level: Tensor, actions: Tensor | None, has_action: Tensor | None
    ) -> Tensor:
        """Return the condition of the blocks: (N, width)."""
        found = self.time(time_code(t, self.width)) + self.geometry(
            torch.cat([geometry.flatten(1), level.unsqueeze(1)], dim=1)
        )
        if self.actions is None:
            return found
        if actions is None:
            return found + self.actions(found.new_zeros(len(found), self.actions.in_features))
        values = F.one_hot(actions, self.num_actions) if self.num_actions else actions
        values = F.pad(values.to(geometry.dtype), (0, 1), value=1.0)  # (N, history, values + 1)
        values = values if has_action is None else values * has_action.unsqueeze(2)
        return found + self.actions(values.flatten(1))


def prepare(network: WorldModel) -> WorldModel:
    """Return a copy for generation in its precision, with packed weights; it shares the tensors that are not packed."""
    other = inference_copy(network)
    if network.positions.device.type == "cpu":
        other.block_dtype = torch.float32 if other.half is None else HALF_FORMATS[other.half]
        other.half = None
        other.blocks = cast(nn.ModuleList, pack_linears(other.blocks, other.block_dtype))
        if can_pack(other.blocks, other.block_dtype):
            for block in other.blocks:
                block.conv = PackedCellConv(cast(CellConv, block.conv))
    return other
