"""What training a low-resolution and a super-resolution GAN have in common (LongVideoGAN, appendix B).

A step is: generator update, discriminator update, now and then an R1 update with its own optimiser step, then the
moving average of the generator. Every random number of a step belongs to one clip of the global batch, so neither
the number of ranks nor that of accumulation rounds changes what is drawn. In each update a round's clips are made,
judged and done with before the next round's, so that more rounds take less memory.

A step queues its work and returns: nothing in it waits for the device, so that a GPU never runs dry. Values of the
host travel by `misc.upload`, values to report stay tensors, and exceptions say so where they are.
"""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_utils import compilation, distributed, misc
from torch_utils.precision import set_precision, tf32, why_not
from training.data.dataset import BatchSpec
from training.longvideogan.charts import CHARTS
from training.longvideogan.layers import collect_magnitudes
from training.longvideogan.sampling import Condition, Source, Start
from training.random import random_state

Batch = dict[str, Tensor]
Rngs = list[np.random.RandomState]


@dataclasses.dataclass
class GANOptions:
    """Options of either stage; the defaults are those of the published low-resolution run."""

    generator: dict[str, Any] = dataclasses.field(default_factory=dict)
    discriminator: dict[str, Any] = dataclasses.field(default_factory=dict)
    batch: int = 64
    grad_accum: int = 2
    seed: int = 0
    gamma: float = 1.0
    r1_interval: int = 16
    g_lr: float = 0.003
    d_lr: float = 0.002
    beta2: float = 0.99
    ema_beta: float = 0.99985
    ema_rampup_steps: int = 25000
    magnitude_beta: float = 0.999
    freeze_d: int = 0  # blocks of D, nearest its input, that keep their weights (FreezeD, Mo et al. 2020)
    preview_frames: int = 256
    preview_videos: int = 1

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
        for name in ("beta2", "ema_beta", "magnitude_beta"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"Option {name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if self.ema_rampup_steps < 0:
            raise ValueError(f"Option ema_rampup_steps is {self.ema_rampup_steps}; it must be 0, for none, or above")
        if self.grad_accum < 1 or self.batch < 1 or self.batch % self.grad_accum:
            raise ValueError(
                f"A batch of {self.batch} clips does not divide into {self.grad_accum} rounds of accumulation; both "
                "must be at least 1 and the batch a multiple of the rounds"
            )


class GAN:
    """Networks, optimisers and the phases of a step. A stage defines its networks, its batches and its losses."""

    needs_condition = False
    charts = CHARTS
    context = 0

    def __init__(self, options: GANOptions, device: torch.device, generator: nn.Module, discriminator: nn.Module):
        self.options = options
        self.device = device
        self.G = generator.to(device).requires_grad_(False)
        self.D = discriminator.to(device).requires_grad_(False)
        self.G_ema = copy.deepcopy(self.G).eval()
        self.modules = {"G": self.G, "D": self.D, "G_ema": self.G_ema}
        blocks = self.discriminator_blocks()
        if not 0 <= options.freeze_d <= len(blocks):
            raise ValueError(
                f"freeze_d is {options.freeze_d}; it must be from 0 to {len(blocks)}, the discriminator's blocks"
            )
        self.frozen = blocks[: options.freeze_d]
        # R1 takes Adam steps of its own; rate and momentum make up for them (StyleGAN2, "lazy regularisation").
        lazy = options.r1_interval / (options.r1_interval + 1)
        self.d_lr = options.d_lr * lazy
        d_betas = (0.0, options.beta2**lazy)
        self.G_opt = make_adam(self.G, options.g_lr, (0.0, options.beta2))
        self.D_opt = make_adam(self.D, self.d_lr, d_betas)
        self.optimizers = {"G": self.G_opt, "D": self.D_opt}
        self.precision: str | None = None
        self.compiles = False

    def set_precision(self, precision: str) -> None:
        """Take steps in one of `torch_utils.precision`; without this call as published.

        That is fp32, and fp16 in super-resolution on CUDA. What G_ema shows and what is measured of it is in fp32, or
        in fp16 as published. Raises ValueError for what suits neither this stage nor its device.
        """
        reason = why_not(precision, self.device)
        if reason is not None:
            raise ValueError(f"precision {precision} {reason}")
        set_precision([self.G, self.D], precision)
        set_precision([self.G_ema], precision if precision == "fp16" else "fp32")
        self.precision = precision

    def set_compile(self, wanted: bool) -> None:
        """Compile the updates of G and D by `torch_utils.compilation`, but for R1, which cannot be.

        Raises ValueError where nothing can be compiled.
        """
        reason = compilation.why_not(self.device.type) if wanted else None
        if reason is not None:
            raise ValueError(f"nothing can be compiled here: {reason}, or leave out --compile")
        self.compiles = wanted

    # Batches and random numbers ----------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights, to which data and noise are brought."""
        return next(self.G.parameters()).dtype

    @property
    def local_batch(self) -> int:
        """Clips of a global batch that this rank works on."""
        return self.options.batch // distributed.get_world_size()

    def rngs(self, phase: str, step: int) -> Rngs:
        """One generator for each of this rank's clips, named by its place in the global batch."""
        first = distributed.get_rank() * self.local_batch
        return [
            random_state(f"train-{phase}", self.options.seed, f"{step}:{position}")
            for position in range(first, first + self.local_batch)
        ]

    def rounds(self) -> list[slice]:
        """This rank's clips, cut into as many pieces as there are rounds of accumulation."""
        size = self.local_batch // self.options.grad_accum
        return [slice(start, start + size) for start in range(0, self.local_batch, size)]

    def normal(self, rngs: Sequence[np.random.RandomState], *shape: int) -> Tensor:
        """Standard normal (N, *shape), each row from its clip's generator."""
        values = np.stack([rng.standard_normal(shape).astype(np.float32) for rng in rngs])
        return misc.upload(values, self.device, self.dtype)

    # What a stage defines ----------------------------------------------------------------------------------------

    def discriminator_blocks(self) -> list[nn.Module]:
        """The blocks of D that may be frozen, from its input on."""
        raise AssertionError("a stage knows its discriminator")

    def batch_spec(self, step: int) -> list[BatchSpec]:
        """The batches that `step` takes, in order: G's if it needs a condition, D's, and R1's when due."""
        raise AssertionError("a stage defines its batches")

    def fakes(self, batch: Batch, rngs: Rngs, update_emas: bool = False) -> Batch:
        """Generated clips as "video" (N, 3, num_frames, H, W), and what else the discriminator sees of them."""
        raise AssertionError("a stage defines its fakes")

    def reals(self, batch: Batch, rngs: Rngs) -> Batch:
        """Real clips in the form of `fakes`."""
        raise AssertionError("a stage defines its reals")

    def logits(self, clips: Batch, rngs: Rngs) -> Tensor:
        """What D says of augmented `clips`: (N, 1)."""
        raise AssertionError("a stage defines what its discriminator sees")

    def source(self) -> Source:
        """Videos of the averaged generator."""
        raise AssertionError("a stage defines its source")

    # A step ------------------------------------------------------------------------------------------------------

    def r1_due(self, step: int) -> bool:
        """True if this step ends with an R1 update."""
        return step % self.options.r1_interval == 0

    def step(self, batches: Iterator[Batch], step: int) -> dict[str, Tensor]:
        """One update of G, of D, of D by R1 when due, and of G_ema; returns the values to report.

        Scores, signs and losses are one value a clip or a round, norms of gradients one an update.
        """
        with tf32(self.precision == "tf32"):  # never outside a step, where metrics are
            return self.updates(batches, step)

    def updates(self, batches: Iterator[Batch], step: int) -> dict[str, Tensor]:
        """What `step` does, in the arithmetic that is set."""
        notes = Notes()

        def take() -> Batch:
            return {name: part.to(self.dtype) for name, part in next(batches).items()}

        with compilation.compiled(self.compiles):
            num_nonfinite = self.update_generator(take() if self.needs_condition else {}, step, notes)
            num_nonfinite += self.update_discriminator(take(), step, notes)
        if self.r1_due(step):
            with compilation.compiled(False):  # it needs two derivatives
                num_nonfinite += self.penalize_discriminator(take(), step, notes)
        return notes.values() | {
            "progress/G_lrate": torch.tensor(self.options.g_lr),
            "progress/D_lrate": torch.tensor(self.d_lr),
            "progress/G_ema_beta": torch.tensor(self.update_ema(step)),
            "progress/nonfinite_gradients": num_nonfinite.float(),
        }

    def update_generator(self, batch: Batch, step: int, notes: "Notes") -> Tensor:
        """Let G make clips that D calls real; returns the number of non-finite gradients, like the other updates."""
        rngs = self.rngs("G", step)

        def loss(piece: slice) -> Tensor:
            logits = self.logits(self.fakes(cut(batch, piece), rngs[piece]), rngs[piece])
            loss = gan_loss(logits, real=True)
            notes.add("loss", G_score=logits, G_sign=logits.sign(), G_loss=loss)
            return loss

        num_nonfinite, norm = self.update(self.G, self.G_opt, loss)
        notes.add("progress", G_grad_norm=norm)
        return num_nonfinite

    def update_discriminator(self, batch: Batch, step: int, notes: "Notes") -> Tensor:
        """Let D tell real clips from G's, whose magnitude averages move meanwhile.

        In a single round they move as published: before they are used, layer by layer. In more, every round must see
        the same network, so they move once, at the end.
        """
        fake_rngs, real_rngs = self.rngs("D-fake", step), self.rngs("D-real", step)

        fake_losses, real_losses = [], []

        def fake_loss(piece: slice) -> Tensor:
            with torch.no_grad():
                fakes = self.fakes(cut(batch, piece), fake_rngs[piece], update_emas=True)
            logits = self.logits(fakes, fake_rngs[piece])
            loss = gan_loss(logits, real=False)
            notes.add("loss", D_score_fake=logits, D_sign_fake=logits.sign())
            fake_losses.append(loss.detach())
            return loss

        def real_loss(piece: slice) -> Tensor:
            logits = self.logits(self.reals(cut(batch, piece), real_rngs[piece]), real_rngs[piece])
            loss = gan_loss(logits, real=True)
            notes.add("loss", D_score_real=logits, D_sign_real=logits.sign())
            real_losses.append(loss.detach())
            return loss

        with collect_magnitudes(self.G) if self.options.grad_accum > 1 else contextlib.nullcontext():
            num_nonfinite, norm = self.update(self.D, self.D_opt, fake_loss, real_loss)
        notes.add("loss", D_loss=torch.stack(fake_losses) + torch.stack(real_losses))
        notes.add("progress", D_grad_norm=norm)
        return num_nonfinite

    def penalize_discriminator(self, batch: Batch, step: int, notes: "Notes") -> Tensor:
        """Flatten D around real clips: R1, with the weight of all the steps since the last time."""
        rngs = self.rngs("R1", step)

        def loss(piece: slice) -> Tensor:
            clips = self.reals(cut(batch, piece), rngs[piece])
            video = clips["video"].detach().requires_grad_(True)
            penalty = r1_penalty(self.logits({**clips, "video": video}, rngs[piece]), video)
            loss = self.options.gamma / 2 * penalty.mean()
            notes.add("loss", r1_penalty=penalty, r1_loss=loss)
            return loss

        num_nonfinite, norm = self.update(self.D, self.D_opt, loss, gain=self.options.r1_interval)
        notes.add("progress", R1_grad_norm=norm)
        return num_nonfinite

    def update(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        *losses: Callable[[slice], Tensor],
        gain: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """One optimiser step on the mean over rounds and ranks of the sum of `losses`, times `gain`.

        Each of `losses` takes the clips of one round, and is differentiated before the next one is computed, so that
        one graph at a time is in memory. Returns the number of non-finite entries in the gradient, and the gradient's
        norm as the optimiser sees it: averaged over ranks, times `gain`, with non-finite entries replaced.
        """
        network.requires_grad_(True)
        for block in self.frozen:
            block.requires_grad_(False)
        optimizer.zero_grad(set_to_none=True)
        for piece in self.rounds():
            for loss in losses:
                loss(piece).backward()
        network.requires_grad_(False)
        num_nonfinite = distributed.sync_grads(network.parameters(), gain / self.options.grad_accum)
        norm = nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
        optimizer.step()
        return num_nonfinite, norm

    def ema_beta_at(self, step: int) -> float:
        """Decay of the generator's moving average: its half-life grows linearly over the first steps."""
        ramp = (self.options.ema_rampup_steps + 1) / (step + 1)
        return min(self.options.ema_beta**ramp, self.options.ema_beta)

    @torch.no_grad()
    def update_ema(self, step: int) -> float:
        """Move G_ema towards G, parameters and buffers alike; returns the decay."""
        beta = self.ema_beta_at(step)
        averages = [*self.G_ema.parameters(), *self.G_ema.buffers()]
        currents = [*self.G.parameters(), *self.G.buffers()]
        torch._foreach_lerp_(averages, currents, 1 - beta)  # pyright: ignore[reportPrivateImportUsage]
        return beta

    # The rest of the contract ------------------------------------------------------------------------------------

    def init_from(self, weights: nn.Module | Mapping[str, Mapping[str, Tensor]]) -> None:
        """Begin with the weights of a generator, or with those of G, D and G_ema in the "modules" of a training state.

        Optimisers and the step stay those of a new run. Raises `ValueError` for weights that do not fit, and for a
        generator alone if blocks of D are to be frozen, since a new D has nothing to keep.
        """
        if isinstance(weights, nn.Module):
            if self.frozen:
                raise ValueError(
                    f"freeze_d is {self.options.freeze_d}, but a generator alone brings no discriminator whose weights "
                    "could be kept; begin with a whole training state, --init-from=ckpt-...-train.pt"
                )
            state = weights.state_dict()
            weights = {"G": state, "G_ema": state}
        else:
            weights = {name: weights.get(name, {}) for name in self.modules}
        for name, state in weights.items():
            check_fit(name, state, self.modules[name].state_dict())
        for name, state in weights.items():
            self.modules[name].load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """What neither `modules` nor `optimizers` hold."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        assert not state, f"unexpected state {list(state)}"

    def frames(
        self, seeds: Sequence[int], start: Start, num_frames: int, condition: Condition | None = None
    ) -> Iterator[Tensor]:
        """See `training.longvideogan.sampling.Source.frames`."""
        return self.source().frames(seeds, start, num_frames, condition)

    def sample(
        self, seeds: Sequence[int], start: Start, num_frames: int, condition: Condition | None = None
    ) -> Iterator[Tensor]:
        """See `training.longvideogan.sampling.Source.sample`."""
        return self.source().sample(seeds, start, num_frames, condition)

    def preview_spec(self) -> dict[str, int]:
        """How much the loop shows of the videos at each preview."""
        return {"num_frames": self.options.preview_frames, "num_videos": self.options.preview_videos}

    def export(self) -> nn.Module:
        """The network that generation needs: the averaged generator."""
        return self.G_ema


class Notes:
    """What a step has to report: values by name, gathered over its rounds."""

    def __init__(self):
        self._values: dict[str, list[Tensor]] = {}

    def add(self, group: str, **values: Tensor) -> None:
        """Note more values of each "group/name"."""
        for name, value in values.items():
            self._values.setdefault(f"{group}/{name}", []).append(value.detach().flatten())

    def values(self) -> dict[str, Tensor]:
        """All values of each name, one after another."""
        return {name: torch.cat(values) for name, values in self._values.items()}


def make_adam(network: nn.Module, lr: float, betas: tuple[float, float]) -> torch.optim.Adam:
    """Adam over all parameters of `network`, in one kernel for all of them where torch has one.

    Its state has the same layout either way: a `step`, which the fused kernel keeps on the device, and two averages.
    """
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in network.parameters())
    return torch.optim.Adam(network.parameters(), lr=lr, betas=betas, eps=1e-8, fused=fused)


def check_fit(name: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse weights for the module `name` whose names or shapes are not those `wanted`: ValueError with the first."""

    def describe(state: Mapping[str, Tensor], key: str) -> str:
        return "x".join(map(str, state[key].shape)) or "one number" if key in state else "absent"

    for key in [*wanted, *found]:
        there, here = describe(found, key), describe(wanted, key)
        if there != here:
            raise ValueError(
                f"The weights to begin with do not fit these options: {name}.{key} is {there} there and {here} here; "
                "give the frame sizes, clip length and widths that those weights were trained with"
            )


def cut(batch: Batch, piece: slice) -> Batch:
    """The clips of one round of accumulation."""
    return {name: part[piece] for name, part in batch.items()}


def seeded_networks(seed: int, build: Callable[[], tuple[nn.Module, nn.Module]]) -> tuple[nn.Module, nn.Module]:
    """Call `build` with torch's CPU generator at `seed`, and leave that generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def r1_penalty(logits: Tensor, video: Tensor) -> Tensor:
    """Squared norm of the gradient of each clip's logit (Mescheder et al. 2018): (N,), differentiable."""
    (gradient,) = torch.autograd.grad(logits.sum(), video, create_graph=True)
    return gradient.square().sum(dim=[1, 2, 3, 4])


def gan_loss(logits: Tensor, real: bool) -> Tensor:
    """Non-saturating logistic loss that calls `logits` real or fake: mean over the clips (Goodfellow et al. 2014)."""
    return nn.functional.softplus(-logits if real else logits).mean()
