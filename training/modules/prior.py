"""The common part of systems that train one network on the codes or latents of a frozen tokenizer."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from torch_utils import misc
from training import optim
from training.config import TrainOptions
from training.contract import Batch, Bundle, Run, System
from training.data.spectrograms import is_of_sound
from training.modules.options import PriorOptions as PriorOptions
from training.network_file import load_tokenizer
from training.random import random_state

TOKENIZER = "tokenizer"  # role of the tokenizer in the exported file
EMA_RAMPUP_STEPS = 100  # over which the half-life of the average grows


class Prior(System):
    """Train one network, `self.network`, on what a frozen tokenizer makes of the dataset.

    Subclasses define `build`, `inputs`, `batch_spec`, `losses`, `make_sampler`, and where they differ `draw`,
    `parameter_groups` and the attributes below.
    """

    role: ClassVar[str] = "prior"  # of the network in checkpoints and in the exported file
    system: ClassVar[str]  # name in the registry
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    precisions = ("fp32", "bf16")
    models_codes: ClassVar[bool] = True  # False: it models the latents before quantization

    options: Any

    def __init__(self, options: Any, run: Run):
        super().__init__(options, run)
        self.tokenizer, self.tokenizer_hash = load_tokenizer(options.tokenizer, run.device)
        if is_of_sound(self.tokenizer):
            raise ValueError(f"{options.tokenizer} encodes sound, expected a tokenizer of frames: give one of these")
        if self.models_codes and not self.tokenizer.vocabulary:
            raise ValueError(
                f"{options.tokenizer} has continuous latents, but {self.system} models codes: train a tokenizer with "
                "a codebook (--quantizer)"
            )
        self.frozen = {TOKENIZER: self.tokenizer}
        self.network = optim.seeded(run.seed, self.build).to(run.device)
        self.modules = {self.role: self.network}
        self.average = self.network
        if options.ema_beta:
            self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
            self.modules[f"{self.role}_ema"] = self.average
        groups = self.parameter_groups()
        decay = options.weight_decay
        self.optimizers = {self.role: optim.make_adam(groups, options.lr, self.betas, decay)}
        steps = max(run.steps, 1)
        warmup = min(options.warmup_steps, steps - 1)  # so that a run of few steps, to try something, is none to refuse
        self.schedule: optim.Rates = optim.Schedule(options.lr, options.schedule, warmup, steps)

    @classmethod
    def check(cls, options: Any, train_options: TrainOptions) -> None:
        """See `System.check`."""
        optim.check_options(options, above_zero=("lr",), shares=("ema_beta",))

    # ---- What subclasses define -------------------------------------------------------------------------------------

    def build(self) -> nn.Module:
        """Return the network, given `self.options` and `self.tokenizer`."""
        raise NotImplementedError(f"{type(self).__name__} does not build its network")

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return losses by name, of any shape, of a batch and the random numbers of `draw`; "loss" is minimised.

        "loss" is a mean over the clips of `batch`, or has a value for each.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define its losses")

    def make_sampler(self, network: nn.Module) -> Any:
        """Return the sampler of a network and `self.tokenizer`."""
        raise NotImplementedError(f"{type(self).__name__} has no sampler")

    def draw(self, rngs: list[np.random.RandomState], step: int) -> dict[str, np.ndarray]:
        """Return the random numbers of a step, by name: arrays with one row for each generator, that is, each clip."""
        return {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups of the optimiser: matrices decay, vectors do not."""
        parameters = list(self.network.parameters())
        matrices = [parameter for parameter in parameters if parameter.ndim > 1]
        vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def export_options(self) -> dict[str, Any]:
        """Return what the sampler needs to know besides the networks, as plain values."""
        return {}

    # ---- Training ---------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Return the device of the network."""
        return next(self.network.parameters()).device

    @contextlib.contextmanager
    def randomness(self, step: int, part: str) -> Iterator[None]:
        """Seed the generators of dropout for one part of a step and of the batch, and restore them afterwards."""
        key = f"{step}:{part}:{self.run.reader}"
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(random_state("train-dropout", self.run.seed, key).randint(1 << 31)))
            yield

    def autocast(self) -> torch.autocast:
        """Return the context of the forward pass, in the run's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.precision == "bf16")

    def with_draws(self, batch: Batch, rngs: list[np.random.RandomState], step: int) -> Batch:
        """Return a batch together with the random numbers of `draw`, on the device."""
        drawn = self.draw(rngs, step)
        return batch | {name: misc.upload(torch.from_numpy(array), self.device) for name, array in drawn.items()}

    def step(self, batches: Iterator[Batch], step: int) -> dict[str, Tensor]:
        """See `System.step`."""
        batch, report = next(batches), optim.Report()
        batch = self.with_draws(batch, self.run.rngs(self.role, step), step)

        def loss(piece: slice) -> Tensor:
            with self.randomness(step, str(piece.start)), self.autocast():
                losses = self.losses(optim.cut(batch, piece))
            report.add("loss", **losses)
            return losses["loss"].mean()

        rate = self.schedule.apply(self.optimizers[self.role], step)
        self.network.train()
        rounds, limit = self.run.rounds(), self.options.clip_norm or None
        num_nonfinite, norm = optim.update(self.network, self.optimizers[self.role], rounds, loss, clip_norm=limit)
        if self.options.ema_beta:
            beta = optim.ema_decay(self.options.ema_beta, EMA_RAMPUP_STEPS, step)
            optim.update_ema(self.average, self.network, beta)
        report.add("progress", rate=torch.tensor(rate), grad_norm=norm, nonfinite_gradients=num_nonfinite.float())
        return report.values()

    def validate(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """See `System.validate`; random numbers are the same at every step, and dropout is off."""
        batch = self.with_draws(next(batches), self.run.rngs("validate", 0), 0)
        was_training = self.network.training
        self.network.eval()
        with self.autocast():
            losses = self.losses(batch)
        self.network.train(was_training)
        return {f"loss/{name}": value for name, value in losses.items()}

    # ---- Files ------------------------------------------------------------------------------------------------------

    def init_from(self, weights: Bundle | Mapping[str, Mapping[str, Tensor]]) -> None:
        """See `System.init_from`."""
        if isinstance(weights, Bundle):
            if self.role not in weights.networks:
                raise ValueError(f"{weights.path} holds no {self.role}: give a file of {self.system}")
            weights = dict.fromkeys(self.modules, weights.networks[self.role].state_dict())
        optim.load_weights(self.modules, weights)

    def sampler(self) -> Any:
        """See `System.sampler`; the network leaves training mode until the next step."""
        return self.make_sampler(self.average.eval())

    def export(self) -> Bundle:
        """See `System.export`."""
        networks = {self.role: self.average, TOKENIZER: self.tokenizer}
        return Bundle(networks, self.system, self.export_options(), self.tokenizer_hash)
