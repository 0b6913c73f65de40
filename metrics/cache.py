"""Cache of features of existing clips: a `.npz` without pickles, and beside it a `.json` that describes it.

The name is a hash of everything the numbers depend on: the footage's content, not its path; the windows chosen, the
frame size, the detector's weights. A copy of a dataset elsewhere finds the same file, a changed one does not. How many
items there are is not part of it: those of a smaller number are the first ones of a larger.
"""

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from dnnlib.util import atomic_path, make_cache_dir_path
from training.data.footage import dataset_id as dataset_id

SCHEMA = 2  # raised when the same key would mean other numbers


def load(description: Mapping[str, object]) -> dict[str, np.ndarray] | None:
    """Return the arrays stored for `description`, or None when there are none."""
    file = _path(description)
    if not file.is_file():
        return None
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def save(description: Mapping[str, object], arrays: Mapping[str, np.ndarray]) -> Path:
    """Store arrays for `description`, replacing what is there; readers see the old file or the whole new one."""
    file = _path(description)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file.with_suffix(".json")) as temporary:
        Path(temporary).write_text(json.dumps({"schema": SCHEMA, **description}, indent=2, sort_keys=True) + "\n")
    with atomic_path(file) as temporary:
        np.savez(temporary, allow_pickle=False, **dict(arrays))
    return file


@contextlib.contextmanager
def locked(description: Mapping[str, object]) -> Iterator[None]:
    """Let one process at a time into this block for the same `description`; others wait."""
    file = _path(description).with_suffix(".lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _path(description: Mapping[str, object]) -> Path:
    key = hashlib.sha256(_canonical({"schema": SCHEMA, **description})).hexdigest()[:32]
    return Path(make_cache_dir_path("metrics", f"{key}.npz"))


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
