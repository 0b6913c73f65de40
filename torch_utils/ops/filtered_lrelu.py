"""Leaky ReLU between an up-sampling and a down-sampling filter (Karras et al. 2021, StyleGAN3)."""

from __future__ import annotations

import math

import torch

from torch_utils.ops import backends, matmul, spec
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
    """Applies a leaky ReLU to x (N, C, H, W) at a higher sampling rate; differentiable in x and b to any order.

    Adds b (C) to x, up-samples with fu (mean kept), applies gain * lrelu(., slope), clamps to +-clamp, and decimates
    with fd: an axis of n samples becomes (n * up + pad0 + pad1 - (taps_u - 1) - (taps_d - 1) + down - 1) // down long.

    fu, fd: [taps] for both axes, [height, width], or None for the identity; constants. up, down, padding, flip_filter
    and impl are those of `upfirdn2d`; the padding is applied before fu and covers both filters.
    Raises ValueError if fewer samples remain than a filter has taps, and for malformed arguments.
    """
    chosen = backends.select_impl(impl, x.device)
    assert x.ndim == 4, f"expected x (N, C, H, W), got {tuple(x.shape)}"
    assert all(f is None or not f.requires_grad for f in (fu, fd)), "filters have no gradient"
    if clamp is not None and clamp < 0:
        raise ValueError(f"clamp must not be negative, got {clamp}")
    up_xy, down_xy, pads = spec.parse_scaling(up), spec.parse_scaling(down), spec.parse_padding(padding)
    up_gain = up_xy[0] * up_xy[1]
    (up_taps_x, up_taps_y), (down_taps_x, down_taps_y) = _get_filter_size(fu), _get_filter_size(fd)
    mid_size = []
    for name, size, up_taps, down_taps, factor, axis_pads in (
        ("height", x.shape[2], up_taps_y, down_taps_y, up_xy[1], pads[2:]),
        ("width", x.shape[3], up_taps_x, down_taps_x, up_xy[0], pads[:2]),
    ):
        # Both filters together need as many samples as one filter with the taps of their convolution.
        spec.Axis(size, up_taps + down_taps - 1, factor, 1, *axis_pads).check(name)
        mid_size.append(spec.Axis(size, up_taps, factor, 1, *axis_pads).out_size)

    if chosen == "matmul":
        in_size = (x.shape[2], x.shape[3])
        mid = (mid_size[0], mid_size[1])
        # A positive gain passes through the leaky ReLU, so it costs nothing inside the up-sampling filter.
        folded = float(gain) if gain > 0 else 1.0
        flip = bool(flip_filter)
        up_plan = matmul.make_plan(fu, in_size, up_xy, (1, 1), pads, flip, up_gain * folded, x.dtype)
        down_plan = matmul.make_plan(fd, mid, (1, 1), down_xy, (0, 0, 0, 0), flip, 1.0, x.dtype)
        if up_plan is not None and down_plan is not None:
            nonlinearity = matmul.Nonlinearity(gain / folded, slope, clamp)
            return matmul.filtered_lrelu(bias_act(x, b), up_plan, down_plan, nonlinearity)
    x = bias_act(x, b, impl=impl)
    x = upfirdn2d(x, fu, up=up_xy, padding=pads, gain=up_gain, flip_filter=flip_filter, impl=impl)
    x = bias_act(x, act="lrelu", alpha=slope, gain=gain, clamp=clamp, impl=impl)
    return upfirdn2d(x, fd, down=down_xy, flip_filter=flip_filter, impl=impl)
