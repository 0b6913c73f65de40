"""The cache of compiled operators, and the error that says why one is not available."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import dnnlib
from dnnlib import util


class Unavailable(RuntimeError):
    """Compiled operators are not available here; `cause` and `remedy` are parts of a sentence for the user."""

    def __init__(self, cause: str, remedy: str):
        super().__init__(f"{cause}; {remedy}")
        self.cause = cause
        self.remedy = remedy


def cached_file(name: str, key: str, build: Callable[[Path], None]) -> Path:
    """Return the path of a binary in the cache; `build(path)` writes it if it is missing.

    name: a file name with a suffix. key: all that the content depends on (sources, options, versions, architecture),
    in a fixed order. `build` writes a temporary file, which is renamed when complete, so that several processes may
    build at the same time, and a process that is killed leaves no incomplete binary.
    Raises Unavailable if the cache cannot be written; errors of `build` other than OSError are passed on.
    """
    stem, suffix = os.path.splitext(name)
    digest = hashlib.sha256(key.encode()).hexdigest()[:20]
    path = Path(dnnlib.make_cache_dir_path("kernels", f"{stem}-{digest}{suffix}"))
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with util.atomic_path(path) as temporary:
            build(temporary)
    except OSError as error:
        cause = f"the folder of compiled operators, {path.parent}, cannot be written ({error.strerror or error})"
        raise Unavailable(cause, "free disk space or set DNNLIB_CACHE_DIR to another folder") from error
    return path
