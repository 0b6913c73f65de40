"""Inception scores against their definition."""

import numpy as np
import pytest
import scipy.special

from metrics import inception_score


@pytest.fixture
def probabilities() -> np.ndarray:
    return scipy.special.softmax(np.random.RandomState(0).standard_normal((40, 7)) * 3, axis=1)


def definition(p: np.ndarray) -> float:
    return float(np.exp(np.mean([scipy.special.rel_entr(row, p.mean(0)).sum() for row in p])))


def test_score_is_its_definition_in_all_and_by_splits(probabilities: np.ndarray):
    assert inception_score.score(probabilities) == pytest.approx(definition(probabilities), rel=1e-12)
    splits = [definition(part) for part in probabilities.reshape(10, 4, 7)]
    mean, std = inception_score.inception_score(probabilities)
    assert (mean, std) == pytest.approx((np.mean(splits), np.std(splits)), rel=1e-12)
    groups = np.arange(40) % 4
    without = inception_score.scores_without(probabilities, groups, 4)
    assert without == pytest.approx([definition(probabilities[groups != g]) for g in range(4)], rel=1e-12)


def test_extremes():
    assert inception_score.score(np.eye(5)) == pytest.approx(5), "sure, and every class alike"
    assert inception_score.score(np.full((9, 4), 0.25)) == pytest.approx(1), "knows nothing"
    with pytest.raises(ValueError, match="10 splits was asked of 9 items"):
        inception_score.inception_score(np.full((9, 4), 0.25))
