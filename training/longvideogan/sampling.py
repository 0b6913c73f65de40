"""Generate videos of any length with LongVideoGAN's networks, in pieces.

Frame t of a seed is deterministic: its low-resolution noise comes from indexed blocks of the seed's infinite stream,
and every piece is computed at the same alignment. Any range of frames may therefore be requested, in pieces of any size
or without end, in constant memory.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from training.contract import Bundle
from training.data.prompts import followed_frames
from training.longvideogan.latents import LEGACY_SEGMENT, Latents, LegacyLatents, average_w, legacy_draws
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.sres.generator import SuperResGenerator
from training.longvideogan.streaming import History, LowResStream, Tracks, legacy_style_shifts
from training.network_format import describe
from training.random import random_state
from training.sampling import Needs, Request, Sampler, pieces, resolve_options, sampler_option

LRES_CHUNK = 32  # frames computed at once at low resolution; more need memory and save no time
SRES_CHUNK = 8  # frames super-resolved at once
SRES_PIXELS_CPU = 144 * 256  # on a CPU, of one video, a frame at least: more take as long, and memory in proportion
LIVE_CHUNK_CPU = 4  # frames of a piece in interactive use there


def parse_blend(value: Any) -> tuple[tuple[int, int], ...]:
    """Parse "7@300", or several with commas or as a list: seed 7, reached at frame 300."""
    items = value.split(",") if isinstance(value, str) else value
    keys = []
    for item in items:
        if isinstance(item, str):
            match = re.fullmatch(r"(-?\d+)@(\d+)", item)
            if match is None:
                raise ValueError(
                    f"{item!r} is not a blend: it looks like 7@300 (the seed, and the frame at which it is reached)"
                )
            item = match.groups()
        keys.append((int(item[0]), int(item[1])))
    return tuple(keys)


@dataclass(frozen=True)
class Sampling:
    """Sampling options; the defaults sample from the training distribution."""

    truncation: float = sampler_option(
        1.0, "0: average w, 1: w itself; below 1 more typical, less varied", low=0, high=2, live=True
    )
    temporal_scale: float = sampler_option(
        1.0, "latent frames per frame: below 1 slow motion, above 1 fast motion", low=0.05, high=8, live=True
    )
    blend: tuple[tuple[int, int], ...] = sampler_option(
        (), "SEED@FRAME: the video has turned into this seed's at this frame; several with commas", parse=parse_blend
    )
    loop: int | None = sampler_option(
        None, "frames after which the video repeats exactly; a multiple of the network's temporal scale"
    )
    rng: str = sampler_option(
        "blocks", "blocks, or legacy: the published order of draws, whose frames depend on the total length"
    )

    def __post_init__(self) -> None:
        if self.rng not in ("blocks", "legacy"):
            raise ValueError(f"rng is {self.rng!r}: use 'blocks' or 'legacy'")
        if not math.isfinite(self.truncation):
            raise ValueError(f"truncation is {self.truncation}: use a number, such as 0.7")
        if not (math.isfinite(self.temporal_scale) and self.temporal_scale > 0):
            raise ValueError(f"temporal scale is {self.temporal_scale}: use a positive number, such as 0.5")
        frames = [0, *(frame for _, frame in self.blend)]
        if any(earlier >= later for earlier, later in itertools.pairwise(frames)):
            raise ValueError(f"blend reaches its seeds at frames {frames[1:]}: use ascending frames from 1")
        if self.loop is not None and self.loop < 1:
            raise ValueError(f"loop is {self.loop} frames: use a positive number of frames")
        if self.loop is not None and self.blend:
            raise ValueError("loop and blend do not go together: a loop ends as the seed it began as; leave one out")
        if self.rng == "legacy" and (self.temporal_scale != 1 or self.blend or self.loop):
            raise ValueError(
                "rng 'legacy' draws the noise of a whole video as published, which temporal scale, blend and loop "
                "cannot change: leave them out, or use rng 'blocks'"
            )


def latent_z(seeds: Sequence[int], channels: int) -> np.ndarray:
    """Draw the super-resolution latent of each seed: float32 (N, channels)."""
    return np.stack([random_state("sres-z", seed, 0).standard_normal(channels) for seed in seeds]).astype(np.float32)


class LowResSampler(Sampler):
    """Sampler of a low-resolution generator."""

    Options = Sampling
    file_labels = {"video": "lres"}
    titles = {"video": "Low resolution"}

    def __init__(
        self, network: LowResGenerator, options: Sampling = Sampling(), block: int = LRES_CHUNK,
        average: Callable[[], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.network, self.options, self.block = network, options, block
        self.average_w = average or functools.cache(lambda: average_w(network))  # the mean w for truncation
        self.networks, self.outputs = [network], {"video": (network.height, network.width)}
        self.period = network.temporal_scale
        self.depends_on_length, self.default_frames = options.rng == "legacy", options.loop
        loop, scale = options.loop, self.period
        if loop is not None and loop % scale:
            raise ValueError(
                f"loop is {loop} frames: the network repeats its steps every {scale} frames, so use a multiple, "
                f"such as {scale * max(1, round(loop / scale))}"
            )
        period = (loop or 0) * options.temporal_scale
        if abs(period - round(period)) > 1e-6:
            raise ValueError(
                f"loop is {loop} frames at temporal scale {options.temporal_scale}, which is {period:g} latent "
                "frames: use numbers whose product is whole"
            )

    def frames(self, request: Request) -> Iterator[dict[str, Tensor]]:
        """See `Sampler.frames`; takes no prompt."""
        if self.options.rng == "legacy":
            length = legacy_length(request.starts, request.num_frames)
            noise, _ = legacy_draws(self.network, request.seeds, length, 0)
            chunks = self.legacy_frames(noise, length, request.num_frames)
        else:
            chunks = self.block_frames(request.seeds, request.starts, request.num_frames)
        return ({"video": chunk} for chunk in chunks)

    def block_frames(self, seeds: Sequence[int], starts: Sequence[int], num_frames: int | None) -> Iterator[Tensor]:
        """Yield frames from indexed noise. A loop restarts each time, so that it repeats bit for bit."""
        scale, sampling, done = self.period, self.options, 0
        while num_frames is None or done < num_frames:
            count = None if num_frames is None else num_frames - done
            firsts = [first + done for first in starts]
            if sampling.loop is not None:
                firsts = [first % sampling.loop for first in firsts]
                count = min(sampling.loop - firsts[0], count or sampling.loop)
            phases = [first % scale for first in firsts]
            origins = [first - phase for first, phase in zip(firsts, phases, strict=True)]
            latents = Latents(self.network, seeds, origins, sampling.temporal_scale, sampling.blend, loop=sampling.loop)
            yield from self.play(latents, phases, count)
            done += count or 0

    def legacy_frames(self, noise: Tensor, length: int, num_frames: int | None) -> Iterator[Tensor]:
        """Yield the first frames of the published videos of `length` frames, from noise of the whole video."""
        shifts = legacy_style_shifts(length, self.network.num_temporal_doublings)
        return self.play(LegacyLatents(self.network, noise), [0] * len(noise), num_frames, shifts)

    def play(
        self, latents: Tracks, phases: Sequence[int], num_frames: int | None, style_shifts: Sequence[int] = ()
    ) -> Iterator[Tensor]:
        """Yield successive frames of videos that start `phases` frames after the origins of `latents`.

        All videos start at the smallest phase, which costs less than one temporal scale of extra frames, once.
        """
        truncation, low, high = self.options.truncation, min(phases), max(phases)

        def tracks(start: int, stop: int) -> Tensor:
            w = latents(start, stop)
            return w if truncation == 1 else self.average_w().lerp(w, truncation)

        stream, held, done = LowResStream(self.network, tracks, low, style_shifts), History(low), 0
        for count in pieces(num_frames, self.block):
            held.append(stream.advance(high + done + count))
            window = zip(held.read(low + done, high + done + count), phases, strict=True)
            yield torch.stack([clip[:, phase - low : phase - low + count] for clip, phase in window])
            done += count
            held.forget(low + done)

    def with_options(self, options: Any) -> "LowResSampler":
        """See `Sampler.with_options`. The average of w, which is slow to compute, is shared."""
        return LowResSampler(self.network, options, self.block, self.average_w)


def legacy_length(starts: Sequence[int], num_frames: int | None) -> int:
    """Return the number of frames that the published command computes for a video of `num_frames`."""
    if any(starts):
        raise ValueError(
            f"rng 'legacy' was asked for frames from {next(filter(None, starts))} on, but its videos begin at frame "
            "0: start there, or use rng 'blocks'"
        )
    if num_frames is None:
        raise ValueError(
            "rng 'legacy' was asked for a video without end, but draws the noise of the whole video first: "
            "give a number of frames, or use rng 'blocks'"
        )
    return LEGACY_SEGMENT * -(-num_frames // LEGACY_SEGMENT)


class SuperResSampler(Sampler):
    """Sampler of a super-resolution generator: enlarges the low-resolution frames of the prompt, and returns both."""

    Options = Sampling
    file_labels = {"lres": "lres", "video": "sres"}
    titles = {"lres": "Low resolution", "video": "Full size"}

    def __init__(
        self, network: SuperResGenerator, options: Sampling = Sampling(), block: int | None = None
    ) -> None:  # fmt: skip
        self.network, self.options = network, options
        on_cpu = network.SG3.mapping.w_avg.device.type == "cpu"
        fitting = max(SRES_PIXELS_CPU // (network.height * network.width), 1)
        self.block = block or (min(fitting, SRES_CHUNK) if on_cpu else SRES_CHUNK)
        self.videos_at_once = 1 if on_cpu else None
        self.networks, self.context = [network], network.temporal_context
        self.low_size = (network.lres_height, network.lres_width)
        self.outputs = {"lres": self.low_size, "video": (network.height, network.width)}
        self.needs = Needs(self.context, self.context, self.low_size, follows=True)
        self.live_block = LIVE_CHUNK_CPU if on_cpu else SRES_CHUNK

    def frames(self, request: Request) -> Iterator[dict[str, Tensor]]:
        """See `Sampler.frames`. Frames from `start - context` on are requested from the prompt, in order."""
        z = torch.from_numpy(latent_z(request.seeds, self.network.z_channels))
        low = followed_frames(request.prompt, request.starts, request.num_frames, self.needs, self.low_size, SRES_CHUNK)
        return both_outputs(self.matched((piece.expand(len(z), -1, -1, -1, -1) for piece in low), z))

    def enlarge(self, z: Tensor, lres_frames: Iterator[Tensor]) -> Iterator[Tensor]:
        """Map successive pieces (N, 3, T, h, w) of low-resolution videos to enlarged pieces without the outer context.

        `z` (N, z_channels) is the latent of each video. The repeated computation of consecutive pieces, resampling the
        shared context frames for every layer, is less than a thousandth of the cost.
        """
        network, context = self.network, self.context
        z = z.to(network.SG3.mapping.w_avg)
        held: Tensor | None = None
        for piece in lres_frames:
            held = piece.to(z) if held is None else torch.cat([held, piece.to(z)], dim=2)
            while held.shape[2] > 2 * context:
                count = min(self.block, held.shape[2] - 2 * context)
                window, videos = held[:, :, : count + 2 * context], self.videos_at_once or len(z)
                with torch.no_grad():  # not around the yield: no_grad would apply to the consumer of the frames
                    parts = zip(window.split(videos), z.split(videos), strict=True)
                    chunks = [network(frames, part, self.options.truncation) for frames, part in parts]
                held = held[:, :, count:]
                yield chunks[0] if len(chunks) == 1 else torch.cat(chunks)

    def matched(self, lres_frames: Iterator[Tensor], z: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Map low-resolution frames with context to those without, each piece with its enlargement."""
        waiting: list[Tensor] = []  # low-resolution frames without their enlargement so far

        def stream() -> Iterator[Tensor]:
            for piece in lres_frames:
                waiting[:] = [torch.cat([*waiting, piece], dim=2)]
                yield piece

        skip = self.context
        for chunk in self.enlarge(z, stream()):
            held = waiting[0][:, :, skip:]
            count, skip = chunk.shape[2], 0
            yield held[:, :, :count], chunk
            waiting[:] = [held[:, :, count:]]


