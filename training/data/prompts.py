"""Prompts of samplers: clips of footage, files of a user, and given streams.

    prompt = open_prompt("clip.mp4", sampler)                  # or "data/mine:a/clip"
    for chunk in sampler.frames(Request(seeds=[0], num_frames=64, prompt=prompt)):
        ...

    for piece in followed_frames(request.prompt, request.start, request.num_frames, self.needs, size):
        ...                                                    # inside a sampler that transforms its prompt

Frames are float32 in [-1, 1], computed from uint8 as x / 127.5 - 1, so that all sources give the same bits.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.contract import Size
from training.data.dataset import ClipDataset, to_float
from training.data.footage import Footage, is_dataset
from training.data.frames import check_rate, frame_rate, is_same_rate, iter_frames
from training.data.listing import Remarks, kind_of
from training.data.pictures import center_crop_and_resize, open_pictures
from training.data.stream_prompts import StreamPrompt, pad_end, pad_range, stream_tensor
from training.data.stream_prompts import with_streams as with_streams
from training.sampling import Needs, Prompt, Sampler, Start, starts_of

# (index of the clip, first frame, number of frames) -> int (count,) or float (count, V)
StreamReader = Callable[[int, int, int], np.ndarray]

PIECE_FRAMES = 8  # maximum number of frames that `followed_frames` requests at once
MAX_OPEN = 16  # prompts of seeds


# ----------------------------------------------------------------------------
# One for each video.


class JoinedPrompt(Prompt):
    """A prompt for several videos, from one for each."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts, first = list(prompts), prompts[0]
        self.label, self.text, self.fps = first.label, first.text, first.fps
        self.limit = min((prompt.limit for prompt in prompts if prompt.limit is not None), default=None)

    def frames(self, start: Start, count: int, size: Size) -> Tensor:
        """See `Prompt.frames`."""
        return torch.cat([prompt.frames(first, count, size) for prompt, first in self._firsts(start)])

    def stream(self, name: str, start: Start, count: int) -> Tensor:
        """See `Prompt.stream`."""
        return torch.cat([prompt.stream(name, first, count) for prompt, first in self._firsts(start)])

    def padded_stream(self, name: str, start: Start, count: int) -> Tensor:
        """See `Prompt.padded_stream`."""
        return torch.cat([prompt.padded_stream(name, first, count) for prompt, first in self._firsts(start)])

    def _firsts(self, start: Start) -> Iterator[tuple[Prompt, int]]:
        return zip(self.prompts, starts_of(start, len(self.prompts)), strict=True)


class SeededPrompt(Prompt):
    """Several prompts, of which the seed of a video chooses its own: that of number seed modulo `count`.

    `make` opens the prompt of a number. `of` gives those of other seeds; read directly, this is the prompt of the first
    of `seeds`, and `limit` is the shortest of theirs.
    """

    def __init__(self, make: Callable[[int], Prompt], count: int, seeds: Sequence[int] = (0,)) -> None:
        self.make, self.count = make, count
        self._recent: collections.OrderedDict[int, Prompt] = collections.OrderedDict()
        limits = [self._one(number).limit for number in dict.fromkeys(seed % count for seed in seeds)]
        self.limit = min((limit for limit in limits if limit is not None), default=None)
        self._own = self._one(seeds[0] % count)
        self.label, self.text, self.fps = self._own.label, self._own.text, self._own.fps

    def of(self, seeds: Sequence[int]) -> Prompt:
        """See `Prompt.of`."""
        return JoinedPrompt([self._one(seed % self.count) for seed in seeds])

    def _one(self, number: int) -> Prompt:
        """Return a prompt; few are kept, for each holds files open."""
        if number not in self._recent:
            self._recent[number] = self.make(number)
        self._recent.move_to_end(number)
        if len(self._recent) > MAX_OPEN:
            self._recent.popitem(last=False)
        return self._recent[number]

    def frames(self, start: Start, count: int, size: Size) -> Tensor:
        """See `Prompt.frames`."""
        return self._own.frames(start, count, size)

    def stream(self, name: str, start: Start, count: int) -> Tensor:
        """See `Prompt.stream`."""
        return self._own.stream(name, start, count)

    def padded_stream(self, name: str, start: Start, count: int) -> Tensor:
        """See `Prompt.padded_stream`."""
        return self._own.padded_stream(name, start, count)

    def close(self) -> None:
        """See `Prompt.close`."""
        for prompt in self._recent.values():
            prompt.close()


