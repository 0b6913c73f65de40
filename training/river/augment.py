"""Changes of the colours of whole clips, as RIVER's release makes them for CLEVRER with torchvision's functions.

Colours are those of 8 bits, and each change rounds towards zero to 8 bits, as torchvision does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)


@dataclass(frozen=True)
class Change:
    """Factors of brightness, contrast and saturation, and a shift of the hue in turns of the colour wheel."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0


def draw_change(rng: np.random.RandomState) -> Change:
    """Draw the change of a clip: factors in [0.9, 1.1], a shift in [-0.25, 0.25]."""
    brightness, contrast, saturation = (1 + rng.uniform(-0.1, 0.1, 3)).tolist()
    return Change(brightness, contrast, saturation, float(rng.uniform(-0.25, 0.25)))


def change_colours(frames: Tensor, change: Change) -> Tensor:
    """Return frames with changed colours: uint8 (T, 3, H, W) -> the same. The contrast is that of each frame."""
    frames = _to_bytes(change.brightness * frames.float())
    mean = _grey(frames).float().mean((1, 2, 3), keepdim=True)
    frames = _to_bytes(change.contrast * frames.float() + (1 - change.contrast) * mean)
    frames = _to_bytes(change.saturation * frames.float() + (1 - change.saturation) * _grey(frames).float())
    hue, saturation, value = _to_hsv(frames.float() / 255)
    return (_to_rgb((hue + change.hue) % 1, saturation, value) * (256 - 1e-3)).to(torch.uint8)


def _to_bytes(x: Tensor) -> Tensor:
    return x.clamp(0, 255).to(torch.uint8)


def _grey(frames: Tensor) -> Tensor:
    red, green, blue = frames.float().unbind(1)
    return _to_bytes(LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).unsqueeze(1)


def _to_hsv(frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return hue, saturation and value in [0, 1], (T, H, W) each, of colours (T, 3, H, W) in [0, 1]."""
    red, green, blue = frames.unbind(1)
    value, low = frames.amax(1), frames.amin(1)
    spread = value - low
    divisor = torch.where(spread == 0, 1.0, spread)
    saturation = spread / torch.where(spread == 0, 1.0, value)
    from_red, from_green, from_blue = ((value - colour) / divisor for colour in (red, green, blue))
    is_red, is_green = value == red, (value == green) & (value != red)
    hue = torch.where(
        is_red, from_blue - from_green, torch.where(is_green, 2 + from_red - from_blue, 4 + from_green - from_red)
    )
    return (hue / 6 + 1) % 1, saturation, value


def _to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Undo `_to_hsv`."""
    sector = (hue * 6).floor()
    rest = hue * 6 - sector
    sector = sector.long() % 6
    low = (value * (1 - saturation)).clamp(0, 1)
    falling = (value * (1 - saturation * rest)).clamp(0, 1)
    rising = (value * (1 - saturation * (1 - rest))).clamp(0, 1)
    table = torch.stack([
        torch.stack([value, rising, low], 1), torch.stack([falling, value, low], 1),
        torch.stack([low, value, rising], 1), torch.stack([low, falling, value], 1),
        torch.stack([rising, low, value], 1), torch.stack([value, low, falling], 1),
    ])  # (6, T, 3, H, W)  # fmt: skip
    return table.gather(0, sector.unsqueeze(1).expand_as(table[0]).unsqueeze(0))[0]


def change_clip(frames: Tensor, change: Change) -> Tensor:
    """Return frames in [-1, 1] with changed colours: (T, 3, H, W) -> the same."""
    return change_colours(((frames + 1) * 127.5).round().to(torch.uint8), change).to(frames) / 127.5 - 1
