"""2-D convolution with optional FIR up- or down-sampling (Karras et al. 2020, StyleGAN2)."""

from __future__ import annotations

import torch

from torch_utils.ops import spec
from torch_utils.ops.conv2d_gradfix import conv2d, conv_transpose2d
from torch_utils.ops.spec import Padding
from torch_utils.ops.upfirdn2d import _get_filter_size, upfirdn2d


def conv2d_resample(
    x: torch.Tensor,
    w: torch.Tensor,
    f: torch.Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Padding = 0,
    groups: int = 1,
    flip_weight: bool = True,
    flip_filter: bool = False,
) -> torch.Tensor:
    """Up-sample x (N, C, H, W) with f, convolve with w (out, C / groups, kh, kw), decimate with f.

    The definition is upfirdn2d(up), convolution, upfirdn2d(down), with `padding` (in samples of the
    up-sampled image) plus the padding that centres the filters, all applied first. flip_weight: True correlates, False
    convolves. Cheaper orders with the same result are used where the operations commute. Differentiable in x and w.
    """
    assert x.ndim == w.ndim == 4 and x.shape[1] == w.shape[1] * groups, f"x {tuple(x.shape)}, w {tuple(w.shape)}"
    assert up >= 1 and down >= 1
    kernel_height, kernel_width = w.shape[2:]
    taps_x, taps_y = _get_filter_size(f)
    pads = list(spec.parse_padding(padding))
    for factor, get_padding in ((up, spec.upsample_padding), (down, spec.downsample_padding)):
        if factor > 1:
            extra = (*get_padding(taps_x, factor), *get_padding(taps_y, factor))
            pads = [p + e for p, e in zip(pads, extra, strict=True)]
    pointwise = kernel_height == kernel_width == 1

    if up > 1 and pointwise and down == 1:
        x = _conv(x, w, groups=groups, flip_weight=flip_weight)
        return upfirdn2d(x, f, up=up, padding=pads, gain=up**2, flip_filter=flip_filter)

    if up > 1:
        # Zero insertion and convolution are one transposed convolution. It pads by kernel - 1 in front and by
        # kernel - up behind (zero insertion adds up - 1 samples at the end): subtract both from the filter's padding.
        pads[0] -= kernel_width - 1
        pads[1] -= kernel_width - up
        pads[2] -= kernel_height - 1
        pads[3] -= kernel_height - up
        x = _conv_transpose(x, w, up, groups, flip_weight)
        x = upfirdn2d(x, f, padding=pads, gain=up**2, flip_filter=flip_filter)
        return upfirdn2d(x, f, down=down, flip_filter=flip_filter) if down > 1 else x

    if down > 1 and pointwise:
        x = upfirdn2d(x, f, down=down, padding=pads, flip_filter=flip_filter)
        return _conv(x, w, groups=groups, flip_weight=flip_weight)

    if down > 1:
        x = upfirdn2d(x, f, padding=pads, flip_filter=flip_filter)
        return _conv(x, w, stride=down, groups=groups, flip_weight=flip_weight)

    if pads[0] == pads[1] and pads[2] == pads[3] and min(pads) >= 0:
        return _conv(x, w, padding=(pads[2], pads[0]), groups=groups, flip_weight=flip_weight)
    return _conv(upfirdn2d(x, None, padding=pads), w, groups=groups, flip_weight=flip_weight)


def _conv(
    x: torch.Tensor,
    w: torch.Tensor,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    groups: int = 1,
    flip_weight: bool = True,
) -> torch.Tensor:
    return conv2d(x, w if flip_weight else w.flip([2, 3]), stride=stride, padding=padding, groups=groups)


def _conv_transpose(x: torch.Tensor, w: torch.Tensor, stride: int, groups: int, flip_weight: bool) -> torch.Tensor:
    out_channels, in_channels, kernel_height, kernel_width = w.shape
    w = w.reshape(groups, out_channels // groups, in_channels, kernel_height, kernel_width).transpose(1, 2)
    w = w.reshape(groups * in_channels, out_channels // groups, kernel_height, kernel_width)
    # A transposed convolution with the unflipped weight is a true convolution.
    return conv_transpose2d(x, w.flip([2, 3]) if flip_weight else w, stride=stride, groups=groups)
