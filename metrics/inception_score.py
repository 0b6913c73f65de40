"""Inception score: confidence of a classifier for each item, and number of classes that the items cover.

Salimans et al., "Improved Techniques for Training GANs", NeurIPS 2016: exp of the mean of KL(p(y|x) || p(y)). For
videos (Saito et al. 2017) the classifier is C3D trained on UCF-101.
"""

import numpy as np

NUM_SPLITS = 10


def inception_score(probabilities: np.ndarray, num_splits: int = NUM_SPLITS) -> tuple[float, float]:
    """Return mean and population standard deviation of the score of (N, classes) over successive equal splits."""
    if len(probabilities) < num_splits:
        raise ValueError(
            f"an Inception score over {num_splits} splits was asked of {len(probabilities)} items: measure at least "
            f"{num_splits}"
        )
    bounds = [len(probabilities) * i // num_splits for i in range(num_splits + 1)]
    scores = [score(probabilities[a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    return float(np.mean(scores)), float(np.std(scores))


def score(probabilities: np.ndarray) -> float:
    """Return the score of (N, classes) as one split."""
    negative_entropy, mean = _terms(probabilities)
    return float(np.exp(negative_entropy.mean() - _plogp(mean.mean(axis=0)).sum()))


def scores_without(probabilities: np.ndarray, groups: np.ndarray, num_groups: int) -> list[float]:
    """Return the score of all items but those of each group (N,)."""
    return [score(probabilities[groups != number]) for number in range(num_groups)]


def _terms(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p = probabilities.astype(np.float64)
    return _plogp(p).sum(axis=1), p


def _plogp(p: np.ndarray) -> np.ndarray:
    return p * np.log(np.where(p > 0, p, 1.0))
