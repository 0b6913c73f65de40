"""Measures that a clip of 16 frames cannot show: does a long video change, drift, repeat itself, or show its seams?

    from metrics import long_video

    real = long_video.real_videos(dataset, (36, 64), num_videos=256, num_frames=300)
    fake = long_video.generated_videos(source, num_videos=256, num_frames=300)
    results = long_video.measure(["color_similarity", "loop_rate"], real, fake)

Either side is any iterable of groups of videos, each an iterable of chunks in time, uint8 (N, T, H, W, 3); an array of
whole videos is `[[array]]`. A pass holds one chunk and a few numbers a frame, so length costs no memory. Every result
says how it was measured and carries standard errors over videos; `metrics.report` draws it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from metrics import long_video_base, long_video_features, long_video_loops, long_video_pixels, samplers
from metrics.long_video_base import DEFAULTS, Chunk, Options, Videos
from metrics.samplers import Footage, Source

MEASURES = {
    measure.name: measure
    for measure in (*long_video_pixels.MEASURES, *long_video_loops.MEASURES, *long_video_features.MEASURES)
}


def measure(names: Sequence[str], real: Videos, fake: Videos, options: Options = DEFAULTS) -> dict[str, Any]:
    """The results of several of `MEASURES` in one pass through either side: {name: result}.

    A result can be written as JSON. It holds `results`, `errors` (standard errors over videos) and `floors` (what two
    halves of the real videos give, or what real videos reach by chance) by name, further `facts` such as a period,
    `curves` to draw, `num_real`, `num_fake` and `protocol`. Raises `ValueError` for unknown names and for videos that
    do not fit.
    """
    unknown = [name for name in names if name not in MEASURES]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not a measure of long videos: take one of {', '.join(MEASURES)}")
    return long_video_base.compare_sides([MEASURES[name] for name in names], real, fake, options)


def real_videos(
    footage: Footage, size: tuple[int, int], num_videos: int, num_frames: int, seed: int = 0, batch: int = 4
) -> Iterator[Iterator[Chunk]]:
    """Random windows of `num_frames` frames of a dataset or of files, every video alike whatever its length."""
    windows = samplers.shuffled_windows(footage, "long-real", seed, num_videos, num_frames)
    for first in range(0, num_videos, batch):
        yield samplers.long_chunks(footage, size, num_frames, windows[first : first + batch])


def generated_videos(
    source: Source, num_videos: int, num_frames: int, seed: int = 0, batch: int = 4
) -> Iterator[Iterator[Chunk]]:
    """The first `num_frames` frames of videos that a source makes, all from frame 0, so that seams coincide."""
    for first in range(0, num_videos, batch):
        items = range(first, min(first + batch, num_videos))
        yield source.sample(samplers.fake_seeds("metric-fake", seed, items), 0, num_frames)
