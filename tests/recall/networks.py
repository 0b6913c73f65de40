"""A tokenizer with a colour table, and a network that predicts the next token grid from past ones and actions."""

import torch
from torch import Tensor, nn

PAST = 36


class Blocks(nn.Module):
    """Frames (N, 3, T, H, W) <-> tokens (N, T, H / 8, W / 8): the nearest of `vocabulary` colours to a block's mean."""

    clip_frames = 8
    stride = (1, 8)

    def __init__(self, height: int = 16, width: int = 32, vocabulary: int = 16):
        super().__init__()
        self.options = {"height": height, "width": width, "vocabulary": vocabulary}
        self.height, self.width, self.vocabulary = height, width, vocabulary
        self.colours = nn.Parameter(torch.rand(vocabulary, 3) * 2 - 1)

    def encode(self, video: Tensor) -> Tensor:
        """See `training.contract.Tokenizer`."""
        means = nn.functional.avg_pool3d(video, (1, 8, 8)).movedim(1, -1)  # N T h w 3
        return (means.unsqueeze(-2) - self.colours).square().sum(-1).argmin(-1)

    def decode(self, codes: Tensor) -> Tensor:
        """See `training.contract.Tokenizer`."""
        blocks = self.colours[codes].movedim(-1, 1)  # N 3 T h w
        return blocks.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)


class Predictor(nn.Module):
    """Tokens (N, T, h, w) and actions (N, T) -> logits (N, T - 36, h, w, vocabulary) of the grids from 36 on.

    The grid at t attends to the 36 before it, each with the action that led into it, and to the action into t.
    """

    def __init__(self, grid: tuple[int, int] = (2, 4), vocabulary: int = 16, num_actions: int = 4, channels: int = 16):
        super().__init__()
        self.options = {
            "grid": list(grid),
            "vocabulary": vocabulary,
            "num_actions": num_actions,
            "channels": channels,
        }
        cells = grid[0] * grid[1]
        self.grid, self.vocabulary, self.num_actions = tuple(grid), vocabulary, num_actions
        self.tokens, self.actions = nn.Embedding(vocabulary, channels), nn.Embedding(num_actions, channels)
        self.reader = nn.Linear(cells * channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.attention = nn.MultiheadAttention(
            channels, 2, bias=False, batch_first=True
        )  # the bias of keys has no gradient
        self.head = nn.Linear(channels, cells * vocabulary)

    def forward(self, codes: Tensor, actions: Tensor) -> Tensor:
        """See the class."""
        frames = self.norm(self.reader(self.tokens(codes).flatten(2)) + self.actions(actions))  # N T C
        past = frames.unfold(1, PAST, 1)[:, : codes.shape[1] - PAST].transpose(2, 3)  # N T-36 36 C
        queries = self.actions(actions[:, PAST:]).flatten(0, 1).unsqueeze(1)
        found, _ = self.attention(queries, past.flatten(0, 1), past.flatten(0, 1), need_weights=False)
        logits = self.head(found.squeeze(1)).unflatten(0, (len(codes), -1))
        return logits.unflatten(2, (*self.grid, self.vocabulary))
