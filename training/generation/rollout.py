"""Write long videos of tokens: latent frame by latent frame, or key frames and then the frames between them.

Ge et al., ECCV 2022, section 3.2. Nothing here knows a network: `TokenModel` is what a system gives. Tokens of a latent
frame are in raster order, (N, n). All functions are generators without end, and hold a few latent frames.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from training.generation.token_sampling import Draw, draw_sequence
from training.sampling import pieces

IMAGES_AT_ONCE = 4  # latent frames that are decoded together where each is an image of its own


class TokenModel(Protocol):
    """A network that predicts tokens one after another, with the condition that it is given."""

    def begin(self, context: Tensor) -> Tensor:
        """Forget all tokens, take those of the context (N, count), and return the logits of the next one: (N, V)."""
        ...

    def advance(self, tokens: Tensor) -> Tensor:
        """Take the next tokens (N,), and return the logits of those after them: (N, V)."""
        ...


def sliding_window(
    model: TokenModel, uniforms: Callable[[int], Tensor], draw: Callable[[int], Draw], memory: int
) -> Iterator[Tensor]:
    """Yield latent frames without end, each drawn after at most the `memory` ones before it: int64 (N, n).

    `uniforms` gives the uniform numbers (N, n) of a frame, and `draw` how its tokens are drawn. The model sees a frame
    and its context at the same positions always, so that `memory` frames and one more must fit.
    """
    past: deque[Tensor] = deque(maxlen=memory)
    for frame in itertools.count():
        numbers = uniforms(frame)
        if 0 < frame <= memory:  # the context still begins with the first frame, and the model holds it
            logits = model.advance(past[-1][:, -1])
        else:
            none = torch.empty(len(numbers), 0, dtype=torch.int64)
            logits = model.begin(torch.cat([*past], dim=1) if past else none)
        tokens = draw_sequence(logits, model.advance, numbers, draw(frame))
        past.append(tokens)
        yield tokens


def filled(
    keys: Iterable[Tensor],
    fill: Callable[[Tensor, Tensor, Sequence[int]], Tensor],
    group: int,
) -> Iterator[Tensor]:
    """Yield key frames (N, n) and, between each and the next, the latent frames that `fill` gives: int64 (N, n).

    `fill` takes the key frames (S, N, n) before and after S segments and the numbers of the segments, and returns the
    frames between them (S, N, count, n). `group` segments are filled together. Of a finite number of keys the last is
    the last frame.
    """
    last: Tensor | None = None
    done = 0
    for some in batched(keys, group):
        ends = [*([last] if last is not None else []), *some]
        last = ends[-1]
        if len(ends) == 1:
            continue
        between = fill(torch.stack(ends[:-1]), torch.stack(ends[1:]), range(done, done + len(ends) - 1))
        for key, frames in zip(ends[:-1], between, strict=True):
            yield key
            yield from frames.unbind(1)
        done += len(ends) - 1
    if last is not None:
        yield last


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of `size` successive items; the last may be shorter, and the first has one more."""
    iterator = iter(items)
    first = list(itertools.islice(iterator, size + 1))
    while first:
        yield first
        first = list(itertools.islice(iterator, size))


def aligned(items: Iterator[Tensor], starts: Sequence[int], num_frames: int | None, block: int) -> Iterator[Tensor]:
    """Yield for each video its own items [start, start + num_frames) in pieces: (N, ...) -> (N, count, ...).

    `items` are those of frames 0, 1, ... Those that lie between the first and the last start are held.
    """
    held, base, done = [], 0, 0  # `held` begins with item `base`
    for count in pieces(num_frames, block):
        while base + len(held) < max(starts) + done + count:
            held.append(next(items))
            surplus = min(max(min(starts) + done - base, 0), len(held))
            del held[:surplus]
            base += surplus
        rows = [[item[n] for item in held[start + done - base :][:count]] for n, start in enumerate(starts)]
        yield torch.stack([torch.stack(row) for row in rows])
        done += count


