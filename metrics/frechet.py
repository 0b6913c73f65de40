"""Frechet distance between Gaussian fits of feature vectors, and the float64 statistics it needs.

Dowson and Landau 1982; as a measure of generators: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule",
NeurIPS 2017 (FID), and Unterthiner et al., "Towards Accurate Generative Models of Video", 2018 (FVD). Covariances are
those of the population (divided by N), as published for LongVideoGAN.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torch_utils import distributed

Array = np.ndarray | Tensor


def frechet_distance(mu_r: Array, sigma_r: Array, mu_f: Array, sigma_f: Array) -> float:
    """|mu_r - mu_f|^2 + tr(sigma_r + sigma_f - 2 (sigma_r sigma_f)^(1/2)) of means (d,) and covariances (d, d).

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


def frechet_distance_from_features(real: Array, fake: Array) -> float:
    """The same from the features themselves, (N, d) and (M, d), with population covariances.

    With fewer vectors than dimensions on either side the trace of the root is the nuclear norm of A B^T, where
    A^T A and B^T B are the covariances: no product of covariances is formed, so its condition number is not squared.
    """
    features = [_double(x) for x in (real, fake)]
    if min(len(x) for x in features) >= features[0].shape[1]:
        stats_r, stats_f = (FeatureStats.of(x) for x in features)
        return frechet_distance(stats_r.mean, stats_r.covariance, stats_f.mean, stats_f.covariance)
    means = [x.mean(dim=0) for x in features]
    factors = [(x - mean) / len(x) ** 0.5 for x, mean in zip(features, means, strict=True)]
    traces = sum(factor.square().sum() for factor in factors)
    # A tall factor is replaced by its R of QR, which has the same A^T A.
    a, b = (torch.linalg.qr(x, mode="r").R if len(x) > x.shape[1] else x for x in factors)
    trace_root = torch.linalg.svdvals(a @ b.T).sum()
    return float(((means[0] - means[1]).square().sum() + traces - 2 * trace_root).clamp(min=0))


class FeatureStats:
    """Mean and population covariance of feature vectors that arrive in batches, on any number of ranks.

    Sums are float64 about a pilot mean, so a large common offset costs no digits. With `num_items` the vectors are kept
    too, each in the row of its item number: what is computed from them does not depend on batches or ranks.
    """

    def __init__(self, num_features: int, num_items: int = 0) -> None:
        self.count = 0
        self._pilot = torch.zeros(num_features, dtype=torch.float64)
        self._sum = torch.zeros(num_features, dtype=torch.float64)
        self._outer = torch.zeros(num_features, num_features, dtype=torch.float64)
        self._kept = torch.zeros(num_items, num_features, dtype=torch.float64)

    @classmethod
    def of(cls, features: Array) -> "FeatureStats":
        """Statistics of all of (N, d)."""
        stats = cls(features.shape[1])
        stats.append(features)
        return stats

    def append(self, features: Array, items: Sequence[int] = ()) -> None:
        """Take in (n, d); `items` gives the item number of each row, and is needed where the vectors are kept."""
        x = _double(features)
        if self.count == 0:
            self._pilot = x.mean(dim=0)
        shifted = x - self._pilot
        self.count += len(x)
        self._sum += shifted.sum(dim=0)
        self._outer += shifted.T @ shifted
        if len(self._kept):
            assert len(items) == len(x), "one item number for each kept vector"
            self._kept[list(items)] = x

    def reduce(self, device: torch.device | str = "cpu") -> None:
        """Merge the ranks' statistics; afterwards every rank has those of all. `device` is where collectives work."""
        # Each rank has its own pilot, so the sums are brought to a common one, the mean of all, before they are added.
        totals = torch.cat([self.count * self._pilot + self._sum, torch.tensor([self.count], dtype=torch.float64)])
        totals = distributed.all_reduce_sum(totals.to(device)).cpu()
        pilot = totals[:-1] / totals[-1]
        move = self._pilot - pilot
        cross = torch.outer(self._sum, move)
        outer = self._outer + cross + cross.T + self.count * torch.outer(move, move)
        self._outer = distributed.all_reduce_sum(outer.to(device)).cpu()
        self._sum = distributed.all_reduce_sum((self._sum + self.count * move).to(device)).cpu()
        self._kept = distributed.all_reduce_sum(self._kept.to(device)).cpu()
        self._pilot, self.count = pilot, round(float(totals[-1]))

    @property
    def mean(self) -> Tensor:
        """float64 (d,)."""
        return self._pilot + self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """float64 (d, d), of the population: divided by N."""
        mean = self._sum / self.count
        return self._outer / self.count - torch.outer(mean, mean)

    @property
    def features(self) -> Tensor:
        """The kept vectors in order of item number: float64 (num_items, d)."""
        return self._kept


def _double(x: Array) -> Tensor:
    return torch.as_tensor(x).detach().to("cpu", torch.float64)
