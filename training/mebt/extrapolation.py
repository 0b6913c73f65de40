"""Videos longer than a network was trained for: windows that continue the last latent frames of what is there.

Yoo et al., CVPR 2023, section 4.3. A window has the grid of the network. Its first frames are given, as positions that
are visible; the others are drafted, and counted by the mask schedule from their own number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from training.generation.draft_revise import DraftSettings, Grid, Published

Draw = Callable[[Grid, str], Grid]  # fixes the masked positions of a grid in the steps of a label


def continue_codes(given: Tensor, num_frames: int, draw: Draw, label: str) -> Tensor:
    """Return the latent frames after given ones, (N, c, h, w), in a window of `num_frames`: (N, num_frames - c, h, w).

    Raises `ValueError` if nothing is left to draw.
    """
    num_videos, count, *size = given.shape
    if not 0 <= count < num_frames:
        raise ValueError(f"{count} latent frames are given in a window of {num_frames}: give fewer")
    codes = torch.zeros(num_videos, num_frames, *size, dtype=torch.int64, device=given.device)
    codes[:, :count] = given
    grid = draw(Grid.given(codes.flatten(1), given[0].numel()), label)
    return grid.codes.view_as(codes)[:, count:]


def last_frames(codes: Tensor, chunk: Tensor, count: int, legacy: bool) -> Tensor:
    """Return the `count` latent frames that the next window begins with: the last of all codes (N, t, h, w).

    With `legacy` they are taken from the last chunk alone, as in the release: a chunk of one frame is repeated. Raises
    `ValueError` where the release would stop, as the chunk is too short.
    """
    if not legacy:
        return codes[:, codes.shape[1] - count :]
    if chunk.shape[1] == 1:
        return chunk.expand(-1, count, -1, -1)
    if chunk.shape[1] < count:
        raise ValueError(
            f"the release takes {count} latent frames of context from the last {chunk.shape[1]}: use at most half of "
            "the window as context, or leave out legacy"
        )
    return chunk[:, chunk.shape[1] - count :]


def extrapolate(
    published: Published, start: Tensor, total: int, window: int, context: int, settings: DraftSettings,
    legacy: bool = False,
) -> Tensor:  # fmt: skip
    """Return `total` latent frames (N, total, h, w) that begin with a window (N, window, h, w).

    Each of the next windows keeps `context` latent frames of what is there.
    """
    codes = chunk = start
    while codes.shape[1] < total:
        given = last_frames(codes, chunk, context, legacy)
        chunk = continue_codes(given, window, lambda grid, label: published.draft(grid, settings, label), "window")
        codes = torch.cat([codes, chunk], dim=1)
    return codes[:, :total]
