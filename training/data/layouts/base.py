"""What all published layouts have in common: clips, their frames at the size in which they are stored, and streams."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.data.frame_cache import FrameCache
from training.data.listing import Remarks
from training.data.resizing import RESIZERS
from training.data.shards import MAX_EDGE, Clip, Size
from training.data.stream_files import to_list
from training.data.stream_values import Values
from training.data.streams import StreamShard

_CHUNK_FRAMES = 32  # frames that are read at once
_ENDS_BYTES = 1 << 16  # at the begin and at the end of a file, by which it is recognised


class Layout(ABC):
    """The clips of a published layout.

    Subclasses set the attributes. `split` is the part of the data that is read, such as "train", if the layout has
    such. Reading is safe in several threads, and a copy in another process reopens its files.
    """

    title: str  # of the layout, for messages
    resizer: str = "lanczos"  # with which the publisher reads frames; a key of RESIZERS
    path: Path
    split: str | None = None
    clips: list[Clip]
    fps: float | None = None  # frames per second, if the files tell
    remarks: Remarks

    @property
    def name(self) -> str:
        """Return the name in messages and results."""
        return self.path.resolve().name + (f"/{self.split}" if self.split else "")

    @property
    def root(self) -> Path:
        """Return the folder beside whose contents tokens and labels are kept."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    @abstractmethod
    def size(self) -> Size:
        """Return height and width of the frames of the first clip."""

    @abstractmethod
    def read(self, clip: int, frames: Sequence[int]) -> np.ndarray:
        """Return frames of clip number `clip`, in ascending order: uint8 (T, H, W, 3) as they are stored.

        Raises `ValueError` naming the file and the clip if they cannot be read.
        """

    def iterate(self, clip: int) -> Iterator[np.ndarray]:
        """Yield all frames of clip number `clip` in order, each uint8 (H, W, 3), in constant memory."""
        num_frames = self.clips[clip].num_frames
        for start in range(0, num_frames, _CHUNK_FRAMES):
            yield from self.read(clip, range(start, min(start + _CHUNK_FRAMES, num_frames)))

    @abstractmethod
    def fingerprint(self, clip: int) -> bytes:
        """Return bytes that change if the frames of a clip do, found without reading them."""

    def stream_names(self) -> list[str]:
        """Return the names of the streams that the layout has, such as "actions"."""
        return []

    def stream_shards(self, name: str) -> dict[Path, StreamShard]:
        """Return the values of a stream of all clips, by file; raise `ValueError` if they cannot be read."""
        raise KeyError(name)

    def values(self, name: str, clips: Sequence[int]) -> dict[str, list[Any]]:
        """Return the values of a stream of some clips, by clip, as JSON has them."""
        wanted = {self.clips[clip].path for clip in clips}
        found = {}
        for shard in self.stream_shards(name).values():
            stops = np.cumsum(shard.lengths)
            for clip, stop, length in zip(shard.clips, stops.tolist(), shard.lengths.tolist(), strict=True):
                if clip in wanted:
                    found[clip] = to_list(Values(shard.values.array[stop - length : stop], shard.values.names))
        return found

    def texts(self) -> dict[str, list[str]]:
        """Return the descriptions of clips, by clip, if the layout has such."""
        return {}


class LayoutStore:
    """The frames of a layout at one size, to which they are brought by the layout's own filter.

    It takes the place of a `FrameStore` of a dataset.
    """

    def __init__(self, layout: Layout, size: Size) -> None:
        if max(size) > MAX_EDGE:
            raise ValueError(
                f"frames of {size[0]}x{size[1]} were asked for, expected edges of at most {MAX_EDGE} pixels"
            )
        self.layout, self.size = layout, size
        self.directory, self.clips = layout.path, layout.clips
        self.index = {clip.path: number for number, clip in enumerate(layout.clips)}
        self.first_frames = np.cumsum([0, *(clip.num_frames for clip in layout.clips)])
        self.cache: FrameCache | None = None

    @property
    def num_frames(self) -> int:
        """Return the number of frames of all clips."""
        return int(self.first_frames[-1])

    def fingerprint(self, clip: int) -> bytes:
        """Return bytes that change if the frames of clip number `clip` do."""
        return f"{self.layout.resizer} {self.size}".encode() + self.layout.fingerprint(clip)

    def num_bytes(self, clip: int) -> int:
        """Return the number of bytes of a clip's frames, decoded."""
        return self.clips[clip].num_frames * self.size[0] * self.size[1] * 3

    def content_key(self, numbers: Sequence[int] | None = None) -> str:
        """Return a key that identifies these frames in this order, independent of their location."""
        digest = hashlib.blake2b(f"{self.layout.title} {self.size}".encode(), digest_size=16)
        for number in range(len(self.clips)) if numbers is None else numbers:
            digest.update(f"{self.clips[number].num_frames} {self.clips[number].path}\n".encode())
            digest.update(self.fingerprint(number))
        return digest.hexdigest()

    def read(self, clip: int, frames: Sequence[int], out: np.ndarray) -> None:
        """Read the given frames of clip number `clip` into `out`, contiguous uint8 (T, H, W, 3)."""
        assert len(frames) == len(out) and out.flags.c_contiguous
        assert min(frames) >= 0 and max(frames) < self.clips[clip].num_frames, (
            f"no frames {frames} in {self.clips[clip]}"
        )
        rows = self.first_frames[clip] + np.asarray(frames)
        missing = np.arange(len(rows)) if self.cache is None else self.cache.fetch(rows, out)
        if not len(missing):
            return
        numbers, places = np.unique(np.asarray(frames)[missing], return_inverse=True)
        stored = self.layout.read(clip, numbers.tolist())
        fitted = stored if stored.shape[1:3] == self.size else RESIZERS[self.layout.resizer](stored, self.size)
        out[missing] = fitted[places]
        if self.cache is not None:
            for position in missing:
                self.cache.store(rows[position], out[position])


# ----------------------------------------------------------------------------
# Files.


def file_fingerprint(path: str | os.PathLike[str]) -> bytes:
    """Return a hash of the size, the begin and the end of a file."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.blake2b(f"{size}".encode(), digest_size=16)
        for start in (0, max(size - _ENDS_BYTES, _ENDS_BYTES)):
            file.seek(start)
            digest.update(file.read(_ENDS_BYTES))
    return digest.digest()


def check_frames(shape: Sequence[Any], dtype: Any, place: str) -> Size:
    """Return height and width of frames of a stored shape (..., H, W, 3); raise `ValueError` unless they are such."""
    if dtype != np.uint8 or len(shape) < 3 or shape[-1] != 3:
        raise ValueError(
            f"{place} is {dtype} of shape {list(shape)}, expected frames uint8 of shape [height, width, 3]"
        )
    height, width = int(shape[-3]), int(shape[-2])
    if not 0 < height <= MAX_EDGE or not 0 < width <= MAX_EDGE:
        raise ValueError(f"{place} has frames of {height}x{width}, expected edges from 1 to {MAX_EDGE} pixels")
    return height, width
