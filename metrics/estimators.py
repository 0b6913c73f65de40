"""Compute values from the features of both sides, the same without groups of videos, and the floor.

One function for each kind of metric; `ESTIMATORS` names them as `metrics.families` does.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metrics import families, inception_score, jackknife, kernel, prdc
from metrics.extraction import Features
from metrics.families import Metric
from metrics.frechet import FeatureStats, frechet_distance_from_features, stats_distance
from metrics.plan import Work

ISV_SHUFFLE_SEED = 42  # as published
NEIGHBOURS = 3

# The value of a statistic, then the same without each group of videos, then between two halves of the real videos.
Estimate = tuple[float, list[float], float | None]


def estimate(metric: Metric, real: Features | None, fake: Features, work: Work) -> dict[str, dict[str, Any]]:
    """Return the results, errors and floors of a metric of two sides."""
    results, errors, floors = {}, {}, {}
    for name, (value, left_out, floor) in ESTIMATORS[metric.family.estimator](metric, real, fake, work).items():
        results[name] = value
        if left_out:
            results[f"{name}_jk"], errors[name] = jackknife.summarize(value, left_out)
        if floor is not None:
            floors[name] = floor
    if metric.family.estimator == "score":
        results = _score_splits(metric, fake) | results
    return {"results": results, "errors": errors, "floors": floors}


def grouped(metric: Metric, real: Features, fake: Features, work: Work) -> dict[str, dict[str, Any]]:
    """Return the mean of a distance over groups of clips of both sides, their standard deviation, and the error.

    The floor is the mean distance of each group of real clips and the next one. Raises `ValueError` unless the clips
    make whole groups.
    """
    size = work.protocol.group_size
    assert size is not None
    if len(real) % size:
        raise ValueError(f"{metric.name} is a mean over groups of {size} clips: take a multiple of {size}")
    num_groups = len(real) // size
    reals, fakes = _values(metric, real).chunk(num_groups), _values(metric, fake).chunk(num_groups)

    def distance(x: Tensor, y: Tensor) -> float:
        if metric.family.estimator == "kernel":
            return metric.family.scale * kernel.polynomial_distance(x, y)
        return frechet_distance_from_features(x, y, is_unbiased=work.protocol.is_unbiased)

    values = [distance(x, y) for x, y in zip(reals, fakes, strict=True)]
    floor = np.mean([distance(x, y) for x, y in zip(reals, reals[1:] + reals[:1], strict=True)])
    deviation = float(np.std(values))
    return {
        "results": {metric.name: float(np.mean(values)), f"{metric.name}_std": deviation},
        "errors": {metric.name: deviation / (num_groups - 1) ** 0.5},
        "floors": {metric.name: float(floor)},
    }


def _frechet(metric: Metric, real: Features | None, fake: Features, work: Work) -> dict[str, Estimate]:
    assert real is not None, "a distance has two sides"
    groups = _Groups(real, fake)
    distance = _frechet_low_rank if _is_low_rank(real, fake) else _frechet_moments
    return {metric.name: distance(real, fake, groups, work.protocol.is_unbiased)}


def _is_low_rank(real: Features, fake: Features) -> bool:
    if real.values is None or fake.values is None:
        return False
    return min(len(real.values), len(fake.values)) < real.values.shape[1]


def _frechet_low_rank(real: Features, fake: Features, groups: "_Groups", is_unbiased: bool) -> Estimate:
    assert real.values is not None and fake.values is not None
    x, y, w, v = real.values, fake.values, real.weights, fake.weights

    def distance(keep_r: np.ndarray, keep_f: np.ndarray) -> float:
        return frechet_distance_from_features(x[keep_r], y[keep_f], _at(w, keep_r), _at(v, keep_f), is_unbiased)

    value = frechet_distance_from_features(x, y, w, v, is_unbiased)
    left_out = [distance(groups.real != g, groups.fake != g) for g in range(groups.num)]
    if groups.num == 0:
        return value, left_out, None
    even = groups.real % 2 == 0
    floor = frechet_distance_from_features(x[even], x[~even], _at(w, even), _at(w, ~even), is_unbiased)
    return value, left_out, floor


def _at(weights: np.ndarray | None, keep: np.ndarray) -> np.ndarray | None:
    return None if weights is None else weights[keep]


def _frechet_moments(real: Features, fake: Features, groups: "_Groups", is_unbiased: bool) -> Estimate:
    x, y = (_moments(side, members, groups.num) for side, members in ((real, groups.real), (fake, groups.fake)))
    value = stats_distance(x, y, is_unbiased)
    left_out = [stats_distance(x.without(g), y.without(g), is_unbiased) for g in range(groups.num)]
    if groups.num == 0:
        return value, left_out, None
    even, odd = (x.select(range(half, groups.num, 2)) for half in (0, 1))
    return value, left_out, stats_distance(even, odd, is_unbiased)


def _moments(features: Features, groups: np.ndarray, num_groups: int) -> FeatureStats:
    if features.values is not None and num_groups:
        return FeatureStats.of(features.values, features.weights, groups, num_groups)
    if features.values is not None:
        return FeatureStats.of(features.values, features.weights)
    assert features.stats is not None, "either is there"
    return features.stats.regrouped(max(num_groups, 1))


def _kernel(metric: Metric, real: Features | None, fake: Features, work: Work) -> dict[str, Estimate]:
    x, y = _values(metric, real), _values(metric, fake)
    assert real is not None
    groups = _Groups(real, fake)
    numbers = torch.arange(max(groups.real.max(), groups.fake.max()) + 1)
    sums = kernel.kernel_sums(x, y, groups.real, groups.fake, len(numbers), work.device)
    scale = metric.family.scale
    value = scale * sums.distance(numbers >= 0)
    left_out = [scale * sums.distance(numbers != g) for g in range(groups.num)]
    floor = scale * sums.real_distance(numbers % 2 == 0) if groups.num else None
    return {metric.name: (value, left_out, floor)}


def _score(metric: Metric, real: Features | None, fake: Features, work: Work) -> dict[str, Estimate]:
    groups = _Groups(fake, fake)
    probabilities = _probabilities(metric, fake)
    left_out = inception_score.scores_without(probabilities, groups.fake, groups.num)
    return {metric.name: (inception_score.score(probabilities), left_out, None)}


def _score_splits(metric: Metric, fake: Features) -> dict[str, float]:
    """Return the published values, over splits; the score of all items at once follows them."""
    probabilities = _probabilities(metric, fake)
    if metric.family.detector == families.C3D:
        probabilities = probabilities[np.random.RandomState(ISV_SHUFFLE_SEED).permutation(len(probabilities))]
    mean, std = inception_score.inception_score(probabilities)
    return {f"{metric.name}_mean": mean, f"{metric.name}_std": std}


def _manifold(metric: Metric, real: Features | None, fake: Features, work: Work) -> dict[str, Estimate]:
    x, y = _values(metric, real), _values(metric, fake)
    assert real is not None
    groups = _Groups(real, fake)
    pairs = prdc.precision_recall_without(x, y, groups.real, groups.fake, groups.num, NEIGHBOURS, work.device)
    names = [f"{metric.name}_{kind}" for kind in ("precision", "recall")]
    return {name: (both[0], list(both[1:]), None) for name, both in zip(names, zip(*pairs, strict=True), strict=True)}


ESTIMATORS: dict[str, Callable[[Metric, Features | None, Features, Work], dict[str, Estimate]]] = {
    "frechet": _frechet,
    "kernel": _kernel,
    "score": _score,
    "manifold": _manifold,
}


class _Groups:
    """Groups of videos that the jackknife leaves out, one of each side at a time: their number, 0 if there are too few
    videos, and the group of each item."""

    def __init__(self, real: Features, fake: Features) -> None:
        self.num = min(jackknife.NUM_GROUPS, *(len(np.unique(side.videos)) for side in (real, fake)))
        self.real, self.fake = (jackknife.group_videos(side.videos, self.num) for side in (real, fake))
        halves = np.bincount(self.real % 2, minlength=2)
        left = [len(groups) - np.bincount(groups).max() for groups in (self.real, self.fake)]
        if min(*halves, *left) < 2:  # too few to say more than a value
            self.num = 0


def _values(metric: Metric, features: Features | None) -> Tensor:
    assert features is not None, f"{metric.name} has two sides"
    if features.values is None:
        raise ValueError(f"{metric.name} compares all pairs, and the features of {len(features)} items are too many")
    return features.values


def _probabilities(metric: Metric, features: Features) -> np.ndarray:
    return torch.softmax(_values(metric, features).double(), dim=1).numpy()
