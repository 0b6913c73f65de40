"""Adaptive discriminator augmentation (ADA): one random transform per clip, applied with an adaptive probability.

The pipeline of "Training Generative Adversarial Networks with Limited Data" (Karras et al., NeurIPS 2020, appendix B)
for video: all frames of a clip share one transform. LongVideoGAN (Brooks et al., NeurIPS 2022) uses it twice: before
the super-resolution discriminator with adaptive strength (`BGC`), and with a fixed probability to corrupt the
low-resolution clips that condition the super-resolution generator (`CONDITION`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from torch_utils import distributed, misc, persistence
from torch_utils.ops import upfirdn2d

# Low-pass filters of orthogonal symlet wavelets (Daubechies, "Ten Lectures on Wavelets", table 6.3).
SYM2 = (-0.12940952255092145, 0.22414386804185735, 0.836516303737469, 0.48296291314469025)
SYM6 = (
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633),
    *(0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252),
    *(-0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
)
NUM_BANDS = 4
BAND_POWER = np.array([10, 1, 1, 1]) / 13  # expected power of each band in natural images, whose spectrum falls as 1/f

# Multipliers of a discriminator's pipeline, by the first letters of their kinds: pixel blitting, geometry, colour,
# image filtering, noise and cutout. Each set includes all kinds of the previous one.
KINDS: dict[str, tuple[str, ...]] = {
    "b": ("xflip", "rotate90", "xint"),
    "g": ("scale", "rotate", "aniso", "xfrac"),
    "c": ("brightness", "contrast", "lumaflip", "hue", "saturation"),
    "f": ("imgfilter",),
    "n": ("noise",),
    "cutout": ("cutout",),
}
AUGMENTATIONS: dict[str, dict[str, float]] = {
    "none": {},
    **{
        "".join(kind[0] for kind in list(KINDS)[:count]): dict.fromkeys(sum(list(KINDS.values())[:count], ()), 1.0)
        for count in range(1, len(KINDS) + 1)
    },
}
BGC = AUGMENTATIONS["bgc"]  # as in the published super-resolution run
# Multipliers and strengths of the pipeline that corrupts the condition ("strength 8" of LongVideoGAN).
CONDITION: dict[str, float] = {
    **dict.fromkeys(("scale", "rotate", "aniso", "xfrac", "noise"), 1.0),
    **{"scale_std": 0.08, "rotate_max": 0.016, "aniso_std": 0.08, "xfrac_std": 0.016, "noise_std": 0.08},
}


def band_filters() -> np.ndarray:
    """Return four symmetric octave filters that sum to a unit impulse: float64 (4, 43), lowest band first.

    Each level of the filter bank is a power-complementary low-pass / high-pass pair, the autocorrelations of the sym2
    filters; the existing bands are moved down an octave and low-passed, and the high-pass is the next band.
    """
    low = np.array(SYM2)
    high = low * (1, -1, 1, -1)
    half_low = np.correlate(low, low, "full") / 2  # 7
    half_high = np.correlate(high, high, "full") / 2  # 7
    bands = np.zeros((NUM_BANDS, 1))
    bands[0] = 1
    for band in range(1, NUM_BANDS):
        octave_lower = np.zeros((NUM_BANDS, 2 * bands.shape[1] - 1))
        octave_lower[:, ::2] = bands
        bands = np.stack([np.convolve(row, half_low) for row in octave_lower])
        centre = bands.shape[1] // 2
        bands[band, centre - 3 : centre + 4] += half_high
    return bands


def _translation(x: float, y: float) -> np.ndarray:
    return np.array([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])


def _scaling(x: float, y: float) -> np.ndarray:
    return np.diag([x, y, 1.0])


def _rotation(angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])


def warp(clip: torch.Tensor, inverse: np.ndarray, taps: torch.Tensor) -> torch.Tensor:
    """Resample all frames of one clip under one affine map with little aliasing (ADA, appendix B.1).

    The frames are reflection-padded as far as the map reaches outside, upsampled by two with an orthogonal wavelet
    filter, sampled bilinearly, and downsampled with the same filter reversed, so that the identity is preserved. The
    filter's delay exceeds the whole number of pixels that is compensated by 0.098 pixels of the upsampled image: flips
    and rotations shift the image by that many of its own pixels, as the published filter and alignment imply.

    The padding is computed for each clip separately, where the published code uses the maximum over the batch. When
    zooming out, the filters reach the end of the padding, and a larger padding changes pixels by up to 2e-5 (measured):
    clips would depend on the other clips of the batch, and results on the number of ranks. The result is that of the
    published code at batch size 1.

    Args:
        clip: (C, T, H, W), any floating dtype, which is kept; twice differentiable.
        inverse: (3, 3), from pixel offsets (x, y, 1) to the centre of the output to those of the input.
        taps: (12,) `AugmentPipe.Hz_geom`.

    Returns:
        (C, T, H, W).
    """
    height, width = clip.shape[-2:]
    size = np.array([width, height])
    centre = (size - 1) / 2
    reach = len(taps) // 4 * 2  # pixels beyond a border that up- and downsampling read
    corners = np.array([[x, y, 1.0] for x in (-centre[0], centre[0]) for y in (-centre[1], centre[1])]).T  # 3 4
    seen = (inverse @ corners)[:2]  # 2 4
    need = np.stack([-seen.min(axis=1), seen.max(axis=1)]) - centre + reach  # 2 2: before and after, x and y
    # The small offset keeps rounding errors of the matrices from adding a pixel of padding.
    (left, top), (right, bottom) = np.ceil(np.clip(need, 0, size - 1) - 1e-6).astype(int).tolist()

    frames = clip.flatten(0, 1)[None]  # 1 CT H W
    frames = F.pad(frames, (left, right, top, bottom), mode="reflect")
    frames = upfirdn2d.upsample2d(frames, taps, up=2)
    canvas = (size + reach) * 2
    # Coordinates are relative to the centre. The centre of the upsampled image is half of its pixels beyond the doubled
    # centre, because pixel i becomes pixel 2 i; affine_grid uses half edges as units.
    inverse = _translation((left - right) / 2, (top - bottom) / 2) @ inverse
    inverse = _scaling(2, 2) @ inverse @ _scaling(0.5, 0.5)
    inverse = _translation(-0.5, -0.5) @ inverse @ _translation(0.5, 0.5)
    inverse = _scaling(2 / frames.shape[3], 2 / frames.shape[2]) @ inverse @ _scaling(canvas[0] / 2, canvas[1] / 2)
    theta = misc.upload(inverse[None, :2], clip.device, clip.dtype)  # 1 2 3
    grid = F.affine_grid(theta, [1, 1, int(canvas[1]), int(canvas[0])], align_corners=False)
    frames = F.grid_sample(frames, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    frames = upfirdn2d.downsample2d(frames, taps, down=2, padding=-reach, flip_filter=True)  # 1 CT H W
    return frames.reshape(clip.shape)


@dataclass(frozen=True)
class Draw:
    """The transform drawn for one clip."""

    inverse: np.ndarray  # (3, 3), see `warp`
    color: np.ndarray  # (3, 4): a linear map of colours (first three columns) and an offset (last column)
    band_gains: np.ndarray  # (4,) of the filter bank
    noise_sigma: float
    cutout: tuple[float, float] | None  # centre (x, y) of the hole, in image edges


class Dice:
    """Draw from a clip's generator; the number of draws never depends on their values or on the probability."""

    def __init__(self, rng: np.random.RandomState, p: float):
        self.rng = rng
        self.p = p

    def fires(self, multiplier: float) -> bool:
        return self.rng.random_sample() < multiplier * self.p

    def uniform(self) -> float:
        """Draw from the uniform distribution on [-1, 1)."""
        return 2 * self.rng.random_sample() - 1

    def normal(self) -> float:
        return self.rng.standard_normal()

    def choice(self, num: int) -> int:
        return int(self.rng.random_sample() * num)


