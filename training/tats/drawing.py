"""Draw codes from a network of TATS: in a sliding window, between key frames, or in windows of time and space.

Ge et al., ECCV 2022, section 3.2 and the release. Networks here are copies from `TATSTransformer.for_sampling`; tokens
are numbers of their logits, and codes those of the tokenizer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from training.generation.token_sampling import Draw, draw_sequence
from training.tats.networks import TATSTransformer, infill_mask


class Writer:
    """A network that writes codes after a condition (N, condition_length): see `rollout.TokenModel`.

    With `later` the condition changes as the window moves: they are those of the windows after the first, in order.
    """

    def __init__(
        self, network: TATSTransformer, condition: Tensor, rows: Tensor | None = None,
        later: Iterator[Tensor] | None = None,
    ):  # fmt: skip
        self.network, self.condition, self.rows, self.later = network, condition, rows, later
        self.cache = network.cache(len(condition), network.block_size)
        self.num_windows = 0

    def begin(self, context: Tensor) -> Tensor:
        """See `rollout.TokenModel.begin`: each call is a window, one latent frame after that before it."""
        self.cache.truncate(0)
        if self.num_windows and self.later is not None:
            self.condition = next(self.later)
        self.num_windows += 1
        ids = torch.cat([self.condition, context.to(self.condition.device) + self.network.first_output], dim=1)
        return self.network.feed(ids, slice(0, ids.shape[1]), self.cache, self.rows, causal=True)

    def advance(self, tokens: Tensor) -> Tensor:
        """See `rollout.TokenModel.advance`."""
        place, ids = self.cache.length, tokens.unsqueeze(1) + self.network.first_output
        return self.network.feed(ids, slice(place, place + 1), self.cache, self.rows)


def to_codes(network: TATSTransformer, tokens: Tensor) -> Tensor:
    """Return the codes of tokens; a condition id, which only the released samplers draw, becomes code 0."""
    return (tokens + (network.first_output - network.conditions)).clamp(min=0)


def to_tokens(network: TATSTransformer, codes: Tensor) -> Tensor:
    """Return the tokens of codes."""
    return codes - (network.first_output - network.conditions)


def fill(
    network: TATSTransformer, condition: Tensor, first: Tensor, last: Tensor, uniforms: Tensor, draw: Draw
) -> Tensor:
    """Draw the codes between key frames: int64 (N, n) each, uniform numbers (N, 3n) -> (N, 3n).

    Their logits are those of training: the condition, the first frame and the last without its last code see each
    other, and what is between sees all of them and its own past.
    """
    n, size, offset = first.shape[1], network.block_size, network.conditions
    ids = torch.cat([condition, first + offset, last[:, :-1] + offset], dim=1)
    places = torch.cat([torch.arange(n + 1), torch.arange(size - n + 1, size)]).to(ids.device)
    cache = network.cache(len(ids), size)
    logits = network.feed(ids, places, cache, at=n)
    return _draw_between(network, cache, logits, n, uniforms, draw)


def fill_legacy(
    network: TATSTransformer, condition: Tensor, first: Tensor, last: Tensor, uniforms: Tensor, draw: Draw
) -> Tensor:
    """Draw the codes between key frames as the released sampler does, with its faults; see `fill`.

    The last frame is whole and one place too early, sees the first and its own past, and the first code is drawn from
    the logits after it.
    """
    n, size, offset = first.shape[1], network.block_size, network.conditions
    ids = torch.cat([condition, first + offset, last + offset], dim=1)
    places = torch.cat([torch.arange(n + 1), torch.arange(size - n, size)]).to(ids.device)
    mask = infill_mask(size, n)[: 2 * n + 1, : 2 * n + 1].to(ids.device)
    cache = network.cache(len(ids), size + n)
    logits = network.feed(ids, places, cache, mask=mask)
    return _draw_between(network, cache, logits, n, uniforms, draw)


def _draw_between(network: TATSTransformer, cache: Any, logits: Tensor, n: int, uniforms: Tensor, draw: Draw) -> Tensor:
    places = itertools.count(n + 1)

    def advance(tokens: Tensor) -> Tensor:
        place = next(places)
        return network.feed(tokens.unsqueeze(1) + network.first_output, slice(place, place + 1), cache)

    return to_codes(network, draw_sequence(logits, advance, uniforms, draw))


def draw_in_windows(
    network: TATSTransformer,
    condition: Tensor,
    size: tuple[int | None, int, int],
    window: tuple[int, int, int],
    memory: int,
    uniforms: Callable[[int], Tensor],
    draw: Draw,
) -> Iterator[Tensor]:
    """Yield latent frames (N, h, w) of codes larger than the network was trained on, in time and space.

    Every code is drawn in a window (frames, rows, columns) of the size trained on, around it as far as the edges allow.
    `size` is that of the video, whose frames may be None: without end. `uniforms` gives the numbers (N, h * w) of a
    frame. Section "Long" of the release's sampler in time and space; a whole forward pass for each code.
    """
    frames, height, width = size
    span, rows, columns = window
    batch, device = len(condition), condition.device
    held = torch.zeros(batch, span, height, width, dtype=torch.int64, device=device)  # tokens, `base` first
    base = 0
    for t in range(frames) if frames is not None else itertools.count():
        if t >= base + span:
            held, base = torch.cat([held[:, 1:], torch.zeros_like(held[:, :1])], dim=1), base + 1
        local_t = _place(t, frames, span, memory)
        numbers = uniforms(t).to(device)
        for i, j in itertools.product(range(height), range(width)):
            local_i, local_j = _place(i, height, rows, rows // 2), _place(j, width, columns, columns // 2)
            r, c = i - local_i, j - local_j
            part = _window(held, t - local_t - base, span)[:, :, r : r + rows, c : c + columns].flatten(1)
            ids = torch.cat([condition, part[:, :-1] + network.first_output], dim=1)
            place = (local_t * rows + local_i) * columns + local_j
            table = network.table_rows([r, r + rows, c, c + columns])
            logits = network(ids, table)[:, len(condition[0]) - 1 + place]
            held[:, t - base, i, j] = draw(logits, numbers[:, i * width + j])
        yield to_codes(network, held[:, t - base])


def _place(index: int, size: int | None, window: int, middle: int) -> int:
    """Return the place of an index in its window: `middle`, or where the window ends at an edge."""
    if index <= middle:
        return index
    left = window if size is None else size - index
    return window - left if left <= window - middle and size is not None else middle


def _window(held: Tensor, first: int, span: int) -> Tensor:
    """Return `span` frames of tokens from `first` on; frames that are not there yet are zeros."""
    part = held[:, first : first + span]
    missing = span - part.shape[1]
    return torch.cat([part, torch.zeros_like(held[:, :missing])], dim=1) if missing else part