# ----------------------------------------------------------------------------
# Clips of footage.


class ClipPrompt(Prompt):
    """Windows of footage, one for each video; a single window is used for all videos.

    Frame t of a video is frame `first + t` of its clip, so negative numbers are the frames before `first`. Requesting a
    frame outside the clip raises `ValueError`; with `repeats_edges` the first frame is repeated before the clip, and
    fewer frames are returned at its end.

    `windows` are (index of the clip, first frame); `streams` read the values of streams by name.
    """

    def __init__(
        self,
        footage: Footage,
        windows: Sequence[tuple[int, int]],
        streams: Mapping[str, StreamReader] | None = None,
        repeats_edges: bool = False,
    ) -> None:
        self.footage, self.windows, self.streams = footage, list(windows), dict(streams or {})
        self.repeats_edges, self.fps = repeats_edges, footage.fps

    @property
    def name(self) -> str:
        """Return the name in messages."""
        if len(self.windows) > 1:
            return self.footage.name
        return f"clip {self.footage.clips[self.windows[0][0]].path} of {self.footage.name}"

    @property
    def num_frames(self) -> int:
        """Return the number of frames of the shortest clip."""
        return min(self._num_frames(clip) for clip, _ in self.windows)

    def frames(self, start: Start, count: int, size: Size) -> Tensor:
        """See `Prompt.frames`."""
        windows = self._places(start)
        if self.repeats_edges:
            count = max(0, min(count, *(self._num_frames(clip) - first for clip, first in windows)))
        video = np.empty((len(windows), count, *size, 3), np.uint8)
        for number, (clip, first) in enumerate(windows if count else []):
            wanted = np.arange(first, first + count)
            wanted, places = np.unique(wanted.clip(0) if self.repeats_edges else wanted, return_inverse=True)
            self._check(clip, int(wanted[0]), int(wanted[-1]) + 1)
            video[number] = self.footage.read(clip, size, wanted.tolist())[places]
        return to_float(torch.from_numpy(video), torch.device("cpu"))

    def stream(self, name: str, start: Start, count: int) -> Tensor:
        """See `Prompt.stream`."""
        if name not in self.streams:
            return super().stream(name, start, count)
        found = []
        for clip, first in self._places(start):
            self._check(clip, first, first + count)
            found.append(self.streams[name](clip, first, count))
        return stream_tensor(np.stack(found))

    def padded_stream(self, name: str, start: Start, count: int) -> Tensor:
        """See `Prompt.padded_stream`."""
        if name not in self.streams:
            return super().padded_stream(name, start, count)
        found = []
        for clip, first in self._places(start):
            first, stop = pad_range(first, count, self._num_frames(clip))
            self._check(clip, first, stop)
            found.append(pad_end(self.streams[name](clip, first, stop - first), count))
        return stream_tensor(np.stack(found))

    def _places(self, start: Start) -> list[tuple[int, int]]:
        """Return clip index and first frame of each video."""
        windows = self.windows * (len(start) if len(self.windows) == 1 and not isinstance(start, int) else 1)
        starts = starts_of(start, len(windows))
        return [(clip, first + offset) for (clip, first), offset in zip(windows, starts, strict=True)]

    def _num_frames(self, clip: int) -> int:
        return self.footage.clips[clip].num_frames

    def _check(self, clip: int, begin: int, end: int) -> None:
        if begin < 0 or end > self._num_frames(clip):
            raise ValueError(
                f"context too short: clip {self.footage.clips[clip].path} of {self.footage.name} has "
                f"{self._num_frames(clip)} frames, but {end - begin} from frame {begin} on are needed: give a longer "
                "clip, or a place further from its ends"
            )


# ----------------------------------------------------------------------------
# Files.


