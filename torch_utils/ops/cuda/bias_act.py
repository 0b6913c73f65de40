"""bias_act on a GPU: convert the operator's arguments to launches of the kernel in bias_act.cu."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from torch_utils.ops.cuda import driver
from torch_utils.ops.cuda.driver import Kernel
from torch_utils.ops.cuda.fir_plan import ceil_div

PIECEWISE_LINEAR = ("linear", "relu", "lrelu")
THREADS = 256
ITEMS = {0: 4, 1: 4, 2: 2}  # vectors per thread, by the order of the derivative


class _Divisor(ctypes.Structure):
    _fields_ = [
        ("multiplier", ctypes.c_uint64),
        ("value", ctypes.c_int64),
        ("shift", ctypes.c_int),
        ("unused", ctypes.c_int),
    ]


class BiasActParams(ctypes.Structure):
    """`Params` of bias_act.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "b", "dy", "ddx", "y")),
        ("size", ctypes.c_int64),
        ("inner", _Divisor),
        ("channels", _Divisor),
        *((name, ctypes.c_float) for name in ("alpha", "gain", "clamp")),
        ("unused", ctypes.c_int),
    ]


def make_divisor(value: int, large: bool) -> _Divisor:
    """Return multiplier and shift for (n * multiplier) >> (word + shift) = n // value; see bias_act.cu."""
    # With k = bits(n) + ceil(log2(value)) the error of the rounded-up multiplier stays below 1 / value.
    word, bits = (64, 48) if large else (32, 31)
    k = max(bits + (value - 1).bit_length(), word)
    return _Divisor(ceil_div(1 << k, value) if value > 1 else 0, value, k - word)


@functools.cache
def make_kernel(dtype: torch.dtype, act: str, order: int, clamp: bool, bias: int, vector: int, large: bool) -> Kernel:
    """Return the kernel for a derivative `order`, a mode `bias` (see BIAS in bias_act.cu) and elements per `vector`."""
    constants = {
        "DTYPE": driver.DTYPES[dtype],
        "INDEX_64": int(large),
        "ACT": act.upper(),
        "ORDER": order,
        "CLAMP": int(clamp),
        "SAVED": int(order == 1 and act in PIECEWISE_LINEAR),
        "VECTOR": vector,
        "ITEMS": ITEMS[order],
        "THREADS": THREADS,
        "BIAS": bias,
    }
    return Kernel("bias_act.cu", "bias_act", tuple(constants.items()), THREADS)


def _run_bias_act(
    tensors: dict[str, Tensor], b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float
) -> Tensor:
    x = tensors["x"]
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    channels, inner = 1, x.numel()  # all elements belong to one channel
    if b is not None and x.shape[dim] > 1:
        channels, inner = x.shape[dim], x.stride(dim)
    aligned = all(t.data_ptr() % 16 == 0 for t in (*tensors.values(), y))
    vector = 16 // x.element_size() if aligned else 1
    large = x.numel() >= driver.LARGE
    mode = 0
    if b is not None:
        mode = 1 if inner % vector == 0 else 3
        if inner == 1 and channels % vector == 0 and b.data_ptr() % 16 == 0:
            mode = 2
    order = len(tensors) - 1
    kernel = make_kernel(x.dtype, act, order, clamp >= 0, mode, vector, large)
    params = BiasActParams(
        b=None if b is None else b.data_ptr(),
        y=y.data_ptr(),
        size=x.numel(),
        inner=make_divisor(inner, large),
        channels=make_divisor(channels, large),
        alpha=alpha,
        gain=gain,
        clamp=clamp,
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    )
    driver.launch(kernel, ceil_div(x.numel(), THREADS * ITEMS[order] * vector), params, x.device)
    return y


def bias_act(x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float) -> Tensor:
    """Return clamp(gain * act(x + b)) of a dense x, in its layout."""
    return _run_bias_act({"x": x}, b, dim, act, alpha, gain, clamp)


def bias_act_grad(
    dy: Tensor, saved: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float
) -> Tensor:
    """Return the gradient of x for dy; `saved` is the output of bias_act for piecewise linear activations, else x."""
    return _run_bias_act({"x": saved, "dy": dy}, b, dim, act, alpha, gain, clamp)


def bias_act_grad2(
    ddx: Tensor, dy: Tensor, x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float
) -> Tensor:
    """Return the gradient of x for ddx, the gradient of the output of `bias_act_grad`."""
    return _run_bias_act({"x": x, "dy": dy, "ddx": ddx}, b, dim, act, alpha, gain, clamp)
