"""Options of both stages. Imports no torch, so that `--help` is quick."""

import dataclasses
import math
from typing import Any

from training.flags import Flag, check_options, option


@dataclasses.dataclass
class GANOptions:
    """Options of both stages; the defaults are those of the published low-resolution run."""

    generator: dict[str, Any] = option(dict, "", factory=True)
    discriminator: dict[str, Any] = option(dict, "", factory=True)
    gamma: float = option(1.0, "Weight of the R1 penalty", low=0)
    r1_interval: int = option(16, "Steps between R1 updates", low=1)
    g_lr: float = option(0.003, "Learning rate of the generator", above=0)
    d_lr: float = option(0.002, "Learning rate of the discriminator", above=0)
    beta2: float = option(0.99, "Decay of Adam's average of squared gradients", low=0)
    ema_beta: float = option(0.99985, "Decay of the generator's moving average, a step", low=0)
    ema_rampup_steps: int = option(25000, "Steps over which the half-life of that average grows", low=0)
    magnitude_beta: float = option(0.999, "Decay of the averages of activations' magnitudes, a step", low=0)
    freeze_d: int = option(0, "Blocks of D, nearest its input, that keep the weights of --init-from (FreezeD)", low=0)
    preview_frames: int = option(256, "Frames of a preview", low=1)
    preview_videos: int = option(1, "Videos of a preview", low=1)

    def __post_init__(self):
        if self.r1_interval < 1:
            raise ValueError(
                f"R1 interval {self.r1_interval}: it must be at least 1; to train without R1, set gamma to 0"
            )
        for name in ("g_lr", "d_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"Learning rate {name} is {getattr(self, name)}; it must be above 0, such as 0.002")
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"R1 weight gamma is {self.gamma}; it must be 0, for no penalty, or above")
        check_options(self, shares=("beta2", "ema_beta", "magnitude_beta"))
        if self.ema_rampup_steps < 0:
            raise ValueError(f"Option ema_rampup_steps is {self.ema_rampup_steps}; it must be 0, for none, or above")


@dataclasses.dataclass
class LowResOptions(GANOptions):
    """Options of a low-resolution run; the defaults are the published ones."""

    generator: dict[str, Any] = option(
        dict,
        "",
        Flag(
            "Frames that the shortest and the longest temporal filter span",
            name="--filter-taps",
            kind=int,
            sets=("generator.min_filter_taps", "generator.max_filter_taps"),
            metavar="A B",
        ),
        factory=True,
    )
    height: int = option(36, "Frame size, such as 36x64", name="--size", kind="size", sets=("height", "width"))
    width: int = option(64, "")
    num_frames: int = option(128, "Frames of the clips that the discriminator sees", low=1)
    diffaug: str = option(
        "color,translation,cutout",
        "Augmentations for both networks: any of color,translation,cutout, comma-separated",
    )
    temporal_stretch: float = option(1.0, "Largest change of speed, in octaves", low=0)

    def __post_init__(self):
        from training.augment import diffaug

        super().__post_init__()
        diffaug.parse_policy(self.diffaug)
        longest = math.log2(max(self.num_frames, 1))
        if not 0 <= self.temporal_stretch <= longest:
            raise ValueError(
                f"Temporal stretch is {self.temporal_stretch} octaves; it must be at least 0 and at most {longest:g}, "
                f"at which a clip of {self.num_frames} frames shrinks to one"
            )


@dataclasses.dataclass
class SuperResOptions(GANOptions):
    """Options of a super-resolution run; the defaults are the published ones."""

    d_lr: float = option(0.003, "Learning rate of the discriminator", above=0)
    height: int = option(
        144, "Output frame size, such as 144x256", name="--size", kind="size", sets=("height", "width")
    )
    width: int = option(256, "")
    lres_height: int = option(
        36, "Input frame size, such as 36x64", name="--lres-size", kind="size", sets=("lres_height", "lres_width")
    )
    lres_width: int = option(64, "")
    num_frames: int = option(4, "Frames of the clips that the discriminator sees", low=1)
    augment: str = option("bgc", "Adaptive augmentation of what the discriminator sees: bgc, or none")
    ada_interval: int = option(4, "Steps between changes of the augmentation", low=1)
    ada_target: float = option(0.6, "Mean sign of D's logits for real clips above which augmentation increases")

    def __post_init__(self):
        from training.augment.ada import AUGMENTATIONS

        super().__post_init__()
        if self.num_frames < 1:
            raise ValueError(f"clips of {self.num_frames} frames: use a length of at least 1; the published one is 4")
        if self.augment not in AUGMENTATIONS:
            raise ValueError(f"Unknown augmentation {self.augment!r}; choose from {', '.join(AUGMENTATIONS)}")
        if "imgfilter" in AUGMENTATIONS[self.augment] and min(self.height, self.width) < 22:
            raise ValueError(
                f"Augmentation {self.augment!r} filters over 21 pixels on either side, more than frames of "
                f"{self.height}x{self.width} have; use bgc"
            )
        if self.ada_interval < 1:
            raise ValueError(
                f"ADA interval {self.ada_interval}: it must be at least 1; to train without ADA, set augment to none"
            )
        if not -1 < self.ada_target < 1:
            raise ValueError(
                f"ADA target {self.ada_target}: it is a mean of signs, so it must be above -1 and below 1, such as 0.6"
            )
