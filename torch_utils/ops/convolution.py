"""Convolutions of images and clips that take the fastest way for shape and processor, differentiable to any order.

The reference is `torch.nn.functional`; the results differ from it by rounding (`winograd`, `onednn`). On CPUs with a
stride of one, in single precision and, where noted, in bfloat16:

| kernel | computed |
|---|---|
| 3x3 and k x 3x3 | by Winograd's algorithm, where it saves more products than its transforms and additions cost |
| the same in bfloat16 | so too, in single precision, where that saves more than bfloat16 does; never with AMX |
| 1x1 and 1x1x1 | as matrix products by oneDNN, on AMD's processors, where MKL and oneDNN's convolution are slower |

The gradient of the input is such a convolution of the output's gradient with the flipped weight, and that of the
weight has the same products. The choice depends on shapes, processor and compiled kernels alone, so that a resumed run
computes the same numbers. benchmarks/convolution.py measures each way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_utils import onednn
from torch_utils.ops import backends, winograd

Sizes = int | tuple[int, ...] | list[int]
Triple = tuple[int, int, int]

# Time of a Winograd convolution in multiplications of a direct one, measured with AVX-512 (docs/LOG.md): of a product,
# of evaluating an element of the weight at a point, of the same for input and output, of adding an element of one of
# several taps along time, and of the calls that add them, for a point of a block.
PRODUCT, WEIGHT_POINT, IMAGE_POINT, TAP_POINT, CALL = 1.15, 200, 60, 64, 3e6
SMALLEST = 1 << 22  # products of one tap, below which choosing costs more than it gains
GAIN = {torch.float32: 1.2, torch.bfloat16: 2.1}  # ratios of single precision from which Winograd's way is taken
POINTWISE_CHANNELS, POINTWISE_PRODUCTS = 96, 1 << 25  # from which products are faster


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Tensor:
    """Return `torch.nn.functional.conv2d` of input (N, C, H, W) and weight (Co, C / groups, kh, kw)."""
    size = (0, *_sizes(padding, 2))
    if not (_is_plain(input, weight, stride, dilation, groups) and _gains(input[:, :, None], weight[:, :, None], size)):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    y = _correlate(input.unsqueeze(2), weight.unsqueeze(2), size).squeeze(2)  # N Co H W
    return _add_bias(y, bias)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Tensor:
    """Return `torch.nn.functional.conv3d` of input (N, C, T, H, W) and weight (Co, C / groups, kt, kh, kw)."""
    size = _sizes(padding, 3)
    if not (_is_plain(input, weight, stride, dilation, groups) and _gains(input, weight, size)):
        return F.conv3d(input, weight, bias, stride, padding, dilation, groups)
    y = _correlate(input, weight, size)
    return _add_bias(y, bias)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` through `conv2d`: the same parameters and initial values."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            return super()._conv_forward(input, weight, bias)
        return conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class Conv3d(nn.Conv3d):
    """`torch.nn.Conv3d` through `conv3d`: the same parameters and initial values."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            return super()._conv_forward(input, weight, bias)
        return conv3d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def _add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """Return a convolution's new result (N, Co, ...) plus a bias (Co)."""
    if bias is None:
        return y
    bias = bias.view(-1, *[1] * (y.ndim - 2))
    return y + bias if torch.is_grad_enabled() else y.add_(bias)


