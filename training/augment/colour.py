"""Change brightness, contrast, saturation and hue of whole clips, as RIVER does (Davtyan et al., ICCV 2023).

Each change is made on uint8 values, as torchvision makes it: results are cut off to whole numbers, so that the four
changes differ from one linear map. A clip has one draw for all of its frames.
"""

import numpy as np
import torch
from torch import Tensor

SPREAD = 0.1  # of brightness, contrast and saturation: factors are 1 + U(-SPREAD, SPREAD)
HUE_SPREAD = 0.25  # of the shift of hue, in turns
_GREY = (0.2989, 0.587, 0.114)


def draw_changes(rng: np.random.RandomState, spread: float = SPREAD, hue_spread: float = HUE_SPREAD) -> np.ndarray:
    """Return the changes of one clip: brightness, contrast and saturation less 1, and the shift of hue: (4,)."""
    return np.array([*(rng.uniform(-spread, spread) for _ in range(3)), rng.uniform(-hue_spread, hue_spread)])


def change_colours(frames: Tensor, brightness: float, contrast: float, saturation: float, hue: float) -> Tensor:
    """Return frames uint8 (T, 3, H, W) with changed colours.

    The first three arguments are factors less 1, the last is a shift in turns from -0.5 to 0.5.
    """
    frames = _blend(frames, torch.zeros((), device=frames.device), 1 + brightness)
    means = _grey(frames).to(torch.float32).mean((-3, -2, -1), keepdim=True)
    frames = _blend(frames, means, 1 + contrast)
    frames = _blend(frames, _grey(frames).to(torch.float32), 1 + saturation)
    return _shift_hue(frames, hue)


def change_clips(video: Tensor, changes: np.ndarray) -> Tensor:
    """Return clips (N, 3, T, H, W) in [-1, 1] whose colours are changed by `changes` (N, 4), of `draw_changes`.

    Values are rounded to those of uint8 first, which those of a dataset are.
    """
    frames = ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).transpose(1, 2)  # (N, T, 3, H, W)
    changed = [change_colours(clip, *map(float, row)) for clip, row in zip(frames, changes, strict=True)]
    return torch.stack(changed).transpose(1, 2).to(video.dtype).div(127.5).sub(1)


def _blend(frames: Tensor, other: Tensor, factor: float) -> Tensor:
    """Return factor * frames + (1 - factor) * other, cut off to uint8."""
    return (factor * frames + (1 - factor) * other).clamp(0, 255).to(torch.uint8)


def _grey(frames: Tensor) -> Tensor:
    """Return the luma of frames uint8 (T, 3, H, W), cut off: uint8 (T, 1, H, W)."""
    red, green, blue = frames.to(torch.float32).unbind(-3)
    luma = _GREY[0] * red + _GREY[1] * green + _GREY[2] * blue
    return luma.to(torch.uint8).unsqueeze(-3)


def _shift_hue(frames: Tensor, shift: float) -> Tensor:
    """Return frames uint8 (T, 3, H, W) with their hue shifted by a part of a turn, through HSV in [0, 1]."""
    red, green, blue = (frames.to(torch.float32) / 255).unbind(-3)
    high, low = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    chroma, is_grey = high - low, high == low
    ones = torch.ones_like(high)
    saturation = chroma / torch.where(is_grey, ones, high)
    divisor = torch.where(is_grey, ones, chroma)
    to_red, to_green, to_blue = (high - red) / divisor, (high - green) / divisor, (high - blue) / divisor
    is_red, is_green = high == red, high == green
    angle = torch.where(is_red, to_blue - to_green, torch.where(is_green, 2 + to_red - to_blue, 4 + to_green - to_red))
    hue = (torch.fmod(angle / 6 + 1, 1) + shift) % 1
    sector = torch.floor(hue * 6)
    part = hue * 6 - sector
    dark = (high * (1 - saturation)).clamp(0, 1)
    falling = (high * (1 - saturation * part)).clamp(0, 1)
    rising = (high * (1 - saturation * (1 - part))).clamp(0, 1)
    sector = sector.to(torch.int64) % 6
    channels = (
        (high, falling, dark, dark, rising, high),  # red, in each sector
        (rising, high, high, falling, dark, dark),
        (dark, dark, rising, high, high, falling),
    )
    rgb = torch.stack([torch.stack(values).gather(0, sector[None])[0] for values in channels], dim=-3)
    return (rgb * (256 - 1e-3)).to(torch.uint8)  # so that 1 becomes 255
