"""Write datasets: shards of stored JPEGs that appear whole or not at all, and the dataset.json that describes them."""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from dataset_tools.frames import Size
from dnnlib import util

_FIXED_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest a zip can hold: the same frames make the same bytes whenever made

T = TypeVar("T")


def size_name(size: Size) -> str:
    """The folder of one frame size: "0036x0064" for height 36, width 64."""
    return f"{size[0]:04d}x{size[1]:04d}"


def shard_name(index: int) -> str:
    """The file name of shard `index`, as "partition_0000.zip"."""
    return f"partition_{index:04d}.zip"


def partition(items: Sequence[T], index: int, num_partitions: int) -> Sequence[T]:
    """Run number `index` of `num_partitions` contiguous, nearly equal runs; the first ones get the remainder."""
    if not 0 <= index < num_partitions:
        raise ValueError(
            f"partition {index} does not exist; {num_partitions} partitions are 0 ... {num_partitions - 1}"
        )
    size, longer = divmod(len(items), num_partitions)
    start = index * size + min(index, longer)
    return items[start : start + size + (index < longer)]


class ShardWriter:
    """One shard at several sizes: a zip in each size's folder, renamed to its final name when all is written.

    Use it as a context manager: on an exception nothing is left behind, and an earlier shard of the name stays as is.
    `hashes` maps each written file, relative to the root, to its SHA-256 once the context is left.
    """

    def __init__(self, root: str | os.PathLike[str], sizes: Sequence[Size], index: int) -> None:
        self.root = Path(root)
        self.sizes = list(sizes)
        self.paths = [self.root / size_name(size) / shard_name(index) for size in self.sizes]
        self.hashes: dict[str, str] = {}
        self.frame_paths: dict[str, list[str]] = {}
        self._notes: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> "ShardWriter":
        with contextlib.ExitStack() as stack:
            self._zips: list[zipfile.ZipFile] = []
            for path in self.paths:
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = stack.enter_context(util.atomic_path(path))
                self._zips.append(stack.enter_context(zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        if exception[0] is None:
            with contextlib.ExitStack() as stack:
                stack.push(self._stack)
                for archive in self._zips:
                    for name, content in {"frame_paths": self.frame_paths, **self._notes}.items():
                        _store(archive, f"{name}.json", json.dumps(content, indent=2, sort_keys=True).encode())
            self.hashes = {path.relative_to(self.root).as_posix(): _sha256(path) for path in self.paths}
        else:
            self._stack.__exit__(*exception)

    @contextlib.contextmanager
    def clip(self, name: str, **notes: Any) -> Iterator[Callable[[Sequence[bytes]], None]]:
        """Write one clip: yields a function that takes the next frame's files, one for each size.

        Frames are named frame_000000.jpg and so on. A clip that ends in an exception, or without a frame, leaves no
        trace in the shard. Each entry of `notes`, such as `actions=[...]`, goes to `<note>.json` under the clip's name
        and has one element for each frame.
        """
        assert name not in self.frame_paths, f"clip {name} is written twice"
        with contextlib.ExitStack() as stack:
            spools = [stack.enter_context(tempfile.TemporaryFile(dir=path.parent)) for path in self.paths]
            lengths: list[list[int]] = []

            def add(files: Sequence[bytes]) -> None:
                for spool, data in zip(spools, files, strict=True):
                    spool.write(data)
                lengths.append([len(data) for data in files])

            yield add
            names = [f"frame_{index:06d}.jpg" for index in range(len(lengths))]
            for archive, spool, sizes in zip(self._zips, spools, zip(*lengths, strict=True), strict=bool(lengths)):
                spool.seek(0)
                for frame_name, length in zip(names, sizes, strict=True):
                    _store(archive, f"{name}/{frame_name}", spool.read(length))
        if names:
            self.frame_paths[name] = names
            for note, values in notes.items():
                assert len(values) == len(names), f"{note} of {name}: {len(values)} values for {len(names)} frames"
                self._notes.setdefault(note, {})[name] = list(values)


def _store(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    info = zipfile.ZipInfo(name, _FIXED_TIME)
    info.create_system = 3  # Unix on every machine, for the same bytes
    info.external_attr = 0o644 << 16
    archive.writestr(info, data)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_mixture(root: str | os.PathLike[str], sizes: Sequence[Size], **facts: Any) -> None:
    """ValueError if making `sizes` would leave frames of other sizes at `root` that were made with other `facts`."""
    path = Path(root) / "dataset.json"
    if not path.exists():
        return
    known = json.loads(path.read_text())
    others = sorted(set(known["sizes"]) - {size_name(size) for size in sizes})
    changed = [
        f"{name} is {known.get(name)!r}, not {value!r}" for name, value in facts.items() if known.get(name) != value
    ]
    if others and changed:
        raise ValueError(
            f"{root} holds frames of size {', '.join(others)} that were made otherwise ({'; '.join(changed)}), so the "
            "sizes would not match; give another output folder, or all its sizes"
        )


def describe_dataset(
    root: str | os.PathLike[str],
    hashes: Mapping[str, str],
    num_partitions: int,
    packages: Sequence[str],
    **facts: Any,
) -> None:
    """Write or extend `<root>/dataset.json` after some shards were written, and delete shards of an earlier making.

    `facts` are fps, source, split, seed and whatever else holds for all shards. Partitions may finish in any order and
    at the same time: what others wrote about their shards, or about other sizes, is kept.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / "dataset.json.lock"):
        path = root / "dataset.json"
        known = json.loads(path.read_text())["hashes"] if path.exists() else {}
        for directory in {(root / name).parent for name in hashes}:
            for shard in directory.glob("partition_*.zip"):
                match = re.fullmatch(r"partition_(\d+)\.zip", shard.name)
                if match is not None and int(match[1]) >= num_partitions:
                    shard.unlink()
        merged = {name: digest for name, digest in {**known, **hashes}.items() if (root / name).exists()}
        description = {
            **facts,
            "sizes": sorted({Path(name).parent.name for name in merged}),
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "hashes": merged,
        }
        with util.atomic_path(path) as temporary:
            Path(temporary).write_text(json.dumps(description, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold `path` as a lock between processes; the file is gone when nobody holds it."""
    while True:
        file: IO[str] = open(path, "a")
        fcntl.flock(file, fcntl.LOCK_EX)
        # Whoever held it before may have removed the file that was waited for; then another one is the lock now.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            break
        file.close()
    with file:
        try:
            yield
        finally:
            path.unlink()
