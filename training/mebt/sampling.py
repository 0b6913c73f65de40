"""Videos of MeBT: a whole window of codes is drafted and revised, then windows that continue it, as long as wanted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_utils.precision import HALF_FORMATS
from training.contract import Bundle
from training.generation.draft_revise import (
    CHOICE_SCHEDULES,
    MASK_SCHEDULES,
    DraftSettings,
    Draw,
    Fast,
    Grid,
    Published,
)
from training.generation.noise import KeyedNoise
from training.mebt.extrapolation import continue_codes, last_frames
from training.mebt.networks import ContextCache, MeBT
from training.modules.linear import pack_linears
from training.sampling import Needs, Request, Sampler, resolve_options, sampler_option

STRATEGIES = ("confidence", "random", "parts")
POSITIONS_AT_ONCE = 32768  # of all videos of a batch: bounds memory


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn. Numbers of frames are those of the video.

    Raises `ValueError` for values out of range; those that depend on the network are checked with it.
    """

    steps: int = sampler_option(32, "steps of the draft", low=1, high=256, live=True)
    strategy: str = sampler_option("confidence", "which codes a step of the draft fixes", choices=STRATEGIES)
    schedule: str = sampler_option("cosine", "how many it fixes", choices=tuple(MASK_SCHEDULES))
    choice_temperature: float = sampler_option(4.0, "randomness in the order of codes", low=0, high=16, live=True)
    choice_schedule: str = sampler_option("linear", "how that falls over the steps", choices=tuple(CHOICE_SCHEDULES))
    temperature: float = sampler_option(1.0, "below 1: more probable codes in the draft", low=0, high=2, live=True)
    top_k: int = sampler_option(0, "draft from this many most probable codes; 0: from all", low=0)
    top_p: float = sampler_option(1.0, "draft from the fewest codes with this probability", low=0, high=1)
    bootstrap: int = sampler_option(0, "codes that are fixed one by one before the draft", low=0)
    revise_parts: int = sampler_option(4, "parts of the codes that are revised in turn", low=1)
    revise_rounds: int = sampler_option(2, "times that each code is revised", low=0, high=16, live=True)
    revise_temperature: float = sampler_option(0.7, "temperature in a revision", low=0, high=2, live=True)
    revise_top_k: int = sampler_option(0, "top_k in a revision", low=0)
    revise_top_p: float = sampler_option(1.0, "top_p in a revision", low=0, high=1)
    given: int = sampler_option(0, "frames of --context that the video continues", low=0)
    window: int | None = sampler_option(None, "frames drafted at once; by default as many as the network has", low=1)
    overlap: int | None = sampler_option(None, "frames of a window that the next one keeps; by default half", low=1)
    legacy: bool = sampler_option(False, "draw as published, with the faults that the README of MeBT lists")

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy is {self.strategy!r}: use one of {', '.join(STRATEGIES)}")
        for name, least in (("bootstrap", 0), ("revise_parts", 1), ("revise_rounds", 0), ("given", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: use a number from {least} on")
        _ = self.draft, self.revision  # which check the rest

    @property
    def draft(self) -> DraftSettings:
        """Return the settings of the draft."""
        strategy = "random" if self.strategy == "random" else "confidence"
        draw = Draw(self.temperature, self.top_k or None, self.top_p)
        return DraftSettings(self.steps, strategy, self.schedule, self.choice_temperature, self.choice_schedule, draw)

    @property
    def first(self) -> DraftSettings:
        """Return the settings of the steps before the draft, which fix a code each."""
        return DraftSettings(self.bootstrap, "bootstrap", self.schedule, draw=Draw())

    @property
    def revision(self) -> Draw:
        """Return how codes are drawn in a revision."""
        return Draw(self.revise_temperature, self.revise_top_k or None, self.revise_top_p)


def pack_in_place(network: MeBT, dtype: torch.dtype) -> None:
    """Pack the weights of a network for inference, block by block, so that they are never there twice."""
    layers = network.transformer
    for number, block in enumerate(layers.blocks):
        layers.blocks[number] = pack_linears(block, dtype)
    (head,) = pack_linears(nn.Sequential(layers.head), dtype).children()
    layers.add_module("head", head)
    network.to(dtype)


class Engine:
    """A network with packed weights: itself, if `owned`, else a copy, made again when its weights have changed."""

    def __init__(self, network: MeBT, owned: bool = False):
        self.network, self.owned = network, owned
        self._packed: MeBT | None = None
        self._state: list[Any] = []

    def get(self) -> MeBT:
        """Return the network for inference; raises `ValueError` if the precision of an owned one is changed later."""
        half = self.network.half
        state: list[Any] = [half]
        if not self.owned:
            state += [(id(tensor), tensor._version) for tensor in self.network.parameters()]
        if self._packed is not None and state == self._state:
            return self._packed
        dtype = torch.float32 if half is None else HALF_FORMATS[half]
        if self.owned and self._packed is not None:
            raise ValueError(f"this model computes in {self._state[0] or 'fp32'}: open it again for {half or 'fp32'}")
        if self.owned:
            pack_in_place(self.network, dtype)
            self._packed = self.network
        else:
            packed = pack_linears(self.network, dtype)
            assert isinstance(packed, MeBT)
            self._packed = packed
        self._state = state
        return self._packed


class MeBTSampler(Sampler):
    """Codes of a whole window at once, decoded; longer videos by windows that begin with frames of the one before."""

    Options = Sampling
    random_access = False
    good_batch = 16

    def __init__(self, network: MeBT, tokenizer: Any, options: Sampling = Sampling(), owned: bool = False):
        self.network, self.tokenizer, self.options = network, tokenizer, options
        self.networks = [network, tokenizer]
        self.outputs = {"video": (tokenizer.height, tokenizer.width)}
        self.stride = tokenizer.stride[0]
        self.max_batch = max(1, POSITIONS_AT_ONCE // network.num_positions)
        self.engine = Engine(network, owned)
        self._check()

    def _check(self) -> None:
        """Set what depends on the options; raise `ValueError` for those that do not suit the network."""
        options, stride, most = self.options, self.stride, self.network.shape[0] * self.stride
        frames = most if options.window is None else options.window
        if frames % stride or not 0 < frames <= most:
            raise ValueError(
                f"window is {frames} frames: use a multiple of {stride} up to {most}, the frames of the network"
            )
        self.window = frames // stride  # latent frames
        self.block = min(16, frames)
        for name in ("given", "overlap"):
            value = getattr(options, name)
            if value is not None and (value % stride or value >= frames):
                raise ValueError(
                    f"{name} is {value} frames: use a multiple of {stride} below {frames}, the frames of a window"
                )
        self.given = options.given // stride
        self.overlap = self.window // 2 if options.overlap is None else options.overlap // stride
        self.needs = Needs(past=options.given, size=self.outputs["video"]) if options.given else Needs()
        least = math.prod(self.network.shape[1:]) * (self.window - max(self.given, self.overlap))
        for name, value in (
            ("revise_parts", options.revise_parts if options.revise_rounds else 1),
            ("steps", options.steps if options.strategy == "parts" else 1),
        ):
            if value > least:
                raise ValueError(f"{name} is {value}, but a window has {least} codes to divide: use fewer")

    def with_options(self, options: Any) -> Sampler:
        """See `Sampler.with_options`."""
        other = super().with_options(options)
        assert isinstance(other, MeBTSampler)
        other._check()
        return other

    @torch.no_grad()
    def frames(self, request: Request) -> Iterator[dict[str, Tensor]]:
        """See `Sampler.frames`."""
        assert min(request.starts) >= 0, "a rollout begins at frame 0"
        skip = min(request.starts) // self.stride  # latent frames whose frames nobody asked for
        for chunk in select(self._decoded(request, skip), request.starts, skip * self.stride, request.num_frames):
            yield {"video": chunk}

    def _decoded(self, request: Request, skip: int) -> Iterator[Tensor]:
        """Yield frames (N, 3, T, H, W) from latent frame `skip` on, without end."""
        done = 0
        for before, new in self.windows(request):
            first = max(skip - done, 0)
            done += new.shape[1]
            if first < new.shape[1]:
                codes = torch.cat([before, new], dim=1)
                yield from self.decode(codes, before.shape[1] + first)

    def windows(self, request: Request) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the codes that a window begins with, (N, c, h, w), and those that are new, (N, t, h, w), without end.

        All numbers of window w come from the seeds and w.
        """
        network = self.engine.get()
        codes = self.given_codes(request)
        chunk, number = codes, 0
        while True:
            count = self.given if number == 0 else self.overlap
            before = (
                codes[:, :0] if count == 0 else last_frames(codes, chunk, count, self.options.legacy and number > 0)
            )
            noise = KeyedNoise("mebt", request.seeds, number, network.pos_emb.device)
            chunk = continue_codes(before, self.window, partial(self.complete, network, noise), "")
            yield before, chunk
            codes = torch.cat([codes, chunk], dim=1)[:, -self.window :]
            number += 1

    def given_codes(self, request: Request) -> Tensor:
        """Return the codes of the frames that are continued: (N, c, h, w)."""
        device, num_videos = self.network.pos_emb.device, len(request.seeds)
        if not self.given:
            return torch.zeros(num_videos, 0, *self.network.shape[1:], dtype=torch.int64, device=device)
        past = self.options.given
        video = request.prompt.frames(-past, past, self.size).to(device)
        return self.tokenizer.encode(video).expand(num_videos, -1, -1, -1)

    def complete(self, network: MeBT, noise: KeyedNoise, grid: Grid, label: str) -> Grid:
        """Return a grid with all codes: those at its targets are drafted and revised."""
        options, count = self.options, grid.targets.shape[1]
        cache = None if options.legacy else ContextCache(network, len(grid.codes))
        ask = partial(network.predict, cache=cache)
        way = Published(ask, noise) if options.legacy else Fast(ask, noise)
        start = grid
        if options.bootstrap:
            grid = way.draft(grid, dataclasses.replace(options.first, count=count), f"{label}bootstrap")
        if options.strategy == "parts":
            grid = way.draft_parts(grid, min(options.steps, grid.targets.shape[1]), options.draft.draw, f"{label}draft")
        else:
            grid = way.draft(grid, dataclasses.replace(options.draft, count=count), f"{label}draft")
        if options.revise_rounds:
            start = dataclasses.replace(start, codes=grid.codes)
            grid = way.revise(start, options.revise_parts, options.revision, options.revise_rounds, f"{label}revise")
        return grid

    def decode(self, codes: Tensor, first: int) -> Iterator[Tensor]:
        """Yield the frames from latent frame `first` on of the codes of a window (N, t, h, w), some at a time."""
        stream = getattr(self.tokenizer, "decode_stream", None)
        skip = first * self.stride
        if stream is None or getattr(self.tokenizer, "norm", "") == "group":
            yield self.tokenizer.decode(codes)[:, :, skip:]
            return
        for frames in stream([codes]):
            used = min(skip, frames.shape[2])
            skip -= used
            if used < frames.shape[2]:
                yield frames[:, :, used:]


def select(chunks: Iterable[Tensor], starts: Sequence[int], first: int, num_frames: int | None) -> Iterator[Tensor]:
    """Yield `num_frames` frames of each video from its start on, given chunks (N, 3, T, H, W) from frame `first` on."""
    done, held, offsets = 0, None, [start - first for start in starts]
    for chunk in chunks:
        held = chunk if held is None else torch.cat([held, chunk], dim=2)
        ready = held.shape[2] - max(offsets)
        if ready > 0:
            ready = ready if num_frames is None else min(ready, num_frames - done)
            yield torch.stack([video[:, at : at + ready] for video, at in zip(held, offsets, strict=True)])
            done += ready
            offsets = [at + ready for at in offsets]
            if done == num_frames:
                return
        unused = min(min(offsets), held.shape[2])
        held, offsets = held[:, :, unused:], [at - unused for at in offsets]


def open_sampler(bundles: Sequence[Bundle], options: Mapping[str, Any]) -> Sampler:
    """Return the sampler of a file of MeBT, which holds its tokenizer; see `training.registry.Spec`."""
    if len(bundles) != 1:
        raise ValueError(f"{len(bundles)} files of MeBT were given: a model is one file")
    (bundle,) = bundles
    network, tokenizer = (bundle.networks.get(role) for role in ("prior", "tokenizer"))
    if not isinstance(network, MeBT) or tokenizer is None:
        raise ValueError(
            f"{bundle.path} lacks {'its network' if tokenizer else 'a tokenizer'}: give a file of train.py"
        )
    merged = {**bundle.options.get("sampling", {}), **options}
    return MeBTSampler(network, tokenizer, resolve_options(Sampling, merged, "MeBT"), owned=True)
