"""Continue a prompt under actions: latents one frame after the other, with a memory that is searched by pose."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_utils import misc
from torch_utils.cuda_graphs import replayed
from training.contract import Bundle
from training.generation import flow
from training.generation.rollout import aligned
from training.modules.autoencoder import Autoencoder
from training.modules.inference import Prepared
from training.modules.latent_prior import SCALE
from training.modules.latents import LatentScale, LatentVideo
from training.modules.prior import TOKENIZER
from training.random import random_state
from training.sampling import Needs, Request, Sampler, resolve_options, sampler_option
from training.world import context
from training.world.networks import WorldModel, prepare

ROLE = "world"  # of the network in files


@dataclass(frozen=True)
class WorldOptions:
    """How videos are continued; None is what suits the file."""

    steps: int = sampler_option(4, "evaluations of the network for a frame", low=1, high=32, live=True)
    noise: float = sampler_option(
        0.05, "standard deviation of the noise on frames of context", low=0, high=0.6, live=True
    )
    prompt_frames: int | None = sampler_option(None, "frames of context  [default: as in training, else 1]", low=1)
    horizon: int | None = sampler_option(None, "frames that are remembered  [default: as in training]", low=1)

    def __post_init__(self) -> None:
        for name in ("steps", "prompt_frames", "horizon"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"option {name} is {value}: use a number from 1 on")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"option noise is {self.noise:g}: use a number from 0 to 1")


class Past:
    """What is remembered of N videos: latents, poses and actions of the newest `horizon` frames."""

    def __init__(self, network: WorldModel, latents: Tensor, actions: Tensor | None, horizon: int):
        self.network, self.horizon, self.num_frames = network, horizon, latents.shape[1]
        poses = torch.zeros(*latents.shape[:2], 3, device=latents.device)
        if network.num_actions and actions is not None:
            poses = context.dead_reckon(actions, network.motions)
        self.latents, self.poses = deque(latents.unbind(1), horizon), deque(poses.unbind(1), horizon)
        self.actions = deque(() if actions is None else actions[:, 1:].unbind(1), network.history)

    def move(self, action: Tensor | None) -> None:
        """Take the action into the next frame: int64 (N,) or float (N, values)."""
        pose = self.poses[-1]
        if action is not None:
            self.actions.append(action)
            if self.network.num_actions:
                pose = context.dead_reckon(action.unsqueeze(1), self.network.motions, pose)[:, 0]
        self.poses.append(pose)

    def append(self, latents: Tensor) -> None:
        """Take the latents of the next frame: (N, C, h, w)."""
        self.latents.append(latents)
        self.num_frames += 1

    def history(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Return the newest actions, (N, history, ...), and which of them are known, bool (N, history)."""
        if not self.actions:
            return None, None
        missing = self.network.history - len(self.actions)
        found = torch.stack([self.actions[0]] * missing + list(self.actions), dim=1)
        known = torch.ones(found.shape[:2], dtype=torch.bool, device=found.device)
        known[:, :missing] = False
        return found, known

    def seen(self) -> tuple[Tensor, Tensor]:
        """Return the context of the next frame, whose pose is the newest one, and its geometry."""
        poses = torch.stack(list(self.poses), 1)
        targets = torch.full((len(poses),), poses.shape[1] - 1, device=poses.device)
        firsts = targets - min(len(self.latents), poses.shape[1] - 1)
        chosen = context.choose(poses, targets, firsts, self.network.recent, self.network.memory)
        latents = torch.stack(list(self.latents)[-int(targets[0]) :], 1)
        return context.pick(latents, chosen), context.geometry(poses, targets, chosen)


def next_latents(past: Past, rngs: Sequence[np.random.RandomState], options: WorldOptions) -> Tensor:
    """Return the latents of the next frame, whose action `past.move` was told: (N, C, h, w)."""
    network = past.network
    seen, where = past.seen()
    shape = (1 + network.slots, network.channels, *network.grid)
    drawn = np.stack([rng.standard_normal(shape) for rng in rngs]).astype(np.float32)
    noise = misc.upload(torch.from_numpy(drawn), seen.device)
    seen = (seen + options.noise * noise[:, 1:]) * where[..., -1, None, None, None]
    level = torch.full((len(seen),), options.noise, device=seen.device)
    return denoise(network, noise[:, 0], (seen, where, level, *past.history()), options.steps)


def denoise(network: WorldModel, noise: Tensor, known: Sequence[Any], steps: int) -> Tensor:
    """Return latents (N, C, h, w) from noise in `steps` evaluations; `known` follows x and t in those."""

    times = flow.time_grid(steps + 1)
    predict = _at_once(network, known, times[:-1]) if noise.device.type == "cpu" else _one_by_one(network, known)
    return flow.integrate(lambda t, x: (predict(t, x) - x) / (1 - t), noise, times, "euler")


