"""Training of RIVER: flow matching of the next frame's latents (Davtyan et al., ICCV 2023, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_utils import distributed, misc
from training import optim
from training.augment.colour import change_clips, draw_changes
from training.charts import ChartSpec
from training.config import TrainOptions
from training.contract import (
    Batch,
    BatchSpec,
    FrameClip,
    Info,
    Inputs,
    LatentClip,
    Run,
    Stream,
)
from training.modules.latent_prior import LatentPrior
from training.random import random_state
from training.river.draws import ClipDropout, Sample, draw_sample, flow_losses, published_sample
from training.river.networks import VectorField
from training.river.options import RiverTrainOptions
from training.river.sampling import RiverSampler
from training.river.schedules import PublishedSchedule
from training.sampling import Sampler


class River(LatentPrior):
    """Train a predictor of the next frame's latents, given the newest frame and an older one.

    python train.py river --dataset=data/labdoom --preset=toy --tokenizer=tokenizer.pkl
    """

    Options = RiverTrainOptions
    role, system = "field", "river"
    charts = (ChartSpec("Velocity", {"loss/loss": "mean squared error"}, log=True),)

    def __init__(self, options: RiverTrainOptions, run: Run):
        super().__init__(options, run)
        if options.schedule == "polynomial":
            self.schedule = PublishedSchedule(options.lr, options.warmup_steps, run.steps)

    def build(self) -> nn.Module:
        """See `Prior.build`."""
        o, (channels, grid) = self.options, self.latent_shape()
        return VectorField(
            channels, grid, o.inner_dim, o.depth, o.mid_depth, o.out_norm,
            context_frames=o.context_frames, num_actions=o.num_actions, action_values=o.action_values,
        )  # fmt: skip

    @classmethod
    def check(cls, options: RiverTrainOptions, train_options: TrainOptions) -> None:
        """See `System.check`."""
        super().check(options, train_options)
        optim.check_options(options, shares=("dropout", "action_dropout", "sigma"))
        if options.prompt_frames >= options.clip_frames:
            raise ValueError(
                f"--prompt-frames is {options.prompt_frames}, but a clip has {options.clip_frames} frames: use longer "
                "clips"
            )
        if options.num_actions and options.action_values:
            raise ValueError("--num-actions and --action-values are two kinds of actions: give one")
        if options.legacy and (options.clip_frames < 3 or options.context_frames > 1):
            raise ValueError(
                "--legacy takes one old frame from clips of at least 3: change --clip-frames or --context-frames, or "
                "leave out --legacy"
            )
        if options.latents and options.colours:
            raise ValueError("--colours changes frames, but --latents reads none: leave out one of the two")
        with torch.device("meta"):
            VectorField(4, (1, 1), options.inner_dim, out_norm=options.out_norm)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """See `Prior.parameter_groups`: all parameters decay, as published."""
        return [{"params": list(self.network.parameters())}]

    @property
    def normalises(self) -> bool:
        """See `LatentPrior.normalises`."""
        return self.options.normalise

    # ---- Data -------------------------------------------------------------------------------------------------------

    def inputs(self) -> Inputs:
        """See `System.inputs`."""
        streams = ("actions",) if self.options.has_actions else ()
        if self.options.latents:
            return Inputs(latents=self.tokenizer_hash, streams=streams)
        return Inputs(sizes=((self.tokenizer.height, self.tokenizer.width),), streams=streams)

    def batch_spec(self, step: int) -> list[BatchSpec]:
        """See `System.batch_spec`."""
        o, window = self.options, (0, self.options.clip_frames, self.options.frame_stride)
        frames = FrameClip("clip", self.tokenizer.height, self.tokenizer.width, *window)
        streams = (Stream("actions", *window),) if o.has_actions else ()
        parts = (LatentClip("latents", *window) if o.latents else frames, *streams)
        return [BatchSpec((o.clip_frames - 1) * o.frame_stride + 1, parts)]

    def draw_frames(self, rngs: list[np.random.RandomState], step: int) -> Sample:
        """Return which frames of the clips of a step are used, with noise and time."""
        assert isinstance(self.network, VectorField)
        o, shape = self.options, (self.network.state_size, *self.network.state_res)
        if o.legacy:
            seed = random_state("river-legacy", self.run.seed, f"{step}:{distributed.get_rank()}").randint(1 << 31)
            return published_sample(torch.Generator().manual_seed(int(seed)), o.clip_frames, len(rngs), shape)
        return draw_sample(rngs, o.prompt_frames, o.clip_frames, o.context_frames, shape, o.time_law)

    def with_draws(self, batch: Batch, rngs: list[np.random.RandomState], step: int) -> Batch:
        """See `Prior.with_draws`: the sample, the latents of its frames, and the actions that lead into the targets."""
        o, sample = self.options, self.draw_frames(rngs, step)
        changes = np.stack([draw_changes(rng) for rng in rngs]) if o.colours else None
        shown = np.array([rng.random_sample() >= o.action_dropout for rng in rngs])
        drawn = {"dropout_seeds": torch.tensor([int(rng.randint(1 << 31)) for rng in rngs])}  # stay on the host
        z, sample = self.encode(batch, sample, changes), sample.to(self.device)
        if o.normalise and step == 0 and not self.scale.measured:
            self.scale.measure(z)
        drawn |= {"z": self.scale.normalise(z), **vars(sample)}
        if o.has_actions:
            rows = torch.arange(len(z), device=self.device)
            drawn["actions"] = batch["actions"].to(self.device)[rows, sample.targets]
            drawn["has_action"] = misc.upload(torch.from_numpy(shown), self.device)
        return drawn

    @torch.no_grad()
    def encode(self, batch: Batch, sample: Sample, changes: np.ndarray | None) -> Tensor:
        """Return the latents of the frames of a sample, not normalised: (N, 2 + k, C, h, w)."""
        if self.options.latents:
            return sample.pick(batch["latents"].transpose(1, 2))
        frames = sample.pick(batch["clip"].transpose(1, 2)).transpose(1, 2)  # (N, 3, 2 + k, H, W)
        self.tokenizer.eval()
        return self.tokenizer.latents(frames if changes is None else change_clips(frames, changes)).transpose(1, 2)

    # ---- Losses -----------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """See `Prior.losses`."""
        drop, rate = None, self.options.dropout
        if self.network.training and rate > 0:
            seeds = batch["dropout_seeds"].tolist()
            drop = ClipDropout(rate, [torch.Generator(self.device).manual_seed(seed) for seed in seeds])
        return {"loss": self.errors(self.network, batch, drop)}

    def errors(self, field: nn.Module, batch: Batch, drop: ClipDropout | None = None) -> Tensor:
        """Return the loss of each clip: (N,)."""
        assert isinstance(field, VectorField)
        sample = Sample(**{name: batch[name] for name in ("targets", "conditions", "noise", "t")})
        given = batch.get("actions"), batch.get("has_action")
        return flow_losses(field, batch["z"], sample, self.options.sigma, *given, drop=drop)[0]

    def validate(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """See `System.validate`: the loss of the averaged weights, with the same draws every time."""
        batch = self.with_draws(next(batches), self.run.rngs("validate", 0), -1)
        was_training = self.average.training
        self.average.eval()
        losses = self.errors(self.average, batch)
        self.average.train(was_training)
        return {"loss/loss": losses}

    # ---- Results ----------------------------------------------------------------------------------------------------

    def export_options(self) -> dict[str, Any]:
        """See `Prior.export_options`."""
        o = self.options
        return {"prompt_frames": o.prompt_frames, "past_horizon": max(o.clip_frames - 1, 2), "sigma": o.sigma}

    def make_sampler(self, network: nn.Module) -> Sampler:
        """See `Prior.make_sampler`."""
        assert isinstance(network, VectorField)
        return RiverSampler(network, self.latents, facts=self.export_options())

    def info(self) -> Info:
        """See `System.info`."""
        return Info(status=("loss/loss",), charts=self.charts, preview_frames=16)
