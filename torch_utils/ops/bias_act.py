"""Bias, activation, gain and clamp in one call, for tensors of any rank and memory format."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from torch_utils.ops import backends, registered


@dataclass(frozen=True)
class Activation:
    """An activation function: `func(x, alpha, inplace)` and the defaults of `alpha` and `gain`."""

    func: Callable[[torch.Tensor, float, bool], torch.Tensor]
    def_alpha: float
    def_gain: float


# The default gains keep the second moment of a unit normal input near one (Karras et al. 2020, StyleGAN2).
activation_funcs = {
    "linear": Activation(lambda x, alpha, inplace: x, 0.0, 1.0),
    "relu": Activation(lambda x, alpha, inplace: F.relu(x, inplace), 0.0, math.sqrt(2)),
    "lrelu": Activation(lambda x, alpha, inplace: F.leaky_relu(x, alpha, inplace), 0.2, math.sqrt(2)),
    "tanh": Activation(lambda x, alpha, inplace: x.tanh_() if inplace else x.tanh(), 0.0, 1.0),
    "sigmoid": Activation(lambda x, alpha, inplace: x.sigmoid_() if inplace else x.sigmoid(), 0.0, 1.0),
    "elu": Activation(lambda x, alpha, inplace: F.elu(x, inplace=inplace), 0.0, 1.0),
    "selu": Activation(lambda x, alpha, inplace: F.selu(x, inplace), 0.0, 1.0),
    "softplus": Activation(lambda x, alpha, inplace: F.softplus(x), 0.0, 1.0),
    "swish": Activation(lambda x, alpha, inplace: F.silu(x, inplace), 0.0, math.sqrt(2)),
}


def bias_act(
    x: torch.Tensor,
    b: torch.Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Return clamp(gain * act(x + b), -clamp, clamp) in the shape and layout of x, differentiable in x and b.

    b has x.shape[dim] elements. alpha is the slope of "lrelu"; alpha and gain default to those of `activation_funcs`;
    clamp None is no clamp. NaN stays NaN. `impl` is one of `backends`; compiled operators have two derivatives
    ("linear", "relu" and "lrelu": all), the others have all.
    Raises ValueError for an unknown activation, impl or a negative clamp.
    """
    chosen = backends.select_impl(impl, x)
    if act not in activation_funcs:
        raise ValueError(f"unknown activation {act!r}: choose one of {', '.join(activation_funcs)}")
    if clamp is not None and clamp < 0:
        raise ValueError(f"clamp must not be negative, got {clamp}")
    spec = activation_funcs[act]
    alpha = spec.def_alpha if alpha is None else float(alpha)
    gain = spec.def_gain if gain is None else float(gain)

    if b is not None:
        assert b.ndim == 1 and b.shape[0] == x.shape[dim], f"bias {tuple(b.shape)} for dim {dim} of {tuple(x.shape)}"
    if chosen == "compiled":
        return registered.bias_act(x, b, dim, act, alpha, gain, clamp)

    y = x
    if b is not None:
        shape = [1] * x.ndim
        shape[dim] = -1
        y = y + b.to(x.dtype).reshape(shape)

    # Without gradients every step after the first can work in place: less new memory, same numbers.
    overwrite = not (torch.is_grad_enabled() and y.requires_grad)
    y = spec.func(y, alpha, overwrite and y is not x)
    if gain != 1:
        y = y.mul_(gain) if overwrite and y is not x else y * gain
    if clamp is not None:
        y = y.clamp_(-clamp, clamp) if overwrite and y is not x else y.clamp(-clamp, clamp)
    return y
