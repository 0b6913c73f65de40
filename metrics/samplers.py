"""Which clips a metric looks at: windows of videos that exist, and clips that a source generates.

The policy is the one published for LongVideoGAN (Brooks et al., NeurIPS 2022, and its code): clips of real videos come
from endless shuffled passes over the videos, a random window each, so every video counts alike whatever its length;
generated clips start at a random frame within one period of the temporal up-sampling, so that its phase averages out.
Item i draws from generators of its own, so what it holds does not depend on batch size, on the number of ranks or on
how many items there are.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from training.data.footage import Footage
from training.data.shards import Clip
from training.random import random_state

Start = int | Sequence[int]
Condition = Callable[[Start, int], Tensor]
Size = tuple[int, int]
READ_THREADS = 4
MAX_GENERATED = 4  # clips generated at a time at most, as published
LONG_CHUNK = 32  # frames of long videos that are read at a time


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


@dataclass(frozen=True)
class Batch:
    """What comes in at a time of one side: clips, or the next frames of long videos."""

    items: list[int]  # ascending numbers of N items
    clips: Mapping[ClipShape, Tensor] = field(default_factory=dict)  # uint8 (N, 3, T, H, W) each
    chunk: np.ndarray | Tensor | None = None  # the next frames of N long videos, uint8 (N, T, H, W, 3)
    is_end: bool = False  # of the long videos


@dataclass(frozen=True)
class Long:
    """Of the first `num_videos` items the whole video is looked at, frames [0, num_frames) of it."""

    num_videos: int = 0
    num_frames: int = 0


@dataclass(frozen=True)
class Conditions:
    """What a super-resolution system alone enlarges: a window of low-resolution footage for each item."""

    footage: Footage
    size: Size
    windows: Sequence[Window]


# ----------------------------------------------------------------------------------------------------------------------
# Choosing from footage.


def shuffled_windows(dataset: Footage, purpose: str, seed: int, num_items: int, span: int) -> list[Window]:
    """The windows of the first items: endless shuffled passes over the clips that are long enough, as published."""
    eligible = dataset.eligible(span)
    visits = range(math.ceil(num_items / len(eligible)))
    orders = [random_state(f"{purpose}-order", seed, visit).permutation(len(eligible)) for visit in visits]
    clips = [eligible[i] for order in orders for i in order][:num_items]
    return [_window_in(dataset, clip, purpose, seed, item, span) for item, clip in enumerate(clips)]


def sorted_windows(
    dataset: Footage, purpose: str, seed: int, num_items: int, span: int, is_at_start: bool
) -> list[Window]:
    """One window of each of the first clips by name: its first frames, or a random one; fewer if there are fewer."""
    clips = sorted(dataset.eligible(span), key=lambda clip: dataset.clips[clip].path)[:num_items]
    if is_at_start:
        return [Window(clip, 0) for clip in clips]
    return [_window_in(dataset, clip, purpose, seed, item, span) for item, clip in enumerate(clips)]


def all_frames(dataset: Footage) -> list[Window]:
    """Every frame of every clip, in order."""
    return [Window(number, frame) for number, clip in enumerate(dataset.clips) for frame in range(clip.num_frames)]


def some_windows(dataset: Footage, purpose: str, seed: int, num_items: int, span: int = 1) -> list[Window]:
    """Different windows at random, of all there are in all clips; fewer if there are fewer."""
    ends = np.cumsum([num_windows(clip, span) for clip in dataset.clips])
    chosen = random_state(f"{purpose}-frames", seed, 0).permutation(ends[-1])[:num_items]
    clips = np.searchsorted(ends, chosen, side="right")
    starts = np.concatenate([[0], ends])
    return [Window(int(clip), int(first - starts[clip])) for clip, first in zip(clips, chosen, strict=True)]


def num_windows(clip: Clip, span: int) -> int:
    """Windows of `span` frames in a clip."""
    return max(clip.num_frames - span + 1, 0)


def num_different(dataset: Footage, span: int) -> int:
    """Windows of `span` frames that there are."""
    return sum(num_windows(clip, span) for clip in dataset.clips)


def _window_in(dataset: Footage, clip: int, purpose: str, seed: int, item: int, span: int) -> Window:
    count = num_windows(dataset.clips[clip], span)
    return Window(clip, int(random_state(f"{purpose}-window", seed, item).randint(count)))


# ----------------------------------------------------------------------------------------------------------------------
# Reading.


def real_clips(
    dataset: Footage, size: Size, shape: ClipShape, items: Sequence[int], seed: int, batch: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Real items in batches: (item numbers, uint8 (N, 3, T, H, W)), decoded ahead in threads."""
    windows = shuffled_windows(dataset, "metric-real", seed, max(items) + 1, shape.span)
    return read_windows(dataset, size, shape, windows, items, batch)


