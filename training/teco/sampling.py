"""Generate videos that continue a prompt, under actions: one frame after another, each by draft and revision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.contract import Bundle
from training.generation.draft_revise import Draw, Fast, Grid, Query
from training.generation.noise import KeyedNoise, Noise
from training.modules.autoencoder import Autoencoder
from training.modules.inference import Prepared
from training.modules.prior import TOKENIZER
from training.sampling import Needs, Request, Sampler, pieces, resolve_options, sampler_option
from training.teco.inference import prepare
from training.teco.networks import NULL_ACTION, TECO
from training.teco.rollout import Rollout

ROLE = "teco"  # of the network in files


@dataclass(frozen=True)
class Drawing:
    """How videos are continued. Numbers of parts and rounds are those of the release."""

    context: int | None = sampler_option(None, "frames of the prompt that are remembered [default: as trained]", low=1)
    actions: bool = sampler_option(True, "follow the actions; false: they are unknown, as in part of training")
    draft: int = sampler_option(8, "parts of the draft of a frame", low=1)
    revise: int = sampler_option(8, "parts of each revision", low=1)
    rounds: int = sampler_option(2, "revisions", low=0)
    temperature: float = sampler_option(1.0, "below 1: more usual codes", low=0, high=2, live=True)

    def __post_init__(self) -> None:
        for name, low in (("context", 1), ("draft", 1), ("revise", 1), ("rounds", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"option {name} is {value}: use a number from {low} on")
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"option temperature is {self.temperature}: use a number from 0 to 2")


def sample_codes(network: TECO, h: Tensor, noise: Noise, options: Drawing) -> Tensor:
    """Return the codes of a frame for its h (N, E, h, w), by a draft and revisions of it: int64 (N, cells)."""
    predict, unknown = network.prior.begin(h), network.prior.num_codes

    def ask(query: Query) -> Iterator[Tensor]:
        yield predict(query.codes.scatter(1, query.targets, unknown), query.wanted_targets)

    steps, draw = Fast(ask, noise), Draw(temperature=options.temperature)
    cells = network.cells[0] * network.cells[1]
    draft, revise = min(options.draft, cells), min(options.revise, cells)
    grid = steps.draft_parts(Grid.empty(len(h), cells, h.device), draft, draw)
    grid = Grid(grid.codes, grid.contexts[:, :0], Grid.empty(len(h), cells, h.device).targets)
    return steps.revise(grid, revise, draw, options.rounds).codes


class TecoSampler(Sampler):
    """Continues the prompt, whose frames it remembers, under the action into every frame."""

    Options = Drawing
    random_access = False
    block = 8
    live_block = 1
    good_batch = 16

    def __init__(self, network: TECO, tokenizer: Autoencoder, options: Drawing = Drawing()):
        self.network, self.tokenizer, self.options = network, tokenizer, options
        self.networks, self.num_actions = [network, tokenizer], network.action_dim if network.use_actions else None
        self.outputs = {"video": (tokenizer.height, tokenizer.width)}
        self.context = network.context if options.context is None else options.context
        if not network.n_cond <= self.context < network.seq_len:
            raise ValueError(
                f"option context is {self.context}, but this model was trained on {network.seq_len} frames: use a "
                f"number from {network.n_cond} to {network.seq_len - 1}"
            )
        streams = ("actions",) if network.use_actions and options.actions else ()
        self.needs = Needs(past=self.context, size=self.outputs["video"], streams=streams)
        self.prepared = Prepared(lambda: prepare(network), [network])

    def with_options(self, options: Any) -> Sampler:
        """See `Sampler.with_options`."""
        other = TecoSampler(self.network, self.tokenizer, options)
        other.prepared, other.fps, other.vocabularies = self.prepared, self.fps, self.vocabularies
        return other

    @torch.no_grad()
    def frames(self, request: Request) -> Iterator[dict[str, Tensor]]:
        """See `Sampler.frames`."""
        seeds, starts = request.seeds, request.starts
        assert min(starts) >= 0, "a rollout begins at frame 0"
        network, device = self.prepared.get(), self.network.sos_post.device
        given = request.prompt.frames(-self.context, self.context, self.size).to(device)
        if given.shape[2] < self.context:
            raise ValueError(f"the prompt has {given.shape[2]} frames of context, {self.context} are needed")
        codes = self.tokenizer.encode(given).expand(len(seeds), -1, -1, -1)
        rollout = Rollout(network, self.tokenizer, codes, self.actions(request, -self.context, self.context))
        frame, done, held, base = 0, 0, codes[:, :0], 0  # `held` begins with frame `base`
        stop = None if request.num_frames is None else max(starts) + request.num_frames
        for count in pieces(stop, self.block):
            for _ in range(count):
                noise = KeyedNoise("teco", seeds, frame, device)
                action = self.actions(request, frame, 1)[:, 0]
                new = rollout.step(action, lambda h, noise=noise: sample_codes(network, h, noise, self.options))
                held, frame = torch.cat([held, new.unsqueeze(1)], dim=1), frame + 1
            num_ready = frame - max(starts) - done
            if num_ready > 0:
                firsts = [start + done - base for start in starts]
                cut = [video[first : first + num_ready] for video, first in zip(held, firsts, strict=True)]
                yield {"video": self.tokenizer.decode(torch.stack(cut)).float()}
                done += num_ready
            skip = min(max(min(starts) + done - base, 0), held.shape[1])
            held, base = held[:, skip:], base + skip

    def actions(self, request: Request, start: int, count: int) -> Tensor:
        """Return the actions into frames of the prompt: int64 (N, count), -1 where they are unknown."""
        device, shape = self.network.sos_post.device, (len(request.seeds), count)
        if not self.needs.streams:
            return torch.full(shape, NULL_ACTION, device=device)
        values = request.prompt.stream("actions", start, count)
        check_actions(values, self.network.action_dim)
        return values.to(device).expand(shape)


def check_actions(values: Tensor, num_actions: int) -> None:
    """Raise `ValueError` for values of a stream that are no actions of a network."""
    if values.is_floating_point():
        raise ValueError(
            f"actions are vectors of {values.shape[-1]} numbers, but TECO takes whole numbers: give a dataset with "
            "discrete actions"
        )
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < num_actions:
        wrong = int(values.max()) if int(values.max()) >= num_actions else int(values.min())
        raise ValueError(f"there is an action {wrong}, but the model has actions 0 to {num_actions - 1} (--action-dim)")


def open_sampler(bundles: Sequence[Bundle], options: Mapping[str, Any]) -> Sampler:
    """Return the sampler of a file that holds TECO and its tokenizer; see `training.registry.Spec`."""
    if len(bundles) != 1:
        raise ValueError(f"{len(bundles)} files of TECO were given: one holds all that is needed")
    networks: dict[str, Any] = dict(bundles[0].networks)
    if TOKENIZER not in networks:
        raise ValueError(f"{bundles[0].path} holds no tokenizer: give a file that training has exported")
    return TecoSampler(networks[ROLE], networks[TOKENIZER], resolve_options(Drawing, options, "TECO"))
