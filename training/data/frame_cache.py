"""Cache decoded frames of small sizes, in memory or in a file shared by processes and runs."""

import fcntl
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from dnnlib import util

CACHE_KINDS = ("none", "ram", "memmap")

_SHARE_OF_ROOM = 0.8  # fraction of the free memory or disk space that caches may use

Size = tuple[int, int]  # height, width


class FrameCache:
    """Decoded frames of a store, cached when they are read: in memory, or in a file shared by processes and runs.

    The file holds a checksum for each frame, written after its pixels and zero before; a process verifies it on the
    first access to a frame, so that a killed writer or a power failure never leads to a wrong frame: the frame is
    decoded again. Threads may race, since all write the same bytes.
    """

    def __init__(self, path: Path | None, num_frames: int, size: Size) -> None:
        self._arguments = (path, num_frames, size)
        shape = (num_frames, *size, 3)
        self._known = np.zeros(num_frames, bool)  # frames that this process has verified
        if path is None:
            self._frames, self._checks = np.empty(shape, np.uint8), None
            return
        with open(path, "ab") as file:
            if file.tell() < self.num_bytes(num_frames, size):
                _allocate(file.fileno(), self.num_bytes(num_frames, size))
        self._checks = np.memmap(path, np.uint32, "r+", 0, (num_frames,))
        self._frames = np.memmap(path, np.uint8, "r+", self._checks.nbytes, shape)

    @staticmethod
    def num_bytes(num_frames: int, size: Size) -> int:
        """Return the size of the file; the cache in memory is slightly smaller."""
        return num_frames * (4 + size[0] * size[1] * 3)

    def fetch(self, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Copy the cached frames into `out`, (len(rows), H, W, 3); return the positions of the others."""
        known = self._known[rows]
        if self._checks is not None:
            for position in np.flatnonzero(~known & (self._checks[rows] != 0)):
                row = rows[position]
                known[position] = self._known[row] = _checksum(self._frames[row]) == self._checks[row]
        out[known] = self._frames[rows[known]]
        return np.flatnonzero(~known)

    def store(self, row: int, frame: np.ndarray) -> None:
        """Store frame number `row`, (H, W, 3)."""
        self._frames[row] = frame
        if self._checks is not None:
            self._checks[row] = _checksum(frame)
        self._known[row] = True

    def __reduce__(self) -> tuple[Any, ...]:
        return FrameCache, self._arguments


def _checksum(frame: np.ndarray) -> int:
    return zlib.crc32(frame.data) or 1


def _allocate(descriptor: int, num_bytes: int) -> None:
    """Extend a file by zeros, and reserve the disk space if the system supports it.

    Writing to a hole of a mapped file on a full disk would kill the process.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, num_bytes)
    else:
        os.truncate(descriptor, num_bytes)


def make_caches(kind: str, stores: Mapping[Size, tuple[int, str]]) -> dict[Size, FrameCache]:
    """Return caches of `kind`, "ram" or "memmap", for as many frame sizes as fit, smallest first.

    `stores` gives for each size the number of frames and a key that identifies them. Prints the sizes of the caches.
    Raises ValueError with the sizes if not even the smallest frames fit.
    """
    if kind == "ram":
        room = psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        remedy = "take cache=memmap, which is on disk and shared by all processes, or cache=none"
        return _fill(room, "the memory of each process", remedy, stores, None)
    folder = Path(util.make_cache_dir_path("frames"))
    folder.mkdir(parents=True, exist_ok=True)
    remedy = "free some space, set DNNLIB_CACHE_DIR to a folder on a larger disk, or take cache=none"
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first rank creates the files, the others reuse them
        return _fill(shutil.disk_usage(folder).free, str(folder), remedy, stores, folder)
    finally:
        os.close(lock)


def _fill(
    room: float, where: str, remedy: str, stores: Mapping[Size, tuple[int, str]], folder: Path | None
) -> dict[Size, FrameCache]:
    from torch_utils import distributed  # imports torch, which commands that only read shards do without

    room *= _SHARE_OF_ROOM
    caches: dict[Size, FrameCache] = {}
    for size, (num_frames, key) in sorted(stores.items(), key=lambda item: item[0][0] * item[0][1]):
        path = None if folder is None else folder / f"{key}.frames"
        num_bytes = FrameCache.num_bytes(num_frames, size)
        figures = f"{num_frames} decoded frames of {size[0]}x{size[1]} take {num_bytes / 1e9:.3g} GB"
        taken = path.stat().st_size if path is not None and path.exists() else 0
        if num_bytes - taken > room:
            if not caches:
                raise ValueError(f"{figures}, of {where} {room / 1e9:.3g} GB may be used; {remedy}")
            distributed.print0(f"Cache: {figures}, which is too much: they are decoded each time")
            break
        distributed.print0(f"Cache: {figures} in {where}; they are kept as they are read")
        caches[size] = FrameCache(path, num_frames, size)
        room -= num_bytes - taken
    return caches
