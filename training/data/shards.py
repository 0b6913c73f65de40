"""Find, read and decode the JPEG frames of sharded zips through an index of each shard.

An index is a set of NumPy arrays, built once from a zip and stored beside it, so that opening a dataset takes the same
time for any number of frames.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import io
import json
import os
import re
import struct
import threading
import weakref
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from dnnlib import util
from dnnlib.json_file import listed, parse_json, text
from dnnlib.text import one_line, quote
from dnnlib.util import size_name
from dnnlib.zips import FAULTS, reason_of
from training.data.arrays import open_npz
from training.data.description import MAX_EDGE, read_frame_paths
from training.data.frame_cache import FrameCache, Size

# Local header of a zip member: signature, 22 bytes that the central directory repeats, and the lengths of the name and
# of the extra field, which may differ from those in the central directory and locate the data.
_MEMBER_HEAD = struct.Struct("<4s22xHH")
_INDEX_VERSION = 1

# Members of a zip are adjacent: those with small gaps between them are fetched by one read of bounded size.
_GAP_BYTES = 16 << 10
_EXTRA_BYTES = 1 << 20  # of an image file, besides its pixels
_READ_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Clip:
    """One clip of a dataset: its path inside the dataset and its number of frames."""

    path: str
    num_frames: int


# ----------------------------------------------------------------------------
# The index of a shard.


@dataclass(frozen=True)
class ShardIndex:
    """The locations of the frames of one zip: C clips, ordered by path, and the F frames of all of them in order."""

    clips: list[str]
    num_frames: np.ndarray  # (C,) int64
    digests: np.ndarray  # (C, 16) uint8: digest of the names of a clip's frames
    members: np.ndarray  # (F, 4) int64: offset and number of the stored bytes, CRC-32 of the file, whether deflated

    def is_sound(self, num_bytes: int) -> bool:
        """Return whether the arrays fit each other and a zip of `num_bytes`."""
        num_clips, lengths, members = len(self.clips), self.num_frames, self.members
        if lengths.dtype != np.int64 or lengths.shape != (num_clips,) or (lengths < 1).any():
            return False
        if self.digests.dtype != np.uint8 or self.digests.shape != (num_clips, 16):
            return False
        if members.dtype != np.int64 or members.shape != (lengths.sum(), 4):
            return False
        offsets, counts = members[:, 0], members[:, 1]
        return bool(((offsets >= 0) & (counts >= 0) & (counts <= num_bytes) & (offsets <= num_bytes - counts)).all())


def open_index(path: Path, size: Size, root: Path) -> ShardIndex:
    """Return the index of a zip, from the file beside it if that was built from this zip, else build and store it.

    Raises ValueError naming the zip, and the clip and frame if known, if the zip is incomplete, lists frames that it
    lacks, or holds a clip whose first frame is not an RGB image of `size`.
    """
    cache = path.with_suffix(".index.npz")
    status = path.stat()
    key = np.array([_INDEX_VERSION, *size, status.st_size, status.st_mtime_ns])
    with contextlib.suppress(*FAULTS), open_npz(cache, is_stored=True) as stored:
        if np.array_equal(stored["key"](), key):
            arrays: dict[str, Any] = {field.name: stored[field.name]() for field in dataclasses.fields(ShardIndex)}
            index = ShardIndex(**arrays | {"clips": parse_json(arrays["clips"].tobytes(), "it", listed(text))})
            if index.is_sound(status.st_size):
                return index
    index = _build_index(path, size, root)
    arrays = vars(index) | {"clips": np.frombuffer(json.dumps(index.clips).encode(), np.uint8)}
    # In a read-only folder the index is rebuilt by the next run.
    with contextlib.suppress(OSError), util.atomic_path(cache) as temporary:
        np.savez(temporary, allow_pickle=False, key=key, **arrays)
    return index


def _build_index(path: Path, size: Size, root: Path) -> ShardIndex:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            clips = sorted((clip, names) for clip, names in read_frame_paths(archive).items() if names)
    except FAULTS as error:
        reason = reason_of(path, error)
        raise ValueError(f"{path} is not a whole dataset shard ({reason}); make it or copy it again") from error
    num_frames = np.array([len(names) for _, names in clips], np.int64)
    digests = [hashlib.blake2b("\n".join(names).encode(), digest_size=16).digest() for _, names in clips]
    table = np.empty((num_frames.sum(), 4), np.int64)
    rows = iter(table)
    with open(path, "rb") as file:
        for clip, names in clips:
            for frame, name in enumerate(names):
                info = members.get(f"{clip}/{name}")
                if info is None:
                    raise ValueError(
                        f"{path} lists {one_line(f'{clip}/{name}')} but does not contain it; make or copy the shard "
                        "again"
                    )
                row = next(rows)
                row[:] = locate_member(file.fileno(), info, path)
                if frame == 0:
                    try:
                        _open_image(next(_contents(file.fileno(), row[None], size)), size).close()
                    except Exception as error:  # decoders raise many types
                        raise _frame_error(path, clip, name, size, root, error) from error
    return ShardIndex(
        clips=[clip for clip, _ in clips],
        num_frames=num_frames,
        digests=np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16),
        members=table,
    )


def locate_member(descriptor: int, info: zipfile.ZipInfo, path: Path) -> tuple[int, int, int, int]:
    """Return the row of a member in the table of its shard: offset and number of its bytes, CRC-32, whether deflated.

    Raises `ValueError` naming the zip if the member is not at the offset given by the central directory.
    """
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        name = one_line(info.filename)
        raise ValueError(f"{path} compresses {name} in a way that is not read; store it uncompressed")
    lost = info.header_offset < 0  # for example if the beginning of the zip is cut off
    head = b"" if lost else os.pread(descriptor, _MEMBER_HEAD.size, info.header_offset)
    if len(head) < _MEMBER_HEAD.size or head[:4] != b"PK\x03\x04":
        raise ValueError(
            f"{path} is not a whole dataset shard ({one_line(info.filename)} is not where it should be); copy it again"
        )
    _, name_bytes, extra_bytes = _MEMBER_HEAD.unpack(head)
    start = info.header_offset + _MEMBER_HEAD.size + name_bytes + extra_bytes
    return start, info.compress_size, info.CRC, info.compress_type == zipfile.ZIP_DEFLATED


def _frame_error(path: Path, clip: str, name: str, size: Size, root: Path, error: Exception) -> ValueError:
    return ValueError(
        f"frame {one_line(name)} of clip {one_line(clip)} in {path} is not an RGB image of {size[0]}x{size[1]} pixels: "
        f"{one_line(error) or type(error).__name__}; to list "
        f"all that is wrong: python -m dataset_tools.inspect_dataset {quote(root)}"
    )


# ----------------------------------------------------------------------------
# Reading and decoding.


def _contents(descriptor: int, members: np.ndarray, size: Size) -> Iterator[bytes | memoryview]:
    """Yield the files of members, rows of (offset, bytes, CRC-32, deflated), which are images of `size`.

    Raises ValueError for a wrong checksum, and for compressed ones that unpack to more than an image takes.
    """
    rows = members.tolist()
    begin = stop = 0
    data, origin = memoryview(b""), 0
    for position, (offset, num_bytes, check, deflated) in enumerate(rows):
        if position == stop:
            begin, end = position, offset
            while stop < len(rows):
                near = end <= rows[stop][0] <= end + _GAP_BYTES
                if stop > begin and not (near and rows[stop][0] + rows[stop][1] - offset <= _READ_BYTES):
                    break
                end = rows[stop][0] + rows[stop][1]
                stop += 1
            data, origin = memoryview(os.pread(descriptor, end - offset, offset)), offset
        content = data[offset - origin : offset - origin + num_bytes]
        if deflated:
            inflate = zlib.decompressobj(-zlib.MAX_WBITS)
            content = inflate.decompress(content, most_bytes(size))
            if not inflate.eof:
                raise ValueError(f"it ends early, or unpacks to more than {len(content)} bytes")
        if zlib.crc32(content) != check:
            raise ValueError("its bytes are damaged, as their checksum tells")
        yield content


def most_bytes(size: Size) -> int:
    """Return the most bytes that a compressed member may unpack to if it is an image of `size`."""
    return 4 * size[0] * size[1] * 3 + _EXTRA_BYTES


def read_frame(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, size: Size) -> bytes:
    """Return an image file of `size` in a zip after verifying its checksum; raise one of `FAULTS` if it is damaged."""
    if entry.compress_type != zipfile.ZIP_STORED and entry.file_size > most_bytes(size):
        raise ValueError(f"it unpacks to {entry.file_size} bytes, expected an image of {size[0]}x{size[1]}")
    with archive.open(entry) as file:
        return file.read(entry.file_size + 1)


@functools.cache
def fast_decoder() -> Any:
    """Return the module simplejpeg, which decodes to the same pixels as Pillow but faster, or None if absent."""
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:
        return None


def decode_rgb(data: bytes | memoryview, out: np.ndarray) -> None:
    """Decode an image file into contiguous uint8 (H, W, 3); raise ValueError if size or colour mode differ."""
    simplejpeg = fast_decoder()
    if simplejpeg is not None and data[:2] == b"\xff\xd8" and _decode_fast(simplejpeg, data, out):
        return
    with _open_image(data, (out.shape[0], out.shape[1])) as image:
        out[...] = np.asarray(image)


def _decode_fast(simplejpeg: Any, data: bytes | memoryview, out: np.ndarray) -> bool:
    """Decode a JPEG; return False where Pillow has to: simplejpeg does not know all kinds of chroma sampling."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if (height, width) != out.shape[:2] or colours != "YCbCr":
            return False
        simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False, buffer=out)
    except Exception:  # of whatever kind; Pillow says what is wrong, if anything is
        return False
    return True


