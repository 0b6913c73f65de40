"""Collectives over two gloo processes compared with one process, and start-up errors."""

import math

import pytest
import torch

from tests.ranks import run_ranks
from torch_utils import distributed

TWO_RANKS = """
import math
import torch
from torch_utils import distributed, training_stats

device = distributed.init("cpu")
rank = distributed.get_rank()
assert distributed.get_world_size() == 2 and device.type == "cpu"
distributed.print0("only once")

# Sums and means give new tensors.
value = torch.tensor([1.0, 10.0], dtype=torch.float64) * (rank + 1)
assert distributed.all_reduce_sum(value).tolist() == [3.0, 30.0]
assert distributed.all_reduce_mean(value).tolist() == [1.5, 15.0]
assert value.tolist() == [rank + 1.0, 10.0 * (rank + 1)]
assert distributed.broadcast_object({"rank": rank}) == {"rank": 0}
assert distributed.any_rank([rank == 1, False, True]) == [True, False, True]

# An error of one rank is an error of all, users' errors as such; ranks without one say whose it was.
for kind, raised in ((ValueError, distributed.SharedError), (AssertionError, [RuntimeError, AssertionError][rank])):
    try:
        with distributed.together():
            if rank == 1:
                raise kind("no such file")
    except Exception as error:
        assert type(error) is raised and str(error) == ("no such file" if rank else "rank 1: no such file"), error
    else:
        raise AssertionError("went on")
with distributed.together():
    pass

# A rank that failed waits elsewhere, so that the others can finish what they are in the midst of.
if rank == 1:
    errors = distributed.gather_errors(KeyError("x"))
    assert distributed.all_reduce_sum(torch.ones(3)).tolist() == [2.0] * 3
else:
    work = torch.distributed.all_reduce(torch.ones(3), async_op=True)
    errors = distributed.gather_errors(None)
    work.wait()
assert errors[0] is None and str(errors[1]) == ("'x'" if rank else "rank 1: 'x'")

# Parameters and buffers become those of rank 0, whatever their dtype or layout.
torch.manual_seed(rank)
module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
module[0].weight.data = torch.randn(3, 2).T
module[1].num_batches_tracked.fill_(rank + 7)
distributed.broadcast_module(module)
torch.manual_seed(0)
reference = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
assert torch.equal(module[0].weight, torch.randn(3, 2).T)
assert torch.equal(module[0].bias, reference[0].bias)
assert module[1].num_batches_tracked == 7

# Gradients: the mean over ranks times the gain, in their own dtype, with the non-finite entries cured and counted.
params = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4, dtype=torch.float64)),
          torch.nn.Parameter(torch.zeros(1))]
params[0].grad = torch.arange(6.0).view(2, 3) * (rank + 1)
params[1].grad = torch.tensor([1 / 3, math.nan, math.inf, -math.inf], dtype=torch.float64)
if rank == 1:
    params[1].grad[2:] = 0
assert distributed.sync_grads(params, gain=0.5) == 3
assert torch.equal(params[0].grad, torch.arange(6.0).view(2, 3) * 0.75)
assert params[1].grad.tolist() == [1 / 6, 0.0, 1e5, -1e5] and params[2].grad is None

# Statistics cover both ranks; `report0` only the first.
collector = training_stats.Collector("two/.*")
training_stats.report("two/all", torch.tensor([1.0, 2.0]) + 10 * rank)
training_stats.report0("two/main", float(rank + 5))
training_stats.report("two/late" if rank else "two/early", [])
training_stats.report("two/early" if rank else "two/late", [4.0])
state = collector.state_dict()
collector.update()
assert collector.num("two/all") == 4 and collector["two/all"] == 6.5
assert collector["two/main"] == 5 and collector.num("two/main") == 1 and collector["two/late"] == 4
resumed = training_stats.Collector("two/.*")
resumed.load_state_dict(state)
resumed.update()
assert resumed.as_dict() == collector.as_dict()

distributed.shorten_timeout()
distributed.barrier()
distributed.shutdown()
assert distributed.get_world_size() == 1
"""


def test_two_ranks(tmp_path):
    ranks = run_ranks(TWO_RANKS)
    assert [code for code, *_ in ranks] == [0, 0], ranks
    assert [output for _, output, _ in ranks] == ["only once\n", ""]


def test_one_process_needs_no_group(monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.init("cpu") == torch.device("cpu")
    assert not torch.distributed.is_initialized()
    assert (distributed.get_rank(), distributed.get_world_size(), distributed.is_main()) == (0, 1, True)
    distributed.print0("hello")
    assert capsys.readouterr().out == "hello\n"
    value = torch.tensor([1.0, 2.0])
    assert torch.equal(distributed.all_reduce_sum(value), value)
    assert torch.equal(distributed.all_reduce_mean(value), value)
    distributed.barrier()
    assert distributed.any_rank([True, False]) == [True, False]
    with pytest.raises(ValueError, match="^as it was$") as caught, distributed.together():
        raise ValueError("as it was")
    assert caught.type is ValueError
    distributed.shorten_timeout()
    distributed.shutdown()


def test_gradients_of_one_process_are_scaled_and_made_finite():
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    params[0].grad = torch.tensor([1.0, math.nan, -math.inf])
    assert distributed.sync_grads(iter(params), gain=16.0) == 2
    assert params[0].grad.tolist() == [16.0, 0.0, -1e5] and params[1].grad is None
    assert distributed.sync_grads([]) == 0
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in (3, (2, 2))]
    params[0].grad = torch.tensor([3e38, 3e38, 1.0])  # whose sum is not finite, though all entries are
    params[1].grad = torch.tensor([[1.0, 2.0], [math.inf, 4.0]]).t()
    assert distributed.sync_grads(params) == 1
    assert params[0].grad.tolist() == pytest.approx([3e38, 3e38, 1.0]) and params[1].grad.tolist() == [[1, 1e5], [2, 4]]


def test_the_norm_of_all_gradients():
    gradients = [torch.randn(7, 5), torch.randn(4, 6).t(), torch.randn(())]
    expected = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    torch.testing.assert_close(distributed.total_norm(gradients), expected)
    assert distributed.total_norm([]) == 0


def test_an_incomplete_environment_is_refused(monkeypatch):
    for name in distributed.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match="RANK, LOCAL_RANK, MASTER_PORT is not set; start with torchrun"):
        distributed.init("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="--device cpu"):
        distributed.init("cuda")
