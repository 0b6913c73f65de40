"""Videos of any length from trained networks, piece by piece: what generation, previews and metrics consume.

Frame t of a seed is a fixed thing: its low-resolution noise comes from numbered blocks of the seed's endless stream,
and every piece is computed at the same alignment. So any range of frames may be asked for, in pieces of any size or
without end, and memory does not grow with the length of the video.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.checkpoint import WrongNetworkError, load_network
from training.longvideogan.latents import LEGACY_SEGMENT, Latents, LegacyLatents, average_w, legacy_draws
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.sres.generator import SuperResGenerator
from training.longvideogan.streaming import History, LowResStream, Tracks, legacy_style_shifts
from training.network_file import Network
from training.random import random_state

Start = int | Sequence[int]
Condition = Callable[[Start, int], Tensor]

LRES_CHUNK = 32  # frames computed at once at low resolution; more take memory and save no time
SRES_CHUNK = 8  # frames super-resolved at once


@dataclass(frozen=True)
class Sampling:
    """How videos are drawn from the networks; the defaults give the distribution that was trained."""

    truncation: float = 1.0  # w towards its average: 1 not at all, 0 wholly
    temporal_scale: float = 1.0  # latent frames a frame: below 1 slow motion, above 1 fast
    blend: tuple[tuple[int, int], ...] = ()  # (seed, frame): the video has turned into this seed's at this frame
    loop: int | None = None  # frames after which the video repeats exactly; a multiple of the network's temporal scale
    rng: str = "blocks"  # "blocks", or "legacy": the published order of draws, whose frames depend on the total length

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


def quantize(frames: Tensor) -> Tensor:
    """float (N, 3, T, H, W) in [-1, 1] -> uint8 (N, T, H, W, 3), rounded as published: floor(127.5 x + 128)."""
    return (frames * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)


def starts_of(start: Start, num_videos: int) -> list[int]:
    """One first frame for each video."""
    starts = [start] * num_videos if isinstance(start, int) else [int(value) for value in start]
    assert len(starts) == num_videos, f"{len(starts)} start frames for {num_videos} videos"
    return starts


def latent_z(seeds: Sequence[int], channels: int) -> np.ndarray:
    """The super-resolution latent of each seed: float32 (N, channels)."""
    return np.stack([random_state("sres-z", seed, 0).standard_normal(channels) for seed in seeds]).astype(np.float32)


def pieces(num_frames: int | None, size: int) -> Iterator[int]:
    """Lengths of successive pieces of at most `size`; without end if `num_frames` is None."""
    if num_frames is None:
        yield from itertools.repeat(size)
    else:
        yield from (min(size, num_frames - done) for done in range(0, num_frames, size))


class Source:
    """What LowResSource, SuperResSource and Pair share. `context` is the number of neighbouring low-resolution
    frames on either side that a frame needs; `temporal_scale` the number of frames after which statistics repeat."""

    height: int
    width: int
    temporal_scale: int = 1
    context: int = 0

    def frames(
        self, seeds: Sequence[int], start: Start, num_frames: int | None, condition: Condition | None = None
    ) -> Iterator[Tensor]:
        """Frames [start, start + num_frames) of each seed's video: successive float32 (N, 3, T, H, W), unclamped.

        `start` is one int or one per seed, and may be negative. `condition(start, num_frames)` gives a
        super-resolution network its low-resolution frames (N, 3, num_frames, h, w). With `num_frames` None there is
        no end.
        """
        raise AssertionError("a source defines its frames")

    def sample(
        self, seeds: Sequence[int], start: Start, num_frames: int | None, condition: Condition | None = None
    ) -> Iterator[Tensor]:
        """The same frames as `frames`, as uint8 (N, T, H, W, 3)."""
        for chunk in self.frames(seeds, start, num_frames, condition):
            yield quantize(chunk)


class LowResSource(Source):
    """Videos of a low-resolution generator."""

    def __init__(
        self, network: LowResGenerator, chunk_frames: int = LRES_CHUNK, sampling: Sampling = Sampling()
    ) -> None:
        self.network, self.sampling = network, sampling
        self.height, self.width = network.height, network.width
        self.temporal_scale = network.temporal_scale
        self.chunk_frames = chunk_frames
        loop, scale = sampling.loop, self.temporal_scale
        if loop is not None and loop % scale:
            raise ValueError(
                f"loop is {loop} frames: the network repeats its steps every {scale} frames, so use a multiple, "
                f"such as {scale * max(1, round(loop / scale))}"
            )
        period = (loop or 0) * sampling.temporal_scale
        if abs(period - round(period)) > 1e-6:
            raise ValueError(
                f"loop is {loop} frames at temporal scale {sampling.temporal_scale}, which is {period:g} latent "
                "frames: use numbers whose product is whole"
            )

    def frames(
        self, seeds: Sequence[int], start: Start, num_frames: int | None, condition: Condition | None = None
    ) -> Iterator[Tensor]:
        """See `Source.frames`; takes no condition."""
        starts = starts_of(start, len(seeds))
        if self.sampling.rng == "legacy":
            length = legacy_length(starts, num_frames)
            noise, _ = legacy_draws(self.network, seeds, length, 0)
            return self.legacy_frames(noise, length, num_frames)
        return self.block_frames(seeds, starts, num_frames)

    def block_frames(self, seeds: Sequence[int], starts: Sequence[int], num_frames: int | None) -> Iterator[Tensor]:
        """Frames from numbered noise. A loop starts afresh each time, so that it repeats to the last bit."""
        scale, sampling, done = self.temporal_scale, self.sampling, 0
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
        """The first frames of the published videos of `length` frames whose noise was drawn whole."""
        shifts = legacy_style_shifts(length, self.network.num_temporal_doublings)
        return self.play(LegacyLatents(self.network, noise), [0] * len(noise), num_frames, shifts)

    def play(
        self, latents: Tracks, phases: Sequence[int], num_frames: int | None, style_shifts: Sequence[int] = ()
    ) -> Iterator[Tensor]:
        """Successive frames of videos that start `phases` frames behind the origins of `latents`.

        All are computed from the least phase on, at a cost of less than one temporal scale of frames, once.
        """
        truncation, low, high = self.sampling.truncation, min(phases), max(phases)

        def tracks(start: int, stop: int) -> Tensor:
            w = latents(start, stop)
            return w if truncation == 1 else self.average_w.lerp(w, truncation)

        stream, held, done = LowResStream(self.network, tracks, low, style_shifts), History(low), 0
        for count in pieces(num_frames, self.chunk_frames):
            held.append(stream.advance(high + done + count))
            window = zip(held.read(low + done, high + done + count), phases, strict=True)
            yield torch.stack([clip[:, phase - low : phase - low + count] for clip, phase in window])
            done += count
            held.forget(low + done)

    @functools.cached_property
    def average_w(self) -> Tensor:
        """What truncation pulls w towards: (w channels, 1)."""
        return average_w(self.network)


def legacy_length(starts: Sequence[int], num_frames: int | None) -> int:
    """Frames that the published command computes for a video of `num_frames`."""
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


class SuperResSource(Source):
    """Super-resolved videos of given low-resolution ones."""

    def __init__(
        self, network: SuperResGenerator, chunk_frames: int = SRES_CHUNK, sampling: Sampling = Sampling()
    ) -> None:
        self.network, self.truncation = network, sampling.truncation
        self.height, self.width = network.height, network.width
        self.context = network.temporal_context
        self.chunk_frames = chunk_frames

    def frames(
        self, seeds: Sequence[int], start: Start, num_frames: int | None, condition: Condition | None = None
    ) -> Iterator[Tensor]:
        """See `Source.frames`. `condition` is asked for frames from `start - context` on, in order."""
        if condition is None:
            raise ValueError(
                "a super-resolution network alone was asked for frames: it needs low-resolution frames to enlarge; "
                "give it a low-resolution network too (--lres), or a dataset"
            )
        starts = starts_of(start, len(seeds))

        def stream() -> Iterator[Tensor]:
            done = -self.context
            for count in pieces(None if num_frames is None else num_frames + 2 * self.context, self.chunk_frames):
                yield condition([first + done for first in starts], count)
                done += count

        return self.enlarge(torch.from_numpy(latent_z(seeds, self.network.z_channels)), stream())

    def enlarge(self, z: Tensor, lres_frames: Iterator[Tensor]) -> Iterator[Tensor]:
        """Successive pieces (N, 3, T, h, w) of low-resolution videos -> pieces of them without the outer context.

        `z` (N, z_channels) is the latent of each video. What a piece repeats of the one before, resampling the
        frames in between for every layer, is less than a thousandth of its work.
        """
        network, context = self.network, self.context
        z = z.to(network.SG3.mapping.w_avg)
        held: Tensor | None = None
        for piece in lres_frames:
            held = piece.to(z) if held is None else torch.cat([held, piece.to(z)], dim=2)
            while held.shape[2] > 2 * context:
                count = min(self.chunk_frames, held.shape[2] - 2 * context)
                with torch.no_grad():  # not around the yield: it would hold for whoever reads the frames
                    chunk = network(held[:, :, : count + 2 * context], z, self.truncation)
                held = held[:, :, count:]
                yield chunk

    def matched(self, lres_frames: Iterator[Tensor], z: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Low-resolution frames with context -> those without, each piece with its enlargement."""
        waiting: list[Tensor] = []  # low-resolution frames not yet matched with their enlargement

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


