"""Batch norm over ranks equals batch norm of the joint batch."""

import json

import pytest
import torch

from tests.ranks import run_ranks
from training.modules.norms import BatchNorm, make_norm

RANKS = """
import json
import torch
from torch_utils import distributed
from training.modules.norms import BatchNorm

distributed.init()
rank = distributed.get_rank()
norm = BatchNorm(3)
torch.manual_seed(0)
x, weight = torch.randn(4, 3, 5, 2) + 10, torch.randn(4, 3, 5, 2)
own = slice(2 * rank, 2 * rank + 2)
part = x[own].clone().requires_grad_(True)
y = norm(part)
(y * weight[own]).sum().backward()
found = {"y": y.tolist(), "grad": part.grad.tolist(), "weight": norm.weight.grad.tolist()}
print(json.dumps(found | {"mean": norm.running_mean.tolist(), "var": norm.running_var.tolist()}))
distributed.shutdown()
"""


def test_two_ranks_equal_one_process():
    results = run_ranks(RANKS)
    assert [code for code, _, _ in results] == [0, 0], results[0][2] + results[1][2]
    ranks = [json.loads(printed) for _, printed, _ in results]
    torch.manual_seed(0)
    x, weight = (torch.randn(4, 3, 5, 2) + 10).requires_grad_(True), torch.randn(4, 3, 5, 2)
    norm = BatchNorm(3)
    y = norm(x)
    (y * weight).sum().backward()
    assert x.grad is not None and norm.weight.grad is not None
    for name, whole in (("y", y), ("grad", x.grad)):
        torch.testing.assert_close(torch.tensor(ranks[0][name] + ranks[1][name]), whole, atol=2e-5, rtol=1e-4)
    for rank in ranks:
        torch.testing.assert_close(torch.tensor(rank["mean"]), norm.running_mean)
        torch.testing.assert_close(torch.tensor(rank["var"]), norm.running_var)
    both = torch.tensor(ranks[0]["weight"]) + torch.tensor(ranks[1]["weight"])
    torch.testing.assert_close(both, norm.weight.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_alone_it_is_the_ordinary_one(axes):
    x = torch.randn(4, 3, *[5] * axes)
    ordinary = {1: torch.nn.BatchNorm1d, 2: torch.nn.BatchNorm2d, 3: torch.nn.BatchNorm3d}[axes](3)
    norm = BatchNorm(3)
    assert torch.equal(norm(x), ordinary(x))
    assert norm.state_dict().keys() == ordinary.state_dict().keys()


def test_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="use batch or group"):
        make_norm("layer", 32)
