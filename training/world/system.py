"""Training of the world model: flow matching of latents of the next frame (Lipman et al., ICLR 2023).

Frames of context carry noise whose strength the network is told (GameNGen, Valevski et al., ICLR 2025, section 3.2.1),
and late in training the newest of them are the network's own predictions, as they are when a video is generated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_utils import distributed
from training import optim
from training.charts import ChartSpec
from training.config import TrainOptions
from training.contract import Batch, BatchSpec, FrameClip, Info, Inputs, LatentClip, Stream
from training.generation import flow
from training.modules.latent_prior import LatentPrior
from training.random import random_state
from training.sampling import Sampler
from training.world import context
from training.world.networks import WorldModel
from training.world.options import WorldTrainOptions
from training.world.sampling import WorldSampler, denoise

END = 0.2  # least 1 - t by which errors of the clean latents are divided: those of the velocity grow without bound


class World(LatentPrior):
    """Train a model of the next frame under an action, to be walked through.

    python train.py world --dataset=data/labdoom --preset=toy --tokenizer=tokenizer.pkl --num-actions=9
    """

    Options = WorldTrainOptions
    role, system = "world", "world"

    network: WorldModel
    average: WorldModel

    charts = (ChartSpec("Error of latents", {"loss/error": "mean squared error"}, log=True),)

    def build(self) -> nn.Module:
        """See `Prior.build`."""
        o, (channels, grid) = self.options, self.latent_shape()
        return WorldModel(
            channels, grid, o.width, o.depth, o.heads, [1 << i for i in range(o.recent)], o.memory,
            o.history, o.num_actions, o.action_values, o.skip,
        )  # fmt: skip

    @classmethod
    def check(cls, options: WorldTrainOptions, train_options: TrainOptions) -> None:
        """See `System.check`."""
        super().check(options, train_options)
        optim.check_options(options, shares=("short_context", "own_start"))
        if options.num_actions and options.action_values:
            raise ValueError("--num-actions and --action-values are two kinds of actions: give one")
        least = max(options.prompt_frames, options.own_frames + 1)
        if options.clip_frames <= least:
            raise ValueError(
                f"--clip-frames is {options.clip_frames}, but the prompt and the network's own frames need more than "
                f"{least}: use longer clips"
            )
        with torch.device("meta"):
            WorldModel(4, (1, 1), options.width, 1, options.heads)

    # ---- Data -------------------------------------------------------------------------------------------------------

    def inputs(self) -> Inputs:
        """See `System.inputs`; poses are read to learn how actions move the viewer."""
        o = self.options
        streams = ("actions",) if o.has_actions else ()
        streams += ("poses",) if o.num_actions and o.poses else ()
        if o.latents:
            return Inputs(latents=self.tokenizer_hash, streams=streams)
        return Inputs(sizes=((self.tokenizer.height, self.tokenizer.width),), streams=streams)

    def batch_spec(self, step: int) -> list[BatchSpec]:
        """See `System.batch_spec`."""
        o, count = self.options, self.options.clip_frames
        frames = FrameClip("clip", self.tokenizer.height, self.tokenizer.width, 0, count)
        streams = [Stream(name, 0, count) for name in self.inputs().streams]
        return [BatchSpec(count, (LatentClip("latents", 0, count) if o.latents else frames, *streams))]

    def draw(self, rngs: list[np.random.RandomState], step: int) -> dict[str, np.ndarray]:
        """See `Prior.draw`: targets, what is known before them, noise, time, and hidden actions; rows are clips."""
        o, shape = self.options, (self.network.channels, *self.network.grid)
        drawn: dict[str, list[Any]] = {name: [] for name in ("targets", "firsts", "noise", "t", "level")}
        drawn |= {"context_noise": [], "own_noise": []}
        least = o.own_frames + 1
        for rng in rngs:
            targets = rng.randint(least, o.clip_frames, o.targets)
            known = np.where(rng.random_sample(o.targets) < o.short_context, rng.randint(1, 9, o.targets), targets)
            drawn["targets"].append(targets)
            drawn["firsts"].append(np.maximum(targets - known, 0))
            drawn["t"].append([flow.draw_time(rng, "logit-normal") for _ in range(o.targets)])
            drawn["level"].append(o.context_noise * rng.random_sample(o.targets) ** 2)
            drawn["noise"].append(rng.standard_normal((o.targets, *shape)))
            drawn["context_noise"].append(rng.standard_normal((o.targets, self.network.slots, *shape)))
            drawn["own_noise"].append(rng.standard_normal((o.targets, max(o.own_frames, 1), *shape)))
        arrays = {name: np.array(rows) for name, rows in drawn.items()}
        return {name: a.astype(np.float32) if a.dtype == np.float64 else a for name, a in arrays.items()}

    def num_own(self, step: int) -> int:
        """Return how many frames before the targets are the network's own at a step, on all ranks."""
        o = self.options
        if step < o.own_start * max(self.run.steps, 1):
            return 0
        return random_state("train-world-own", self.run.seed, step).randint(o.own_frames + 1)

    def with_draws(self, batch: Batch, rngs: list[np.random.RandomState], step: int) -> Batch:
        """See `Prior.with_draws`: with normalised latents (N, T, C, h, w), and poses by dead reckoning."""
        drawn = super().with_draws(batch, rngs, step)
        with torch.no_grad():
            z = batch["latents"] if self.options.latents else self.tokenizer.latents(batch["clip"])
        z = z.transpose(1, 2)
        if step == 0:
            self.measure(batch, z)
        z = self.scale.normalise(z)
        poses = torch.zeros(*z.shape[:2], 3, device=z.device)
        if self.options.num_actions:
            poses = context.dead_reckon(batch["actions"], self.network.motions)
        given = {"z": z, "poses": poses}
        given |= {"actions": batch["actions"]} if self.options.has_actions else {}
        own = torch.full((len(z),), self.num_own(step))  # stays on the host
        return {name: value for name, value in drawn.items() if name not in batch} | given | {"own": own}

    @torch.no_grad()
    def measure(self, batch: Batch, z: Tensor) -> None:
        """Learn from the first batch, over all ranks, the scale of latents and how actions move the viewer."""
        if not self.scale.measured:
            self.scale.measure(z)
        if "poses" in batch:
            actions, poses = (distributed.gather_rows(batch[name]) for name in ("actions", "poses"))
            found = context.measure_motions(actions, poses, self.options.num_actions)
            for network in (self.network, self.average):
                network.motions.copy_(found)

    # ---- Losses -----------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """See `Prior.losses`."""
        return self.errors(self.network, batch)

    def errors(self, network: WorldModel, batch: Batch) -> dict[str, Tensor]:
        """Return the loss of each target, and the mean squared error of its clean latents: (N * targets,) each."""
        count = batch["targets"].shape[1]
        each = {name: value.repeat_interleave(count, 0) for name, value in batch.items() if name in PER_CLIP}
        each |= {name: value.flatten(0, 1) for name, value in batch.items() if name not in (*PER_CLIP, "own")}
        z, targets = each["z"], each["targets"]
        own = int(batch["own"][0]) if len(batch["own"]) else 0
        rows = torch.arange(len(z), device=z.device)
        if own:
            z = z.clone()
            with torch.no_grad():
                for back in range(own, 0, -1):
                    numbers = targets - back
                    known = self.conditions(network, {**each, "z": z}, numbers)
                    made = denoise(network, each["own_noise"][:, back - 1], known, self.options.own_steps)
                    # The first known frame stays: made from nothing, it would tell nothing of the target.
                    has_past = numbers > each["firsts"]
                    z[rows[has_past], numbers[has_past]] = made[has_past]
        data, t = each["z"][rows, targets], each["t"]
        x = flow.interpolate(each["noise"], data, t.view(-1, 1, 1, 1), 0.0)
        found = network(x, t, *self.conditions(network, {**each, "z": z}, targets))
        error = (found - data).square().mean((1, 2, 3))
        return {"loss": error / (1 - t).clamp(min=END).square(), "error": error}

    def conditions(self, network: WorldModel, each: Batch, targets: Tensor) -> tuple[Any, ...]:
        """Return what the network is told of frames `targets` besides x and t, given the frames before them."""
        poses, level = each["poses"], each["level"]
        chosen = context.choose(poses, targets, each["firsts"], network.recent, network.memory)
        seen = context.pick(each["z"], chosen) + level.view(-1, 1, 1, 1, 1) * each["context_noise"]
        seen = seen * chosen.present.view(*chosen.present.shape, 1, 1, 1)
        where = context.geometry(poses, targets, chosen)
        if network.actions is None:
            return seen, where, level
        numbers = targets.unsqueeze(1) + torch.arange(1 - network.history, 1, device=level.device)
        known = numbers > each["firsts"].unsqueeze(1)
        rows = torch.arange(len(level), device=level.device).unsqueeze(1)
        return seen, where, level, each["actions"][rows, numbers.clamp(min=0)], known

    def validate(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """See `System.validate`: the losses of the averaged weights, with the same draws every time.

        "error of copying" is that of the newest frame of context.
        """
        batch = self.with_draws(next(batches), self.run.rngs("validate", 0), -1)
        rows = torch.arange(len(batch["z"]), device=self.device).unsqueeze(1)
        copied = (batch["z"][rows, batch["targets"]] - batch["z"][rows, batch["targets"] - 1]).square()
        found = self.errors(self.average, batch)
        return {f"loss/{name}": value for name, value in found.items()} | {"copying": copied.mean((2, 3, 4)).flatten()}

    # ---- Results ----------------------------------------------------------------------------------------------------

    def export_options(self) -> dict[str, Any]:
        """See `Prior.export_options`."""
        o = self.options
        return {"prompt_frames": o.prompt_frames, "horizon": o.clip_frames - 1}

    def make_sampler(self, network: nn.Module) -> Sampler:
        """See `Prior.make_sampler`."""
        assert isinstance(network, WorldModel)
        return WorldSampler(network, self.latents, self.export_options())

    def info(self) -> Info:
        """See `System.info`."""
        return Info(status=("loss/error",), charts=self.charts, preview_frames=64)


PER_CLIP = ("z", "poses", "actions")  # parts of a batch with frames of clips; all others have a row for each target
