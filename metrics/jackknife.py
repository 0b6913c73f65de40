"""Errors of any statistic, and its bias, by leaving out groups of videos: the delete-a-group jackknife.

Quenouille 1956, Tukey 1958; with groups: Kott, "The delete-a-group jackknife", 2001. The bootstrap must not be used
for Frechet distances: drawing with replacement repeats vectors, which makes the covariances narrower in rank and the
distance far too large, about twofold.
"""

from collections.abc import Sequence

import numpy as np

NUM_GROUPS = 16


def group_videos(videos: Sequence[int] | np.ndarray, num_groups: int) -> np.ndarray:
    """Return the group, below `num_groups`, of each item, given the number of the video it was taken from: int64 (N,).

    All items of a video go into one group, since they are not independent; the groups are nearly of one size.
    """
    numbers, places, counts = np.unique(np.asarray(videos), return_inverse=True, return_counts=True)
    if (counts == counts[:1]).all():
        return places % num_groups
    sizes = np.zeros(num_groups, np.int64)
    group = np.zeros(len(numbers), np.int64)
    for number in np.argsort(-counts, kind="stable"):
        group[number] = sizes.argmin()
        sizes[group[number]] += counts[number]
    return group[places]


def summarize(value: float, left_out: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Return the estimate without its bias of order 1 / N, and its standard error.

    `value` is the statistic of all items, `left_out` those of all items but each group. With groups of one item, the
    statistic of a mean gives the textbook's s / sqrt(N).
    """
    values = np.asarray(left_out, np.float64)
    num_groups = len(values)
    corrected = num_groups * value - (num_groups - 1) * values.mean()
    return float(corrected), float(np.sqrt((num_groups - 1) * values.var()))
