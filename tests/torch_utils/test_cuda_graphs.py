"""Replayed networks: the network's own calls on a CPU, the same numbers on a GPU."""

import pytest
import torch
from torch import nn

from benchmarks.cuda_graphs import NETWORKS
from torch_utils import cuda_graphs
from torch_utils.cuda_graphs import Replayed, replayed

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Sum(nn.Module):
    """a + w b, where b may be absent; counts its calls."""

    factor = 3

    def __init__(self):
        super().__init__()
        self.weight, self.num_calls = nn.Parameter(torch.tensor(2.0)), 0

    def forward(self, a, b=None):
        self.num_calls += 1
        return a if b is None else a + self.weight * b


def test_a_network_on_a_cpu_is_returned_as_it_is():
    network = Sum()
    assert replayed(network) is network


@torch.no_grad()
def test_calls_on_a_cpu_are_those_of_the_network():
    network = Sum()
    other, x = Replayed(network), torch.arange(3.0)
    assert torch.equal(other(x, x), 3 * x) and torch.equal(other(x), x) and network.num_calls == 2
    assert other.factor == 3 and not other.recordings


@pytest.mark.gpu
@NEEDS_GPU
@torch.no_grad()
def test_a_graph_gives_the_numbers_of_new_arguments(monkeypatch):
    network = Sum().cuda()
    other = replayed(network)
    assert isinstance(other, Replayed)
    first = other(torch.ones(2, device="cuda"), torch.ones(2, device="cuda"))
    calls = network.num_calls
    second = other(torch.ones(2, device="cuda"), torch.full((2,), 5.0, device="cuda"))
    assert first.tolist() == [3, 3] and second.tolist() == [11, 11] and network.num_calls == calls
    for size in range(3, 10):
        assert other(torch.ones(size, device="cuda"), torch.ones(size, device="cuda")).tolist() == [3] * size
    assert len(other.recordings) == cuda_graphs.MAX_RECORDINGS
    monkeypatch.setenv(cuda_graphs.SWITCH, "0")
    assert replayed(network) is network


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("name", list(NETWORKS))
@torch.no_grad()
def test_networks_of_frames_are_replayed(name):
    make, copied = NETWORKS[name]
    network, arguments = make(2, "cuda")
    plain = copied(network)
    other = replayed(plain)
    for _ in range(2):
        torch.testing.assert_close(other(*arguments), plain(*arguments))
