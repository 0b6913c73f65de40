"""Distributed training: start-up from torchrun's environment, and the collectives that training needs.

All functions also work in a single process, where there is no process group and each collective is a no-op, so that
callers need not check the number of ranks. Gradients are summed by one flat all-reduce a phase instead of by DDP hooks,
which do not support several backward passes and a double backward in one step.
"""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from torch_utils import misc, training_stats

START_TIMEOUT = timedelta(minutes=60)  # kernels are built and datasets scanned before the end of the first step
STEP_TIMEOUT = timedelta(minutes=10)
INF_GRADIENT = 1e5  # replaces infinite gradient entries
ENVIRONMENT = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# A separate group to exchange errors: in the common group, the message of a rank that failed would be combined with the
# data of a collective in which the other ranks still are.
_error_group: Any = None
# A gloo group for small host values of every step: on the devices they would wait for all queued work.
_host_group: Any = None
# Of meshes that do not span all ranks: the group of the ranks that hold the same part of what is divided over it.
_replicas: dict[Any, Any] = {}


class SharedError(ValueError):
    """A user error that every rank raises, so that printing it on one rank is enough."""


def init(device_type: str = "cpu") -> torch.device:
    """Join the ranks that torchrun started (gloo on CPU, nccl on CUDA) and return this rank's device.

    Without torchrun, or with one process, there is no process group. Raises `ValueError` if the environment is
    incomplete, if CUDA is requested but absent, or if there are more local ranks than GPUs.
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
    """Set the time-out of collectives to ten minutes; to be called after the first step."""
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
        _replicas.clear()
        training_stats.init_multiprocessing(0, None)


def get_rank() -> int:
    """Return the rank of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this is rank 0, which writes files and prints."""
    return get_rank() == 0


def barrier() -> None:
    """Wait until all ranks have called this."""
    if dist.is_initialized():
        dist.barrier()


def print0(*args, **kwargs) -> None:
    """Print on rank 0 only, and flush, so that log files of clusters are up to date."""
    if is_main():
        print(*args, **{"flush": True, **kwargs})


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of `tensor` over the ranks, as a new tensor of the same shape and dtype; not differentiable."""
    if not dist.is_initialized():
        return tensor.detach()
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Return the mean of a floating-point `tensor` over the ranks; not differentiable."""
    return all_reduce_sum(tensor) / get_world_size()


def gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return the rows of all ranks, in their order, each of which has as many: (N, ...) -> (ranks * N, ...)."""
    count = len(tensor)
    rows = tensor.new_zeros(get_world_size() * count, *tensor.shape[1:])
    rows[get_rank() * count :][:count] = tensor
    return all_reduce_sum(rows)


def from_main(tensor: torch.Tensor) -> torch.Tensor:
    """Return rank 0's `tensor` on every rank, as a new tensor; all ranks pass the same shape; not differentiable."""
    if not dist.is_initialized():
        return tensor.detach()
    value = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.broadcast(value, src=0)
    return value