@persistence.persistent_class
class AugmentPipe(torch.nn.Module):
    """Transforms each clip at random, each kind of transform with probability p times its multiplier.

    The defaults of the multipliers switch everything off. Buffer names and shapes are those of the published pipes.

    Args:
        xflip, rotate90, xint: multipliers of x-flips, quarter turns and shifts by whole pixels.
        xint_max: largest whole shift, in image edges.
        scale, rotate, aniso, xfrac: multipliers of general geometric transforms.
        scale_std: standard deviation of the logarithm (base 2) of the scale.
        rotate_max: largest rotation, in half turns.
        aniso_std: standard deviation of the logarithm (base 2) of the stretch.
        xfrac_std: standard deviation of the shift, in image edges.
        brightness, contrast, lumaflip, hue, saturation: multipliers of colour transforms.
        brightness_std: standard deviation of the brightness, in units of the pixels.
        contrast_std: standard deviation of the logarithm (base 2) of the contrast.
        hue_max: largest rotation of hue, in half turns.
        saturation_std: standard deviation of the logarithm (base 2) of the saturation.
        imgfilter: multiplier of filtering in each of four frequency bands; both edges must exceed 21 pixels.
        imgfilter_std: standard deviation of the logarithm (base 2) of a band's gain.
        noise, cutout: multipliers of corruptions.
        noise_std: standard deviation of a clip's noise level, in units of the pixels.
        cutout_size: edges of the hole, in image edges.
    """

    p: torch.Tensor
    Hz_geom: torch.Tensor
    Hz_fbank: torch.Tensor

    def __init__(
        self,
        xflip: float = 0,
        rotate90: float = 0,
        xint: float = 0,
        xint_max: float = 0.125,
        scale: float = 0,
        rotate: float = 0,
        aniso: float = 0,
        xfrac: float = 0,
        scale_std: float = 0.2,
        rotate_max: float = 1,
        aniso_std: float = 0.2,
        xfrac_std: float = 0.125,
        brightness: float = 0,
        contrast: float = 0,
        lumaflip: float = 0,
        hue: float = 0,
        saturation: float = 0,
        brightness_std: float = 0.2,
        contrast_std: float = 0.5,
        hue_max: float = 1,
        saturation_std: float = 1,
        imgfilter: float = 0,
        imgfilter_std: float = 1,
        noise: float = 0,
        cutout: float = 0,
        noise_std: float = 0.1,
        cutout_size: float = 0.5,
    ):
        super().__init__()
        self.xflip, self.rotate90, self.xint, self.xint_max = xflip, rotate90, xint, xint_max
        self.scale, self.rotate, self.aniso, self.xfrac = scale, rotate, aniso, xfrac
        self.scale_std, self.rotate_max, self.aniso_std, self.xfrac_std = scale_std, rotate_max, aniso_std, xfrac_std
        self.brightness, self.contrast, self.lumaflip, self.hue = brightness, contrast, lumaflip, hue
        self.saturation, self.saturation_std = saturation, saturation_std
        self.brightness_std, self.contrast_std, self.hue_max = brightness_std, contrast_std, hue_max
        self.imgfilter, self.imgfilter_std = imgfilter, imgfilter_std
        self.noise, self.cutout, self.noise_std, self.cutout_size = noise, cutout, noise_std, cutout_size
        self.register_buffer("p", torch.ones([]))
        self.register_buffer("Hz_geom", upfirdn2d.setup_filter(list(SYM6)))
        self.register_buffer("Hz_fbank", torch.from_numpy(band_filters()).float())

    def forward(
        self, video: torch.Tensor, rngs: Sequence[np.random.RandomState], p: float | None = None
    ) -> torch.Tensor:
        """Augment each clip with one draw that all its frames share.

        Args:
            video: (N, 3, T, H, W) in [-1, 1], any floating dtype, which is kept.
            rngs: one generator per clip. The number of draws does not depend on p; pixel noise is drawn last.
            p: the probability; None reads the buffer of that name, which synchronises with a GPU.

        Returns:
            (N, 3, T, H, W), not clamped; twice differentiable. No clip depends on the others.
        """
        assert video.ndim == 5 and video.shape[1] == 3 and len(rngs) == len(video), (tuple(video.shape), len(rngs))
        p = float(self.p) if p is None else p
        height, width = video.shape[-2:]
        return torch.stack(
            [
                self.apply_draw(clip, self.draw(rng, p, height, width), rng)
                for clip, rng in zip(video, rngs, strict=True)
            ]
        )

    def draw(self, rng: np.random.RandomState, p: float, height: int, width: int) -> Draw:
        """Draw one clip's transform at probability p."""
        dice = Dice(rng, p)
        inverse = self._draw_geometry(dice, height, width)
        color = self._draw_color(dice)
        gains = self._draw_band_gains(dice)
        sigma = abs(dice.normal()) * self.noise_std
        sigma = sigma if dice.fires(self.noise) else 0.0
        hole = (dice.rng.random_sample(), dice.rng.random_sample())
        return Draw(inverse, color, gains, sigma, hole if dice.fires(self.cutout) else None)

    def _draw_geometry(self, dice: Dice, height: int, width: int) -> np.ndarray:
        """Draw the inverse of the composed transform: the inverse of each transform is multiplied from the right."""
        inverse = np.eye(3)

        flip = dice.choice(2)
        if dice.fires(self.xflip):
            inverse = inverse @ _scaling(1 - 2 * flip, 1)
        turns = dice.choice(4)
        if dice.fires(self.rotate90):
            inverse = inverse @ _rotation(np.pi / 2 * turns)
        shift_x, shift_y = dice.uniform() * self.xint_max, dice.uniform() * self.xint_max
        if dice.fires(self.xint):
            inverse = inverse @ _translation(-np.round(shift_x * width), -np.round(shift_y * height))

        zoom = 2.0 ** (dice.normal() * self.scale_std)
        if dice.fires(self.scale):
            inverse = inverse @ _scaling(1 / zoom, 1 / zoom)
        # Rotation before and after anisotropic scaling, each with a probability such that "neither" has probability 1 -
        # p.
        rotate = 1 - np.sqrt(1 - np.clip(self.rotate * dice.p, 0, 1))
        angle = dice.uniform() * np.pi * self.rotate_max
        if dice.rng.random_sample() < rotate:
            inverse = inverse @ _rotation(angle)
        stretch = 2.0 ** (dice.normal() * self.aniso_std)
        if dice.fires(self.aniso):
            inverse = inverse @ _scaling(1 / stretch, stretch)
        angle = dice.uniform() * np.pi * self.rotate_max
        if dice.rng.random_sample() < rotate:
            inverse = inverse @ _rotation(angle)
        shift_x, shift_y = dice.normal() * self.xfrac_std, dice.normal() * self.xfrac_std
        if dice.fires(self.xfrac):
            inverse = inverse @ _translation(-shift_x * width, -shift_y * height)
        return inverse

    def _draw_color(self, dice: Dice) -> np.ndarray:
        """Draw the composed affine map of colours, (3, 4); the luma axis is the grey axis."""
        linear, offset = np.eye(3), np.zeros(3)
        grey = np.ones(3) / np.sqrt(3)
        luma = np.outer(grey, grey)

        shift = dice.normal() * self.brightness_std
        if dice.fires(self.brightness):
            offset = offset + shift
        contrast = 2.0 ** (dice.normal() * self.contrast_std)
        if dice.fires(self.contrast):
            linear, offset = contrast * linear, contrast * offset
        transforms = []
        flip = dice.choice(2)
        if dice.fires(self.lumaflip):
            transforms.append(np.eye(3) - 2 * flip * luma)
        angle = dice.uniform() * np.pi * self.hue_max
        if dice.fires(self.hue):
            cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
            transforms.append(luma + np.cos(angle) * (np.eye(3) - luma) + np.sin(angle) * cross)  # Rodrigues
        saturation = 2.0 ** (dice.normal() * self.saturation_std)
        if dice.fires(self.saturation):
            transforms.append(luma + saturation * (np.eye(3) - luma))
        for transform in transforms:
            linear, offset = transform @ linear, transform @ offset
        return np.concatenate([linear, offset[:, None]], axis=1)

    def _draw_band_gains(self, dice: Dice) -> np.ndarray:
        """Draw the gains of the bands, normalised after each amplification to keep the expected power."""
        gains = np.ones(NUM_BANDS)
        for band in range(NUM_BANDS):
            step = np.ones(NUM_BANDS)
            step[band] = 2.0 ** (dice.normal() * self.imgfilter_std)
            if dice.fires(self.imgfilter):
                gains = gains * step / np.sqrt((BAND_POWER * step**2).sum())
        return gains

    def apply_draw(self, clip: torch.Tensor, draw: Draw, rng: np.random.RandomState) -> torch.Tensor:
        """Transform one clip (3, T, H, W); pixel noise is drawn from `rng`."""
        # Resampling under the identity would change pixels by about 1e-5 and cost as much as any other transform.
        if not np.array_equal(draw.inverse, np.eye(3)):
            clip = warp(clip, draw.inverse, self.Hz_geom)
        if not np.array_equal(draw.color, np.eye(3, 4)):
            color = misc.upload(draw.color, clip.device, clip.dtype)  # 3 4
            clip = (color[:, :3] @ clip.flatten(1) + color[:, 3:]).reshape(clip.shape)
        if not np.array_equal(draw.band_gains, np.ones(NUM_BANDS)):
            clip = self._filter(clip, draw.band_gains)
        if self.noise > 0:
            noise = misc.upload(rng.standard_normal(tuple(clip.shape)), clip.device, clip.dtype)
            clip = clip + noise * draw.noise_sigma
        if draw.cutout is not None:
            centres = [(torch.arange(size) + 0.5) / size for size in clip.shape[-2:]]  # H and W
            row, column = (
                (centre - middle).abs() < self.cutout_size / 2
                for centre, middle in zip(centres, draw.cutout[::-1], strict=True)
            )
            clip = clip.masked_fill(misc.upload(row[:, None] & column, clip.device), 0)
        return clip

    def _filter(self, clip: torch.Tensor, gains: np.ndarray) -> torch.Tensor:
        """Filter all frames of a clip (3, T, H, W) along both axes with the weighted sum of the band filters."""
        kernel = misc.upload(gains, clip.device, clip.dtype) @ self.Hz_fbank.to(clip)  # 43
        margin = len(kernel) // 2
        frames = clip.flatten(0, 1)[:, None]  # 3T 1 H W
        frames = F.pad(frames, (margin, margin, margin, margin), mode="reflect")
        frames = F.conv2d(frames, kernel[None, None, None, :])
        frames = F.conv2d(frames, kernel[None, None, :, None])
        return frames.reshape(clip.shape)


