"""Videos of any length from trained networks, piece by piece: what generation, previews and metrics consume.

Frame t of a seed is a fixed thing: its low-resolution noise comes from numbered blocks of the seed's endless stream,
and every piece is computed at the same alignment. So any range of frames may be asked for, in pieces of any size,
and memory does not grow with the length of the video.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from training.checkpoint import load_network
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.sres.generator import SuperResGenerator
from training.random import noise_blocks, random_state

Start = int | Sequence[int]
Condition = Callable[[Start, int], Tensor]

LRES_CHUNK = 64  # frames computed at once at low resolution; the fixed cost of a piece is about 28 frames
SRES_CHUNK = 8  # frames super-resolved at once


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


class Source:
    """What LowResSource, SuperResSource and Pair share. `context` is the number of neighbouring low-resolution
    frames on either side that a frame needs; `temporal_scale` the number of frames after which statistics repeat."""

    height: int
    width: int
    temporal_scale: int = 1
    context: int = 0

    def frames(
        self, seeds: Sequence[int], start: Start, num_frames: int, condition: Condition | None = None
    ) -> Iterator[Tensor]:
        """Frames [start, start + num_frames) of each seed's video: successive float32 (N, 3, T, H, W), unclamped.

        `start` is one int or one per seed, and may be negative. `condition(start, num_frames)` gives a
        super-resolution network its low-resolution frames (N, 3, num_frames, h, w).
        """
        raise AssertionError("a source defines its frames")

    def sample(
        self, seeds: Sequence[int], start: Start, num_frames: int, condition: Condition | None = None
    ) -> Iterator[Tensor]:
        """The same frames as `frames`, as uint8 (N, T, H, W, 3)."""
        for chunk in self.frames(seeds, start, num_frames, condition):
            yield quantize(chunk)


class LowResSource(Source):
    """Videos of a low-resolution generator."""

    def __init__(self, network: LowResGenerator, chunk_frames: int = LRES_CHUNK):
        self.network = network
        self.height, self.width = network.height, network.width
        self.temporal_scale = network.temporal_scale
        self.chunk_frames = chunk_frames

    def frames(
        self, seeds: Sequence[int], start: Start, num_frames: int, condition: Condition | None = None
    ) -> Iterator[Tensor]:
        """See `Source.frames`; takes no condition."""
        starts = starts_of(start, len(seeds))
        done = 0
        while done < num_frames:
            # Pieces end where the first video reaches a multiple of the temporal scale, so that nothing is wasted.
            phase = (starts[0] + done) % self.temporal_scale
            count = min(num_frames - done, max(self.chunk_frames - phase, 1))
            yield self.window(seeds, [first + done for first in starts], count)
            done += count

    def window(self, seeds: Sequence[int], starts: Sequence[int], count: int) -> Tensor:
        """Frames [start, start + count) of each seed, computed at once: (N, 3, count, H, W).

        Alignment is absolute: every video is computed from the last multiple of the temporal scale before its start.
        """
        network, scale = self.network, self.temporal_scale
        phases = [start % scale for start in starts]
        length = scale * -(-(max(phases) + count) // scale)
        samples = network.num_noise_frames(length)
        noise = np.stack(
            [
                noise_blocks(seed, network.noise_channels, start - phase, samples)
                for seed, start, phase in zip(seeds, starts, phases, strict=True)
            ]
        )
        with torch.no_grad():
            video = network.synthesize(torch.from_numpy(noise).to(network.spatial_input), length)
        return torch.stack([clip[:, phase : phase + count] for clip, phase in zip(video, phases, strict=True)])


class SuperResSource(Source):
    """Super-resolved videos of given low-resolution ones."""

    def __init__(self, network: SuperResGenerator, chunk_frames: int = SRES_CHUNK):
        self.network = network
        self.height, self.width = network.height, network.width
        self.context = network.temporal_context
        self.chunk_frames = chunk_frames

    def frames(
        self, seeds: Sequence[int], start: Start, num_frames: int, condition: Condition | None = None
    ) -> Iterator[Tensor]:
        """See `Source.frames`. `condition` is asked for frames from `start - context` on, in order."""
        if condition is None:
            raise ValueError(
                "a super-resolution network alone was asked for frames: it needs low-resolution frames to enlarge; "
                "give it a low-resolution network too (--lres), or a dataset"
            )
        starts = starts_of(start, len(seeds))

        def stream() -> Iterator[Tensor]:
            total = num_frames + 2 * self.context
            for done in range(0, total, self.chunk_frames):
                firsts = [first - self.context + done for first in starts]
                yield condition(firsts, min(self.chunk_frames, total - done))

        yield from self.enlarge(seeds, stream())

    def enlarge(self, seeds: Sequence[int], lres_frames: Iterator[Tensor]) -> Iterator[Tensor]:
        """Successive pieces (N, 3, T, h, w) of one low-resolution video -> pieces of it without the outer context."""
        network, context = self.network, self.context
        like = network.SG3.mapping.w_avg
        z = torch.from_numpy(latent_z(seeds, network.z_channels)).to(like)
        held: Tensor | None = None
        for piece in lres_frames:
            held = piece.to(like) if held is None else torch.cat([held, piece.to(like)], dim=2)
            while held.shape[2] > 2 * context:
                count = min(self.chunk_frames, held.shape[2] - 2 * context)
                with torch.no_grad():
                    yield network(held[:, :, : count + 2 * context], z)
                held = held[:, :, count:]


class Pair(Source):
    """Videos of a low-resolution generator, made sharp by a super-resolution one."""

    def __init__(self, lres: LowResGenerator, sres: SuperResGenerator):
        found, wanted = (lres.height, lres.width), (sres.lres_height, sres.lres_width)
        if found != wanted:
            raise ValueError(
                f"the low-resolution network makes frames of {found[0]}x{found[1]}, the super-resolution network "
                f"enlarges frames of {wanted[0]}x{wanted[1]}: use two networks of the same run"
            )
        self.lres, self.sres = LowResSource(lres), SuperResSource(sres)
        self.height, self.width = sres.height, sres.width
        self.temporal_scale = self.lres.temporal_scale

    def frames(
        self, seeds: Sequence[int], start: Start, num_frames: int, condition: Condition | None = None
    ) -> Iterator[Tensor]:
        """See `Source.frames`; takes no condition. Frame t is low-resolution frame t, enlarged."""
        for _, chunk in self.both(seeds, start, num_frames):
            yield chunk

    def both(self, seeds: Sequence[int], start: Start, num_frames: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same frames at both resolutions: successive ((N, 3, T, h, w), (N, 3, T, H, W))."""
        context = self.sres.context
        firsts = [first - context for first in starts_of(start, len(seeds))]
        waiting: list[Tensor] = []  # low-resolution frames not yet matched with their enlargement

        def stream() -> Iterator[Tensor]:
            for piece in self.lres.frames(seeds, firsts, num_frames + 2 * context):
                waiting[:] = [torch.cat([*waiting, piece], dim=2)]
                yield piece

        skip = context
        for chunk in self.sres.enlarge(seeds, stream()):
            held = waiting[0][:, :, skip:]
            count, skip = chunk.shape[2], 0
            yield held[:, :, :count], chunk
            waiting[:] = [held[:, :, count:]]


def make_source(
    lres: LowResGenerator | None = None, sres: SuperResGenerator | None = None
) -> LowResSource | SuperResSource | Pair:
    """The source of videos for whichever networks there are."""
    if lres is not None and sres is not None:
        return Pair(lres, sres)
    if lres is not None:
        return LowResSource(lres)
    assert sres is not None, "make_source needs a network"
    return SuperResSource(sres)


def open_source(
    lres_path: str | None, sres_path: str | None, device: str | torch.device, trust: bool = False
) -> LowResSource | SuperResSource | Pair:
    """The source of videos for the networks at paths or URLs; one of the wrong kind is a `ValueError`."""
    lres = load_network(lres_path, device, trust) if lres_path else None
    if lres is not None and not isinstance(lres, LowResGenerator):
        raise ValueError(f"--lres: {lres_path} holds a {type(lres).__name__}; expected a low-resolution generator")
    sres = load_network(sres_path, device, trust) if sres_path else None
    if sres is not None and not isinstance(sres, SuperResGenerator):
        raise ValueError(f"--sres: {sres_path} holds a {type(sres).__name__}; expected a super-resolution generator")
    return make_source(lres, sres)
