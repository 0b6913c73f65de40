"""Differentiable augmentation of clips (DiffAugment) and random changes of their speed and phase.

The low-resolution discriminator sees only augmented clips, real and generated: colour, translation and cutout of
"Differentiable Augmentation for Data-Efficient GAN Training" (Zhao et al., NeurIPS 2020) with one draw per clip, then
a temporal stretch (Brooks et al., "Generating Long Videos of Dynamic Scenes", NeurIPS 2022). Every clip has its own
generator, each function takes a fixed number of draws from it, independent of their values, and nothing depends on the
other clips of a batch. All functions are affine in the video, and therefore twice differentiable.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from torch_utils import misc

POLICIES = ("color", "translation", "cutout")
TRANSLATION_RATIO = 0.25  # of the long edge, on both axes
CUTOUT_RATIO = 0.5  # of each edge


def parse_policy(policy: str) -> list[str]:
    """Return the augmentations of a policy such as "color,cutout", in its order; "" and "none" have none.

    Raises:
        ValueError: the policy names an unknown augmentation.
    """
    names = [name for name in policy.split(",") if name] if policy != "none" else []
    unknown = [name for name in names if name not in POLICIES]
    if unknown:
        raise ValueError(
            f"Unknown augmentation {unknown[0]!r} in policy {policy!r}: choose from {', '.join(POLICIES)}, or none"
        )
    return names


def diff_augment(
    video: torch.Tensor, rngs: Sequence[np.random.RandomState], policy: str = "color,translation,cutout"
) -> torch.Tensor:
    """Augment each clip with one draw that is constant over its frames.

    Args:
        video: (N, 3, T, H, W) in [-1, 1], any floating dtype, which is kept.
        rngs: one generator per clip; 7 draws are taken from each, independent of the policy.
        policy: comma-separated subset of "color", "translation" and "cutout", applied in the given order, or "none".

    Returns:
        (N, 3, T, H, W), not clamped.

    Raises:
        ValueError: the policy names an unknown augmentation.
    """
    names = parse_policy(policy)
    assert video.ndim == 5 and len(rngs) == len(video), (tuple(video.shape), len(rngs))
    draws = np.stack([rng.random_sample(7) for rng in rngs])  # N 7
    for name in names:
        if name == "color":
            video = _color(video, draws[:, 0:3])
        elif name == "translation":
            video = _translation(video, draws[:, 3:5])
        else:
            video = _cutout(video, draws[:, 5:7])
    return video


def _color(video: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
    """Change brightness, saturation and contrast, in this order; `draws` (N, 3) are uniform in [0, 1)."""
    factors = misc.upload(draws, video.device, video.dtype)[..., None, None, None, None]  # N 3 1 1 1 1
    video = video + (factors[:, 0] - 0.5)
    mean = video.mean(dim=1, keepdim=True)  # N 1 T H W
    video = mean + 2 * factors[:, 1] * (video - mean)
    mean = video.mean(dim=(1, 2, 3, 4), keepdim=True)  # N 1 1 1 1
    return mean + (factors[:, 2] + 0.5) * (video - mean)


def _translation(video: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
    """Shift each clip by whole pixels, filling with zeros."""
    reach = round(TRANSLATION_RATIO * max(video.shape[-2:]))
    shifts = np.floor(draws * (2 * reach + 1)).astype(int) - reach  # N 2
    # Padding one side and cropping the other copies memory once and, unlike a gather, has a backward pass without
    # atomic additions.
    return torch.stack([F.pad(clip, (x, -x, y, -y)) for clip, (y, x) in zip(video, shifts.tolist(), strict=True)])


def _cutout(video: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
    """Set one rectangle of each clip to zero; its centre may lie on the border, so part of it may lie outside."""
    sizes = np.array(video.shape[-2:])
    holes = np.floor(sizes * CUTOUT_RATIO + 0.5).astype(int)
    # The centre of an even-sized hole lies between pixels, where there is one more position than there are pixels.
    starts = np.floor(draws * (sizes + 1 - holes % 2)).astype(int) - holes // 2  # N 2
    inside = []
    for axis in range(2):
        position = np.arange(sizes[axis])[None] - starts[:, axis, None]
        inside.append((position >= 0) & (position < holes[axis]))  # N H and N W
    mask = misc.upload(inside[0][:, :, None] & inside[1][:, None, :], video.device)  # N H W
    return video.masked_fill(mask[:, None, None], 0)


def temporal_stretch(video: torch.Tensor, rngs: Sequence[np.random.RandomState], strength: float = 1.0) -> torch.Tensor:
    """Change the speed of each clip at random, keeping the number of frames.

    Each clip is stretched by f = 2^u, u uniform in [-strength, strength], to floor(T f) frames by linear interpolation
    between frames (half-pixel centres, clamped at the ends, no low-pass filter). A shortened clip is placed at a random
    position among zero frames; of a lengthened one a random window is kept.

    Args:
        video: (N, C, T, H, W), any floating dtype, which is kept.
        rngs: one generator per clip; 2 draws are taken from each.
        strength: largest change of speed in octaves.

    Returns:
        (N, C, T, H, W).
    """
    assert video.ndim == 5 and len(rngs) == len(video), (tuple(video.shape), len(rngs))
    num_clips, _, num_frames = video.shape[:3]
    draws = np.stack([rng.random_sample(2) for rng in rngs])  # N 2
    factor = 2.0 ** (strength * (2 * draws[:, :1] - 1))  # N 1
    length = np.floor(num_frames * factor)
    slack = np.abs(length - num_frames)
    offset = np.floor(draws[:, 1:] * (slack + 1)) * np.where(length < num_frames, -1, 1)

    frame = np.arange(num_frames) + offset  # N T: frame of the stretched clip
    present = (frame >= 0) & (frame < length)
    position = np.clip((frame + 0.5) / factor - 0.5, 0, num_frames - 1)  # frame of the input clip
    before = position.astype(int)
    after = np.minimum(before + 1, num_frames - 1)
    clip = torch.arange(num_clips, device=video.device)[:, None]  # N 1
    stretched = torch.zeros_like(video).transpose(1, 2)  # N T C H W
    for index, weight in ((before, (1 - (position - before)) * present), (after, (position - before) * present)):
        frames = video[clip, :, misc.upload(index, video.device)]  # N T C H W
        stretched = stretched + frames * misc.upload(weight, video.device, video.dtype)[..., None, None, None]
    return stretched.transpose(1, 2)  # N C T H W


def temporal_crop(video: torch.Tensor, num_frames: int, rngs: Sequence[np.random.RandomState]) -> torch.Tensor:
    """Keep `num_frames` frames of each clip from a random offset.

    The statistics of a generator that upsamples time are periodic in its coarsest temporal grid; the offset hides that
    grid from the discriminator. With S spare frames the offset is uniform in 0 ... S - 1, which for S equal to the grid
    spacing gives each phase once.

    Args:
        video: (N, C, T, H, W).
        num_frames: frames to keep, at most T.
        rngs: one generator per clip; 1 draw is taken from each.

    Returns:
        (N, C, num_frames, H, W).
    """
    spare = video.shape[2] - num_frames
    assert spare >= 0 and len(rngs) == len(video), (tuple(video.shape), num_frames, len(rngs))
    offsets = [int(rng.random_sample() * spare) for rng in rngs]
    return torch.stack([clip[:, start : start + num_frames] for clip, start in zip(video, offsets, strict=True)])
