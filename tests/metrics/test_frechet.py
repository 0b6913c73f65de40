"""Frechet distance against closed forms and scipy; accumulated statistics against numpy, on one and two ranks."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics.frechet import FeatureStats, frechet_distance, frechet_distance_from_features
from tests.ranks import run_ranks


def random_features(seed: int, num: int, dim: int, scale: float = 1.0, offset: float = 0.0) -> np.ndarray:
    """Correlated Gaussian vectors."""
    rng = np.random.RandomState(seed)
    return rng.standard_normal((num, dim)) @ rng.standard_normal((dim, dim)) * scale + offset


def numpy_frechet(a: np.ndarray, b: np.ndarray) -> float:
    cov_a, cov_b = np.cov(a.T, bias=True), np.cov(b.T, bias=True)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * np.real(root))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12))
def test_diagonal_gaussians_have_a_closed_form(seed: int, dim: int):
    rng = np.random.RandomState(seed)
    mu, sigma = rng.standard_normal((2, dim)), rng.random_sample((2, dim)) * 3
    expected = np.square(mu[0] - mu[1]).sum() + np.square(sigma[0] - sigma[1]).sum()
    found = frechet_distance(mu[0], np.diag(sigma[0] ** 2), mu[1], np.diag(sigma[1] ** 2))
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("num", [6, 40])
def test_distance_to_itself_is_zero_and_translation_is_the_squared_length(num: int):
    x = random_features(0, num, 10)
    shift = np.arange(10.0)
    assert frechet_distance_from_features(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance_from_features(x, x + shift) == pytest.approx((shift**2).sum(), rel=1e-9)


def test_rotation_changes_nothing_and_scale_squares():
    a, b = random_features(1, 50, 8), random_features(2, 60, 8, offset=1)
    rotation = scipy.linalg.qr(np.random.RandomState(3).standard_normal((8, 8)))[0]
    plain = frechet_distance_from_features(a, b)
    assert frechet_distance_from_features(a @ rotation, b @ rotation) == pytest.approx(plain, rel=1e-9)
    assert frechet_distance_from_features(3 * a, 3 * b) == pytest.approx(9 * plain, rel=1e-9)


@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_equals_scipy_sqrtm(offset: float):
    a, b = random_features(4, 200, 30, offset=offset), random_features(5, 150, 30, 1.2, offset)
    assert frechet_distance_from_features(a, b) == pytest.approx(numpy_frechet(a, b), rel=1e-9)


def test_equals_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    a, b = random_features(4, 200, 30, offset=5), random_features(5, 150, 30, 1.2)
    moments = [torch.from_numpy(x) for f in (a, b) for x in (f.mean(0), np.cov(f.T))]
    expected = float(fid._compute_fid(*moments))
    assert frechet_distance_from_features(a, b, is_unbiased=True) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("num_a", "num_b"), [(20, 12), (12, 100), (100, 12), (40, 39)])
def test_low_rank_path_equals_the_covariance_path(num_a: int, num_b: int):
    a, b = random_features(6, num_a, 40), random_features(7, num_b, 40, offset=0.5)
    moments = [x for f in (a, b) for x in (f.mean(0), np.cov(f.T, bias=True))]
    assert frechet_distance_from_features(a, b) == pytest.approx(frechet_distance(*moments), rel=1e-6)


def test_a_feature_that_is_not_a_number_is_not_hidden():
    mu, sigma = np.array([np.nan, 0.0]), np.eye(2)
    assert np.isnan(frechet_distance(mu, sigma, np.zeros(2), sigma))


def test_accumulation_equals_numpy_however_far_from_zero():
    x = random_features(8, 37, 6, offset=1e4)
    weights = np.random.RandomState(9).random_sample(37) + 0.1
    plain, weighted = FeatureStats(6), FeatureStats(6)
    for items in np.array_split(np.arange(37), 7):
        plain.append(torch.from_numpy(x[items]))
        weighted.append(x[items], weights[items])
    np.testing.assert_allclose(plain.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(plain.covariance(), np.cov(x.T, bias=True), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(plain.covariance(is_unbiased=True), np.cov(x.T), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(weighted.mean, np.average(x, axis=0, weights=weights), rtol=1e-14)
    expected = np.cov(x.T, bias=True, aweights=weights)
    np.testing.assert_allclose(weighted.covariance(), expected, rtol=1e-9, atol=1e-9)


def test_groups_of_vectors_can_be_left_out_merged_and_stored():
    x, groups = random_features(11, 30, 4, offset=20), np.arange(30) % 6
    stats = FeatureStats.from_arrays(FeatureStats.of(x, groups=groups, num_groups=6).arrays())
    np.testing.assert_allclose(stats.covariance(), np.cov(x.T, bias=True), rtol=1e-10)
    for group in range(6):
        np.testing.assert_allclose(stats.without(group).mean, x[groups != group].mean(0), rtol=1e-12)
        expected = np.cov(x[groups != group].T, bias=True)
        np.testing.assert_allclose(stats.without(group).covariance(), expected, rtol=1e-10)
    merged = stats.regrouped(4).select([1, 3])
    assert merged.count == sum(groups % 4 == 1) + sum(groups % 4 == 3)
    np.testing.assert_allclose(merged.mean, x[(groups % 4) % 2 == 1].mean(0), rtol=1e-12)


@pytest.mark.parametrize("num", [9, 60])
def test_weights_count_as_repetition(num: int):
    """A weight of two is the vector twice, on the path of few vectors and on that of many."""
    a, b = random_features(12, num, 12), random_features(13, num, 12, offset=0.3)
    twice = np.concatenate([a, a[:3]])
    weights = np.where(np.arange(num) < 3, 2.0, 1.0)
    found = frechet_distance_from_features(a, b, weights)
    assert found == pytest.approx(frechet_distance_from_features(twice, b), rel=1e-6)


@pytest.mark.parametrize("num", [9, 60])
def test_unbiased_covariances_are_those_of_numpy(num: int):
    a, b = random_features(14, num, 12), random_features(15, num, 12, offset=0.3)
    moments = [x for f in (a, b) for x in (f.mean(0), np.cov(f.T))]
    found = frechet_distance_from_features(a, b, is_unbiased=True)
    assert found == pytest.approx(frechet_distance(*moments), rel=1e-6)


RANKS = """
import sys, numpy as np, torch
from metrics.frechet import FeatureStats
from torch_utils import distributed
distributed.init("cpu")
rank, world = distributed.get_rank(), distributed.get_world_size()
x = np.load(sys.argv[1])
stats = FeatureStats(x.shape[1], num_groups=3)
items = np.arange(rank, len(x), world)
for part in (items[:3], items[3:]):
    stats.append(x[part], 1.0 / (1 + part), part % 3)
stats.reduce()
left = stats.without(2)
np.savez(sys.argv[2] + str(rank), mean=stats.mean, covariance=stats.covariance(), left=left.covariance())
distributed.shutdown()
"""


def test_two_ranks_equal_one(tmp_path: Path):
    x = random_features(10, 11, 5, offset=100)
    np.save(tmp_path / "x.npy", x)
    ranks = run_ranks(RANKS, tmp_path / "x.npy", tmp_path / "rank")
    assert [code for code, *_ in ranks] == [0, 0], ranks
    for rank in range(2):
        with np.load(tmp_path / f"rank{rank}.npz") as found:
            weights, kept = 1 / (1 + np.arange(11.0)), np.arange(11) % 3 != 2
            np.testing.assert_allclose(found["mean"], np.average(x, axis=0, weights=weights), rtol=1e-13)
            np.testing.assert_allclose(found["covariance"], np.cov(x.T, bias=True, aweights=weights), rtol=1e-10)
            expected = np.cov(x[kept].T, bias=True, aweights=weights[kept])
            np.testing.assert_allclose(found["left"], expected, rtol=1e-10)
