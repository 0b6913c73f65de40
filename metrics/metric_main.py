"""The metrics by name: what a name means, and the number it gives for a source of generated video and a dataset.

A family of metrics is one row of `FAMILIES`. Every result carries the protocol it was measured under, the number of
clips on both sides and the identity of the detector, because each of these moves the value.
"""

import difflib
import functools
import itertools
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnnlib.util import format_time
from metrics import cache, samplers
from metrics.detectors import i3d, registry
from metrics.frechet import FeatureStats, frechet_distance_from_features
from metrics.samplers import ClipShape, Source
from torch_utils import distributed
from training.dataset import ClipDataset

FEWEST_COMPARABLE = 256  # below, the bias of a small sample (it falls as 1 / N) outweighs what FVD is to show
REPORT_INTERVAL_SEC = 10.0

Progress = Callable[[str, int, int], None]  # "real" or "generated", clips done, clips in all


@dataclass(frozen=True)
class Metric:
    """What a metric's name says: its family, clips a side, and which frames make a clip."""

    name: str
    family: str
    num_items: int
    shape: ClipShape


@dataclass(frozen=True)
class Subject:
    """What is measured: a source of generated video, and the real clips it is held against."""

    real: ClipDataset
    size: tuple[int, int]
    source: Source
    condition_size: tuple[int, int] | None
    seed: int


@dataclass(frozen=True)
class Work:
    """How it is measured; nothing here changes a value."""

    device: torch.device
    batch: int | None
    replace_cache: bool
    progress: Progress | None


@dataclass(frozen=True)
class Family:
    """A row of the table: how the names are formed and what computes the value."""

    form: str
    pattern: re.Pattern[str]
    published: tuple[str, ...]
    parse: Callable[[re.Match[str]], Metric]
    calc: Callable[[Metric, Subject, Work], dict[str, Any]]


