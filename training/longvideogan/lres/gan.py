"""Training of the low-resolution GAN on long clips (LongVideoGAN, section 3.3 and appendix B).

Fake and real clips pass through DiffAugment and a random temporal stretch before the discriminator. Fakes are generated
one temporal scale too long and cropped at a random offset, so that their phase does not identify them.
"""

from torch import Tensor, nn

from training.augment import diffaug
from training.contract import Batch, BatchSpec, FrameClip, Inputs, Run
from training.longvideogan.gan import GAN, Rngs
from training.longvideogan.lres.discriminator import LowResDiscriminator
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.options import LowResOptions
from training.longvideogan.sampling import LowResSampler
from training.optim import seeded
from training.sampling import Sampler


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
