"""Read token shards, which hold the tokens of a dataset's clips, encoded by a tokenizer.

Layout: `<root>/codes-<first 12 hex digits of the tokenizer's SHA-256>/<shard>.zip`, each zip holding one stored `.npy`,
uint16 (T, h, w), for each clip, and `clips.json`, an object that maps each clip to the name of that member and to the
clip's number of frames. `manifest.json` in the folder describes all of them. `dataset_tools.encode_dataset` writes
them.
"""

import dataclasses
import io
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.json_file import Check, JsonError, listed, mapped, read_json, record, text, whole
from dnnlib.text import one_line, quote, shown
from dnnlib.zips import FAULTS, read_json_member, reason_of
from training.data.description import MAX_COUNT, MAX_EDGE, MAX_PARTITIONS, count_check, fps_check
from training.data.shards import Clip, OpenFiles, locate_member

MANIFEST = "manifest.json"
CLIPS = "clips.json"
MAX_VOCABULARY = 1 << 16  # tokens are stored as uint16
DTYPE = np.dtype("<u2")

_HEAD_BYTES = 1024  # limit for the header of a member's array


def codes_folder(root: Path, tokenizer: str) -> Path:
    """Return the folder of a dataset's tokens, given the SHA-256 of their tokenizer as hex digits."""
    return root / f"codes-{tokenizer[:12]}"


def encode_command(root: Path) -> str:
    """Return the command that encodes a dataset."""
    return f"python -m dataset_tools.encode_dataset {quote(root)} --tokenizer=FILE"


# ----------------------------------------------------------------------------
# The manifest.


@dataclass(frozen=True)
class CodesManifest:
    """The properties common to all shards of a folder, stored in its manifest.json."""

    tokenizer: str  # SHA-256, hex digits
    grid: tuple[int, int]  # cells along the height and along the width
    vocabulary: int  # tokens are 0 ... vocabulary - 1
    stride: tuple[int, int]  # frames per step of the grid, pixels along an edge of a cell
    size: tuple[int, int]  # of the frames that were encoded: height, width
    clip_frames: int  # frames that were encoded together
    fps: float
    num_partitions: int
    partitions: dict[str, dict[str, Any]]  # "0000" -> "clips", "frames", "steps", and of the zip "sha256" and "bytes"

    def shards(self) -> list[str]:
        """Return the file names of the expected zips: partitions without clips have none."""
        return [f"partition_{index}.zip" for index, entry in sorted(self.partitions.items()) if entry["clips"]]


def read_codes_manifest(folder: Path) -> CodesManifest:
    """Read the manifest of a folder of tokens; raise `ValueError` if it is missing or invalid."""
    path = folder / MANIFEST
    try:
        content = read_json(path, _manifest_check)
    except (OSError, JsonError) as error:
        reason = str(error).replace(f"{path} ", "it ", 1) if isinstance(error, JsonError) else repr(error)
        raise ValueError(
            f"{path} does not describe the tokens beside it ({reason}); delete {folder} and make them again: "
            f"{encode_command(folder.parent)}"
        ) from error
    pairs: dict[str, Any] = {name: tuple(content[name]) for name in ("grid", "stride", "size")}
    others = {field.name: content[field.name] for field in dataclasses.fields(CodesManifest) if field.name not in pairs}
    return CodesManifest(**pairs, **others)


def _pair(most: int) -> Check:
    def check(value: Any, place: str) -> None:
        listed(whole(1, most))(value, place)
        if len(value) != 2:
            raise JsonError(f"has {len(value)} numbers as {place}, expected two")

    return check


_manifest_check = record(
    {
        "tokenizer": text,
        "grid": _pair(MAX_EDGE),
        "vocabulary": whole(1, MAX_VOCABULARY),
        "stride": _pair(MAX_EDGE),
        "size": _pair(MAX_EDGE),
        "clip_frames": whole(1, MAX_COUNT),
        "fps": fps_check,
        "num_partitions": whole(1, MAX_PARTITIONS),
        "partitions": mapped(record({"clips": count_check}, {"sha256": text}), "[0-9]{4,5}"),
    }
)


def _listing_entry(value: Any, place: str) -> None:
    """Accept the name of a member and a number of frames."""
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
        raise JsonError(f"has {shown(value)} as {place}, expected the name of an array and a number of frames")
    count_check(value[1], place)


# ----------------------------------------------------------------------------
# One shard.


@dataclass(frozen=True)
class CodesShard:
    """The contents of one zip: for each of C clips its path, numbers of frames and of steps, and the offset of its
    tokens.
    """

    clips: list[Clip]
    steps: np.ndarray  # (C,) int64
    offsets: np.ndarray  # (C,) int64: byte offset of the clip's tokens in the file


