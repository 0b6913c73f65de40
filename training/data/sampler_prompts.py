"""The videos of one sampler as the prompt of the next stage."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from training.contract import Size
from training.sampling import Prompt, Request, Sampler, Start, starts_of


class SamplerPrompt(Prompt):
    """The videos of another sampler, as the prompt of the stage that follows it.

    Frame t is frame t of the video of each of the request's seeds. Successive requests may overlap and are served from
    one stream, of which the frames of the last request are kept. Others start the stream anew: at the frames asked for
    where the sampler has random access, else at the start of `request`, before which the first frame is repeated.
    Fewer frames are returned where the videos end. They stay on the sampler's device, and are not clamped.
    """

    def __init__(self, sampler: Sampler, request: Request) -> None:
        self.sampler, self.request = sampler, request
        self.label, self.text = request.prompt.label, request.prompt.text
        self.fps = sampler.fps
        self._origins: list[int] | None = None  # frame of each video at which the stream began

    def frames(self, start: Start, count: int, size: Size) -> Tensor:
        """See `Prompt.frames`. Raises `ValueError` for another size than the sampler's."""
        if size != self.sampler.size:
            raise ValueError(
                f"the first stage makes frames of {self.sampler.size[0]}x{self.sampler.size[1]}, the next takes "
                f"{size[0]}x{size[1]}: use stages of one model"
            )
        starts = starts_of(start, len(self.request.seeds))
        offsets = self._offsets(starts)
        if offsets is None:
            self._begin(starts if self.sampler.random_access else self.request.starts)
            offsets = self._offsets(starts)
            assert offsets is not None, "the stream begins where it is asked for"
        low = max(0, min(offsets))
        self._pull(low, max(offsets) + count)
        held = self._held
        if held is None:
            return torch.empty(len(starts), 3, 0, *size)
        count = max(0, min(count, *(self._end - offset for offset in offsets)))
        clips = []
        for video, offset in zip(held, offsets, strict=True):
            places = torch.arange(offset, offset + count).clamp(min=0) - self._first
            clips.append(video[:, places.to(video.device)])
        return torch.stack(clips)

    def stream(self, name: str, start: Start, count: int) -> Tensor:
        """See `Prompt.stream`."""
        return self.request.prompt.stream(name, start, count)

    def _begin(self, origins: Sequence[int]) -> None:
        """Start the stream of frames at one frame of each video."""
        stop, num_frames = self.request.num_frames, None
        if stop is not None:
            ends = [first + stop for first in self.request.starts]
            num_frames = max(0, max(end - origin for end, origin in zip(ends, origins, strict=True)))
        self._origins = list(origins)
        request = dataclasses.replace(self.request, start=self._origins, num_frames=num_frames)
        self._chunks = self.sampler.frames(request)
        self._held: Tensor | None = None  # frames [_first, _end) of the stream: (N, 3, T, H, W)
        self._first = self._end = 0

    def _offsets(self, starts: Sequence[int]) -> list[int] | None:
        """Return the place in the stream of the frames asked for, None where the stream has to start anew."""
        if self._origins is None:
            return None
        offsets = [first - origin for first, origin in zip(starts, self._origins, strict=True)]
        if self.sampler.random_access:
            return offsets if len(set(offsets)) == 1 and self._first <= offsets[0] <= self._end else None
        return offsets if self._first <= max(0, min(offsets)) else None

    def _pull(self, low: int, stop: int) -> None:
        """Compute frames of the stream up to `stop` and forget those before `low`; the first one stays at least."""
        held = [] if self._held is None else [self._held[:, :, max(0, low - self._first) :]]
        first = max(self._first, min(low, self._end))
        while self._end < max(stop, 1):
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            frames = chunk["video"]
            held.append(frames[:, :, max(0, low - self._end) :])
            first = max(first, min(low, self._end + frames.shape[2]))
            self._end += frames.shape[2]
        if held:
            self._held, self._first = torch.cat(held, dim=2), first