def read_windows(
    dataset: Footage, size: Size, shape: ClipShape, windows: Sequence[Window], items: Sequence[int], batch: int
) -> Iterator[tuple[list[int], Tensor]]:
    """The windows of these items in batches: (item numbers, uint8 (N, 3, T, H, W)), decoded ahead in threads.

    Frames of one clip that follow each other in a batch are read at once.
    """

    def read(part: list[int]) -> np.ndarray:
        clip = windows[part[0]].clip
        if shape.num_frames == 1:
            frames = [windows[item].start for item in part]
            order = np.argsort(frames, kind="stable")
            found = np.empty((len(part), *size, 3), np.uint8)
            found[order] = dataset.read(clip, size, [frames[i] for i in order])
            return found[:, None]
        start = windows[part[0]].start
        return dataset.read(clip, size, range(start, start + shape.span, shape.spacing))[None]

    def submit(numbers: list[int]) -> list[tuple[list[int], Future[np.ndarray]]]:
        parts: dict[int, list[int]] = {}
        for item in numbers:
            parts.setdefault(windows[item].clip if shape.num_frames == 1 else item, []).append(item)
        return [(part, pool.submit(read, part)) for part in parts.values()]

    with ThreadPoolExecutor(READ_THREADS) as pool:
        batches = batched(items, batch)
        ahead = [submit(numbers) for numbers in batches[:2]]
        for position, numbers in enumerate(batches):
            if position + 2 < len(batches):
                ahead.append(submit(batches[position + 2]))
            found = {}
            for part, future in ahead.pop(0):
                found |= zip(part, future.result(), strict=True)
            yield numbers, channels_first(np.stack([found[item] for item in numbers]))


def read_long(
    dataset: Footage, size: Size, num_frames: int, windows: Sequence[Window], items: Sequence[int], batch: int
) -> Iterator[Batch]:
    """The windows of these items, of `num_frames` frames each, in groups of `batch`, chunk by chunk."""
    for numbers in batched(items, batch):
        done = 0
        for chunk in long_chunks(dataset, size, num_frames, [windows[item] for item in numbers]):
            done += chunk.shape[1]
            yield Batch(numbers, chunk=chunk, is_end=done == num_frames)


def long_chunks(dataset: Footage, size: Size, num_frames: int, windows: Sequence[Window]) -> Iterator[np.ndarray]:
    """Successive frames of windows of `num_frames` frames: uint8 (N, T, H, W, 3)."""
    for done in range(0, num_frames, LONG_CHUNK):
        count = min(LONG_CHUNK, num_frames - done)
        firsts = [window.start + done for window in windows]
        yield np.stack([dataset.read(w.clip, size, range(f, f + count)) for w, f in zip(windows, firsts, strict=True)])


# ----------------------------------------------------------------------------------------------------------------------
# Generating.


