"""Read the streams of a dataset: actions, poses and other values of each frame, and labels of clips.

A stream is `<name>.json` in each zip, an object that maps each clip to a list of one value per frame: whole numbers,
names, lists of numbers, or objects of numbers such as {"forward": 8, "turn": 0}, whose entries are ordered by name.
`null` and "none" stand for no action: 0, or a vector of zeros. Names become whole numbers by the list that dataset.json
has under the name of the stream, else by their order, "none" first. Parsed values are stored beside the zip as
`<shard>.<name>.npz`.

The stream "audio" is stored otherwise (training.data.audio_store).

The stream "label" is the same for all frames of a clip. It comes from `labels.json` in the root, an object that maps
clips, or their first folders, to whole numbers or names; without that file it is the name of the clip's first folder.
"""

import contextlib
import json
import math
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib import util
from dnnlib.json_file import JsonError, anything, listed, mapped, parse_json, read_json, text
from dnnlib.text import one_line, shown
from dnnlib.zips import FAULTS, read_json_member, reason_of
from training.data.arrays import open_npz
from training.data.description import DESCRIPTION, read_description
from training.data.shards import Clip
from training.data.stream_values import NONE, BadValue, Values, check_growth, order_names, parse_values
from training.data.stream_values import read_stream_file as read_stream_file

LABEL = "label"
AUDIO = "audio"
LABELS_FILE = "labels.json"

_VERSION = 1
_RESERVED = (AUDIO, "clips", "frame_paths", "index", "x_flip")


# ----------------------------------------------------------------------------
# The values of a shard.


@dataclass(frozen=True)
class StreamShard:
    """A stream of one zip: the clips, in the order of the zip, and the values of all their frames."""

    clips: list[str]
    lengths: np.ndarray  # (C,) int64: number of values of each clip
    values: Values


def open_stream_shard(path: Path, name: str) -> StreamShard | None:
    """Read a stream of a zip, from the file beside it if that was parsed from this zip, else parse and store it.

    Returns None if the zip has no such stream. Raises `ValueError` naming the zip, and the clip if known, if the zip is
    damaged or its values are inconsistent.
    """
    cache = path.with_suffix(f".{name}.npz")
    status = path.stat()
    key = np.array([_VERSION, status.st_size, status.st_mtime_ns])
    with contextlib.suppress(*FAULTS), open_npz(cache, is_stored=True) as stored:
        if np.array_equal(stored["key"](), key):
            clips, names = parse_json(stored["text"]().tobytes(), "it", _cached_text)
            shard = StreamShard(clips, stored["lengths"](), Values(stored["values"](), names))
            if _is_sound(shard):
                return shard
    shard = _parse_shard(path, name)
    if shard is not None:
        stored_text = np.frombuffer(json.dumps([shard.clips, shard.values.names]).encode(), np.uint8)
        arrays = {"key": key, "text": stored_text, "lengths": shard.lengths, "values": shard.values.array}
        # In a read-only folder the zip is parsed again by the next run.
        with contextlib.suppress(OSError), util.atomic_path(cache) as temporary:
            np.savez(temporary, allow_pickle=False, **arrays)
    return shard


def _cached_text(value: Any, place: str) -> None:
    """Accept a list of clips, and a list of names or null."""
    clips, names = value
    listed(text)(clips, place)
    if names is not None:
        listed(text)(names, place)


def _is_sound(shard: StreamShard) -> bool:
    """Return whether the parts of a stored shard fit each other."""
    lengths, (array, names) = shard.lengths, shard.values
    is_fit = lengths.dtype == np.int64 and lengths.shape == (len(shard.clips),) and bool((lengths >= 0).all())
    if not is_fit or lengths.sum() != len(array):
        return False
    if array.ndim == 2:
        return array.dtype == np.float32 and names is None
    limit = 1 << 31 if names is None else len(names)
    return array.ndim == 1 and array.dtype == np.int64 and bool(((array >= 0) & (array < limit)).all())


def read_stream(path: Path, name: str) -> dict[str, list[Any]]:
    """Return the values of a stream of a zip by clip, empty if it has none; raise ValueError if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{name}.json" not in archive.namelist():
                return {}
            return read_json_member(archive, f"{name}.json", mapped(listed(anything)))
    except FAULTS as error:
        reason = reason_of(path, error)
        raise ValueError(f"the {name} in {path} cannot be read ({reason}); make or copy the shard again") from error


def _parse_shard(path: Path, name: str) -> StreamShard | None:
    content = read_stream(path, name)
    if not content:
        return None
    clips, lengths = list(content), [len(values) for values in content.values()]
    try:
        values = parse_values([value for values in content.values() for value in values])
    except BadValue as error:
        number = int(np.searchsorted(np.cumsum(lengths), error.position, side="right"))
        entry = error.position - sum(lengths[:number])
        clip = one_line(clips[number])
        raise ValueError(
            f"the {name} of clip {clip} in {path} have at entry {entry} {error}; make the shard again"
        ) from error
    return StreamShard(clips, np.array(lengths, np.int64), values)


def stored_streams(path: Path) -> list[str]:
    """Return the names of the streams of a zip, "audio" not among them; raise ValueError if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".json") for name in archive.namelist() if re.fullmatch(r"\w+\.json", name)]
    except FAULTS as error:
        raise ValueError(f"{path} is damaged ({reason_of(path, error)}); make or copy the shard again") from error
    return sorted(name for name in names if name not in _RESERVED)


