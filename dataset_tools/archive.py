"""Write datasets: shards of stored JPEGs, written atomically, and the files that describe them."""

import collections
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from dataset_tools.frames import Size
from dnnlib import locks, util
from dnnlib.download import file_sha256
from dnnlib.util import size_name
from training.data.description import DESCRIPTION, MANIFEST, read_description, read_manifest

DERIVED = ("fps", "sizes", "partitions", "num_clips", "num_frames", "versions", "hashes")  # computed, not given

_SOURCES = ("num_sources ", "sources_sha256 ")  # facts that change when footage is added or removed
_FIXED_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest date of a zip, so that equal frames give equal bytes at any time

T = TypeVar("T")


def shard_name(index: int) -> str:
    """Return the file name of shard `index`, such as "partition_0000.zip"."""
    return f"partition_{index:04d}.zip"


def partition(items: Sequence[T], index: int, num_partitions: int) -> Sequence[T]:
    """Return run `index` of `num_partitions` contiguous, nearly equal runs; the first ones get the remainder."""
    if not 0 <= index < num_partitions:
        raise ValueError(
            f"partition {index} does not exist; {num_partitions} partitions are 0 ... {num_partitions - 1}"
        )
    size, longer = divmod(len(items), num_partitions)
    start = index * size + min(index, longer)
    return items[start : start + size + (index < longer)]


@dataclass(frozen=True)
class ShardReport:
    """The contents of one partition as plain values, which can be passed between processes.

    `hashes` maps its files, relative to the root, to their SHA-256. `clips` maps each clip to its number of "frames",
    to "sha256", for each size the hash of its concatenated stored frames, and to further facts of the clip. `rates`
    counts clips by frames per second; `skipped` describes the clips that were left out.
    """

    index: int
    size_names: tuple[str, ...]
    hashes: dict[str, str]
    clips: dict[str, dict[str, Any]]
    rates: dict[float, int]
    skipped: list[str]

    def summary(self) -> dict[str, Any]:
        """Return the entry of dataset.json."""
        return {
            "clips": len(self.clips),
            "frames": sum(clip["frames"] for clip in self.clips.values()),
            "rates": {f"{rate:g}": count for rate, count in sorted(self.rates.items())},
            "skipped": self.skipped,
        }


class ClipWriter:
    """A function that takes the frames of a clip, called with the files of one frame, one for each size.

    `cuts` may be set to the numbers of the frames that begin a new shot; the clip is then stored shot by shot. `notes`
    may get further notes of `ShardWriter.clip`.
    """

    def __init__(self, spools: Sequence[IO[bytes]]) -> None:
        self.cuts: Sequence[int] | None = None
        self.notes: dict[str, Sequence[Any] | np.ndarray] = {}
        self.lengths: list[list[int]] = []
        self._spools = spools

    def __call__(self, files: Sequence[bytes]) -> None:
        for spool, data in zip(self._spools, files, strict=True):
            spool.write(data)
        self.lengths.append([len(data) for data in files])

    def pieces(self, name: str) -> Iterator[tuple[str, range]]:
        """Yield the stored clips and their frames: the clip itself, or its shots."""
        num_frames = len(self.lengths)
        if self.cuts is None:
            yield name, range(num_frames)
            return
        for index, (first, stop) in enumerate(itertools.pairwise([0, *self.cuts, num_frames])):
            yield f"{name}/shot_{index:04d}", range(first, stop)


