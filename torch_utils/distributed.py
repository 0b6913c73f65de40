"""Several processes as one: start-up from torchrun's environment, and the few collectives that training needs.

Everything here also works in a plain single process, where no process group is made and each collective is a no-op,
so callers never ask how many ranks there are. Gradients are summed by one flat all-reduce a phase instead of by DDP
hooks, which do not get along with several backward passes and a double backward in one step.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from torch_utils import training_stats

START_TIMEOUT = timedelta(minutes=60)  # kernels are built and datasets scanned before the first step is over
STEP_TIMEOUT = timedelta(minutes=10)
INF_GRADIENT = 1e5  # what an infinite gradient entry becomes
ENVIRONMENT = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# A group of its own for talking about errors: a rank that failed must not meet the others in the collective that they
# are still in, which would take its message for data.
_error_group: Any = None
# What hosts tell each other every step goes past the devices, which would first have to finish what is queued on them.
_host_group: Any = None


class SharedError(ValueError):
    """A user's error that every rank raises, so that one of them is enough to tell it."""


def init(device_type: str = "cpu") -> torch.device:
    """Join the ranks that torchrun started (gloo on CPU, nccl on CUDA) and return this rank's device.

    Without torchrun, or with one process, there is no process group and nothing to shut down. Raises `ValueError`
    when the environment is half set, when CUDA is asked for and absent, or when there are more local ranks than GPUs.
    """
    global _error_group, _host_group
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device(device_type)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("Device cuda was asked for, but torch sees no CUDA device; run with --device cpu.")
        if device.index is None:
            if local_rank >= torch.cuda.device_count():
                raise ValueError(
                    f"Local rank {local_rank} needs a GPU of its own, but this machine has "
                    f"{torch.cuda.device_count()}; start torchrun with --nproc_per_node={torch.cuda.device_count()}."
                )
            device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        missing = [name for name in ENVIRONMENT if name not in os.environ]
        if missing:
            raise ValueError(f"WORLD_SIZE is {world_size}, but {', '.join(missing)} is not set; start with torchrun.")
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method="env://", timeout=START_TIMEOUT)
        _error_group = dist.new_group(timeout=START_TIMEOUT)
        _host_group = dist.new_group(timeout=START_TIMEOUT, backend="gloo")
        training_stats.init_multiprocessing(get_rank(), device)
    return device


def shorten_timeout() -> None:
    """From now on a collective that hangs fails after ten minutes: called once the first step is over."""
    if dist.is_initialized():
        for group in (dist.group.WORLD, _error_group, _host_group):
            assert group is not None
            group.set_timeout(STEP_TIMEOUT)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    global _error_group, _host_group
    if dist.is_initialized():
        dist.destroy_process_group()
        _error_group = _host_group = None
        training_stats.init_multiprocessing(0, None)


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True on the one rank that writes files and prints."""
    return get_rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def print0(*args, **kwargs) -> None:
    """`print` on rank 0 only, flushed so that a cluster's log file is never behind."""
    if is_main():
        print(*args, **{"flush": True, **kwargs})


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of `tensor` over the ranks, as a new tensor of the same shape and dtype; not differentiable."""
    if not dist.is_initialized():
        return tensor.detach()
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Mean of a floating-point `tensor` over the ranks; not differentiable."""
    return all_reduce_sum(tensor) / get_world_size()


def broadcast_object(value):
    """Rank 0's `value` (anything that can be pickled) on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def any_rank(flags: Sequence[bool]) -> list[bool]:
    """For each flag whether any rank has set it, in one small all-reduce of hosts; all ranks pass equally many."""
    if not dist.is_initialized():
        return list(flags)
    counts = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(counts, group=_host_group)
    return counts.bool().tolist()


def gather_errors(error: Exception | None) -> list[Exception | None]:
    """What went wrong on each rank, in order of rank; those of other ranks are a ValueError or a RuntimeError.

    A rank may come here from the midst of other collectives; ranks that wait in those for it run into their time-out.
    """
    if not dist.is_initialized():
        return [error]
    message = None if error is None else (isinstance(error, ValueError), str(error) or repr(error))
    messages: list[Any] = [None] * get_world_size()
    dist.all_gather_object(messages, message, group=_error_group)
    errors: list[Exception | None] = []
    for rank, found in enumerate(messages):
        kind = ValueError if found and found[0] else RuntimeError
        errors.append(error if rank == get_rank() else found and kind(f"rank {rank}: {found[1]}"))
    return errors


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Let every rank leave the block with an error if any rank has one: its own, else that of the first that has one.

    The block holds no collectives, so that no rank waits there for one that has failed.
    """
    own = None
    try:
        yield
    except Exception as error:
        own = error
    errors = gather_errors(own)
    first = next((error for error in errors if error is not None), None)
    if isinstance(own or first, ValueError) and dist.is_initialized():
        raise SharedError(str(first)) from own
    if first is not None:
        raise own or first


@torch.no_grad()
def broadcast_module(module: torch.nn.Module) -> None:
    """Overwrite the parameters and buffers of every rank with those of rank 0."""
    if dist.is_initialized():
        for tensor in [*module.parameters(), *module.buffers()]:
            value = tensor.detach().contiguous()
            dist.broadcast(value, src=0)
            tensor.copy_(value)


@torch.no_grad()
def sync_grads(params: Iterable[torch.Tensor], gain: float = 1.0) -> torch.Tensor:
    """Average the gradients over the ranks, times `gain`, in one flat all-reduce; NaN becomes 0, +-inf becomes +-1e5.

    Parameters without a gradient are skipped, so which ones have a gradient must not depend on the rank. Returns how
    many entries of the averaged gradient were not finite, equal on all ranks: int64 () on their device, not awaited.
    """
    gradients = [param.grad for param in params if param.grad is not None]
    num_nonfinite = torch.zeros([], dtype=torch.int64, device=gradients[0].device if gradients else None)
    for dtype in sorted({gradient.dtype for gradient in gradients}, key=str):
        group = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = torch.cat([gradient.flatten() for gradient in group])
        if dist.is_initialized():
            dist.all_reduce(flat)
        flat.mul_(gain / get_world_size())
        # Zero times a number is zero unless it is not finite: one temporary where `isfinite` makes four.
        num_nonfinite += flat.mul(0).count_nonzero()
        flat.nan_to_num_(nan=0.0, posinf=INF_GRADIENT, neginf=-INF_GRADIENT)
        parts = flat.split([gradient.numel() for gradient in group])
        cured = [part.view_as(gradient) for part, gradient in zip(parts, group, strict=True)]
        torch._foreach_copy_(group, cured)  # pyright: ignore[reportPrivateImportUsage]
    return num_nonfinite
