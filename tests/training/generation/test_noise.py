"""Random numbers by key have their distributions, and depend on nothing but their key."""

import numpy as np
import pytest
import torch
from scipy import stats

from training.generation.noise import KeyedNoise, SequentialNoise

POSITIONS = torch.arange(64).expand(2, -1)


def make(label="a", purpose="test", seeds=(3, 4), index=0):
    noise = KeyedNoise(purpose, seeds, index)
    noise.step(label)
    return noise


def test_distributions():
    noise = make()
    drawn = noise.race(POSITIONS, 2048)
    assert drawn.min() > 0 and torch.isfinite(drawn).all()
    assert stats.kstest(drawn.flatten(), "expon").pvalue > 1e-3
    assert stats.kstest(drawn.amin(-1).flatten() * 2048, "expon").pvalue > 1e-3  # where races are decided
    positions = torch.arange(20_000).expand(2, -1)
    assert stats.kstest(noise.normal(positions).flatten(), "norm").pvalue > 1e-3
    assert stats.kstest(noise.exponential(positions).flatten(), "expon").pvalue > 1e-3


def test_numbers_of_positions_codes_steps_and_seeds_are_not_correlated():
    rows = torch.cat([make(label).race(POSITIONS, 4096).flatten(0, 1) for label in ("a", "b")])
    correlations = torch.corrcoef(rows).fill_diagonal_(0)
    assert correlations.abs().max() < 6 / 4096**0.5
    # Of neighbours in a row, too.
    assert torch.corrcoef(torch.stack([rows[:, :-1].flatten(), rows[:, 1:].flatten()]))[0, 1].abs() < 0.01


def test_a_race_is_won_as_often_as_the_code_is_probable():
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125])
    drawn = make().race(torch.arange(20_000).expand(2, -1), 4)
    counts = (probabilities / drawn).argmax(-1).flatten().bincount(minlength=4)
    assert stats.chisquare(counts, 40_000 * probabilities.double()).pvalue > 1e-3


def test_a_number_depends_on_its_own_key_alone():
    whole = make().race(POSITIONS, 100)
    some = POSITIONS[:, torch.tensor([40, 3, 17])]
    assert torch.equal(make().race(some, 100), whole[:, [40, 3, 17]])
    codes = torch.randint(0, 100, (2, 64, 5), generator=torch.Generator().manual_seed(0))
    assert torch.equal(make().race(POSITIONS, 100, codes), whole.gather(2, codes))
    assert torch.equal(make(seeds=(4,)).race(POSITIONS[:1], 100), whole[1:])
    noise = make()
    noise.normal(POSITIONS)
    noise.permutations(9)
    assert torch.equal(noise.race(POSITIONS, 100), whole)


@pytest.mark.parametrize("other", [{"label": "b"}, {"purpose": "other"}, {"index": 1}, {"seeds": (5, 6)}])
def test_another_key_has_other_numbers(other):
    for draw in (lambda noise: noise.race(POSITIONS, 8), lambda noise: noise.permutations(50)):
        assert not torch.equal(draw(make()), draw(make(**other)))


def test_permutations():
    drawn = make().permutations(50)
    assert drawn.sort(1).values.tolist() == [list(range(50))] * 2
    assert not torch.equal(drawn[0], drawn[1])


def test_sequential_numbers_come_in_the_order_of_calls():
    noise, rng = SequentialNoise(np.random.RandomState(5), 2), np.random.RandomState(5)
    expected = [rng.standard_exponential((2, 64, 9)), rng.standard_normal((2, 64)), rng.standard_exponential((2, 64))]
    found = [noise.race(POSITIONS, 9), noise.normal(POSITIONS), noise.exponential(POSITIONS)]
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a.numpy(), b.astype(np.float32))
    assert noise.permutations(7).tolist() == [rng.permutation(7).tolist() for _ in range(2)]
