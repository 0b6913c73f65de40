"""Measure any two sides by metrics given by name: videos of samplers, datasets, folders of videos, arrays.

    from metrics import inputs, metric_main

    real, fake = inputs.open_videos("datasets/mine"), inputs.open_videos("outputs/samples")
    for result in metric_main.calc_metrics(["fvd2048_16f", "kvd2048_16f"], real, fake):
        print(result["results"], result["errors"], result["floors"])

Every result holds the protocol, the number of clips on both sides and the identity of the detector, because each of
these changes the value.
"""

import dataclasses
import itertools
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnnlib.util import format_time
from metrics import checks, estimators, extraction, families, inception_score, long_video, paired, plan, samplers
from metrics.detectors import i3d, registry
from metrics.estimators import NEIGHBOURS
from metrics.extraction import FeatureRequest, Features, Progress
from metrics.families import ClipShape, Metric, check_names, list_valid_metrics, parse
from metrics.frechet import frechet_distance_from_features
from metrics.inputs import Videos
from metrics.long_video_base import Rows, compare_rows
from metrics.plan import Generated, Side, Work
from metrics.protocols import EvalProtocol, protocols
from torch_utils import distributed
from torch_utils.precision import tf32
from training.contract import System
from training.data.dataset import ClipDataset
from training.data.parts import has_size
from training.sampling import Sampler

__all__ = ["calc_metrics", "check_names", "fvd_between", "list_valid_metrics", "prompted", "training_metrics"]

CONTINUATIONS = "the continuations of the context frames of the generated side"
ORIGINALS = "the clips that the generated side reconstructs"
STILL = "copy of the last frame"  # the baseline of a prediction
NEED_WHOLE = ("kernel", "score", "manifold", "paired")  # estimators that need the features, not only their sums

LABELS = ("real", "generated")
Sides = tuple[Side, Side]  # in this order