class FilePrompt(Prompt):
    """A video file, image, folder of images or npz file as the prompt of every video, read in constant memory.

    Frame t is frame `origin + t` of the file. It is read sequentially, keeping the frames of the last request, and
    reopened when earlier frames are requested. With `origin` None the video continues the file: frames -n ... -1 are
    its last n, found in one pass.

    With `repeats_edges` the first frame is repeated before the file, else such requests raise `ValueError`. Requests
    beyond its end return fewer frames, possibly none. Frames are cropped and resized as those of a dataset; with
    `enlarges` False, smaller frames, and arrays of any other size, raise `ValueError`. With `fps` a video file is
    resampled to that rate.
    """

    def __init__(
        self,
        path: str | Path,
        fps: float | None = None,
        origin: int | None = 0,
        repeats_edges: bool = True,
        enlarges: bool = True,
    ) -> None:
        self.path, self.origin, self.repeats_edges, self.enlarges = Path(path), origin, repeats_edges, enlarges
        self._fps = fps
        self.remarks = Remarks()  # what of a folder is left out
        if self.path.is_dir():
            open_pictures(self.path, self.remarks)
        self.fps = frame_rate(self.path, fps)
        self._readers: dict[Size, _Reader] = {}
        self._ends: dict[Size, _Reader] = {}

    @property
    def name(self) -> str:
        """Return the name in messages."""
        return str(self.path)

    def frames(self, start: Start, count: int, size: Size) -> Tensor:
        """See `Prompt.frames`. Raises `ValueError` for several starts, since all videos have the same frames."""
        first = starts_of(start, 1)[0] if isinstance(start, int) else start[0]
        if not isinstance(start, int) and len(set(start)) > 1:
            raise ValueError(f"{self.path} is the context of all videos, which start at {list(start)}: give one start")
        if self.origin is None:
            reader = self._end(max(-first, 0), size)
            begin = reader.num_read + first
        else:
            reader = self._readers.setdefault(size, self._reader(size))
            begin = self.origin + first
        found = reader.read(begin, count, self.repeats_edges)
        if not self.repeats_edges:
            self._check(reader, first, begin, min(count, -first) - len(found))
        video = np.stack(found) if found else np.empty((0, *size, 3), np.uint8)
        return to_float(torch.from_numpy(video[None]), torch.device("cpu"))

    @property
    def num_frames(self) -> int | None:
        """Return the number of frames of the file, None until its end has been read."""
        readers = [*self._readers.values(), *self._ends.values()]
        return next((reader.num_read for reader in readers if reader.is_ended), None)

    def close(self) -> None:
        """See `Prompt.close`."""
        for reader in [*self._readers.values(), *self._ends.values()]:
            reader.close()

    def _reader(self, size: Size) -> _Reader:
        def fit(frame: np.ndarray) -> np.ndarray:
            if not self.enlarges:
                self._check_size((frame.shape[0], frame.shape[1]), size)
            return center_crop_and_resize(frame, *size)

        return _Reader(lambda: iter_frames(self.path, self._fps), fit)

    def _end(self, count: int, size: Size) -> _Reader:
        """Return a reader that has read the whole file and holds at least its last `count` frames."""
        reader = self._ends.get(size)
        if reader is None or (reader.first > 0 and reader.num_read - reader.first < count):
            reader = self._ends[size] = self._reader(size)
            reader.read_to_end(count)
        return reader

    def _check_size(self, found: Size, wanted: Size) -> None:
        is_array = kind_of(self.path) == "array"
        if found[0] < wanted[0] or found[1] < wanted[1] or (is_array and found != wanted):
            raise ValueError(
                f"the frames of {self.path} are {found[0]}x{found[1]}, the model takes {wanted[0]}x{wanted[1]}: give "
                + ("an array of that size" if is_array else "a video of at least that size")
            )

    def _check(self, reader: _Reader, first: int, begin: int, missing: int) -> None:
        """Raise `ValueError` if context frames are missing."""
        if begin >= 0 and missing <= 0:
            return
        if self.origin is None:
            raise ValueError(
                f"context too short: {self.path} has {reader.num_read} frames, but the last {-first} are needed: give "
                "a longer video"
            )
        if begin < 0:
            raise ValueError(
                f"context too short: {self.path} has {self.origin} frames before the one that the video is to begin "
                f"at, but {-first} are needed: begin at frame {-first} or later"
            )
        raise ValueError(
            f"context too short: {self.path} has {reader.num_read} frames, but the video is to begin at its frame "
            f"{self.origin}: begin at frame {reader.num_read} or earlier"
        )


