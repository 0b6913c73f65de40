"""Locks between processes, which the operating system releases when the holding process ends for any reason."""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

_STAGE = ".unfinished-"
_TEMPORARY = re.compile(r"\.(.*)\.\d+-[0-9a-f]{8}\.tmp(\.[^.]*)?")  # names that `new_temporary` gives
OTHERS_SEC = 3600.0


def hold(descriptor: int, wait: bool = False) -> bool:
    """Take the lock of an open file or folder; return whether this process holds it.

    It does not if another process holds it and `wait` is False, nor on file systems without locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file or folder is the one at `path`, which another process may have replaced."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def open_locked(path: Path, mode: str = "a", waiting: Callable[[], None] | None = None) -> IO[Any]:
    """Open a file for appending, create it if it is missing, and hold its lock until it is closed.

    The lock is taken again if the previous holder removed or renamed the file, so that the returned file is the one at
    `path`. `waiting` is called if another process holds the lock; it may raise to give up.
    """
    while True:
        file = open(path, mode)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting is not None:
                    waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            if is_at(file.fileno(), path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock on a file that has no other use; it is removed when no process holds the lock or waits for it."""
    with open_locked(path):
        try:
            yield
        finally:
            path.unlink()


# ----------------------------------------------------------------------------
# Unfinished files and folders, whose lock tells that their writer is at work.


def new_temporary(path: Path, sweep: bool = True) -> tuple[Path, int]:
    """Create an empty hidden file beside `path`, of the same suffix; return it, and a descriptor that holds its lock.

    With `sweep`, those that killed processes left in the folder are removed first; those of other files only if nobody
    has written to them for an hour, as earlier versions took no locks.
    """
    for name in os.listdir(path.parent) if sweep else ():
        match = _TEMPORARY.fullmatch(name)
        if match:
            is_ours = (match[1], match[2] or "") == (path.stem, path.suffix)
            _remove_if_left(path.with_name(name), 0.0 if is_ours else OTHERS_SEC)
    while True:
        temporary = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.tmp{path.suffix}")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        hold(descriptor, wait=True)
        if is_at(descriptor, temporary):
            return temporary, descriptor
        os.close(descriptor)  # another process removed it before the lock was taken


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder inside `folder` for unfinished files; it is removed when the block ends, also by an error.

    Folders of processes that were killed are removed first. A lock on each folder marks those still in use.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stage in folder.glob(f"{_STAGE}*"):
        _remove_if_left(stage)
    while True:
        stage = Path(tempfile.mkdtemp(prefix=_STAGE, dir=folder))
        try:
            descriptor = os.open(stage, os.O_RDONLY)
        except FileNotFoundError:  # removed by another process before its lock was taken, as below
            continue
        try:
            hold(descriptor, wait=True)
            if is_at(descriptor, stage):
                try:
                    yield stage
                finally:
                    shutil.rmtree(stage, ignore_errors=True)
                return
        finally:
            os.close(descriptor)


def _remove_if_left(path: Path, min_sec: float = 0.0) -> None:
    """Remove an unfinished file or folder that no process holds and that was last written to `min_sec` ago or earlier.

    It is kept where that cannot be told or done.
    """
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime < min_sec:
            return
        is_folder = path.is_dir()
        # Over NFS only a file that is open for writing can be locked.
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            if hold(descriptor) and is_at(descriptor, path):
                if is_folder:
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
        finally:
            os.close(descriptor)
