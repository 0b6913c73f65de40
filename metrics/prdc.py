"""Precision and recall by nearest neighbours: the share of generated items near real ones, and the reverse.

Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", NeurIPS 2019. A set's
manifold is the union of balls around its vectors that reach to the k-th nearest other one; precision is the share of
generated vectors on the real manifold, recall that of real vectors on the generated one.
"""

import numpy as np
import torch
from torch import Tensor

ROWS_AT_ONCE = 2048


def precision_recall(
    real: np.ndarray | Tensor, fake: np.ndarray | Tensor, k: int = 3, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Return precision and recall of (M, d) against (N, d)."""
    groups_r, groups_f = (torch.zeros(len(x), dtype=torch.int64) for x in (real, fake))
    return precision_recall_without(real, fake, groups_r, groups_f, 0, k, device)[0]


def precision_recall_without(
    real: np.ndarray | Tensor,
    fake: np.ndarray | Tensor,
    groups_r: np.ndarray | Tensor,
    groups_f: np.ndarray | Tensor,
    num_groups: int,
    k: int = 3,
    device: torch.device | str = "cpu",
) -> list[tuple[float, float]]:
    """Return both for all vectors, and then without each group (N,), (M,), which is left out of both sets.

    `num_groups` 0 gives the first alone. Raises `ValueError` if either side has no k other vectors.
    """
    for side, name in ((real, "real"), (fake, "generated")):
        if len(side) <= k:
            raise ValueError(f"{len(side)} {name} items have no {k} neighbours each: measure more than {k}")
    x, y = (torch.as_tensor(side).to(device, torch.float64) for side in (real, fake))
    g, h = (torch.as_tensor(groups).to(device) for groups in (groups_r, groups_f))
    precision = _coverage(x, y, g, h, num_groups, k)
    recall = _coverage(y, x, h, g, num_groups, k)
    return list(zip(precision, recall, strict=True))


def _coverage(x: Tensor, y: Tensor, group_x: Tensor, group_y: Tensor, num_groups: int, k: int) -> list[float]:
    """Return the share of vectors of `y` on the manifold of `x`: of all, and of all without each group."""
    left_out = [-1, *range(num_groups)]
    covered = torch.zeros(len(left_out), len(y), dtype=torch.bool, device=x.device)
    for first in range(0, len(x), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        own, other = torch.cdist(x[rows], x), torch.cdist(x[rows], y)
        own[torch.arange(len(own)), first + torch.arange(len(own))] = torch.inf
        for i, group in enumerate(left_out):
            near = own.masked_fill(group_x == group, torch.inf) if group >= 0 else own
            radius = near.kthvalue(k, dim=1).values[:, None]
            if group >= 0:
                radius = radius.masked_fill((group_x[rows] == group)[:, None], -1)
            covered[i] |= (other <= radius).any(dim=0)
    kept = [group_y != group for group in left_out]
    return [float(covered[i][kept[i]].double().mean()) for i in range(len(left_out))]
