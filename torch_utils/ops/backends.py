"""Select the implementation of an operator from the caller's request and the device of the tensor.

| name | meaning |
|---|---|
| ref | the literal composition of plain PyTorch operations: the specification |
| matmul | banded matrices: fast without a compiler |
| cpu, cuda | the compiled operators of that device, or an error; "auto" for tensors on other devices |
| auto | the compiled operators of the tensor's device; if they are unavailable, one warning gives cause and remedy |

The argument `impl` of a call selects one; if it is "auto", the environment variable TORCH_UTILS_OPS or `using` does.
These may also be "strict": like "auto", but with an error instead of the warning.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator

import torch

from torch_utils.ops.binaries import Unavailable
from torch_utils.ops.cpu import kernels as cpu_kernels
from torch_utils.ops.cuda import kernels as cuda_kernels

VARIABLE = "TORCH_UTILS_OPS"
CHOICES = ("auto", "ref", "matmul", "cpu", "cuda")

KERNELS = {"cpu": cpu_kernels, "cuda": cuda_kernels}

# Replacements of compiled operators; devices that are not listed use the reference.
SUBSTITUTES = {"cpu": "matmul"}

_default = os.environ.get(VARIABLE) or "auto"


@contextlib.contextmanager
def using(impl: str) -> Iterator[None]:
    """Use `impl` (one of CHOICES or "strict") for "auto" while the block runs, in every thread."""
    global _default
    _check(impl, (*CHOICES, "strict"), "impl")
    previous, _default = _default, impl
    try:
        yield
    finally:
        _default = previous


def select_impl(impl: str, x: torch.Tensor) -> str:
    """Return "ref", "matmul" or "compiled" for a requested `impl` and the input tensor of the operator.

    Under the transforms of `torch.func` "auto" is the reference, since compiled operators would give wrong derivatives
    there without an error; in `torch.export` it is the reference too, so that programs run without this package.
    Raises ValueError for an unknown name, and Unavailable (a RuntimeError) if compiled operators were required.
    """
    _check(impl, CHOICES, "impl")
    device = x.device.type
    if impl == "auto":
        _check(_default, (*CHOICES, "strict"), VARIABLE)
        impl = _default
    if impl in ("ref", "matmul"):
        return impl
    demanded = impl == device or impl == "strict"
    if impl != device and (torch._C._are_functorch_transforms_active() or torch.compiler.is_exporting()):
        return "ref"
    if device in KERNELS and KERNELS[device].supports(x.dtype):
        if _is_ready(device, demanded):
            return "compiled"
    elif demanded and impl == device:
        raise Unavailable(f"there is no compiled operator for {x.dtype} on {device}", 'use impl="auto"')
    return "ref" if torch.compiler.is_compiling() else SUBSTITUTES.get(device, "ref")


def _check(impl: str, choices: tuple[str, ...], name: str) -> None:
    if impl not in choices:
        raise ValueError(f"unknown {name} {impl!r}: choose one of {', '.join(choices)}")


def _is_ready(device: str, demanded: bool) -> bool:
    problem = _load(device)
    if problem is not None and demanded:
        raise problem
    return problem is None


# torch.compile calls this instead of tracing it. The decorator torch.compiler.assume_constant_result sets the same
# attribute, but imports the compiler, which takes longer than importing all of this package.
_is_ready._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@functools.cache
def _load(device: str) -> Unavailable | None:
    """Load the compiled operators of a device, once; on failure warn and return the error."""
    try:
        KERNELS[device].load()
    except Unavailable as problem:
        substitute = SUBSTITUTES.get(device, "ref")
        warnings.warn(
            f"the operators run without compiled code on this {device} (impl={substitute!r}, slower, same numbers): "
            f"{problem.cause}; to fix it, {problem.remedy}. For details: python -m torch_utils.custom_ops",
            stacklevel=2,
        )
        return problem
    return None
