"""Read shards of arrays on the grid of a tokenizer: the common part of token shards and latent shards.

Layout: `<root>/<kind>-<first 12 hex digits of the tokenizer's SHA-256>/<shard>.zip`, each zip holding one stored `.npy`
(T, *cell) for each clip, where the first axis counts steps of the grid, and `clips.json`, an object that maps each clip
to the name of that member and to the clip's number of frames. `manifest.json` in the folder describes all of them.
`dataset_tools.encode_dataset` writes them.
"""

import dataclasses
import io
import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np

from dnnlib.json_file import Check, JsonError, listed, mapped, read_json, record, text, whole
from dnnlib.text import one_line, quote, shown
from dnnlib.zips import FAULTS, read_json_member, reason_of
from training.data.description import MAX_COUNT, MAX_EDGE, MAX_PARTITIONS, count_check, fps_check
from training.data.shards import Clip, OpenFiles, locate_member

MANIFEST = "manifest.json"
CLIPS = "clips.json"

_HEAD_BYTES = 1024  # limit for the header of a member's array


@dataclass(frozen=True)
class GridKind:
    """A kind of arrays on a grid."""

    name: str  # of the folders, before the hash
    noun: str  # in messages
    dtype: np.dtype
    flag: str = ""  # of encode_dataset, with a blank before it

    def folder(self, root: Path, tokenizer: str) -> Path:
        """Return the folder of a dataset's arrays, given the SHA-256 of their tokenizer as hex digits."""
        return root / f"{self.name}-{tokenizer[:12]}"

    def command(self, root: Path) -> str:
        """Return the command that encodes a dataset."""
        return f"python -m dataset_tools.encode_dataset {quote(root)} --tokenizer=FILE" + self.flag


# ----------------------------------------------------------------------------
# The manifest.


@dataclass(frozen=True)
class GridManifest:
    """The properties common to all shards of a folder, stored in its manifest.json."""

    tokenizer: str  # SHA-256, hex digits
    grid: tuple[int, int]  # cells along the height and along the width
    stride: tuple[int, int]  # frames per step of the grid, pixels along an edge of a cell
    size: tuple[int, int]  # of the frames that were encoded: height, width
    clip_frames: int  # frames that were encoded together
    fps: float
    num_partitions: int
    partitions: dict[str, dict[str, Any]]  # "0000" -> "clips", "frames", "steps", and of the zip "sha256" and "bytes"

    kind: ClassVar[GridKind]
    checks: ClassVar[dict[str, Check]] = {}  # of the entries that a subclass adds
    partition_checks: ClassVar[dict[str, Check]] = {}

    @property
    def step_shape(self) -> tuple[int, ...]:
        """Return the shape of one step."""
        return self.grid

    def shards(self) -> list[str]:
        """Return the file names of the expected zips: partitions without clips have none."""
        return [f"partition_{index}.zip" for index, entry in sorted(self.partitions.items()) if entry["clips"]]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the manifest of a folder; raise `ValueError` if it is missing or invalid."""
        path = folder / MANIFEST
        try:
            content = read_json(path, record({**_CHECKS, **cls.checks, "partitions": _partitions(cls)}))
            values = {field.name: content[field.name] for field in dataclasses.fields(cls)}
            manifest = cls(**{**values, **{name: tuple(content[name]) for name in ("grid", "stride", "size")}})
            manifest.check()
            return manifest
        except (OSError, JsonError) as error:
            reason = str(error).replace(f"{path} ", "it ", 1) if isinstance(error, JsonError) else repr(error)
            raise ValueError(
                f"{path} does not describe the {cls.kind.noun} beside it ({reason}); delete {folder} and make them "
                f"again: {cls.kind.command(folder.parent)}"
            ) from error

    def check(self) -> None:
        """Raise `JsonError` unless the entries fit each other."""

    def facts(self) -> dict[str, Any]:
        """Return the facts common to all partitions, which do not depend on those that are made."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "partitions"}


def _pair(most: int) -> Check:
    def check(value: Any, place: str) -> None:
        listed(whole(1, most))(value, place)
        if len(value) != 2:
            raise JsonError(f"has {len(value)} numbers as {place}, expected two")

    return check


