"""The kernels of `torch_utils.ops.registered` in plain PyTorch, as the reference of tests."""

import torch

from torch_utils.ops import bias_act as bias_act_module
from torch_utils.ops import upfirdn2d as upfirdn2d_module
from torch_utils.ops.reference import resample
from torch_utils.ops.spec import Axes, Axis

SLOPES = {"linear": lambda alpha: 1.0, "relu": lambda alpha: 0.0, "lrelu": lambda alpha: alpha}


def supports(dtype):
    return dtype.is_floating_point


def load():
    pass


def describe():
    return {}


def bias_act(x, b, dim, act, alpha, gain, clamp):
    with torch.no_grad():
        clamp = None if clamp < 0 else clamp
        return bias_act_module.bias_act(x, b, dim, act, alpha, gain, clamp, impl="ref").clone()


def bias_act_grad(dy, saved, b, dim, act, alpha, gain, clamp):
    if act in SLOPES:
        dx = dy * gain * where(saved / gain > 0, 1.0, SLOPES[act](alpha), dy.dtype)
        return dx if clamp < 0 else dx * (saved.abs() < clamp)
    return dy * gain * DERIVATIVES[act][0](shifted(saved, b, dim)) * unclamped(saved, b, dim, act, alpha, gain, clamp)


def bias_act_grad2(ddx, dy, x, b, dim, act, alpha, gain, clamp):
    bend = DERIVATIVES[act][1](shifted(x, b, dim))
    return ddx * dy * gain * bend * unclamped(x, b, dim, act, alpha, gain, clamp)


def where(condition, value, other, dtype):
    """Choose between numbers in double precision; torch would take single."""
    return torch.where(condition, torch.tensor(value, dtype=dtype), torch.tensor(other, dtype=dtype))


def shifted(x, b, dim):
    return x if b is None else x + b.reshape([-1 if i == dim else 1 for i in range(x.ndim)])


def unclamped(x, b, dim, act, alpha, gain, clamp):
    return clamp < 0 or bias_act(x, b, dim, act, alpha, gain, -1.0).abs() <= clamp


def logistic(u):
    return 1 / (1 + (-u).exp())


def logistic1(u):
    return logistic(u) * (1 - logistic(u))


def logistic2(u):
    return logistic1(u) * (1 - 2 * logistic(u))


SELU, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772

# First and second derivative.
DERIVATIVES = {
    "tanh": (lambda u: 1 - u.tanh() ** 2, lambda u: -2 * u.tanh() * (1 - u.tanh() ** 2)),
    "sigmoid": (logistic1, logistic2),
    "elu": (lambda u: torch.where(u > 0, 1.0, u.exp()), lambda u: torch.where(u > 0, 0.0, u.exp())),
    "selu": (
        lambda u: SELU * torch.where(u > 0, 1.0, SELU_ALPHA * u.exp()),
        lambda u: SELU * torch.where(u > 0, 0.0, SELU_ALPHA * u.exp()),
    ),
    "softplus": (logistic, logistic1),
    "swish": (lambda u: logistic(u) + u * logistic1(u), lambda u: 2 * logistic1(u) + u * logistic2(u)),
}


def upfirdn2d(x, f, axes: Axes, flip, gain):
    kernels = upfirdn2d_module._kernels(f, x, flip, gain)
    padding = (axes.x.pad0, axes.x.pad1, axes.y.pad0, axes.y.pad1)
    y = resample(x, kernels, (axes.x.up, axes.y.up), (axes.x.down, axes.y.down), padding)
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty_like(y, memory_format=layout).copy_(y)


def pack(negative, clamped):
    """Return booleans (N, C, H, W) -> the bytes that `registered` describes."""
    bits = (negative.to(torch.uint8) + 2 * clamped.to(torch.uint8)).contiguous()
    bits = torch.nn.functional.pad(bits, [0, -bits.shape[-1] % 4]).unflatten(-1, (-1, 4))
    return (bits * torch.tensor([1, 4, 16, 64], dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack(signs, width):
    """Return the bytes -> booleans (N, C, H, width) negative and clamped."""
    bits = (signs.unsqueeze(-1) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)).flatten(-2)[..., :width]
    return bits & 1 != 0, bits & 2 != 0


def filtered_lrelu(x, fu, fd, b, up: Axes, down: Axes, up_gain, gain, slope, clamp, flip, write_signs):
    shifted = x if b is None else x + b[:, None, None]
    u = upfirdn2d(shifted, fu, up, flip, up_gain)
    v = torch.where(u > 0, u, u * slope) * gain
    clamped = v.abs() > clamp if clamp >= 0 else torch.zeros_like(v, dtype=torch.bool)
    signs = pack(~(u > 0), clamped) if write_signs else torch.empty([0], dtype=torch.uint8)
    return upfirdn2d(v if clamp < 0 else v.clamp(-clamp, clamp), fd, down, flip, 1.0), signs


def filtered_lrelu_signed(v, signs, f1, f2, first: Axes, second: Axes, gain, slope, flip):
    m = upfirdn2d(v, f1, first, flip, 1.0)
    negative, clamped = unpack(signs, m.shape[3])
    m = m * gain * where(negative, slope, 1.0, m.dtype) * ~clamped
    return upfirdn2d(m, f2, second, flip, 1.0)


__all__ = ["Axes", "Axis", "pack", "unpack"]
