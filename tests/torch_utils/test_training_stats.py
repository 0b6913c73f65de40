"""Reported statistics compared with NumPy, over updates, collectors, saved states and ranks."""

import math

import numpy as np
import pytest
import torch

from torch_utils import training_stats


def test_moments_agree_with_numpy_and_the_value_is_returned():
    rng = np.random.RandomState(0)
    collector = training_stats.Collector("moments/.*")
    values = [rng.standard_normal(shape).astype(np.float32) for shape in [(3, 4), (5,), ()]]
    for value in values:
        tensor = torch.from_numpy(np.asarray(value)).requires_grad_()
        assert training_stats.report("moments/a", tensor) is tensor
    assert training_stats.report("moments/number", 2.5) == 2.5
    collector.update()
    flat = np.concatenate([value.ravel() for value in values]).astype(np.float64)
    assert collector.num("moments/a") == 18
    assert collector.mean("moments/a") == collector["moments/a"] == pytest.approx(flat.mean(), rel=1e-12)
    assert collector.std("moments/a") == pytest.approx(flat.std(), rel=1e-6)
    assert collector.std("moments/number") == 0
    assert collector.as_dict()["moments/number"] == {"num": 1, "mean": 2.5, "std": 0.0}


def test_names_match_as_a_whole_and_collectors_do_not_disturb_each_other():
    everything, signs = training_stats.Collector("whole/.*"), training_stats.Collector("whole/sign")
    training_stats.report("whole/sign", torch.ones(4))
    training_stats.report("whole/sign_of_life", torch.ones(4))
    assert signs.names() == ["whole/sign"]
    signs.update()
    training_stats.report("whole/sign", torch.zeros(4))
    signs.update()
    everything.update()
    assert signs["whole/sign"] == 0
    assert everything["whole/sign"] == 0.5 and everything.num("whole/sign") == 8


def test_a_new_collector_starts_from_now():
    training_stats.report("now/a", 1.0)
    collector = training_stats.Collector("now/.*")
    assert collector.num("now/a") == 0 and math.isnan(collector["now/a"]) and math.isnan(collector.std("now/a"))
    training_stats.report("now/a", 3.0)
    collector.update()
    assert collector["now/a"] == 3


@pytest.mark.parametrize("keep_previous", [True, False])
def test_what_received_nothing_keeps_its_moments_only_when_asked(keep_previous):
    collector = training_stats.Collector("keep/.*", keep_previous=keep_previous)
    training_stats.report("keep/a", [1.0, 2.0])
    collector.update()
    training_stats.report("keep/a", [])
    collector.update()
    assert collector.num("keep/a") == (2 if keep_previous else 0)


def test_an_empty_value_registers_its_name():
    training_stats.report("empty/a", torch.empty(0))
    assert training_stats.Collector("empty/.*").names() == ["empty/a"]


def test_what_was_reported_before_rounds_nothing():
    """A run that goes on in a process that saw large values has the moments of one that began anew, bit for bit."""
    collector = training_stats.Collector("exact/.*")
    training_stats.report("exact/a", [1e12, 1e12])
    collector.update()
    value = torch.tensor([1.1, 2.3])
    training_stats.report("exact/a", value)
    collector.update()
    state = collector.state_dict()["moments"]["exact/a"]
    assert state == [2, value.double().sum(), value.square().double().sum(), 0]


def test_a_nonfinite_value_is_counted_and_excluded_from_moments():
    collector = training_stats.Collector("nan/.*")
    training_stats.report("nan/a", [1.0, math.nan, 3.0, math.inf])
    collector.update()
    assert collector["nan/a"] == 2 and collector.num("nan/a") == 2 and collector.num_nonfinite("nan/a") == 2
    assert collector.as_dict()["nan/a"]["nonfinite"] == 2
    training_stats.report("nan/a", [math.nan])
    collector.update()
    assert math.isnan(collector["nan/a"]) and collector.num("nan/a") == 0
    training_stats.report("nan/a", [5.0])
    collector.update()
    assert collector["nan/a"] == 5 and "nonfinite" not in collector.as_dict()["nan/a"]


def test_a_saved_collector_goes_on_with_what_was_pending():
    whole = training_stats.Collector("saved/.*")
    training_stats.report("saved/a", [1.0, 2.0])
    whole.update()
    training_stats.report("saved/a", [3.0])
    state = whole.state_dict()
    assert whole["saved/a"] == 1.5  # saving takes nothing away and updates nothing

    training_stats.report("saved/a", [100.0])  # what happens between saving and restoring is forgotten
    resumed = training_stats.Collector("saved/.*")
    resumed.load_state_dict(state)
    assert resumed["saved/a"] == 1.5
    training_stats.report("saved/a", [5.0])
    resumed.update()
    assert resumed["saved/a"] == 4 and resumed.num("saved/a") == 2