class _Reader:
    """A sequential reader that holds the last frames, each resized when it is first held."""

    def __init__(self, open: Callable[[], Iterator[np.ndarray]], fit: Callable[[np.ndarray], np.ndarray]) -> None:
        self._open, self._fit = open, fit
        self._frames: Iterator[np.ndarray] = iter(())
        self._begin()

    def _begin(self) -> None:
        self.close()
        self._frames = self._open()
        self._held: collections.deque[np.ndarray] = collections.deque()
        self.first = 0  # number of the first frame held
        self.is_ended = False

    def close(self) -> None:
        """Stop decoding, while the interpreter is whole."""
        if isinstance(self._frames, Generator):
            self._frames.close()

    @property
    def num_read(self) -> int:
        """Return the number of frames read so far."""
        return self.first + len(self._held)

    def read(self, begin: int, count: int, repeats_first: bool) -> list[np.ndarray]:
        """Return frames [begin, begin + count), without those after the end; the first is repeated before the
        beginning.
        """
        low = max(begin, 0)
        if low < self.first:
            self._begin()
        while self.num_read < begin + count and not self.is_ended:
            self._advance(keeps=self.num_read >= low)
        while self.first < low and self._held and not self.is_ended:
            self._held.popleft()
            self.first += 1
        found = list(itertools.islice(self._held, low - self.first, max(begin + count, low) - self.first))
        repeats = min(count, -begin) if repeats_first and begin < 0 else 0
        if repeats == 0:
            return found
        if not found and self.num_read == 0:
            self._advance(keeps=True)
        return [*[self._held[0]] * repeats, *found] if self._held else []

    def read_to_end(self, count: int) -> None:
        """Read all frames and hold the last `count` of them."""
        held: collections.deque[np.ndarray] = collections.deque(maxlen=count)
        num_frames = 0
        for frame in self._frames:
            held.append(frame)
            num_frames += 1
        self.is_ended = True
        self._held = collections.deque(self._fit(frame) for frame in held)
        self.first = num_frames - len(held)

    def _advance(self, keeps: bool) -> None:
        """Read a frame; without `keeps`, discard it and all held frames."""
        frame = next(self._frames, None)
        if frame is None:
            self.is_ended = True
        elif keeps:
            self._held.append(self._fit(frame))
        else:
            self.first = self.num_read + 1
            self._held.clear()


# ----------------------------------------------------------------------------
# Transforming a prompt.


def followed_frames(
    prompt: Prompt, start: Start, num_frames: int | None, needs: Needs, size: Size, piece: int = PIECE_FRAMES
) -> Iterator[Tensor]:
    """Yield frames [start - past, stop + future) of a prompt that a sampler transforms, float32 (N or 1, 3, T, h, w).

    `past` and `future` are those of `needs`; the sampler generates frames [start, stop). `stop` is `start +
    num_frames`, or the end of the prompt if that comes first; the last frame is repeated after the end. Pieces hold at
    most `piece` frames. Raises `ValueError` if the prompt ends before `start`.
    """
    stop = None if num_frames is None else num_frames + needs.future
    done = -needs.past
    last: Tensor | None = None
    while stop is None or done < stop:
        count = piece if stop is None else min(piece, stop - done)
        frames = prompt.frames(_shifted(start, done), count, size)
        done += frames.shape[2]
        if frames.shape[2]:
            last = frames[:, :, -1:]
            yield frames
        if frames.shape[2] < count:
            break
    else:
        return
    if done <= 0 or last is None:
        raise ValueError(_ended_before(prompt, start))
    end = done if num_frames is None else min(done, num_frames)
    for first in range(done, end + needs.future, piece):
        yield last.expand(-1, -1, min(piece, end + needs.future - first), -1, -1)


def _shifted(start: Start, offset: int) -> Start:
    return start + offset if isinstance(start, int) else [first + offset for first in start]


def _ended_before(prompt: Prompt, start: Start) -> str:
    """Return the error message for a prompt without frames from `start` on."""
    first = start if isinstance(start, int) else max(start)
    while isinstance(prompt, StreamPrompt):
        prompt = prompt.prompt
    if isinstance(prompt, ClipPrompt | FilePrompt):
        return f"{prompt.name} has {prompt.num_frames} frames, none at {first} or later: use a smaller --start"
    return f"the context has no frames at {first} or later: use a smaller --start"


