"""Training of the low-resolution GAN on long clips (LongVideoGAN, section 3.3 and appendix B).

Fakes and reals pass DiffAugment and a random temporal stretch on their way to the discriminator. Fakes are generated
one temporal scale too long and cut at a random offset, so that the discriminator cannot tell them by their phase.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from training.augment import diffaug
from training.config import resolve
from training.dataset import BatchSpec, ClipPart
from training.longvideogan.gan import GAN, Batch, GANOptions, Rngs, gan_loss, r1_penalty, seeded_networks
from training.longvideogan.lres.discriminator import LowResDiscriminator
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.sampling import LowResSource, Source


@dataclasses.dataclass
class LowResOptions(GANOptions):
    """Options of a low-resolution run; the defaults are the published ones."""

    height: int = 36
    width: int = 64
    num_frames: int = 128
    diffaug: str = "color,translation,cutout"
    temporal_stretch: float = 1.0


class LowResGAN(GAN):
    """Generator of long low-resolution clips against a discriminator of whole clips."""

    Options = LowResOptions
    options: LowResOptions
    G: LowResGenerator
    D: LowResDiscriminator
    G_ema: LowResGenerator

    def __init__(self, options: dict[str, Any], device: torch.device | str):
        opts = resolve(LowResOptions, options, "the options of the low-resolution stage")
        size = {"height": opts.height, "width": opts.width}
        generator, discriminator = seeded_networks(
            opts.seed,
            lambda: (
                LowResGenerator(**size, **opts.generator),
                LowResDiscriminator(opts.num_frames, **size, **opts.discriminator),
            ),
        )
        super().__init__(opts, torch.device(device), generator, discriminator)
        self.dataset_sizes = [(opts.height, opts.width)]

    def batch_spec(self, step: int) -> list[BatchSpec]:
        """Real clips for the discriminator, and as many again when R1 is due."""
        opts = self.options
        part = ClipPart("lres", opts.height, opts.width, 0, opts.num_frames)
        return [BatchSpec(opts.num_frames, (part,))] * (2 if self.r1_due(step) else 1)

    def source(self) -> Source:
        """Videos of the averaged generator."""
        return LowResSource(self.G_ema)

    def augment(self, video: Tensor, rngs: Rngs) -> Tensor:
        """What the discriminator sees of a clip, real or fake: same shape."""
        video = diffaug.diff_augment(video, rngs, self.options.diffaug)
        return diffaug.temporal_stretch(video, rngs, self.options.temporal_stretch)

    def fakes(self, rngs: Rngs, magnitude_ema_beta: float = 1.0) -> Tensor:
        """Clips (N, 3, num_frames, H, W), each cut at its own phase of the temporal scale."""
        length = self.options.num_frames + self.G.temporal_scale
        noise = self.normal(rngs, self.G.noise_channels, self.G.num_noise_frames(length))
        video = self.G.synthesize(noise, length, magnitude_ema_beta=magnitude_ema_beta)
        return diffaug.temporal_crop(video, self.options.num_frames, rngs)

    def step(self, batches: Iterator[Batch], step: int) -> dict[str, Tensor]:
        """One update of G, of D, of D by R1 when due, and of G_ema; returns the values to report."""
        stats: dict[str, list[Tensor]] = {}

        def note(**values: Tensor) -> None:
            for name, value in values.items():
                stats.setdefault(f"loss/{name}", []).append(value.detach().flatten())

        rngs = self.rngs("G", step)

        def g_loss(piece: slice) -> Tensor:
            logits = self.D(self.augment(self.fakes(rngs[piece]), rngs[piece]))
            loss = gan_loss(logits, real=True)
            note(G_score=logits, G_sign=logits.sign(), G_loss=loss)
            return loss

        num_nonfinite = self.update(self.G, self.G_opt, g_loss)

        fake_rngs, real_rngs = self.rngs("D-fake", step), self.rngs("D-real", step)
        reals = next(batches)["lres"].to(self.dtype)
        with torch.no_grad():
            fakes = self.fakes(fake_rngs, self.options.magnitude_beta)

        def d_loss(piece: slice) -> Tensor:
            fake_logits = self.D(self.augment(fakes[piece], fake_rngs[piece]))
            real_logits = self.D(self.augment(reals[piece], real_rngs[piece]))
            loss = gan_loss(fake_logits, real=False) + gan_loss(real_logits, real=True)
            note(D_score_fake=fake_logits, D_sign_fake=fake_logits.sign(), D_loss=loss)
            note(D_score_real=real_logits, D_sign_real=real_logits.sign())
            return loss

        num_nonfinite += self.update(self.D, self.D_opt, d_loss)

        if self.r1_due(step):
            r1_rngs = self.rngs("R1", step)
            clips = next(batches)["lres"].to(self.dtype)

            def r1_loss(piece: slice) -> Tensor:
                video = clips[piece].detach().requires_grad_(True)
                penalty = r1_penalty(self.D(self.augment(video, r1_rngs[piece])), video)
                loss = self.options.gamma / 2 * penalty.mean()
                note(r1_penalty=penalty, r1_loss=loss)
                return loss

            num_nonfinite += self.update(self.D, self.D_opt, r1_loss, gain=self.options.r1_interval)

        return {name: torch.cat(values) for name, values in stats.items()} | self.progress(step, num_nonfinite)
