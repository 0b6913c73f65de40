"""A walk: a rollout that is steered, with what has been done in it and what was seen.

    walk.begin(sampler)              # the network's state after the context
    walk.advance(action)             # one step further: the numbers of the new frames
    walk.pictures.read(7)            # PNG file of frame 7
    walk.cut(5)                      # frames 5 ... are undone; to go on, `begin` and `advance` until frame 5 is next

`(seed, start, prompt)` fixes every frame of a sampler, so a list of actions is all that must be kept of a walk. What
was seen is kept in a file, to look back and to save.
"""

import bisect
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from explorer.actions import Action, ActionSpace, as_array
from explorer.blocks import Options
from explorer.requests import as_png
from explorer.starts import Context
from training.contract import Size
from training.data.dataset import to_float
from training.data.stream_prompts import stream_tensor
from training.sampling import Prompt, Request, Sampler, Start, quantize

MAX_FRAMES = 18_000  # of a walk
MAX_BYTES = 256 << 20  # of its pictures


class Pictures:
    """PNG files of the frames of a walk, in one file on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "w+b", buffering=0)
        self._ends: list[int] = []

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def num_bytes(self) -> int:
        """Return how large the file is."""
        return self._ends[-1] if self._ends else 0

    def append(self, picture: bytes) -> None:
        """Keep the next picture."""
        os.pwrite(self._file.fileno(), picture, self.num_bytes)
        self._ends.append(self.num_bytes + len(picture))

    def read(self, index: int) -> bytes:
        """Return a picture. Raises `ValueError` for one that there is not."""
        ends = self._ends
        if not 0 <= index < len(ends) or self._file.closed:
            raise ValueError(f"frame {index} was asked for: there are {len(ends)} so far")
        begin = ends[index - 1] if index else 0
        return os.pread(self._file.fileno(), ends[index] - begin, begin)

    def cut(self, count: int) -> None:
        """Keep the first `count` pictures."""
        self._ends = self._ends[:count]
        os.ftruncate(self._file.fileno(), self.num_bytes)

    def close(self) -> None:
        """Remove the file."""
        self._file.close()
        self.path.unlink(missing_ok=True)


class SteeredPrompt(Prompt):
    """A context, and actions that come while a video is made.

    What is read beyond the actions so far is the action `held`, which is thereby done.
    """

    def __init__(self, context: Context, still: Action, given: Prompt) -> None:
        self.context, self.held = context, still
        self.actions: list[Action] = []  # into frames 0, 1, ...
        self.label, self.text, self.fps = given.label, given.text, given.fps

    @property
    def past(self) -> int:
        """Return the number of context frames."""
        return len(self.context.frames)

    def frames(self, start: Start, count: int, size: Size) -> Tensor:
        """See `Prompt.frames`."""
        first = self._first(start)
        if first < 0 or count > self.past - first or size != self.context.frames.shape[1:3]:
            raise ValueError(
                f"a walk has {self.past} frames before it, {count} from frame {first - self.past} are needed"
            )
        frames = torch.from_numpy(self.context.frames[None, first : first + count])
        return to_float(frames, torch.device("cpu"))

    def stream(self, name: str, start: Start, count: int) -> Tensor:
        """See `Prompt.stream`."""
        first = self._first(start)
        if name != "actions" or first < 0:
            return super().stream(name, start, count)
        missing = first + count - self.past - len(self.actions)
        self.actions += [self.held] * missing
        before, after = self.context.actions[first : first + count], self.actions[max(first - self.past, 0) :]
        after = after[: count - len(before)]
        return stream_tensor(np.concatenate([before, as_array(after)]) if after else before)[None]

    def _first(self, start: Start) -> int:
        """Return the place of a frame, counted from the first of the context."""
        (number,) = {start} if isinstance(start, int) else set(start)
        return number + self.past


class Walk:
    """A walk. `number` is its name in requests, `owner` the tab that steers it; see the module."""

    def __init__(
        self, number: int, owner: str, model: str, space: ActionSpace, seed: int, options: Options,
        prompt: SteeredPrompt, pictures: Pictures,
    ) -> None:  # fmt: skip
        self.number, self.owner, self.model, self.space = number, owner, model, space
        self.seed, self.options, self.prompt, self.pictures = seed, options, prompt, pictures
        self.made = 0  # frames that the rollout at hand has made, fewer than were seen while it catches up
        self._chunk_ends = [0]  # where the walk can be cut
        self._chunks: Iterator[dict[str, Tensor]] | None = None

    @property
    def has_begun(self) -> bool:
        """Return whether there is a rollout at hand."""
        return self._chunks is not None

    @property
    def num_frames(self) -> int:
        """Return how many frames were seen."""
        return len(self.pictures)

    def begin(self, sampler: Sampler) -> None:
        """Begin the rollout, for the first time or again."""
        self._chunks, self.made = sampler.frames(Request([self.seed], 0, None, self.prompt)), 0

    def suspend(self) -> None:
        """Give up the rollout, which `begin` begins again."""
        chunks, self._chunks = self._chunks, None
        if chunks is not None and hasattr(chunks, "close"):
            chunks.close()  # type: ignore[attr-defined]  # an iterator need not have it

    def advance(self, action: Action | None = None) -> list[int]:
        """Make the next chunk, with an action, or again with what was done then; return the numbers of new frames.

        Raises `ValueError` for a walk that is as long as may be.
        """
        assert self._chunks is not None, "begin first"
        if action is not None:
            if self.num_frames >= MAX_FRAMES or self.pictures.num_bytes >= MAX_BYTES:
                raise ValueError(
                    f"this walk has {self.num_frames} frames, more are not kept: save it and begin another"
                )
            self.prompt.held = action
        with torch.no_grad():
            chunk = next(self._chunks, None)
        if chunk is None:
            raise ValueError(f"the model ends its video after {self.made} frames: begin another walk")
        frames = quantize(chunk["video"])[0].cpu().numpy()
        self.made += len(frames)
        new = list(range(self.num_frames, self.made))
        for number in new:
            self.pictures.append(as_png(frames[number - self.made]))
        if new:
            self._chunk_ends.append(self.made)
        return new

    def cut(self, num_frames: int) -> int:
        """Undo all after `num_frames` frames, or after the chunk that ends before that; return how many are left."""
        place = bisect.bisect_right(self._chunk_ends, num_frames) - 1
        left = self._chunk_ends[place]
        if left < self.num_frames:
            del self._chunk_ends[place + 1 :], self.prompt.actions[left:]
            self.pictures.cut(left)
        if left < self.made:
            self.suspend()
        return left

    @property
    def name(self) -> str:
        """Return the name of its files, without suffix."""
        return f"{self.model}_seed={self.seed}_walk={self.num_frames}"

    def frame(self, number: int) -> np.ndarray:
        """Return a frame uint8 (H, W, 3); those before 0 are of the context, at the size of the others."""
        if number >= 0:
            return np.asarray(Image.open(io.BytesIO(self.pictures.read(number))))
        height, width = self.frame(0).shape[:2]
        frame = self.prompt.context.frames[number]
        is_fit = frame.shape[:2] == (height, width)
        return frame if is_fit else np.asarray(Image.fromarray(frame).resize((width, height)))

    def seen(self, start: int, count: int) -> list[tuple[int, bytes]]:
        """Return PNG files of frames [start, start + count), fewer at the end; frame -1 is the last of the context."""
        least = -1 if self.prompt.past else 0
        if not least <= start < max(self.num_frames, least + 1):
            raise ValueError(f"frame {start} was asked for: the walk has {self.num_frames} frames")
        last = [(-1, as_png(self.prompt.context.frames[-1]))] if start == -1 else []
        numbers = range(max(start, 0), min(start + count, self.num_frames))
        return [*last, *((number, self.pictures.read(number)) for number in numbers)]

    def actions_file(self) -> bytes:
        """Return the actions into the frames of context and walk as JSON, as `--actions` and dataset makers read it."""
        before = self.space.of_array(self.prompt.context.actions)
        after = self.prompt.actions[: self.num_frames]
        return json.dumps([self.space.stored(action) for action in [*before, *after]]).encode()

    def close(self) -> None:
        """End the rollout and forget what was seen."""
        self.suspend()
        self.pictures.close()
