"""Read videos from npz files: all at once, or a frame at a time."""

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

ARRAY_SUFFIX = ".npz"
_NAMES = ("frames", "videos", "video")


def check_array(video: np.ndarray, name: str) -> None:
    """Raise `ValueError` with a remedy unless an array is uint8 (N, T, H, W, 3) or (T, H, W, 3).

    `name` is its name in messages.
    """
    if video.dtype.kind == "f":
        low, high = (float(np.nanmin(video)), float(np.nanmax(video))) if video.size else (0.0, 0.0)
        remedy = {
            (True, True): "(x * 255).round().astype(np.uint8)",
            (False, True): "(x * 127.5 + 128).clip(0, 255).astype(np.uint8)",
            (True, False): "x.round().clip(0, 255).astype(np.uint8)",
        }.get((low >= 0, high <= 1.5), "(x * 127.5 + 128).clip(0, 255).astype(np.uint8), if -1 is black and 1 is white")
        raise ValueError(
            f"{name} holds {video.dtype} from {low:.4g} to {high:.4g}, but frames are uint8 from 0 to 255: "
            f"save {remedy}"
        )
    if video.dtype != np.uint8:
        raise ValueError(f"{name} holds {video.dtype}, but frames are uint8 from 0 to 255: convert them")
    if video.ndim not in (4, 5) or video.shape[-1] != 3:
        remedy = "make it uint8 (videos, frames, height, width, 3) in the order red, green, blue"
        if video.ndim == 5 and 3 in video.shape[1:3]:
            order = (0, 2, 3, 4, 1) if video.shape[1] == 3 else (0, 1, 3, 4, 2)
            remedy = f"its colours come before height and width, so save x.transpose{order}"
        elif video.ndim == 4 and 3 in video.shape[:2]:
            order = (1, 2, 3, 0) if video.shape[0] == 3 else (0, 2, 3, 1)
            remedy = f"its colours come before height and width, so save x.transpose{order}"
        elif video.shape[-1] == 1:
            remedy = "its frames are grey, so save x.repeat(3, axis=-1)"
        elif video.shape[-1] == 4:
            remedy = "its frames have an alpha channel, so save x[..., :3]"
        raise ValueError(f"{name} has the shape {video.shape}: {remedy}")
    if video.size == 0:
        raise ValueError(f"{name} is empty, with the shape {video.shape}: save at least one frame")


def load_array(path: Path) -> np.ndarray:
    """Return the only array of an npz file, or the one named `frames`, `videos` or `video`.

    It is uint8 (N, T, H, W, 3) or (T, H, W, 3). Raises `ValueError` for anything else.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            array = archive[_choose(archive.files)]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as an npz file of videos: {error}") from error
    check_array(array, str(path))
    return array


def iter_array(path: Path) -> Iterator[np.ndarray]:
    """Yield the frames, uint8 (H, W, 3), of the array that `load_array` returns, reading one frame at a time.

    Raises `ValueError` for a file that cannot be read, and for arrays other than uint8 (T, H, W, 3).
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy"): name for name in archive.namelist()}
            with archive.open(names[_choose(list(names))]) as file:
                version = np.lib.format.read_magic(file)
                read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, fortran_order, dtype = read_header[version](file)
                if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[3] != 3:
                    raise ValueError(f"its array is {dtype} {shape}{' in Fortran order' if fortran_order else ''}")
                for _ in range(shape[0]):
                    yield np.frombuffer(file.read(int(np.prod(shape[1:]))), np.uint8).reshape(shape[1:])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}; expected one array of frames, uint8 (T, H, W, 3)") from error


def _choose(files: Sequence[str]) -> str:
    """Return the name of the array that holds the videos; raise ValueError if it is ambiguous."""
    names = [name for name in files if name in _NAMES] or files
    if len(names) != 1:
        raise ValueError(f"it has the arrays {', '.join(files) or 'none'}: name the one `videos`")
    return names[0]
