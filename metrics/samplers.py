"""Choose the clips that are compared: windows of existing videos, and clips of the videos that a sampler makes.

The policy is that of "Generating Long Videos of Dynamic Scenes" (Brooks et al., NeurIPS 2022) and its code: clips of
real videos come from endless shuffled passes over the videos, a random window each, so every video counts alike
whatever its length; generated clips start at a random frame within one period of the sampler. Item i draws from
generators of its own, so its frames do not depend on batch size, on the number of ranks or on the number of items.
"""

import math
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from metrics.families import ClipShape
from training.contract import Size
from training.data.footage import Footage
from training.data.shards import Clip
from training.random import random_state
from training.sampling import Prompt, Request, Sampler, starts_of

READ_THREADS = 4
MAX_GENERATED = 4  # clips generated at a time at most, as published, by samplers that gain nothing from more
LONG_CHUNK = 32  # frames of long videos that are read at a time


class Window(typing.NamedTuple):
    """A place in footage: frames from `start` on of video number `clip`."""

    clip: int
    start: int


@dataclass(frozen=True)
class ItemBatch:
    """Items of one side that are processed together: clips, or the next frames of long videos."""

    items: list[int]  # ascending numbers of N items
    clips: Mapping[ClipShape, Tensor] = field(default_factory=dict)  # uint8 (N, 3, T, H, W) each
    originals: Mapping[ClipShape, Tensor] = field(default_factory=dict)  # the real clips that they should equal
    chunk: np.ndarray | Tensor | None = None  # the next frames of N long videos, uint8 (N, T, H, W, 3)
    is_end: bool = False  # of the long videos


# ----------------------------------------------------------------------------
# Choosing from footage.


def shuffled_windows(
    footage: Footage, purpose: str, seed: int, num_items: int, span: int, past: int = 0, is_at_start: bool = False
) -> list[Window]:
    """Return random windows of the first items, in endless shuffled passes over the videos that are long enough.

    A window has `span` frames, of which `past` come before the one that is returned as its start. With `is_at_start`
    it is the first window of a video, and there is one pass only.
    """
    eligible = footage.eligible(span)
    num_items = min(num_items, len(eligible)) if is_at_start else num_items
    visits = range(math.ceil(num_items / len(eligible)))
    orders = [random_state(f"{purpose}-order", seed, visit).permutation(len(eligible)) for visit in visits]
    clips = [eligible[i] for order in orders for i in order][:num_items]
    if is_at_start:
        return [Window(clip, past) for clip in clips]
    return [_window_in(footage, clip, purpose, seed, item, span, past) for item, clip in enumerate(clips)]


def sorted_windows(
    footage: Footage, purpose: str, seed: int, num_items: int, span: int, is_at_start: bool
) -> list[Window]:
    """Return a window of each of the first videos by name: its first frames, or a random one; fewer if there are
    fewer videos."""
    clips = sorted(footage.eligible(span), key=lambda clip: footage.clips[clip].path)[:num_items]
    if is_at_start:
        return [Window(clip, 0) for clip in clips]
    return [_window_in(footage, clip, purpose, seed, item, span) for item, clip in enumerate(clips)]


def partners(windows: Sequence[Window]) -> list[Window]:
    """Return for each window one of the two after it, of another video if there is one; they repeat."""
    after = [[windows[(i + step) % len(windows)] for step in (1, 2)] for i in range(len(windows))]
    return [
        next((other for other in both if other.clip != window.clip), both[0])
        for window, both in zip(windows, after, strict=True)
    ]


def all_frames(footage: Footage) -> list[Window]:
    """Return every frame of every video, in order."""
    return [Window(number, frame) for number, clip in enumerate(footage.clips) for frame in range(clip.num_frames)]


def some_windows(
    footage: Footage, purpose: str, seed: int, num_items: int, span: int = 1, past: int = 0
) -> list[Window]:
    """Return different random windows of all videos, `past` as above; fewer if there are fewer."""
    ends = np.cumsum([num_windows(clip, span) for clip in footage.clips])
    chosen = random_state(f"{purpose}-frames", seed, 0).permutation(ends[-1])[:num_items]
    clips = np.searchsorted(ends, chosen, side="right")
    starts = np.concatenate([[0], ends])
    return [Window(int(clip), int(first - starts[clip]) + past) for clip, first in zip(clips, chosen, strict=True)]


