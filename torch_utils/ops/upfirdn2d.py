"""Zero insertion, FIR filtering and decimation of images in one call, and its usual special cases."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from torch_utils.ops import backends, matmul, reference, registered, spec
from torch_utils.ops.spec import Padding, Scaling


def _get_filter_size(f: torch.Tensor | None) -> tuple[int, int]:
    """Return the numbers of taps (x, y) of None, of a separable [taps] or of a [height, width] filter."""
    if f is None:
        return 1, 1
    assert f.ndim in (1, 2) and f.numel() > 0, f"a filter is [taps] or [height, width], got {tuple(f.shape)}"
    return f.shape[-1], f.shape[0]


def setup_filter(
    f: torch.Tensor | np.ndarray | Sequence | float | None,
    device: torch.device | str = "cpu",
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1,
    separable: bool | None = None,
) -> torch.Tensor:
    """Return a float32 filter for the functions of this module.

    f is a number, [taps], [height, width] or None (the identity). 1-D filters of 8 or more taps stay 1-D and are
    applied to both axes (`separable` overrides the rule), shorter ones become their outer product. `normalize`
    divides by the sum; `gain` is that of both axes together.
    Raises ValueError for another rank, an empty filter, or a 2-D filter with separable=True.
    """
    f = torch.as_tensor(1 if f is None else f, dtype=torch.float32)
    if f.ndim > 2 or f.numel() == 0:
        raise ValueError(f"a filter is a number, [taps] or [height, width], got the shape {tuple(f.shape)}")
    f = f.reshape(1) if f.ndim == 0 else f
    if separable is None:
        separable = f.ndim == 1 and f.numel() >= 8
    if separable and f.ndim == 2:
        raise ValueError(f"a separable filter must be 1-D, got the shape {tuple(f.shape)}")
    if f.ndim == 1 and not separable:
        f = f.outer(f)
    if normalize:
        f = f / f.sum()
    if flip_filter:
        f = f.flip(list(range(f.ndim)))
    return (f * gain ** (f.ndim / 2)).to(device)


def upfirdn2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    up: Scaling = 1,
    down: Scaling = 1,
    padding: Padding = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "auto",
) -> torch.Tensor:
    """Up-sample, filter and decimate x (N, C, H, W); differentiable in x to any order, the filter is a constant.

    Insert up - 1 zeros after every sample, pad with zeros or crop, filter every channel ("valid"), and keep every
    down-th sample from the first: an axis of n samples becomes (n * up + pad0 + pad1 - taps) // down + 1 long.

    f: [taps] for both axes, [height, width], or None for the identity. up, down: int or (x, y). padding: int, (x, y)
    or (x0, x1, y0, y1), counted after zero insertion, negative to crop. flip_filter: False convolves, True correlates.
    gain: total factor. impl: one of `backends`; "matmul" takes the reference where the filter is not separable.
    Raises ValueError if fewer samples remain than the filter has taps, and for malformed arguments.
    """
    chosen = backends.select_impl(impl, x)
    assert x.ndim == 4, f"expected x (N, C, H, W), got {tuple(x.shape)}"
    assert f is None or not f.requires_grad, "filters have no gradient"
    up_xy, down_xy, pads = spec.parse_scaling(up), spec.parse_scaling(down), spec.parse_padding(padding)
    axes = spec.make_axes(x.shape[2:], _get_filter_size(f), up_xy, down_xy, pads)
    axes.check()
    if chosen == "compiled":
        return registered.upfirdn2d(x, f, axes, bool(flip_filter), float(gain))

    if chosen == "matmul":
        plan = matmul.make_plan(
            f, (x.shape[2], x.shape[3]), up_xy, down_xy, pads, bool(flip_filter), float(gain), x.dtype
        )
        if plan is not None:
            return matmul.upfirdn2d(x, plan)
    return reference.resample(x, _kernels(f, x, flip_filter, gain), up_xy, down_xy, pads)


def _kernels(f: torch.Tensor | None, x: torch.Tensor, flip_filter: bool, gain: float) -> list[torch.Tensor]:
    """Return the 2-D kernels of the reference, [kh, kw] in correlation order with the gain included."""
    if f is None:
        f = torch.ones([1, 1], dtype=torch.float32, device=x.device)
    # In double precision the gain must not be rounded to the filter's float32.
    f = f.to(torch.promote_types(f.dtype, x.dtype))
    if not flip_filter:
        f = f.flip(list(range(f.ndim)))
    if f.ndim == 2:
        return [f * gain]
    axis_gain = math.sqrt(abs(gain))
    return [(f * math.copysign(axis_gain, gain))[None, :], (f * axis_gain)[:, None]]


def filter2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    padding: Padding = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "auto",
) -> torch.Tensor:
    """Filter x (N, C, H, W) and keep its size; `padding` is additional. See `upfirdn2d`."""
    taps_x, taps_y = _get_filter_size(f)
    pads = _add_padding(padding, spec.same_padding(taps_x), spec.same_padding(taps_y))
    return upfirdn2d(x, f, padding=pads, flip_filter=flip_filter, gain=gain, impl=impl)


def upsample2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    up: Scaling = 2,
    padding: Padding = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "auto",
) -> torch.Tensor:
    """Up-sample x (N, C, H, W) to (N, C, H * up, W * up) and keep its mean; `padding` is in output samples."""
    up_x, up_y = spec.parse_scaling(up)
    taps_x, taps_y = _get_filter_size(f)
    pads = _add_padding(padding, spec.upsample_padding(taps_x, up_x), spec.upsample_padding(taps_y, up_y))
    gain = gain * up_x * up_y
    return upfirdn2d(x, f, up=(up_x, up_y), padding=pads, flip_filter=flip_filter, gain=gain, impl=impl)


def downsample2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    down: Scaling = 2,
    padding: Padding = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "auto",
) -> torch.Tensor:
    """Decimate x (N, C, H, W) to (N, C, H // down, W // down); `padding` is in input samples. See `upfirdn2d`."""
    down_x, down_y = spec.parse_scaling(down)
    taps_x, taps_y = _get_filter_size(f)
    pads = _add_padding(padding, spec.downsample_padding(taps_x, down_x), spec.downsample_padding(taps_y, down_y))
    return upfirdn2d(x, f, down=(down_x, down_y), padding=pads, flip_filter=flip_filter, gain=gain, impl=impl)


def _add_padding(padding: Padding, extra_x: tuple[int, int], extra_y: tuple[int, int]) -> tuple[int, int, int, int]:
    x0, x1, y0, y1 = spec.parse_padding(padding)
    return x0 + extra_x[0], x1 + extra_x[1], y0 + extra_y[0], y1 + extra_y[1]
