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
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_are_compared(tmp_path: Path):
    context = torch.multiprocessing.get_context("fork")
    workers = [context.Process(target=compare_ranks, args=(rank, str(tmp_path / "store"))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
