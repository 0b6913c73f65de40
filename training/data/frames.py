"""Read the frames of one video file, folder of images or npz file sequentially.

    for frame in iter_frames(Path("clip.mp4")):                # uint8 (H, W, 3), in constant memory
        ...

Dataset makers, metrics and prompts get the same pixels of a file: images are read by
`training.data.pictures.read_image`, arrays unchanged, and video files by `dnnlib.video.iter_video_frames` with the
arguments (path, fps, start_sec, end_sec), where `fps` comes from `reading_rate` alone.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dnnlib.video import iter_video_frames, scan
from training.data.arrays import ARRAY_SUFFIX, iter_array
from training.data.pictures import iter_pictures

# Animated GIFs can be read, but are not accepted for datasets: decoding does not detect truncation.
VIDEO_SUFFIXES = tuple(
    ".3g2 .3gp .asf .avi .f4v .flv .m1v .m2ts .m2v .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .rm .ts .vob .webm "
    ".wmv".split()
)
RATE_TOLERANCE = 0.01  # 29.97 counts as 30


def find_videos(folder: Path, suffixes: Sequence[str] = VIDEO_SUFFIXES) -> list[Path]:
    """Return all video files below a folder, sorted; hidden files, hidden folders and linked folders are skipped."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in suffixes)


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
    """Return the frame rate of `iter_frames`; None for images and arrays, which have no rate."""
    return reading_rate(path, fps)[0] if _is_video(path) else None


# ----------------------------------------------------------------------------
# Frames.


def iter_frames(path: Path, fps: float | None = None) -> Iterator[np.ndarray]:
    """Yield the frames of a video file, of a folder of images in natural order of their names, or of an npz file.

    Each is uint8 (H, W, 3); one is held at a time. A video file is resampled to `fps`, if given; images and arrays have
    no rate and are not resampled. Raises `ValueError` naming the file that cannot be read.
    """
    if path.is_dir():
        return iter_pictures(path)
    if path.suffix.lower() == ARRAY_SUFFIX:
        return iter_array(path)
    return iter_video_frames(path, reading_rate(path, fps)[1])


def _is_video(path: Path) -> bool:
    return not path.is_dir() and path.suffix.lower() != ARRAY_SUFFIX