def _open_image(data: bytes | memoryview, size: Size) -> Image.Image:
    """Open an image without decoding the pixels; raise ValueError if size or colour mode differ."""
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise ValueError("it is no image file") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"its size is far from {size[0]}x{size[1]}") from error
    if image.mode != "RGB":
        raise ValueError(f"its colour mode is {image.mode}")
    if (image.height, image.width) != size:
        raise ValueError(f"its size is {image.height}x{image.width}")
    return image


class OpenFiles:
    """File descriptors, each opened on first use and closed with this object.

    Threads and forked processes may share one; a pickled copy reopens the files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close_files, self._descriptors)

    def descriptor(self, number: int) -> int:
        """Return the descriptor of file `number`, open for reading."""
        with self._lock:
            if number not in self._descriptors:
                self._descriptors[number] = os.open(self.paths[number], os.O_RDONLY)
            return self._descriptors[number]

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenFiles, (self.paths,)


def _close_files(descriptors: dict[int, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


class FrameStore:
    """All frames of one size: the clips, and the location of each frame in the zips.

    Frames are read with `os.pread`, which moves no file position and needs no lock, so threads and forked processes may
    share a store; a pickled copy reopens the files. `listed` are the shards that dataset.json names, relative to the
    root, None if it names none.
    """

    def __init__(self, root: Path, size: Size, listed: Collection[str] | None) -> None:
        self.root = root
        self.size = size
        if max(size) > MAX_EDGE:
            raise ValueError(
                f"frames of {size[0]}x{size[1]} were asked for, expected edges of at most {MAX_EDGE} pixels"
            )
        self.directory = root / size_name(size)
        if not self.directory.is_dir():
            raise ValueError(_missing_size_message(root, size))
        self.shards = sorted(path for path in self.directory.glob("*.zip") if not path.name.startswith("."))
        if listed is not None:
            _check_listing(root, size, self.shards, listed)
        if not self.shards:
            raise ValueError(
                f"{self.directory} holds no .zip file; make it again: python -m "
                f"dataset_tools.make_dataset_from_videos VIDEOS {quote(root)} --sizes {size[0]}x{size[1]}"
            )
        indices = [open_index(path, size, root) for path in self.shards]
        self.clips: list[Clip] = []
        self.index: dict[str, int] = {}  # clip path -> its number
        self.clip_shards = np.repeat(np.arange(len(indices)), [len(index.clips) for index in indices])
        for path, index in zip(self.shards, indices, strict=True):
            for clip, num_frames in zip(index.clips, index.num_frames.tolist(), strict=True):
                number = self.index.setdefault(clip, len(self.clips))
                if number < len(self.clips):
                    raise ValueError(
                        f"clip {one_line(clip)} is both in {self.shards[self.clip_shards[number]]} and in {path}: the "
                        "dataset was made twice with different numbers of partitions; delete the older zips"
                    )
                self.clips.append(Clip(clip, num_frames))
        self.digests = np.concatenate([index.digests for index in indices])  # (clips, 16)
        self.members = np.concatenate([index.members for index in indices])  # (all frames, 4), as in ShardIndex
        self.first_frames = np.cumsum([0, *(clip.num_frames for clip in self.clips)])
        self.cache: FrameCache | None = None
        self._files = OpenFiles(self.shards)

    @property
    def num_frames(self) -> int:
        """Return the number of frames of all clips."""
        return len(self.members)

    def fingerprint(self, clip: int) -> bytes:
        """Return bytes that change if the frames of clip number `clip` do."""
        return self.members_of(clip)[:, 1:].tobytes()

    def num_bytes(self, clip: int) -> int:
        """Return the number of bytes of a clip's files."""
        return int(self.members_of(clip)[:, 1].sum())

    def content_key(self, numbers: Sequence[int] | None = None) -> str:
        """Return a key that identifies these frames in this order, independent of their location.

        They are those of the clips of the given numbers, by default of all clips.
        """
        chosen = range(len(self.clips)) if numbers is None else numbers
        clips = "\n".join(f"{self.clips[number].num_frames} {self.clips[number].path}" for number in chosen)
        digest = hashlib.blake2b(f"{self.size}\n{clips}".encode(), digest_size=16)
        for number in chosen:
            digest.update(self.fingerprint(number))
        return digest.hexdigest()

    def members_of(self, clip: int) -> np.ndarray:
        """Return the locations of the frames of clip number `clip`: (frames, 4), as in `ShardIndex`."""
        return self.members[self.first_frames[clip] : self.first_frames[clip + 1]]

    def read(self, clip: int, frames: Sequence[int], out: np.ndarray) -> None:
        """Decode the given frames of clip number `clip` into `out`, contiguous uint8 (T, H, W, 3)."""
        assert len(frames) == len(out) and out.flags.c_contiguous
        assert 0 <= min(frames) and max(frames) < self.clips[clip].num_frames, (
            f"no frames {frames} in {self.clips[clip]}"
        )
        rows = self.first_frames[clip] + np.asarray(frames)
        missing = range(len(rows)) if self.cache is None else self.cache.fetch(rows, out)
        if not len(missing):
            return
        shard = self.clip_shards[clip]
        contents = _contents(self._files.descriptor(shard), self.members[rows[missing]], self.size)
        for position in missing:
            try:
                decode_rgb(next(contents), out[position])
            except Exception as error:  # decoders raise many types
                name = self._frame_name(clip, frames[position])
                raise _frame_error(
                    self.shards[shard], self.clips[clip].path, name, self.size, self.root, error
                ) from error
            if self.cache is not None:
                self.cache.store(rows[position], out[position])

    def _frame_name(self, clip: int, frame: int) -> str:
        """Return the name of a frame, read from the zip since the index does not store it and only messages need it."""
        try:
            with zipfile.ZipFile(self.shards[self.clip_shards[clip]]) as archive:
                return read_frame_paths(archive)[self.clips[clip].path][frame]
        except (*FAULTS, IndexError):
            return f"number {frame}"


