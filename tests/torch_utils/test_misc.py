"""Small torch helpers."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_utils import misc


class Block(torch.nn.Module):
    """Parameters, buffers, and a part used twice."""

    def __init__(self, size: int = 3):
        super().__init__()
        self.first = torch.nn.Linear(size, size)
        self.norm = torch.nn.BatchNorm1d(size)
        self.relu = torch.nn.ReLU()
        self.last = torch.nn.Sequential(torch.nn.Linear(size, 2, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.relu(self.norm(self.relu(self.first(x)))))


def test_constant_is_made_once():
    a = misc.constant([1, 2, 3], dtype=torch.float64)
    assert torch.equal(a, torch.tensor([1, 2, 3], dtype=torch.float64))
    assert misc.constant((1, 2, 3), dtype=torch.float64) is a
    assert misc.constant([1, 2, 3]).dtype == torch.get_default_dtype()
    assert misc.constant([1, 2, 4], dtype=torch.float64) is not a
    assert misc.constant([1.0, 2.0, 3.0], shape=[2, 3]).shape == (2, 3)
    # Equal bytes, unequal meaning.
    assert misc.constant(np.int64(1), dtype=torch.float64) == 1
    assert misc.constant(np.int64(1).view(np.float64), dtype=torch.float64) != 1


def test_constant_keeps_its_own_copy():
    array = np.ones(3, dtype=np.float32)
    tensor = misc.constant(array)
    array[:] = 7
    assert torch.equal(tensor, torch.ones(3)) and torch.equal(misc.constant(np.ones(3, np.float32)), torch.ones(3))


def test_constant_memory_format():
    tensor = misc.constant(np.zeros((1, 2, 3, 4)), memory_format=torch.channels_last)
    assert tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def test_upload_of_arrays_and_tensors():
    array = np.arange(6.0).reshape(2, 3)
    assert torch.equal(misc.upload(array, "cpu"), torch.arange(6.0, dtype=torch.float64).view(2, 3))
    assert misc.upload(array, torch.device("cpu"), torch.float16).dtype == torch.float16
    assert misc.upload(torch.tensor([True, False]), "cpu").tolist() == [True, False]
    assert misc.upload(array, "meta", torch.float32).is_meta


def test_assert_shape():
    misc.assert_shape(torch.zeros(2, 3, 4), [2, None, 4])
    for wrong in ([2, 3], [2, 3, 4, None], [None, None, 5]):
        with pytest.raises(AssertionError, match=r"shape is \(2, 3, 4\)"):
            misc.assert_shape(torch.zeros(2, 3, 4), wrong)


def test_profiled_function_shows_in_the_profile():
    @misc.profiled_function
    def a_name_to_find(x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert torch.equal(a_name_to_find(torch.ones(2), factor=3), torch.full([2], 3.0))
    assert "a_name_to_find" in [event.key for event in profile.key_averages()]
    assert a_name_to_find.__name__ == "a_name_to_find"


def test_tracer_warnings_are_silent_inside_only():
    kind = torch.jit.TracerWarning  # pyright: ignore[reportPrivateImportUsage]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        num_filters = len(warnings.filters)
        with misc.suppress_tracer_warnings():
            warnings.warn("traced", kind, stacklevel=1)
            with pytest.raises(UserWarning):
                warnings.warn("other", UserWarning, stacklevel=1)
        assert len(warnings.filters) == num_filters
        with pytest.raises(kind):
            warnings.warn("traced", kind, stacklevel=1)


def test_params_and_buffers_are_listed():
    block = Block()
    names = [name for name, _ in misc.named_params_and_buffers(block)]
    assert names == [
        *("first.weight", "first.bias", "norm.weight", "norm.bias", "last.0.weight"),
        *("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"),
    ]
    named = [tensor for _, tensor in misc.named_params_and_buffers(block)]
    assert list(map(id, misc.params_and_buffers(block))) == list(map(id, named))


def test_copy_params_and_buffers():
    src, dst = Block().requires_grad_(False), Block()
    src(torch.randn(5, 3))
    dst.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(AssertionError, match="no tensor 'extra'"):
        misc.copy_params_and_buffers(src, dst, require_all=True)
    misc.copy_params_and_buffers(src, dst)
    copied = dict(misc.named_params_and_buffers(dst))
    for name, tensor in misc.named_params_and_buffers(src):
        assert torch.equal(copied[name], tensor) and copied[name] is not tensor
    assert all(parameter.requires_grad for parameter in dst.parameters())


def test_nan_to_num():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 2.0])
    assert misc.nan_to_num(x, nan=0, posinf=1e5, neginf=-1e5).tolist() == [0, 1e5, -1e5, 2]


def test_print_module_summary(capsys: pytest.CaptureFixture[str]):
    block, x = Block().eval(), torch.randn(4, 3)
    outputs = misc.print_module_summary(block, [x])
    assert torch.equal(outputs, block(x))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1:] == [
        ["first", "12", "0", "[4,", "3]", "float32"],
        ["norm", "6", "7", "[4,", "3]", "float32"],
        ["last.0", "6", "0", "[4,", "2]", "float32"],
        ["<top-level>", "0", "0", "[4,", "2]", "float32"],
        ["total", "24", "7"],
    ]
    misc.print_module_summary(block, [x], max_nesting=1, skip_redundant=False)
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert names == ["first", "relu", "norm", "last", "<top-level>", "total"]


def take(sampler: misc.InfiniteSampler, count: int) -> list[int]:
    iterator = iter(sampler)
    return [next(iterator) for _ in range(count)]


def test_sampler_without_shuffling_is_the_order_itself():
    data = range(5)
    assert take(misc.InfiniteSampler(data, shuffle=False), 8) == [0, 1, 2, 3, 4, 0, 1, 2]
    assert take(misc.InfiniteSampler(data, shuffle=False, rank=1, num_replicas=2), 5) == [1, 3, 0, 2, 4]


def test_sampler_shares_one_order_between_ranks():
    data = range(100)
    whole = take(misc.InfiniteSampler(data, seed=3), 300)
    shares = [take(misc.InfiniteSampler(data, seed=3, rank=rank, num_replicas=3), 100) for rank in range(3)]
    assert [shares[i % 3][i // 3] for i in range(300)] == whole
    assert sorted(whole[:100]) != whole[:100] and whole[:100] != whole[100:200]
    assert take(misc.InfiniteSampler(data, seed=4), 300) != whole
    # Every item comes about as often as every other.
    counts = np.bincount(take(misc.InfiniteSampler(data), 10_000))
    assert counts.min() >= 80 and counts.max() <= 120


def test_sampler_of_one_item_ends_never():
    assert take(misc.InfiniteSampler(range(1)), 4) == [0, 0, 0, 0]


def compare_ranks(rank: int, path: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    block = Block()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(float("nan") if parameter.ndim == 1 else 0.5)
    misc.check_ddp_consistency(block)
    if rank == 1:
        block.norm.running_mean += 1  # type: ignore[operator]
    misc.check_ddp_consistency(block, ignore_regex=r"Block\.norm\.running_.*")
    if rank == 1:
        with pytest.raises(AssertionError, match=r"Block\.norm\.running_mean differs"):
            misc.check_ddp_consistency(block, ignore_regex=r"Block\.(norm\.running_var|norm\.num.*)")
    else:
        misc.check_ddp_consistency(block, ignore_regex=r"Block\.(norm\.running_var|norm\.num.*)")

    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1, bias=False))
    x = torch.full([1, 1], float(rank))
    grads = []
    for sync in (False, True):
        with misc.ddp_sync(model, sync):
            model(x).sum().backward()
        grads.append(model.module.weight.grad.item())
        model.zero_grad()
    assert grads == [float(rank), 0.5]
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_are_compared_and_synchronised(tmp_path: Path):
    context = torch.multiprocessing.get_context("fork")
    workers = [context.Process(target=compare_ranks, args=(rank, str(tmp_path / "store"))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_ddp_sync_leaves_plain_modules_alone():
    block = Block()
    with misc.ddp_sync(block, sync=False):
        block(torch.randn(4, 3)).sum().backward()
    assert block.first.weight.grad is not None
