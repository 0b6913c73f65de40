"""Features of real clips, stored once: a `.npz` without pickles, and beside it a `.json` that says what it holds.

The name is a hash of everything the numbers depend on: the dataset's content, not its path; the windows chosen, the
frame size, the detector's weights. A copy of a dataset elsewhere finds the same file, a changed one does not.
"""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np

from dnnlib.util import atomic_path, make_cache_dir_path

SCHEMA = 1  # raised when the same key would mean other numbers


def dataset_id(root: str | Path, size: tuple[int, int]) -> str:
    """What the frames of one size of a dataset are, as 16 hex digits.

    A hash of each shard's name and size, and of the path, length and CRC of each member as the zip's directory gives
    them: no frame is read.
    """
    digest = hashlib.sha256()
    for shard in sorted((Path(root) / f"{size[0]:04d}x{size[1]:04d}").glob("*.zip")):
        digest.update(_canonical([shard.name, shard.stat().st_size]))
        with zipfile.ZipFile(shard) as archive:
            for member in sorted(archive.infolist(), key=lambda member: member.filename):
                digest.update(_canonical([member.filename, member.file_size, member.CRC]))
    return digest.hexdigest()[:16]


def load(description: dict) -> np.ndarray | None:
    """The features stored for `description`, float32 (N, d), or None when there are none."""
    file = _path(description)
    if not file.is_file():
        return None
    with np.load(file, allow_pickle=False) as arrays:
        return arrays["features"]


def save(description: dict, features: np.ndarray) -> Path:
    """Store the features of `description`, replacing what is there; readers see the old file or the whole new one."""
    file = _path(description)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file.with_suffix(".json")) as temporary:
        Path(temporary).write_text(json.dumps({"schema": SCHEMA, **description}, indent=2, sort_keys=True) + "\n")
    with atomic_path(file) as temporary:
        np.savez(temporary, features=features.astype(np.float32))
    return file


def _path(description: dict) -> Path:
    key = hashlib.sha256(_canonical({"schema": SCHEMA, **description})).hexdigest()[:32]
    return Path(make_cache_dir_path("metrics", f"{key}.npz"))


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
