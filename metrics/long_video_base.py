"""Base of the measures of long videos: options, probes of each side, and errors by leaving videos out."""

import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metrics import checks
from metrics.detectors import registry
from metrics.jackknife import NUM_GROUPS, group_videos
from metrics.samplers import ItemBatch
from torch_utils import distributed

Chunk = np.ndarray | Tensor  # uint8 (N, T, H, W, 3): the next T frames of N videos
VideoGroups = Iterable[Iterable[Chunk]]  # groups of videos, each as successive chunks in time


@dataclass(frozen=True)
class ProbeOptions:
    """How videos are measured.

    `detector` replaces a measure's own feature network: an object with `features`, which takes uint8 images
    (N, 3, H, W), or clips (N, 3, T, H, W) for drift, and with a dict `identity`.
    """

    device: torch.device | str = "cpu"
    detector: Any = None
    detector_paths: Mapping[str, str] = field(default_factory=dict)  # files of weights by the name of the detector
    window: int = 16  # frames of a clip, for drift and motion energy
    stride: int = 8  # frames between the clips of a generated video, for drift
    is_unbiased: bool = False  # covariances are divided by N - 1, else by N
    lags: tuple[int, ...] = ()  # frame separations for feature similarity; () for 1, 2, 5, 10, 20, 50, ...

    def open(self, name: str) -> Any:
        """Return the detector of a measure whose own one is called `name`."""
        return self.detector or registry.open_detector(name, self.device, self.detector_paths.get(name))


DEFAULTS = ProbeOptions()


@dataclass(frozen=True)
class GroupStreams:
    """Values of streams for the frames of a group of videos.

    `values` are int (N, T) or float (N, T, V) by name; entry t is that of frame t. `vocabularies` name the ints.
    """

    items: Sequence[int]  # numbers of the videos
    values: Mapping[str, np.ndarray]
    vocabularies: Mapping[str, Sequence[str]]


ReadStreams = Callable[[Sequence[int]], GroupStreams]


class Probe(typing.Protocol):
    """Measures a group of videos chunk by chunk, and keeps little of them."""

    def add(self, chunk: np.ndarray) -> None:
        """Take the next frames of the group: uint8 (N, T, H, W, 3)."""
        ...

    def finish(self) -> np.ndarray:
        """Return one row for each video: (N, ...)."""
        ...


@typing.runtime_checkable
class StreamProbe(Probe, typing.Protocol):
    """A probe that also needs streams of the videos."""

    def begin(self, streams: GroupStreams) -> None:
        """Take the streams of the group, before its first frames."""
        ...


