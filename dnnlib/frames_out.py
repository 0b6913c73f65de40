"""Files of frames: videos, folders of pictures and arrays behind one interface, written as frames arrive.

# A video that is shorter than planned gets a name with its real number of frames
with staging(folder) as stage:
    with open_writer(stage / "video.mp4", height, width, fps=30) as writer:
        for frames in chunks:
            writer.write(frames)
    publish(stage / "video.mp4", folder / f"{writer.num_frames}_frames.mp4")
"""

import contextlib
import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from dnnlib import util
from dnnlib.locks import staging as staging
from dnnlib.video import VideoWriter

SUFFIXES = {"mp4": ".mp4", "webm": ".webm", "gif": ".gif", "png": "", "npz": ".npz"}  # a folder has none
ARRAY = "frames"  # the name of the array inside an npz file
COPY_BYTES = 1 << 20
SYNC_THREADS = 8  # a disk completes several requests at once: together 300 files take as long as a few


class PngWriter:
    """Write frames without loss into a folder: 000000.png, 000001.png and so on. A context manager.

    Pictures appear one by one; write into `staging` where an incomplete folder must not be visible.
    """

    def __init__(self, path: str | os.PathLike[str], height: int, width: int) -> None:
        self.path = Path(path)
        self.height = height
        self.width = width
        self.num_frames = 0

    def __enter__(self) -> "PngWriter":
        self.path.mkdir()
        return self

    def write(self, frames: np.ndarray) -> None:
        """Append frames: uint8 (T, height, width, 3)."""
        assert frames.dtype == np.uint8 and frames.shape[1:] == (self.height, self.width, 3)
        for frame in frames:
            write_picture(self.path / f"{self.num_frames:06d}.png", frame, durable=False)
            self.num_frames += 1

    def __exit__(self, *exception: Any) -> None:
        pass


class NpzWriter:
    """Write frames without loss into an npz file, whose array `frames` is uint8 (T, height, width, 3).

    A context manager whose complete file appears when the context is left without an error. Frames are written to disk
    directly. The header of the array comes first and contains T: if T differs from `num_frames` at the end, the file
    is copied once.
    """

    def __init__(self, path: str | os.PathLike[str], height: int, width: int, num_frames: int | None = None) -> None:
        self.path = Path(path)
        self.height = height
        self.width = width
        self.planned = num_frames or 0
        self.num_frames = 0

    def __enter__(self) -> "NpzWriter":
        with contextlib.ExitStack() as stack:
            self._temporary = stack.enter_context(util.atomic_path(self.path))
            self._archive = stack.enter_context(zipfile.ZipFile(self._temporary, "w"))
            self._member = stack.enter_context(self._archive.open(f"{ARRAY}.npy", "w", force_zip64=True))
            self._write_header(self._member, self.planned)
            self._stack = stack.pop_all()
        return self

    def write(self, frames: np.ndarray) -> None:
        """Append frames: uint8 (T, height, width, 3)."""
        assert frames.dtype == np.uint8 and frames.shape[1:] == (self.height, self.width, 3)
        self._member.write(np.ascontiguousarray(frames).data)
        self.num_frames += len(frames)

    def __exit__(self, *exception: Any) -> None:
        if exception[0] is not None:
            self._stack.__exit__(*exception)
            return
        with self._stack:
            if self.num_frames != self.planned:
                self._member.close()
                self._archive.close()
                self._correct_header()

    def _write_header(self, file: IO[bytes], num_frames: int) -> None:
        shape = (num_frames, self.height, self.width, 3)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})

    def _correct_header(self) -> None:
        """Copy the file with the number of frames that were written."""
        with (
            util.atomic_path(self._temporary) as temporary,
            zipfile.ZipFile(self._temporary) as source,
            zipfile.ZipFile(temporary, "w") as target,
            source.open(f"{ARRAY}.npy") as old,
            target.open(f"{ARRAY}.npy", "w", force_zip64=True) as new,
        ):
            np.lib.format.read_magic(old)
            np.lib.format.read_array_header_1_0(old)
            self._write_header(new, self.num_frames)
            shutil.copyfileobj(old, new, COPY_BYTES)


FrameWriter = VideoWriter | PngWriter | NpzWriter


def open_writer(
    path: str | os.PathLike[str],
    height: int,
    width: int,
    fps: float = 30.0,
    crf: int = 18,
    num_frames: int | None = None,
    factor: int = 1,
) -> FrameWriter:
    """Return the writer for the suffix of `path`: .mp4, .webm, .gif or .npz, or none for a folder of PNG files.

    `num_frames` is the expected number of frames, if known. `factor` is how often videos repeat each pixel along both
    edges; the other formats do not. Raises ValueError for another suffix.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix == ".npz":
        return NpzWriter(path, height, width, num_frames)
    if suffix:
        return VideoWriter(path, height, width, fps, crf, factor=factor)
    return PngWriter(path, height, width)


def write_picture(path: Path, frame: np.ndarray, durable: bool = True) -> None:
    """Write a frame, uint8 (H, W, 3), as a PNG file; `durable` is that of `util.atomic_path`."""
    with util.atomic_path(path, durable) as temporary:
        Image.fromarray(frame).save(temporary)


def publish(path: Path, target: Path) -> Path:
    """Move a finished file or folder to `target`, replacing an existing one, and return `target`.

    All of it is on the disk before the new name is.
    """
    if path.is_dir():  # a file is on the disk since it was complete
        with ThreadPoolExecutor(SYNC_THREADS) as pool:
            list(pool.map(util.to_disk, path.iterdir()))
        if target.is_dir():
            shutil.rmtree(target)  # a folder cannot be replaced atomically
    os.replace(path, target)
    util.to_disk(target.parent)
    return target
