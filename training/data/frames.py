"""Read the frames of one video file, picture, folder of pictures or npz file sequentially.

    for frame in iter_frames(Path("clip.mp4")):                # uint8 (H, W, 3), in constant memory
        ...

Dataset makers, metrics and prompts get the same pixels of a file: pictures are read by
`training.data.pictures.read_image`, arrays unchanged, and video files by `iter_video` with the arguments (path, fps,
start_sec, end_sec), where `fps` comes from `reading_rate` alone.
"""

import functools
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.video import iter_video_frames, missing_end, pixel_factor, scan
from training.data.arrays import iter_array
from training.data.listing import VIDEO_SUFFIXES as VIDEO_SUFFIXES
from training.data.listing import kind_of, list_footage
from training.data.pictures import iter_pictures, read_image

RATE_TOLERANCE = 0.01  # 29.97 counts as 30


def find_videos(folder: Path) -> list[Path]:
    """Return all video files below a folder, sorted by path; see `list_footage` for what is left out."""
    return list_footage(folder).videos


# ----------------------------------------------------------------------------
# Frame rates.


def is_same_rate(fps: float | None, other: float | None) -> bool:
    """Return whether two frame rates are equal within the tolerance, or one of them is unknown."""
    return fps is None or other is None or abs(fps / other - 1) <= RATE_TOLERANCE


def check_rate(fps: float | None, wanted: float | None, name: str) -> None:
    """Raise `ValueError` if footage is known to have a frame rate other than requested."""
    if not is_same_rate(fps, wanted):
        raise ValueError(
            f"{name} has {fps:g} frames per second, but --fps asks for {wanted:g}: make a dataset of it at that rate "
            f"(python -m dataset_tools.make_dataset_from_videos ... --fps={wanted:g}), or ask for {fps:g}"
        )


def reading_rate(path: str | os.PathLike[str], fps: float | None = None) -> tuple[float, float | None]:
    """Return the frames per second at which a video file is read, and the `fps` argument of `iter_video_frames` for it.

    Without `fps`, or if it is the file's own rate within 1 %, each frame of the file is read once and the second value
    is None; else frames are repeated or dropped.
    """
    native = scan(path).fps
    return (native, None) if fps is None or is_same_rate(native, fps) else (fps, fps)


def frame_rate(path: Path, fps: float | None = None) -> float | None:
    """Return the frame rate of `iter_frames`; None for pictures and arrays, which have no rate."""
    return reading_rate(path, fps)[0] if is_video(path) else None


def is_video(path: Path) -> bool:
    """Return whether a file is read as video: all files but pictures and arrays are left to ffmpeg."""
    return not path.is_dir() and kind_of(path) not in ("picture", "array")


# ----------------------------------------------------------------------------
# Frames.


def iter_frames(path: Path, fps: float | None = None) -> Iterator[np.ndarray]:
    """Yield the frames of a video file, of a picture, of a folder of pictures in order, or of an npz file.

    Each is uint8 (H, W, 3); one is held at a time. A video file is resampled to `fps`, if given; pictures and arrays
    have no rate and are not resampled. Raises `ValueError` naming the file that cannot be read.
    """
    if path.is_dir():
        return iter_pictures(path)
    if is_video(path):
        return iter_video(path, reading_rate(path, fps)[1])
    return iter_array(path) if kind_of(path) == "array" else iter([read_image(path)])


def iter_video(
    path: str | os.PathLike[str], fps: float | None = None, *window: Any, **options: Any
) -> Iterator[np.ndarray]:
    """Yield frames of a video file as `iter_video_frames` does, but at the size at which they were generated.

    `VideoWriter` repeats the pixels of small frames for players; each block becomes its mean, uint8 (H, W, 3). Raises
    `ValueError` also for files that are cut off.
    """
    factor = pixel_factor(path)  # raises ValueError for what is no file
    _check_end(os.fspath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns)
    for frame in iter_video_frames(path, fps, *window, **options):
        yield frame if factor == 1 else _shrink(frame, factor)


def _shrink(frame: np.ndarray, factor: int) -> np.ndarray:
    """Return the means of blocks of factor x factor pixels."""
    height, width = (edge // factor for edge in frame.shape[:2])
    sums = frame.reshape(height, factor, width, factor, 3).sum(axis=(1, 3), dtype=np.uint32)
    return ((sums + factor**2 // 2) // factor**2).astype(np.uint8)


@functools.lru_cache(maxsize=1 << 14)
def _check_end(path: str, _size: int, _time: int) -> None:
    """Raise `ValueError` if a file is cut off: by the end that it states, or within a picture."""
    reason = missing_end(path) or ("" if _ends_after_picture(path) else "the data of its last picture are cut off")
    if reason:
        raise ValueError(f"{path} ends early: {reason}")


def _ends_after_picture(path: str) -> bool:
    """Return False for a GIF, Y4M or raw DV file that ends within a picture, which ffmpeg passes over."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] == b"GIF8":
            return _is_whole_gif(data)
        if data[:10] == b"YUV4MPEG2 ":
            first = data.find(b"FRAME")
            following = data.find(b"FRAME", first + 5)
            return following < 0 or (len(data) - first) % (following - first) == 0
        if data[:3] == b"\x1f\x07\x00":  # ten sequences of 12,000 bytes a frame, twelve at 25 frames a second
            return len(data) % (144_000 if data[3] & 0x80 else 120_000) == 0
    return True


def _is_whole_gif(data: mmap.mmap) -> bool:
    """Return whether a GIF ends after a block of data."""
    try:
        place = 13 + _table_bytes(data[10])
        while place < len(data) and (block := data[place]) != 0x3B:
            if block == 0x2C:
                place += 11 + _table_bytes(data[place + 9])
            elif block == 0x21:
                place += 2
            else:  # what other programs put after the last picture
                return True
            while size := data[place]:
                place += 1 + size
            place += 1
    except IndexError:
        return False
    return True


def _table_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0
