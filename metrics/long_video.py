"""Measures that a clip of 16 frames cannot show: changes over time, drift, repetition, seams, memory and control.

    from metrics import long_video

    real = long_video.real_videos(dataset, (36, 64), num_videos=256, num_frames=300)
    fake = long_video.generated_videos(sampler, num_videos=256, num_frames=300)
    results = long_video.measure(["color_similarity", "loop_rate"], real, fake)

Either side is any iterable of groups of videos, each an iterable of chunks in time, uint8 (N, T, H, W, 3); an array of
whole videos is `[[array]]`. A pass holds one chunk and a few numbers for each frame, so memory does not grow with the
length, except for those of memory, which keep frames; they and those of actions need `metrics.metric_main`, which reads
streams. Every result describes how it was measured and has standard errors over videos; `metrics.report` draws it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from metrics import (
    action_following,
    long_video_base,
    long_video_features,
    long_video_loops,
    long_video_pixels,
    revisits,
    samplers,
    there_and_back,
    turning,
)
from metrics.long_video_base import DEFAULTS, Chunk, ProbeOptions, VideoGroups
from metrics.samplers import Footage
from training.contract import Size
from training.sampling import Request, Sampler

MEASURES = {
    measure.name: measure
    for part in (
        long_video_pixels,
        long_video_loops,
        long_video_features,
        there_and_back,
        revisits,
        turning,
        action_following,
    )  # fmt: skip
    for measure in part.MEASURES
}


def measure(
    names: Sequence[str], real: VideoGroups, fake: VideoGroups, options: ProbeOptions = DEFAULTS
) -> dict[str, Any]:
    """Return the results of several of `MEASURES` from one pass over either side: {name: result}.

    A result can be written as JSON. It holds `results`, `errors` (standard errors over videos) and `floors` (the value
    of two halves of the real videos, or that which real videos reach by chance) by name, further `facts` such as a
    period, `curves` to draw, `num_real`, `num_fake` and `protocol`. Raises `ValueError` for unknown names and for
    videos that do not fit.
    """
    unknown = [name for name in names if name not in MEASURES]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not a measure of long videos: take one of {', '.join(MEASURES)}")
    return long_video_base.compare_sides([MEASURES[name] for name in names], real, fake, options)


def real_videos(
    footage: Footage, size: Size, num_videos: int, num_frames: int, seed: int = 0, batch: int = 4
) -> Iterator[Iterator[Chunk]]:
    """Yield random windows of `num_frames` frames of footage, every video alike whatever its length."""
    windows = samplers.shuffled_windows(footage, "long-real", seed, num_videos, num_frames)
    for first in range(0, num_videos, batch):
        yield samplers.long_chunks(footage, size, num_frames, windows[first : first + batch])


def generated_videos(
    sampler: Sampler, num_videos: int, num_frames: int, seed: int = 0, batch: int = 4
) -> Iterator[Iterator[Chunk]]:
    """Yield frames [0, num_frames) of videos that a sampler makes without a prompt."""
    for first in range(0, num_videos, batch):
        items = range(first, min(first + batch, num_videos))
        yield sampler.video(Request(samplers.fake_seeds("metric-fake", seed, items), 0, num_frames))
