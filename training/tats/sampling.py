"""Generate videos: a sliding window of latent frames, or key frames by one network and those between by another.

Ge et al., ECCV 2022, section 3.2 and the release. Networks here are copies from `TATSTransformer.for_sampling`; tokens
are numbers of their logits, and codes those of the tokenizer.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_utils.precision import HALF_FORMATS
from training.contract import Bundle, Size
from training.generation import rollout
from training.generation.token_sampling import Draw, draw_sequence, uniform_numbers
from training.network_file import content_hash
from training.random import random_state
from training.sampling import Needs, Prompt, Request, Sampler, resolve_options, sampler_option
from training.tats.networks import SEGMENT, TATSTransformer, infill_mask
from training.tats.options import LABEL, NONE, TEXT
from training.tats.text import BytePairs, read_merges

# ----------------------------------------------------------------------------
# The samplers, without files and requests.


class Writer:
    """A network that writes codes after a condition (N, condition_length): see `rollout.TokenModel`."""

    def __init__(self, network: TATSTransformer, condition: Tensor, rows: Tensor | None = None):
        self.network, self.condition, self.rows = network, condition, rows
        self.cache = network.cache(len(condition), network.block_size)

    def begin(self, context: Tensor) -> Tensor:
        """See `rollout.TokenModel.begin`."""
        self.cache.truncate(0)
        ids = torch.cat([self.condition, context.to(self.condition.device) + self.network.first_output], dim=1)
        return self.network.feed(ids, slice(0, ids.shape[1]), self.cache, self.rows, causal=True)

    def advance(self, tokens: Tensor) -> Tensor:
        """See `rollout.TokenModel.advance`."""
        place, ids = self.cache.length, tokens.unsqueeze(1) + self.network.first_output
        return self.network.feed(ids, slice(place, place + 1), self.cache, self.rows)


def to_codes(network: TATSTransformer, tokens: Tensor) -> Tensor:
    """Return the codes of tokens; a condition id, which only the released samplers draw, becomes code 0."""
    return (tokens + (network.first_output - network.conditions)).clamp(min=0)


def to_tokens(network: TATSTransformer, codes: Tensor) -> Tensor:
    """Return the tokens of codes."""
    return codes - (network.first_output - network.conditions)


def fill(
    network: TATSTransformer, condition: Tensor, first: Tensor, last: Tensor, uniforms: Tensor, draw: Draw
) -> Tensor:
    """Draw the codes between key frames: int64 (N, n) each, uniform numbers (N, 3n) -> (N, 3n).

    Their logits are those of training: the condition, the first frame and the last without its last code see each
    other, and what is between sees all of them and its own past.
    """
    n, size, offset = first.shape[1], network.block_size, network.conditions
    ids = torch.cat([condition, first + offset, last[:, :-1] + offset], dim=1)
    places = torch.cat([torch.arange(n + 1), torch.arange(size - n + 1, size)]).to(ids.device)
    cache = network.cache(len(ids), size)
    logits = network.feed(ids, places, cache, at=n)
    return _draw_between(network, cache, logits, n, uniforms, draw)


def fill_legacy(
    network: TATSTransformer, condition: Tensor, first: Tensor, last: Tensor, uniforms: Tensor, draw: Draw
) -> Tensor:
    """Draw the codes between key frames as the released sampler does, with its faults; see `fill`.

    The last frame is whole and one place too early, sees the first and its own past, and the first code is drawn from
    the logits after it.
    """
    n, size, offset = first.shape[1], network.block_size, network.conditions
    ids = torch.cat([condition, first + offset, last + offset], dim=1)
    places = torch.cat([torch.arange(n + 1), torch.arange(size - n, size)]).to(ids.device)
    mask = infill_mask(size, n)[: 2 * n + 1, : 2 * n + 1].to(ids.device)
    cache = network.cache(len(ids), size + n)
    logits = network.feed(ids, places, cache, mask=mask)
    return _draw_between(network, cache, logits, n, uniforms, draw)


def _draw_between(network: TATSTransformer, cache: Any, logits: Tensor, n: int, uniforms: Tensor, draw: Draw) -> Tensor:
    places = itertools.count(n + 1)

    def advance(tokens: Tensor) -> Tensor:
        place = next(places)
        return network.feed(tokens.unsqueeze(1) + network.first_output, slice(place, place + 1), cache)

    return to_codes(network, draw_sequence(logits, advance, uniforms, draw))


def draw_in_windows(
    network: TATSTransformer,
    condition: Tensor,
    size: tuple[int | None, int, int],
    window: tuple[int, int, int],
    memory: int,
    uniforms: Callable[[int], Tensor],
    draw: Draw,
) -> Iterator[Tensor]:
    """Yield latent frames (N, h, w) of codes larger than the network was trained on, in time and space.

    Every code is drawn in a window (frames, rows, columns) of the size trained on, around it as far as the edges allow.
    `size` is that of the video, whose frames may be None: without end. `uniforms` gives the numbers (N, h * w) of a
    frame. Section "Long" of the release's sampler in time and space; a whole forward pass for each code.
    """
    frames, height, width = size
    span, rows, columns = window
    batch, device = len(condition), condition.device
    held = torch.zeros(batch, span, height, width, dtype=torch.int64, device=device)  # tokens, `base` first
    base = 0
    for t in range(frames) if frames is not None else itertools.count():
        if t >= base + span:
            held, base = torch.cat([held[:, 1:], torch.zeros_like(held[:, :1])], dim=1), base + 1
        local_t = _place(t, frames, span, memory)
        numbers = uniforms(t).to(device)
        for i, j in itertools.product(range(height), range(width)):
            local_i, local_j = _place(i, height, rows, rows // 2), _place(j, width, columns, columns // 2)
            r, c = i - local_i, j - local_j
            part = _window(held, t - local_t - base, span)[:, :, r : r + rows, c : c + columns].flatten(1)
            ids = torch.cat([condition, part[:, :-1] + network.first_output], dim=1)
            place = (local_t * rows + local_i) * columns + local_j
            table = network.table_rows([r, r + rows, c, c + columns])
            logits = network(ids, table)[:, len(condition[0]) - 1 + place]
            held[:, t - base, i, j] = draw(logits, numbers[:, i * width + j])
        yield to_codes(network, held[:, t - base])


def _place(index: int, size: int | None, window: int, middle: int) -> int:
    """Return the place of an index in its window: `middle`, or where the window ends at an edge."""
    if index <= middle:
        return index
    left = window if size is None else size - index
    return window - left if left <= window - middle and size is not None else middle


def _window(held: Tensor, first: int, span: int) -> Tensor:
    """Return `span` frames of tokens from `first` on; frames that are not there yet are zeros."""
    part = held[:, first : first + span]
    missing = span - part.shape[1]
    return torch.cat([part, torch.zeros_like(held[:, :missing])], dim=1) if missing else part


# ----------------------------------------------------------------------------
# What is generated from.


@dataclass(frozen=True)
class Facts:
    """What a file says about its network besides sizes.

    `condition` is what videos are given, and `every` the number of latent frames from one that it writes to the next.
    `texts` are descriptions of training, and `merges` the lines of the list of merges, of a model that takes text.
    """

    condition: str = "none"
    every: int = 1
    texts: Sequence[str] = ()
    merges: str = ""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Facts:
        """Return what the options of a file say."""
        return cls(**{item.name: options[item.name] for item in fields(cls) if item.name in options})


@dataclass(frozen=True)
class Writing:
    """How videos are written."""

    memory: int | None = sampler_option(None, "latent frames that are seen of the past; default: all that fit")
    top_k: int = sampler_option(2048, "draw among this many codes; 0: all", low=1, high=4096, live=True)
    top_p: float = sampler_option(0.92, "draw among codes of this probability in all", low=0.05, high=1, live=True)
    temperature: float = sampler_option(1.0, "below 1: more usual codes; 0: the most usual", low=0, high=2, live=True)
    first_top_k: int | None = sampler_option(None, "top_k of the first latent frames, as many as are seen of the past")
    first_top_p: float | None = sampler_option(None, "top_p of these")
    length: int | None = sampler_option(None, "frames with which videos end; default: they go on")
    size: Size | None = sampler_option(
        None, "frame size other than that of training, such as 128x192", parse=lambda text: parse_size(text)
    )
    merges: str | None = sampler_option(
        None, "text: file of CLIP's list of merges; default: that of the model, or cached"
    )
    group: int = sampler_option(4, "in-filling: segments between key frames that are filled together")
    legacy: bool = sampler_option(False, "draw as the released samplers do, with the faults that the README lists")

    def __post_init__(self) -> None:
        for is_first in (False, True):
            self.draw(is_first)
        for name, least in (("memory", 1), ("length", 1), ("group", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}: use a number from {least} on")

    def draw(self, is_first: bool) -> Draw:
        """Return how codes are drawn, of the first latent frames or of later ones."""
        top_k, top_p = self.top_k, self.top_p
        if is_first:
            top_k = top_k if self.first_top_k is None else self.first_top_k
            top_p = top_p if self.first_top_p is None else self.first_top_p
        return Draw(top_k, top_p, self.temperature)


def parse_size(text: Any) -> Size:
    """Parse "128x192" as height and width."""
    parts = text.split("x") if isinstance(text, str) else [str(part) for part in text]
    if len(parts) != 2 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"size is {text!r}: use HEIGHTxWIDTH, such as 128x192")
    return int(parts[0]), int(parts[1])


@dataclass
class Copies:
    """Copies of a network for sampling, made when first asked for and again when its weights or precision change."""

    network: TATSTransformer
    made: dict[bool, tuple[Any, TATSTransformer]] = field(default_factory=dict)

    def get(self, only_codes: bool) -> TATSTransformer:
        """Return the copy with or without logits of the condition."""
        network = self.network
        dtype = HALF_FORMATS[network.half] if network.half else network.pos_emb.dtype
        state = dtype, network.pos_emb.device, tuple(parameter._version for parameter in network.parameters())
        if only_codes not in self.made or self.made[only_codes][0] != state:
            self.made[only_codes] = state, network.for_sampling(dtype, only_codes)
        return self.made[only_codes][1]


def check_fit(network: TATSTransformer, tokenizer: Any, what: str) -> int:
    """Return the number of codes of a latent frame; raises `ValueError` if network and tokenizer do not fit."""
    if network.num_codes != tokenizer.vocabulary:
        raise ValueError(
            f"the {what} knows {network.num_codes} codes, but the tokenizer has {tokenizer.vocabulary}: give the "
            "tokenizer that it was trained with"
        )
    edge = tokenizer.stride[1]
    return (tokenizer.height // edge) * (tokenizer.width // edge)


class Conditioned(Sampler):
    """What both samplers share: a condition for each video."""

    network: TATSTransformer
    facts: Facts
    options: Writing

    def set_condition(self, network: TATSTransformer, facts: Facts) -> None:
        """Set what is said about conditions."""
        self.network, self.facts = network, facts
        self.num_labels = network.conditions if facts.condition == LABEL else 0
        self.takes_text = facts.condition == TEXT

    def condition_ids(self, seeds: Sequence[int], prompt: Prompt) -> Tensor:
        """Return the ids of the condition of each video: int64 (N, condition_length).

        Without a label or a text it is drawn from the seed, among the classes or descriptions of training. Raises
        `ValueError` if there are none.
        """

        def draw(count: int) -> list[int]:
            return [random_state("tats-condition", seed, 0).randint(count) for seed in seeds]

        if self.facts.condition == LABEL:
            labels = draw(self.num_labels) if prompt.label is None else [prompt.label] * len(seeds)
            ids = torch.tensor(labels).unsqueeze(1)
        elif self.facts.condition == TEXT:
            known = list(self.facts.texts)
            if prompt.text is None and not known:
                raise ValueError("this model is given a description of each video: give --text")
            texts = [known[i] for i in draw(len(known))] if prompt.text is None else [prompt.text] * len(seeds)
            pairs = byte_pairs(self.facts.merges, self.options.merges)
            ids = torch.from_numpy(np.stack([pairs.ids_of(text, self.network.condition_length) for text in texts]))
        else:
            ids = torch.zeros(len(seeds), 1, dtype=torch.int64)
        return ids.to(self.network.pos_emb.device)


@functools.lru_cache(maxsize=2)
def byte_pairs(merges: str, path: str | None = None) -> BytePairs:
    """Return the encoding of the merges in a file of a model, else at a path or in the cache."""
    return BytePairs(merges.split("\n") if merges and path is None else read_merges(path))


class Filler:
    """The network that fills in between key frames, with a condition of each video (N, 1).

    `firsts` are the numbers of the segments at which the videos begin.
    """

    def __init__(
        self, network: TATSTransformer, condition: Tensor, seeds: Sequence[int], options: Writing,
        firsts: Sequence[int] = (),
    ):  # fmt: skip
        self.network, self.condition, self.options = network, condition, options
        self.videos = list(zip(seeds, firsts or [0] * len(seeds), strict=True))

    def __call__(self, before: Tensor, after: Tensor, segments: Sequence[int]) -> Tensor:
        """See `rollout.filled`: key frames (S, N, n) each -> (S, N, 3, n)."""
        num_segments, _, n = before.shape
        count = (SEGMENT - 2) * n
        numbers = [
            uniform_numbers("tats-between", [seed], first + segment, count)
            for segment in segments
            for seed, first in self.videos
        ]
        uniforms = torch.cat(numbers).to(before.device)
        condition = self.condition.repeat(num_segments, 1)
        function = fill_legacy if self.options.legacy else fill
        drawn = function(
            self.network, condition, before.flatten(0, 1), after.flatten(0, 1), uniforms, self.options.draw(False)
        )
        return drawn.view(num_segments, -1, SEGMENT - 2, n)


class LongVideos(Conditioned):
    """Videos written latent frame by latent frame, or key frames first, if there is a network to fill in between."""

    Options = Writing
    random_access = False

    def __init__(
        self, network: TATSTransformer, tokenizer: Any, facts: Facts,
        filler: tuple[TATSTransformer, Facts] | None = None, options: Writing = Writing(),
    ):  # fmt: skip
        self.set_condition(network, facts)
        self.tokenizer, self.filler, self.options = tokenizer, filler, options
        self.latent_codes = check_fit(network, tokenizer, "transformer")
        self.networks = [network, tokenizer, *([filler[0]] if filler else [])]
        self.copies, self.filler_copies = Copies(network), Copies(filler[0]) if filler else None
        self._check_filler()
        self.memory = self._memory()
        self._set_size()
        self.block = tokenizer.stride[0] * (facts.every if filler else 1)
        self.default_frames = options.length
        if options.length is not None and options.length % tokenizer.stride[0]:
            raise ValueError(f"length is {options.length}: use a multiple of {tokenizer.stride[0]} frames")

    def _check_filler(self) -> None:
        """Raise `ValueError` unless the filler fits the network whose key frames it takes."""
        if self.filler is None:
            return
        network, facts = self.filler
        check_fit(network, self.tokenizer, "in-filling transformer")
        if self.facts.every != SEGMENT - 1:
            raise ValueError(
                f"the first transformer writes every {self.facts.every} latent frames, but between key frames there "
                f"are {SEGMENT - 2}: give one that was trained with --every={SEGMENT - 1}"
            )
        if facts.condition != self.facts.condition or network.conditions != self.network.conditions:
            pair = [
                f"{item.condition} with {net.conditions} ids" for net, item in ((self.network, self.facts), self.filler)
            ]
            raise ValueError(
                f"the conditions of the two transformers are {pair[0]} and {pair[1]}: give two that were trained alike"
            )

    def _memory(self) -> int:
        """Return the latent frames that are seen of the past; raises `ValueError` for more than fit."""
        n, network = self.latent_codes, self.network
        most = (network.block_size - network.condition_length + 1) // n - 1
        if most < 0:
            raise ValueError(
                f"the transformer takes {network.block_size} ids, but a condition of {network.condition_length} and a "
                f"latent frame of {n} codes are needed: give one with a larger block size"
            )
        memory = self.options.memory
        if memory is not None and memory > most:
            raise ValueError(
                f"memory is {memory}, but the transformer takes {network.block_size} ids, which are {most} latent "
                f"frames of {n} codes and a new one: use {most} or less"
            )
        return most if memory is None else memory

    def _set_size(self) -> None:
        """Set the output's size; raises `ValueError` for one that cannot be."""
        self.grid_edge = self.tokenizer.stride[1]
        size, trained = self.options.size, (self.tokenizer.height, self.tokenizer.width)
        self.is_larger = size is not None and size != trained
        if size is not None and self.is_larger:
            if any(a % self.grid_edge or a < b for a, b in zip(size, trained, strict=True)):
                raise ValueError(
                    f"size is {size[0]}x{size[1]}: use multiples of {self.grid_edge}, from {trained[0]}x{trained[1]} on"
                )
            if self.network.options["table"] is not None:
                raise ValueError("the table of positions of this model ends at the size of training: leave out size")
            if self.filler is not None:
                raise ValueError("size and key frames do not go together: leave out size, or the second model")
        self.outputs = {"video": size or trained}

    def with_options(self, options: Any) -> LongVideos:
        """See `Sampler.with_options`."""
        other = LongVideos(self.network, self.tokenizer, self.facts, self.filler, options)
        other.copies, other.filler_copies = self.copies, self.filler_copies
        other.fps, other.vocabularies = self.fps, self.vocabularies
        return other

    @torch.no_grad()
    def frames(self, request: Request) -> Iterator[dict[str, Tensor]]:
        """See `Sampler.frames`."""
        starts, num_frames, length = request.starts, request.num_frames, self.options.length
        assert min(starts) >= 0, "videos begin with frame 0"
        if length is not None:
            num_frames = length - max(starts) if num_frames is None else num_frames
            if max(starts) + num_frames > length or num_frames <= 0:
                raise ValueError(
                    f"frames {max(starts)} to {max(starts) + num_frames - 1} were asked for, but videos end after "
                    f"{length} frames: ask for fewer, or raise the option length"
                )
        end = None if length is None else length // self.tokenizer.stride[0]
        count = rollout.needed_latents(self.tokenizer, starts, num_frames, end)
        latents = self.latents(request.seeds, request.prompt, count)
        for video in rollout.decoded(self.tokenizer, latents, starts, num_frames, end):
            yield {"video": video}

    def latents(self, seeds: Sequence[int], prompt: Prompt, count: int | None = None) -> Iterator[Tensor]:
        """Yield at least `count` latent frames of each video, None: without end; int64 (N, 1, h, w)."""
        condition = self.condition_ids(seeds, prompt)
        height, width = (edge // self.grid_edge for edge in self.size)
        made = self._in_windows(seeds, condition) if self.is_larger else self._in_time(seeds, condition, count)
        for codes in made:
            yield codes.view(len(seeds), 1, height, width)

    def _in_time(self, seeds: Sequence[int], condition: Tensor, count: int | None) -> Iterable[Tensor]:
        """Return latent frames (N, n), written in a sliding window, and filled in if there is a filler."""
        options, network = self.options, self.copies.get(not self.options.legacy)
        rows = network.table_rows()
        made = rollout.sliding_window(
            Writer(network, condition, rows),
            lambda frame: uniform_numbers("tats-codes", seeds, frame, self.latent_codes),
            lambda frame: options.draw(frame < max(self.memory, 1)),
            self.memory,
        )
        codes = (to_codes(network, tokens) for tokens in made)
        if self.filler_copies is None or self.filler is None:
            return codes
        given = torch.zeros_like(condition[:, :1]) if self.filler[1].condition == NONE else condition
        filler = Filler(self.filler_copies.get(True), given, seeds, options)
        num_keys = None if count is None else -(-(count - 1) // self.facts.every) + 1
        return rollout.filled(itertools.islice(codes, num_keys), filler, options.group)

    def _in_windows(self, seeds: Sequence[int], condition: Tensor) -> Iterator[Tensor]:
        """Return latent frames (N, h, w) without end that are larger than those of training."""
        edge, network = self.grid_edge, self.copies.get(not self.options.legacy)
        height, width = (size // edge for size in self.size)
        span = (network.block_size - network.condition_length + 1) // self.latent_codes
        window = span, self.tokenizer.height // edge, self.tokenizer.width // edge
        return draw_in_windows(
            network, condition, (None, height, width), window, self.memory,
            lambda frame: uniform_numbers("tats-codes", seeds, frame, height * width), self.options.draw(False),
        )  # fmt: skip


class Between(Conditioned):
    """The prompt's key frames and what the network writes between them, for previews of in-filling.

    Key frames are the first latent frame of each clip of four, as encoded by the tokenizer; after the end of the prompt
    its last frame is repeated.
    """

    Options = Writing

    def __init__(self, network: TATSTransformer, tokenizer: Any, facts: Facts, options: Writing = Writing()):
        self.set_condition(network, facts)
        self.tokenizer, self.options, self.networks = tokenizer, options, [network, tokenizer]
        self.latent_codes, self.copies = check_fit(network, tokenizer, "transformer"), Copies(network)
        self.outputs = {"video": (tokenizer.height, tokenizer.width)}
        self.segment = (SEGMENT - 1) * tokenizer.stride[0]  # frames
        self.needs = Needs(size=self.outputs["video"], follows=True)
        self.block = self.segment * options.group

    @torch.no_grad()
    def frames(self, request: Request) -> Iterator[dict[str, Tensor]]:
        """See `Sampler.frames`."""
        before = rollout.margins(self.tokenizer)[0]
        margin = -(-before // (SEGMENT - 1))
        firsts = [max(start // self.segment - margin, 0) for start in request.starts]
        offsets = [start - first * self.segment for start, first in zip(request.starts, firsts, strict=True)]
        condition = self.condition_ids(request.seeds, request.prompt)
        filler = Filler(self.copies.get(True), condition, request.seeds, self.options, firsts)
        ends: list[int] = []
        keys = self._keys(request, [first * self.segment for first in firsts], ends)
        height, width = (size // self.tokenizer.stride[1] for size in self.size)
        latents = (codes.view(-1, 1, height, width) for codes in rollout.filled(keys, filler, self.options.group))
        done = 0
        for video in rollout.decoded(self.tokenizer, latents, offsets, request.num_frames):
            count = min(video.shape[2], ends[0] - max(offsets) - done) if ends else video.shape[2]
            if count > 0:
                yield {"video": video[:, :, :count]}
            done += video.shape[2]

    def _keys(self, request: Request, starts: Sequence[int], ends: list[int]) -> Iterator[Tensor]:
        """Yield the key frames of the prompt from `starts` on, int64 (N, n); append its length to `ends`."""
        length, last = self.tokenizer.clip_frames, None
        count = max(self.segment, length)
        for number in itertools.count():
            at = number * self.segment
            clip = request.prompt.frames([start + at for start in starts], count, self.size)
            clip = clip.to(self.network.pos_emb.device).expand(len(starts), -1, -1, -1, -1)
            found = clip.shape[2]
            last = clip[:, :, -1:] if found else last
            if last is None:
                raise ValueError(f"the context has no frames at {max(request.starts)} or later: use a smaller --start")
            if found <= self.segment and found < count:
                ends.append(at + found)
            yield self._encode(torch.cat([clip, last.expand(-1, -1, length, -1, -1)], dim=2)[:, :, :length])
            if ends and found:
                yield self._encode(last.expand(-1, -1, length, -1, -1))
            if ends:
                return

    def _encode(self, clip: Tensor) -> Tensor:
        """Return the codes of the first latent frame of a clip: int64 (N, n)."""
        return self.tokenizer.encode(clip)[:, 0].flatten(1)


def open_sampler(bundles: Sequence[Bundle], options: Mapping[str, Any]) -> Sampler:
    """Return the sampler of one file or, for key frames and what is between them, two; see `training.registry.Spec`."""
    writing = resolve_options(Writing, options, "TATS")
    writers, fillers = [], []
    for bundle in bundles:
        networks = list(bundle.networks.values())
        network = next((item for item in networks if isinstance(item, TATSTransformer)), None)
        assert network is not None, bundle.system
        others = [item for item in networks if item is not network]
        if not others:
            raise ValueError(
                f"{bundle.path} holds no tokenizer, as it was trained on stored codes: nothing can be shown"
            )
        found = network, others[0], Facts.of(bundle.options)
        (fillers if network.unmasked else writers).append(found)
    if len(writers) > 1 or len(fillers) > 1:
        kind = "write key frames or videos" if len(writers) > 1 else "fill in between key frames"
        raise ValueError(f"{len(bundles)} files {kind}: give one of them, or one of each kind")
    if writers and fillers:
        first, second = (content_hash(found[0][1]) for found in (writers, fillers))
        if first != second:
            raise ValueError(
                f"the two files have different tokenizers (SHA-256 {first[:12]}... and {second[:12]}...): give two "
                "transformers that were trained on the same codes"
            )
    if not writers:
        network, tokenizer, facts = fillers[0]
        return Between(network, tokenizer, facts, writing)
    network, tokenizer, facts = writers[0]
    filler = (fillers[0][0], fillers[0][2]) if fillers else None
    return LongVideos(network, tokenizer, facts, filler, writing)
