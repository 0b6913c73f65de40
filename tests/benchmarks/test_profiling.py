"""Classification of operations by kind of work, inside composed operators and in backward passes."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks import profiling
from torch_utils.ops import backends, bias_act, filtered_lrelu, upfirdn2d

TAPS = torch.ones(12) / 12


def filter_and_back(order: int) -> None:
    """Return a filter, and its backward pass so many times over; all of it is made of convolutions here."""
    with backends.using("ref"):
        x = torch.randn(2, 8, 64, 64, requires_grad=True)
        y = filtered_lrelu.filtered_lrelu(x, TAPS, TAPS, up=2, down=2, padding=10)
        for _ in range(order):
            (y,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_what_an_operator_is_made_of_is_a_filter_and_so_are_its_derivatives(order):
    shares = profiling.shares(lambda: filter_and_back(order))
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["filters"] > 0.6 and shares["convolutions"] == 0


def test_kinds_are_distinguished():
    x, weight = torch.randn(2, 64, 48, 48, requires_grad=True), torch.randn(64, 64, 3, 3, requires_grad=True)

    def work() -> None:
        y = F.conv2d(x, weight, padding=1)
        y = bias_act.bias_act(y, torch.zeros(64), act="lrelu")
        y = upfirdn2d.downsample2d(y, TAPS)
        (y.flatten(2) @ y.flatten(2).mT).sum().backward()

    shares = profiling.shares(work)
    assert set(shares) == set(profiling.KINDS)
    assert all(shares[kind] > 0 for kind in profiling.KINDS)
    shares = profiling.shares(lambda: F.conv2d(x, weight, padding=1).sum().backward())
    assert shares["convolutions"] > 0.5 and shares["filters"] == shares["bias and activation"] == 0


def test_operators_are_restored_afterwards():
    before = filtered_lrelu.filtered_lrelu, upfirdn2d.upfirdn2d, bias_act.bias_act
    with pytest.raises(KeyError), profiling.marked_operators():
        assert upfirdn2d.upfirdn2d is not before[1]
        raise KeyError
    assert (filtered_lrelu.filtered_lrelu, upfirdn2d.upfirdn2d, bias_act.bias_act) == before