# ----------------------------------------------------------------------------
# The stream of a dataset.


class StreamStore:
    """The values of one stream for given clips of a dataset, numbered in the given order.

    `folders` are searched for zips that have the stream; by default those of all frame sizes. `vocabulary` gives the
    names of whole numbers, and overrides those in dataset.json or in the values: a validation split uses that of the
    training split. `shards` are given instead of searched for. Raises `ValueError` if the number of values of a clip
    differs from its number of frames, or if a name is not in the vocabulary.
    """

    def __init__(
        self,
        root: Path,
        name: str,
        clips: Sequence[Clip],
        folders: Sequence[Path] | None = None,
        vocabulary: Sequence[str] | None = None,
        shards: Mapping[Path, StreamShard] | None = None,
    ) -> None:
        if not re.fullmatch(r"\w+", name) or name in _RESERVED:
            raise ValueError(f"{name!r} cannot be the name of a stream; take one such as actions")
        self.root, self.name, self.clips = root, name, list(clips)
        known = _known_vocabulary(root, name) if vocabulary is None else list(vocabulary)
        if name == LABEL:
            self._firsts, values = np.arange(len(clips)), _read_labels(root, clips, known)
        elif shards is not None:
            self._firsts, values = self._arrange(root, shards)
        else:
            self._firsts, values = self._gather(size_folders(root) if folders is None else folders)
        self.vocabulary = known if known is not None and values.array.ndim == 1 else None
        if values.names is not None:
            self.vocabulary = order_names(values.names) if known is None else known
            values = Values(_translate(values, self.vocabulary, f"{root} has {name}"))
        self._values = values.array
        self._values.flags.writeable = False
        highest = int(self._values.max(initial=0)) if self._values.ndim == 1 else 0
        if self.vocabulary is not None and highest >= len(self.vocabulary):
            raise ValueError(f"{root} has {name} {highest}, but only {len(self.vocabulary)} are listed")
        # For whole numbers their count, for vectors their width.
        self.num_values = self._values.shape[1] if self.is_vector else len(self.vocabulary or range(highest + 1))

    @property
    def is_vector(self) -> bool:
        """Return whether the values are vectors."""
        return self._values.ndim == 2

    def read(self, clip: int, start: int, count: int, stride: int = 1) -> np.ndarray:
        """Return the values of `count` frames start, start + stride, ... of clip number `clip`.

        They are int64 (count,), or float32 (count, values) if they are vectors.
        """
        stop = start + (count - 1) * stride + 1
        assert count > 0 and stride > 0 and 0 <= start and stop <= self.clips[clip].num_frames
        first = int(self._firsts[clip])
        if self.name == LABEL:
            return np.repeat(self._values[first], count)
        return self._values[first + start : first + stop : stride]

    def _gather(self, folders: Sequence[Path]) -> tuple[np.ndarray, Values]:
        """Return the offset of the values of each clip, and all values."""
        paths: list[Path] = []
        for folder in folders:
            paths = sorted(path for path in folder.glob("*.zip") if not path.name.startswith("."))
            shards = [open_stream_shard(path, self.name) for path in paths]
            found = {path: shard for path, shard in zip(paths, shards, strict=True) if shard is not None}
            if found:
                return self._arrange(folder, found)
        has = ", ".join(stored_streams(paths[0])) if paths else ""
        raise ValueError(
            f"{self.root} has no {self.name} beside its frames: its zips hold {has or 'none'}; make the dataset again "
            f"with {self.name}.json in each zip, as docs/dataset.md describes"
        )

    def _arrange(self, folder: Path, found: Mapping[Path, StreamShard]) -> tuple[np.ndarray, Values]:
        """Return the offset of the values of each clip, and the values of all shards."""
        firsts, lengths = {}, {}
        for first, (clip, length) in zip(_starts(found.values()), _listed(found.values()), strict=True):
            firsts[clip], lengths[clip] = first, length
        self._check_clips(folder, lengths)
        return np.array([firsts[clip.path] for clip in self.clips], np.int64), self._join(found)

    def _check_clips(self, folder: Path, lengths: Mapping[str, int]) -> None:
        for clip in self.clips:
            if lengths.get(clip.path) != clip.num_frames:
                found = lengths.get(clip.path, "no")
                raise ValueError(
                    f"clip {one_line(clip.path)} has {clip.num_frames} frames but {found} {self.name} in {folder}; "
                    f"make the dataset again, with one value a frame in {self.name}.json"
                )

    def _join(self, shards: Mapping[Path, StreamShard]) -> Values:
        """Return the values of all shards in order."""
        filled = {path: shard.values for path, shard in shards.items() if not shard.values.is_empty()}
        where, model = next(iter((filled or {path: shard.values for path, shard in shards.items()}).items()))
        names = order_names(name for shard in shards.values() for name in shard.values.names or [])
        num_values = sum(len(shard.values.array) for shard in shards.values()) * math.prod(model.array.shape[1:])
        check_growth(num_values, sum(values.array.size for values in filled.values()) if filled else num_values)
        arrays = []
        for path, shard in shards.items():
            values = shard.values
            if values.is_empty() and model.names is None:
                values = Values(np.zeros((len(values.array), *model.array.shape[1:]), model.array.dtype))
            if values.kind != model.kind or values.array.shape[1:] != model.array.shape[1:]:
                raise ValueError(
                    f"the {self.name} in {path} are {values.kind} of another form than those in {where}, which are "
                    f"{model.kind}; make the shards again, all in one way"
                )
            arrays.append(_translate(values, names, str(path)) if values.names is not None else values.array)
        return Values(np.concatenate(arrays), names if model.names is not None else None)


