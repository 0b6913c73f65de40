"""Helpers that do not import torch: attribute dictionaries, atomic file writing, the cache folder, downloads."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dnnlib import download, locks

_cache_dir: str | None = None


class EasyDict(dict[str, Any]):
    """Give a dict attribute access to its keys: `options.steps` is `options["steps"]`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(name) from None


# ----------------------------------------------------------------------------
# Durations.


def format_time(seconds: float) -> str:
    """Format a duration in seconds to the second, from a day on to the minute: 7s, 2m 05s, 3h 00m 09s, 1d 02h 03m."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 60 * 60:
        return f"{s // 60}m {s % 60:02}s"
    if s < 24 * 60 * 60:
        return f"{s // 3600}h {s // 60 % 60:02}m {s % 60:02}s"
    return f"{s // 86400}d {s // 3600 % 24:02}h {s // 60 % 60:02}m"


def format_time_brief(seconds: float) -> str:
    """Format a duration in seconds with its two largest units: 7s, 2m 05s, 3h 00m, 1d 02h."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 60 * 60:
        return f"{s // 60}m {s % 60:02}s"
    if s < 24 * 60 * 60:
        return f"{s // 3600}h {s // 60 % 60:02}m"
    return f"{s // 86400}d {s // 3600 % 24:02}h"


# ----------------------------------------------------------------------------
# Files and the cache folder.


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with the same suffix, and rename it to `path` when the block succeeds.

    Readers see the old file or the complete new one, also after a power cut: the file is on the disk before it is
    renamed, and its name when this returns. If the block raises, the temporary file is removed and `path` is unchanged.
    The temporary name starts with a dot and contains ".tmp"; those that killed processes left are removed when `path`
    is written again, or after an hour when any file in the folder is. `durable` is False for one of many files in a
    folder that `frames_out.publish` brings to the disk.
    """
    path = Path(path)
    temporary, descriptor = locks.new_temporary(path, sweep=durable)
    try:
        yield temporary
        if durable:
            to_disk(temporary)
        os.replace(temporary, path)
        if durable:
            to_disk(path.parent)
    finally:
        with contextlib.suppress(OSError):  # an error of the block says more
            temporary.unlink(missing_ok=True)
        os.close(descriptor)


def to_disk(path: Path) -> None:
    """Wait until a file, or the list of names of a folder, is on the disk; raise OSError if a file cannot be."""
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not is_folder and error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # there is no such call
            raise


def size_name(size: tuple[int, int]) -> str:
    """Return the name of a dataset folder for frames of `size` (height, width): "0036x0064" for 36 x 64 pixels."""
    return f"{size[0]:04d}x{size[1]:04d}"


def set_cache_dir(path: str | os.PathLike[str]) -> None:
    """Set the cache root of this process, which takes precedence over DNNLIB_CACHE_DIR."""
    global _cache_dir
    _cache_dir = os.fspath(path)


def make_cache_dir_path(*paths: str) -> str:
    """Join `paths` to the cache root: that of set_cache_dir, else $DNNLIB_CACHE_DIR, else ~/.cache/dnnlib."""
    if _cache_dir is not None:
        return os.path.join(_cache_dir, *paths)
    if "DNNLIB_CACHE_DIR" in os.environ:
        return os.path.join(os.environ["DNNLIB_CACHE_DIR"], *paths)
    for home in ("HOME", "USERPROFILE"):
        if home in os.environ:
            return os.path.join(os.environ[home], ".cache", "dnnlib", *paths)
    return os.path.join(tempfile.gettempdir(), ".cache", "dnnlib", *paths)


# ----------------------------------------------------------------------------
# Downloads.


def is_url(obj: Any, allow_file_urls: bool = False) -> bool:
    """Return whether `obj` is an http or https address of a host, or, if allowed, a file:// address."""
    if not isinstance(obj, str) or "://" not in obj:
        return False
    parts = urllib.parse.urlparse(obj)
    if parts.scheme == "file":
        return allow_file_urls
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def open_url(
    url: str,
    cache_dir: str | None = None,
    num_attempts: int = 10,
    verbose: bool = True,
    return_filename: bool = False,
    cache: bool = True,
    sha256: str | None = None,
) -> Any:
    """Open a local file or a download for reading bytes; with `return_filename`, return its file name instead.

    Local paths and file:// addresses are opened in place. Downloads are kept in <cache>/downloads and read from there
    the next time; with cache=False they go to an unnamed temporary file. An interrupted download is resumed, in at
    most `num_attempts` attempts, with increasing delays. With `sha256` (hex digits), or an address that ends in
    "#sha256=<hex digits>", the bytes are checked. With DNNLIB_OFFLINE=1 in the environment nothing is downloaded.

    Raises ValueError if the address is malformed or cannot be reached, the content does not match the hash or is a
    web page, or the cache cannot be written.
    """
    assert num_attempts >= 1
    if not re.match(r"^[a-z][a-z0-9+.-]*://", url):
        return _open_local(url, sha256, return_filename)
    url, sha256 = download.split_hash(url, sha256)
    if url.startswith("file://"):
        name = urllib.request.url2pathname(urllib.parse.urlparse(url).path)
        return _open_local(name, sha256, return_filename)
    if not is_url(url):
        raise ValueError(f"cannot open {url}: expected a local path or an https://, http:// or file:// address")
    if not cache:
        assert not return_filename, "a download that is not cached has no file name"
        file = tempfile.TemporaryFile()
        download.fetch_into(url, file, num_attempts, verbose, sha256)
        file.seek(0)
        return file
    folder = Path(cache_dir if cache_dir is not None else make_cache_dir_path("downloads"))
    path = download.fetch(url, folder, num_attempts, verbose, sha256)
    return str(path) if return_filename else open(path, "rb")


def _open_local(name: str, sha256: str | None, return_filename: bool) -> Any:
    if sha256 is not None:
        found = download.file_sha256(name)
        if found != sha256.lower():
            raise ValueError(f"{name} has SHA-256 {found}, expected {sha256.lower()}: it is damaged or another file")
    return name if return_filename else open(name, "rb")
