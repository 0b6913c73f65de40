"""Frechet distance between Gaussian fits of feature vectors, and the float64 statistics it needs.

Dowson and Landau 1982; as a measure of generators: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule",
NeurIPS 2017 (FID), and Unterthiner et al., "Towards Accurate Generative Models of Video", 2018 (FVD). Covariances are
those of the population (divided by N), as in "Generating Long Videos of Dynamic Scenes", unless `is_unbiased`.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torch_utils import distributed

Array = np.ndarray | Tensor


def frechet_distance(mu_r: Array, sigma_r: Array, mu_f: Array, sigma_f: Array) -> float:
    """Return |mu_r - mu_f|^2 + tr(sigma_r + sigma_f - 2 (sigma_r sigma_f)^(1/2)) of means (d,) and covariances (d, d).

    The trace of the root is that of the symmetric H^T sigma_f H with sigma_r = H H^T, so nothing imaginary appears and
    singular covariances need no regularisation. Float64 throughout.
    """
    mean_r, cov_r, mean_f, cov_f = (_double(x) for x in (mu_r, sigma_r, mu_f, sigma_f))
    values, vectors = torch.linalg.eigh(cov_r)
    root = vectors * values.clamp(min=0).sqrt()  # (d, d)
    inner = root.T @ cov_f @ root
    trace_root = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean_r - mean_f).square().sum() + cov_r.trace() + cov_f.trace() - 2 * trace_root
    return float(distance.clamp(min=0))


def frechet_distance_from_features(
    real: Array,
    fake: Array,
    real_weights: Array | None = None,
    fake_weights: Array | None = None,
    is_unbiased: bool = False,
) -> float:
    """Return the same from features, (N, d) and (M, d), which may have weights, (N,) and (M,).

    With fewer vectors than dimensions on either side the trace of the root is the nuclear norm of A B^T, where
    A^T A and B^T B are the covariances: no product of covariances is formed, so its condition number is not squared.
    With `is_unbiased` covariances are divided by N - 1; weights are not meant for that.
    """
    num_features = real.shape[1]
    sides = [(_double(real), real_weights), (_double(fake), fake_weights)]
    if min(len(x) for x, _ in sides) >= num_features:
        stats_r, stats_f = (FeatureStats.of(x, weights) for x, weights in sides)
        moments = [y for stats in (stats_r, stats_f) for y in (stats.mean, stats.covariance(is_unbiased))]
        return frechet_distance(*moments)
    means, factors = [], []
    for x, weights in sides:
        share = _shares(len(x), weights)
        means.append(share @ x)
        scale = len(x) / (len(x) - 1) if is_unbiased else 1.0
        factors.append((x - means[-1]) * (share * scale).sqrt()[:, None])
    traces = sum(factor.square().sum() for factor in factors)
    # A tall factor is replaced by its R of QR, which has the same A^T A.
    a, b = (torch.linalg.qr(x, mode="r").R if len(x) > x.shape[1] else x for x in factors)
    trace_root = torch.linalg.svdvals(a @ b.T).sum()
    return float(((means[0] - means[1]).square().sum() + traces - 2 * trace_root).clamp(min=0))


class FeatureStats:
    """Weighted mean and covariance of feature vectors that arrive in batches, on any number of ranks.

    Sums are float64 about a pilot mean, so a large common offset costs no digits. They are kept for each of
    `num_groups` groups of vectors, so that those of all but some groups are at hand too.
    """

    def __init__(self, num_features: int, num_groups: int = 1) -> None:
        self._pilot = torch.zeros(num_features, dtype=torch.float64)
        # For each group: number of vectors, sum of weights, weighted sum, weighted sum of outer products.
        self._count = torch.zeros(num_groups, dtype=torch.float64)
        self._weight = torch.zeros(num_groups, dtype=torch.float64)
        self._sum = torch.zeros(num_groups, num_features, dtype=torch.float64)
        self._outer = torch.zeros(num_groups, num_features, num_features, dtype=torch.float64)

    @classmethod
    def of(
        cls, features: Array, weights: Array | None = None, groups: Array | None = None, num_groups: int = 1
    ) -> "FeatureStats":
        """Return the statistics of all of (N, d)."""
        stats = cls(features.shape[1], num_groups)
        stats.append(features, weights, groups)
        return stats

    def append(self, features: Array, weights: Array | None = None, groups: Array | None = None) -> None:
        """Add (n, d), with weights (n,), else 1, and the group of each (n,), else 0."""
        x = _double(features)
        weight = torch.ones(len(x), dtype=torch.float64) if weights is None else _double(weights)
        group = torch.zeros(len(x), dtype=torch.int64) if groups is None else torch.as_tensor(groups)
        if not self._count.any():
            self._pilot = x.mean(dim=0)
        shifted = x - self._pilot
        for number in group.unique().tolist():
            rows = (group == number).nonzero()[:, 0]
            part, w = (shifted, weight) if len(rows) == len(x) else (shifted[rows], weight[rows])
            weighted = part * w[:, None]
            self._count[number] += len(rows)
            self._weight[number] += w.sum()
            self._sum[number] += weighted.sum(dim=0)
            self._outer[number] += part.T @ weighted

    def reduce(self, device: torch.device | str = "cpu") -> None:
        """Merge the statistics of all ranks, on every rank. `device` is that of the collectives."""
        # Each rank has its own pilot, so the sums are brought to a common one, the mean of all, before they are added.
        weight = self._weight.sum()
        total = torch.cat([weight * self._pilot + self._sum.sum(dim=0), weight[None]])
        total = distributed.all_reduce_sum(total.to(device)).cpu()
        pilot = total[:-1] / total[-1]
        self._move(pilot)
        sums = torch.cat([x.flatten() for x in (self._count, self._weight, self._sum, self._outer)])
        sums = distributed.all_reduce_sum(sums.to(device)).cpu()
        shapes = [x.shape for x in (self._count, self._weight, self._sum, self._outer)]
        parts = sums.split([shape.numel() for shape in shapes])
        self._count, self._weight, self._sum, self._outer = (
            part.view(shape) for part, shape in zip(parts, shapes, strict=True)
        )

    def _move(self, pilot: Tensor) -> None:
        for number in range(len(self._count)):
            move = self._pilot - pilot
            cross = torch.outer(self._sum[number], move)
            self._outer[number] += cross + cross.T + self._weight[number] * torch.outer(move, move)
            self._sum[number] += self._weight[number] * move
        self._pilot = pilot

    def select(self, groups: Sequence[int]) -> "FeatureStats":
        """Return the statistics of these groups alone, as one group."""
        index = list(groups)
        stats = FeatureStats(0)
        stats._pilot = self._pilot
        for name in ("_count", "_weight", "_sum", "_outer"):
            setattr(stats, name, getattr(self, name)[index].sum(dim=0, keepdim=True))
        return stats

    def without(self, group: int) -> "FeatureStats":
        """Return the statistics of all groups but one, as one group."""
        return self.select([number for number in range(len(self._count)) if number != group])

    def regrouped(self, num_groups: int) -> "FeatureStats":
        """Return the same in fewer groups: group g becomes g mod `num_groups`."""
        parts = [self.select(range(number, len(self._count), num_groups)) for number in range(num_groups)]
        stats = FeatureStats(0)
        stats._pilot = self._pilot
        for name in ("_count", "_weight", "_sum", "_outer"):
            setattr(stats, name, torch.cat([getattr(part, name) for part in parts]))
        return stats

    @property
    def count(self) -> int:
        """Return the number of vectors."""
        return round(float(self._count.sum()))

    @property
    def mean(self) -> Tensor:
        """Return the mean, float64 (d,)."""
        return self._pilot + self._sum.sum(dim=0) / self._weight.sum()

    def covariance(self, is_unbiased: bool = False) -> Tensor:
        """Return the covariance, float64 (d, d), divided by N, or by N - 1 if unbiased."""
        weight = self._weight.sum()
        mean = self._sum.sum(dim=0) / weight
        covariance = self._outer.sum(dim=0) / weight - torch.outer(mean, mean)
        return covariance * (self.count / (self.count - 1)) if is_unbiased else covariance

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all arrays, for storing."""
        return {name: getattr(self, f"_{name}").numpy() for name in ("pilot", "count", "weight", "sum", "outer")}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "FeatureStats":
        """Return the statistics that `arrays` returned."""
        stats = cls(0)
        for name in ("pilot", "count", "weight", "sum", "outer"):
            setattr(stats, f"_{name}", torch.from_numpy(arrays[name]))
        return stats


def stats_distance(real: FeatureStats, fake: FeatureStats, is_unbiased: bool = False) -> float:
    """Return `frechet_distance` of two sides' statistics."""
    return frechet_distance(real.mean, real.covariance(is_unbiased), fake.mean, fake.covariance(is_unbiased))


def _shares(num_items: int, weights: Array | None) -> Tensor:
    weight = torch.ones(num_items, dtype=torch.float64) if weights is None else _double(weights)
    return weight / weight.sum()


def _double(x: Array) -> Tensor:
    return torch.as_tensor(x).detach().to("cpu", torch.float64)