_CHECKS: dict[str, Check] = {
    "tokenizer": text,
    "grid": _pair(MAX_EDGE),
    "stride": _pair(MAX_EDGE),
    "size": _pair(MAX_EDGE),
    "clip_frames": whole(1, MAX_COUNT),
    "fps": fps_check,
    "num_partitions": whole(1, MAX_PARTITIONS),
}


def _partitions(cls: type[GridManifest]) -> Check:
    return mapped(record({"clips": count_check, **cls.partition_checks}, {"sha256": text}), "[0-9]{4,5}")


def _listing_entry(value: Any, place: str) -> None:
    """Accept the name of a member and a number of frames."""
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
        raise JsonError(f"has {shown(value)} as {place}, expected the name of an array and a number of frames")
    count_check(value[1], place)


# ----------------------------------------------------------------------------
# One shard.


@dataclass(frozen=True)
class GridShard:
    """The contents of one zip: for each of C clips its path, numbers of frames and of steps, and the offset of its
    values.
    """

    clips: list[Clip]
    steps: np.ndarray  # (C,) int64
    offsets: np.ndarray  # (C,) int64: byte offset of the clip's values in the file


def open_grid_shard(path: Path, manifest: GridManifest) -> GridShard:
    """Read the offsets of the values of each clip in a zip.

    Raises `ValueError` naming the zip, and the clip if known, if the zip is damaged, or holds anything but arrays of
    the kind on the manifest's grid with as many steps as the clip's frames give.
    """
    place = str(path)
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            members = {info.filename: info for info in archive.infolist()}
            for info in members.values():
                # Without compression, memory use is bounded by the size of the file.
                if info.compress_type != zipfile.ZIP_STORED or not 0 <= info.file_size == info.compress_size:
                    raise ValueError(f"{info.filename} is compressed")
            listing = read_json_member(archive, CLIPS, mapped(_listing_entry))
            shard = GridShard([], np.empty(len(listing), np.int64), np.empty(len(listing), np.int64))
            for number, (clip, (member, num_frames)) in enumerate(listing.items()):
                place = f"clip {one_line(clip)} in {path}"
                shard.clips.append(Clip(clip, num_frames))
                offset, steps = _locate_array(file.fileno(), members[member], path, manifest, num_bytes)
                _check_steps(steps, num_frames, manifest)
                shard.offsets[number], shard.steps[number] = offset, steps
            return shard
    except (*FAULTS, SyntaxError) as error:
        raise ValueError(
            f"{place} holds no {manifest.kind.noun} that can be read ({reason_of(path, error)}); delete {path} and "
            f"make it again: {manifest.kind.command(path.parent.parent)}"
        ) from error


def _locate_array(
    descriptor: int, info: zipfile.ZipInfo, path: Path, manifest: GridManifest, num_bytes: int
) -> tuple[int, int]:
    """Return the byte offset of the values of a member's array in the file, and its number of steps."""
    wanted = manifest.kind.dtype
    start, length, _, _ = locate_member(descriptor, info, path)
    if start + length > num_bytes:
        raise ValueError(f"{info.filename} reaches beyond the end of the file")
    head = io.BytesIO(os.pread(descriptor, min(length, _HEAD_BYTES), start))
    if np.lib.format.read_magic(head) != (1, 0):
        raise ValueError(f"{info.filename} has a header of an unknown version")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(head)
    if dtype != wanted or is_fortran or shape[1:] != manifest.step_shape or not shape:
        grid = "x".join(map(str, manifest.step_shape))
        raise ValueError(f"it is {dtype} of shape {list(shape)}, but {wanted} on a grid of {grid} was expected")
    if length != head.tell() + int(np.prod(shape, dtype=object)) * wanted.itemsize:
        raise ValueError(f"{info.filename} has {length} bytes, which do not fit its shape {list(shape)}")
    return start + head.tell(), shape[0]


def _check_steps(steps: int, num_frames: int, manifest: GridManifest) -> None:
    stride = manifest.stride[0]
    expected = num_frames if stride == 1 else num_frames // manifest.clip_frames * manifest.clip_frames // stride
    if steps != expected:
        raise ValueError(f"it has {steps} steps, but {num_frames} frames give {expected}")


# ----------------------------------------------------------------------------
# All shards.

ManifestT = TypeVar("ManifestT", bound=GridManifest)