# ----------------------------------------------------------------------------
# Opening.


def open_prompt(
    path: str,
    sampler: Sampler,
    fps: float | None = None,
    clip: str | None = None,
    origin: int | None = None,
    streams: Callable[[ClipDataset], Mapping[str, StreamReader]] | None = None,
) -> Prompt:
    """Return the prompt at a path: a video, image or npz file, a folder of images, a dataset, or ROOT:CLIP of one.

    A sampler that transforms its prompt gets frame `origin` (0) as frame 0, preceded by repeats of the first frame. Any
    other sampler continues the video from frame `origin`: by default its end, or, for a sampler that needs streams of a
    dataset, frame `past` of the clip, whose streams cover the frames after it. Without CLIP the first clip that is long
    enough is used. With `fps` video files are resampled to that rate. `streams` opens the readers of a dataset's
    streams.

    Raises `ValueError` for a missing path or clip, and, if a video is continued, for a frame rate other than the
    sampler's, for smaller frames, and for arrays and datasets of another size.
    """
    needs, size = sampler.needs, sampler.needs.size or sampler.size
    if not needs.frames and not needs.streams:
        raise ValueError(f"{path} was given as context, but this model takes none: leave out --context")
    root, clip = _split_clip(path, clip)
    if is_dataset(root):
        return _open_clip(ClipDataset(root, [size]), sampler, fps, clip, origin, streams)
    if not Path(root).exists():
        raise ValueError(
            f"there is no {root}: give a video or npz file, a folder of images, a dataset, or ROOT:CLIP of one"
        )
    if clip is not None:
        raise ValueError(f"{root} is no dataset, so it has no clip {clip}: give the root of one, or leave out the clip")
    if not needs.frames:
        names = ", ".join(needs.streams)
        raise ValueError(f"{root} has frames, but the model needs {names} alone: give a dataset, or --{names}")
    if needs.follows:
        return FilePrompt(root, fps, origin or 0)
    prompt = FilePrompt(root, fps, origin, repeats_edges=False, enlarges=False)
    if fps is None and not is_same_rate(prompt.fps, sampler.fps):
        raise ValueError(
            f"{root} has {prompt.fps:g} frames per second, the model was trained at {sampler.fps:g}: give "
            f"--fps={sampler.fps:g}, at which the video is then read"
        )
    return prompt


def _split_clip(path: str, clip: str | None) -> tuple[str, str | None]:
    """Split ROOT:CLIP, where ROOT is a dataset, into path and clip; file names may contain colons."""
    if clip is None and not Path(path).exists():
        for place, character in enumerate(path):
            if character == ":" and is_dataset(path[:place]):
                return path[:place], path[place + 1 :]
    return path, clip


def _open_clip(
    dataset: ClipDataset,
    sampler: Sampler,
    fps: float | None,
    clip: str | None,
    origin: int | None,
    streams: Callable[[ClipDataset], Mapping[str, StreamReader]] | None,
) -> ClipPrompt:
    """Return the prompt of one clip of a dataset; see `open_prompt`."""
    needs = sampler.needs
    check_rate(dataset.fps, fps, str(dataset.path))
    if not needs.follows and fps is None and not is_same_rate(dataset.fps, sampler.fps):
        raise ValueError(
            f"{dataset.path} has {dataset.fps:g} frames per second, the model was trained at {sampler.fps:g}: give a "
            f"dataset of that rate, or --fps={dataset.fps:g} to take it all the same"
        )
    if clip is None:
        least = max(needs.past + bool(needs.streams), origin or 0, 1)
        index = dataset.eligible((origin or 0) + 1 if needs.follows else least)[0]
    else:
        found = {item.path: number for number, item in enumerate(dataset.clips)}
        if clip not in found:
            some = ", ".join([*itertools.islice(found, 3), *(["..."] if len(found) > 3 else [])])
            raise ValueError(f"{dataset.path} has no clip {clip}: give one of its {len(found)}, which are {some}")
        index = found[clip]
    if origin is None:
        origin = 0 if needs.follows else needs.past if needs.streams else dataset.clips[index].num_frames
    readers = streams(dataset) if streams and needs.streams else {}
    return ClipPrompt(dataset, [(index, origin)], readers, repeats_edges=needs.follows)