def calc_metrics(
    names: Sequence[str],
    real: Side,
    fake: Side,
    *,
    protocol: str | EvalProtocol = "lvg",
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
    nor on the other metrics; `seed` chooses the clips of both sides. The measures of long videos of
    `metrics.long_video` take `num_videos` videos of `num_frames` frames a side. `verbose` prints progress on rank 0,
    `progress` is called on every rank. `detector_paths` gives files of weights by the name of the detector.

    Returns for each name a dict that JSON can hold: `results` {name: value, name_jk: value without the bias of a finite
    sample}, `errors` {name: standard error over videos}, `floors` {name: value of two halves of the real videos},
    `metric`, `num_real`, `num_fake`, `protocol`, `detector`, `real`, `fake`, `seed`, `versions`, `total_time`,
    `total_time_str`, `world_size`, and, if there are any, `warnings`, `curves` to draw, and `baselines` {what: {name:
    value}}: of predictions the value of the last context frame, repeated. Raises `ValueError` on every rank for an
    unknown name, absent weights, clips that are too short, or sides that do not fit.
    """
    start_time = time.monotonic()
    check_names(names)
    parsed = {name: parse(name) for name in names if name not in long_video.MEASURES}
    metrics = list(dict.fromkeys(parsed.values()))
    measures = [long_video.MEASURES[name] for name in names if name in long_video.MEASURES]
    rules = protocols()[protocol] if isinstance(protocol, str) else protocol
    report = progress or (extraction.Printer() if verbose else None)
    work = Work(rules, seed, torch.device(device), batch, replace_cache, report, detector_paths or {})
    sides = real, fake
    with distributed.together():  # errors are raised before anything is computed
        for detector in [metric.family.detector for metric in metrics] + [m.detector for m in measures if m.detector]:
            work.open(detector)
        _check_sides(sides, rules)
        _check_metrics(metrics, sides, rules)
        plan.check_streams(measures, real, fake, num_frames)
        groups = plan.by_steering(measures, fake, num_frames)
        work = dataclasses.replace(work, measures=groups[0][1])
        requests = [
            {metric: _request(metric, sides, is_real, rules) for metric in metrics} for is_real in (True, False)
        ]
        stills = {metric: _still_request(metric, sides, rules) for metric in metrics}
        shape = ClipShape(num_frames)
        long = [_clips(sides, side, rules, shape, num_videos) if work.measures else None for side in sides]
        needs_clips = bool(long[0]) and long[0].frames == "clips" and all(m.needs_real_clips for m in work.measures)
        if long[0] and needs_clips and isinstance(real, Videos):
            long[0] = dataclasses.replace(long[0], shape=ClipShape(min(num_frames, work.probe_options.window)))
        steered = [((real, side), dataclasses.replace(work, measures=group)) for side, group in groups[1:]]
        steered_long = [[_clips(own, side, rules, shape, num_videos) for side in own] for own, _ in steered]
        for index, (side, wanted) in enumerate(zip(sides, requests, strict=True)):
            footage = side if isinstance(side, Videos) else side.prompts
            if footage is not None:
                each = (*wanted.values(), long[index], *(pair[index] for pair in steered_long))
                footage.footage.eligible(max(r.window_span if r else 0 for r in each))
    collected = []
    baselines = (stills, {})
    for side, label, wanted, also, videos in zip(sides, LABELS, requests, baselines, long, strict=True):
        whole = {request for m, request in wanted.items() if request and m.family.estimator in NEED_WHOLE}
        unique = [request for request in (*wanted.values(), *also.values()) if request]
        collected.append(plan.collect(unique, side, label, work, whole, videos))
    passes: list[tuple[Sides, list[list[Rows]], Sequence[FeatureRequest | None], Work]] = []
    if work.measures:
        passes.append((sides, [rows for _, rows in collected], long, work))
    for (own, own_work), pair in zip(steered, steered_long, strict=True):
        each = zip(own, LABELS, pair, strict=True)
        rows = [plan.collect([], side, label, own_work, (), request)[1] for side, label, request in each]
        passes.append((own, rows, pair, own_work))

    def results() -> dict[str, dict[str, Any]]:
        by_name = {name: result for each in passes for name, result in _long_results(*each).items()}
        (reals, _), (fakes, _) = collected
        for name, metric in parsed.items():
            found = [reals.get(requests[0][metric]), fakes.get(requests[1][metric]), reals.get(stills[metric])]
            by_name[name] = _result(metric, sides, found, work)
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


def training_metrics(
    dataset: str, seed: int, device: torch.device | str
) -> Callable[[Sequence[str], System], list[dict[str, Any]]]:
    """Return the function that measures a system in training against `dataset`, by names of metrics."""

    @tf32(False)
    def measure(names: Sequence[str], system: System) -> list[dict[str, Any]]:
        sampler = system.sampler()
        real = Videos(ClipDataset(dataset, [sampler.size]), sampler.size, "dataset")
        return calc_metrics(names, real, prompted(sampler, real, "the model"), seed=seed, device=device)

    return measure


def fvd_between(
    clips_a: np.ndarray | Tensor | Iterable[np.ndarray | Tensor],
    clips_b: np.ndarray | Tensor | Iterable[np.ndarray | Tensor],
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Measure FVD between two sets of whole clips, arrays uint8 (N, T, H, W, 3) or iterables of (T, H, W, 3).

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


# ----------------------------------------------------------------------------
# Sides.


def prompted(side: Videos | Sampler, other: Videos | Sampler, model: str) -> Side:
    """Return the side of videos or of a sampler, which is prompted with the `other` side's footage if it needs that.

    Raises `ValueError`, with the name of the `model`, unless the footage has frames of the sizes that are needed.
    """
    if isinstance(side, Videos):
        return side
    needs = side.needs
    if not needs.frames and not needs.streams:
        return Generated(side)
    reals = other if isinstance(other, Videos) and other.size == side.size else None
    size = side.size if needs.size is None else needs.size
    if isinstance(other, Videos):
        fits = not needs.frames or side.size == size == other.size
        if fits and set(needs.streams) <= set(getattr(other.footage, "streams", {})):
            return Generated(side, other, reals)
        if isinstance(other.footage, ClipDataset) and has_size(other.footage.path, size):
            sizes = list(dict.fromkeys([other.size if fits else side.size, size]))  # refused if of different clips
            vocabularies = {name: side.vocabularies[name] for name in needs.streams if name in side.vocabularies}
            dataset = ClipDataset(other.footage.path, sizes, streams=needs.streams, vocabularies=vocabularies)
            return Generated(side, Videos(dataset, size, "dataset"), reals)
        if fits:
            return Generated(side, other, reals)  # whose lack of streams is told with the other faults
    name = other.footage.name if isinstance(other, Videos) else "the other model"
    raise ValueError(
        f"{model} needs context frames of {size[0]}x{size[1]} for frames of {side.size[0]}x{side.size[1]}, which "
        f"{name} does not have: measure against a dataset of both sizes, or give the model that makes them too"
    )


def _check_sides(sides: Sides, rules: EvalProtocol) -> None:
    """Raise `ValueError` unless both sides have one size and frame rate, and prompts for samplers that need them."""
    checks.check_sizes(sides[0].size, sides[1].size, *_names(sides))
    rates = [side.footage.fps if isinstance(side, Videos) else side.sampler.fps for side in sides]
    checks.check_same_rate(rates[0], rates[1], *_names(sides))
    if (rules.context, rules.horizon) != (None, None) and all(isinstance(s, Videos) or not s.prompts for s in sides):
        raise ValueError(
            "context frames and a horizon are for models that need real frames: leave them out, or take a protocol "
            f"other than {rules.name}"
        )
    for side, name in zip(sides, _names(sides), strict=True):
        if isinstance(side, Videos):
            continue
        needs, footage = side.sampler.needs, side.prompts and side.prompts.footage
        if footage is None and needs.frames:
            raise ValueError(f"{name} needs context frames: give footage to prompt it with")
        missing = [stream for stream in needs.streams if stream not in getattr(footage, "streams", {})]
        if missing:
            where = footage.name if footage else "the other side"
            raise ValueError(
                f"{name} needs the stream {missing[0]!r}, which {where} does not have: use a dataset of it"
            )


def _check_metrics(metrics: Sequence[Metric], sides: Sides, rules: EvalProtocol) -> None:
    """Raise `ValueError` for a metric that compares with real clips which the sides do not have."""
    real, fake = sides
    continues = isinstance(fake, Generated) and fake.continues and isinstance(real, Videos)
    if rules.samples > 1 and not continues:
        raise ValueError(f"{rules.samples} samples a context are for models that continue videos: take one")
    for metric in metrics:
        if metric.shape.context and not continues:
            raise ValueError(
                f"{metric.name} includes context frames, which only models that continue videos have: leave out "
                f"_context{metric.shape.context}"
            )
        if metric.of_reconstructions and not (isinstance(fake, Generated) and fake.reconstructs):
            raise ValueError(f"r{metric.name} is of reconstructions, which a tokenizer makes: ask for {metric.name}")
        is_aligned = isinstance(real, Videos) and isinstance(fake, Generated) and fake.originals is not None
        if metric.family.is_paired and not is_aligned:
            raise ValueError(
                f"{metric.name} compares each clip with the real one that it should equal: measure a tokenizer, or a "
                "model that continues videos, against footage"
            )


def _names(sides: Sides) -> list[str]:
    labels = zip(sides, LABELS, strict=True)
    return [s.footage.name if isinstance(s, Videos) else f"the network of the {label} side" for s, label in labels]


def _request(metric: Metric, sides: Sides, is_real: bool, rules: EvalProtocol) -> FeatureRequest | None:
    """Return the features that a metric needs of a side, None if it needs none."""
    family, num_items, side = metric.family, metric.num_items, sides[0 if is_real else 1]
    if is_real and family.real == "none":
        return None
    if is_real and family.real == "others":
        shape = _clips(sides, side, rules, metric.shape, num_items, family.detector, family.output)
        has_others = isinstance(side, Videos) and len(side.footage.eligible(shape.window_span)) > 1
        return dataclasses.replace(shape, frames="others") if has_others else None
    if isinstance(side, Generated) or not is_real or family.real == "clips":
        return _clips(sides, side, rules, metric.shape, num_items, family.detector, family.output)
    most = family.most_real if family.real == "all" else num_items
    is_all = not most or samplers.num_different(side.footage, 1) <= most
    frames, num_items = ("all", 0) if is_all else ("some", most)
    return FeatureRequest(frames, metric.shape, num_items, family.detector, family.output)


def _clips(
    sides: Sides, side: Side, rules: EvalProtocol, shape: ClipShape, num: int, detector: str = "", output: str = ""
) -> FeatureRequest:
    """Return a request for clips; real ones are those that a sampler should predict or reconstruct."""
    fake = sides[1]
    is_aligned = isinstance(fake, Generated) and (fake.continues or fake.reconstructs or output == "pairs")
    is_continuation = isinstance(side, Videos) and is_aligned
    maker = fake if is_continuation else side
    margins = maker.margins(shape, rules) if isinstance(maker, Generated) else (0, 0)
    if isinstance(side, Generated) and side.continues:
        num *= rules.samples
    return FeatureRequest("continuations" if is_continuation else "clips", shape, num, detector, output, *margins)


def _still_request(metric: Metric, sides: Sides, rules: EvalProtocol) -> FeatureRequest | None:
    """Return the request for the last context frame, repeated, in place of a prediction; None without context."""
    real, fake = sides
    is_frame = metric.family.clip is not None
    if not isinstance(real, Videos) or not isinstance(fake, Generated) or not fake.continues or is_frame:
        return None
    family = metric.family
    request = _clips(sides, real, rules, metric.shape, metric.num_items, family.detector, family.output)
    return dataclasses.replace(request, frames="copies") if request.past else None


# ----------------------------------------------------------------------------
# Results.


def _result(metric: Metric, sides: Sides, found: Sequence[Features | None], work: Work) -> dict[str, Any]:
    """Return the result of a metric from the features of the real clips, the generated ones, and repeated frames."""
    real, fake, still = found
    assert fake is not None, "every metric takes generated clips"
    family, rules = metric.family, work.protocol
    is_reconstruction = isinstance(sides[1], Generated) and sides[1].reconstructs
    if is_reconstruction and family.is_distance:
        metric = dataclasses.replace(metric, name=f"r{metric.name}")
    if family.is_paired:
        samples = rules.samples if isinstance(sides[1], Generated) and sides[1].continues else 1
        values = paired.summarize(metric, fake, samples, real, {} if still is None else {STILL: still})
    else:
        values = _values(metric, real, fake, still, work)
    return {
        **values,
        "metric": metric.name,
        **({"higher_is_better": True} if family.is_higher_better else {}),
        "num_real": 0 if real is None else len(real),
        "num_fake": len(fake),
        "protocol": {
            **_choices(sides, fake.request, rules),
            "policy_real": "none" if real is None else _policy(sides, 0, metric, real.request, rules),
            "policy_fake": _policy(sides, 1, metric, fake.request, rules),
            **_estimation(metric, work),
        },
        "detector": work.open(family.detector).identity,
        **_described(sides),
        **_reported(_warnings(metric, sides, real, fake)),
    }


def _values(
    metric: Metric, real: Features | None, fake: Features, still: Features | None, work: Work
) -> dict[str, dict[str, Any]]:
    """Return results, errors and floors of two sides, and baselines, if there are any."""
    size = work.protocol.group_size
    if metric.family.is_distance and size and real is not None and len(real) > size:
        values = estimators.grouped(metric, real, fake, work)
        others = estimators.grouped(metric, real, still, work)["results"] if still is not None else {}
    else:
        values = estimators.estimate(metric, real, fake, work)
        others = estimators.estimate(metric, real, still, work)["results"] if still is not None else {}
    others = {name: value for name, value in others.items() if name in values["results"] and not name.endswith("_jk")}
    return {**values, **({"baselines": {STILL: others}} if others else {})}


def _long_results(
    sides: Sides, rows: Sequence[list[Rows]], long: Sequence[FeatureRequest | None], work: Work
) -> dict[str, dict[str, Any]]:
    results = compare_rows(work.measures, rows[0], rows[1], work.probe_options)
    asked = [request for request in long if request is not None]
    protocol = _choices(sides, asked[1], work.protocol)
    for side, policy in zip(sides, ("policy_real", "policy_fake"), strict=True):
        protocol[policy] = "shuffled passes over videos, random windows"
        if isinstance(side, Generated):
            given = ", conditioned on random windows of real clips" if side.prompts else ""
            protocol[policy] = f"from frame 0 on{given}"
        elif "context" in protocol:
            protocol[policy] = CONTINUATIONS
        elif asked[0].frames == "continuations":
            protocol[policy] = ORIGINALS
    repeats = [
        checks.repeat_warning(name, samplers.num_different(side.footage, request.window_span), request.num_items)
        for side, name, request in zip(sides, _names(sides), asked, strict=True)
        if isinstance(side, Videos)
    ]
    for result in results.values():
        warnings = [result.get("warning"), *repeats, _same_footage(sides)]
        result |= {"protocol": {**protocol, **result["protocol"]}, **_described(sides), **_reported(warnings)}
    return results


def _described(sides: Sides) -> dict[str, Any]:
    real, fake = map(_describe, sides)
    return {"real": real, "fake": fake, **({"dataset": real} if isinstance(sides[0], Videos) else {})}


def _describe(side: Side) -> dict[str, Any]:
    if isinstance(side, Videos):
        return {"name": side.footage.name, "id": side.content, "kind": side.kind, "fps": side.footage.fps}
    sampler = side.sampler
    described: dict[str, Any] = {"kind": "network"}
    options = dataclasses.asdict(sampler.options)
    described |= {name: value for name, value in (("sampler", dict(sampler.costs)), ("options", options)) if value}
    return {**described, **({"condition": _describe(side.prompts)} if side.prompts else {})}


def _reported(warnings: Sequence[str | None]) -> dict[str, Any]:
    """Print the warnings, and return them for a result."""
    found = [warning for warning in warnings if warning]
    for warning in found:
        distributed.print0(f"Warning: {warning}.")
    return {"warning": found[0], "warnings": found} if found else {}


def _choices(sides: Sides, request: FeatureRequest, rules: EvalProtocol) -> dict[str, Any]:
    """Describe the frames that are compared; where a model predicts them, also its context and horizon."""
    fake, (height, width) = sides[1], sides[0].size
    described = {"name": rules.name, "num_frames": request.shape.num_frames, "height": height, "width": width}
    if isinstance(fake, Generated) and fake.continues:
        described |= {
            "context": request.past,
            "horizon": request.shape.new_span + request.future - fake.sampler.needs.future,
            "context_in_clips": request.shape.context,
            "samples": rules.samples,
        }
    return {**described, "quantisation": "uint8"}


def _estimation(metric: Metric, work: Work) -> dict[str, Any]:
    """Describe how features are extracted, and the value computed of them."""
    family, rules = metric.family, work.protocol
    if family.is_paired:
        comparison = work.open(family.detector)
        return {"comparison": comparison.averaged, "averaged": "over frames, then samples, then contexts"}
    covariance = "unbiased (divided by N - 1)" if rules.is_unbiased else "population (divided by N)"
    return {
        "frame_spacing": metric.shape.spacing,
        "resize": families.PREPARATION[family.detector],
        **({"group_size": rules.group_size} if family.is_distance and rules.group_size else {}),
        **{
            "frechet": {"covariance": covariance},
            "kernel": {"estimator": f"U-statistic over all pairs, (x.y / d + 1)^3, times {family.scale:g}"},
            "score": {"splits": inception_score.NUM_SPLITS},
            "manifold": {"neighbours": NEIGHBOURS},
        }[family.estimator],
    }


def _policy(sides: Sides, index: int, metric: Metric, request: FeatureRequest, rules: EvalProtocol) -> str:
    """Describe how the clips of a side were chosen. Weights are those of Frechet distances; others have none."""
    side, is_real = sides[index], index == 0
    is_reconstruction = isinstance(sides[1], Generated) and not sides[1].continues
    is_weighted = rules.has_weights and metric.family.estimator == "frechet"
    if isinstance(side, Generated):
        if side.prompts is None:
            return "random offset within one temporal scale" if rules.has_phase else "from the first frame on"
        if metric.shape.num_frames == 1:
            weight = ", weighted 1 / windows of its video" if is_weighted else ""
            return f"conditioned on different windows of real clips at random, once each{weight}"
        if rules.windows == "first":
            return "conditioned on the first window of each real clip, in shuffled order"
        return "conditioned on random windows of real clips, in shuffled passes over these"
    passes = "endless shuffled passes over videos, one random window each visit"
    if rules.windows == "sorted":
        part = "one random window" if is_real else "their first frames"
        passes = f"the first videos by name, once each, {part}"
    return {
        "all": "every frame, weighted 1 / length of its video" if is_weighted else "every frame, weighted alike",
        "some": "different frames at random, of all frames",
        "continuations": ORIGINALS if is_reconstruction else CONTINUATIONS,
        "others": f"{ORIGINALS if is_reconstruction else CONTINUATIONS}; for the floor those of another video",
        "clips": passes,
    }[request.frames]


def _warnings(metric: Metric, sides: Sides, real: Features | None, fake: Features) -> list[str | None]:
    counts = [len(features) for features in (real, fake) if features is not None]
    has_no_bias = metric.family.estimator == "kernel" or metric.family.is_paired
    found = [None if has_no_bias else checks.size_warning(metric.name, min(counts), max(counts))]
    names = _names(sides)
    for side, features, name in zip(sides, (real, fake), names, strict=True):
        if features is not None and isinstance(side, Videos):
            checks.check_range(features.colours, name)
            assert features.num_different is not None, "footage is finite"
            found.append(checks.repeat_warning(name, features.num_different, len(features)))
    if real is not None:
        found.append(checks.colour_warning(real.colours, fake.colours, *names))
    return [*found, _same_footage(sides)]


def _same_footage(sides: Sides) -> str | None:
    real, fake = sides
    if isinstance(real, Videos) and isinstance(fake, Videos) and real.content == fake.content:
        return "both sides are the same footage, so this is what its own clips give, not the value of a model"
    return None


# ----------------------------------------------------------------------------
# Shared.


def _stacked(clips: np.ndarray | Tensor | Iterable[np.ndarray | Tensor]) -> Iterator[Tensor]:
    iterator = iter(clips)
    for first in iterator:
        group = [first, *itertools.islice(iterator, i3d.batch_size(len(first)) - 1)]
        yield samplers.channels_first(torch.stack([torch.as_tensor(clip) for clip in group]))
