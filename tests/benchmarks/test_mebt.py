"""The formulation of the release, against which MeBT is measured, computes the same."""

import pytest
import torch

from benchmarks import mebt
from training.generation.draft_revise import Query
from training.mebt.modes import stack
from training.mebt.networks import MeBT


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = MeBT(50, (4, 2, 2), 16, 2, 3, stack(3, 2), residual="normalised").eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.mul_(3)
    return network


@pytest.mark.parametrize("visible", [0, 5])
def test_logits_of_the_release(network, visible):
    order = torch.arange(16).flip(0).expand(2, -1)
    query = Query(order % 50, order[:, :visible], order[:, visible:], 16 - visible)
    (logits,) = mebt.released_logits(network, query)
    assert torch.allclose(logits, network(query.codes, query.contexts, query.targets), atol=1e-5)


@pytest.mark.parametrize("work", [mebt.draft_and_revise, mebt.draft_pass, mebt.revise_pass])
def test_ids_of_the_release(network, work, monkeypatch):
    monkeypatch.setattr(mebt, "CODES", 50)
    with torch.no_grad():
        found, expected = (work(16)(way(network)) for way in (mebt.ours, mebt.released))
    assert torch.equal(found, expected) and len(found.unique()) > 3