def broadcast_object(value):
    """Return the `value` of rank 0 (any picklable object) on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def any_rank(flags: Sequence[bool]) -> list[bool]:
    """Return for each flag whether any rank has set it, by one all-reduce of hosts; all ranks pass equally many."""
    if not dist.is_initialized():
        return list(flags)
    counts = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(counts, group=_host_group)
    return counts.bool().tolist()


def gather_errors(error: Exception | None) -> list[Exception | None]:
    """Return the error of each rank or None, by rank; those of other ranks are a ValueError or a RuntimeError.

    A rank may call this while others wait in another collective; those then fail by their time-out.
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
    """Raise an error on every rank if any rank has one in the block: its own, else that of the first rank with one.

    The block must not contain collectives, as ranks would wait in them for a rank that has failed. With several ranks
    a ValueError becomes a SharedError.
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


def is_divided(tensor: torch.Tensor) -> bool:
    """Return whether each rank has a part of a tensor, which then is a `DTensor` (`torch_utils.sharding`)."""
    return hasattr(tensor, "to_local")  # importing its class takes a second


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor, all of one that is not divided; changes of it are changes of the tensor."""
    return tensor.to_local() if is_divided(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor on every rank; all ranks call it together if it is divided."""
    if not is_divided(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    found = cast(DTensor, tensor.detach())
    placements = list(found.placements)
    for axis in range(len(placements)):  # what was divided last is put together first; torch warns of both at once
        placements[axis] = Replicate()
        found = found.redistribute(placements=placements)
    return found.to_local()


@torch.no_grad()
def broadcast_module(module: torch.nn.Module) -> None:
    """Overwrite the parameters and buffers of every rank with those of rank 0, except for those that are divided."""
    if dist.is_initialized():
        for tensor in [*module.parameters(), *module.buffers()]:
            if is_divided(tensor):
                continue
            value = tensor.detach().contiguous()
            dist.broadcast(value, src=0)
            tensor.copy_(value)


def set_replicas(mesh: Any, group: Any) -> None:
    """Say which ranks hold the same parts of the tensors that are divided over a mesh: those of a process group."""
    _replicas[mesh] = group


def _copies(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return groups of ranks, one for each axis of a mesh, whose ranks hold the same part of a tensor."""
    if not is_divided(tensor):
        return (dist.group.WORLD,) if dist.is_initialized() else ()
    mesh, placements = tensor.device_mesh, tensor.placements  # pyright: ignore[reportAttributeAccessIssue]
    groups = [mesh.get_group(axis) for axis, placement in enumerate(placements) if placement.is_replicate()]
    return (*groups, *([_replicas[mesh]] if mesh in _replicas else []))


def _num_copies(groups: Iterable[Any]) -> int:
    return math.prod(dist.get_world_size(group) for group in groups)


@torch.no_grad()
def sync_grads(params: Iterable[torch.Tensor], gain: float = 1.0) -> torch.Tensor:
    """Average the gradients over the ranks, times `gain`, by flat all-reduces; NaN becomes 0, +-inf becomes +-1e5.

    Parameters without a gradient are skipped; which ones have a gradient must not depend on the rank. A gradient that
    is divided is averaged over the ranks with the same part, so that these stay equal; over the others it has been
    already. Return the number of entries of the averaged gradient that were not finite, equal on all ranks: int64 ()
    on the gradients' device, without waiting for it.
    """
    gradients = [param.grad for param in params if param.grad is not None]
    device = gradients[0].device if gradients else None
    kinds: dict[Any, list[torch.Tensor]] = {}
    for gradient in gradients:
        kinds.setdefault((is_divided(gradient), gradient.dtype, _copies(gradient)), []).append(gradient)
    num_nonfinite = torch.zeros([], dtype=torch.int64, device=device)
    for (divided, _, groups), found in kinds.items():
        parts, copies = [own_part(gradient) for gradient in found], _num_copies(groups)
        if not groups and (divided or parts[0].device.type == "cpu"):  # nothing to send, and no kernels to launch
            count = torch.stack([_scale(part, gain) for part in parts]).sum()
        else:
            flat = torch.cat([part.flatten() for part in parts])
            for group in groups:
                dist.all_reduce(flat, group=group)
            count = _scale(flat, gain / copies)
            pieces = flat.split([part.numel() for part in parts])
            finite = [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]
            torch._foreach_copy_(parts, finite)  # pyright: ignore[reportPrivateImportUsage]
        num_nonfinite += count * (get_world_size() // copies)
    if any(map(is_divided, gradients)):
        dist.all_reduce(num_nonfinite)
        num_nonfinite //= get_world_size()
    return num_nonfinite


def _scale(flat: torch.Tensor, gain: float) -> torch.Tensor:
    """Multiply a gradient by `gain` in place, make it finite, and return the number of entries that were not."""
    if gain != 1.0:
        flat.mul_(gain)
    # A sum is finite only if all its terms are. A CPU need not wait to look at it, and reads the gradient once.
    if flat.device.type == "cpu" and math.isfinite(flat.sum().item()):
        return torch.zeros([], dtype=torch.int64)
    # Zero times a number is zero if and only if it is finite: one temporary, while `isfinite` needs four.
    num_nonfinite = flat.mul(0).count_nonzero()
    flat.nan_to_num_(nan=0.0, posinf=INF_GRADIENT, neginf=-INF_GRADIENT)
    return num_nonfinite


@torch.no_grad()
def total_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the norm of all gradients together, equal on all ranks: (); all ranks call it if some are divided."""
    if gradients and all(gradient.device.type == "cpu" and not is_divided(gradient) for gradient in gradients):
        # A product of a vector with itself is several times as fast there as the kernel of norms.
        squares = [torch.dot(gradient.flatten(), gradient.flatten()) for gradient in gradients]
        total = torch.stack(squares).sum()
        if math.isfinite(total.item()):
            return total.sqrt()
    if not any(map(is_divided, gradients)):
        return torch.nn.utils.get_total_norm(gradients)
    norms = torch.stack(torch._foreach_norm([own_part(gradient) for gradient in gradients]))  # pyright: ignore
    copies = torch.tensor([_num_copies(_copies(gradient)) for gradient in gradients])
    return all_reduce_sum((norms.square() / misc.upload(copies, norms.device)).sum()).sqrt()
