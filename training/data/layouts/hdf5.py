"""Read footage from HDF5 files: shards of RIVER, and indexed files of TATS and MeBT. Needs the package h5py.

- RIVER (Davtyan et al., ICCV 2023): `shard_0001.hdf5` ..., each with `len/<clip>`, the number of frames, and a group
  `<clip>` with a dataset `<frame>`, uint8 (H, W, 3), for each frame; clips and frames are numbered from 0 in decimal.
- TATS (Ge et al., ECCV 2022) and MeBT (Yoo et al., CVPR 2023), `preprocessed_hdf5`: one file with `<split>_data`, uint8
  (F, H, W, 3), the frames of all videos, and `<split>_idx`, the frames at which they begin and, at its end, F.
"""

import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.text import one_line
from training.data.description import MAX_COUNT
from training.data.layouts.base import Layout, check_frames
from training.data.listing import Remarks
from training.data.shards import Clip, Size

HDF5_SUFFIXES = (".hdf5", ".h5")
_MAGIC = b"\x89HDF\r\n\x1a\n"
_MAX_CHUNK_BYTES = 256 << 20  # of values that are decompressed together


def load_h5py() -> Any:
    """Return the module h5py; raise `ValueError` if it is not installed."""
    try:
        import h5py
    except ImportError as error:
        raise ValueError(
            "HDF5 files need the package h5py; install it with: pip install 'longtake[hdf5]' (in a checkout: pip "
            "install -e '.[hdf5]')"
        ) from error
    return h5py


