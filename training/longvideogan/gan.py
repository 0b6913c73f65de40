"""What training a low-resolution and a super-resolution GAN have in common (LongVideoGAN, appendix B).

A step is: generator update, discriminator update, now and then an R1 update with its own optimiser step, then the
moving average of the generator. Every random number of a step belongs to one clip of the global batch, so neither
the number of ranks nor that of accumulation rounds changes what is drawn.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_utils import distributed
from training.dataset import BatchSpec
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
    preview_frames: int = 256
    preview_videos: int = 1

    def __post_init__(self):
        if self.r1_interval < 1:
            raise ValueError(
                f"R1 interval {self.r1_interval}: it must be at least 1; to train without R1, set gamma to 0"
            )


class GAN:
    """Networks, optimisers and the phases of a step. A stage defines its networks, its batches and its losses."""

    needs_condition = False
    context = 0

    def __init__(self, options: GANOptions, device: torch.device, generator: nn.Module, discriminator: nn.Module):
        self.options = options
        self.device = device
        self.G = generator.to(device).requires_grad_(False)
        self.D = discriminator.to(device).requires_grad_(False)
        self.G_ema = copy.deepcopy(self.G).eval()
        self.modules = {"G": self.G, "D": self.D, "G_ema": self.G_ema}
        # R1 takes Adam steps of its own; rate and momentum make up for them (StyleGAN2, "lazy regularisation").
        lazy = options.r1_interval / (options.r1_interval + 1)
        self.d_lr = options.d_lr * lazy
        d_betas = (0.0, options.beta2**lazy)
        self.G_opt = torch.optim.Adam(self.G.parameters(), lr=options.g_lr, betas=(0.0, options.beta2), eps=1e-8)
        self.D_opt = torch.optim.Adam(self.D.parameters(), lr=self.d_lr, betas=d_betas, eps=1e-8)
        self.optimizers = {"G": self.G_opt, "D": self.D_opt}

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
        return torch.from_numpy(values).to(self.device, self.dtype)

    # What a stage defines ----------------------------------------------------------------------------------------

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
        """One update of G, of D, of D by R1 when due, and of G_ema; returns the values to report."""
        stats: dict[str, list[Tensor]] = {}

        def note(**values: Tensor) -> None:
            for name, value in values.items():
                stats.setdefault(f"loss/{name}", []).append(value.detach().flatten())

        def take() -> Batch:
            return {name: part.to(self.dtype) for name, part in next(batches).items()}

        g_rngs = self.rngs("G", step)
        g_batch = take() if self.needs_condition else {}

        def g_loss(piece: slice) -> Tensor:
            logits = self.logits(self.fakes(cut(g_batch, piece), g_rngs[piece]), g_rngs[piece])
            loss = gan_loss(logits, real=True)
            note(G_score=logits, G_sign=logits.sign(), G_loss=loss)
            return loss

        num_nonfinite = self.update(self.G, self.G_opt, g_loss)

        fake_rngs, real_rngs = self.rngs("D-fake", step), self.rngs("D-real", step)
        d_batch = take()
        with torch.no_grad():
            fakes = self.fakes(d_batch, fake_rngs, update_emas=True)
            reals = self.reals(d_batch, real_rngs)

        def d_loss(piece: slice) -> Tensor:
            fake_logits = self.logits(cut(fakes, piece), fake_rngs[piece])
            real_logits = self.logits(cut(reals, piece), real_rngs[piece])
            loss = gan_loss(fake_logits, real=False) + gan_loss(real_logits, real=True)
            note(D_score_fake=fake_logits, D_sign_fake=fake_logits.sign(), D_loss=loss)
            note(D_score_real=real_logits, D_sign_real=real_logits.sign())
            return loss

        num_nonfinite += self.update(self.D, self.D_opt, d_loss)

        if self.r1_due(step):
            r1_rngs = self.rngs("R1", step)
            r1_batch = take()

            def r1_loss(piece: slice) -> Tensor:
                clips = self.reals(cut(r1_batch, piece), r1_rngs[piece])
                video = clips["video"].detach().requires_grad_(True)
                penalty = r1_penalty(self.logits({**clips, "video": video}, r1_rngs[piece]), video)
                loss = self.options.gamma / 2 * penalty.mean()
                note(r1_penalty=penalty, r1_loss=loss)
                return loss

            num_nonfinite += self.update(self.D, self.D_opt, r1_loss, gain=self.options.r1_interval)

        values = {name: torch.cat(values) for name, values in stats.items()}
        return values | {
            "progress/G_lrate": torch.tensor(self.options.g_lr),
            "progress/D_lrate": torch.tensor(self.d_lr),
            "progress/G_ema_beta": torch.tensor(self.update_ema(step)),
            "progress/nonfinite_gradients": torch.tensor(float(num_nonfinite)),
        }

    def update(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[slice], Tensor], gain: float = 1.0
    ) -> int:
        """One optimiser step on the mean over rounds and ranks of `loss`, times `gain`; returns non-finite gradients.

        `loss(piece)` is the loss of the clips of one round.
        """
        network.requires_grad_(True)
        optimizer.zero_grad(set_to_none=True)
        for piece in self.rounds():
            loss(piece).backward()
        network.requires_grad_(False)
        num_nonfinite = distributed.sync_grads(network.parameters(), gain / self.options.grad_accum)
        optimizer.step()
        return num_nonfinite

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
