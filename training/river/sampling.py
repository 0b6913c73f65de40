"""Continue clips without end: latents one frame after the other, decoded in chunks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from torch_utils.cuda_graphs import replayed
from training.contract import Bundle
from training.generation import flow
from training.generation.rollout import aligned
from training.modules.autoencoder import Autoencoder
from training.modules.inference import Prepared
from training.modules.latents import LatentScale, LatentVideo
from training.network_file import content_hash
from training.river.networks import VectorField, prepare
from training.river.prediction import RESAMPLE, Integration, SeededDraws, begin, next_latents
from training.river.refiner import RCAN
from training.sampling import Needs, NoOptions, Request, Sampler, pieces, resolve_options, sampler_option

T = TypeVar("T")

DEFAULT_HORIZON = 256  # latents of the past, for files that do not tell the length of the clips of training


@dataclass(frozen=True)
class RiverOptions:
    """How videos are continued; None is what suits the file."""

    solver: str = sampler_option("midpoint", "rule of integration", choices=tuple(flow.SOLVERS), live=True)
    steps: int = sampler_option(5, "steps of the rule from noise to a frame", low=1, high=100, live=True)
    warm_start: float = sampler_option(
        0.0,
        "share of the newest frame in the beginning, which saves that share of the steps",
        low=0,
        high=0.95,
        live=True,
    )
    context_resample: str = sampler_option("eval", "when conditioning frames are drawn again", choices=RESAMPLE)
    past_horizon: int | None = sampler_option(
        None,
        "newest frames of which conditions are drawn; -1: all  [default: as in training, else 256; legacy: all]",
    )
    prompt_frames: int | None = sampler_option(None, "frames of context  [default: as in training, else 1]", low=1)
    guidance: float = sampler_option(
        1.0, "weight of the actions; 0: none, above 1: exaggerated", low=0, high=8, live=True
    )
    legacy: bool = sampler_option(
        False, "steps count the points of the grid, and the horizon has the fault of the release"
    )

    def __post_init__(self) -> None:
        for name, choices in (("solver", tuple(flow.SOLVERS)), ("context_resample", RESAMPLE)):
            if getattr(self, name) not in choices:
                raise ValueError(f"option {name} is {getattr(self, name)!r}: use one of {', '.join(choices)}")
        if self.steps < 1:
            raise ValueError(f"option steps is {self.steps}: use 1 or more")
        if not 0 <= self.warm_start < 1:
            raise ValueError(f"option warm_start is {self.warm_start:g}: use a number from 0 to below 1")
        if self.past_horizon is not None and self.past_horizon != -1 and self.past_horizon < 2:
            raise ValueError(f"option past_horizon is {self.past_horizon}: use 2 or more, or -1 for all frames")
        if self.prompt_frames is not None and self.prompt_frames < 1:
            raise ValueError(f"option prompt_frames is {self.prompt_frames}: use 1 or more")
        if self.guidance < 0:
            raise ValueError(f"option guidance is {self.guidance:g}: use 0 or more")
        self.grid()

    def grid(self) -> tuple[float, ...]:
        """Return the points of integration; raises `ValueError` if the rule of the release leaves none."""
        if self.legacy:
            points = flow.published_points(self.steps, self.warm_start)
        else:
            points = flow.num_intervals(self.steps, self.warm_start) + 1
        return tuple(flow.time_grid(points, self.warm_start))


class RiverSampler(Sampler):
    """Continues its prompt: `prompt_frames` frames, and the action into every new one if the model has actions."""

    Options = RiverOptions
    random_access = False
    block = 8
    good_batch = 16

    def __init__(
        self,
        field: VectorField,
        video: LatentVideo,
        refiner: RCAN | None = None,
        facts: Mapping[str, Any] | None = None,
        options: RiverOptions = RiverOptions(),
    ):
        self.field, self.latents, self.refiner = field, video, refiner
        self.model_facts, self.options = dict(facts or {}), options
        tokenizer = video.tokenizer
        self.networks = [field, tokenizer, *([refiner] if refiner is not None else [])]
        self.outputs = {"video": (tokenizer.height, tokenizer.width)}
        self.num_actions = field.num_actions or None
        self.prepared = Prepared(lambda: (replayed(prepare(field)), video.for_decoding()), self.networks)

    @property
    def needs(self) -> Needs:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return the context frames and streams, which depend on the options."""
        past = self.options.prompt_frames or self.model_facts.get("prompt_frames", 1)
        streams = ("actions",) if self.field.takes_actions and self.options.guidance != 0 else ()
        return Needs(past=past, size=self.size, streams=streams)

    @property
    def settings(self) -> Integration:
        """Return how a frame is integrated."""
        o = self.options
        horizon = o.past_horizon
        if horizon is None:
            horizon = -1 if o.legacy else self.model_facts.get("past_horizon", DEFAULT_HORIZON)
        guidance = o.guidance if self.field.takes_actions else 1.0
        sigma = self.model_facts.get("sigma", flow.SIGMA)
        return Integration(o.solver, o.grid(), o.context_resample, horizon, guidance, o.legacy, sigma)

    @property
    def costs(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `Sampler.costs`."""
        return {"evaluations_per_frame": self.settings.evaluations}

    @torch.no_grad()
    def frames(self, request: Request) -> Iterator[dict[str, Tensor]]:
        """See `Sampler.frames`."""
        assert min(request.starts) >= 0, "a rollout begins at frame 0"
        given = request.prompt.frames(-self.needs.past, self.needs.past, self.size)
        given = given.to(next(self.latents.tokenizer.parameters())).expand(len(request.seeds), -1, -1, -1, -1)
        made = self.rollout(request, self.latents.encode(given))
        if self.refiner is not None:  # each frame depends on all before it
            for video in aligned(self.refined(made, given[:, :, -1]), request.starts, request.num_frames, self.block):
                yield {"video": video.transpose(1, 2).float()}
            return
        _, latents = self.prepared.get()
        for z in aligned(made, request.starts, request.num_frames, self.block):
            yield {"video": latents.decode(z).float()}

    def rollout(self, request: Request, given: Tensor) -> Iterator[Tensor]:
        """Yield the latents of frames 0, 1, ... after those of the context (N, T, C, h, w): (N, C, h, w) each."""
        (field, _), settings = self.prepared.get(), self.settings
        needs_actions = bool(self.needs.streams)
        keeps_all = settings.past_horizon < 0 or settings.legacy
        past = begin(given, None if keeps_all else settings.past_horizon)
        for frame in itertools.count():
            actions = None
            if needs_actions:
                actions = request.prompt.stream("actions", frame, 1)[:, 0].to(given.device)
                actions = actions.expand(len(request.seeds), *actions.shape[1:])
            past.append(next_latents(field, past, SeededDraws(request.seeds, frame), settings, actions))
            yield past.latents[-1]

    def refined(self, latents: Iterator[Tensor], previous: Tensor) -> Iterator[Tensor]:
        """Yield the refined frames of latents, each given the refined frame before it: (N, 3, H, W)."""
        assert self.refiner is not None
        _, video = self.prepared.get()
        for z in latents:
            previous = self.refiner(previous, video.decode(z.unsqueeze(1))[:, :, 0])
            yield previous


class RefinedReconstruction(Sampler):
    """What tokenizer and refiner make of the prompt's frames, the true frame before each of them given."""

    block = 8

    def __init__(self, refiner: RCAN, tokenizer: Autoencoder):
        self.refiner, self.tokenizer, self.networks = refiner, tokenizer, [refiner, tokenizer]
        self.outputs = {"video": (tokenizer.height, tokenizer.width)}
        self.needs = Needs(past=1, size=self.outputs["video"], follows=True)

    @torch.no_grad()
    def frames(self, request: Request) -> Iterator[dict[str, Tensor]]:
        """See `Sampler.frames`."""
        weight, done = next(self.tokenizer.parameters()), 0
        for count in pieces(request.num_frames, self.block):
            video = request.prompt.frames([start + done - 1 for start in request.starts], count + 1, self.size)
            if video.shape[2] > 1:
                yield {"video": self.refine(video.to(weight)).expand(len(request.seeds), -1, -1, -1, -1).float()}
            done += video.shape[2] - 1
            if video.shape[2] <= count:
                return

    def refine(self, video: Tensor) -> Tensor:
        """Return all frames but the first, reconstructed and refined: (N, 3, T, H, W) -> (N, 3, T - 1, H, W)."""
        decoded = self.tokenizer.decode(self.tokenizer.encode(video[:, :, 1:]))
        pairs = (part.transpose(1, 2).flatten(0, 1) for part in (video[:, :, :-1], decoded))
        return self.refiner(*pairs).unflatten(0, (len(video), -1)).transpose(1, 2)


def _find(bundles: Sequence[Bundle], cls: type[T]) -> list[T]:
    return [network for bundle in bundles for network in bundle.networks.values() if isinstance(network, cls)]


def open_sampler(bundles: Sequence[Bundle], options: Mapping[str, Any]) -> Sampler:
    """Return the sampler of a predictor, with a refiner if a second file holds one; or that of a refiner alone."""
    fields, scales = _find(bundles, VectorField), _find(bundles, LatentScale)
    refiners, tokenizers = _find(bundles, RCAN), _find(bundles, Autoencoder)
    if len(fields) > 1 or len(refiners) > 1:
        raise ValueError(f"{len(fields)} predictors and {len(refiners)} refiners were given: give at most one of each")
    if not tokenizers:
        raise ValueError(f"{bundles[0].path} holds a refiner alone: give the predictor, too, as another --model")
    if len({content_hash(tokenizer) for tokenizer in tokenizers}) > 1:
        raise ValueError("the predictor and the refiner have different tokenizers: give files of the same one")
    if not fields:
        resolve_options(NoOptions, options, "a refiner")
        return RefinedReconstruction(refiners[0], tokenizers[0])
    (facts,) = (bundle.options for bundle in bundles if "field" in bundle.networks)
    scale = scales[0] if scales else LatentScale(fields[0].state_size).to(next(fields[0].parameters()).device)
    refiner = refiners[0] if refiners else None
    chosen = resolve_options(RiverOptions, options, "RIVER")
    return RiverSampler(fields[0], LatentVideo(tokenizers[0], scale), refiner, facts, chosen)