class GridStore(Generic[ManifestT]):
    """The arrays of all clips of a dataset, encoded by the tokenizer with the given SHA-256.

    Values are read with `os.pread` at known offsets, so threads and forked processes may share a store; a pickled copy
    reopens the files. Raises `ValueError` if shards are missing or damaged.
    """

    Manifest: ClassVar[type[GridManifest]]
    manifest: ManifestT

    def __init__(self, root: Path, tokenizer: str) -> None:
        self.root, self.kind = root, self.Manifest.kind
        self.directory = self.kind.folder(root, tokenizer)
        short, noun, command = tokenizer[:12], self.kind.noun, self.kind.command(root)
        if not self.directory.is_dir():
            raise ValueError(f"{root} has no {noun} of this tokenizer (SHA-256 {short}...): make them: {command}")
        self.manifest = self.Manifest.read(self.directory)  # type: ignore[assignment]
        if self.manifest.tokenizer != tokenizer:
            raise ValueError(
                f"{self.directory} holds {noun} of another tokenizer (SHA-256 {self.manifest.tokenizer[:16]}...) than "
                f"this one ({tokenizer[:16]}...); move it away and make them: {command}"
            )
        self.shards = sorted(path for path in self.directory.glob("*.zip") if not path.name.startswith("."))
        self._check_shards()
        found = [open_grid_shard(path, self.manifest) for path in self.shards]
        self.clips = [clip for shard in found for clip in shard.clips]
        self.index = {clip.path: number for number, clip in enumerate(self.clips)}
        self.clip_shards = np.repeat(np.arange(len(found)), [len(shard.clips) for shard in found])
        if len(self.index) < len(self.clips):
            twice = next(clip.path for number, clip in enumerate(self.clips) if self.index[clip.path] != number)
            raise ValueError(
                f"clip {one_line(twice)} is in two zips of {self.directory}; delete the folder and make it again: "
                f"{command}"
            )
        self.steps = np.concatenate([shard.steps for shard in found])  # (clips,) int64: steps of the grid
        self._offsets = np.concatenate([shard.offsets for shard in found])
        self._files = OpenFiles(self.shards)

    @property
    def grid(self) -> tuple[int, int]:
        """Return the number of cells of the grid along the height and along the width."""
        return self.manifest.grid

    @property
    def stride(self) -> tuple[int, int]:
        """Return the number of frames per step of the grid and of pixels along an edge of a cell."""
        return self.manifest.stride

    def missing_partitions(self) -> int:
        """Return the number of partitions that have not been encoded."""
        return max(self.manifest.num_partitions - len(self.manifest.partitions), 0)

    def _check_shards(self) -> None:
        here, wanted = {path.name for path in self.shards}, set(self.manifest.shards())
        if here != wanted:
            name = min(here ^ wanted)
            state = "is missing, though" if name in wanted else "is there, though not"
            raise ValueError(
                f"{self.directory / name} {state} listed in its {MANIFEST}; to make what lacks: "
                f"{self.kind.command(self.root)}"
            )
        if not here:
            raise ValueError(
                f"{self.directory} holds no {self.kind.noun} yet; make them: {self.kind.command(self.root)}"
            )

    def check_values(self, values: np.ndarray) -> str:
        """Return what is wrong with values that were read, empty if nothing is."""
        raise NotImplementedError

    def read(self, clip: int, start: int, count: int, stride: int = 1) -> np.ndarray:
        """Return `count` steps start, start + stride, ... of clip number `clip`: (count, *step_shape).

        Raises `ValueError` naming the clip if the bytes are missing or are no such values.
        """
        span = (count - 1) * stride + 1
        assert count > 0 and stride > 0 and 0 <= start <= self.steps[clip] - span, (clip, start, count, stride)
        shard = int(self.clip_shards[clip])
        step_bytes = math.prod(self.manifest.step_shape) * self.kind.dtype.itemsize
        offset = int(self._offsets[clip]) + start * step_bytes
        data = os.pread(self._files.descriptor(shard), span * step_bytes, offset)
        reason = "the file has become shorter"
        if len(data) == span * step_bytes:
            values = np.frombuffer(data, self.kind.dtype).reshape(span, *self.manifest.step_shape)[::stride]
            reason = self.check_values(values)
            if not reason:
                return values
        raise ValueError(
            f"the {self.kind.noun} of clip {one_line(self.clips[clip].path)} in {self.shards[shard]} are damaged "
            f"({reason}); delete the zip and make it again: {self.kind.command(self.root)}"
        )
