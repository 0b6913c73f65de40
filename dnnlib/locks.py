"""Locks between processes, which the system drops when their holder ends, however that happens."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any


def open_locked(path: Path, mode: str = "a", waiting: Callable[[], None] | None = None) -> IO[Any]:
    """Open a file for appending, made if it is not there, and hold its lock until it is closed.

    The file is the one that has this name now: whoever held the lock before may have removed or renamed the very file
    that was waited for. `waiting` is called if another process holds the lock.
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
    """Hold a lock that is nothing else; its file is gone when nobody holds it or waits for it."""
    with open_locked(path):
        try:
            yield
        finally:
            path.unlink()