def num_windows(clip: Clip, span: int) -> int:
    """Return the number of windows of `span` frames in a video."""
    return max(clip.num_frames - span + 1, 0)


def num_different(footage: Footage, span: int) -> int:
    """Return the number of windows of `span` frames in all videos."""
    return sum(num_windows(clip, span) for clip in footage.clips)


def _window_in(footage: Footage, clip: int, purpose: str, seed: int, item: int, span: int, past: int = 0) -> Window:
    count = num_windows(footage.clips[clip], span)
    return Window(clip, int(random_state(f"{purpose}-window", seed, item).randint(count)) + past)


# ----------------------------------------------------------------------------
# Reading.


def real_clips(
    footage: Footage, size: Size, shape: ClipShape, items: Sequence[int], seed: int, batch: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield real items in batches: (item numbers, uint8 (N, 3, T, H, W)), decoded ahead in threads."""
    windows = shuffled_windows(footage, "metric-real", seed, max(items) + 1, shape.span)
    return read_windows(footage, size, shape, windows, items, batch)


def read_windows(
    footage: Footage,
    size: Size,
    shape: ClipShape,
    windows: Sequence[Window],
    items: Sequence[int],
    batch: int,
    is_still: bool = False,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the windows of these items in batches: (item numbers, uint8 (N, 3, T, H, W)), decoded ahead in threads.

    Frames of one video that follow each other in a batch are read at once. With `is_still` the last frame before a
    window takes the place of all frames in it.
    """

    def read(part: list[int]) -> np.ndarray:
        clip = windows[part[0]].clip
        if shape.num_frames == 1:
            frames = [windows[item].start - is_still for item in part]
            order = np.argsort(frames, kind="stable")
            found = np.empty((len(part), *size, 3), np.uint8)
            found[order] = footage.read(clip, size, [frames[i] for i in order])
            return found[:, None]
        start = windows[part[0]].start - shape.context
        if not is_still:
            return footage.read(clip, size, range(start, start + shape.span, shape.spacing))[None]
        given = footage.read(clip, size, range(min(start, windows[part[0]].start - 1), start + shape.context))
        still = given[-1:].repeat(shape.num_frames - shape.context, axis=0)
        return np.concatenate([given[: shape.context], still])[None]

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
    footage: Footage, size: Size, num_frames: int, windows: Sequence[Window], items: Sequence[int], batch: int
) -> Iterator[ItemBatch]:
    """Yield the windows of these items, of `num_frames` frames each, in groups of `batch`, chunk by chunk."""
    for numbers in batched(items, batch):
        done = 0
        for chunk in long_chunks(footage, size, num_frames, [windows[item] for item in numbers]):
            done += chunk.shape[1]
            yield ItemBatch(numbers, chunk=chunk, is_end=done == num_frames)


def long_chunks(footage: Footage, size: Size, num_frames: int, windows: Sequence[Window]) -> Iterator[np.ndarray]:
    """Yield successive frames of windows of `num_frames` frames: uint8 (N, T, H, W, 3)."""
    for done in range(0, num_frames, LONG_CHUNK):
        count = min(LONG_CHUNK, num_frames - done)
        firsts = [window.start + done for window in windows]
        yield np.stack([footage.read(w.clip, size, range(f, f + count)) for w, f in zip(windows, firsts, strict=True)])


# ----------------------------------------------------------------------------
# Generating.