class Pair(Source):
    """Videos of a low-resolution generator, made sharp by a super-resolution one."""

    def __init__(self, lres: LowResGenerator, sres: SuperResGenerator, sampling: Sampling = Sampling()) -> None:
        found, wanted = (lres.height, lres.width), (sres.lres_height, sres.lres_width)
        if found != wanted:
            raise ValueError(
                f"the low-resolution network makes frames of {found[0]}x{found[1]}, the super-resolution network "
                f"enlarges frames of {wanted[0]}x{wanted[1]}: use two networks of the same run"
            )
        self.lres, self.sres = LowResSource(lres, sampling=sampling), SuperResSource(sres, sampling=sampling)
        self.height, self.width = sres.height, sres.width
        self.temporal_scale = self.lres.temporal_scale

    def frames(
        self, seeds: Sequence[int], start: Start, num_frames: int | None, condition: Condition | None = None
    ) -> Iterator[Tensor]:
        """See `Source.frames`; takes no condition. Frame t is low-resolution frame t, enlarged."""
        return (chunk for _, chunk in self.both(seeds, start, num_frames))

    def both(self, seeds: Sequence[int], start: Start, num_frames: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """The same frames at both resolutions: successive ((N, 3, T, h, w), (N, 3, T, H, W))."""
        lres, sres, context = self.lres, self.sres, self.sres.context
        starts = starts_of(start, len(seeds))
        total = None if num_frames is None else num_frames + 2 * context
        if lres.sampling.rng == "legacy":
            length = legacy_length(starts, num_frames) + 2 * context
            noise, z = legacy_draws(lres.network, seeds, length, sres.network.z_channels)
            lres_frames = lres.legacy_frames(noise, length, total)
        else:
            z = torch.from_numpy(latent_z(seeds, sres.network.z_channels))
            lres_frames = lres.frames(seeds, [first - context for first in starts], total)
        return sres.matched(lres_frames, z)


def make_source(
    lres: LowResGenerator | None = None, sres: SuperResGenerator | None = None, sampling: Sampling = Sampling()
) -> LowResSource | SuperResSource | Pair:
    """The source of videos for whichever networks there are; ValueError for what does not go together."""
    if lres is not None and sres is not None:
        return Pair(lres, sres, sampling)
    if lres is not None:
        return LowResSource(lres, sampling=sampling)
    assert sres is not None, "make_source needs a network"
    if sampling != Sampling(truncation=sampling.truncation):
        raise ValueError(
            "temporal scale, blend, loop and rng 'legacy' act on a low-resolution network: give one too (--lres), or "
            "leave them out"
        )
    return SuperResSource(sres, sampling=sampling)


def open_source(
    lres_path: str | None,
    sres_path: str | None,
    device: str | torch.device,
    trust: bool = False,
    sampling: Sampling = Sampling(),
) -> LowResSource | SuperResSource | Pair:
    """The source of videos for the networks at paths or URLs; one of the wrong kind is a `ValueError`."""
    lres = _open_network("--lres", lres_path, LowResGenerator, device, trust)
    sres = _open_network("--sres", sres_path, SuperResGenerator, device, trust)
    return make_source(lres, sres, sampling)


def _open_network(
    option: str, path: str | None, kind: type[Network], device: str | torch.device, trust: bool
) -> Network | None:
    try:
        return load_network(path, device, trust, expect=kind) if path else None
    except WrongNetworkError as error:
        swapped = error.found in (LowResGenerator, SuperResGenerator)
        raise ValueError(f"{option}: {error}{'; did you swap --lres and --sres?' if swapped else ''}") from None
