"""Helpers for torch: cached constants, copies to a device, shape checks, consistency of ranks.

The source text inside published network pickles imports this module: `constant`, `assert_shape`, `profiled_function`
and `suppress_tracer_warnings` are kept for it, even without callers in this repository.
"""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

P = ParamSpec("P")
R = TypeVar("R")

_constant_cache: dict[tuple[Any, ...], torch.Tensor] = {}


def constant(
    value: Any,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    """Return a cached tensor of `value`, broadcast to `shape`; it must not be modified.

    Avoids the copy from host to device that torch.tensor() makes in every call.
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
    """Copy values from the host to `device`, as `dtype` if given, without waiting for queued work of the device.

    A copy from pageable memory to a GPU blocks until the queued work is done; one from page-locked memory is queued.
    """
    tensor = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def assert_shape(tensor: torch.Tensor, ref_shape: Sequence[int | None]) -> None:
    """Assert that a tensor has the shape `ref_shape`, in which None is any size; AssertionError otherwise."""
    shape = tuple(tensor.shape)
    matches = len(shape) == len(ref_shape) and all(
        ref is None or size == ref for size, ref in zip(shape, ref_shape, strict=True)
    )
    assert matches, f"shape is {shape}, expected {tuple(ref_shape)} (None: any size)"


def profiled_function(fn: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that its name appears in the profiler's output."""

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autograd.profiler.record_function(fn.__name__):
            return fn(*args, **kwargs)

    return wrapper


@contextlib.contextmanager
def suppress_tracer_warnings() -> Iterator[None]:
    """Ignore torch.jit's tracer warnings inside the block."""
    # warnings.catch_warnings() would also drop filters that other threads add, so only one filter is added and removed.
    rule = ("ignore", None, torch.jit.TracerWarning, None, 0)  # pyright: ignore[reportPrivateImportUsage]
    warnings.filters.insert(0, rule)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        warnings.filters.remove(rule)  # type: ignore[attr-defined]


def check_ddp_consistency(module: torch.nn.Module, ignore_regex: str | None = None) -> None:
    """Assert that all ranks have equal parameters and buffers, but for those divided among them; all must call it.

    Names of the form ClassName.parameter that fully match `ignore_regex` are left out. NaN equals NaN. Raises
    AssertionError on ranks that differ from rank 0.
    """
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        full_name = f"{type(module).__name__}.{name}"
        if ignore_regex is not None and re.fullmatch(ignore_regex, full_name):
            continue
        if hasattr(tensor, "to_local"):  # each rank has a part of it
            continue
        own = tensor.detach().clone()
        other = own.clone()
        torch.distributed.broadcast(other, src=0)
        if own.is_floating_point():
            own, other = own.nan_to_num(), other.nan_to_num()
        assert torch.equal(own, other), f"{full_name} differs from rank 0's"
