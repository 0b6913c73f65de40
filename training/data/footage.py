"""Read videos in any supported form: datasets, video files, folders of images, npz arrays.

    side = open_videos("outputs/samples", fps=None)
    frames = side.footage.read(0, side.size, range(16))        # uint8 (16, H, W, 3)

    for frame in iter_frames("clip.mp4"):                      # uint8 (H, W, 3), in constant memory
        ...

All forms have the methods of `training.data.dataset.ClipDataset`, so that metrics do not depend on the form.
`training.data.frames` defines how files are decoded to frames.
"""

import functools
import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from dnnlib.download import file_sha256
from dnnlib.util import size_name
from dnnlib.video import iter_video_frames, scan
from training.data.arrays import ARRAY_SUFFIX, check_array, load_array
from training.data.dataset import ClipDataset
from training.data.frames import RATE_TOLERANCE, VIDEO_SUFFIXES, check_rate, find_videos, reading_rate
from training.data.frames import frame_rate as frame_rate
from training.data.frames import iter_frames as iter_frames
from training.data.pictures import find_frames, list_pictures, read_image
from training.data.shards import Clip, Size

READ_THREADS = 4
ARRAYS_HELD = 4
SIZE_FOLDER = re.compile(r"(\d{4,})x(\d{4,})")
READER_VERSION = 3  # increment when the decoded pixels of images or videos change


class Footage(Protocol):
    """A collection of videos: a `ClipDataset`, `Files` or `Arrays`."""

    @property
    def name(self) -> str:
        """Return the name in messages and results."""
        ...

    @property
    def fps(self) -> float | None:
        """Return the number of frames per second, None if unknown."""
        ...

    @property
    def clips(self) -> Sequence[Clip]:
        """Return path and number of frames of each video."""
        ...

    def eligible(self, num_frames: int) -> list[int]:
        """Return the indices of the videos of at least `num_frames` frames; raise `ValueError` if there is none."""
        ...

    def read(self, clip_index: int, size: Size, frames: Sequence[int]) -> np.ndarray:
        """Return frames of a video, in ascending order: uint8 (T, H, W, 3)."""
        ...


# ----------------------------------------------------------------------------
# Videos in memory, and those of a folder.


