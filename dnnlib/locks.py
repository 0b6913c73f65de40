"""Locks between processes, which the operating system releases when the holding process ends for any reason."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any


def open_locked(path: Path, mode: str = "a", waiting: Callable[[], None] | None = None) -> IO[Any]:
    """Open a file for appending, create it if it is missing, and hold its lock until it is closed.

    The lock is taken again if the previous holder removed or renamed the file, so that the returned file is the one at
    `path`. `waiting` is called if another process holds the lock.
    """
    while True:
        file = open(path, mode)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock on a file that has no other use; it is removed when no process holds the lock or waits for it."""
    with open_locked(path):
        try:
            yield
        finally:
            path.unlink()
