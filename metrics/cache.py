"""Cache of features of existing clips: a `.npz` without pickles, and beside it a `.json` that describes it.

The name is a hash of everything the numbers depend on: the footage's content, not its path; the windows chosen, the
frame size, the detector's weights. A copy of a dataset elsewhere finds the same file, a changed one does not. How many
items there are is not part of it: those of a smaller number are the first ones of a larger.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from dnnlib import locks
from dnnlib.util import atomic_path, make_cache_dir_path
from training.data.footage import dataset_id as dataset_id
from training.side_files import warn_once

SCHEMA = 2  # raised when the same key would mean other numbers


def load(description: Mapping[str, object]) -> dict[str, np.ndarray] | None:
    """Return the arrays stored for `description`, None if there are none that can be read."""
    found: dict[str, np.ndarray] = {}
    return found if restore(description, found.update) else None


def restore(description: Mapping[str, object], use: Callable[[Mapping[str, np.ndarray]], None]) -> bool:
    """Pass the arrays stored for `description` to `use`; return whether there were any, and `use` did not fail.

    A damaged file costs a warning: what it should hold is computed again.
    """
    file = _path(description)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            use({name: arrays[name] for name in arrays.files})
    except FileNotFoundError:
        return False
    except Exception as error:  # NumPy raises many exception types for damaged files
        warn_once(f"{file} is damaged ({type(error).__name__}), so what it should hold is computed again")
        return False
    return True


def save(description: Mapping[str, object], arrays: Mapping[str, np.ndarray]) -> Path:
    """Store arrays for `description`, replacing what is there; readers see the old file or the whole new one.

    Where nothing can be stored a warning says so: the next time the arrays are computed again.
    """
    file = _path(description)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps({"schema": SCHEMA, **description}, indent=2, sort_keys=True) + "\n")
        with atomic_path(file) as temporary:
            np.savez(temporary, allow_pickle=False, **dict(arrays))
    except OSError as error:
        warn_once(
            f"{file} was not stored ({error.strerror}); free disk space, or set DNNLIB_CACHE_DIR to another folder"
        )
    return file


@contextlib.contextmanager
def locked(description: Mapping[str, object]) -> Iterator[None]:
    """Let one process at a time into this block for the same `description`; others wait."""
    file = _path(description).with_suffix(".lock")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a folder that cannot be written, or has no locks: work is done twice
            file.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locks.locked(file))
        yield


def _path(description: Mapping[str, object]) -> Path:
    key = hashlib.sha256(_canonical({"schema": SCHEMA, **description})).hexdigest()[:32]
    return Path(make_cache_dir_path("metrics", f"{key}.npz"))


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
