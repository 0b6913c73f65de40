"""Kernel distances between two sets of feature vectors: KVD of I3D's logits, KID of Inception's features.

The squared maximum mean discrepancy (Gretton et al., JMLR 2012, lemma 6) under the kernel (x.y / d + 1)^3 (Binkowski
et al., "Demystifying MMD GANs", ICLR 2018), as a U-statistic over all pairs. It is unbiased at any number of vectors;
the published average over random blocks estimates the same, with the noise of the blocks on top.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class KernelSums:
    """Sums of the kernel over pairs, by the groups of both vectors, for values without some groups."""

    count_r: Tensor  # (G,): real vectors in each group
    count_f: Tensor  # (G,)
    real: Tensor  # (G, G): pairs of two real vectors, without those of a vector with itself
    fake: Tensor  # (G, G)
    cross: Tensor  # (G, G): a real and a generated one

    def distance(self, groups: Tensor) -> float:
        """Return the U-statistic of the vectors of some groups, given as bool (G,)."""
        num_r, num_f = float(self.count_r[groups].sum()), float(self.count_f[groups].sum())
        real, fake, cross = (float(x[groups][:, groups].sum()) for x in (self.real, self.fake, self.cross))
        return real / (num_r * (num_r - 1)) + fake / (num_f * (num_f - 1)) - 2 * cross / (num_r * num_f)

    def real_distance(self, groups: Tensor) -> float:
        """Return the U-statistic between the real vectors of some groups, bool (G,), and those of the others."""
        num_a, num_b = float(self.count_r[groups].sum()), float(self.count_r[~groups].sum())
        within_a, within_b = (float(self.real[g][:, g].sum()) for g in (groups, ~groups))
        cross = float(self.real[groups][:, ~groups].sum())
        return within_a / (num_a * (num_a - 1)) + within_b / (num_b * (num_b - 1)) - 2 * cross / (num_a * num_b)


def polynomial_distance(real: np.ndarray | Tensor, fake: np.ndarray | Tensor) -> float:
    """Return the distance between (N, d) and (M, d)."""
    groups_r, groups_f = (torch.zeros(len(x), dtype=torch.int64) for x in (real, fake))
    return kernel_sums(real, fake, groups_r, groups_f, 1).distance(torch.ones(1, dtype=torch.bool))


def kernel_sums(
    real: np.ndarray | Tensor,
    fake: np.ndarray | Tensor,
    groups_r: np.ndarray | Tensor,
    groups_f: np.ndarray | Tensor,
    num_groups: int,
    device: torch.device | str = "cpu",
) -> KernelSums:
    """Return sums over all pairs of (N, d) and (M, d), whose groups are (N,) and (M,), in float64 on `device`."""
    x, y = (torch.as_tensor(side).to(device) for side in (real, fake))
    member_x, member_y = (_members(groups, num_groups, device) for groups in (groups_r, groups_f))
    sums = [
        _block_sums(x, x, member_x, member_x),
        _block_sums(y, y, member_y, member_y),
        _block_sums(x, y, member_x, member_y),
    ]
    for total, side, member in ((sums[0], x, member_x), (sums[1], y, member_y)):
        itself = torch.cat(
            [(part.double().square().sum(dim=1) / part.shape[1] + 1) ** 3 for part in side.split(ROWS_AT_ONCE)]
        )
        total -= torch.diag(member.T @ itself)
    counts = [member.sum(dim=0).cpu() for member in (member_x, member_y)]
    return KernelSums(*counts, *(total.cpu() for total in sums))


def _block_sums(x: Tensor, y: Tensor, member_x: Tensor, member_y: Tensor) -> Tensor:
    """Return sums by group; where both sides are the same, half of the blocks mirror the others."""
    total = torch.zeros(member_x.shape[1], member_y.shape[1], dtype=torch.float64, device=x.device)
    for i in range(0, len(x), ROWS_AT_ONCE):
        for j in range(i if x is y else 0, len(y), ROWS_AT_ONCE):
            rows, columns = slice(i, i + ROWS_AT_ONCE), slice(j, j + ROWS_AT_ONCE)
            kernel = (x[rows].double() @ y[columns].double().T / x.shape[1] + 1) ** 3
            part = member_x[rows].T @ kernel @ member_y[columns]
            total += part if x is not y or i == j else part + part.T
    return total


def _members(groups: np.ndarray | Tensor, num_groups: int, device: torch.device | str) -> Tensor:
    """Return float64 (N, G): 1 where an item is in a group."""
    return torch.nn.functional.one_hot(torch.as_tensor(groups), num_groups).to(device, torch.float64)
