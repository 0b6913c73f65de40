"""Registration of the compiled operators in PyTorch: schemas, shapes, derivatives (namespace `longtake`).

The kernels are functions of `cpu.kernels` and `cuda.kernels` with the same interface. The derivatives are operators of
this module again: the transpose of a FIR is a FIR, that of the filtered leaky ReLU applies the filters in the other
order, with two recorded bits for each element between them.

Layout of the bits (`signs`): uint8 (N, C, H, (W + 3) // 4) for a grid of H x W between the filters; element w has
bits 2 (w % 4) and 2 (w % 4) + 1 of byte w // 4; the lower one is set if it is not positive, the upper one if it was
clamped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from torch_utils.ops.cpu import kernels as cpu_kernels
from torch_utils.ops.cuda import kernels as cuda_kernels
from torch_utils.ops.spec import Axes

# Activations whose derivative is a function of their output; it is piecewise constant, so the second one is zero.
PIECEWISE_LINEAR = ("linear", "relu", "lrelu")

_library = torch.library.Library("longtake", "DEF")
_ops = torch.ops.longtake


def _define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.split("(")[0]
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    for device, kernels in (("CPU", cpu_kernels), ("CUDA", cuda_kernels)):
        _library.impl(name, _bind(kernel, kernels), device)
    torch.library.register_fake(f"longtake::{name}", fake, lib=_library)


def _bind(kernel: Callable[..., Any], kernels: ModuleType) -> Callable[..., Any]:
    return lambda *args: kernel(kernels, *args)


def _differentiate(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    torch.library.register_autograd(f"longtake::{name}", backward, setup_context=setup_context, lib=_library)


def _dense(x: Tensor) -> Tensor:
    """Return x, copied if its memory has gaps or is shared between elements."""
    if x.is_contiguous():
        return x
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return x.contiguous()
        expected *= size
    return x


def _like(x: Tensor, model: Tensor) -> Tensor:
    """Return x with the strides of `model`."""
    return x if x.stride() == model.stride() else torch.empty_like(model, dtype=x.dtype).copy_(x)


def _image(x: Tensor) -> Tensor:
    """Return x (N, C, H, W), copied unless it is contiguous or channels-last."""
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return x if dense else x.contiguous()


def _new_image(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return an empty image of `size` (H, W) in the layout of x, as kernels return it."""
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty([*x.shape[:2], *size], dtype=x.dtype, device=x.device, memory_format=layout)


def _sum_to_bias(dx: Tensor, dim: int) -> Tensor:
    return dx.sum([i for i in range(dx.ndim) if i != dim % dx.ndim])


# ----------------------------------------------------------------------------------------------------------------------
# Bias and activation.

_ACT = "int dim, str act, float alpha, float gain, float clamp"


def bias_act(x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float | None) -> Tensor:
    """Compute `ops.bias_act.bias_act` by the compiled operator; twice differentiable."""
    return _ops.bias_act(x, b, dim % max(x.ndim, 1), act, alpha, gain, -1.0 if clamp is None else clamp)


def _bias_act(kernels: ModuleType, x: Tensor, b: Tensor | None, *options: Any) -> Tensor:
    return kernels.bias_act(_dense(x), None if b is None else b.to(x.dtype).contiguous(), *options)


def _bias_act_grad(kernels: ModuleType, dy: Tensor, saved: Tensor, b: Tensor | None, *options: Any) -> Tensor:
    saved = _dense(saved)
    return kernels.bias_act_grad(_like(dy, saved), saved, None if b is None else b.to(dy.dtype).contiguous(), *options)


def _bias_act_grad2(kernels: ModuleType, ddx: Tensor, dy: Tensor, x: Tensor, b: Tensor | None, *options: Any) -> Tensor:
    x = _dense(x)
    b = None if b is None else b.to(x.dtype).contiguous()
    return kernels.bias_act_grad2(_like(ddx, x), _like(dy, x), x, b, *options)


def _fake_like_dense(x: Tensor) -> Tensor:
    return torch.empty_like(_dense(x))


_define(f"bias_act(Tensor x, Tensor? b, {_ACT}) -> Tensor", _bias_act, lambda x, *_: _fake_like_dense(x))
_define(
    f"bias_act_grad(Tensor dy, Tensor saved, Tensor? b, {_ACT}) -> Tensor",
    _bias_act_grad,
    lambda dy, saved, *_: _fake_like_dense(saved),
)
_define(
    f"bias_act_grad2(Tensor ddx, Tensor dy, Tensor x, Tensor? b, {_ACT}) -> Tensor",
    _bias_act_grad2,
    lambda ddx, dy, x, *_: _fake_like_dense(x),
)


