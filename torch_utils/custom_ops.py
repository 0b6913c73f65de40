"""Compiled operators: where their binaries are kept, why one is missing, and a doctor for both.

python -m torch_utils.custom_ops
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import click

import dnnlib
from dnnlib import util


class Unavailable(RuntimeError):
    """Compiled operators cannot be had here; `cause` and `remedy` are parts of a sentence for the user."""

    def __init__(self, cause: str, remedy: str):
        super().__init__(f"{cause}; {remedy}")
        self.cause = cause
        self.remedy = remedy


def cached_file(name: str, key: str, build: Callable[[Path], None]) -> Path:
    """Returns the path of a binary, built by `build(path)` unless the cache has it.

    name: a file name with a suffix. key: all that the content depends on (sources, options, versions, architecture),
    in any order that does not change. `build` writes a temporary file that is renamed when whole, so that any number of
    processes may come first at once, and one that is killed leaves nothing in the way of the next.
    Raises Unavailable if the cache cannot be written, and what `build` raises.
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
        raise Unavailable(cause, "make room there or set DNNLIB_CACHE_DIR to another folder") from error
    return path


@click.command()
def main() -> None:
    """Tell which implementation each operator takes on this machine and why, and check its numbers.

    Exits with 1 if an operator computes wrong ones.
    """
    from torch_utils.ops import doctor  # operators import this module

    sys.exit(0 if doctor.report() else 1)


if __name__ == "__main__":
    main()