def _listed(shards: Iterable[StreamShard]) -> list[tuple[str, int]]:
    return [pair for shard in shards for pair in zip(shard.clips, shard.lengths.tolist(), strict=True)]


def _starts(shards: Iterable[StreamShard]) -> list[int]:
    lengths = np.concatenate([shard.lengths for shard in shards])
    return (np.cumsum(lengths) - lengths).tolist()


def _translate(values: Values, vocabulary: Sequence[str], what: str) -> np.ndarray:
    """Return the indices of names in a vocabulary: int64 (F,)."""
    assert values.names is not None
    places = {name: place for place, name in enumerate(vocabulary)}
    for name in values.names:
        if name not in places and not (name == NONE and vocabulary):
            raise ValueError(
                f"{what} {shown(name)}, but the names that are known are {one_line(', '.join(vocabulary))}"
            )
    table = np.array([places.get(name, 0) for name in values.names], np.int64)
    return table[values.array]


def size_folders(root: Path) -> list[Path]:
    """Return the folders of the frame sizes of a dataset."""
    return sorted(path for path in root.iterdir() if re.fullmatch(r"\d{4,}x\d{4,}", path.name) and path.is_dir())


def _known_vocabulary(root: Path, name: str) -> list[str] | None:
    """Return the names that dataset.json lists for a stream, None if it lists none."""
    known = (read_description(root) or {}).get(name)
    if known is None:
        return None
    is_list = isinstance(known, list) and all(isinstance(item, str) for item in known)
    if not is_list or not known or len(set(known)) < len(known):
        raise ValueError(
            f"the entry {name!r} of {root / DESCRIPTION} is no list of different names; correct it or take it out"
        )
    return known


def _read_labels(root: Path, clips: Sequence[Clip], known: Sequence[str] | None) -> Values:
    """Return the label of each clip."""
    path = root / LABELS_FILE
    folders = [clip.path.partition("/")[0] if "/" in clip.path else None for clip in clips]
    if path.exists():
        try:
            given = read_json(path, mapped(anything))
        except (OSError, JsonError) as error:
            reason = str(error).replace(f"{path} ", "it ", 1)
            raise ValueError(
                f"{path} is no object that maps clips to labels ({reason}); write one such as "
                '{"clip": "horse", "folder": "bike"}'
            ) from error
        found = [given.get(clip.path, given.get(folder)) for clip, folder in zip(clips, folders, strict=True)]
        remedy = f"give {path} an entry for it or for its first folder"
    else:
        found, remedy = folders, f"write {path}, which maps clips to labels"
        if known is None and len(set(folders)) == 1:
            raise ValueError(f"all clips of {root} lie in one folder, whose name is no label to tell them by; {remedy}")
    for clip, label in zip(clips, found, strict=True):
        if label is None:
            raise ValueError(f"clip {one_line(clip.path)} of {root} has no label; {remedy}")
    try:
        values = parse_values(found)
    except BadValue as error:
        clip = one_line(clips[error.position].path)
        raise ValueError(f"the label of clip {clip} in {path} is {error}; correct it") from error
    if values.array.ndim != 1:
        raise ValueError(f"the labels in {path} are vectors, but whole numbers or names were expected; correct them")
    return values
