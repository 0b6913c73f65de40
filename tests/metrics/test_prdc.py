"""Precision and recall against loops over points."""

import numpy as np
import pytest

from metrics import prdc


def covered(x: np.ndarray, y: np.ndarray, k: int) -> float:
    """Share of `y` within reach of a point of `x`, one pair at a time."""
    radius = [sorted(np.linalg.norm(a - b) for j, b in enumerate(x) if j != i)[k - 1] for i, a in enumerate(x)]
    return float(np.mean([any(np.linalg.norm(a - b) <= r for a, r in zip(x, radius, strict=True)) for b in y]))


@pytest.fixture
def sides() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.RandomState(0)
    return rng.standard_normal((30, 3)), rng.standard_normal((25, 3)) * 0.9 + 1.2


def test_both_equal_brute_force(sides, monkeypatch: pytest.MonkeyPatch):
    real, fake = sides
    expected = covered(real, fake, 3), covered(fake, real, 3)
    assert 0 < min(expected) < max(expected) < 1
    assert prdc.precision_recall(real, fake) == pytest.approx(expected)
    monkeypatch.setattr(prdc, "ROWS_AT_ONCE", 7)
    assert prdc.precision_recall(real, fake) == pytest.approx(expected)


def test_groups_are_left_out_of_both_sides(sides):
    real, fake = sides
    groups = np.arange(30) % 5, np.arange(25) % 5
    found = prdc.precision_recall_without(real, fake, *groups, 5, k=2)
    assert len(found) == 6 and found[0] == prdc.precision_recall(real, fake, k=2)
    for group in range(5):
        x, y = real[groups[0] != group], fake[groups[1] != group]
        assert found[1 + group] == pytest.approx((covered(x, y, 2), covered(y, x, 2)))


def test_too_few_points_are_refused(sides):
    with pytest.raises(ValueError, match="3 generated items have no 3 neighbours"):
        prdc.precision_recall(sides[0], sides[1][:3])
