"""Training of the super-resolution GAN on a few frames at a time (LongVideoGAN, section 3.3 and appendix B).

The condition is a real low-resolution clip, corrupted so that the network also copes with generated ones; what the
discriminator sees of both resolutions passes adaptive augmentation (Karras et al. 2020) with one transform for all.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torch_utils import distributed
from training.augment.ada import BGC, CONDITION, AdaController, AugmentPipe
from training.config import resolve
from training.dataset import BatchSpec, ClipPart
from training.longvideogan.gan import GAN, Batch, GANOptions, Rngs, gan_loss, r1_penalty, seeded_networks
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
    ada_interval: int = 4
    ada_target: float = 0.6


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
        self.augment = AugmentPipe(**BGC).to(self.device, self.dtype).requires_grad_(False)
        self.augment.p.zero_()
        self.corrupt = AugmentPipe(**CONDITION).to(self.device, self.dtype).requires_grad_(False)
        self.corrupt.p.fill_(CONDITION_PROBABILITY)
        self.ada = AdaController(interval=opts.ada_interval, target=opts.ada_target)

    def batch_spec(self, step: int) -> list[BatchSpec]:
        """Conditions for G; conditions and sharp frames for D; both, without context, when R1 is due."""
        opts, context = self.options, self.context
        window = opts.num_frames + 2 * context
        lres = ClipPart("lres", opts.lres_height, opts.lres_width, 0, window)
        lres_center = dataclasses.replace(lres, first_frame=context, num_frames=opts.num_frames)
        sres_center = ClipPart("sres", opts.height, opts.width, context, opts.num_frames)
        specs = [BatchSpec(window, (lres,)), BatchSpec(window, (lres, sres_center))]
        return specs + [BatchSpec(window, (lres_center, sres_center))] * self.r1_due(step)

    def source(self) -> Source:
        """Videos of the averaged generator."""
        return SuperResSource(self.G_ema)

    def fakes(self, condition: Tensor, rngs: Rngs, update_emas: bool = False) -> Tensor:
        """Sharp frames (N, 3, num_frames, H, W) of corrupted conditions (N, 3, num_frames + 2 context, h, w)."""
        return self.G(condition, self.normal(rngs, self.G.z_channels), update_emas=update_emas)

    def logits(self, lres: Tensor, sres: Tensor, rngs: Rngs) -> Tensor:
        """What D says of frames at both resolutions, after one augmentation of both: (N, 1).

        `lres` may have its context, which is cut. D is shown it for one clip in ten only, so that it must judge the
        sharp frames by themselves too.
        """
        lres = self.D.upsample(center_crop(lres, 2, self.options.num_frames))
        both = self.augment(torch.cat([lres, sres], dim=2), rngs)
        lres, sres = both.chunk(2, dim=2)
        shown = torch.tensor([float(rng.uniform() < KEEP_CONDITION) for rng in rngs]).to(sres)
        return self.D(lres * shown[:, None, None, None, None], sres)

    def step(self, batches: Iterator[Batch], step: int) -> dict[str, Tensor]:
        """One update of G, of D, of D by R1 when due, of the augmentation and of G_ema; returns values to report."""
        stats: dict[str, list[Tensor]] = {}

        def note(**values: Tensor) -> None:
            for name, value in values.items():
                stats.setdefault(f"loss/{name}", []).append(value.detach().flatten())

        def take() -> dict[str, Tensor]:
            return {name: part.to(self.dtype) for name, part in next(batches).items()}

        rngs, batch = self.rngs("G", step), take()

        def g_loss(piece: slice) -> Tensor:
            condition = self.corrupt(batch["lres"][piece], rngs[piece])
            logits = self.logits(condition, self.fakes(condition, rngs[piece]), rngs[piece])
            loss = gan_loss(logits, real=True)
            note(G_score=logits, G_sign=logits.sign(), G_loss=loss)
            return loss

        num_nonfinite = self.update(self.G, self.G_opt, g_loss)

        fake_rngs, real_rngs, batch = self.rngs("D-fake", step), self.rngs("D-real", step), take()
        with torch.no_grad():
            fake_lres = self.corrupt(batch["lres"], fake_rngs)
            real_lres = self.corrupt(batch["lres"], real_rngs)
            fakes = self.fakes(fake_lres, fake_rngs, update_emas=True)

        def d_loss(piece: slice) -> Tensor:
            fake_logits = self.logits(fake_lres[piece], fakes[piece], fake_rngs[piece])
            real_logits = self.logits(real_lres[piece], batch["sres"][piece], real_rngs[piece])
            loss = gan_loss(fake_logits, real=False) + gan_loss(real_logits, real=True)
            note(D_score_fake=fake_logits, D_sign_fake=fake_logits.sign(), D_loss=loss)
            note(D_score_real=real_logits, D_sign_real=real_logits.sign())
            return loss

        num_nonfinite += self.update(self.D, self.D_opt, d_loss)

        if self.r1_due(step):
            num_nonfinite += self.update_r1(take(), step, note)
        self.update_ada(torch.cat(stats["loss/D_sign_real"]))
        values = {name: torch.cat(values) for name, values in stats.items()}
        return values | {"progress/augment_p": self.augment.p.clone()} | self.progress(step, num_nonfinite)

    def update_r1(self, batch: Batch, step: int, note: Any) -> int:
        """The R1 update, on the gradient with respect to the sharp frames alone."""
        rngs = self.rngs("R1", step)

        def r1_loss(piece: slice) -> Tensor:
            video = batch["sres"][piece].detach().requires_grad_(True)
            logits = self.logits(self.corrupt(batch["lres"][piece], rngs[piece]), video, rngs[piece])
            penalty = r1_penalty(logits, video)
            loss = self.options.gamma / 2 * penalty.mean()
            note(r1_penalty=penalty, r1_loss=loss)
            return loss

        return self.update(self.D, self.D_opt, r1_loss, gain=self.options.r1_interval)

    def update_ada(self, real_signs: Tensor) -> None:
        """Count how D judged the reals of all ranks, and let the controller move the strength of the augmentation."""
        count = len(real_signs) * distributed.get_world_size()
        p = self.ada.update(distributed.all_reduce_sum(real_signs.sum()).item(), count)
        self.augment.p.fill_(p)

    def state_dict(self) -> dict[str, Any]:
        """The strength of the augmentation and the signs counted towards its next change."""
        return {"ada": self.ada.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.ada.load_state_dict(state["ada"])
        self.augment.p.fill_(self.ada.p)
