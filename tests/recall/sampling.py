"""Rollouts: token grids in sequence, each sampled by random numbers of its seed and frame alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.recall.networks import PAST, Blocks, Predictor
from training.contract import Bundle
from training.random import random_state
from training.sampling import Needs, Request, Sampler, pieces, resolve_options, sampler_option


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn."""

    temperature: float = sampler_option(1.0, "below 1: more usual tokens", low=0.1, high=2, live=True)

    def __post_init__(self) -> None:
        if not 0.1 <= self.temperature <= 2:
            raise ValueError(f"temperature is {self.temperature}: use a number from 0.1 to 2")


class RecallSampler(Sampler):
    """Continues the prompt, which gives 36 frames and the action into every frame."""

    Options = Drawing
    random_access = False
    block = 8

    def __init__(self, network: Predictor, tokenizer: Blocks, options: Drawing = Drawing()):
        self.network, self.tokenizer, self.options = network, tokenizer, options
        self.networks, self.num_actions = [network, tokenizer], network.num_actions
        self.outputs = {"video": (tokenizer.height, tokenizer.width)}
        self.needs = Needs(past=PAST, size=self.outputs["video"], streams=("actions",))

    @torch.no_grad()
    def frames(self, request: Request) -> Iterator[dict[str, Tensor]]:
        """See `Sampler.frames`."""
        seeds, starts, size = request.seeds, request.starts, self.size
        assert min(starts) >= 0, "a rollout begins at frame 0"
        device = self.tokenizer.colours.device
        given = request.prompt.frames(-PAST, PAST, size).to(device)
        codes = self.tokenizer.encode(given).expand(len(seeds), -1, -1, -1)
        actions = request.prompt.stream("actions", -PAST, PAST).to(device).expand(len(seeds), -1)
        frame, done, held, base = 0, 0, codes[:, :0], 0  # `held` begins with frame `base`
        stop = None if request.num_frames is None else max(starts) + request.num_frames
        for count in pieces(stop, self.block):
            for _ in range(count):
                new = request.prompt.stream("actions", frame, 1).to(device).expand(len(seeds), -1)
                actions = torch.cat([actions, new], dim=1)[:, -PAST - 1 :]
                codes = torch.cat([codes, self.draw(codes, actions, seeds, frame)], dim=1)
                held, codes, frame = torch.cat([held, codes[:, -1:]], dim=1), codes[:, -PAST:], frame + 1
            num_ready = frame - max(starts) - done
            if num_ready > 0:
                firsts = [start + done - base for start in starts]
                cut = [video[first : first + num_ready] for video, first in zip(held, firsts, strict=True)]
                yield {"video": self.tokenizer.decode(torch.stack(cut))}
                done += num_ready
            skip = min(max(min(starts) + done - base, 0), held.shape[1])
            held, base = held[:, skip:], base + skip

    def draw(self, codes: Tensor, actions: Tensor, seeds: Sequence[int], frame: int) -> Tensor:
        """Return the grid (N, 1, h, w) after 36 others (N, 36, h, w), for actions (N, 37)."""
        logits = self.network(torch.cat([codes, codes[:, :1]], dim=1), actions)[:, 0] / self.options.temperature
        draws = [random_state("recall", seed, frame).random_sample(logits.shape[1:3]) for seed in seeds]
        uniform = torch.from_numpy(np.array(draws, np.float32)).to(logits).unsqueeze(-1)
        token = (logits.softmax(-1).cumsum(-1) < uniform).sum(-1).clamp(max=self.network.vocabulary - 1)
        return token.unsqueeze(1)


class Reconstruction(Sampler):
    """What the tokenizer makes of the prompt's frames."""

    block = 8

    def __init__(self, tokenizer: Blocks):
        self.tokenizer, self.networks = tokenizer, [tokenizer]
        self.outputs = {"video": (tokenizer.height, tokenizer.width)}
        self.needs = Needs(size=self.outputs["video"], follows=True)

    @torch.no_grad()
    def frames(self, request: Request) -> Iterator[dict[str, Tensor]]:
        """See `Sampler.frames`."""
        done = 0
        for count in pieces(request.num_frames, self.block):
            video = request.prompt.frames([start + done for start in request.starts], count, self.size)
            if video.shape[2]:
                video = self.tokenizer.decode(self.tokenizer.encode(video.to(self.tokenizer.colours)))
                yield {"video": video.expand(len(request.seeds), -1, -1, -1, -1)}
            done += video.shape[2]
            if video.shape[2] < count:
                return


def open_sampler(bundles: Sequence[Bundle], options: Mapping[str, Any]) -> Sampler:
    """Return the sampler of a predictor with its tokenizer, or of the tokenizer alone."""
    (bundle,) = bundles
    networks: dict[type, Any] = {type(network): network for network in bundle.networks.values()}
    if Predictor not in networks:
        resolve_options(Reconstruction.Options, options, "a tokenizer")
        return Reconstruction(networks[Blocks])
    drawing = resolve_options(Drawing, options, "Recall")
    return RecallSampler(networks[Predictor], networks[Blocks], drawing)
