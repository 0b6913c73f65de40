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
import math
import operator
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Protocol

import numpy as np

from dnnlib.download import file_sha256
from dnnlib.text import quote
from dnnlib.util import size_name
from training.data.arrays import ARRAY_SUFFIX, check_array, load_array
from training.data.clip_files import ClipFile, in_threads, open_clip_files
from training.data.dataset import ClipDataset
from training.data.frames import RATE_TOLERANCE, check_rate
from training.data.frames import frame_rate as frame_rate
from training.data.frames import iter_frames as iter_frames
from training.data.frames import reading_rate as reading_rate
from training.data.layouts.base import Layout
from training.data.layouts.find import find_special
from training.data.listing import (
    Remarks,
    generated_stem,
    kind_of,
)
from training.data.parts import SIZE_FOLDER, has_own_layout
from training.data.shards import Clip, Size


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


class Files:
    """Videos below a folder, by path: video files, npz files with an array of one video, and folders of images.

    With `fps` video files are resampled to that rate. Of the files that generate.py wrote for one video, that of the
    largest frames is taken, without loss if there is one. `remarks` name what is left out. Raises `ValueError` if sizes
    or frame rates differ.
    """

    def __init__(self, path: Path, fps: float | None = None) -> None:
        self.path, self.name, self.remarks = path, path.resolve().name, Remarks()
        opened = open_clip_files(path, self.remarks, fps)
        in_threads(operator.attrgetter("size"), opened)  # which decodes a frame of each video
        self.videos = _best_outputs(opened, self.remarks)
        self.clips = [video.clip for video in self.videos]
        first = self.videos[0]
        for video in self.videos:
            if video.size != first.size:
                sizes = ["{}x{}".format(*v.size) for v in (first, video)]
                raise ValueError(
                    f"{path} mixes sizes: {first.clip.path} is {sizes[0]} and {video.clip.path} is {sizes[1]}; move "
                    "those of one size into a folder of their own"
                )
        self.size = first.size
        rates = [video.fps for video in self.videos if video.fps is not None]
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
        video = self.videos[clip_index].read(frames)
        if video.shape != (len(frames), *size, 3):
            raise ValueError(
                f"{self.path / self.clips[clip_index].path} gave {len(video)} of the frames {frames[0]} to "
                f"{frames[-1]}: its file is damaged, so make or copy it again"
            )
        return video

    def content(self) -> str:
        """Return 16 hex digits that identify the contents of the files and the version of the reader."""
        digest = hashlib.sha256(f"{self.fps}".encode())
        for video in self.videos:
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

    @property
    def remarks(self) -> list[str]:
        """Return lines that say what was left out, and what was not taken as it stands."""
        return list(self.footage.remarks.lines()) if isinstance(self.footage, Files) else []

    @functools.cached_property
    def content(self) -> str:
        """Return 16 hex digits that identify the frames, independent of their location."""
        if isinstance(self.footage, ClipDataset):
            if self.footage.layout is not None:
                return self.footage.store(self.size).content_key()[:16]
            return dataset_id(self.footage.path, self.size)
        assert isinstance(self.footage, (Files, Arrays)), "the forms there are"
        return self.footage.content()


def open_videos(path: str | Path, size: Size | None = None, fps: float | None = None) -> Videos:
    """Return the videos at a path: a dataset, a video file, an npz file, or a folder of videos or of folders of images.

    `size` selects one of several sizes of a dataset. With `fps` video files are resampled to that rate; other footage
    must have it. Raises `ValueError` with a remedy for anything that cannot be read or does not match.
    """
    path = Path(path)
    if is_dataset(path):
        return _open_dataset(path, size, fps)
    if not path.exists():
        raise ValueError(f"there is no {path}: give a dataset, a video or npz file, or a folder of videos or images")
    if path.is_file() and kind_of(path) == "array":
        array = load_array(path)
        found: Arrays | Files = Arrays(array if array.ndim == 5 else [array], path.name)
        side = Videos(found, found.size, "array")
    else:
        found = Files(path, fps)
        side = Videos(found, found.size, "files")
    if size is not None and size != side.size:
        kinds = {kind_of(file) for video in found.videos for file in video.files} if isinstance(found, Files) else set()
        maker = (
            {"video": "videos", "picture": "frames"}.get(str(kinds.pop())) if path.is_dir() and len(kinds) == 1 else ""
        )
        command = f"python -m dataset_tools.make_dataset_from_{maker} {quote(path)} DATASET --sizes={size[0]}x{size[1]}"
        raise ValueError(
            f"the frames of {path} are {side.size[0]}x{side.size[1]}, not {size[0]}x{size[1]}: "
            + (f"make a dataset of that size: {command}" if maker else "give footage of that size")
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
    """Return whether a path is the root of a dataset, or footage in another layout than the files of a folder.

    Such are HDF5 files, lists of frames, splits, and videos with streams.
    """
    return bool(dataset_sizes(path)) or _special(Path(path)) is not None


def _special(path: Path) -> Layout | None:
    return None if has_own_layout(path) else find_special(path)


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
    layout = _special(path)
    sizes = dataset_sizes(path) if layout is None else [size or layout.size]
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


def _best_outputs(videos: list[ClipFile], remarks: Remarks) -> list[ClipFile]:
    """Return the videos without further files of the same generated ones, such as those of a first stage."""
    best: dict[str, ClipFile] = {}
    for video in videos:
        stem = generated_stem(video.clip.path) or video.clip.path
        best[stem] = max(best.get(stem, video), video, key=_quality)
    for video in videos:
        if best.get(generated_stem(video.clip.path) or video.clip.path) is not video:
            remarks.add("Left out, a further file of a generated video", video.clip.path)
    return list(best.values())


def _quality(video: ClipFile) -> tuple[int, bool, int]:
    """Return the key by which files of one generated video are compared: their size, their name, and what is lost."""
    path = PurePath(video.clip.path)
    formats = (".gif", ".webm", ".mp4", ARRAY_SUFFIX, "")  # a folder has no suffix
    lost = formats.index(path.suffix) if path.suffix in formats else -1
    return math.prod(video.size), path.stem.endswith("_video"), lost
