"""Which frames each side gives to which detectors, in as few passes as can be: every clip is made or decoded once.

Items are shared among the ranks; each leaves its features in the row of its item number, so what is computed of them
depends on neither ranks nor batches. Features of footage that exists are cached.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from metrics import cache, extraction, samplers
from metrics.detectors import registry
from metrics.extraction import Features, Piece, Progress, Request, Taker
from metrics.inputs import Videos
from metrics.long_video_base import Measure, Options, Rows, Watch
from metrics.samplers import Batch, ClipShape, Conditions, Long, Source, Window
from torch_utils import distributed

FRAMES_AT_ONCE = 64  # of one pass, unless a batch is asked for
PURPOSES = {"real": "metric-real", "generated": "metric-fake"}

Value = TypeVar("Value")


@dataclass(frozen=True)
class Protocol:
    """One of the ways in circulation to choose clips and to fit Gaussians; they are different metrics."""

    name: str
    windows: str  # "passes" over shuffled videos, or the first videos, "sorted"
    has_phase: bool  # generated clips start anywhere in a temporal scale, else at frame 0
    has_weights: bool  # frames of real footage count 1 / length of their video, else alike
    is_unbiased: bool  # covariances are divided by N - 1, else by N


PROTOCOLS = {
    "lvg": Protocol("lvg", "passes", has_phase=True, has_weights=True, is_unbiased=False),
    "stylegan_v": Protocol("stylegan_v", "sorted", has_phase=False, has_weights=False, is_unbiased=False),
    "tats": Protocol("tats", "passes", has_phase=False, has_weights=False, is_unbiased=True),
}


@dataclass(frozen=True)
class Generated:
    """One side of a comparison that is made on the spot; `condition` is low-resolution footage, for a
    super-resolution system alone."""

    source: Source
    condition: Videos | None = None


Side = Videos | Generated


@dataclass(frozen=True)
class Work:
    """How it is done. Of this only the protocol, the seed and the weights of detectors change values."""

    protocol: Protocol
    seed: int
    device: torch.device
    batch: int | None = None
    replace_cache: bool = False
    progress: Progress | None = None
    detector_paths: Mapping[str, str] = field(default_factory=dict)

    def open(self, detector: str) -> Any:
        return registry.open_detector(detector, self.device, self.detector_paths.get(detector))


@dataclass(frozen=True)
class LongWork:
    """Measures of long videos, which are looked at in the same pass as clips."""

    measures: Sequence[Measure]
    long: Long
    options: Options


@dataclass
class Found:
    """What one side gave."""

    features: dict[Request, Features]
    rows: list[Rows]  # of long videos, of each different probe


def on_main(compute: Callable[[], Value]) -> Value:
    """What rank 0 computes, on every rank; an error there is raised on all."""
    value: Any = None
    with distributed.together():
        if distributed.is_main():
            value = compute()
    return distributed.broadcast_object(value)


def collect(
    requests: Sequence[Request],
    side: Side,
    label: str,
    work: Work,
    whole: Collection[Request] = (),
    long_work: LongWork | None = None,
) -> Found:
    """What one side, `label` "real" or "generated", gives for each request and for long videos.

    A source makes each video once for all of it. Footage is read once for each set of frames. Requests in `whole` have
    their features kept, however many they are.
    """
    requests = list(dict.fromkeys(requests))
    if isinstance(side, Generated) and side.condition is None:
        return _generate(requests, side, label, work, whole, long_work)
    found = Found({}, [])
    for key in dict.fromkeys((request.frames, request.shape) for request in requests):
        group = [request for request in requests if (request.frames, request.shape) == key]
        if isinstance(side, Generated):
            found.features |= _generate(group, side, label, work, whole, None).features
        else:
            found.features |= _read(group, side, label, work, whole)
    if long_work is not None:
        assert isinstance(side, Videos), "a super-resolution system alone makes no long videos"
        found.rows = _read_long(side, label, work, long_work)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# What is generated.


def _generate(
    requests: list[Request],
    side: Generated,
    label: str,
    work: Work,
    whole: Collection[Request],
    long_work: LongWork | None,
) -> Found:
    needs: dict[ClipShape, int] = {}
    for request in requests:
        needs[request.shape] = max(request.num_items, needs.get(request.shape, 0))
    conditions, weights = None, None
    if side.condition is not None:
        (shape,) = needs
        conditions, weights = _conditions(side.condition, side.source, shape, needs[shape], work)
        needs[shape] = len(conditions.windows)
    long = long_work.long if long_work else Long()
    num_items = max(*needs.values(), long.num_videos, 0)
    batches = samplers.generated_batches(
        side.source,
        needs,
        range(distributed.get_rank(), num_items, distributed.get_world_size()),
        work.seed,
        work.batch or max(1, FRAMES_AT_ONCE // max([shape.num_frames for shape in needs], default=1)),
        PURPOSES[label],
        work.protocol.has_phase,
        conditions,
        long,
    )
    pieces = []
    for request in requests:
        count = min(request.num_items, needs[request.shape])
        videos = [window.clip for window in conditions.windows[:count]] if conditions else range(count)
        pieces.append(Piece(request, videos, None if weights is None else weights[:count], request in whole))
    watch = Watch(long_work.measures, label, long_work.options) if long_work else None
    _run(pieces, watch, batches, range(num_items), label, work, long.num_videos)
    if watch is not None:
        watch.merge(long.num_videos, work.device)
    return Found({piece.request: piece.features() for piece in pieces}, watch.rows() if watch else [])


def _conditions(
    condition: Videos, source: Source, shape: ClipShape, num_items: int, work: Work
) -> tuple[Conditions, np.ndarray | None]:
    """The windows that condition each item, and for single frames the weight of each.

    As published, clips are conditioned as real ones are chosen, and single frames on all windows that there are, each
    once, weighted 1 / windows of its clip. The published code took those of the first clips where there are more than
    wanted; here they are random ones.
    """
    footage, span = condition.footage, shape.span + 2 * source.context
    if shape.num_frames > 1:
        windows = samplers.shuffled_windows(footage, "metric-condition", work.seed, num_items, span)
        return Conditions(footage, condition.size, windows), None
    footage.eligible(span)  # refuses footage of shorter clips alone
    windows = samplers.some_windows(footage, "metric-condition", work.seed, num_items, span)
    counts = np.array([samplers.num_windows(clip, span) for clip in footage.clips])
    weights = 1 / counts[[window.clip for window in windows]] if work.protocol.has_weights else None
    return Conditions(footage, condition.size, windows), weights


# ----------------------------------------------------------------------------------------------------------------------
# What exists.


def _read(
    requests: list[Request], side: Videos, label: str, work: Work, whole: Collection[Request]
) -> dict[Request, Features]:
    frames, shape = requests[0].frames, requests[0].shape
    windows = _windows(side, frames, shape, max(request.num_items for request in requests), label, work)
    videos = [window.clip for window in windows]
    weights = None
    if frames == "all" and work.protocol.has_weights:
        lengths = np.array([clip.num_frames for clip in side.footage.clips])
        weights = 1 / lengths[videos]
    pieces = []
    for request in requests:
        count = len(windows) if frames == "all" else min(request.num_items, len(windows))
        pieces.append(Piece(request, videos[:count], weights, request in whole))
    content = on_main(lambda: side.content)
    descriptions = [_describe(piece.request, side, content, label, work) for piece in pieces]
    order = sorted(range(len(pieces)), key=lambda i: str(descriptions[i]))
    with contextlib.ExitStack() as locks:

        def restore() -> list[int]:
            for i in order:
                locks.enter_context(cache.locked(descriptions[i]))
                stored = None if work.replace_cache else cache.load(descriptions[i])
                if stored is not None:
                    pieces[i].restore(stored)
            return [piece.num_done for piece in pieces]

        def store() -> None:
            for piece, description in zip(pieces, descriptions, strict=True):
                if piece in missing:
                    cache.save(description, piece.arrays())

        for piece, num_done in zip(pieces, on_main(restore), strict=True):
            piece.num_done = num_done
        missing = [piece for piece in pieces if piece.num_done < len(piece.videos)]
        if missing:
            first = min(piece.num_done for piece in missing)
            last = max(len(piece.videos) for piece in missing)
            batch = work.batch or max(1, FRAMES_AT_ONCE // shape.num_frames)
            own = _own_blocks(first, last, batch if shape.num_frames == 1 else 1)
            clips = samplers.read_windows(side.footage, side.size, shape, windows, own, batch)
            _run(missing, None, (Batch(n, {shape: c}) for n, c in clips), range(first, last), label, work)
            on_main(store)
    found = {piece.request: piece.features() for piece in pieces}
    for features in found.values():
        features.num_different = samplers.num_different(side.footage, shape.span)
    return found


def _windows(side: Videos, frames: str, shape: ClipShape, num_items: int, label: str, work: Work) -> list[Window]:
    purpose = {"real": "metric-real", "generated": "metric-fake-clip"}[label]
    if frames == "all":
        return samplers.all_frames(side.footage)
    if frames == "some":
        return samplers.some_windows(side.footage, purpose, work.seed, num_items)
    if work.protocol.windows == "sorted":
        at_start = label == "generated"
        return samplers.sorted_windows(side.footage, purpose, work.seed, num_items, shape.span, at_start)
    return samplers.shuffled_windows(side.footage, purpose, work.seed, num_items, shape.span)


def _describe(request: Request, side: Videos, content: str, label: str, work: Work) -> dict[str, Any]:
    identity = work.open(request.detector).identity
    return {
        "content": content,
        "size": list(side.size),
        "frames": request.frames,
        "windows": work.protocol.windows,
        "weights": request.frames == "all" and work.protocol.has_weights,
        "side": label,
        "seed": None if request.frames == "all" else work.seed,
        "num_frames": request.shape.num_frames,
        "frame_spacing": request.shape.spacing,
        "detector": {key: identity[key] for key in ("name", "sha256")},
        "output": request.output,
    }


def _own_blocks(first: int, last: int, block: int) -> list[int]:
    """This rank's items, in blocks that lie together on the disk."""
    world, rank = distributed.get_world_size(), distributed.get_rank()
    return [item for item in range(first, last) if (item - first) // block % world == rank]


def _read_long(side: Videos, label: str, work: Work, long_work: LongWork) -> list[Rows]:
    long = long_work.long
    purpose = {"real": "long-real", "generated": "long-fake"}[label]
    windows = samplers.shuffled_windows(side.footage, purpose, work.seed, long.num_videos, long.num_frames)
    own = range(distributed.get_rank(), long.num_videos, distributed.get_world_size())
    batches = samplers.read_long(
        side.footage, side.size, long.num_frames, windows, own, min(work.batch or samplers.MAX_GENERATED, len(windows))
    )
    watch = Watch(long_work.measures, label, long_work.options)
    _run([], watch, batches, range(long.num_videos), label, work, long.num_videos)
    watch.merge(long.num_videos, work.device)
    return watch.rows([window.clip for window in windows])


# ----------------------------------------------------------------------------------------------------------------------
# The pass.


def _run(
    pieces: Sequence[Piece],
    watch: Watch | None,
    batches: Iterator[Batch],
    items: range,
    label: str,
    work: Work,
    num_long: int = 0,
) -> None:
    """Give each batch to all that want it, and merge what the ranks found in clips. Of all `items`, the first
    `num_long` come with long videos, and are reported by themselves since they take longer."""
    taker = Taker(pieces, {piece.request.detector: work.open(piece.request.detector) for piece in pieces}, work.device)
    phases = {f"long {label}": range(items.start, num_long), label: range(max(items.start, num_long), items.stop)}
    phases = {name: phase for name, phase in phases.items() if len(phase)}
    done = dict.fromkeys(phases, 0)

    def report(name: str, num_done: int) -> None:
        if work.progress and done[name] < num_done:
            done[name] = num_done
            work.progress(name, num_done, len(phases[name]))

    def take(batch: Batch) -> None:
        if batch.chunk is not None and watch is not None:
            watch.add(batch.chunk)
            if batch.is_end:
                watch.end(batch.items)
        taker.take(batch)
        for name, phase in phases.items():
            if batch.items[-1] in phase and (batch.is_end or batch.clips):
                report(name, min(batch.items[-1] - phase.start + distributed.get_world_size(), len(phase)))

    extraction.run(batches, take, work.device)
    for piece in pieces:
        piece.merge(work.device)
    for name, phase in phases.items():
        report(name, len(phase))