def open_codes_shard(path: Path, manifest: CodesManifest) -> CodesShard:
    """Read the offsets of the tokens of each clip in a zip.

    Raises `ValueError` naming the zip, and the clip if known, if the zip is damaged, or holds anything but uint16
    arrays on the manifest's grid with as many steps as the clip's frames give.
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
            shard = CodesShard([], np.empty(len(listing), np.int64), np.empty(len(listing), np.int64))
            for number, (clip, (member, num_frames)) in enumerate(listing.items()):
                place = f"clip {one_line(clip)} in {path}"
                shard.clips.append(Clip(clip, num_frames))
                offset, steps = _locate_array(file.fileno(), members[member], path, manifest, num_bytes)
                _check_steps(steps, num_frames, manifest)
                shard.offsets[number], shard.steps[number] = offset, steps
            return shard
    except (*FAULTS, SyntaxError) as error:
        raise ValueError(
            f"{place} holds no tokens that can be read ({reason_of(path, error)}); delete {path} and make "
            f"it again: {encode_command(path.parent.parent)}"
        ) from error


def _locate_array(
    descriptor: int, info: zipfile.ZipInfo, path: Path, manifest: CodesManifest, num_bytes: int
) -> tuple[int, int]:
    """Return the byte offset of the values of a member's array in the file, and its number of steps."""
    start, length, _, _ = locate_member(descriptor, info, path)
    if start + length > num_bytes:
        raise ValueError(f"{info.filename} reaches beyond the end of the file")
    head = io.BytesIO(os.pread(descriptor, min(length, _HEAD_BYTES), start))
    if np.lib.format.read_magic(head) != (1, 0):
        raise ValueError(f"{info.filename} has a header of an unknown version")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(head)
    if dtype != DTYPE or is_fortran or len(shape) != 3 or shape[1:] != manifest.grid:
        grid = "x".join(map(str, manifest.grid))
        raise ValueError(f"it is {dtype} of shape {list(shape)}, but uint16 on a grid of {grid} was expected")
    if length != head.tell() + int(np.prod(shape, dtype=object)) * DTYPE.itemsize:
        raise ValueError(f"{info.filename} has {length} bytes, which do not fit its shape {list(shape)}")
    return start + head.tell(), shape[0]


def _check_steps(steps: int, num_frames: int, manifest: CodesManifest) -> None:
    stride = manifest.stride[0]
    expected = num_frames if stride == 1 else num_frames // manifest.clip_frames * manifest.clip_frames // stride
    if steps != expected:
        raise ValueError(f"it has {steps} steps, but {num_frames} frames give {expected}")


# ----------------------------------------------------------------------------
# All shards.


class CodeStore:
    """The tokens of all clips of a dataset, encoded by the tokenizer with the given SHA-256.

    Values are read with `os.pread` at known offsets, so threads and forked processes may share a store; a pickled copy
    reopens the files. Raises `ValueError` if the tokens are missing or damaged.
    """

    def __init__(self, root: Path, tokenizer: str) -> None:
        self.root = root
        self.directory = codes_folder(root, tokenizer)
        short = tokenizer[:12]
        if not self.directory.is_dir():
            raise ValueError(
                f"{root} has no tokens of this tokenizer (SHA-256 {short}...): make them: {encode_command(root)}"
            )
        self.manifest = read_codes_manifest(self.directory)
        if self.manifest.tokenizer != tokenizer:
            raise ValueError(
                f"{self.directory} holds tokens of another tokenizer (SHA-256 {self.manifest.tokenizer[:16]}...) than "
                f"this one ({tokenizer[:16]}...); move it away and make them: {encode_command(root)}"
            )
        self.shards = sorted(path for path in self.directory.glob("*.zip") if not path.name.startswith("."))
        self._check_shards()
        found = [open_codes_shard(path, self.manifest) for path in self.shards]
        self.clips = [clip for shard in found for clip in shard.clips]
        self.index = {clip.path: number for number, clip in enumerate(self.clips)}
        self.clip_shards = np.repeat(np.arange(len(found)), [len(shard.clips) for shard in found])
        if len(self.index) < len(self.clips):
            twice = next(clip.path for number, clip in enumerate(self.clips) if self.index[clip.path] != number)
            raise ValueError(
                f"clip {one_line(twice)} is in two zips of {self.directory}; delete the folder and make it again: "
                f"{encode_command(root)}"
            )
        self.steps = np.concatenate([shard.steps for shard in found])  # (clips,) int64: steps of the grid
        self._offsets = np.concatenate([shard.offsets for shard in found])
        self._files = OpenFiles(self.shards)

    @property
    def grid(self) -> tuple[int, int]:
        """Return the number of cells of the grid along the height and along the width."""
        return self.manifest.grid

    @property
    def vocabulary(self) -> int:
        """Return the size of the codebook."""
        return self.manifest.vocabulary

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
                f"{encode_command(self.root)}"
            )
        if not here:
            raise ValueError(f"{self.directory} holds no tokens yet; make them: {encode_command(self.root)}")

    def read(self, clip: int, start: int, count: int, stride: int = 1) -> np.ndarray:
        """Return `count` steps start, start + stride, ... of clip number `clip`: uint16 (count, h, w).

        Raises `ValueError` naming the clip if the bytes are missing or are no tokens of the vocabulary.
        """
        span = (count - 1) * stride + 1
        assert count > 0 and stride > 0 and 0 <= start <= self.steps[clip] - span, (clip, start, count, stride)
        shard = int(self.clip_shards[clip])
        cells = self.grid[0] * self.grid[1]
        offset = int(self._offsets[clip]) + start * cells * DTYPE.itemsize
        data = os.pread(self._files.descriptor(shard), span * cells * DTYPE.itemsize, offset)
        reason = "the file has become shorter"
        if len(data) == span * cells * DTYPE.itemsize:
            codes = np.frombuffer(data, DTYPE).reshape(span, *self.grid)[::stride]
            if (highest := int(codes.max())) < self.vocabulary:
                return codes
            reason = f"token {highest} of a vocabulary of {self.vocabulary}"
        raise ValueError(
            f"the tokens of clip {one_line(self.clips[clip].path)} in {self.shards[shard]} are damaged ({reason}); "
            f"delete the zip and make it again: {encode_command(self.root)}"
        )
