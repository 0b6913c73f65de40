"""Generate low-resolution frames in pieces: every layer keeps the few samples that the next piece needs.

The generator is treated as infinite in time: sample i of a level that runs at 1/2^l of the frame rate is at frame
i * 2^l, and the samples that a range of frames depends on follow from integer arithmetic. Nothing is computed twice, so
a video in pieces costs as much as the whole, in constant memory.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.longvideogan.lres.generator import TEMPORAL_PADDING, GeneratorBlock, LowResGenerator, kernel_norms

TRACK_MARGIN = 6  # samples beyond twice a range that the 12-tap downsampling of w reads at each end, rounded up to even

Tracks = Callable[[int, int], Tensor]  # (start, stop) -> w of these frames: (N, w channels, stop - start)


class Span(NamedTuple):
    """Samples [start, stop) of one level."""

    start: int
    stop: int


class Plan(NamedTuple):
    """The samples that a range of frames depends on, coarsest level first: input of each temporal block, and w."""

    features: tuple[Span, ...]
    tracks: tuple[Span, ...]


def plan_window(frames: Span, style_shifts: Sequence[int]) -> Plan:
    """Return the samples of every level that `frames` depend on; one style shift per temporal block, coarsest first.

    A block's two 3-tap convolutions reach two samples to either side, its bilinear upsampling one more.
    """
    features = [Span(frames.start - 2, frames.stop + 2)]
    for _ in style_shifts[1:]:
        start, stop = features[0]
        features.insert(0, Span((start - 1) // 2 - 2, stop // 2 + 3))
    tracks: list[Span] = []
    for (start, stop), shift in zip(features, style_shifts, strict=True):
        start, stop = start + shift, stop + shift
        if tracks:
            start = min(start, 2 * tracks[-1].start - TRACK_MARGIN)
            stop = max(stop, 2 * tracks[-1].stop + TRACK_MARGIN)
        tracks.append(Span(start, stop))
    return Plan(tuple(features), tuple(tracks))


def legacy_style_shifts(num_frames: int, num_doublings: int) -> list[int]:
    """Return the delay in samples of each level's styles in the published network, coarsest level first.

    It crops w and features to lengths that are no multiples of each other when `num_frames` is not a multiple of the
    temporal scale; otherwise the delays are zero.
    """
    shifts = []
    for level in range(num_doublings, -1, -1):
        scale = 2 ** (num_doublings - level)  # samples of this level per sample of the coarsest
        have = scale * (-(-num_frames // 2**num_doublings) + 2 * TEMPORAL_PADDING)
        length = -(-num_frames // 2**level) + 2 * TEMPORAL_PADDING
        shifts.append((have - length) // 2 - TEMPORAL_PADDING * (scale - 1))
    return shifts


class History:
    """The latest samples of an infinite sequence, by index: (N, C, stop - start, ...).

    What is left from piece to piece is copied to one tensor that stays. A new one for each piece would lie among
    tensors that are freed soon, and leave gaps in the heap of a CPU that nothing fits into.
    """

    def __init__(self, start: int):
        self.start = self.stop = start
        self.samples: Tensor | None = None
        self.kept: Tensor | None = None  # where samples are left: (N, C, most samples that were, ...)

    def append(self, samples: Tensor) -> None:
        """Append samples, which begin at `stop`."""
        self.samples = samples if self.samples is None else torch.cat([self.samples, samples], dim=2)
        self.stop += samples.shape[2]

    def read(self, start: int, stop: int) -> Tensor:
        """Return samples [start, stop), until the next `forget`."""
        assert self.samples is not None and self.start <= start <= stop <= self.stop, "these samples are not held"
        return self.samples[:, :, start - self.start : stop - self.start]

    def forget(self, start: int) -> None:
        """Drop the samples before `start`."""
        if self.samples is None or start <= self.start:
            return
        left, kept = self.read(start, self.stop), self.kept
        if kept is None or kept.shape[2] < left.shape[2]:
            self.kept = kept = torch.empty_like(left, memory_format=torch.contiguous_format)
        elif self.samples.data_ptr() == kept.data_ptr():
            left = left.clone()  # since both places may overlap
        self.samples, self.start = kept[:, :, : left.shape[2]], start
        self.samples.copy_(left)


class BlockStream:
    """One temporal block, with the histories of its input and of its `output`."""

    @torch.no_grad()
    def __init__(self, block: GeneratorBlock, size: tuple[int, int], source: History, first: int):
        self.block, self.size, self.source = block, size, source
        self.hidden = History(source.start + 1)  # after the first convolution
        self.sums = History(source.start + 2)  # after the second convolution and the skip path, before resampling
        self.output = History(first)
        self.norms = kernel_norms(block.weight_0), kernel_norms(block.weight_1)  # shared by all pieces

    def advance(self, track: History, shift: int, stop: int) -> None:
        """Compute the output before `stop` from the available input; styles are read `shift` samples later."""
        block, source, hidden, sums, output = self.block, self.source, self.hidden, self.sums, self.output
        start, end = hidden.stop, source.stop - 1
        if start < end:
            x = source.read(start - 1, end + 1)
            x = x.to(block.feature_dtype(x, block.weight_0))
            w = track.read(start - 1 + shift, end + 1 + shift)
            hidden.append(block.hidden(x, w, block.input_magnitude_ema_0(x), self.norms[0], pad_time=False))
        start, end = sums.stop, hidden.stop - 1
        if start < end:
            x, h = source.read(start, end), hidden.read(start - 1, end + 1)
            x = x.to(h.dtype)
            w = track.read(start - 1 + shift, end + 1 + shift)
            gains = block.input_magnitude_ema_0(x), block.input_magnitude_ema_1(h)
            sums.append(block.residual(x, gains[0], h, w, gains[1], self.norms[1], pad_time=False))
        start = output.stop
        if start < stop:
            low, high = start, stop
            if not isinstance(block.temporal_upsample, nn.Identity):
                low, high = (start - 1) // 2, stop // 2 + 1
            y = block.temporal_upsample(sums.read(low, high))
            y = y.narrow(2, start - low * (y.shape[2] // (high - low)), stop - start)
            output.append(block.finish(y, self.size))
            sums.forget(low)
        source.forget(sums.stop)
        hidden.forget(sums.stop - 1)


class LowResStream:
    """A video of a low-resolution generator from frame `start` on, in pieces of any size.

    Equal to `synthesize` of the whole video to 1e-5. `tracks` returns w; every frame is requested once, in order, some
    ten coarse samples ahead of the video. Frame numbers may be negative; frame 0 is aligned with a coarse sample.
    """

    def __init__(self, network: LowResGenerator, tracks: Tracks, start: int, style_shifts: Sequence[int] = ()):
        self.network, self.tracks = network, tracks
        self.style_shifts = list(style_shifts) or [0] * len(network.temporal_layers)
        plan = plan_window(Span(start, start + 1), self.style_shifts)
        self.done = start
        self.latents = [History(span.start) for span in plan.tracks]
        self.input = source = History(plan.features[0].start)
        self.blocks: list[BlockStream] = []
        firsts = [*(span.start for span in plan.features[1:]), start]
        for block, size, first in zip(network.temporal_layers, network.block_sizes, firsts, strict=False):
            assert isinstance(block, GeneratorBlock)
            self.blocks.append(BlockStream(block, size, source, first))
            source = self.blocks[-1].output

    @torch.no_grad()
    def advance(self, stop: int) -> Tensor:
        """Return the next frames, up to `stop`: (N, 3, stop - done, height, width)."""
        network, start = self.network, self.done
        plan = plan_window(Span(start, stop), self.style_shifts)
        self.extend_latents(plan)
        first, end = self.input.stop, plan.features[0].stop
        if first < end:
            shift = self.style_shifts[0]
            coarse = network.w_to_temp_input(self.latents[0].read(first + shift, end + shift))
            self.input.append((coarse[..., None, None] + network.spatial_input) * 0.5**0.5)
        stops = [*(span.stop for span in plan.features[1:]), stop]
        for block, track, shift, block_stop in zip(self.blocks, self.latents, self.style_shifts, stops, strict=True):
            block.advance(track, shift, block_stop)
        x = self.blocks[-1].output.read(start, stop)
        w = self.latents[-1].read(start + self.style_shifts[-1], stop + self.style_shifts[-1])
        self.done = stop
        for block, size in zip(network.spatial_layers, network.block_sizes[len(self.blocks) :], strict=True):
            x = block(x, w, (stop - start, *size))
        video = network.to_rgb(x, w) * network.output_scale
        self.blocks[-1].output.forget(stop)
        return video

    def extend_latents(self, plan: Plan) -> None:
        """Extend w at every rate as far as `plan` needs it, and drop the samples that no later frame needs."""
        finest = self.latents[-1]
        if finest.stop < plan.tracks[-1].stop:
            finest.append(self.tracks(finest.stop, plan.tracks[-1].stop))
        for level in range(len(self.latents) - 2, -1, -1):
            fine, track, stop = self.latents[level + 1], self.latents[level], plan.tracks[level].stop
            if track.stop < stop:
                w = fine.read(2 * track.stop - TRACK_MARGIN, 2 * stop + TRACK_MARGIN)
                w = self.network.temporal_downsample_latent(w)
                track.append(w[:, :, TRACK_MARGIN // 2 : -TRACK_MARGIN // 2])
        for track, span in zip(self.latents, plan.tracks, strict=True):
            track.forget(span.start)