def both_outputs(chunks: Iterator[tuple[Tensor, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Name the outputs of both resolutions."""
    return ({"lres": low, "video": high} for low, high in chunks)


class PairSampler(Sampler):
    """Sampler of both stages: videos of the low-resolution generator, enlarged by the super-resolution generator."""

    Options = Sampling
    file_labels = {"lres": "lres", "video": "sres"}
    titles = {"lres": "Low resolution", "video": "Full size"}

    def __init__(
        self, lres: LowResGenerator, sres: SuperResGenerator, options: Sampling = Sampling(),
        average: Callable[[], Tensor] | None = None,
    ) -> None:  # fmt: skip
        found, wanted = (lres.height, lres.width), (sres.lres_height, sres.lres_width)
        if found != wanted:
            raise ValueError(
                f"the low-resolution network makes frames of {found[0]}x{found[1]}, the super-resolution network "
                f"enlarges frames of {wanted[0]}x{wanted[1]}: use two networks of the same run"
            )
        self.lres, self.sres = LowResSampler(lres, options, average=average), SuperResSampler(sres, options)
        self.options = options
        self.networks = [lres, sres]
        self.outputs = {"lres": self.lres.size, "video": self.sres.size}
        self.period, self.block = self.lres.period, self.sres.block
        self.depends_on_length, self.default_frames = self.lres.depends_on_length, self.lres.default_frames

    @property
    def stages(self) -> Sequence[Sampler]:
        """Return both samplers."""
        return self.lres, self.sres

    def with_options(self, options: Any) -> "PairSampler":
        """See `Sampler.with_options`."""
        return PairSampler(self.lres.network, self.sres.network, options, self.lres.average_w)

    def frames(self, request: Request) -> Iterator[dict[str, Tensor]]:
        """See `Sampler.frames`; takes no prompt."""
        lres, sres, context, num_frames = self.lres, self.sres, self.sres.context, request.num_frames
        starts = request.starts
        total = None if num_frames is None else num_frames + 2 * context
        if self.options.rng == "legacy":
            length = legacy_length(starts, num_frames) + 2 * context
            noise, z = legacy_draws(lres.network, request.seeds, length, sres.network.z_channels)
            lres_frames = lres.legacy_frames(noise, length, total)
        else:
            z = torch.from_numpy(latent_z(request.seeds, sres.network.z_channels))
            lres_frames = lres.block_frames(request.seeds, [first - context for first in starts], total)
        return both_outputs(sres.matched(lres_frames, z))


def open_sampler(bundles: Sequence[Bundle], options: Mapping[str, Any]) -> Sampler:
    """Return the sampler of a low-resolution generator, of a super-resolution one, or of both.

    Raises `ValueError` for networks that are no generators, or two of one kind, and for options that do not apply.
    """
    found: dict[type, Any] = {}
    for path, network in ((bundle.path, item) for bundle in bundles for item in bundle.networks.values()):
        # With --trust the class may be built from the source in the file, so it is identified by its name.
        kinds = [kind for kind in (LowResGenerator, SuperResGenerator) if kind.__name__ == type(network).__name__]
        if not kinds:
            kind = describe(type(network))
            raise ValueError(f"{path} holds a {kind}, which makes no videos: give a generator")
        if kinds[0] in found:
            raise ValueError(f"{path} holds a second {describe(kinds[0])}: give one")
        found[kinds[0]] = network
    sampling = cast(Sampling, resolve_options(Sampling, options, "LongVideoGAN"))
    lres, sres = found.get(LowResGenerator), found.get(SuperResGenerator)
    if lres is not None and sres is not None:
        return PairSampler(lres, sres, sampling)
    if lres is not None:
        return LowResSampler(lres, sampling)
    if sampling != Sampling(truncation=sampling.truncation):
        raise ValueError(
            "temporal scale, blend, loop and rng 'legacy' act on a low-resolution network: give one too (--lres), or "
            "leave them out"
        )
    assert sres is not None
    return SuperResSampler(sres, sampling)