class Arrays:
    """Videos in memory, uint8 (T, H, W, 3) each: one array (N, T, H, W, 3), or videos of several lengths."""

    def __init__(self, videos: Iterable[np.ndarray], name: str, fps: float | None = None) -> None:
        self.videos = list(videos)
        self.name, self.fps = name, fps
        if not self.videos:
            raise ValueError(f"{name} holds no video: give at least one")
        for video in self.videos:
            check_array(video, name)
        self.clips = [Clip(f"{number:06d}", len(video)) for number, video in enumerate(self.videos)]
        if len({video.shape[1:] for video in self.videos}) > 1:
            raise ValueError(f"the videos of {name} differ in size: bring all to one")
        self.size = (self.videos[0].shape[1], self.videos[0].shape[2])

    def eligible(self, num_frames: int) -> list[int]:
        """Return the indices of the videos of at least `num_frames` frames; raise `ValueError` if there is none."""
        return _eligible(self, num_frames)

    def read(self, clip_index: int, size: Size, frames: Sequence[int]) -> np.ndarray:
        """Return frames of a video: uint8 (T, H, W, 3)."""
        assert size == self.size, f"frames are {self.size}"
        return self.videos[clip_index][list(frames)]

    def content(self) -> str:
        """Return 16 hex digits that identify the frames."""
        digest = hashlib.sha256()
        for video in self.videos:
            digest.update(str(video.shape).encode() + np.ascontiguousarray(video).tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class _Opened:
    """One video of a folder."""

    clip: Clip
    size: Size
    fps: float | None
    read: Callable[[Sequence[int]], np.ndarray]  # ascending frame numbers -> uint8 (T, H, W, 3)
    files: tuple[Path, ...]
    version: str = ""  # of how the files are read


class Files:
    """Videos below a folder, by path: video files, npz files with an array of one video, or folders of images.

    With `fps` video files are resampled to that rate. Raises `ValueError` if sizes or frame rates differ.
    """

    def __init__(self, path: Path, fps: float | None = None) -> None:
        self.path, self.name = path, path.resolve().name
        found = _find(path)
        with ThreadPoolExecutor(READ_THREADS) as pool:
            self._videos = list(pool.map(functools.partial(_open, root=path, fps=fps), found))
        self.clips = [video.clip for video in self._videos]
        first = self._videos[0]
        for video in self._videos:
            if video.size != first.size:
                sizes = ["{}x{}".format(*v.size) for v in (first, video)]
                raise ValueError(
                    f"{path} mixes sizes: {first.clip.path} is {sizes[0]} and {video.clip.path} is {sizes[1]}; move "
                    "those of one size into a folder of their own"
                )
        self.size = first.size
        rates = [video.fps for video in self._videos if video.fps is not None]
        if rates and max(rates) > min(rates) * (1 + RATE_TOLERANCE):
            raise ValueError(
                f"{path} mixes frame rates from {min(rates):g} to {max(rates):g}: give --fps={min(rates):g}, at which "
                "all are then read"
            )
        self.fps = rates[0] if rates else None

    def eligible(self, num_frames: int) -> list[int]:
        """Return the indices of the videos of at least `num_frames` frames; raise `ValueError` if there is none."""
        return _eligible(self, num_frames)

    def read(self, clip_index: int, size: Size, frames: Sequence[int]) -> np.ndarray:
        """Return frames of a video, in ascending order: uint8 (T, H, W, 3)."""
        assert size == self.size, f"frames are {self.size}"
        video = self._videos[clip_index].read(frames)
        if video.shape != (len(frames), *size, 3):
            raise ValueError(
                f"{self.path / self.clips[clip_index].path} gave {len(video)} of the frames {frames[0]} to "
                f"{frames[-1]}: its file is damaged, so make or copy it again"
            )
        return video

    def content(self) -> str:
        """Return 16 hex digits that identify the contents of the files and the version of the reader."""
        digest = hashlib.sha256(f"{self.fps}".encode())
        for video in self._videos:
            digest.update(f"{video.clip.path} {video.clip.num_frames}{video.version}".encode())
            for file in video.files:
                digest.update(file_sha256(file).encode())
        return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------
# Opening.


@dataclass(frozen=True)
class Videos:
    """Footage with the size at which it is read."""

    footage: Footage
    size: Size
    kind: str  # "dataset", "files" or "array"

    @functools.cached_property
    def content(self) -> str:
        """Return 16 hex digits that identify the frames, independent of their location."""
        if isinstance(self.footage, ClipDataset):
            return dataset_id(self.footage.path, self.size)
        assert isinstance(self.footage, (Files, Arrays)), "the forms there are"
        return self.footage.content()


def open_videos(path: str | Path, size: Size | None = None, fps: float | None = None) -> Videos:
    """Return the videos at a path: a dataset, a video file, an npz file, or a folder of videos or of folders of images.

    `size` selects one of several sizes of a dataset. With `fps` video files are resampled to that rate; other footage
    must have it. Raises `ValueError` with a remedy for anything that cannot be read or does not match.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"there is no {path}: give a dataset, a video or npz file, or a folder of videos or images")
    if is_dataset(path):
        return _open_dataset(path, size, fps)
    if path.suffix.lower() == ARRAY_SUFFIX:
        array = load_array(path)
        found: Arrays | Files = Arrays(array if array.ndim == 5 else [array], path.name)
        side = Videos(found, found.size, "array")
    else:
        found = Files(path, fps)
        side = Videos(found, found.size, "files")
    if size is not None and size != side.size:
        raise ValueError(
            f"the frames of {path} are {side.size[0]}x{side.size[1]}, not {size[0]}x{size[1]}: make a dataset of that "
            f"size: python -m dataset_tools.make_dataset_from_videos {path} DATASET --sizes={size[0]}x{size[1]}"
        )
    return side


def dataset_sizes(root: str | Path) -> list[Size]:
    """Return the frame sizes (height, width) of the dataset at `root`, empty if there is no dataset."""
    root = Path(root)
    if not root.is_dir():
        return []
    folders = [match for match in map(SIZE_FOLDER.fullmatch, sorted(path.name for path in root.iterdir())) if match]
    return [(int(match[1]), int(match[2])) for match in folders if any((root / match[0]).glob("*.zip"))]


def is_dataset(path: str | Path) -> bool:
    """Return whether a path is the root of a dataset."""
    return bool(dataset_sizes(path))


def dataset_id(root: str | Path, size: Size) -> str:
    """Return 16 hex digits that identify the frames of one size of a dataset.

    They are a hash of each shard's name and size, and of the path, length and CRC of each member from the central
    directory of the zip; no frame is read.
    """
    digest = hashlib.sha256()
    for shard in sorted((Path(root) / size_name(size)).glob("*.zip")):
        digest.update(_canonical([shard.name, shard.stat().st_size]))
        with zipfile.ZipFile(shard) as archive:
            for member in sorted(archive.infolist(), key=lambda member: member.filename):
                digest.update(_canonical([member.filename, member.file_size, member.CRC]))
    return digest.hexdigest()[:16]


def _open_dataset(path: Path, size: Size | None, fps: float | None) -> Videos:
    sizes = dataset_sizes(path)
    if size not in sizes and (size or len(sizes) > 1):
        names = ", ".join(f"{h}x{w}" for h, w in sizes)
        wanted = f"{size[0]}x{size[1]} was asked for" if size else "it has several"
        raise ValueError(f"the dataset {path} has frames of {names} and {wanted}: give one of them by --size")
    chosen = size or sizes[0]
    dataset = ClipDataset(path, [chosen])
    check_rate(dataset.fps, fps, str(path))
    return Videos(dataset, chosen, "dataset")


# ----------------------------------------------------------------------------
# Details.


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _eligible(footage: Footage, num_frames: int) -> list[int]:
    found = [number for number, clip in enumerate(footage.clips) if clip.num_frames >= num_frames]
    if not found:
        longest = max(clip.num_frames for clip in footage.clips)
        raise ValueError(
            f"{footage.name} has no clip of {num_frames} frames, which are needed; the longest of its "
            f"{len(footage.clips)} videos has {longest}; give longer videos or ask for fewer frames"
        )
    return found


def _find(path: Path) -> list[Path]:
    """Return the video and npz files at or below a path, else the folders that hold images."""
    if path.is_file():
        return [path]
    suffixes = (*VIDEO_SUFFIXES, ".gif", ARRAY_SUFFIX)
    found = find_videos(path, suffixes) or [path / folder for folder in find_frames(path)]
    if not found:
        raise ValueError(
            f"{path} holds no video file ({', '.join(suffixes)}) and no folder of images: give a folder that does, "
            "or the root of a dataset"
        )
    return found


def _open(path: Path, root: Path, fps: float | None) -> _Opened:
    name = path.name if path == root else path.relative_to(root).as_posix()
    if path.is_dir():
        files = tuple(list_pictures(path))
        height, width, _ = read_image(files[0]).shape
        read = functools.partial(_read_pictures, files, (height, width))
        return _Opened(Clip(name, len(files)), (height, width), None, read, files, f" {READER_VERSION}")
    if path.suffix.lower() == ARRAY_SUFFIX:
        array = _held_array(path)
        if array.ndim != 4:
            raise ValueError(f"{path} holds several videos; in a folder each npz file holds one: give it by itself")
        size = (array.shape[1], array.shape[2])
        return _Opened(Clip(name, len(array)), size, None, functools.partial(_read_array, path), (path,))
    timing = scan(path)
    rate, resampled = reading_rate(path, fps)
    num_frames = timing.num_frames if resampled is None else timing.count(resampled)
    first = next(iter_video_frames(path))
    read = functools.partial(_read_video, path, resampled)
    version = f" {READER_VERSION}"
    return _Opened(Clip(name, num_frames), (first.shape[0], first.shape[1]), rate, read, (path,), version)


def _read_pictures(files: Sequence[Path], size: Size, frames: Sequence[int]) -> np.ndarray:
    video = np.empty((len(frames), *size, 3), np.uint8)
    for number, frame in enumerate(frames):
        image = read_image(files[frame])
        if image.shape[:2] != size:
            raise ValueError(
                f"{files[frame]} is {image.shape[0]}x{image.shape[1]}, but the first image of its folder is "
                f"{size[0]}x{size[1]}: bring all to one size: python -m dataset_tools.make_dataset_from_frames"
            )
        video[number] = image
    return video


@functools.lru_cache(maxsize=ARRAYS_HELD)
def _held_array(path: Path) -> np.ndarray:
    return load_array(path)


def _read_array(path: Path, frames: Sequence[int]) -> np.ndarray:
    return _held_array(path)[list(frames)]


def _read_video(path: Path, fps: float | None, frames: Sequence[int]) -> np.ndarray:
    numbers, wanted = range(frames[0], frames[-1] + 1), set(frames)
    decoded = iter_video_frames(path, fps, frames=numbers)
    found = [frame for number, frame in zip(numbers, decoded, strict=False) if number in wanted]
    return np.stack(found) if found else np.empty((0, 0, 0, 3), np.uint8)
