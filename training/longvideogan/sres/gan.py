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
from training.config import resolve
from training.contract import BatchSpec, FrameClip
from training.longvideogan.gan import GAN, Batch, GANOptions, Rngs, seeded_networks
from training.longvideogan.layers import center_crop
from training.longvideogan.sampling import Source, SuperResSource
from training.longvideogan.sres.discriminator import SuperResDiscriminator
from training.longvideogan.sres.generator import SuperResGenerator

CONDITION_PROBABILITY = 0.5  # each corruption of the condition happens this often
KEEP_CONDITION = 0.1  # how often the discriminator is shown the low-resolution frames at all


@dataclasses.dataclass
class SuperResOptions(GANOptions):
    """Options of a super-resolution run; the defaults are the published ones."""

    batch: int = 32
    grad_accum: int = 1
    d_lr: float = 0.003
    height: int = 144
    width: int = 256
    lres_height: int = 36
    lres_width: int = 64
    num_frames: int = 4
    augment: str = "bgc"
    ada_interval: int = 4
    ada_target: float = 0.6

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
    options: SuperResOptions
    G: SuperResGenerator
    D: SuperResDiscriminator
    G_ema: SuperResGenerator
    needs_condition = True

    def __init__(self, options: dict[str, Any], device: torch.device | str):
        opts = resolve(SuperResOptions, options, "the options of the super-resolution stage")
        sizes = {name: getattr(opts, name) for name in ("height", "width", "lres_height", "lres_width")}
        generator, discriminator = seeded_networks(
            opts.seed,
            lambda: (
                SuperResGenerator(**sizes, **opts.generator),
                SuperResDiscriminator(opts.num_frames, **sizes, **opts.discriminator),
            ),
        )
        super().__init__(opts, torch.device(device), generator, discriminator)
        self.context = self.G.temporal_context
        self.dataset_sizes = [(opts.lres_height, opts.lres_width), (opts.height, opts.width)]
        self.augment = AugmentPipe(**AUGMENTATIONS[opts.augment]).to(self.device, self.dtype).requires_grad_(False)
        self.corrupt = AugmentPipe(**CONDITION).to(self.device, self.dtype).requires_grad_(False)
        self.ada = AdaController(interval=opts.ada_interval, target=opts.ada_target)

    def discriminator_blocks(self) -> list[nn.Module]:
        """The blocks of D that may be frozen, from its input on."""
        return [self.D.get_submodule(f"b{resolution}") for resolution in self.D.resolutions]

    def batch_spec(self, step: int) -> list[BatchSpec]:
        """Conditions for G; conditions and sharp frames for D; both, without context, when R1 is due."""
        opts, context = self.options, self.context
        window = opts.num_frames + 2 * context
        lres = FrameClip("lres", opts.lres_height, opts.lres_width, 0, window)
        lres_center = dataclasses.replace(lres, first=context, count=opts.num_frames)
        sres_center = FrameClip("sres", opts.height, opts.width, context, opts.num_frames)
        specs = [BatchSpec(window, (lres,)), BatchSpec(window, (lres, sres_center))]
        return specs + [BatchSpec(window, (lres_center, sres_center))] * self.r1_due(step)

    def source(self) -> Source:
        """Videos of the averaged generator."""
        return SuperResSource(self.G_ema)

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
