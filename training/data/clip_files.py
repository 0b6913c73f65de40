"""Clips that lie in files of a folder: videos, arrays, and folders of images."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from dnnlib.video import pixel_factor, scan
from training.data.arrays import ARRAY_SUFFIX, load_array, read_array_shape
from training.data.frames import iter_video, reading_rate
from training.data.listing import VIDEO_SUFFIXES, Listing, Remarks, clip_name, kind_of, list_footage
from training.data.pictures import PictureClip, picture_clips
from training.data.shards import Clip, Size
from training.data.video_index import VideoFacts, VideoIndex

READ_THREADS = 4
ARRAYS_HELD = 4
READER_VERSION = 3  # increment when the decoded pixels of images or videos change


class NoFootage(ValueError):
    """A folder without any video, array or image."""


@dataclass(frozen=True)
class ClipFile:
    """One clip. `find_size` may decode a frame; `streams` are the files with values of each frame, by stream."""

    clip: Clip
    fps: float | None
    find_size: Callable[[], Size]
    read: Callable[[Sequence[int]], np.ndarray]  # ascending frame numbers -> uint8 (T, H, W, 3)
    files: tuple[Path, ...]
    version: str = ""  # of how the files are read
    streams: dict[str, Path] = field(default_factory=dict)
    iterate: Callable[[], Iterator[np.ndarray]] | None = None  # all frames, if they are read best in one pass

    @functools.cached_property
    def size(self) -> Size:
        """Return height and width of the frames."""
        return self.find_size()


def open_clip_files(path: Path, remarks: Remarks, fps: float | None = None) -> list[ClipFile]:
    """Return the clips at or below a path, by name; with `fps` video files are resampled to that rate.

    The remarks name what is left out. Raises `ValueError` if there are none, or if they cannot be read.
    """
    listing = None if path.is_file() else list_footage(path, remarks)
    found = _find(path, listing, remarks)
    streams = {} if listing is None else listing.streams
    index = VideoIndex(path) if fps is None else None
    clips = in_threads(
        functools.partial(_open, root=path, fps=fps, remarks=remarks, streams=streams, index=index), found
    )
    if index is not None:
        index.save()
    return clips


def in_threads(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Return the results of a function that reads files, of each item in order."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return list(pool.map(function, items))


def _find(path: Path, listing: Listing | None, remarks: Remarks) -> list[Path | PictureClip]:
    """Return the videos, arrays and clips of images at or below a path, by name.

    Images beside videos or arrays in one folder are covers and the like, and no clip.
    """
    if listing is None:
        if kind_of(path) == "picture":
            return [PictureClip(clip_name(PurePath(path.name)), path.name, (path,))]
        return [path]
    files = listing.videos + listing.arrays
    with_files = {file.parent.relative_to(path).as_posix() for file in files}
    for folder in with_files & listing.pictures.keys():
        for name in listing.pictures.pop(folder):
            remarks.add("Left out, an image beside videos", (Path(folder) / name).as_posix())
    clips = picture_clips(path, listing.pictures, remarks)
    for clip in clips:
        clip.check()
    if not files and not clips:
        suffixes, left_out = ", ".join((*VIDEO_SUFFIXES, ARRAY_SUFFIX)), "; ".join(remarks.lines())
        raise NoFootage(
            f"{path} holds no video file ({suffixes}) and no folder of images: give a folder that does, or the root of "
            f"a dataset{'. ' * bool(left_out)}{left_out}"
        )
    return sorted([*files, *clips], key=lambda found: _name(found, path))


def _name(found: Path | PictureClip, root: Path) -> str:
    if isinstance(found, PictureClip):
        return found.name
    return clip_name(PurePath(found.name) if found == root else found.relative_to(root))


def _open(
    found: Path | PictureClip,
    root: Path,
    fps: float | None,
    remarks: Remarks,
    streams: Mapping[Path, dict[str, Path]],
    index: VideoIndex | None,
) -> ClipFile:
    name = _name(found, root)
    if isinstance(found, PictureClip):
        found.remark(remarks)
        version = f" {READER_VERSION}" + (f" {found.bits} bits" if found.bits != 16 else "")
        size = functools.cache(functools.partial(_picture_size, found))
        read = functools.partial(_read_pictures, found, size)
        return ClipFile(Clip(name, len(found.paths)), None, size, read, found.paths, version)
    beside = dict(streams.get(found, {}))
    if kind_of(found) == "array":
        num_frames, *size = read_array_shape(found)
        read = functools.partial(_read_array, found)
        beside.setdefault("", found)
        return ClipFile(Clip(name, num_frames), None, lambda: (size[0], size[1]), read, (found,), streams=beside)
    resampled = None if fps is None else reading_rate(found, fps)[1]
    look = functools.partial(_look, found, fps, resampled)
    num_frames, rate, factor = look() if index is None else index.look(found, look)
    version = f" {READER_VERSION}" + (f" / {factor}" if factor > 1 else "")
    read = functools.partial(_read_video, found, resampled)
    size, iterate = functools.partial(_video_size, found), functools.partial(iter_video, found, resampled)
    return ClipFile(Clip(name, num_frames), rate, size, read, (found,), version, beside, iterate)


def _look(path: Path, fps: float | None, resampled: float | None) -> VideoFacts:
    """Return the facts of a video, read at its own rate or at `resampled` frames per second."""
    timing = scan(path)
    num_frames = timing.num_frames if resampled is None else timing.count(resampled)
    return VideoFacts(num_frames, reading_rate(path, fps)[0], pixel_factor(path))


def _picture_size(clip: PictureClip) -> Size:
    height, width, _ = clip.read(0).shape
    return height, width


def _video_size(path: Path) -> Size:
    height, width, _ = next(iter_video(path)).shape
    return height, width


def _read_pictures(clip: PictureClip, find_size: Callable[[], Size], frames: Sequence[int]) -> np.ndarray:
    size = find_size()
    video = np.empty((len(frames), *size, 3), np.uint8)
    for number, frame in enumerate(frames):
        image = clip.read(frame)
        if image.shape[:2] != size:
            raise ValueError(
                f"{clip.paths[frame]} is {image.shape[0]}x{image.shape[1]}, but the first image of its folder is "
                f"{size[0]}x{size[1]}: bring all to one size: python -m "
                "dataset_tools.make_dataset_from_frames FOLDER DATASET"
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
    decoded = iter_video(path, fps, frames=numbers)
    found = [frame for number, frame in zip(numbers, decoded, strict=False) if number in wanted]
    return np.stack(found) if found else np.empty((0, 0, 0, 3), np.uint8)
