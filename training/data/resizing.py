"""Crop and resize frames in the ways of published systems, whose numbers depend on the filter.

| name | published by | crop | filter |
|---|---|---|---|
| `lanczos` | this project | centre, to the aspect ratio | Lanczos |
| `tats` | TATS: video files and HDF5 | centre, after resizing | bilinear without antialiasing, in floating point |
| `tats-frames` | TATS: folders of frames | centre | Lanczos, also at the same size |
| `mebt` | MeBT: lists of frames | centre | bilinear of Pillow, unless the size is right |
| `river` | RIVER: reading | centre, after resizing | bilinear with antialiasing |
| `stretch` | RIVER: converting | none | bicubic of Pillow, ignoring the aspect ratio |

The published ones make squares; here the shorter side is the one that the aspect ratio leaves uncropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from training.data.pictures import center_crop_and_resize

if TYPE_CHECKING:  # torch itself is imported where it is needed, so that commands show their help quickly
    from torch import Tensor

Size = tuple[int, int]  # height, width


def resize_lanczos(frames: np.ndarray, size: Size) -> np.ndarray:
    """Crop and resize as datasets of this project do: uint8 (T, H, W, 3) -> (T, *size, 3)."""
    return np.stack([center_crop_and_resize(frame, *size) for frame in frames])


def tats_pixels(frames: np.ndarray, size: Size) -> Tensor:
    """Return what TATS makes of frames uint8 (T, H, W, 3): float32 (3, T, *size) in [0, 1], not rounded."""
    video = _floats(frames).permute(3, 0, 1, 2) / 255  # (3, T, H, W)
    height, width = video.shape[2:]
    # The side that is not cropped gets its size, the other one as much as the aspect ratio asks for.
    scale = max(size[0] / height, size[1] / width)
    is_wide = size[0] / height >= size[1] / width
    target = (size[0], math.ceil(width * scale)) if is_wide else (math.ceil(height * scale), size[1])
    video = _interpolate(video, target)
    top, left = (target[0] - size[0]) // 2, (target[1] - size[1]) // 2
    return video[:, :, top : top + size[0], left : left + size[1]]


def resize_tats(frames: np.ndarray, size: Size) -> np.ndarray:
    """Return `tats_pixels` rounded to uint8: (T, *size, 3)."""
    return (tats_pixels(frames, size) * 255).round().byte().permute(1, 2, 3, 0).contiguous().numpy()


def resize_tats_frames(frames: np.ndarray, size: Size) -> np.ndarray:
    """Crop the centre, then resize by Pillow's Lanczos filter: uint8 (T, H, W, 3) -> (T, *size, 3)."""
    return _by_pillow(frames, size, Image.Resampling.LANCZOS)


def resize_mebt(frames: np.ndarray, size: Size) -> np.ndarray:
    """Crop the centre, then resize by Pillow's bilinear filter: uint8 (T, H, W, 3) -> (T, *size, 3)."""
    return _by_pillow(frames, size, Image.Resampling.BILINEAR)


def resize_river(frames: np.ndarray, size: Size) -> np.ndarray:
    """Resize by an antialiasing bilinear filter, then crop the centre: uint8 (T, H, W, 3) -> (T, *size, 3)."""
    height, width = frames.shape[1:3]
    is_wide = size[0] / height >= size[1] / width
    target = (size[0], int(size[0] * width / height)) if is_wide else (int(size[1] * height / width), size[1])
    target = (max(target[0], size[0]), max(target[1], size[1]))
    video = _floats(frames).permute(0, 3, 1, 2)
    if target != (height, width):
        video = _interpolate(video, target, antialias=True).round().clamp(0, 255)
    top, left = (round((found - wanted) / 2) for found, wanted in zip(target, size, strict=True))
    return video[:, :, top : top + size[0], left : left + size[1]].byte().permute(0, 2, 3, 1).contiguous().numpy()


def resize_stretch(frames: np.ndarray, size: Size) -> np.ndarray:
    """Resize by Pillow's bicubic filter, ignoring the aspect ratio: uint8 (T, H, W, 3) -> (T, *size, 3)."""
    images = (Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling.BICUBIC) for frame in frames)
    return np.stack([np.asarray(image) for image in images])


def _floats(frames: np.ndarray) -> Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(frames)).to(torch.float32)


def _interpolate(video: Tensor, size: Size, antialias: bool = False) -> Tensor:
    from torch.nn import functional

    return functional.interpolate(video, size=size, mode="bilinear", align_corners=False, antialias=antialias)


def _by_pillow(frames: np.ndarray, size: Size, resampling: Image.Resampling) -> np.ndarray:
    """Crop the centre to the aspect ratio of `size`, with offsets rounded down, and resize."""
    height, width = frames.shape[1:3]
    if height * size[1] > width * size[0]:
        crop = max(width * size[0] // size[1], 1), width
    else:
        crop = height, max(height * size[1] // size[0], 1)
    top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
    found = []
    for frame in frames:
        image = Image.fromarray(frame).crop((left, top, left + crop[1], top + crop[0]))
        if (image.height, image.width) != size or resampling is Image.Resampling.LANCZOS:
            image = image.resize((size[1], size[0]), resampling)
        found.append(np.asarray(image))
    return np.stack(found)


RESIZERS: dict[str, Callable[[np.ndarray, Size], np.ndarray]] = {
    "lanczos": resize_lanczos,
    "tats": resize_tats,
    "tats-frames": resize_tats_frames,
    "mebt": resize_mebt,
    "river": resize_river,
    "stretch": resize_stretch,
}