def generated_batches(
    sampler: Sampler,
    counts: Mapping[ClipShape, int],
    items: Sequence[int],
    seed: int,
    batch: int,
    purpose: str = "metric-fake",
    has_phase: bool = True,
    make_prompt: Callable[[Sequence[int]], Prompt] | None = None,
    long: tuple[int, int] = (0, 0),
    read_real: Callable[[Sequence[int], int, int], Tensor] | None = None,
    paired: Collection[ClipShape] = (),
) -> Iterator[ItemBatch]:
    """Yield generated items: `counts` clips of each shape, and the first `long[0]` videos of `long[1]` frames.

    Each item's video is generated once. Its clips of different shapes begin at the same frame of it: a random one of
    the sampler's period with `has_phase`, else frame 0. Long videos come in chunks, before the clips that are cut from
    the same frames. `make_prompt(items)` returns the prompt of these items, which all begin at frame 0;
    `read_real(items, first, count)` returns frames [first, first + count) of their real videos, uint8 (N, 3, T, H, W):
    the context of clips, and the originals of those whose shape is in `paired`.
    """
    num_long, long_frames = long
    most = min(batch, sampler.good_batch or MAX_GENERATED, sampler.max_batch or batch)
    for numbers in batched(items, most, [*counts.values(), num_long]):
        shapes = [shape for shape, num_items in counts.items() if numbers[0] < num_items]
        span = max([shape.new_span for shape in shapes], default=0)
        starts = [0] * len(numbers)
        if has_phase and shapes and make_prompt is None:
            starts = [int(random_state(f"{purpose}-start", seed, i).randint(sampler.period)) for i in numbers]
        is_long = numbers[0] < num_long
        first = starts if sampler.random_access and not is_long else 0
        stop = span if first is starts else max(long_frames * is_long, max(starts) + span)
        prompt = make_prompt(numbers) if make_prompt else Prompt()
        cuts = {shape: _Cut(shape, starts) for shape in shapes}
        done = 0
        for chunk in sampler.video(Request(fake_seeds(purpose, seed, numbers), first, stop, prompt)):
            for cut in cuts.values():
                cut.add(chunk, [begin + done for begin in starts_of(first, len(numbers))])
            if is_long and done < long_frames:
                part = chunk[:, : long_frames - done]
                yield ItemBatch(numbers, chunk=part, is_end=done + part.shape[1] == long_frames)
            done += chunk.shape[1]
        if cuts:
            clips = {shape: cut.video() for shape, cut in cuts.items()}
            for shape in [shape for shape in shapes if shape.context]:
                assert read_real is not None, "context frames are those of prompts"
                context = read_real(numbers, -shape.context, shape.context).to(clips[shape].device)
                clips[shape] = torch.cat([context, clips[shape]], dim=2)
            originals = {shape: read_real(numbers, 0, shape.span) for shape in shapes if read_real and shape in paired}
            yield ItemBatch(numbers, clips, originals)


def fake_seeds(purpose: str, seed: int, items: Iterable[int]) -> list[int]:
    """Return the seed of each item's video."""
    return [int(random_state(f"{purpose}-seed", seed, item).randint(2**31)) for item in items]


class _Cut:
    """Collect the frames of one shape's clips from successive chunks of the videos."""

    def __init__(self, shape: ClipShape, starts: Sequence[int]) -> None:
        self.shape, self.starts = shape, starts
        self.kept: list[list[Tensor]] = [[] for _ in starts]

    def add(self, chunk: Tensor, firsts: Sequence[int]) -> None:
        """Take a chunk, uint8 (N, T, H, W, 3), which begins with frame `firsts[i]` of video i."""
        assert chunk.dtype == torch.uint8, "frames are uint8"
        for number, (start, first) in enumerate(zip(self.starts, firsts, strict=True)):
            begin = max(start, start - (start - first) // self.shape.spacing * self.shape.spacing)
            end = min(start + self.shape.new_span, first + chunk.shape[1])
            if begin < end:
                self.kept[number].append(chunk[number, begin - first : end - first : self.shape.spacing])

    def video(self) -> Tensor:
        """Return the generated frames of the clips: uint8 (N, 3, T, H, W)."""
        video = torch.stack([torch.cat(frames) for frames in self.kept])
        wanted = self.shape.num_frames - self.shape.context
        assert video.shape[1] == wanted, f"the sampler made {video.shape[1]} of {wanted} frames"
        return channels_first(video)


def channels_first(video: np.ndarray | Tensor) -> Tensor:
    """Return (N, T, H, W, 3) as (N, 3, T, H, W)."""
    return torch.as_tensor(video).permute(0, 4, 1, 2, 3)


def batched(items: Sequence[int], batch: int, bounds: Iterable[int] = ()) -> list[list[int]]:
    """Return successive batches of ascending items; none has items on both sides of a bound."""
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
