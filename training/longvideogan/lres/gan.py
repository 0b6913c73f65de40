"""Training of the low-resolution GAN on long clips (LongVideoGAN, section 3.3 and appendix B).

Fake and real clips pass through DiffAugment and a random temporal stretch before the discriminator. Fakes are generated
one temporal scale too long and cropped at a random offset, so that their phase does not identify them.
"""

import dataclasses
import math
from typing import Any

from torch import Tensor, nn

from training.augment import diffaug
from training.contract import Batch, BatchSpec, Flag, FrameClip, Inputs, Run, option
from training.longvideogan.gan import GAN, GANOptions, Rngs
from training.longvideogan.lres.discriminator import LowResDiscriminator
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.sampling import LowResSampler
from training.optim import seeded
from training.sampling import Sampler


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
        super().__post_init__()
        diffaug.parse_policy(self.diffaug)
        longest = math.log2(max(self.num_frames, 1))
        if not 0 <= self.temporal_stretch <= longest:
            raise ValueError(
                f"Temporal stretch is {self.temporal_stretch} octaves; it must be at least 0 and at most {longest:g}, "
                f"at which a clip of {self.num_frames} frames shrinks to one"
            )


class LowResGAN(GAN):
    """A generator of long low-resolution clips and a discriminator of whole clips."""

    Options = LowResOptions
    name = "longvideogan-lres"
    options: LowResOptions
    G: LowResGenerator
    D: LowResDiscriminator
    G_ema: LowResGenerator

    def __init__(self, options: LowResOptions, run: Run):
        size = {"height": options.height, "width": options.width}
        generator, discriminator = seeded(
            run.seed,
            lambda: (
                LowResGenerator(**size, **options.generator),
                LowResDiscriminator(options.num_frames, **size, **options.discriminator),
            ),
        )
        super().__init__(options, run, generator, discriminator)

    def discriminator_blocks(self) -> list[nn.Module]:
        """Return the blocks of D that may be frozen, starting at its input."""
        return list(self.D.blocks)

    def inputs(self) -> Inputs:
        """Return the frame size."""
        return Inputs(sizes=((self.options.height, self.options.width),))

    def batch_spec(self, step: int) -> list[BatchSpec]:
        """Return real clips for the discriminator, and as many again when R1 is due."""
        opts = self.options
        part = FrameClip("lres", opts.height, opts.width, 0, opts.num_frames)
        return [BatchSpec(opts.num_frames, (part,))] * (2 if self.r1_due(step) else 1)

    def sampler(self) -> Sampler:
        """Return the sampler of the EMA generator."""
        return LowResSampler(self.G_ema)

    def fakes(self, batch: Batch, rngs: Rngs, update_emas: bool = False) -> Batch:
        """Return generated clips, each cropped at a random phase of the temporal scale."""
        length = self.options.num_frames + self.G.temporal_scale
        noise = self.normal(rngs, self.G.noise_channels, self.G.num_noise_frames(length))
        beta = self.options.magnitude_beta if update_emas else 1.0
        video = self.G.synthesize(noise, length, magnitude_ema_beta=beta)
        return {"video": diffaug.temporal_crop(video, self.options.num_frames, rngs)}

    def reals(self, batch: Batch, rngs: Rngs) -> Batch:
        """Return the clips unchanged."""
        return {"video": batch["lres"]}

    def logits(self, clips: Batch, rngs: Rngs) -> Tensor:
        """Return the logits of D for clips after DiffAugment and a temporal stretch: (N, 1)."""
        video = diffaug.diff_augment(clips["video"], rngs, self.options.diffaug)
        return self.D(diffaug.temporal_stretch(video, rngs, self.options.temporal_stretch))