class AdaController:
    """Adapt p to the overfitting of the discriminator (ADA, section 3.1).

    The overfitting heuristic is r_t, the mean sign of the discriminator's logits for real clips. Every `interval` steps
    p moves by `interval * speed` towards r_t = target. Signs are summed on each rank's device; p is kept on the host.
    """

    def __init__(self, target: float = 0.6, interval: int = 4, speed: float = 0.000125, max_p: float = 0.5):
        self.target = target
        self.interval = interval
        self.speed = speed
        self.max_p = max_p
        self.p = 0.0
        self.num_steps = 0
        self.sign_sum = 0.0  # over all ranks, up to the last reduction
        self.sign_count = 0  # over all ranks
        self._own: torch.Tensor | None = None  # sum of this rank since the last reduction

    def update(self, real_signs: torch.Tensor) -> float:
        """Add the signs of one step's logits for this rank's real clips; return p for the next step.

        All ranks pass equally many; a NaN adds 0 to the sum and counts. Every `interval` steps this is a collective
        that synchronises with the device, since the augmentation of the next clips depends on it.
        """
        own = real_signs.detach().nan_to_num().sum()
        self._own = own if self._own is None else self._own + own
        self.num_steps += 1
        self.sign_count += real_signs.numel() * distributed.get_world_size()
        if self.num_steps % self.interval == 0:
            self._gather()
            direction = float(np.sign(self.sign_sum / self.sign_count - self.target))
            self.p = float(np.clip(self.p + direction * self.interval * self.speed, 0, self.max_p))
            self.sign_sum, self.sign_count = 0.0, 0
        return self.p

    def _gather(self) -> None:
        """Add the sums of all ranks to the global sum."""
        if self._own is not None:
            self.sign_sum += distributed.all_reduce_sum(self._own).item()
            self._own = None

    def state_dict(self) -> dict[str, Any]:
        """Return plain values, the same on all ranks; a collective."""
        self._gather()
        return {name: getattr(self, name) for name in ("p", "num_steps", "sign_sum", "sign_count")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.p = float(state["p"])
        self.num_steps = int(state["num_steps"])
        self.sign_sum = float(state["sign_sum"])
        self.sign_count = int(state["sign_count"])
        self._own = None