def generated_batches(
    source: Source,
    needs: Mapping[ClipShape, int],
    items: Sequence[int],
    seed: int,
    batch: int,
    purpose: str = "metric-fake",
    has_phase: bool = True,
    conditions: Conditions | None = None,
    long: Long = Long(),
) -> Iterator[Batch]:
    """Generated items: of each shape in `needs` the first so many, and whole videos of the first ones that `long` asks
    for.

    Each item's video is generated once. Its clips of different shapes begin at the same frame of it; `has_phase` False
    begins all at frame 0. Long videos come in chunks, before the clips that are cut from the same frames. With
    `conditions` the source is a super-resolution system alone; then there is one shape and no long video.
    """
    assert conditions is None or (len(needs) == 1 and not long.num_videos), "a condition has one length"
    bounds = sorted([*needs.values(), long.num_videos])
    for numbers in batched(items, min(batch, MAX_GENERATED), bounds):
        shapes = [shape for shape, num_items in needs.items() if numbers[0] < num_items]
        span = max([shape.span for shape in shapes], default=0)
        seeds = fake_seeds(purpose, seed, numbers)
        starts = [0] * len(numbers)
        if has_phase and shapes and conditions is None:
            starts = [int(random_state(f"{purpose}-start", seed, i).randint(source.temporal_scale)) for i in numbers]
        cuts = {shape: _Cut(shape, starts) for shape in shapes}
        if numbers[0] < long.num_videos:
            stop = max(long.num_frames, max(starts) + span)
            for first, chunk in _counted(source.sample(seeds, 0, stop)):
                for cut in cuts.values():
                    cut.add(chunk, [first] * len(numbers))
                end = min(first + chunk.shape[1], long.num_frames)
                if first < long.num_frames:
                    yield Batch(numbers, chunk=chunk[:, : end - first], is_end=end == long.num_frames)
        else:
            see = conditions and _condition(conditions, source.context, span, numbers)
            for done, chunk in _counted(source.sample(seeds, starts, span, see)):
                for cut in cuts.values():
                    cut.add(chunk, [first + done for first in starts])
        if cuts:
            yield Batch(numbers, {shape: cut.video() for shape, cut in cuts.items()})


def fake_seeds(purpose: str, seed: int, items: Iterable[int]) -> list[int]:
    """The seed of each item's video."""
    return [int(random_state(f"{purpose}-seed", seed, item).randint(2**31)) for item in items]


class _Cut:
    """The frames of one shape's clips, kept as chunks of the videos pass by."""

    def __init__(self, shape: ClipShape, starts: Sequence[int]) -> None:
        self.shape, self.starts = shape, starts
        self.kept: list[list[Tensor]] = [[] for _ in starts]

    def add(self, chunk: Tensor, firsts: Sequence[int]) -> None:
        """uint8 (N, T, H, W, 3), and which frame of its video each begins with."""
        assert chunk.dtype == torch.uint8, "frames are uint8"
        for number, (start, first) in enumerate(zip(self.starts, firsts, strict=True)):
            begin = max(start, start - (start - first) // self.shape.spacing * self.shape.spacing)
            end = min(start + self.shape.span, first + chunk.shape[1])
            if begin < end:
                self.kept[number].append(chunk[number, begin - first : end - first : self.shape.spacing])

    def video(self) -> Tensor:
        """All of them: uint8 (N, 3, T, H, W)."""
        video = torch.stack([torch.cat(frames) for frames in self.kept])
        assert video.shape[1] == self.shape.num_frames, "the source gave what was asked for"
        return channels_first(video)


def _counted(chunks: Iterable[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Each chunk (N, T, ...) with the number of frames before it."""
    first = 0
    for chunk in chunks:
        yield first, chunk
        first += chunk.shape[1]


def channels_first(video: np.ndarray | Tensor) -> Tensor:
    """(N, T, H, W, 3) -> (N, 3, T, H, W)."""
    return torch.as_tensor(video).permute(0, 4, 1, 2, 3)


def batched(items: Sequence[int], batch: int, bounds: Iterable[int] = ()) -> list[list[int]]:
    """Successive batches of ascending items; none has items on both sides of a bound."""
    batches: list[list[int]] = []
    limits = sorted(bounds)
    level = -1
    for item in items:
        above = sum(item >= limit for limit in limits)
        if not batches or len(batches[-1]) == batch or above != level:
            batches.append([])
            level = above
        batches[-1].append(item)
    return batches


def _condition(conditions: Conditions, context: int, span: int, items: Sequence[int]) -> Condition:
    """Frames of the window of each item. Frame 0 is where the generated clip starts, frame -context is the window's
    first: float32 (N, 3, num_frames, h, w) in [-1, 1]."""
    windows = [conditions.windows[item] for item in items]

    def condition(start: Start, num_frames: int) -> Tensor:
        clips = []
        for window, first in zip(windows, [start] * len(windows) if isinstance(start, int) else start, strict=True):
            assert -context <= first <= span + context - num_frames, "a frame outside of the real window"
            first += window.start + context
            clips.append(conditions.footage.read(window.clip, conditions.size, range(first, first + num_frames)))
        return channels_first(np.stack(clips)).float() / 127.5 - 1

    return condition
