"""Which clips a metric looks at: real windows from a dataset, and generated clips from a source.

The policy is the one published for LongVideoGAN (Brooks et al., NeurIPS 2022, and its code): real clips come from
endless shuffled passes over the videos, a random window each, so every video counts alike whatever its length;
generated clips start at a random frame within one period of the temporal up-sampling, so that its phase averages out.
Item i draws from generators of its own, so what it holds does not depend on batch size or on the number of ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from training.dataset import ClipDataset
from training.random import random_state

Start = int | Sequence[int]
Condition = Callable[[Start, int], Tensor]
READ_THREADS = 4
MAX_GENERATED = 4  # clips generated at a time at most, as published

POLICY_REAL = "endless shuffled passes over videos, one random window each visit"
POLICY_FAKE = "random offset within one temporal scale"
POLICY_CONDITIONED = "conditioned on random windows of real low-resolution clips"


class Source(Protocol):
    """What can be measured: an object that generates videos by seed, as systems and loaded networks do."""

    temporal_scale: int  # low-resolution frames that share a phase of the up-sampling repeat after this many
    context: int  # low-resolution frames a super-resolution network sees on either side of a frame; else 0

    def sample(
        self, seeds: Sequence[int], start: Start, num_frames: int, condition: Condition | None = None
    ) -> Iterator[Tensor]:
        """Successive chunks in time, uint8 (N, T, H, W, 3), of one video per seed."""
        ...


@dataclass(frozen=True)
class ClipShape:
    """`num_frames` frames, `spacing` apart."""

    num_frames: int
    spacing: int = 1

    @property
    def span(self) -> int:
        """Consecutive frames from the first to the last, both included."""
        return (self.num_frames - 1) * self.spacing + 1


@dataclass(frozen=True)
class Window:
    """Consecutive frames [start, start + span) of clip number `clip` of a dataset."""

    clip: int
    start: int


def real_window(dataset: ClipDataset, eligible: Sequence[int], purpose: str, seed: int, item: int, span: int) -> Window:
    """The window of real item number `item`; `eligible` lists the clips that are long enough."""
    visit, position = divmod(item, len(eligible))
    order = random_state(f"{purpose}-order", seed, visit).permutation(len(eligible))
    clip = eligible[order[position]]
    last_start = dataset.clips[clip].num_frames - span
    return Window(clip, int(random_state(f"{purpose}-window", seed, item).randint(last_start + 1)))


def real_clips(
    dataset: ClipDataset, size: tuple[int, int], shape: ClipShape, items: Sequence[int], seed: int, batch: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Real items in batches: (item numbers, uint8 (N, 3, T, H, W)), decoded ahead in threads."""
    eligible = dataset.eligible(shape.span)

    def read(item: int) -> np.ndarray:
        window = real_window(dataset, eligible, "metric-real", seed, item, shape.span)
        return dataset.read(window.clip, size, range(window.start, window.start + shape.span, shape.spacing))

    with ThreadPoolExecutor(READ_THREADS) as pool:
        batches = _batched(items, batch)
        ahead = [[pool.submit(read, i) for i in b] for b in batches[:2]]
        for number, numbers in enumerate(batches):
            if number + 2 < len(batches):
                ahead.append([pool.submit(read, i) for i in batches[number + 2]])
            yield numbers, channels_first(np.stack([future.result() for future in ahead.pop(0)]))


def generated_clips(
    source: Source,
    shape: ClipShape,
    items: Sequence[int],
    seed: int,
    batch: int,
    dataset: ClipDataset | None = None,
    condition_size: tuple[int, int] | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Generated items in batches: (item numbers, uint8 (N, 3, T, H, W)).

    With `condition_size`, (height, width) of low-resolution frames in `dataset`, the source is a super-resolution
    system alone, and each item is conditioned on a random real window of that size.
    """
    for numbers in _batched(items, min(batch, MAX_GENERATED)):
        seeds = [int(random_state("metric-fake-seed", seed, i).randint(2**31)) for i in numbers]
        if condition_size is None:
            start = [int(random_state("metric-fake-start", seed, i).randint(source.temporal_scale)) for i in numbers]
            condition = None
        else:
            assert dataset is not None, "a source that is conditioned needs real clips"
            start, condition = 0, _real_condition(dataset, condition_size, source.context, shape.span, numbers, seed)
        yield numbers, _collect(source.sample(seeds, start, shape.span, condition), shape)


def channels_first(video: np.ndarray | Tensor) -> Tensor:
    """(N, T, H, W, 3) -> (N, 3, T, H, W)."""
    return torch.as_tensor(video).permute(0, 4, 1, 2, 3)


def _real_condition(
    dataset: ClipDataset, size: tuple[int, int], context: int, span: int, items: Sequence[int], seed: int
) -> Condition:
    """Frames of one real window per item. Frame 0 is where the generated clip starts, frame -context is the window's
    first: float32 (N, 3, num_frames, h, w) in [-1, 1]."""
    length = span + 2 * context
    eligible = dataset.eligible(length)
    windows = [real_window(dataset, eligible, "metric-condition", seed, i, length) for i in items]

    def condition(start: Start, num_frames: int) -> Tensor:
        clips = []
        for window, first in zip(windows, [start] * len(windows) if isinstance(start, int) else start, strict=True):
            assert -context <= first <= span + context - num_frames, "a frame outside of the real window"
            first += window.start + context
            clips.append(dataset.read(window.clip, size, range(first, first + num_frames)))
        return channels_first(np.stack(clips)).float() / 127.5 - 1

    return condition


def _collect(chunks: Iterator[Tensor], shape: ClipShape) -> Tensor:
    """Every `spacing`-th frame of the chunks of one batch of videos, as (N, 3, T, H, W); the rest is not kept."""
    kept, position = [], 0
    for chunk in chunks:
        kept.append(chunk[:, -position % shape.spacing :: shape.spacing])
        position += chunk.shape[1]
    video = torch.cat(kept, dim=1)
    assert video.dtype == torch.uint8 and video.shape[1] == shape.num_frames, "the source gave what was asked for"
    return channels_first(video)


def _batched(items: Sequence[int], batch: int) -> list[list[int]]:
    return [list(items[i : i + batch]) for i in range(0, len(items), batch)]
