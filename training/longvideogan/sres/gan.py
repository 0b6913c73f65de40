"""Training of the super-resolution GAN on a few frames at a time (LongVideoGAN, section 3.3 and appendix B).

The condition is a real low-resolution clip, corrupted so that the network generalises to generated ones; both
resolutions pass through adaptive augmentation (Karras et al. 2020) with one transform before the discriminator.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_utils import misc
from training.augment.ada import AUGMENTATIONS, CONDITION, AdaController, AugmentPipe
from training.contract import Batch, BatchSpec, FrameClip, Inputs, Run
from training.longvideogan.gan import GAN, Rngs
from training.longvideogan.layers import center_crop
from training.longvideogan.options import SuperResOptions
from training.longvideogan.sampling import SuperResSampler
from training.longvideogan.sres.discriminator import SuperResDiscriminator
from training.longvideogan.sres.generator import SuperResGenerator
from training.optim import seeded
from training.sampling import Sampler

CONDITION_PROBABILITY = 0.5  # probability of each corruption of the condition
KEEP_CONDITION = 0.1  # probability that the discriminator sees the low-resolution frames


class SuperResGAN(GAN):
    """A generator of high-resolution frames and a discriminator of a few frames at both resolutions."""

    Options = SuperResOptions
    name = "longvideogan-sres"
    options: SuperResOptions
    G: SuperResGenerator
    D: SuperResDiscriminator
    G_ema: SuperResGenerator
    needs_condition = True

    def __init__(self, options: SuperResOptions, run: Run):
        sizes = {name: getattr(options, name) for name in ("height", "width", "lres_height", "lres_width")}
        generator, discriminator = seeded(
            run.seed,
            lambda: (
                SuperResGenerator(**sizes, **options.generator),
                SuperResDiscriminator(options.num_frames, **sizes, **options.discriminator),
            ),
        )
        super().__init__(options, run, generator, discriminator)
        self.context = self.G.temporal_context
        self.augment = AugmentPipe(**AUGMENTATIONS[options.augment]).to(self.device, self.dtype).requires_grad_(False)
        self.corrupt = AugmentPipe(**CONDITION).to(self.device, self.dtype).requires_grad_(False)
        self.ada = AdaController(interval=options.ada_interval, target=options.ada_target)

    def discriminator_blocks(self) -> list[nn.Module]:
        """Return the blocks of D that may be frozen, starting at its input."""
        return [self.D.get_submodule(f"b{resolution}") for resolution in self.D.resolutions]

    def inputs(self) -> Inputs:
        """Return the frame sizes, the input size first."""
        opts = self.options
        return Inputs(sizes=((opts.lres_height, opts.lres_width), (opts.height, opts.width)))

    def batch_spec(self, step: int) -> list[BatchSpec]:
        """Return conditions for G; conditions and real frames for D; both, without context, when R1 is due."""
        opts, context = self.options, self.context
        window = opts.num_frames + 2 * context
        lres = FrameClip("lres", opts.lres_height, opts.lres_width, 0, window)
        lres_center = dataclasses.replace(lres, first=context, count=opts.num_frames)
        sres_center = FrameClip("sres", opts.height, opts.width, context, opts.num_frames)
        specs = [BatchSpec(window, (lres,)), BatchSpec(window, (lres, sres_center))]
        return specs + [BatchSpec(window, (lres_center, sres_center))] * self.r1_due(step)

    def sampler(self) -> Sampler:
        """Return the sampler of the EMA generator."""
        return SuperResSampler(self.G_ema)

    def fakes(self, batch: Batch, rngs: Rngs, update_emas: bool = False) -> Batch:
        """Return generated frames for corrupted conditions, and those conditions."""
        condition = self.corrupt(batch["lres"], rngs, CONDITION_PROBABILITY)
        video = self.G(condition, self.normal(rngs, self.G.z_channels), update_emas=update_emas)
        return {"video": video, "lres": condition}

    def reals(self, batch: Batch, rngs: Rngs) -> Batch:
        """Return real frames, and their conditions corrupted like those of the fakes."""
        return {"video": batch["sres"], "lres": self.corrupt(batch["lres"], rngs, CONDITION_PROBABILITY)}

    def logits(self, clips: Batch, rngs: Rngs) -> Tensor:
        """Return the logits of D for frames at both resolutions, after one augmentation of both: (N, 1).

        The context frames of the condition are removed. D sees the condition for one clip in ten only, so that it also
        judges the high-resolution frames by themselves.
        """
        lres = self.D.upsample(center_crop(clips["lres"], 2, self.options.num_frames))
        both = self.augment(torch.cat([lres, clips["video"]], dim=2), rngs, self.ada.p)
        lres, video = both.chunk(2, dim=2)
        shown = np.array([float(rng.uniform() < KEEP_CONDITION) for rng in rngs])
        shown = misc.upload(shown, video.device, video.dtype)
        return self.D(lres * shown[:, None, None, None, None], video)

    def step(self, batches: Iterator[Batch], step: int) -> dict[str, Tensor]:
        """See `GAN.step`; then updates the augmentation probability."""
        values = super().step(batches, step)
        if self.options.augment != "none":
            self.ada.update(values["loss/D_sign_real"])
        return values | {"progress/augment_p": torch.tensor(self.ada.p)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the adaptive augmentation."""
        return {"ada": self.ada.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.ada.load_state_dict(state["ada"])
