"""Training of the super-resolution GAN on a few frames at a time (LongVideoGAN, section 3.3 and appendix B).

The condition is a real low-resolution clip, corrupted so that the network also copes with generated ones; what the
discriminator sees of both resolutions passes adaptive augmentation (Karras et al. 2020) with one transform for all.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_utils import misc
from training.augment.ada import AUGMENTATIONS, CONDITION, AdaController, AugmentPipe
from training.contract import Batch, BatchSpec, FrameClip, Inputs, Run, option
from training.longvideogan.gan import GAN, GANOptions, Rngs
from training.longvideogan.layers import center_crop
from training.longvideogan.sampling import SuperResSampler
from training.longvideogan.sres.discriminator import SuperResDiscriminator
from training.longvideogan.sres.generator import SuperResGenerator
from training.optim import seeded
from training.sampling import Sampler

CONDITION_PROBABILITY = 0.5  # each corruption of the condition happens this often
KEEP_CONDITION = 0.1  # how often the discriminator is shown the low-resolution frames at all


@dataclasses.dataclass
class SuperResOptions(GANOptions):
    """Options of a super-resolution run; the defaults are the published ones."""

    d_lr: float = option(0.003, "Learning rate of the discriminator", above=0)
    height: int = option(
        144, "Frame size put out, such as 144x256", name="--size", kind="size", sets=("height", "width")
    )
    width: int = option(256, "")
    lres_height: int = option(
        36, "Frame size taken in, such as 36x64", name="--lres-size", kind="size", sets=("lres_height", "lres_width")
    )
    lres_width: int = option(64, "")
    num_frames: int = option(4, "Frames of the clips that the discriminator sees", low=1)
    augment: str = option("bgc", "Adaptive augmentation of what the discriminator sees: bgc, or none")
    ada_interval: int = option(4, "Steps between changes of the augmentation", low=1)
    ada_target: float = option(0.6, "How sure of the reals D may be before augmentation grows")

    def __post_init__(self):
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


class SuperResGAN(GAN):
    """Generator of sharp frames against a discriminator of a few frames at both resolutions."""

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
        """Return the blocks of D that may be frozen, from its input on."""
        return [self.D.get_submodule(f"b{resolution}") for resolution in self.D.resolutions]

    def inputs(self) -> Inputs:
        """Return the sizes of its frames, what it takes in first."""
        opts = self.options
        return Inputs(sizes=((opts.lres_height, opts.lres_width), (opts.height, opts.width)))

    def batch_spec(self, step: int) -> list[BatchSpec]:
        """Conditions for G; conditions and sharp frames for D; both, without context, when R1 is due."""
        opts, context = self.options, self.context
        window = opts.num_frames + 2 * context
        lres = FrameClip("lres", opts.lres_height, opts.lres_width, 0, window)
        lres_center = dataclasses.replace(lres, first=context, count=opts.num_frames)
        sres_center = FrameClip("sres", opts.height, opts.width, context, opts.num_frames)
        specs = [BatchSpec(window, (lres,)), BatchSpec(window, (lres, sres_center))]
        return specs + [BatchSpec(window, (lres_center, sres_center))] * self.r1_due(step)

    def sampler(self) -> Sampler:
        """Return videos of the averaged generator."""
        return SuperResSampler(self.G_ema)

    def fakes(self, batch: Batch, rngs: Rngs, update_emas: bool = False) -> Batch:
        """Sharp frames of corrupted conditions, and those conditions."""
        condition = self.corrupt(batch["lres"], rngs, CONDITION_PROBABILITY)
        video = self.G(condition, self.normal(rngs, self.G.z_channels), update_emas=update_emas)
        return {"video": video, "lres": condition}

    def reals(self, batch: Batch, rngs: Rngs) -> Batch:
        """Real sharp frames, and their conditions corrupted like those of the fakes."""
        return {"video": batch["sres"], "lres": self.corrupt(batch["lres"], rngs, CONDITION_PROBABILITY)}

    def logits(self, clips: Batch, rngs: Rngs) -> Tensor:
        """What D says of frames at both resolutions, after one augmentation of both: (N, 1).

        The context of the condition is cut. D is shown it for one clip in ten only, so that it must judge the sharp
        frames by themselves too.
        """
        lres = self.D.upsample(center_crop(clips["lres"], 2, self.options.num_frames))
        both = self.augment(torch.cat([lres, clips["video"]], dim=2), rngs, self.ada.p)
        lres, video = both.chunk(2, dim=2)
        shown = np.array([float(rng.uniform() < KEEP_CONDITION) for rng in rngs])
        shown = misc.upload(shown, video.device, video.dtype)
        return self.D(lres * shown[:, None, None, None, None], video)

    def step(self, batches: Iterator[Batch], step: int) -> dict[str, Tensor]:
        """See `GAN.step`; ends with a change of the augmentation."""
        values = super().step(batches, step)
        if self.options.augment != "none":
            self.ada.update(values["loss/D_sign_real"])
        return values | {"progress/augment_p": torch.tensor(self.ada.p)}

    def state_dict(self) -> dict[str, Any]:
        """The strength of the augmentation and the signs counted towards its next change."""
        return {"ada": self.ada.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.ada.load_state_dict(state["ada"])