# ----------------------------------------------------------------------------
# From tokens to frames.


def shifted(latents: Iterable[Tensor], firsts: Sequence[int]) -> Iterator[Tensor]:
    """Yield latents of each video from its own first one on: items (N, 1, h, w), of which row i starts at firsts[i]."""
    low = min(firsts)
    held: deque[Tensor] = deque()
    for index, latent in enumerate(latents):
        if index >= low:
            held.append(latent)
        if len(held) > max(firsts) - low:
            yield torch.stack([held[first - low][row] for row, first in enumerate(firsts)])
            held.popleft()


def margins(tokenizer: Any) -> tuple[int, int, int]:
    """Return what the frames of a latent frame depend on: latent frames before and after it, and of a whole block.

    A tokenizer that decodes in a stream needs the latent frames that its convolutions reach. Any other is given blocks
    of the length that it was trained on, for which it needs no others.
    """
    if hasattr(tokenizer, "decode_stream") and tokenizer.norm != "group":
        return (*tokenizer.decoder.reach(), 1)
    return 0, 0, max(tokenizer.clip_frames // tokenizer.stride[0], 1) if tokenizer.stride[0] > 1 else 1


def needed_latents(tokenizer: Any, starts: Sequence[int], num_frames: int | None, end: int | None = None) -> int | None:
    """Return how many latent frames `decoded` takes, None if without end."""
    if num_frames is None:
        return end
    _, after, block = margins(tokenizer)
    needed = -(-(max(starts) + num_frames) // tokenizer.stride[0])
    needed = -(-needed // block) * block + after
    return needed if end is None else min(needed, end)


def decoded(
    tokenizer: Any, latents: Iterable[Tensor], starts: Sequence[int], num_frames: int | None, end: int | None = None
) -> Iterator[Tensor]:
    """Yield frames [start, start + num_frames) of each video from the latents of its video: (N, 3, T, H, W).

    `latents` are those from frame 0 on, (N, 1, h, w) each; no more of them are taken than the frames depend on. With
    `end` videos end after that many. Frames depend neither on `num_frames` nor on where they are started; memory is
    constant.
    """
    before, _, block = margins(tokenizer)
    stride = tokenizer.stride[0]
    # A video that ends is decoded from its beginning, so that all end together.
    firsts = [max(start // stride - before, 0) // block * block if end is None else 0 for start in starts]
    offsets = [start - first * stride for start, first in zip(starts, firsts, strict=True)]
    stream = shifted(itertools.islice(latents, needed_latents(tokenizer, starts, num_frames, end)), firsts)
    held: Tensor | None = None
    skipped = done = 0  # frames of the stream before `held`, and frames that were yielded
    for frames in _decoded(tokenizer, stream, block):
        held = frames if held is None else torch.cat([held, frames], dim=2)
        count = skipped + held.shape[2] - max(offsets) - done
        count = count if num_frames is None else min(count, num_frames - done)
        if count > 0:
            firsts_held = [offset + done - skipped for offset in offsets]
            yield torch.stack([video[:, first : first + count] for video, first in zip(held, firsts_held, strict=True)])
            done += count
        drop = min(max(min(offsets) + done - skipped, 0), held.shape[2])
        held, skipped = held[:, :, drop:], skipped + drop


def _decoded(tokenizer: Any, latents: Iterable[Tensor], block: int) -> Iterator[Tensor]:
    """Yield the frames of latents, decoded in a stream, or in blocks that do not depend on each other."""
    if hasattr(tokenizer, "decode_stream") and tokenizer.norm != "group":
        yield from tokenizer.decode_stream(latents)
        return
    iterator = iter(latents)
    while some := list(itertools.islice(iterator, IMAGES_AT_ONCE if block == 1 else block)):
        yield tokenizer.decode(torch.cat(some, dim=1))
