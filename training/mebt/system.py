"""Training of MeBT: cross-entropy of masked codes, on token shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_utils import distributed, misc
from training import optim
from training.charts import ChartSpec
from training.config import TrainOptions
from training.contract import Batch, BatchSpec, CodeClip, Info, Inputs, Run
from training.mebt import config_file
from training.mebt.masks import beta_at, divide, draw_time, growth_steps, window_prior
from training.mebt.networks import MeBT
from training.mebt.optimizer import BETAS, parameter_groups
from training.mebt.options import MeBTOptions
from training.mebt.sampling import MeBTSampler, Sampling
from training.modules.prior import Prior
from training.random import random_state
from training.sampling import resolve_options


class MeBTTraining(Prior):
    """Train MeBT: predict masked codes of whole videos from visible ones.

    python train.py mebt --dataset=data/labdoom --tokenizer=TOKENIZER --preset=toy
    """

    Options = MeBTOptions
    role, system = "prior", "mebt"
    betas = BETAS
    charts = (
        ChartSpec("Cross-entropy of masked codes", {"loss/loss": "nats"}),
        ChartSpec("Share of codes predicted right", {"loss/top1": "first", "loss/top5": "among five"}),
    )

    def __init__(self, options: MeBTOptions, run: Run):
        super().__init__(options, run)
        self.sampler_options = resolve_options(Sampling, options.sampling, "the preset")

    @classmethod
    def check(cls, options: MeBTOptions, train_options: TrainOptions) -> None:
        """See `System.check`."""
        super().check(options, train_options)
        shares = ("embedding_dropout", "attention_dropout", "residual_dropout", "label_smoothing")
        optim.check_options(options, shares=shares)
        if not options.t_min < options.t_max <= 1:
            raise ValueError(
                f"--t-range is {options.t_min} {options.t_max}: give two numbers from 0 to 1, the smaller first"
            )

    @classmethod
    def read_preset(cls, row: Mapping[str, Any], given: dict[str, Any]) -> Mapping[str, Any]:
        """See `System.read_preset`: with --config the file's settings instead of the preset's."""
        path = given.pop("config", None)
        return config_file.read_row(path, row) if path else row

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the grid of a clip: latent frames, rows, columns.

        Raises `ValueError` if the tokenizer's stride does not divide the clip.
        """
        frames, pixels = self.tokenizer.stride
        if self.options.num_frames % frames:
            raise ValueError(
                f"--num-frames is {self.options.num_frames}, but the tokenizer encodes {frames} frames as one step: "
                "use a multiple"
            )
        return self.options.num_frames // frames, self.tokenizer.height // pixels, self.tokenizer.width // pixels

    def build(self) -> nn.Module:
        """See `Prior.build`."""
        options = self.options
        return MeBT(
            self.tokenizer.vocabulary, self.shape, options.width, options.heads, options.latents, options.modes,
            options.layers or None, "normalised" if options.legacy else options.residual, options.embedding_dropout,
            options.attention_dropout, options.residual_dropout,
        )  # fmt: skip

    def parameter_groups(self) -> list[dict[str, Any]]:
        """See `Prior.parameter_groups`."""
        assert isinstance(self.network, MeBT)
        return parameter_groups(self.network, self.options.weight_decay)

    def inputs(self) -> Inputs:
        """See `System.inputs`."""
        return Inputs(codes=self.tokenizer_hash)

    def batch_spec(self, step: int) -> list[BatchSpec]:
        """See `System.batch_spec`."""
        return [BatchSpec(self.options.num_frames, (CodeClip("codes", 0, self.shape[0]),))]

    # ---- Masks ------------------------------------------------------------------------------------------------------

    def with_draws(self, batch: Batch, rngs: list[np.random.RandomState], step: int) -> Batch:
        """See `Prior.with_draws`; what decides shapes stays on the host: permutations, masking times and windows."""
        count, options = int(np.prod(self.shape)), self.options
        if options.legacy:  # one mask for each round of a rank
            rank, rounds = distributed.get_rank(), self.run.rounds()
            keys = [
                f"{step}:{rank}:{number}"
                for number, piece in enumerate(rounds)
                for _ in range(*piece.indices(len(rngs)))
            ]
        else:
            first = distributed.get_rank() * self.run.local_batch
            keys = [f"{step}:{(first + number) // options.masks_of}" for number in range(len(rngs))]
        masks = {key: self.draw_mask(random_state("train-mebt-mask", self.run.seed, key), step) for key in set(keys)}
        return batch | {
            "permutation": torch.from_numpy(np.array([rng.permutation(count) for rng in rngs])),
            "mask": torch.tensor([masks[key] for key in keys], dtype=torch.float64),
        }

    def draw_mask(self, rng: np.random.RandomState, step: int) -> tuple[float, int, int]:
        """Return the masking time, and the length and the first latent frame of the window."""
        options, frames = self.options, self.shape[0]
        beta = None
        if options.beta_steps:
            beta = beta_at(step, (options.beta_a, options.beta_b), options.beta_steps)
        time = draw_time(rng, (options.t_min, options.t_max), beta)
        growth = None
        if growth_steps(options.window_prior) and not options.legacy:
            # The middle of the distribution reaches the whole clip after this share of the run.
            growth = max(options.curriculum * self.run.steps / max(frames - 1, 1), 1e-9)
        shares = window_prior(options.window_prior, step, frames, growth)
        length = 1 + int(rng.choice(frames, p=shares))
        return time, length, int(rng.randint(frames - length + 1))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """See `Prior.losses`; clips with the same mask are predicted together."""
        budget, found, start = self.options.budget or None, [], 0
        masks = batch["mask"].tolist()
        while start < len(masks):
            stop = next((i for i in range(start, len(masks)) if masks[i] != masks[start]), len(masks))
            found.append(self.group_losses(optim.cut(batch, slice(start, stop)), masks[start], budget))
            start = stop
        return {name: torch.cat([losses[name] for losses in found]) for name in found[0]}

    def group_losses(self, batch: Batch, mask: list[float], budget: int | None) -> dict[str, Tensor]:
        """Return the losses of clips of one mask, (N,) each."""
        options, network = self.options, self.network
        assert isinstance(network, MeBT)
        time, length, start = mask
        division = divide(
            batch["permutation"],
            self.shape,
            time,
            int(length),
            int(start),
            budget,
            options.mask_schedule,
            options.legacy,
        )
        contexts, targets = (misc.upload(x, self.device) for x in (division.contexts, division.targets))
        losses, hits = network.losses(batch["codes"].flatten(1), contexts, targets, options.label_smoothing)
        share = torch.full((len(losses),), division.masked_share, device=losses.device)
        return {
            "loss": division.each(losses, options.average),
            "top1": hits[..., 0].mean(1),
            "top5": hits[..., 1].mean(1),
            "masked": share,
        }

    def validate(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """See `System.validate`: whole clips, evenly spaced masking times, all masked codes."""
        batch, count = next(batches), int(np.prod(self.shape))
        rngs = self.run.rngs("validate", 0)
        times = [(2 * number + 1) / (2 * len(rngs)) for number in range(len(rngs))]
        batch = batch | {
            "permutation": torch.from_numpy(np.array([rng.permutation(count) for rng in rngs])),
            "mask": torch.tensor([(time, self.shape[0], 0) for time in times], dtype=torch.float64),
        }
        was_training = self.network.training
        self.network.eval()
        with self.autocast():
            found = [
                self.group_losses(optim.cut(batch, slice(i, i + 1)), mask, None)
                for i, mask in enumerate(batch["mask"].tolist())
            ]
        self.network.train(was_training)
        return {f"loss/{name}": torch.cat([losses[name] for losses in found]) for name in found[0]}

    # ---- Samples ----------------------------------------------------------------------------------------------------

    def make_sampler(self, network: nn.Module) -> MeBTSampler:
        """See `Prior.make_sampler`."""
        assert isinstance(network, MeBT)
        return MeBTSampler(network, self.tokenizer, self.sampler_options)

    def export_options(self) -> dict[str, Any]:
        """See `Prior.export_options`."""
        return {"sampling": dict(self.options.sampling)}

    def info(self) -> Info:
        """See `System.info`."""
        return Info(
            status=("loss/top1",), charts=self.charts, preview_frames=min(self.options.num_frames, 64), preview_videos=4
        )