def _setup_bias_act(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, b, *ctx.options = inputs
    piecewise = ctx.options[1] in PIECEWISE_LINEAR
    ctx.save_for_backward(*((output, None) if piecewise else (x, b)))
    ctx.bias_dtype = None if b is None else b.dtype


def _backward_bias_act(ctx: Any, dy: Tensor) -> tuple:
    saved, b = ctx.saved_tensors
    dx = _ops.bias_act_grad(dy, saved, b, *ctx.options)
    db = _sum_to_bias(dx, ctx.options[0]).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
    return dx, db, *[None] * len(ctx.options)


def _setup_bias_act_grad(ctx: Any, inputs: tuple, output: Tensor) -> None:
    dy, saved, b, *ctx.options = inputs
    ctx.piecewise = ctx.options[1] in PIECEWISE_LINEAR
    ctx.save_for_backward(None if ctx.piecewise else dy, saved, b)


def _backward_bias_act_grad(ctx: Any, ddx: Tensor) -> tuple:
    dy, saved, b = ctx.saved_tensors
    d_dy = _ops.bias_act_grad(ddx, saved, b, *ctx.options) if ctx.needs_input_grad[0] else None
    d_x = d_b = None
    if not ctx.piecewise and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
        d_x = _ops.bias_act_grad2(ddx, dy, saved, b, *ctx.options)
        d_b = _sum_to_bias(d_x, ctx.options[0]).to(b.dtype) if ctx.needs_input_grad[2] else None
    return d_dy, d_x, d_b, *[None] * len(ctx.options)


def _backward_bias_act_grad2(ctx: Any, *_: Tensor) -> tuple:
    raise NotImplementedError('compiled activations have two derivatives; use impl="ref" for a third one')


_differentiate("bias_act", _backward_bias_act, _setup_bias_act)
_differentiate("bias_act_grad", _backward_bias_act_grad, _setup_bias_act_grad)
_differentiate("bias_act_grad2", _backward_bias_act_grad2, lambda ctx, inputs, output: None)


# ----------------------------------------------------------------------------------------------------------------------
# Resampling.


def upfirdn2d(x: Tensor, f: Tensor | None, axes: Axes, flip_filter: bool, gain: float) -> Tensor:
    """Compute `ops.upfirdn2d.upfirdn2d` by the compiled operator; differentiable in x to any order."""
    return _ops.upfirdn2d(x, f, axes.as_ints(), flip_filter, gain)


def _upfirdn2d(
    kernels: ModuleType, x: Tensor, f: Tensor | None, axes: Sequence[int], flip: bool, gain: float
) -> Tensor:
    return kernels.upfirdn2d(_image(x), f, Axes.from_ints(axes), flip, gain)


_define(
    "upfirdn2d(Tensor x, Tensor? f, SymInt[] axes, bool flip, float gain) -> Tensor",
    _upfirdn2d,
    lambda x, f, axes, *_: _new_image(x, Axes.from_ints(axes).out_size),
)


def _setup_upfirdn2d(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, f, ctx.axes, ctx.flip, ctx.gain = inputs
    ctx.save_for_backward(f)


def _backward_upfirdn2d(ctx: Any, dy: Tensor) -> tuple:
    (f,) = ctx.saved_tensors
    axes = Axes.from_ints(ctx.axes).transposed().as_ints()
    return _ops.upfirdn2d(dy, f, axes, not ctx.flip, ctx.gain), None, None, None, None


_differentiate("upfirdn2d", _backward_upfirdn2d, _setup_upfirdn2d)


# ----------------------------------------------------------------------------------------------------------------------
# Filtered leaky ReLU.


def filtered_lrelu(
    x: Tensor,
    fu: Tensor | None,
    fd: Tensor | None,
    b: Tensor | None,
    up: Axes,
    down: Axes,
    up_gain: float,
    gain: float,
    slope: float,
    clamp: float | None,
    flip_filter: bool,
) -> Tensor:
    """Compute `ops.filtered_lrelu.filtered_lrelu` by the compiled operator; differentiable in x and b to any order.

    `up` are the axes from x to the grid of the leaky ReLU, `down` those from there to the result.
    """
    write_signs = torch.is_grad_enabled() and (x.requires_grad or (b is not None and b.requires_grad))
    options = (up_gain, gain, slope, -1.0 if clamp is None else clamp, flip_filter, write_signs)
    return _ops.filtered_lrelu(x, fu, fd, b, up.as_ints(), down.as_ints(), *options)[0]


def _filtered_lrelu(
    kernels: ModuleType,
    x: Tensor,
    fu: Tensor | None,
    fd: Tensor | None,
    b: Tensor | None,
    up: Sequence[int],
    down: Sequence[int],
    *options: Any,
) -> tuple[Tensor, Tensor]:
    b = None if b is None else b.to(x.dtype).contiguous()
    return kernels.filtered_lrelu(_image(x), fu, fd, b, Axes.from_ints(up), Axes.from_ints(down), *options)


def _fake_filtered_lrelu(
    x: Tensor, fu: Any, fd: Any, b: Any, up: Sequence[int], down: Sequence[int], *options: Any
) -> tuple[Tensor, Tensor]:
    height, width = Axes.from_ints(up).out_size
    size = [*x.shape[:2], height, (width + 3) // 4] if options[-1] else [0]
    return _new_image(x, Axes.from_ints(down).out_size), torch.empty(size, dtype=torch.uint8, device=x.device)


_define(
    "filtered_lrelu(Tensor x, Tensor? fu, Tensor? fd, Tensor? b, SymInt[] up, SymInt[] down, float up_gain, "
    "float gain, float slope, float clamp, bool flip, bool write_signs) -> (Tensor, Tensor)",
    _filtered_lrelu,
    _fake_filtered_lrelu,
)


def _setup_filtered_lrelu(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, fu, fd, b, up, down, up_gain, gain, ctx.slope, _, ctx.flip, ctx.wrote_signs = inputs
    ctx.first, ctx.second = Axes.from_ints(down).transposed(), Axes.from_ints(up).transposed()
    ctx.gain = up_gain * gain
    ctx.bias_dtype = None if b is None else b.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], fd, fu)


def _backward_filtered_lrelu(ctx: Any, dy: Tensor, _: Tensor) -> tuple:
    assert ctx.wrote_signs, "the bits for the derivative were not recorded"
    signs, f1, f2 = ctx.saved_tensors
    axes = (ctx.first.as_ints(), ctx.second.as_ints())
    dx = _ops.filtered_lrelu_signed(dy, signs, f1, f2, *axes, ctx.gain, ctx.slope, not ctx.flip)
    db = _sum_to_bias(dx, 1).to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None
    return dx, None, None, db, *[None] * 8


_differentiate("filtered_lrelu", _backward_filtered_lrelu, _setup_filtered_lrelu)


def _filtered_lrelu_signed(
    kernels: ModuleType,
    v: Tensor,
    signs: Tensor,
    f1: Tensor | None,
    f2: Tensor | None,
    first: Sequence[int],
    second: Sequence[int],
    *options: Any,
) -> Tensor:
    axes = Axes.from_ints(first), Axes.from_ints(second)
    return kernels.filtered_lrelu_signed(_image(v), signs.contiguous(), f1, f2, *axes, *options)


_define(
    "filtered_lrelu_signed(Tensor v, Tensor signs, Tensor? f1, Tensor? f2, SymInt[] first, SymInt[] second, "
    "float gain, float slope, bool flip) -> Tensor",
    _filtered_lrelu_signed,
    lambda v, signs, f1, f2, first, second, *_: _new_image(v, Axes.from_ints(second).out_size),
)


def _setup_filtered_lrelu_signed(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, signs, f1, f2, first, second, ctx.gain, ctx.slope, ctx.flip = inputs
    ctx.first, ctx.second = Axes.from_ints(second).transposed(), Axes.from_ints(first).transposed()
    ctx.save_for_backward(signs, f2, f1)


def _backward_filtered_lrelu_signed(ctx: Any, dy: Tensor) -> tuple:
    signs, f1, f2 = ctx.saved_tensors
    axes = (ctx.first.as_ints(), ctx.second.as_ints())
    dv = _ops.filtered_lrelu_signed(dy, signs, f1, f2, *axes, ctx.gain, ctx.slope, not ctx.flip)
    return dv, *[None] * 8


_differentiate("filtered_lrelu_signed", _backward_filtered_lrelu_signed, _setup_filtered_lrelu_signed)