class Hdf5Files:
    """HDF5 files, opened on first use in each process; a pickled copy reopens them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._files: dict[tuple[int, int], Any] = {}
        self._lock = threading.Lock()

    def file(self, number: int) -> Any:
        """Return file number `number`, open for reading; raise `ValueError` if it is no HDF5 file."""
        with self._lock:
            key = os.getpid(), number
            if key not in self._files:
                self._files[key] = open_hdf5(self.paths[number])
            return self._files[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return Hdf5Files, (self.paths,)


def open_hdf5(path: Path) -> Any:
    """Open an HDF5 file for reading; raise `ValueError` if it cannot be."""
    h5py = load_h5py()
    try:
        return h5py.File(path, "r", locking=False)  # without locks, which network file systems may lack
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read as HDF5 ({one_line(error)}): it is damaged, cut off or of another kind; copy or "
            "make it again"
        ) from error


def is_hdf5(path: Path) -> bool:
    """Return whether a file is named as HDF5, or begins as such."""
    if path.suffix.lower() in HDF5_SUFFIXES:
        return True
    try:
        with open(path, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def member(group: Any, name: str, is_group: bool = False) -> Any:
    """Return a member of an open file or group.

    Raises `ValueError` if it is missing, of the other kind, or stored outside the file.
    """
    h5py, place = load_h5py(), f"{group.file.filename}: {one_line(name)}"
    try:
        link = group.get(name, getlink=True)
        if link is None:
            raise ValueError(f"{place} is missing")
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"{place} is a link to another place, which is not followed")
        found = group[name]
        wanted = h5py.Group if is_group else h5py.Dataset
        if not isinstance(found, wanted):
            raise ValueError(f"{place} is no {wanted.__name__.lower()}")
        if not is_group and (found.is_virtual or found.external):
            raise ValueError(f"{place} is stored in other files, which are not read")
    except (KeyError, OSError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{place} cannot be read ({one_line(error)}): the file is damaged, so copy or make it again"
        ) from error
    return found


def names_in(group: Any) -> list[str]:
    """Return the names in an open file or group; raise `ValueError` if they cannot be read."""
    try:
        return list(group)
    except (KeyError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{group.file.filename} cannot be read ({one_line(error)}): the file is damaged, so copy or make it again"
        ) from error


def read_values(dataset: Any, selection: Any = ()) -> Any:
    """Return values of an HDF5 dataset; raise `ValueError` naming it if they are damaged or need too much memory."""
    place = f"{dataset.file.filename}: {dataset.name}"
    chunk = dataset.chunks or ()
    if int(np.prod(chunk, dtype=object)) * dataset.dtype.itemsize > _MAX_CHUNK_BYTES:
        raise ValueError(f"{place} is stored in chunks of shape {list(chunk)}, which take too much memory")
    try:
        return dataset[selection]
    except (OSError, RuntimeError, ValueError, TypeError, MemoryError) as error:
        raise ValueError(
            f"{place} cannot be read ({one_line(error)}): the file is damaged, so copy or make it again"
        ) from error


def read_into(group: Any, name: str, out: np.ndarray, place: str) -> None:
    """Read a dataset of a group into `out`, an array of its shape and of type uint8 or int64, to which ints are cast.

    It does what `member` and `read_values` do in a third of their time, by the functions under h5py's objects. Raises
    `ValueError` with `place`.
    """
    h5py = load_h5py()
    kind, encoded = h5py.h5d, name.encode()
    try:
        if not group.id.links.exists(encoded):
            raise ValueError("it is missing")
        if group.id.links.get_info(encoded).type != h5py.h5l.TYPE_HARD:
            raise ValueError("it is a link to another place, which is not followed")
        dataset = kind.open(group.id, encoded)
        properties = dataset.get_create_plist()
        layout = properties.get_layout()
        if layout == kind.VIRTUAL or properties.get_external_count():
            raise ValueError("it is stored in other files, which are not read")
        is_fit = dataset.dtype == np.uint8 if out.dtype == np.uint8 else dataset.dtype.kind in "iu"
        if dataset.shape != out.shape or not is_fit:
            wanted = f"{out.dtype} of shape {list(out.shape)}"
            raise ValueError(f"it is {dataset.dtype} of shape {list(dataset.shape)}, expected {wanted}")
        if layout == kind.CHUNKED and int(np.prod(properties.get_chunk(), dtype=object)) > _MAX_CHUNK_BYTES:
            raise ValueError("it is stored in chunks that take too much memory")
        native = h5py.h5t.NATIVE_UINT8 if out.dtype == np.uint8 else h5py.h5t.NATIVE_INT64
        dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, out, native)
    except (KeyError, OSError, RuntimeError, TypeError, ValueError, MemoryError) as error:
        raise ValueError(f"{place} cannot be read ({one_line(error)}); copy or make the file again") from error


# ----------------------------------------------------------------------------
# RIVER.


class RiverHdf5(Layout):
    """Shards of RIVER: one file, or all files of a folder in the order of their names."""

    title = "HDF5 shards of RIVER"
    resizer = "river"

    def __init__(self, path: Path, split: str | None = None) -> None:
        self.path, self.split, self.remarks = path, split, Remarks()
        shards = hdf5_files(path)
        self._files = Hdf5Files(shards)
        self.clips, self._places = [], list[tuple[int, int]]()  # of each clip: number of its file, and its own there
        for number, shard in enumerate(shards):
            for clip, num_frames in self._index(number):
                name = f"{clip:06d}" if path.is_file() else f"{shard.stem}/{clip:06d}"
                self.clips.append(Clip(name, num_frames))
                self._places.append((number, clip))
        if not self.clips:
            raise ValueError(f"{path} holds no clip: all of its HDF5 shards are empty; copy or make it again")
        self._size = self._check_first(0)

    @property
    def size(self) -> Size:
        """See `Layout.size`."""
        return self._size

    def _index(self, number: int) -> list[tuple[int, int]]:
        """Return number and number of frames of each clip of a shard, in order."""
        file, path = self._files.file(number), self._files.paths[number]
        lengths = member(file, "len", is_group=True)
        found = []
        there = set(names_in(file))
        value = np.zeros((), np.int64)
        for key in sorted(_clip_number(name, path) for name in names_in(lengths)):
            read_into(lengths, str(key), value, f"{path}: len/{key}")
            if not 0 <= value <= MAX_COUNT:
                raise ValueError(f"{path}: len/{key} is {value}, expected a number of frames")
            if str(key) not in there:
                # The published converter leaves the length of a video behind that it could not read.
                self.remarks.add("Left out, a clip with a length but without frames", f"{path.name} {key}")
            elif value:
                found.append((key, int(value)))
        return found

    def _check_first(self, clip: int) -> Size:
        shard, number = self._places[clip]
        frame = member(member(self._files.file(shard), str(number), is_group=True), "0")
        return check_frames(frame.shape, frame.dtype, f"{self._files.paths[shard]}: {number}/0")

    def read(self, clip: int, frames: Sequence[int]) -> np.ndarray:
        """See `Layout.read`."""
        shard, number = self._places[clip]
        group = member(self._files.file(shard), str(number), is_group=True)
        first = member(group, str(frames[0]))
        where = f"{self._files.paths[shard]}: {number}/"
        size = check_frames(first.shape, first.dtype, f"{where}{frames[0]}")
        if first.ndim != 3:
            raise ValueError(f"{where}{frames[0]} has the shape {list(first.shape)}, expected [height, width, 3]")
        found = np.empty((len(frames), *size, 3), np.uint8)
        for out, frame in zip(found, frames, strict=True):
            read_into(group, str(frame), out, f"{where}{frame}")
        return found

    def fingerprint(self, clip: int) -> bytes:
        """See `Layout.fingerprint`; the stored bytes of the first and the last frame tell contents apart."""
        shard, number = self._places[clip]
        ends = self.read(clip, sorted({0, self.clips[clip].num_frames - 1}))
        return f"{ends.shape[1:]}".encode() + ends.tobytes()


def hdf5_files(path: Path) -> list[Path]:
    """Return the HDF5 files of a folder by name, or the one file that is given."""
    if path.is_file():
        return [path]
    return sorted(found for found in path.iterdir() if found.suffix.lower() in HDF5_SUFFIXES and found.is_file())


def _clip_number(name: str, path: Path) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", name):
        raise ValueError(
            f"{path}: len has the entry {one_line(name, 40)}, expected a number; this is no shard of RIVER"
        )
    return int(name)


# ----------------------------------------------------------------------------
# TATS and MeBT.


class IndexedHdf5(Layout):
    """One split of an indexed file. The last video is kept, which TATS drops."""

    title = "indexed HDF5 of TATS and MeBT"
    resizer = "tats"

    def __init__(self, path: Path, split: str | None = None) -> None:
        self.path, self.split, self.remarks = path, split or "train", Remarks()
        self._files = Hdf5Files([path])
        file = self._files.file(0)
        names = names_in(file)
        if f"{self.split}_data" not in names:
            there = sorted(name.removesuffix("_data") for name in names if name.endswith("_data"))
            raise ValueError(f"{path} has no split {self.split}; it has {', '.join(there) or 'none'}")
        data = member(file, f"{self.split}_data")
        self._size = check_frames(data.shape, data.dtype, f"{path}: {self.split}_data")
        if data.ndim != 4:
            raise ValueError(f"{path}: {self.split}_data has the shape {list(data.shape)}, expected [frames, H, W, 3]")
        self._starts = self._read_starts(member(file, f"{self.split}_idx"), len(data))
        lengths = np.diff([*self._starts, len(data)]).tolist()
        self._starts = [start for start, length in zip(self._starts, lengths, strict=True) if length]
        self.clips = [Clip(f"{number:06d}", length) for number, length in enumerate(lengths) if length]
        if not self.clips:
            raise ValueError(f"{path} holds no frames in {self.split}_data; copy or make it again")

    def _read_starts(self, dataset: Any, num_frames: int) -> list[int]:
        """Return the frames at which videos begin."""
        place = f"{self.path}: {self.split}_idx"
        if dataset.ndim != 1 or dataset.dtype.kind not in "iu" or dataset.size > MAX_COUNT:
            raise ValueError(
                f"{place} is {dataset.dtype} of shape {list(dataset.shape)}, expected a list of whole numbers"
            )
        starts = read_values(dataset).astype(np.int64).tolist()
        if not starts or min(starts) < 0 or max(starts) > num_frames or sorted(starts) != starts:
            raise ValueError(f"{place} is not ascending from 0 to the {num_frames} frames of {self.split}_data")
        return starts

    @property
    def size(self) -> Size:
        """See `Layout.size`."""
        return self._size

    def read(self, clip: int, frames: Sequence[int]) -> np.ndarray:
        """See `Layout.read`."""
        first = self._starts[clip]
        data = member(self._files.file(0), f"{self.split}_data")
        block = read_values(data, slice(first + frames[0], first + frames[-1] + 1))
        return block[np.asarray(frames) - frames[0]]

    def fingerprint(self, clip: int) -> bytes:
        """See `Layout.fingerprint`."""
        ends = self.read(clip, [0]), self.read(clip, [self.clips[clip].num_frames - 1])
        return f"{self.clips[clip].num_frames}".encode() + ends[0].tobytes() + ends[1].tobytes()

    def texts(self) -> dict[str, list[str]]:
        """Return the descriptions in `<split>_text_description.txt` beside the file: a line a video, tabs between."""
        path = self.path.with_name(f"{self.split}_text_description.txt")
        if not path.is_file():
            return {}
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no text in UTF-8 ({one_line(error)}); write it again") from error
        if len(lines) != len(self.clips):
            raise ValueError(f"{path} has {len(lines)} lines, expected one for each of {len(self.clips)} videos")
        return {clip.path: line.split("\t") for clip, line in zip(self.clips, lines, strict=True)}


def open_hdf5_layout(path: Path, split: str | None = None) -> Layout:
    """Return the layout of an HDF5 file, or of a folder of such files; raise `ValueError` if it is neither kind."""
    first = hdf5_files(path)[0]
    with open_hdf5(first) as file:
        names = set(names_in(file))
    if "len" in names:
        return RiverHdf5(path, split)
    if any(name.endswith("_data") for name in names) and path.is_file():
        return IndexedHdf5(path, split)
    held = one_line(", ".join(sorted(names)[:8]), 60) or "nothing"
    raise ValueError(
        f"{first} holds {held}, which is no layout that is known; expected shards of RIVER (len and numbered groups) "
        "or one file of TATS or MeBT (train_data and train_idx)"
    )
