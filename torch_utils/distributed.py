"""Several processes as one: start-up from torchrun's environment, and the few collectives that training needs.

Everything here also works in a plain single process, where no process group is made and each collective is a no-op,
so callers never ask how many ranks there are. Gradients are summed by one flat all-reduce a phase instead of by DDP
hooks, which do not get along with several backward passes and a double backward in one step.
"""

import os
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist

from torch_utils import training_stats

START_TIMEOUT = timedelta(minutes=60)  # kernels are built and datasets scanned before the first step is over
STEP_TIMEOUT = timedelta(minutes=10)
INF_GRADIENT = 1e5  # what an infinite gradient entry becomes
ENVIRONMENT = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def init(device_type: str = "cpu") -> torch.device:
    """Join the ranks that torchrun started (gloo on CPU, nccl on CUDA) and return this rank's device.

    Without torchrun, or with one process, there is no process group and nothing to shut down. Raises `ValueError`
    when the environment is half set, when CUDA is asked for and absent, or when there are more local ranks than GPUs.
    """
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
        training_stats.init_multiprocessing(get_rank(), device)
    return device


def shorten_timeout() -> None:
    """From now on a collective that hangs fails after ten minutes: called once the first step is over."""
    if dist.is_initialized():
        assert dist.group.WORLD is not None
        dist.group.WORLD.set_timeout(STEP_TIMEOUT)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
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


@torch.no_grad()
def broadcast_module(module: torch.nn.Module) -> None:
    """Overwrite the parameters and buffers of every rank with those of rank 0."""
    if dist.is_initialized():
        for tensor in [*module.parameters(), *module.buffers()]:
            value = tensor.detach().contiguous()
            dist.broadcast(value, src=0)
            tensor.copy_(value)


@torch.no_grad()
def sync_grads(params: Iterable[torch.Tensor], gain: float = 1.0) -> int:
    """Average the gradients over the ranks, times `gain`, in one flat all-reduce; NaN becomes 0, +-inf becomes +-1e5.

    Parameters without a gradient are skipped, so which ones have a gradient must not depend on the rank. Returns the
    number of entries of the averaged gradient that were not finite (equal on all ranks).
    """
    gradients = [param.grad for param in params if param.grad is not None]
    num_nonfinite = 0
    for dtype in sorted({gradient.dtype for gradient in gradients}, key=str):
        group = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = torch.cat([gradient.flatten() for gradient in group])
        if dist.is_initialized():
            dist.all_reduce(flat)
        flat.mul_(gain / get_world_size())
        num_nonfinite += int((~flat.isfinite()).sum())
        flat.nan_to_num_(nan=0.0, posinf=INF_GRADIENT, neginf=-INF_GRADIENT)
        for gradient, value in zip(group, flat.split([gradient.numel() for gradient in group]), strict=True):
            gradient.copy_(value.view_as(gradient))
    return num_nonfinite