class ShardWriter:
    """Write one shard at several sizes: a zip in each size's folder, renamed to its final name when complete.

    Use it as a context manager: on an exception the temporary files are deleted, and an existing shard of the name is
    kept. A shard without clips leaves no zip, and removes an existing one. `report` describes the result.
    """

    def __init__(self, root: str | os.PathLike[str], sizes: Sequence[Size], index: int) -> None:
        self.root = Path(root)
        self.sizes = list(sizes)
        self.index = index
        self.paths = [self.root / size_name(size) / shard_name(index) for size in self.sizes]
        self.frame_paths: dict[str, list[str]] = {}
        self.dropped: list[tuple[str, int]] = []  # clips that were too short, with their numbers of frames
        self._clips: dict[str, dict[str, Any]] = {}
        self._notes: dict[str, dict[str, Any]] = {}
        self._audio: dict[str, np.ndarray] = {}
        self._hashes: dict[str, str] = {}

    def __enter__(self) -> "ShardWriter":
        with contextlib.ExitStack() as stack:
            self._zips: list[zipfile.ZipFile] = []
            self._temporaries: list[Path] = []
            for path in self.paths:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._temporaries.append(stack.enter_context(util.atomic_path(path)))
                self._zips.append(stack.enter_context(zipfile.ZipFile(self._temporaries[-1], "w", zipfile.ZIP_STORED)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        if exception[0] is not None:
            self._stack.__exit__(*exception)
            return
        with contextlib.ExitStack() as stack:
            stack.push(self._stack)
            for archive in self._zips:
                for name, content in {"frame_paths": self.frame_paths, **self._notes}.items():
                    store_member(archive, f"{name}.json", json.dumps(content, indent=2, sort_keys=True).encode())
                if self._audio:
                    store_audio(archive, self._audio)
        for path in self.paths:
            if self.frame_paths:
                self._hashes[path.relative_to(self.root).as_posix()] = file_sha256(path)
            else:
                path.unlink()

    def report(self, rates: Mapping[float, int] | None = None, skipped: Sequence[str] = ()) -> ShardReport:
        """Return the contents of the shard; to be called after the context has exited."""
        names = tuple(size_name(size) for size in self.sizes)
        return ShardReport(self.index, names, self._hashes, self._clips, dict(rates or {}), list(skipped))

    @contextlib.contextmanager
    def clip(
        self, name: str, min_frames: int = 1, facts: Mapping[str, Any] | None = None, **notes: Any
    ) -> Iterator[ClipWriter]:
        """Write one clip: yield a `ClipWriter` that takes its frames, as files, one for each size.

        Frames are named frame_000000.jpg and so on. A clip that ends in an exception leaves no trace in the shard, and
        one of fewer than `min_frames` frames only in `dropped`. `facts` go to the manifest. Each entry of `notes`, such
        as `actions=[...]`, goes to `<note>.json` under the clip's name and has one element per frame; "audio" is an
        array (see `training.data.audio_store`).
        """
        with contextlib.ExitStack() as stack:
            spools = [stack.enter_context(tempfile.TemporaryFile(dir=path.parent)) for path in self.paths]
            clip = ClipWriter(spools)
            yield clip
            for spool in spools:
                spool.seek(0)
            for piece, frames in clip.pieces(name):
                lengths = clip.lengths[frames.start : frames.stop]
                if len(frames) < max(min_frames, 1):
                    for spool, length in zip(spools, zip(*lengths, strict=True), strict=bool(lengths)):
                        spool.seek(sum(length), os.SEEK_CUR)
                    self.dropped.append((piece, len(frames)))
                    continue
                self._add(piece, spools, lengths, facts or {})
                for note, values in {**notes, **clip.notes}.items():
                    assert len(values) == len(clip.lengths), f"{note} of {name}: {len(values)} values"
                    if note == "audio":
                        self._audio[piece] = np.asarray(values)[frames.start : frames.stop]
                    else:
                        self._notes.setdefault(note, {})[piece] = list(values[frames.start : frames.stop])

    def _add(
        self, name: str, spools: Sequence[IO[bytes]], lengths: Sequence[Sequence[int]], facts: Mapping[str, Any]
    ) -> None:
        """Copy a clip's frames, whose files have the given lengths, from the spools into the zips."""
        assert name not in self.frame_paths, f"clip {name} is written twice"
        names = [f"frame_{index:06d}.jpg" for index in range(len(lengths))]
        digests = {}
        for size, archive, spool, column in zip(
            self.sizes, self._zips, spools, zip(*lengths, strict=True), strict=True
        ):
            digest = hashlib.sha256()
            for frame_name, length in zip(names, column, strict=True):
                data = spool.read(length)
                digest.update(data)
                store_member(archive, f"{name}/{frame_name}", data)
            digests[size_name(size)] = digest.hexdigest()
        self.frame_paths[name] = names
        self._clips[name] = {**facts, "frames": len(names), "sha256": digests}


def store_member(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Add a member to a zip, uncompressed and with a fixed date, so that equal contents give equal bytes."""
    info = zipfile.ZipInfo(name, _FIXED_TIME)
    info.create_system = 3  # Unix on every machine, for equal bytes
    info.external_attr = 0o644 << 16
    archive.writestr(info, data)


def store_audio(archive: zipfile.ZipFile, clips: Mapping[str, np.ndarray]) -> None:
    """Add the spectrograms of clips to a zip, as `training.data.audio_store` reads them."""
    from training.data.audio_store import LISTING, VALUES, packed  # torch would slow down --help

    content, listing = packed(clips)
    store_member(archive, VALUES, content)
    store_member(archive, LISTING, json.dumps(listing, indent=1).encode())


def refuse_mixture(
    root: str | os.PathLike[str], sizes: Sequence[Size], replaced: Iterable[int], num_partitions: int, **facts: Any
) -> None:
    """Raise ValueError if making partitions `replaced` at `sizes` would keep others made with different facts."""
    known = read_description(Path(root))
    if known is None:
        return
    made = {f"{size_name(size)}/{shard_name(index)}" for index in replaced for size in sizes}
    hashes, names = known.get("hashes", {}), set(map(size_name, sizes))
    beyond = {path for path in hashes if index_of(path) >= num_partitions and size_of(path) in names}
    left = sorted(set(hashes) - made - beyond)
    changed = _changes(known, {**facts, "num_partitions": num_partitions})
    if left and changed:
        raise ValueError(
            f"{root} holds {left[0]}{f' and {len(left) - 1} more' if left[1:] else ''} that would stay and was made "
            f"otherwise ({'; '.join(changed)}); give another output folder, or delete this one"
        )


def find_made(
    root: str | os.PathLike[str], sizes: Sequence[Size], num_partitions: int, **facts: Any
) -> dict[int, dict[str, Any]]:
    """Return the entries in dataset.json, by index, of the partitions that need not be made again.

    There are none if the list of sources has changed since. Raises ValueError for a dataset that was made with other
    options, so that it is not replaced by mistake.
    """
    known = read_description(Path(root))
    if known is None:
        return {}
    changed = _changes(known, {**facts, "num_partitions": num_partitions})
    if [phrase for phrase in changed if not phrase.startswith(_SOURCES)]:
        raise ValueError(
            f"{root} holds a dataset that was made otherwise ({'; '.join(changed)}); give the same options, another "
            "output folder, or no --skip-made to replace it"
        )
    made = {}
    for number, entry in known.get("partitions", {}).items() if not changed else ():
        paths = [f"{size_name(size)}/{shard_name(int(number))}" for size in sizes]
        if not entry["clips"] or all(path in known["hashes"] and (Path(root) / path).is_file() for path in paths):
            made[int(number)] = entry
    return made


def describe_dataset(
    root: str | os.PathLike[str],
    reports: Sequence[ShardReport],
    num_partitions: int,
    packages: Sequence[str],
    **facts: Any,
) -> None:
    """Write or extend `<root>/dataset.json` and `<root>/manifest.json` after some partitions were written.

    `facts` are source, split, seed and other facts common to all shards; the frame rate is that of most clips.
    Partitions may finish in any order and concurrently: entries of others, also about other sizes, are kept, unless
    they were made with different facts; their shards are then deleted.
    """
    assert not facts.keys() & set(DERIVED), facts
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    facts = json.loads(json.dumps({**facts, "num_partitions": num_partitions}))
    versions = {name: importlib.metadata.version(name) for name in packages}
    with locked(root):
        known = read_description(root)
        clips = read_manifest(root) if known is not None else {}
        hashes, partitions = (known.get("hashes", {}), known.get("partitions", {})) if known else ({}, {})
        if known is not None and _changes(known, facts):
            mine = {path for report in reports for path in report.hashes}
            for path in hashes.keys() - mine:
                (root / path).unlink(missing_ok=True)
            hashes, partitions, clips = {}, {}, {}
        for report in reports:
            hashes, clips = _without(report, hashes, clips)
            hashes |= report.hashes
            for name, clip in report.clips.items():
                before = clips.get(name, {"sha256": {}})
                clips[name] = {**clip, "shard": shard_name(report.index), "sha256": before["sha256"] | clip["sha256"]}
            partitions[f"{report.index:04d}"] = report.summary()
        write_description(root, facts, partitions, hashes, clips, versions)


def _without(
    report: ShardReport, hashes: Mapping[str, str], clips: Mapping[str, dict[str, Any]]
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Return hashes and clips without those of the report's partition at the report's sizes."""
    stale = {f"{name}/{shard_name(report.index)}" for name in report.size_names}
    kept = {}
    for name, clip in clips.items():
        if clip["shard"] == shard_name(report.index):
            rest = {size: digest for size, digest in clip["sha256"].items() if size not in report.size_names}
            if not rest:
                continue
            clip = {**clip, "sha256": rest}
        kept[name] = clip
    return {path: digest for path, digest in hashes.items() if path not in stale}, kept


def write_description(
    root: Path,
    facts: Mapping[str, Any],
    partitions: Mapping[str, Mapping[str, Any]],
    hashes: Mapping[str, str],
    clips: Mapping[str, Mapping[str, Any]],
    versions: Mapping[str, str],
) -> None:
    """Write dataset.json and manifest.json; equal inputs give equal bytes."""
    rates: collections.Counter[str] = collections.Counter()
    for entry in partitions.values():
        rates.update(entry["rates"])
    description = {
        **facts,
        "fps": max((count, float(rate)) for rate, count in rates.items())[1] if rates else None,
        "sizes": sorted({size_of(path) for path in hashes}),
        "partitions": partitions,
        "num_clips": len(clips),
        "num_frames": sum(clip["frames"] for clip in clips.values()),
        "versions": versions,
        "hashes": hashes,
    }
    for name, content in ((MANIFEST, {"clips": clips}), (DESCRIPTION, description)):
        with util.atomic_path(root / name) as temporary:
            Path(temporary).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _changes(known: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """Return one phrase for each fact that differs from dataset.json."""
    facts = json.loads(json.dumps(facts))
    return [
        f"{name} is {known.get(name)!r}, not {value!r}" for name, value in facts.items() if known.get(name) != value
    ]


def size_of(shard: str) -> str:
    """Return the size folder of a shard, given by its path inside the root."""
    return shard.partition("/")[0]


def index_of(shard: str) -> int:
    """Return the number of a shard named by `shard_name`, -1 for any other name."""
    match = re.fullmatch(r"partition_(\d{4,5})\.zip", Path(shard).name)
    return int(match[1]) if match else -1


def locked(root: Path) -> contextlib.AbstractContextManager[None]:
    """Lock the description of a dataset against other processes."""
    return locks.locked(root / f"{DESCRIPTION}.lock")
