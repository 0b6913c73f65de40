"""Generate videos: a sliding window of latent frames, or key frames by one network and those between by another.

Ge et al., ECCV 2022, section 3.2 and the release. The functions that draw are in `training.tats.drawing`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_utils.precision import HALF_FORMATS
from training.contract import Bundle, Size
from training.generation import rollout
from training.generation.token_sampling import Draw, uniform_numbers
from training.network_file import content_hash
from training.sampling import Needs, Prompt, Request, Sampler, pieces, resolve_options, sampler_option
from training.tats.conditions import Conditioned, codes_of_frame
from training.tats.conditions import Facts as Facts
from training.tats.drawing import Writer, draw_in_windows, fill, fill_legacy, to_codes
from training.tats.networks import SEGMENT, TATSTransformer
from training.tats.options import AUDIO, NONE

AUDIO_TOKENIZER = "audio_tokenizer"  # role of the tokenizer of sound in a file


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
    return codes_of_frame(tokenizer)


class Filler:
    """The network that fills in between key frames, with a condition of each video (N, 1)."""

    def __init__(self, network: TATSTransformer, condition: Tensor, seeds: Sequence[int], options: Writing):
        self.network, self.condition, self.seeds, self.options = network, condition, seeds, options

    def __call__(self, before: Tensor, after: Tensor, segments: Sequence[int]) -> Tensor:
        """See `rollout.filled`: key frames (S, N, n) each -> (S, N, 3, n)."""
        rows = [(seed, segment) for segment in segments for seed in self.seeds]
        condition = self.condition.repeat(len(segments), 1)
        found = self.fill(before.flatten(0, 1), after.flatten(0, 1), rows, condition)
        return found.unflatten(0, (len(segments), -1))

    def fill(self, before: Tensor, after: Tensor, rows: Sequence[tuple[int, int]], condition: Tensor) -> Tensor:
        """Return the codes between key frames (R, n), of which a row is a segment of a seed: (R, 3, n)."""
        n = before.shape[1]
        numbers = [uniform_numbers("tats-between", [seed], segment, (SEGMENT - 2) * n) for seed, segment in rows]
        function = fill_legacy if self.options.legacy else fill
        uniforms = torch.cat(numbers).to(before.device)
        drawn = function(self.network, condition, before, after, uniforms, self.options.draw(False))
        return drawn.unflatten(1, (SEGMENT - 2, n))


class LongVideos(Conditioned):
    """Videos written latent frame by latent frame, or key frames first, if there is a network to fill in between."""

    Options = Writing
    random_access = False
    good_batch = 16

    def __init__(
        self, network: TATSTransformer, tokenizer: Any, facts: Facts,
        filler: tuple[TATSTransformer, Facts] | None = None, options: Writing = Writing(), sound: Any = None,
    ):  # fmt: skip
        self.set_condition(network, facts, tokenizer, sound)
        self.tokenizer, self.filler, self.options = tokenizer, filler, options
        self.latent_codes = check_fit(network, tokenizer, "transformer")
        self.networks = [network, tokenizer, *([filler[0]] if filler else []), *([sound] if self.sound else [])]
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
        if self.sound is not None:
            most = min(most, (self.sound.span - self.tokenizer.stride[0]) // self.step)
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
            if self.sound is not None:
                raise ValueError("size and sound do not go together: leave out size")
            if self.filler is not None:
                raise ValueError("size and key frames do not go together: leave out size, or the second model")
        self.outputs = {"video": size or trained}

    def with_options(self, options: Any) -> LongVideos:
        """See `Sampler.with_options`."""
        sound = self.sound and self.sound.tokenizer
        other = LongVideos(self.network, self.tokenizer, self.facts, self.filler, options, sound)
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
        if self.sound is not None and num_frames is not None:  # raises if the sound is shorter
            request.prompt.stream(AUDIO, [start + num_frames - 1 for start in starts], 1)
        end = None if length is None else length // self.tokenizer.stride[0]
        count = rollout.needed_latents(self.tokenizer, starts, num_frames, end)
        latents = self.latents(request.seeds, request.prompt, count)
        for video in rollout.decoded(self.tokenizer, latents, starts, num_frames, end):
            yield {"video": video}

    def latents(self, seeds: Sequence[int], prompt: Prompt, count: int | None = None) -> Iterator[Tensor]:
        """Yield at least `count` latent frames of each video, None: without end; int64 (N, 1, h, w)."""
        conditions = self.conditions(seeds, prompt)
        height, width = (edge // self.grid_edge for edge in self.size)
        if self.is_larger:
            made = self._in_windows(seeds, next(conditions))
        else:
            made = self._in_time(seeds, next(conditions), conditions, count)
        for codes in made:
            yield codes.view(len(seeds), 1, height, width)

    def _in_time(
        self, seeds: Sequence[int], condition: Tensor, later: Iterator[Tensor], count: int | None
    ) -> Iterable[Tensor]:
        """Return latent frames (N, n), written in a sliding window, and filled in if there is a filler.

        `later` are the conditions of the windows after the first.
        """
        options, network = self.options, self.copies.get(not self.options.legacy)
        rows = network.table_rows()
        made = rollout.sliding_window(
            Writer(network, condition, rows, later),
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

    Each segment is alone: the five latent frames from one key frame to the next are encoded together, those between are
    written anew, and all five are decoded. After the end of the prompt its last frame is repeated.
    """

    Options = Writing

    def __init__(self, network: TATSTransformer, tokenizer: Any, facts: Facts, options: Writing = Writing()):
        self.set_condition(network, facts, tokenizer)
        self.tokenizer, self.options, self.networks = tokenizer, options, [network, tokenizer]
        self.latent_codes, self.copies = check_fit(network, tokenizer, "transformer"), Copies(network)
        self.outputs = {"video": (tokenizer.height, tokenizer.width)}
        step = tokenizer.stride[0]
        self.segment, self.span = (SEGMENT - 1) * step, SEGMENT * step  # frames, without and with the next key frame
        self.needs = Needs(future=self.span - 1, size=self.outputs["video"], follows=True)
        self.block = self.segment * options.group

    @torch.no_grad()
    def frames(self, request: Request) -> Iterator[dict[str, Tensor]]:
        """See `Sampler.frames`."""
        condition, done = self.condition_ids(request.seeds, request.prompt), 0
        for count in pieces(request.num_frames, self.block):
            firsts = [start + done for start in request.starts]
            numbers = [first // self.segment for first in firsts]
            offsets = [first - number * self.segment for first, number in zip(firsts, numbers, strict=True)]
            length = -(-(max(offsets) + count) // self.segment) * self.segment + self.span - self.segment
            bases = [number * self.segment for number in numbers]
            clip = request.prompt.frames(bases, length, self.size).to(condition.device)
            clip = clip.expand(len(firsts), -1, -1, -1, -1)
            left = min(count, clip.shape[2] - max(offsets))
            if left > 0:
                rest = clip[:, :, -1:].expand(-1, -1, length - clip.shape[2], -1, -1)
                made = self._write(torch.cat([clip, rest], dim=2), request.seeds, numbers, condition)
                cut = [video[:, first : first + left] for video, first in zip(made, offsets, strict=True)]
                yield {"video": torch.stack(cut)}
            elif done == 0:
                raise ValueError(f"the context has no frames at {max(firsts)} or later: use a smaller --start")
            if left < count:
                return
            done += count

    def _write(self, video: Tensor, seeds: Sequence[int], numbers: Sequence[int], condition: Tensor) -> Tensor:
        """Return videos (N, 3, T, H, W) of which only key frames are kept, from segments `numbers` on."""
        clips = video.unfold(2, self.span, self.segment).movedim(-1, 3).transpose(1, 2)  # N segments 3 T H W
        codes = self.tokenizer.encode(clips.flatten(0, 1))
        grid, num_segments = codes.shape[2:], clips.shape[1]
        rows = [(seed, first + k) for seed, first in zip(seeds, numbers, strict=True) for k in range(num_segments)]
        filler = Filler(self.copies.get(True), condition, seeds, self.options)
        ends = codes.flatten(2)[:, [0, -1]]
        between = filler.fill(ends[:, 0], ends[:, 1], rows, condition.repeat_interleave(num_segments, dim=0))
        codes = torch.cat([ends[:, :1], between, ends[:, 1:]], dim=1).unflatten(2, grid)
        made = self.tokenizer.decode(codes)[:, :, : self.segment].unflatten(0, (len(seeds), -1))
        return made.transpose(1, 2).flatten(2, 3)


def open_sampler(bundles: Sequence[Bundle], options: Mapping[str, Any]) -> Sampler:
    """Return the sampler of one file or, for key frames and what is between them, two; see `training.registry.Spec`."""
    writing = resolve_options(Writing, options, "TATS")
    writers, fillers = [], []
    for bundle in bundles:
        networks = list(bundle.networks.values())
        network = next((item for item in networks if isinstance(item, TATSTransformer)), None)
        assert network is not None, bundle.system
        sound = bundle.networks.get(AUDIO_TOKENIZER)
        others = [item for item in networks if item is not network and item is not sound]
        if not others:
            raise ValueError(
                f"{bundle.path} holds no tokenizer, as it was trained on stored codes: nothing can be shown"
            )
        found = network, others[0], Facts.of(bundle.options), sound
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
        network, tokenizer, facts, _ = fillers[0]
        return Between(network, tokenizer, facts, writing)
    network, tokenizer, facts, sound = writers[0]
    filler = (fillers[0][0], fillers[0][2]) if fillers else None
    return LongVideos(network, tokenizer, facts, filler, writing, sound)