@dataclass(frozen=True)
class Rows:
    """The values of a probe for the videos of one side."""

    values: np.ndarray  # (N, ...)
    videos: np.ndarray  # (N,): which video of the side's footage each was taken from

    def __len__(self) -> int:
        return len(self.values)

    def of(self, values: np.ndarray) -> "Rows":
        """Return other values of the same videos."""
        return Rows(values, self.videos)

    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the values in two halves that share no video, if there are two."""
        half = group_videos(self.videos, 2) if len(np.unique(self.videos)) > 1 else np.arange(len(self)) % 2
        return self.values[half == 0], self.values[half == 1]


@dataclass(frozen=True)
class Measure:
    """A measure by its name: the probe of each side, and the comparison of both.

    A call measures two sides by it alone; `compare_sides` computes several in one pass.
    """

    name: str
    probe: Callable[[ProbeOptions, str], Probe]  # of the side "real" or "generated"
    compare: Callable[[Rows, Rows, ProbeOptions], dict[str, Any]]  # of the real and of the generated videos
    detector: str | None = None  # its feature network
    needs_real_clips: bool = False  # of existing real videos only clips of `ProbeOptions.window` frames, not long ones
    streams: tuple[str, ...] = ()  # those that its probes take; the generated videos follow their actions
    # Replaces the actions of generated videos: (prompt, numbers of the videos, names of actions, frames) -> prompt.
    steer: Callable[[Any, Sequence[int], Sequence[str], int], Any] | None = None

    def __call__(self, real: VideoGroups, fake: VideoGroups, options: ProbeOptions = DEFAULTS) -> dict[str, Any]:
        return compare_sides([self], real, fake, options)[self.name]


class SideProbes:
    """The probes of some measures on one side, whose videos come in groups, chunk by chunk.

    `read_streams` returns the streams of a group for the probes that need them.
    """

    def __init__(
        self, measures: Sequence[Measure], side: str, options: ProbeOptions, read_streams: ReadStreams | None = None
    ) -> None:
        self.makers = list(dict.fromkeys(measure.probe for measure in measures))  # each once, however many share it
        self.side, self.options, self.read_streams = side, options, read_streams
        self.probes: list[Probe] = []  # of the current group
        self.found: list[dict[int, np.ndarray]] = [{} for _ in self.makers]  # row by number of the video
        self.size = (0, 0)  # height and width of the frames

    def add(self, chunk: Chunk, items: Sequence[int] = ()) -> None:
        """Take the next frames of a group, of the videos of these numbers: uint8 (N, T, H, W, 3)."""
        frames = chunk.cpu().numpy() if isinstance(chunk, Tensor) else chunk
        checks.check_array(frames, f"the {self.side} video")
        assert frames.ndim == 5, f"chunks are (N, T, H, W, 3), not {frames.shape}"
        self.size = frames.shape[2:4]
        self.probes = self.probes or self._begin(items)
        for probe in self.probes:
            probe.add(frames)

    def _begin(self, items: Sequence[int]) -> list[Probe]:
        """Return new probes, those that need streams with the streams of the videos of these numbers."""
        probes = [maker(self.options, self.side) for maker in self.makers]
        needing = [probe for probe in probes if isinstance(probe, StreamProbe)]
        if needing and self.read_streams is None:
            raise ValueError(
                f"the {self.side} videos are to be measured by their actions or poses, and have none: measure a "
                "dataset that has them"
            )
        if needing and self.read_streams is not None:
            streams = self.read_streams(items)
            for probe in needing:
                probe.begin(streams)
        return probes

    def end(self, items: Sequence[int]) -> None:
        """End the group, whose videos have these numbers."""
        for found, probe in zip(self.found, self.probes, strict=True):
            found |= zip(items, probe.finish(), strict=True)
        self.probes = []

    def add_batch(self, batch: ItemBatch) -> None:
        """Take the frames of long videos in a batch, if it has any."""
        if batch.chunk is not None:
            self.add(batch.chunk, batch.items)
            if batch.is_end:
                self.end(batch.items)

    def merge(self, videos: Sequence[int], device: torch.device) -> list[Rows]:
        """Return the rows of all ranks' videos, as `rows` does; video 0 is rank 0's."""
        shapes = [found[0].shape for found in self.found] if distributed.is_main() else []
        shapes = distributed.broadcast_object(shapes)
        for found, shape in zip(self.found, shapes, strict=True):
            rows = torch.zeros(len(videos), *shape, dtype=torch.float64)
            with distributed.together():
                self._check_length({shape, *(row.shape for row in found.values())})
                for item, row in found.items():
                    rows[item] = torch.from_numpy(row)
            rows = distributed.all_reduce_sum(rows.to(device)).cpu().numpy()
            found |= enumerate(rows)
        return self.rows(videos)

    def rows(self, videos: Sequence[int] | None = None) -> list[Rows]:
        """Return the rows of each probe. `videos` are the videos of footage they were taken from; None: all differ."""
        num_videos = len(self.found[0])
        if num_videos < 2:
            raise ValueError(
                f"{num_videos} {self.side} videos are to be measured, but errors need at least two: give more"
            )
        for found in self.found:
            self._check_length({row.shape for row in found.values()})
        numbers = np.asarray(range(num_videos) if videos is None else videos)
        return [Rows(np.stack([found[item] for item in range(num_videos)]), numbers) for found in self.found]

    def _check_length(self, shapes: set[tuple[int, ...]]) -> None:
        if len(shapes) > 1:
            raise ValueError(f"the {self.side} videos differ in length: cut all to the same number of frames")


def compare_sides(
    measures: Sequence[Measure], real: VideoGroups, fake: VideoGroups, options: ProbeOptions = DEFAULTS
) -> dict[str, dict[str, Any]]:
    """Return the results of all measures by name, from one pass over either side, in this process."""
    sides = [SideProbes(measures, "real", options), SideProbes(measures, "generated", options)]
    for videos, probes in zip((real, fake), sides, strict=True):
        for group in videos:
            num_videos = 0
            for chunk in group:
                probes.add(chunk)
                num_videos = len(chunk)
            first = len(probes.found[0])
            if num_videos:
                probes.end(range(first, first + num_videos))
    rows = [probes.rows() for probes in sides]
    checks.check_sizes(sides[0].size, sides[1].size, "the real videos", "the generated ones")
    return compare_rows(measures, rows[0], rows[1], options)


def compare_rows(
    measures: Sequence[Measure], real: Sequence[Rows], fake: Sequence[Rows], options: ProbeOptions
) -> dict[str, dict[str, Any]]:
    """Return the result of each measure by name, from the rows of both sides' probes."""
    makers = list(dict.fromkeys(measure.probe for measure in measures))
    results = {}
    for item in measures:
        rows = [side[makers.index(item.probe)] for side in (real, fake)]
        counts = {"num_real": len(rows[0]), "num_fake": len(rows[1])}
        results[item.name] = {"metric": item.name, **item.compare(rows[0], rows[1], options), **counts}
    return results


