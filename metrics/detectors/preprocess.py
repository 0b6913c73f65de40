"""Shared preprocessing of the detectors: full precision, small batches, and resizing as published."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FRAMES_AT_ONCE = 16  # of about 300x300; larger batches are no faster on a CPU, and need half a gigabyte for activations

Net = TypeVar("Net", bound=nn.Module)


def place(net: Net, device: torch.device | str) -> Net:
    """Move `net` to `device`; on a CPU to channels last, which is a quarter faster there."""
    device = torch.device(device)
    if device.type == "cpu":
        net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return net.to(device)


@contextlib.contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Compute in full float32: no autocast, and no TF32, which changes FVD by a thousandth."""
    precision = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False, fp32_precision="ieee")
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False), cudnn:
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def in_batches(run: Callable[[Tensor], Tensor], items: Tensor, size: int, device: torch.device) -> Tensor:
    """Return `run(items)`, computed for at most `size` items at a time, on `device` and in full float32."""
    with exact(device):
        return torch.cat([run(part.to(device)) for part in items.split(size)])


def stretch(images: Tensor, height: int, width: int, antialias: bool = False) -> Tensor:
    """Stretch bilinearly, half-pixel centres: (N, 3, H, W) -> float32 (N, 3, height, width)."""
    images = images.float()
    if images.shape[2:] == (height, width):
        return images
    return F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False, antialias=antialias)


def stretch_as_tf1(images: Tensor, height: int, width: int) -> Tensor:
    """Resize bilinearly as TensorFlow 1: (N, 3, H, W) -> float32 (N, 3, height, width).

    Output pixel i samples input position i * in / out, without the half-pixel shift, so that the upper left pixels are
    aligned; positions beyond the last pixel repeat it. No antialiasing.
    """
    images = _lerp(images.float(), 3, width)
    return _lerp(images, 2, height)


def _lerp(images: Tensor, axis: int, size: int) -> Tensor:
    last = images.shape[axis] - 1
    position = torch.arange(size, dtype=torch.float32, device=images.device) * (images.shape[axis] / size)
    lower = position.floor().clamp_max(last)
    weight = (position - lower).reshape([-1 if a == axis else 1 for a in range(4)])
    before = images.index_select(axis, lower.long())
    after = images.index_select(axis, (lower.long() + 1).clamp_max(last))
    return before + (after - before) * weight
