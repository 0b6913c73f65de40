"""The metrics by name, for any two sides: networks, datasets, folders of videos, arrays.

    from metrics import inputs, metric_main

    real, fake = inputs.open_videos("datasets/mine"), inputs.open_videos("outputs/samples")
    for result in metric_main.calc_metrics(["fvd2048_16f", "kvd2048_16f"], real, fake):
        print(result["results"], result["errors"], result["floors"])

Every result carries the protocol it was measured under, the number of clips on both sides and the identity of the
detector, because each of these moves the value.
"""

import itertools
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnnlib.util import format_time
from metrics import checks, estimators, families, inception_score, jackknife, long_video, plan, samplers
from metrics.detectors import i3d, registry
from metrics.estimators import ESTIMATORS, NEIGHBOURS
from metrics.extraction import Features, Progress, Request
from metrics.families import Metric, list_valid_metrics, parse
from metrics.frechet import frechet_distance_from_features
from metrics.inputs import Videos
from metrics.long_video_base import Options, compare_rows
from metrics.plan import PROTOCOLS, Found, Generated, LongWork, Protocol, Side, Work
from metrics.samplers import Long, Size, Source
from torch_utils import distributed

__all__ = ["calc_metrics", "fvd_between", "list_valid_metrics", "parse"]

REPORT_INTERVAL_SEC = 10.0
NEED_WHOLE = ("kernel", "score", "manifold")  # estimators that need the features themselves, not only their sums


