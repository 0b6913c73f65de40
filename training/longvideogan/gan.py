"""Shared training of the low-resolution and super-resolution GANs (LongVideoGAN, appendix B).

A step consists of a generator update, a discriminator update, periodically an R1 update with its own optimiser step,
and the EMA update of the generator. Every random number of a step belongs to one clip of the global batch, so the draws
depend neither on the number of ranks nor on that of accumulation rounds. Each update processes one round of clips at a
time, so more rounds need less memory.

A step queues its work and returns without synchronising with the device, which keeps a GPU busy. Host values are copied
by `misc.upload`, reported values stay tensors, and exceptions are documented where they occur.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_utils import compilation, misc
from torch_utils.precision import PRECISIONS, set_precision, tf32, why_not
from training import optim
from training.config import TrainOptions
from training.contract import Batch, Bundle, Info, Run, System
from training.longvideogan.charts import CHARTS
from training.longvideogan.layers import collect_magnitudes
from training.longvideogan.options import GANOptions
from training.network_format import ONLY
from training.optim import Report, cut

Rngs = list[np.random.RandomState]


class GAN(System):
    """Networks, optimisers and the phases of a step. A stage defines its networks, its batches and its losses."""

    precisions = PRECISIONS
    compiles = True
    flips = True
    charts = CHARTS
    needs_condition = False  # whether the generator takes a batch, too
    name: str  # of the system

    options: GANOptions

    def __init__(self, options: GANOptions, run: Run, generator: nn.Module, discriminator: nn.Module):
        super().__init__(options, run)
        self.device = run.device
        self.G = generator.to(run.device).requires_grad_(False)
        self.D = discriminator.to(run.device).requires_grad_(False)
        self.G_ema = copy.deepcopy(self.G).eval()
        self.modules = {"G": self.G, "D": self.D, "G_ema": self.G_ema}
        blocks = self.discriminator_blocks()
        if not 0 <= options.freeze_d <= len(blocks):
            raise ValueError(
                f"freeze_d is {options.freeze_d}; it must be from 0 to {len(blocks)}, the discriminator's blocks"
            )
        self.frozen_blocks = blocks[: options.freeze_d]
        # R1 takes Adam steps of its own; learning rate and betas are adjusted (StyleGAN2, "lazy regularisation").
        lazy = options.r1_interval / (options.r1_interval + 1)
        self.d_lr = options.d_lr * lazy
        d_betas = (0.0, options.beta2**lazy)
        self.G_opt = optim.make_adam(self.G, options.g_lr, (0.0, options.beta2))
        self.D_opt = optim.make_adam(self.D, self.d_lr, d_betas)
        self.optimizers = {"G": self.G_opt, "D": self.D_opt}
        self.precision: str | None = None
        self.compiling = False
        if run.precision is not None:
            self.set_precision(run.precision)
        self.set_compile(run.compile)

    @classmethod
    def check(cls, options: GANOptions, train_options: TrainOptions) -> None:
        """See `System.check`."""
        if options.freeze_d and not (train_options.init_from or "").endswith(".pt"):
            raise ValueError(
                "--freeze-d keeps the weights of a trained discriminator, which only a training state holds: add "
                "--init-from=<run directory>/checkpoints/ckpt-<step>-train.pt."
            )

    def set_precision(self, precision: str) -> None:
        """Set the precision of steps to one of `torch_utils.precision`; the default is the published one.

        That is fp32, and fp16 in super-resolution on CUDA. Samples and metrics of the EMA generator are computed in
        fp32, or in fp16 as published. Raises ValueError for a precision that this stage or its device does not support.
        """
        reason = why_not(precision, self.device)
        if reason is not None:
            raise ValueError(f"precision {precision} {reason}")
        set_precision([self.G, self.D], precision)
        set_precision([self.G_ema], precision if precision == "fp16" else "fp32")
        self.precision = precision

    def set_compile(self, wanted: bool) -> None:
        """Compile the updates of G and D by `torch_utils.compilation`, except for R1, which does not support it.

        Raises ValueError if compilation is not available.
        """
        reason = compilation.why_not(self.device.type) if wanted else None
        if reason is not None:
            raise ValueError(f"nothing can be compiled here: {reason}, or leave out --compile")
        self.compiling = wanted

    # Batches and random numbers ----------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the weights, to which data and noise are converted."""
        return next(self.G.parameters()).dtype

    def normal(self, rngs: Sequence[np.random.RandomState], *shape: int) -> Tensor:
        """Draw standard normal values (N, *shape), each row from its clip's generator."""
        values = np.stack([rng.standard_normal(shape).astype(np.float32) for rng in rngs])
        return misc.upload(values, self.device, self.dtype)

    # Defined by a stage --------------------------------------------------------------------------------------------

    def discriminator_blocks(self) -> list[nn.Module]:
        """Return the blocks of D that may be frozen, starting at its input."""
        raise AssertionError("a stage knows its discriminator")

    def fakes(self, batch: Batch, rngs: Rngs, update_emas: bool = False) -> Batch:
        """Return generated clips as "video" (N, 3, num_frames, H, W), and other inputs of the discriminator."""
        raise AssertionError("a stage defines its fakes")

    def reals(self, batch: Batch, rngs: Rngs) -> Batch:
        """Return real clips in the format of `fakes`."""
        raise AssertionError("a stage defines its reals")

    def logits(self, clips: Batch, rngs: Rngs) -> Tensor:
        """Return the logits of D for augmented `clips`: (N, 1)."""
        raise AssertionError("a stage defines what its discriminator sees")

    # A step ------------------------------------------------------------------------------------------------------

    def r1_due(self, step: int) -> bool:
        """Return whether this step ends with an R1 update."""
        return step % self.options.r1_interval == 0

    def step(self, batches: Iterator[Batch], step: int) -> dict[str, Tensor]:
        """Update G, D, D by R1 when due, and G_ema; return the values to report.

        Scores, signs and losses have one value per clip or round, norms of gradients one per update.
        """
        with tf32(self.precision == "tf32"):  # never outside a step, where metrics are computed
            return self.updates(batches, step)

    def updates(self, batches: Iterator[Batch], step: int) -> dict[str, Tensor]:
        """Run the updates of `step` in the current precision."""
        report = Report()

        def take() -> Batch:
            return {name: part.to(self.dtype) for name, part in next(batches).items()}

        with compilation.compiled(self.compiling):
            num_nonfinite = self.update_generator(take() if self.needs_condition else {}, step, report)
            num_nonfinite += self.update_discriminator(take(), step, report)
        if self.r1_due(step):
            with compilation.compiled(False):  # R1 needs second derivatives, which compiled graphs do not support
                num_nonfinite += self.penalize_discriminator(take(), step, report)
        return report.values() | {
            "progress/G_lrate": torch.tensor(self.options.g_lr),
            "progress/D_lrate": torch.tensor(self.d_lr),
            "progress/G_ema_beta": torch.tensor(self.update_average(step)),
            "progress/nonfinite_gradients": num_nonfinite.float(),
        }

    def update_generator(self, batch: Batch, step: int, report: Report) -> Tensor:
        """Update G by the non-saturating loss; return the number of non-finite gradients, as the other updates do."""
        rngs = self.run.rngs("G", step)

        def loss(piece: slice) -> Tensor:
            logits = self.logits(self.fakes(cut(batch, piece), rngs[piece]), rngs[piece])
            loss = gan_loss(logits, real=True)
            report.add("loss", G_score=logits, G_sign=logits.sign(), G_loss=loss)
            return loss

        num_nonfinite, norm = self.update(self.G, self.G_opt, loss)
        report.add("progress", G_grad_norm=norm)
        return num_nonfinite

    def update_discriminator(self, batch: Batch, step: int, report: Report) -> Tensor:
        """Update D on real and generated clips, and the magnitude EMAs of G.

        In a single round the EMAs are updated as published: layer by layer, before they are used. With more rounds,
        every round must use the same network, so they are updated once, at the end.
        """
        fake_rngs, real_rngs = self.run.rngs("D-fake", step), self.run.rngs("D-real", step)

        fake_losses, real_losses = [], []

        def fake_loss(piece: slice) -> Tensor:
            with torch.no_grad():
                fakes = self.fakes(cut(batch, piece), fake_rngs[piece], update_emas=True)
            logits = self.logits(fakes, fake_rngs[piece])
            loss = gan_loss(logits, real=False)
            report.add("loss", D_score_fake=logits, D_sign_fake=logits.sign())
            fake_losses.append(loss.detach())
            return loss

        def real_loss(piece: slice) -> Tensor:
            logits = self.logits(self.reals(cut(batch, piece), real_rngs[piece]), real_rngs[piece])
            loss = gan_loss(logits, real=True)
            report.add("loss", D_score_real=logits, D_sign_real=logits.sign())
            real_losses.append(loss.detach())
            return loss

        with collect_magnitudes(self.G) if self.run.grad_accum > 1 else contextlib.nullcontext():
            num_nonfinite, norm = self.update(self.D, self.D_opt, fake_loss, real_loss)
        report.add("loss", D_loss=torch.stack(fake_losses) + torch.stack(real_losses))
        report.add("progress", D_grad_norm=norm)
        return num_nonfinite

    def penalize_discriminator(self, batch: Batch, step: int, report: Report) -> Tensor:
        """Update D by the R1 penalty, weighted by the number of steps since the last such update."""
        rngs = self.run.rngs("R1", step)

        def loss(piece: slice) -> Tensor:
            clips = self.reals(cut(batch, piece), rngs[piece])
            video = clips["video"].detach().requires_grad_(True)
            penalty = r1_penalty(self.logits({**clips, "video": video}, rngs[piece]), video)
            loss = self.options.gamma / 2 * penalty.mean()
            report.add("loss", r1_penalty=penalty, r1_loss=loss)
            return loss

        num_nonfinite, norm = self.update(self.D, self.D_opt, loss, gain=self.options.r1_interval)
        report.add("progress", R1_grad_norm=norm)
        return num_nonfinite

    def update(self, network: nn.Module, *arguments: Any, gain: float = 1.0) -> tuple[Tensor, Tensor]:
        """Take one optimiser step; see `training.optim.update`."""
        optimizer, *losses = arguments
        return optim.update(network, optimizer, self.run.rounds(), *losses, gain=gain, frozen=self.frozen_blocks)

    def update_average(self, step: int) -> float:
        """Update G_ema from G, parameters and buffers alike; return the decay."""
        beta = optim.ema_decay(self.options.ema_beta, self.options.ema_rampup_steps, step)
        optim.update_ema(self.G_ema, self.G, beta)
        return beta

    # The rest of the contract ------------------------------------------------------------------------------------

    def init_from(self, weights: Bundle | Mapping[str, Mapping[str, Tensor]]) -> None:
        """Initialise from the weights of a generator, or from those of G, D and G_ema in the "modules" of a training
        state.

        Optimisers and the step count start anew. Raises `ValueError` for weights that do not fit, and for a generator
        alone if blocks of D are frozen, since a newly initialised D has no trained weights to keep.
        """
        if isinstance(weights, Bundle):
            if self.frozen_blocks:
                raise ValueError(
                    f"freeze_d is {self.options.freeze_d}, but a generator file has no discriminator whose weights "
                    "could be kept; use a training state, --init-from=ckpt-...-train.pt"
                )
            (network,) = weights.networks.values()
            state = network.state_dict()
            weights = {"G": state, "G_ema": state}
        else:
            weights = {name: weights.get(name, {}) for name in self.modules}
        optim.load_weights(self.modules, weights)

    def info(self) -> Info:
        """Return the display settings of the run; the R1 weight is part of the run's name, as published."""
        opts = self.options
        return Info(f"{float(opts.gamma)}gamma", (), CHARTS, opts.preview_frames, opts.preview_videos)

    def export(self) -> Bundle:
        """Return the EMA generator."""
        return Bundle({ONLY: self.G_ema}, self.name)


def r1_penalty(logits: Tensor, video: Tensor) -> Tensor:
    """Return the squared norm of the gradient of each clip's logit (Mescheder et al. 2018): (N,), differentiable."""
    (gradient,) = torch.autograd.grad(logits.sum(), video, create_graph=True)
    return gradient.square().sum(dim=[1, 2, 3, 4])


def gan_loss(logits: Tensor, real: bool) -> Tensor:
    """Return the logistic loss of `logits` for the label `real`, averaged over clips (Goodfellow et al. 2014)."""
    return nn.functional.softplus(-logits if real else logits).mean()
