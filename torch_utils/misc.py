"""Small torch helpers: cached constants, shape checks, copying between modules, consistency of ranks, summaries."""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

P = ParamSpec("P")
R = TypeVar("R")

nan_to_num = torch.nan_to_num

_constant_cache: dict[tuple[Any, ...], torch.Tensor] = {}


def constant(
    value: Any,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    """Returns a tensor made from `value`, broadcast to `shape`, made once and then kept: never write into it.

    Spares the copy from host to device that torch.tensor() costs in every call.
    """
    array = np.asarray(value)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    device = torch.device("cpu" if device is None else device)
    memory_format = torch.contiguous_format if memory_format is None else memory_format
    shape = None if shape is None else tuple(shape)
    key = (array.shape, array.dtype.str, array.tobytes(), shape, dtype, device, memory_format)
    tensor = _constant_cache.get(key)
    if tensor is None:
        tensor = torch.as_tensor(array.copy(), dtype=dtype, device=device)
        if shape is not None:
            tensor = tensor.expand(shape)
        tensor = tensor.contiguous(memory_format=memory_format)
        _constant_cache[key] = tensor
    return tensor


def upload(
    values: np.ndarray | torch.Tensor, device: torch.device | str, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Returns values of the host, as `dtype` if given, on `device`, without waiting for what that is computing.

    An ordinary copy to a GPU waits until all that is queued there is done; one from page-locked memory takes its turn.
    """
    tensor = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def assert_shape(tensor: torch.Tensor, ref_shape: Sequence[int | None]) -> None:
    """Asserts that the tensor has this shape; None stands for any size."""
    shape = tuple(tensor.shape)
    matches = len(shape) == len(ref_shape) and all(
        ref is None or size == ref for size, ref in zip(shape, ref_shape, strict=True)
    )
    assert matches, f"shape is {shape}, expected {tuple(ref_shape)} (None: any size)"


def profiled_function(fn: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function so that its name shows in the profiler's output."""

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autograd.profiler.record_function(fn.__name__):
            return fn(*args, **kwargs)

    return wrapper


@contextlib.contextmanager
def suppress_tracer_warnings() -> Iterator[None]:
    """Silences torch.jit's tracer warnings inside the block."""
    # warnings.catch_warnings() would also hide what other threads warn about, so only our own filter comes and goes.
    rule = ("ignore", None, torch.jit.TracerWarning, None, 0)  # pyright: ignore[reportPrivateImportUsage]
    warnings.filters.insert(0, rule)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        warnings.filters.remove(rule)  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------
# Modules.


def params_and_buffers(module: torch.nn.Module) -> list[torch.Tensor]:
    """Lists all parameters, then all buffers."""
    return [*module.parameters(), *module.buffers()]


def named_params_and_buffers(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Lists all parameters, then all buffers, with their names."""
    return [*module.named_parameters(), *module.named_buffers()]


def copy_params_and_buffers(src: torch.nn.Module, dst: torch.nn.Module, require_all: bool = False) -> None:
    """Copies tensors of equal name from `src` to `dst`; with `require_all`, each tensor of `dst` must be in `src`."""
    src_tensors = dict(named_params_and_buffers(src))
    with torch.no_grad():
        for name, tensor in named_params_and_buffers(dst):
            assert name in src_tensors or not require_all, f"the source has no tensor {name!r}"
            if name in src_tensors:
                tensor.copy_(src_tensors[name])


@contextlib.contextmanager
def ddp_sync(module: torch.nn.Module, sync: bool) -> Iterator[None]:
    """Holds back DistributedDataParallel's gradient exchange inside the block unless `sync`."""
    if sync or not isinstance(module, torch.nn.parallel.DistributedDataParallel):
        yield
    else:
        with module.no_sync():
            yield


def check_ddp_consistency(module: torch.nn.Module, ignore_regex: str | None = None) -> None:
    """Asserts that all ranks hold equal parameters and buffers; every rank must call it.

    Names of the form ClassName.parameter that match `ignore_regex` as a whole are left out. NaN equals NaN.
    """
    for name, tensor in named_params_and_buffers(module):
        full_name = f"{type(module).__name__}.{name}"
        if ignore_regex is not None and re.fullmatch(ignore_regex, full_name):
            continue
        own = tensor.detach().clone()
        other = own.clone()
        torch.distributed.broadcast(other, src=0)
        if own.is_floating_point():
            own, other = own.nan_to_num(), other.nan_to_num()
        assert torch.equal(own, other), f"{full_name} differs from rank 0's"


def print_module_summary(
    module: torch.nn.Module, inputs: Iterable[Any], max_nesting: int = 3, skip_redundant: bool = True
) -> Any:
    """Runs the module on `inputs`, prints a table of its parts, and returns the outputs.

    A part's row counts the parameters and buffers that no row above it has counted. `skip_redundant` leaves out parts
    that hold no tensors of their own below the root. Parts nested deeper than `max_nesting` belong to their parents.
    """
    outputs_of: dict[torch.nn.Module, list[torch.Tensor]] = {}
    order: list[torch.nn.Module] = []

    def after_forward(part: torch.nn.Module, args: Any, outputs: Any) -> None:
        tensors = outputs if isinstance(outputs, list | tuple) else [outputs]
        if part not in outputs_of:
            order.append(part)
        outputs_of[part] = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]

    names = {part: name for name, part in module.named_modules() if name.count(".") < max_nesting}
    hooks = [part.register_forward_hook(after_forward) for part in names]
    try:
        outputs = module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()

    rows = [("module", "parameters", "buffers", "output shape", "dtype")]
    counted: set[int] = set()
    totals = [0, 0]
    for part in order:
        counts = []
        for tensors in (part.parameters(), part.buffers()):
            new = [tensor for tensor in tensors if id(tensor) not in counted]
            counted.update(id(tensor) for tensor in new)
            counts.append(sum(tensor.numel() for tensor in new))
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        if skip_redundant and not any(counts) and part is not module:
            continue
        shapes = ", ".join(str(list(tensor.shape)) for tensor in outputs_of[part])
        dtypes = ", ".join(str(tensor.dtype).removeprefix("torch.") for tensor in outputs_of[part])
        rows.append((names[part] or "<top-level>", str(counts[0]), str(counts[1]), shapes, dtypes))
    rows.append(("total", str(totals[0]), str(totals[1]), "", ""))

    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return outputs


# ----------------------------------------------------------------------------
# Data.


class InfiniteSampler(torch.utils.data.Sampler[int]):
    """Draws indices of a data set without end, shuffled anew all the time, each rank its own share.

    Each index drawn is swapped with one drawn at random from the `window_size` share of the order before it, so an
    item comes back after about one pass, but never at the same place.
    """

    def __init__(
        self,
        dataset: Sized,
        rank: int = 0,
        num_replicas: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        window_size: float = 0.5,
    ):
        assert len(dataset) > 0 and num_replicas > 0 and 0 <= rank < num_replicas and 0 <= window_size <= 1
        super().__init__()
        self.num_items = len(dataset)
        self.rank = rank
        self.num_replicas = num_replicas
        self.shuffle = shuffle
        self.seed = seed
        self.window_size = window_size

    def __iter__(self) -> Iterator[int]:
        order = np.arange(self.num_items)
        random = np.random.RandomState(self.seed)
        window = 0
        if self.shuffle:
            random.shuffle(order)
            window = round(self.num_items * self.window_size)
        position = 0
        while True:
            i = position % self.num_items
            if position % self.num_replicas == self.rank:
                yield int(order[i])
            if window >= 2:
                j = (i - random.randint(window)) % self.num_items
                order[i], order[j] = order[j], order[i]
            position += 1