def _one_by_one(network: WorldModel, known: Sequence[Any]) -> flow.Field:
    """Return the network as a function of time and latents."""
    return lambda t, x: network(x, torch.full((len(x),), t, device=x.device), *known)


def _at_once(network: WorldModel, known: Sequence[Any], times: Sequence[float]) -> flow.Field:
    """Return the same for these times, whose conditions are computed together: their weights are read once."""
    context, *rest = known
    rows, count = len(context), len(times)
    t = torch.tensor(times, device=context.device).repeat_interleave(rows)
    repeated: list[Any] = [None if part is None else part.repeat(count, *[1] * (part.ndim - 1)) for part in rest]
    parts = dict(zip(times, network.conditions(t, *repeated).split(count), strict=True))
    return lambda t, x: network.predict(x, context, parts[t])


class WorldSampler(Sampler):
    """Continues its prompt of `prompt_frames` frames under the action into every new one."""

    Options = WorldOptions
    random_access = False
    block = 8
    live_block = 1
    good_batch = 16

    def __init__(
        self, network: WorldModel, video: LatentVideo, facts: Mapping[str, Any] | None = None,
        options: WorldOptions = WorldOptions(),
    ):  # fmt: skip
        self.network, self.latents = network, video
        self.facts, self.options = dict(facts or {}), options
        self.networks = [network, video.tokenizer]
        self.outputs = {"video": (video.tokenizer.height, video.tokenizer.width)}
        self.num_actions, self.action_values = network.num_actions or None, network.action_values or None
        self.costs = {"evaluations_per_frame": options.steps}
        self.prepared = Prepared(lambda: (replayed(prepare(network)), video.for_decoding()), self.networks)

    def with_options(self, options: Any) -> Sampler:
        """See `Sampler.with_options`."""
        other = WorldSampler(self.network, self.latents, self.facts, options)
        other.prepared, other.fps, other.vocabularies = self.prepared, self.fps, self.vocabularies
        return other

    @property
    def needs(self) -> Needs:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return the context frames, which depend on the options, and the actions."""
        past = self.options.prompt_frames or self.facts.get("prompt_frames", 1)
        return Needs(past=past, size=self.size, streams=("actions",) if self.network.actions is not None else ())

    @torch.no_grad()
    def frames(self, request: Request) -> Iterator[dict[str, Tensor]]:
        """See `Sampler.frames`."""
        assert min(request.starts) >= 0, "a rollout begins at frame 0"
        given = request.prompt.frames(-self.needs.past, self.needs.past, self.size)
        given = given.to(next(self.latents.tokenizer.parameters())).expand(len(request.seeds), -1, -1, -1, -1)
        made, (_, latents) = self.rollout(request, self.latents.encode(given)), self.prepared.get()
        for z in aligned(made, request.starts, request.num_frames, self.block):
            yield {"video": latents.decode(z).float()}

    def rollout(self, request: Request, given: Tensor) -> Iterator[Tensor]:
        """Yield the latents of frames 0, 1, ... after those of the context (N, T, C, h, w): (N, C, h, w) each."""
        network, _ = self.prepared.get()
        horizon = self.options.horizon or self.facts.get("horizon", 256)
        past = Past(network, given, self.actions(request, -given.shape[1], given.shape[1]), max(horizon, 1))
        for frame in itertools.count():
            action = self.actions(request, frame, 1)
            past.move(None if action is None else action[:, 0])
            rngs = [random_state("world", seed, frame) for seed in request.seeds]
            past.append(next_latents(past, rngs, self.options))
            yield past.latents[-1]

    def actions(self, request: Request, start: int, count: int) -> Tensor | None:
        """Return the actions into frames of the prompt, (N, count, ...); None for a model without."""
        if not self.needs.streams:
            return None
        values = request.prompt.stream("actions", start, count).to(self.network.positions.device)
        return values.expand(len(request.seeds), *values.shape[1:])


def open_sampler(bundles: Sequence[Bundle], options: Mapping[str, Any]) -> Sampler:
    """Return the sampler of a file that holds a world model and its tokenizer; see `training.registry.Spec`."""
    if len(bundles) != 1:
        raise ValueError(f"{len(bundles)} files of world models were given: one holds all that is needed")
    networks: dict[str, Any] = dict(bundles[0].networks)
    tokenizer = networks.get(TOKENIZER)
    if not isinstance(tokenizer, Autoencoder):
        raise ValueError(f"{bundles[0].path} holds no tokenizer: give a file that training has exported")
    scale = networks.get(SCALE) or LatentScale(networks[ROLE].channels)
    chosen = resolve_options(WorldOptions, options, "a world model")
    return WorldSampler(networks[ROLE], LatentVideo(tokenizer, scale), bundles[0].options, chosen)