def calc_metrics(
    names: Sequence[str],
    real: Side,
    fake: Side,
    *,
    protocol: str = "lvg",
    seed: int = 0,
    device: torch.device | str = "cpu",
    batch: int | None = None,
    num_videos: int = 256,
    num_frames: int = 300,
    replace_cache: bool = False,
    verbose: bool = False,
    progress: Progress | None = None,
    detector_paths: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Measure one side against another by several metrics, in one pass over each side.

    Beyond rounding, values depend neither on `batch` (clips at a time), nor on the number of ranks, nor on the cache,
    nor on which other metrics are asked for; `seed` chooses the clips of both sides. The measures of long videos of
    `metrics.long_video` look at `num_videos` videos of `num_frames` frames a side. `verbose` prints progress on rank
    0, `progress` is told of it on every rank. `detector_paths` gives files of weights by the name of the detector.

    Returns for each name a dict that JSON can hold: `results` {name: value, name_jk: value without the bias of a finite
    sample}, `errors` {name: standard error over videos}, `floors` {name: what two halves of the real videos give},
    `metric`, `num_real`, `num_fake`, `protocol`, `detector`, `real`, `fake`, `seed`, `versions`, `total_time`,
    `total_time_str`, `world_size`, and `warnings`, if there is reason for one. Raises `ValueError` on every rank for an
    unknown name, absent weights, clips that are too short, or sides that do not fit.
    """
    metrics = [parse(name, long_video.MEASURES) for name in names if name not in long_video.MEASURES]
    measures = [long_video.MEASURES[name] for name in names if name in long_video.MEASURES]
    start_time = time.monotonic()
    report = progress or (_Printer() if verbose else None)
    rules = PROTOCOLS[protocol]
    work = Work(rules, seed, torch.device(device), batch, replace_cache, report, detector_paths or {})
    options = Options(device=work.device, detector_paths=work.detector_paths)
    long_work = LongWork(measures, Long(num_videos, num_frames), options) if measures else None
    used = [metric.family.detector for metric in metrics] + [item.detector for item in measures if item.detector]
    wanted = {label: {m: _request(m, side, label) for m in metrics} for label, side in _sides(real, fake)}
    with distributed.together():  # what cannot be done is said before anything is computed
        for detector in dict.fromkeys(used):
            work.open(detector)
        _check_sides(real, fake, long_work)
        for label, side in _sides(real, fake):
            lengths = [request.shape.span for request in wanted[label].values() if request]
            if isinstance(side, Videos):
                side.footage.eligible(max([*lengths, num_frames if measures else 0]))
    found = {}
    for label, side in _sides(real, fake):
        requests = [request for request in wanted[label].values() if request is not None]
        whole = {request for m, request in wanted[label].items() if request and m.family.estimator in NEED_WHOLE}
        found[label] = plan.collect(requests, side, label, work, whole, long_work)

    def features(label: str, metric: Metric) -> Features | None:
        request = wanted[label][metric]
        return None if request is None else found[label].features[request]

    def results() -> dict[str, dict[str, Any]]:
        by_name = _long_results(real, fake, found, long_work, work) if long_work else {}
        for metric in metrics:
            ours = features("generated", metric)
            assert ours is not None, "every metric looks at generated clips"
            by_name[metric.name] = _result(metric, real, fake, features("real", metric), ours, work)
        return by_name

    by_name = plan.on_main(results)
    total_time = time.monotonic() - start_time
    shared = {
        "seed": seed,
        "total_time": total_time,
        "total_time_str": format_time(total_time),
        "world_size": distributed.get_world_size(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
    return [{**by_name[name], **shared} for name in names]


def fvd_between(
    clips_a: np.ndarray | Tensor | Iterable[np.ndarray | Tensor],
    clips_b: np.ndarray | Tensor | Iterable[np.ndarray | Tensor],
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """FVD between two sets of whole clips, each an array uint8 (N, T, H, W, 3) or anything that yields (T, H, W, 3).

    Returns `fvd`, `num_a`, `num_b`, `detector`, and `warning` where either side has fewer than 256 clips.
    """
    detector = registry.open_detector(families.I3D, device)
    sides = [torch.cat([detector.features(x) for x in _stacked(clips)]).cpu() for clips in (clips_a, clips_b)]
    result = {
        "fvd": frechet_distance_from_features(sides[0], sides[1]),
        "num_a": len(sides[0]),
        "num_b": len(sides[1]),
        "detector": detector.identity,
    }
    warning = checks.size_warning("FVD", len(sides[0]), len(sides[1]))
    return result | ({"warning": warning} if warning else {})


# ----------------------------------------------------------------------------------------------------------------------
# Sides.


def _sides(real: Side, fake: Side) -> list[tuple[str, Side]]:
    return [("real", real), ("generated", fake)]


def _check_sides(real: Side, fake: Side, long_work: LongWork | None) -> None:
    sizes = [side.size if isinstance(side, Videos) else _source_size(side.source) for side in (real, fake)]
    names = _name(real, "real"), _name(fake, "generated")
    if sizes[0] and sizes[1]:
        checks.check_sizes(sizes[0], sizes[1], *names)
    rates = [side.footage.fps if isinstance(side, Videos) else None for side in (real, fake)]
    checks.check_same_rate(rates[0], rates[1], *names)
    if long_work and any(isinstance(side, Generated) and side.condition for side in (real, fake)):
        raise ValueError(
            f"{long_work.measures[0].name} looks at long videos, which a super-resolution network alone does not "
            "make: give --lres too"
        )


def _source_size(source: Source) -> Size | None:
    """What a source says of itself, if it does."""
    height, width = getattr(source, "height", None), getattr(source, "width", None)
    return (height, width) if height and width else None


def _name(side: Side, label: str) -> str:
    return side.footage.name if isinstance(side, Videos) else f"the network of the {label} side"


def _request(metric: Metric, side: Side, label: str) -> Request | None:
    family = metric.family
    frames, num_items = (family.real if label == "real" else "clips"), metric.num_items
    if frames == "none":
        return None
    if isinstance(side, Generated):
        frames = "clips"
    elif frames in ("all", "some"):
        most = family.most_real if frames == "all" else num_items
        is_all = not most or samplers.num_different(side.footage, 1) <= most
        frames, num_items = ("all", 0) if is_all else ("some", most)
    return Request(frames, metric.shape, num_items, family.detector, family.output)


# ----------------------------------------------------------------------------------------------------------------------
# Results.


def _result(
    metric: Metric, real: Side, fake: Side, real_features: Features | None, fake_features: Features, work: Work
) -> dict[str, Any]:
    results, errors, floors = {}, {}, {}
    for name, (value, left_out, floor) in ESTIMATORS[metric.family.estimator](
        metric, real_features, fake_features, work
    ).items():
        results[name] = value
        if left_out:
            results[f"{name}_jk"], errors[name] = jackknife.summarize(value, left_out)
        if floor is not None:
            floors[name] = floor
    if metric.family.estimator == "score":
        results = estimators.score_splits(metric, fake_features) | results
    warnings = _warnings(metric, real, fake, real_features, fake_features)
    return {
        "results": results,
        "errors": errors,
        "floors": floors,
        "metric": metric.name,
        **({"higher_is_better": True} if metric.family.is_higher_better else {}),
        "num_real": 0 if real_features is None else len(real_features),
        "num_fake": len(fake_features),
        "protocol": _protocol(metric, real, fake, real_features, fake_features, work.protocol),
        "detector": work.open(metric.family.detector).identity,
        **_described(real, fake),
        **_said(warnings),
    }


def _long_results(
    real: Side, fake: Side, found: Mapping[str, Found], long_work: LongWork, work: Work
) -> dict[str, dict[str, Any]]:
    rows = found["real"].rows, found["generated"].rows
    results = compare_rows(long_work.measures, *rows, long_work.options)
    long = long_work.long
    protocol = {
        "name": work.protocol.name,
        "policy_real": _long_policy(real),
        "policy_fake": _long_policy(fake),
        "num_frames": long.num_frames,
        **_frame_size(real, fake),
        "quantisation": "uint8",
    }
    for result in results.values():
        warnings = [result["warning"]] if "warning" in result else []
        for side, name in ((real, "real"), (fake, "generated")):
            if isinstance(side, Videos):
                different = samplers.num_different(side.footage, long.num_frames)
                warnings.append(checks.repeat_warning(_name(side, name), different, long.num_videos))
        warnings.append(_same_footage(real, fake))
        result |= {"protocol": {**protocol, **result["protocol"]}, **_described(real, fake), **_said(warnings)}
    return results


def _described(real: Side, fake: Side) -> dict[str, Any]:
    described = [_describe(side) for side in (real, fake)]
    return {
        "real": described[0],
        "fake": described[1],
        **({"dataset": described[0]} if isinstance(real, Videos) else {}),
    }


def _describe(side: Side) -> dict[str, Any]:
    if isinstance(side, Videos):
        return {"name": side.footage.name, "id": side.content, "kind": side.kind, "fps": side.footage.fps}
    return {"kind": "network", **({"condition": _describe(side.condition)} if side.condition else {})}


def _said(warnings: Sequence[str | None]) -> dict[str, Any]:
    """The warnings there are, also printed."""
    found = [warning for warning in warnings if warning]
    for warning in found:
        distributed.print0(f"Warning: {warning}.")
    return {"warning": found[0], "warnings": found} if found else {}


def _protocol(
    metric: Metric,
    real: Side,
    fake: Side,
    real_features: Features | None,
    fake_features: Features,
    rules: Protocol,
) -> dict[str, Any]:
    """In words, everything that was decided."""
    estimator = metric.family.estimator
    described = {
        "name": rules.name,
        "policy_real": "none" if real_features is None else _policy(real, metric, real_features, rules, is_real=True),
        "policy_fake": _policy(fake, metric, fake_features, rules, is_real=False),
        "num_frames": metric.shape.num_frames,
        "frame_spacing": metric.shape.spacing,
        "resize": families.PREPARATION[metric.family.detector],
        "quantisation": "uint8",
        **_frame_size(real, fake),
    }
    if estimator == "frechet":
        described["covariance"] = "unbiased (divided by N - 1)" if rules.is_unbiased else "population (divided by N)"
    if estimator == "kernel":
        described["estimator"] = f"U-statistic over all pairs, (x.y / d + 1)^3, times {metric.family.scale:g}"
    if estimator == "score":
        described["splits"] = inception_score.NUM_SPLITS
    if estimator == "manifold":
        described["neighbours"] = NEIGHBOURS
    return described


def _frame_size(real: Side, fake: Side) -> dict[str, int]:
    sizes = [side.size for side in (real, fake) if isinstance(side, Videos)] or [
        size for side in (real, fake) if isinstance(side, Generated) and (size := _source_size(side.source))
    ]
    return {"height": sizes[0][0], "width": sizes[0][1]} if sizes else {}


def _policy(side: Side, metric: Metric, features: Features, rules: Protocol, is_real: bool) -> str:
    """How one side was chosen. Weights are those of Frechet distances; other estimators have none."""
    is_weighted = rules.has_weights and metric.family.estimator == "frechet"
    if isinstance(side, Generated):
        if side.condition is None:
            return "random offset within one temporal scale" if rules.has_phase else "from the first frame on"
        if metric.shape.num_frames == 1:
            weight = ", weighted 1 / windows of its video" if is_weighted else ""
            return f"conditioned on different windows of real low-resolution clips at random, once each{weight}"
        return "conditioned on random windows of real low-resolution clips, in shuffled passes over these"
    request = _request(metric, side, "real" if is_real else "generated")
    assert request is not None, "it has features"
    if request.frames == "all":
        return "every frame, weighted 1 / length of its video" if is_weighted else "every frame, weighted alike"
    if request.frames == "some":
        return "different frames at random, of all frames"
    if rules.windows == "sorted":
        return f"the first videos by name, once each, {'one random window' if is_real else 'their first frames'}"
    return "endless shuffled passes over videos, one random window each visit"


def _long_policy(side: Side) -> str:
    return "shuffled passes over videos, random windows" if isinstance(side, Videos) else "from frame 0 on"


def _warnings(
    metric: Metric, real: Side, fake: Side, real_features: Features | None, fake_features: Features
) -> list[str | None]:
    counts = [len(features) for features in (real_features, fake_features) if features is not None]
    is_unbiased = metric.family.estimator == "kernel"
    found = [None if is_unbiased else checks.size_warning(metric.name, min(counts), max(counts))]
    names = _name(real, "real"), _name(fake, "generated")
    for side, features, name in zip((real, fake), (real_features, fake_features), names, strict=True):
        if features is None or not isinstance(side, Videos):
            continue
        checks.check_range(features.colours, name)
        assert features.num_different is not None, "footage is finite"
        found.append(checks.repeat_warning(name, features.num_different, len(features)))
    if real_features is not None:
        found.append(checks.colour_warning(real_features.colours, fake_features.colours, *names))
    found.append(_same_footage(real, fake))
    return found


def _same_footage(real: Side, fake: Side) -> str | None:
    if isinstance(real, Videos) and isinstance(fake, Videos) and real.content == fake.content:
        return "both sides are the same footage, so this is what its own clips give, not the value of a model"
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Shared.


def _stacked(clips: np.ndarray | Tensor | Iterable[np.ndarray | Tensor]) -> Iterator[Tensor]:
    iterator = iter(clips)
    for first in iterator:
        group = [first, *itertools.islice(iterator, i3d.batch_size(len(first)) - 1)]
        yield samplers.channels_first(torch.stack([torch.as_tensor(clip) for clip in group]))


class _Printer:
    """Prints progress and what is left, at most once in ten seconds a side, and when a side is complete."""

    def __init__(self) -> None:
        self.begin = time.monotonic()
        self.side = ""
        self.last = self.begin

    def __call__(self, side: str, num_done: int, num_items: int) -> None:
        now = time.monotonic()
        if side != self.side:
            self.side, self.begin = side, self.last
        side += " videos" if side.startswith("long") else " clips"
        if num_done == num_items:
            self._say(f"{num_done} of {num_items} {side} in {format_time(now - self.begin)}")
            self.last = now
        elif now - self.last >= REPORT_INTERVAL_SEC:
            left = (now - self.begin) / num_done * (num_items - num_done)
            self._say(f"{num_done} of {num_items} {side}, {format_time(left)} left")
            self.last = now

    def _say(self, text: str) -> None:
        distributed.print0(text, file=sys.stderr)
