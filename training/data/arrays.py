"""Read arrays from npy and npz files within the bytes that are there, and videos from them, at once or by frames."""

import contextlib
import io
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from dnnlib.zips import FAULTS

ARRAY_SUFFIX = ".npz"
_NAMES = ("frames", "videos", "video")

# What a compressed npz file may unpack to: a multiple of its bytes, or, if it is small, this many bytes.
MAX_RATIO, MIN_LIMIT = 100, 64 << 20
_CHUNK_BYTES = 1 << 20


# ----------------------------------------------------------------------------
# Arrays.


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, whether it is in Fortran order, and dtype, which begin an array of the npy format."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"its header is of version {version}, expected 1.0 or 2.0")
    shape, is_fortran, dtype = readers[version](file)
    if dtype.hasobject or not dtype.itemsize or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"it is {dtype} of shape {shape}, expected numbers or text")
    return shape, is_fortran, dtype


def read_array(file: IO[bytes], num_bytes: int) -> np.ndarray:
    """Read an array of the npy format from a file of `num_bytes`; no memory is taken for values that it lacks."""
    shape, is_fortran, dtype = read_header(file)
    if math.prod(shape) * dtype.itemsize > num_bytes:
        raise ValueError(f"its header gives {dtype} of shape {shape}, but it has {num_bytes} bytes")
    array = np.empty(math.prod(shape), dtype)
    values = array.view(np.uint8) if array.size else np.empty(0, np.uint8)
    for start in range(0, array.nbytes, _CHUNK_BYTES):
        chunk = values[start : start + _CHUNK_BYTES]
        data = file.read(len(chunk))
        if len(data) != len(chunk):
            raise EOFError("it ends within its values")
        chunk[:] = np.frombuffer(data, np.uint8)
    return array.reshape(shape, order="F" if is_fortran else "C")


def load_npy(path: Path) -> np.ndarray:
    """Return the array of an npy file; raise one of `FAULTS`."""
    with open(path, "rb") as file:
        num_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        return read_array(file, num_bytes)


@contextlib.contextmanager
def open_npz(path: Path, is_stored: bool = False) -> Iterator[dict[str, Callable[[], np.ndarray]]]:
    """Yield name -> function that reads the array, of an npz file; raise one of `FAULTS`.

    With `is_stored`, as for files that Longtake keeps, no array may be compressed.
    """
    with zipfile.ZipFile(path) as archive:
        limit = path.stat().st_size if is_stored else max(MAX_RATIO * path.stat().st_size, MIN_LIMIT)

        def reader(info: zipfile.ZipInfo) -> Callable[[], np.ndarray]:
            def read() -> np.ndarray:
                if info.file_size > limit:
                    raise ValueError(
                        f"{info.filename} unpacks to {info.file_size} bytes, expected at most {limit}: save it "
                        "uncompressed (np.savez)"
                    )
                with archive.open(info) as file:
                    return read_array(file, info.file_size)

            return read

        yield {info.filename.removesuffix(".npy"): reader(info) for info in archive.infolist()}


# ----------------------------------------------------------------------------
# Videos.


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
        with open_npz(path) as arrays:
            array = arrays[_choose(list(arrays))]()
    except FAULTS as error:
        raise ValueError(f"{path} cannot be read as an npz file of videos: {error}") from error
    check_array(array, str(path))
    return array


def read_array_shape(path: Path) -> tuple[int, int, int]:
    """Return frames, height and width of the one video that `load_array` returns, without reading it.

    Raises `ValueError` for a file that cannot be read, for several videos, and for any other array.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy"): name for name in archive.namelist()}
            with archive.open(names[_choose(list(names))]) as file:
                shape, _, dtype = read_header(file)
    except FAULTS as error:
        raise ValueError(f"{path} cannot be read as an npz file of videos: {error}") from error
    if len(shape) == 5:
        raise ValueError(f"{path} holds several videos; in a folder each npz file holds one: give it by itself")
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        check_array(load_array(path), str(path))  # with a remedy that depends on the values
    return shape[0], shape[1], shape[2]


def iter_array(path: Path) -> Iterator[np.ndarray]:
    """Yield the frames, uint8 (H, W, 3), of the array that `load_array` returns, reading one frame at a time.

    Raises `ValueError` for a file that cannot be read, and for arrays other than uint8 (T, H, W, 3).
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy"): name for name in archive.namelist()}
            name = names[_choose(list(names))]
            with archive.open(name) as file:
                shape, fortran_order, dtype = read_header(file)
                if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[3] != 3:
                    raise ValueError(f"its array is {dtype} {shape}{' in Fortran order' if fortran_order else ''}")
                if math.prod(shape[1:]) > min(archive.getinfo(name).file_size, MIN_LIMIT):
                    raise ValueError(f"its header gives frames of {shape[1]}x{shape[2]}, for which it is too small")
                for _ in range(shape[0]):
                    yield np.frombuffer(file.read(math.prod(shape[1:])), np.uint8).reshape(shape[1:])
    except FAULTS as error:
        raise ValueError(f"{path} cannot be read: {error}; expected one array of frames, uint8 (T, H, W, 3)") from error


def _choose(files: Sequence[str]) -> str:
    """Return the name of the array that holds the videos; raise ValueError if it is ambiguous."""
    names = [name for name in files if name in _NAMES] or files
    if len(names) != 1:
        raise ValueError(f"it has the arrays {', '.join(files) or 'none'}: name the one `videos`")
    return names[0]