def _missing_size_message(root: Path, size: Size) -> str:
    if not root.is_dir():
        return f"{root} is not a folder; expected the root of a dataset, which holds folders such as {size_name(size)}"
    found = [path.name for path in sorted(root.iterdir()) if re.fullmatch(r"\d{4,}x\d{4,}", path.name)]
    if not found and re.fullmatch(r"\d{4,}x\d{4,}", root.resolve().name):
        return f"{root} is the folder of one frame size; give the dataset's root, {root.resolve().parent}"
    return (
        f"{root} has no frames of {size[0]}x{size[1]}; sizes found: {', '.join(found) or 'none'}; make them as the "
        f"others were made, such as by: python -m dataset_tools.make_dataset_from_videos VIDEOS {quote(root)} --sizes "
        f"{size[0]}x{size[1]}"
    )


def _check_listing(root: Path, size: Size, shards: Sequence[Path], listed: Collection[str]) -> None:
    """Raise ValueError unless the shards of a size are exactly those that dataset.json names."""
    here = {f"{size_name(size)}/{path.name}" for path in shards}
    wanted = {path for path in listed if path.startswith(f"{size_name(size)}/")}
    if lost := sorted(wanted - here):
        raise ValueError(
            f"{root / lost[0]} is missing{f', and {len(lost) - 1} more' if lost[1:] else ''}, though dataset.json "
            f"lists it; copy or make it again, or, if it is meant to be gone: python -m dataset_tools.merge "
            f"{quote(root)}"
        )
    if foreign := sorted(here - wanted):
        raise ValueError(
            f"{root / foreign[0]} is there{f', and {len(foreign) - 1} more' if foreign[1:] else ''}, though "
            f"dataset.json does not list it; delete it, or, if it belongs there: python -m dataset_tools.merge "
            f"{quote(root)}"
        )
