"""Kernel distances against loops over all pairs."""

import itertools

import numpy as np
import pytest
import torch

from metrics import kernel


def brute_force(x: np.ndarray, y: np.ndarray) -> float:
    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    def within(z: np.ndarray) -> float:
        return float(np.mean([k(a, b) for a, b in itertools.permutations(z, 2)]))

    return float(within(x) + within(y) - 2 * np.mean([k(a, b) for a in x for b in y]))


@pytest.fixture
def sides() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.RandomState(0)
    return rng.standard_normal((11, 5)), rng.standard_normal((8, 5)) * 1.3 + 0.2


def test_distance_is_the_mean_over_all_pairs(sides, monkeypatch: pytest.MonkeyPatch):
    expected = brute_force(*sides)
    assert kernel.polynomial_distance(*sides) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(kernel, "ROWS_AT_ONCE", 3)
    assert kernel.polynomial_distance(*sides) == pytest.approx(expected, rel=1e-12)


def test_sums_by_groups_give_what_is_left_without_one(sides):
    x, y = sides
    groups_x, groups_y = np.arange(11) % 4, np.arange(8) % 4
    sums = kernel.kernel_sums(x, y, groups_x, groups_y, 4)
    for group in range(4):
        expected = brute_force(x[groups_x != group], y[groups_y != group])
        assert sums.distance(torch.arange(4) != group) == pytest.approx(expected, rel=1e-10)
    even = groups_x % 2 == 0
    expected = brute_force(x[even], x[~even])
    assert sums.real_distance(torch.arange(4) % 2 == 0) == pytest.approx(expected, rel=1e-10)


def test_the_same_distribution_gives_zero_on_average():
    rng = np.random.RandomState(1)
    values = [kernel.polynomial_distance(*rng.standard_normal((2, 20, 6))) for _ in range(200)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 200**0.5
    assert min(values) < 0, "unbiased values fall on both sides of zero"


def test_distance_is_that_of_torchmetrics():
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = (torch.from_numpy(side) for side in np.random.RandomState(2).standard_normal((2, 30, 7)) + 0.3)
    expected = float(kid.poly_mmd(x, y * 1.2))
    assert kernel.polynomial_distance(x, y * 1.2) == pytest.approx(expected, rel=1e-9)