def calc_metric(
    name: str,
    *,
    real: ClipDataset,
    size: tuple[int, int],
    fake_source: Source,
    condition_size: tuple[int, int] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    batch: int | None = None,
    replace_cache: bool = False,
    verbose: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure `fake_source` against the clips of `real` at `size`, (height, width).

    `condition_size` is for a super-resolution system alone: real clips of that size, also opened in `real`, condition
    it. Beyond rounding, the value does not depend on `batch` (clips at a time), the number of ranks or the cache;
    `seed` chooses the clips of both sides. `verbose` prints progress on rank 0, `progress` is told of it on every rank.

    Returns a dict that JSON can hold: `results` {name: value}, `metric`, `num_real`, `num_fake`, `protocol`,
    `detector`, `dataset`, `seed`, `versions`, `total_time`, `total_time_str`, `world_size`, and `warning` if there is
    reason for one. Raises `ValueError` for an unknown name, absent weights, or clips that are too short.
    """
    metric = parse(name)
    start_time = time.monotonic()
    subject = Subject(real, size, fake_source, condition_size, seed)
    work = Work(torch.device(device), batch, replace_cache, progress or (_printer(metric) if verbose else None))
    found = FAMILIES[metric.family].calc(metric, subject, work)
    total_time = time.monotonic() - start_time
    return {
        "results": found.pop("results"),
        "metric": name,
        "total_time": total_time,
        "total_time_str": format_time(total_time),
        "world_size": distributed.get_world_size(),
        **found,
        "seed": seed,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }


def list_valid_metrics() -> list[str]:
    """The names in published use; each family takes other numbers too."""
    return [name for family in FAMILIES.values() for name in family.published]


def parse(name: str) -> Metric:
    """The meaning of a metric's name; `ValueError` with the nearest names and the patterns if it has none."""
    for family in FAMILIES.values():
        match = family.pattern.fullmatch(name)
        if match:
            return family.parse(match)
    near = difflib.get_close_matches(name, list_valid_metrics(), n=3, cutoff=0.4)
    guess = f"; did you mean {' or '.join(near)}?" if near else "."
    forms = ", ".join(family.form for family in FAMILIES.values())
    raise ValueError(f"Unknown metric {name!r}{guess} Valid names have the form {forms}")


def fvd_between(
    clips_a: np.ndarray | Tensor | Iterable[np.ndarray | Tensor],
    clips_b: np.ndarray | Tensor | Iterable[np.ndarray | Tensor],
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """FVD between two sets of clips, each an array uint8 (N, T, H, W, 3) or anything that yields uint8 (T, H, W, 3).

    Returns `fvd`, `num_a`, `num_b`, `detector`, and `warning` where either side has fewer than 256 clips.
    """
    detector = _detector(str(device))
    sides = [torch.cat([detector.net.features(x) for x in _stacked(clips)]).cpu() for clips in (clips_a, clips_b)]
    result = {
        "fvd": frechet_distance_from_features(*sides),
        "num_a": len(sides[0]),
        "num_b": len(sides[1]),
        "detector": detector.identity,
    }
    return result | _small_sample_warning("FVD", min(len(side) for side in sides))


# ----------------------------------------------------------------------------------------------------------------------
# FVD


def _parse_fvd(match: re.Match[str]) -> Metric:
    num_items, num_frames, spacing = (int(group or 1) for group in match.groups())
    name = match.group()
    if num_items == 0 or spacing == 0 or num_frames % spacing:
        raise ValueError(f"{name} needs at least one clip, and a number of frames that is a multiple of the spacing")
    if num_frames // spacing < i3d.MIN_FRAMES:
        raise ValueError(f"{name} has {num_frames // spacing} frames a clip; I3D needs at least {i3d.MIN_FRAMES}")
    return Metric(name, "fvd", num_items, ClipShape(num_frames // spacing, spacing))


def _calc_fvd(metric: Metric, subject: Subject, work: Work) -> dict[str, Any]:
    detector = _detector(str(work.device))
    dataset = distributed.broadcast_object(cache.dataset_id(subject.real.path, subject.size))
    real_protocol = {
        "policy_real": samplers.POLICY_REAL,
        "num_frames": metric.shape.num_frames,
        "frame_spacing": metric.shape.spacing,
        "height": subject.size[0],
        "width": subject.size[1],
        "resize": "stretched to 224x224, bilinear, half-pixel centres, no antialiasing",
        "quantisation": "uint8",
    }
    description = {
        "detector": {key: detector.identity[key] for key in ("name", "sha256")},
        "dataset": dataset,
        "num_clips": metric.num_items,
        "seed": subject.seed,
        **real_protocol,
    }
    real = _real_features(metric, subject, work, detector, description)
    fake = _features(_generated_clips(metric, subject, work, detector), "generated", metric, work, detector)
    policy_fake = samplers.POLICY_CONDITIONED if subject.condition_size else samplers.POLICY_FAKE
    return {
        "results": {metric.name: frechet_distance_from_features(real, fake)},
        "num_real": len(real),
        "num_fake": len(fake),
        "protocol": {**real_protocol, "policy_fake": policy_fake, "covariance": "population (divided by N)"},
        "detector": detector.identity,
        "dataset": {"name": subject.real.name, "id": dataset},
        **_small_sample_warning(metric.name, metric.num_items),
    }


def _real_features(
    metric: Metric, subject: Subject, work: Work, detector: "_Detector", description: dict[str, Any]
) -> Tensor:
    """From the cache if rank 0 finds them there, else computed by all ranks and stored by rank 0: float64 (N, d)."""
    stored = None
    if distributed.is_main() and not work.replace_cache:
        stored = cache.load(description)
    stored = distributed.broadcast_object(stored)
    if stored is not None:
        return torch.from_numpy(stored).double()
    batch = work.batch or i3d.batch_size(metric.shape.num_frames)
    clips = samplers.real_clips(subject.real, subject.size, metric.shape, _own_items(metric), subject.seed, batch)
    features = _features(clips, "real", metric, work, detector)
    if distributed.is_main():
        cache.save(description, features.numpy())
    return features


def _generated_clips(
    metric: Metric, subject: Subject, work: Work, detector: "_Detector"
) -> Iterator[tuple[list[int], Tensor]]:
    batch = work.batch or i3d.batch_size(metric.shape.num_frames)
    generated = samplers.generated_clips(
        subject.source, metric.shape, _own_items(metric), subject.seed, batch, subject.real, subject.condition_size
    )
    for items, clips in generated:
        found = tuple(clips.shape[3:])
        if found != subject.size:
            raise ValueError(f"The source generates frames of {found}, but the real ones are {subject.size}")
        yield items, clips


def _features(
    batches: Iterator[tuple[list[int], Tensor]], side: str, metric: Metric, work: Work, detector: "_Detector"
) -> Tensor:
    """Features of one side in order of item number, complete on every rank: float64 (N, d)."""
    stats = FeatureStats(i3d.NUM_FEATURES, num_items=metric.num_items)
    for items, clips in batches:
        stats.append(detector.net.features(clips), items)
        if work.progress:
            num_done = min(items[-1] + distributed.get_world_size(), metric.num_items)
            work.progress(side, num_done, metric.num_items)
    stats.reduce(work.device if work.device.type == "cuda" else "cpu")
    return stats.features


# ----------------------------------------------------------------------------------------------------------------------
# Shared


@dataclass(frozen=True)
class _Detector:
    net: i3d.I3D
    identity: dict[str, str]


@functools.cache
def _detector(device: str) -> _Detector:
    net = i3d.load(device)
    proof = i3d.fingerprint(net)
    return _Detector(net, {"name": i3d.NAME, "sha256": registry.FILES[i3d.NAME].sha256, "weights": proof})


def _own_items(metric: Metric) -> range:
    return range(distributed.get_rank(), metric.num_items, distributed.get_world_size())


def _stacked(clips: np.ndarray | Tensor | Iterable[np.ndarray | Tensor]) -> Iterator[Tensor]:
    iterator = iter(clips)
    for first in iterator:
        group = [first, *itertools.islice(iterator, i3d.batch_size(len(first)) - 1)]
        yield samplers.channels_first(torch.stack([torch.as_tensor(clip) for clip in group]))


def _small_sample_warning(name: str, num_items: int) -> dict[str, str]:
    if num_items >= FEWEST_COMPARABLE:
        return {}
    warning = (
        f"{name} was measured on {num_items} clips; below {FEWEST_COMPARABLE} the size of the sample decides the value "
        "more than the quality of the video, so compare it only with values of the same number of clips"
    )
    distributed.print0(f"Warning: {warning}.")
    return {"warning": warning}


def _printer(metric: Metric) -> Progress:
    """Prints progress, at most once in ten seconds a side, and when a side is complete."""
    last: dict[str, float] = {}

    def report(side: str, num_done: int, num_items: int) -> None:
        now = time.monotonic()
        if num_done == num_items or now - last.setdefault(side, now) >= REPORT_INTERVAL_SEC:
            last[side] = now
            distributed.print0(f"{metric.name}: {num_done} of {num_items} {side} clips")

    return report


FAMILIES = {
    "fvd": Family(
        form="fvd<clips>_<frames>f or fvd<clips>_<frames>f_subsample<S>f, as fvd2048_16f",
        pattern=re.compile(r"fvd(\d+)_(\d+)f(?:_subsample(\d+)f)?"),
        published=("fvd2048_16f", "fvd2048_128f", "fvd2048_128f_subsample8f"),
        parse=_parse_fvd,
        calc=_calc_fvd,
    ),
}