def check_same_length(real: np.ndarray, fake: np.ndarray, name: str) -> None:
    """Raise ValueError unless rows of both sides, (N, T) and (M, T), cover the same time."""
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"{name} compares videos of one length, but the real ones have {real.shape[1]} and the generated ones "
            f"{fake.shape[1]} frames: cut both to {min(real.shape[1], fake.shape[1])}"
        )


def curve_gap(real: np.ndarray, fake: np.ndarray) -> float:
    """Return the mean absolute difference of the mean curves of rows (N, K) and (M, K)."""
    return float(np.abs(real.mean(axis=0) - fake.mean(axis=0)).mean())


def jackknife_error(statistic: Callable[[np.ndarray, np.ndarray], Any], real: Rows, fake: Rows) -> Any:
    """Return the standard error of `statistic(real values, generated values)`, a number or a list of them.

    The sides are independent, so their variances add.
    """
    variances = jackknife_variance(lambda values: statistic(values, fake.values), real)
    return np.sqrt(variances + jackknife_variance(lambda values: statistic(real.values, values), fake))


def jackknife_variance(statistic: Callable[[np.ndarray], Any], rows: Rows) -> Any:
    """Return the variance of `statistic(values)` by the delete-a-group jackknife (Kott 2001), of at most 16 groups of
    videos. Rows of a single video are taken for independent."""
    num_videos = len(np.unique(rows.videos))
    videos = rows.videos if num_videos > 1 else np.arange(len(rows))
    num_groups = min(NUM_GROUPS, len(np.unique(videos)))
    group = group_videos(videos, num_groups)
    values = np.array([statistic(rows.values[group != number]) for number in range(num_groups)])
    return (num_groups - 1) * values.var(axis=0)


def slope_per_100(frames: np.ndarray, values: np.ndarray) -> float:
    """Return the least-squares slope of `values` over `frames`, in units per 100 frames."""
    centred = frames - frames.mean()
    return float(100 * (centred @ values) / (centred @ centred))


def line(label: str, x: Any, y: Any, band: Any = None) -> dict[str, Any]:
    """Return a line of a chart as JSON holds it; `band` is the half width of the band around it."""
    drawn = {"label": label, "x": _floats(x), "y": _floats(y)}
    return drawn if band is None else {**drawn, "band": _floats(band)}


def chart(title: str, x_name: str, lines: Sequence[dict[str, Any]], **facts: Any) -> dict[str, Any]:
    """Return a chart as JSON holds it; `facts` are `band` (the meaning of the bands), `limits` and `guide` (of the
    vertical axis) and `log_x`."""
    return {"title": title, "x_name": x_name, "lines": list(lines), **facts}


def _floats(values: Any) -> list[float]:
    return np.asarray(values, float).tolist()