def _sizes(value: Sizes, axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def _is_plain(x: Tensor, weight: Tensor, stride: Sizes, dilation: Sizes, groups: int) -> bool:
    """Return whether these options and tensors can take another way than PyTorch's."""
    if x.numel() * weight.shape[0] < SMALLEST:
        return False
    known = x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in GAIN and groups == 1
    if not known or x.ndim != weight.ndim or x.shape[1] != weight.shape[1] or x.numel() == 0:
        return False  # PyTorch reports what does not fit
    if any(step != 1 for sizes in (stride, dilation) for step in _sizes(sizes, 1)):
        return False
    traced = torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active()
    return not (traced or torch.is_autocast_enabled("cpu"))


def _gains(x: Tensor, weight: Tensor, padding: tuple[int, ...]) -> bool:
    """Return whether another way is faster for x (N, C, T, H, W) and weight (Co, C, kt, kh, kw)."""
    taps = weight.shape[2:]
    if any(pad >= size for pad, size in zip(padding, taps, strict=True)):
        return False  # the gradient of the input would need a negative padding
    if any(size + 2 * pad < tap for size, pad, tap in zip(x.shape[2:], padding, taps, strict=True)):
        return False
    if x.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        return False
    if tuple(taps) == (1, 1, 1):
        if x.dtype != torch.float32:
            return False
        channels, products = min(weight.shape[:2]), weight.numel() * x.shape[0] * x[0, 0].numel()
        large = channels >= POINTWISE_CHANNELS and products >= POINTWISE_PRODUCTS * x.shape[0]
        return large and onednn.is_amd() and onednn.has_onednn()
    if tuple(taps[1:]) != (winograd.TAPS, winograd.TAPS):
        return False
    return winograd_gain(tuple(x.shape), tuple(weight.shape), padding) >= GAIN[x.dtype] and has_kernels(x)


def winograd_gain(x: tuple[int, ...], weight: tuple[int, ...], padding: tuple[int, ...]) -> float:
    """Return how many times as fast Winograd's way is expected to be for the shapes of `_gains`."""
    outputs, inputs, taps = weight[:3]
    plan = winograd.make_plan(x[2:], taps, padding)
    tiles = x[0] * (plan.frames + taps - 1) * plan.tiles_y * plan.tiles_x
    products = taps * inputs * outputs * (PRODUCT * tiles + WEIGHT_POINT)
    additions = 0.0
    if taps > 1:
        num_blocks = sum(1 for _ in winograd.blocks(plan, x[0], inputs + outputs, taps))
        additions = taps * outputs * tiles * TAP_POINT + num_blocks * CALL
    direct = winograd.TAPS**2 * taps * inputs * outputs * x[0] * plan.frames * plan.height * plan.width
    return direct / (plan.num_points * (products + additions + (inputs + outputs) * tiles * IMAGE_POINT))


def has_kernels(x: Tensor) -> bool:
    """Return whether the kernels of Winograd's way are compiled, as they are used."""
    return backends.select_impl("auto", x) == "compiled"


def _correlate(x: Tensor, weight: Tensor, padding: tuple[int, ...]) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Correlation.apply(x, weight, padding)  # pyright: ignore[reportReturnType]
    return _forward(x, weight, padding)


def _forward(x: Tensor, weight: Tensor, padding: tuple[int, ...]) -> Tensor:
    if weight.shape[3] > 1:
        return winograd.correlate(x.float(), weight.float(), _triple(padding)).to(x.dtype)
    rows = weight.flatten(1)  # Co C
    return torch.stack([onednn.multiply(rows, image.flatten(1).t()) for image in x]).unflatten(2, x.shape[2:])


def _weight_gradient(x: Tensor, dy: Tensor, kernel: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
    """Return the gradient of a weight (Co, C, *kernel) for dy (N, Co, T', H', W')."""
    if kernel[1] > 1:
        return winograd.weight_gradient(x.float(), dy.float(), kernel[0], _triple(padding)).to(x.dtype)
    dw = x.new_zeros(dy.shape[1], x.shape[1])
    for rows, columns in zip(dy.flatten(2), x.flatten(2), strict=True):
        dw += onednn.multiply(rows, columns)
    return dw.view(*dw.shape, 1, 1, 1)


def _triple(padding: tuple[int, ...]) -> Triple:
    return padding[0], padding[1], padding[2]


def _input_gradient(weight: Tensor, dy: Tensor, padding: tuple[int, ...]) -> Tensor:
    """Return the gradient of the input: a convolution with the flipped weight, which takes its own fastest way."""
    flipped = weight.transpose(0, 1).flip([2, 3, 4])
    pads = [size - 1 - pad for size, pad in zip(weight.shape[2:], padding, strict=True)]
    return conv3d(dy, flipped, padding=pads)


class _Correlation(torch.autograd.Function):
    """conv3d(x, weight, padding=padding)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return _forward(x, weight, padding)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (dy,) = gradients
        x, weight = ctx.saved_tensors
        dx = _input_gradient(weight, dy, ctx.padding) if ctx.needs_input_grad[0] else None
        kernel = tuple(weight.shape[2:])
        dw = _WeightGradient.apply(x, dy, kernel, ctx.padding) if ctx.needs_input_grad[1] else None
        return dx, dw, None  # pyright: ignore[reportReturnType]


class _WeightGradient(torch.autograd.Function):
    """The gradient of the weight, linear in x and in dy, whose derivatives are convolutions again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dy: Tensor, kernel: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, dy)
        ctx.padding = padding
        return _weight_gradient(x, dy, kernel, padding)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (ddw,) = gradients
        x, dy = ctx.saved_tensors
        dx = _input_gradient(ddw, dy, ctx.padding) if ctx.needs_input_grad[0] else None
        ddy = conv3d(x, ddw, padding=ctx.padding) if ctx.needs_input_grad[1] else None
        return dx, ddy, None, None
