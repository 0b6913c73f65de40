"""Filters and draws of tokens: published numbers, and properties."""

import numpy as np
import pytest
import torch

from tests import golden_files
from training.generation.token_sampling import (
    Draw,
    draw_sequence,
    draw_tokens,
    filter_logits,
    filter_logits_fast,
    uniform_numbers,
)


@golden_files.entries("tats", "filter*")
def test_filter_keeps_the_published_tokens(entry, golden):
    for case in entry:
        logits = torch.tensor(case["logits"])
        for function in (filter_logits, filter_logits_fast):
            kept = function(logits, case["top_k"], case["top_p"]).isfinite()
            assert [row.nonzero().flatten().tolist() for row in kept] == case["kept"]


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 0.7), (40, 0.92), (1, 0.3), (0, 0.5), (7, 1.0), (64, 0.9)])
def test_fast_filter_equals_the_reference(top_k, top_p):
    logits = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * 3
    assert torch.equal(filter_logits_fast(logits, top_k, top_p), filter_logits(logits, top_k, top_p))


def test_ties_at_the_last_of_top_k_stay_and_count_in_the_nucleus():
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]])
    for function in (filter_logits, filter_logits_fast):
        assert function(logits, 2, 0.99).isfinite().tolist() == [[True, True, True, True, False]]


def test_conventions_differ_where_a_sum_equals_top_p():
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    assert filter_logits(logits, 0, 0.5, inclusive=True).isfinite().tolist() == [[True, True, False]]
    assert filter_logits(logits, 0, 0.5, inclusive=False).isfinite().tolist() == [[True, False, False]]


def test_without_top_k_there_is_no_nucleus_either():
    logits = torch.randn(2, 9)
    assert torch.equal(filter_logits(logits, None, 0.1), logits)


def test_draws_follow_the_probabilities_and_skip_filtered_tokens():
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3]).log().expand(10_000, -1)
    uniforms = torch.from_numpy((np.arange(10_000) + 0.5) / 10_000)
    counts = draw_tokens(logits, uniforms).bincount(minlength=4)
    assert counts.tolist() == [2000, 0, 5000, 3000]


def test_the_largest_uniform_number_never_draws_a_filtered_token():
    logits = torch.tensor([[0.3, 1.7, -torch.inf]])
    assert draw_tokens(logits, torch.tensor([1 - 2.0**-53], dtype=torch.float64)).tolist() == [1]


def test_numbers_of_a_seed_do_not_depend_on_the_seeds_beside_it():
    together = uniform_numbers("test", [3, 5], 2, 7)
    assert torch.equal(uniform_numbers("test", [5], 2, 7)[0], together[1])
    assert not torch.equal(together[0], together[1])


def test_a_sequence_feeds_each_token_but_the_last():
    fed = []

    def advance(tokens):
        fed.append(tokens.tolist())
        return torch.nn.functional.one_hot((tokens + 1) % 5, 5) * 50.0

    uniforms = torch.full((2, 4), 0.5, dtype=torch.float64)
    first = torch.nn.functional.one_hot(torch.tensor([0, 3]), 5) * 50.0
    assert draw_sequence(first, advance, uniforms, Draw(top_k=2)).tolist() == [[0, 1, 2, 3], [3, 4, 0, 1]]
    assert fed == [[0, 3], [1, 4], [2, 0]]


@pytest.mark.parametrize("values", [{"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"temperature": -1.0}])
def test_values_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Draw(**values)
