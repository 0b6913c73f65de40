"""Leaky ReLU between an up-sampling and a down-sampling filter (Karras et al. 2021, StyleGAN3)."""

from __future__ import annotations

import math

import torch

from torch_utils.ops import backends, matmul, registered, spec
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.spec import Padding, Scaling
from torch_utils.ops.upfirdn2d import _get_filter_size, upfirdn2d


def filtered_lrelu(
    x: torch.Tensor,
    fu: torch.Tensor | None = None,
    fd: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    up: Scaling = 1,
    down: Scaling = 1,
    padding: Padding = 0,
    gain: float = math.sqrt(2),
    slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """Apply a leaky ReLU to x (N, C, H, W) at a higher sampling rate; differentiable in x and b to any order.

    Adds b (C) to x, up-samples with fu (mean kept), applies gain * lrelu(., slope), clamps to +-clamp, and decimates
    with fd: an axis of n samples becomes (n * up + pad0 + pad1 - (taps_u - 1) - (taps_d - 1) + down - 1) // down long.

    fu, fd: [taps] for both axes, [height, width], or None for the identity; constants. up, down, padding, flip_filter
    and impl are those of `upfirdn2d`; the padding is applied before fu and covers both filters.
    Raises ValueError if fewer samples remain than a filter has taps, and for malformed arguments.
    """
    chosen = backends.select_impl(impl, x)
    assert x.ndim == 4, f"expected x (N, C, H, W), got {tuple(x.shape)}"
    assert all(f is None or not f.requires_grad for f in (fu, fd)), "filters have no gradient"
    if clamp is not None and clamp < 0:
        raise ValueError(f"clamp must not be negative, got {clamp}")
    up_xy, down_xy, pads = spec.parse_scaling(up), spec.parse_scaling(down), spec.parse_padding(padding)
    up_gain = up_xy[0] * up_xy[1]
    up_taps, down_taps = _get_filter_size(fu), _get_filter_size(fd)
    # Both filters together need as many samples as one filter with the taps of their convolution.
    both_taps = (up_taps[0] + down_taps[0] - 1, up_taps[1] + down_taps[1] - 1)
    spec.make_axes(x.shape[2:], both_taps, up_xy, (1, 1), pads).check()
    up_axes = spec.make_axes(x.shape[2:], up_taps, up_xy, (1, 1), pads)
    down_axes = spec.make_axes(up_axes.out_size, down_taps, (1, 1), down_xy)

    if chosen == "compiled":
        flip, gain = bool(flip_filter), float(gain)
        return registered.filtered_lrelu(x, fu, fd, b, up_axes, down_axes, up_gain, gain, slope, clamp, flip)
    if chosen == "matmul":
        in_size = (x.shape[2], x.shape[3])
        # A positive gain commutes with the leaky ReLU, so it can be included in the up-sampling filter at no cost.
        folded = float(gain) if gain > 0 else 1.0
        flip = bool(flip_filter)
        up_plan = matmul.make_plan(fu, in_size, up_xy, (1, 1), pads, flip, up_gain * folded, x.dtype)
        down_plan = matmul.make_plan(fd, up_axes.out_size, (1, 1), down_xy, (0, 0, 0, 0), flip, 1.0, x.dtype)
        if up_plan is not None and down_plan is not None:
            nonlinearity = matmul.Nonlinearity(gain / folded, slope, clamp)
            return matmul.filtered_lrelu(bias_act(x, b), up_plan, down_plan, nonlinearity)
    x = bias_act(x, b, impl=impl)
    x = upfirdn2d(x, fu, up=up_xy, padding=pads, gain=up_gain, flip_filter=flip_filter, impl=impl)
    x = bias_act(x, act="lrelu", alpha=slope, gain=gain, clamp=clamp, impl=impl)
    return upfirdn2d(x, fd, down=down_xy, flip_filter=flip_filter, impl=impl)
