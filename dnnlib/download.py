"""Downloads that are either complete or absent: resumed after errors, checked, and shared by all processes.

In the cache folder the bytes go to `<md5 of the address>.part`, which is renamed when it is complete. `<md5>.etag`
beside it holds the ETag, with which the server names a version of the content: only bytes of one version are combined.
The downloading process holds a lock on the part, which the operating system releases when the process ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from dnnlib.locks import open_locked

if TYPE_CHECKING:
    import requests  # imported where it is used: it takes a third of the start of a command that downloads nothing

CHUNK_BYTES = 1 << 20
CONNECT_TIMEOUT_SEC = 10.0
READ_TIMEOUT_SEC = 60.0
FIRST_DELAY_SEC = 0.25
LONGEST_DELAY_SEC = 4.0

# A server that sends less than this within the read time-out has stalled.
SLOWEST_BYTES_PER_SEC = 1000

# Client errors that are worth another attempt: request timeout, too early, too many requests.
TRANSIENT_CLIENT_ERRORS = (408, 425, 429)

ETAG = r'"[\x21\x23-\x7e\x80-\xff]+"'  # RFC 9110, 8.8.3

REMEDY = "check the address and the connection, or fetch the file by other means and give its path"


def split_hash(url: str, sha256: str | None = None) -> tuple[str, str | None]:
    """Split the fragment "#sha256=<hex digits>" off an address; return (address, hash in lower case or None).

    Raises ValueError if the fragment is not a hash or differs from `sha256`.
    """
    address, _, fragment = url.partition("#")
    if not fragment.startswith("sha256="):
        return url, sha256.lower() if sha256 is not None else None
    found = fragment.removeprefix("sha256=").lower()
    if not re.fullmatch(r"[0-9a-f]{64}", found):
        raise ValueError(f"{url} ends in {len(found)} characters for its SHA-256, expected 64 hexadecimal digits")
    if sha256 is not None and sha256.lower() != found:
        raise ValueError(f"{url} names another SHA-256 than the {sha256.lower()} expected of it")
    return address, found


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as lower-case hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_web_page(head: bytes) -> bool:
    """Return whether a file that begins with `head` is HTML, which servers often send instead of a file."""
    return bool(re.match(rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)?<(!doctype\s+html|html|head|body)\b", head, re.I | re.S))


def fetch(url: str, folder: Path, num_attempts: int = 10, verbose: bool = True, sha256: str | None = None) -> Path:
    """Return the path of an address in the cache `folder`; download it if it is missing or has another hash.

    If several processes need it at the same time, one downloads and the others wait.

    Raises ValueError if the address cannot be reached, the content is incomplete or does not match `sha256`, the folder
    cannot be written, or a download is needed and DNNLIB_OFFLINE is set.
    """
    path = _find_cached(url, folder, sha256)
    if path is not None:
        return path
    _refuse_offline(url, f"is not in {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{_prefix(url)}.part", url, verbose) as file:
            path = _find_cached(url, folder, sha256)
            return path if path is not None else _complete(url, file, folder, num_attempts, verbose, sha256)
    except OSError as error:
        raise ValueError(
            f"cannot keep {url} in {folder} ({error.strerror}): free some space, or set DNNLIB_CACHE_DIR to a folder "
            "on a larger disk that you may write to"
        ) from error


def fetch_into(url: str, file: IO[bytes], num_attempts: int, verbose: bool, sha256: str | None) -> None:
    """Download an address into an open file, without the cache; raises ValueError as `fetch` does."""
    _refuse_offline(url, "is asked for without the cache")
    _download(url, _Part(file), num_attempts, verbose, sha256)


def _refuse_offline(url: str, reason: str) -> None:
    if os.environ.get("DNNLIB_OFFLINE", "0") not in ("", "0"):
        raise ValueError(
            f"{url} {reason}, and DNNLIB_OFFLINE forbids downloads: unset DNNLIB_OFFLINE, or give the path of a file"
        )


def _prefix(url: str) -> str:
    return hashlib.md5(url.encode("utf-8"), usedforsecurity=False).hexdigest()


def _find_cached(url: str, folder: Path, sha256: str | None) -> Path | None:
    # The server may have renamed the file between two downloads, so more than one can match: the newest counts.
    found = [(path.stat(), path) for path in folder.glob(f"{_prefix(url)}_*") if path.is_file()]
    paths = [path for status, path in sorted(found, key=lambda pair: -pair[0].st_mtime) if status.st_size]
    if not paths or (sha256 is not None and file_sha256(paths[0]) != sha256):
        return None
    return paths[0]


@contextlib.contextmanager
def _locked(path: Path, url: str, verbose: bool) -> Iterator[IO[bytes]]:
    """Open the part and hold its lock; at the end, remove the part if it is empty."""

    def tell() -> None:
        if verbose:
            print(f"Another process is downloading {url}; waiting for it ...", flush=True)

    file = open_locked(path, "a+b", tell)
    with file:
        try:
            yield file
        finally:
            if path.exists() and path.stat().st_size == 0:
                path.unlink()
                path.with_suffix(".etag").unlink(missing_ok=True)


def _complete(url: str, file: IO[bytes], folder: Path, num_attempts: int, verbose: bool, sha256: str | None) -> Path:
    part_path = folder / f"{_prefix(url)}.part"
    part = _Part(file, part_path.with_suffix(".etag"))
    try:
        name = _download(url, part, num_attempts, verbose, sha256)
    except BaseException:
        if not part.etag:  # without an ETag the bytes cannot be continued safely
            part.restart(None)
        raise
    os.fsync(file.fileno())
    path = folder / f"{_prefix(url)}_{re.sub(r'[^0-9a-zA-Z._-]', '_', name)[-128:]}"
    os.replace(part_path, path)
    part_path.with_suffix(".etag").unlink(missing_ok=True)
    return path


class _Part:
    """The bytes received so far, and the ETag of the version they belong to ("" if there is none)."""

    def __init__(self, file: IO[bytes], etag_path: Path | None = None):
        self.file = file
        self.etag_path = etag_path
        self.etag = "" if etag_path is None else _read_etag(etag_path)

    @property
    def num_bytes(self) -> int:
        """Return the number of bytes received; the file position is left at the end."""
        return self.file.seek(0, os.SEEK_END)

    def restart(self, etag: str | None) -> None:
        """Drop all bytes before bytes of the version `etag` are written; a weak ETag does not identify a version."""
        self.file.seek(0)
        self.file.truncate()
        self.etag = etag if etag is not None and re.fullmatch(ETAG, etag) else ""
        if self.etag_path is not None:
            self.etag_path.write_bytes(self.etag.encode("latin-1"))


def _read_etag(path: Path) -> str:
    """Return the ETag that a file holds, "" if it is missing or damaged, so that the download begins anew."""
    try:
        text = path.read_bytes().decode("latin-1")
    except OSError:
        return ""
    return text if re.fullmatch(ETAG, text) else ""


# ----------------------------------------------------------------------------
# One download in several attempts.


class _AttemptError(Exception):
    """The answer is not what was announced or requested; another attempt may succeed."""


class _FinalError(Exception):
    """An answer of the server that another attempt would not change."""


def _download(url: str, part: _Part, num_attempts: int, verbose: bool, sha256: str | None) -> str:
    """Download into `part` and return the file name that the server or the address gives."""
    import requests

    if verbose:
        print(f"Downloading {url} ...", flush=True)
    problem = ""
    for attempt in range(num_attempts):
        if attempt > 0:
            delay_sec = min(FIRST_DELAY_SEC * 2 ** (attempt - 1), LONGEST_DELAY_SEC)
            if verbose:
                print(f"    {problem}; trying again in {delay_sec:g} s", flush=True)
            time.sleep(delay_sec)
        try:
            name = _attempt(url, part, verbose)
            _check(part, sha256)
            return name
        except requests.TooManyRedirects:
            problem = "the server keeps redirecting to other addresses"
            break
        except requests.exceptions.SSLError:
            problem = "the server's certificate could not be verified"
            break
        except (_FinalError, requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema) as error:
            problem = str(error)
            break
        except requests.Timeout:
            problem = "the server did not answer in time"
        except requests.ConnectionError:
            problem = "no connection to the server (offline, or the host does not exist)"
        except (requests.RequestException, _AttemptError) as error:
            problem = str(error)
    raise ValueError(f"cannot download {url}: {problem}; {REMEDY}")


def _attempt(url: str, part: _Part, verbose: bool) -> str:
    import requests

    # Without compression in transit, Content-Length equals the number of bytes that are written.
    headers = {"Accept-Encoding": "identity"}
    if part.etag and part.num_bytes > 0:
        headers |= {"Range": f"bytes={part.num_bytes}-", "If-Range": part.etag}
    with requests.get(url, headers=headers, stream=True, timeout=(CONNECT_TIMEOUT_SEC, READ_TIMEOUT_SEC)) as response:
        total = _begin(response, part)
        _receive(response, part, total, verbose)
        if total is not None and part.num_bytes != total:
            raise _AttemptError(f"only {part.num_bytes} of {total} bytes were received")
        match = re.search(r'filename="?([^";]+)"?', response.headers.get("Content-Disposition", ""))
        return match[1] if match else url


def _begin(response: requests.Response, part: _Part) -> int | None:
    """Check the answer, drop bytes that it does not continue, and return the total length in bytes, if known."""
    status, headers = response.status_code, response.headers
    if status == 206:
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("Content-Range", ""))
        if match and int(match[1]) == part.num_bytes and headers.get("ETag") == part.etag:
            return int(match[3])
        part.restart(None)
        raise _AttemptError("the server continued another version of the file, or elsewhere")
    if status == 416:
        part.restart(None)
        raise _AttemptError("the server has fewer bytes than were received before")
    if status != 200:
        error = _AttemptError if status >= 500 or status in TRANSIENT_CLIENT_ERRORS else _FinalError
        raise error(f"the server answered {status} {response.reason}")
    is_encoded = "Content-Encoding" in headers  # then lengths and ranges count encoded bytes
    part.restart(None if is_encoded else headers.get("ETag"))
    length = headers.get("Content-Length", "")
    return int(length) if length.isdecimal() and not is_encoded else None


def _receive(response: requests.Response, part: _Part, total: int | None, verbose: bool) -> None:
    show = verbose and total is not None and sys.stderr.isatty()
    bar = click.progressbar(length=total, label="   ", file=sys.stderr) if show else None
    num_before = part.num_bytes
    window_begin, window_bytes = time.monotonic(), 0
    with bar if bar is not None else contextlib.nullcontext():
        if bar is not None:
            bar.update(num_before)
        for chunk in _chunks(response, part):
            if part.file.tell() == 0:
                _refuse_page(response, chunk)
            part.file.write(chunk)
            if bar is not None:
                bar.update(len(chunk))
            window_bytes += len(chunk)
            elapsed_sec = time.monotonic() - window_begin
            if elapsed_sec > READ_TIMEOUT_SEC:
                if window_bytes < SLOWEST_BYTES_PER_SEC * elapsed_sec:
                    raise _AttemptError(f"the server sent only {window_bytes} bytes in {elapsed_sec:.3g} s")
                window_begin, window_bytes = time.monotonic(), 0
    part.file.flush()


def _chunks(response: requests.Response, part: _Part) -> Iterator[bytes]:
    """Yield bytes as they arrive; waiting for full chunks would disable the time-out on slow servers."""
    read: Callable[..., bytes] = response.raw.read1
    try:
        while chunk := read(CHUNK_BYTES, decode_content="Content-Encoding" in response.headers):
            yield chunk
    except Exception as error:
        # Errors of urllib3 and of the socket, which requests translates only in methods that wait for full chunks.
        if "timed out" in str(error):
            raise _AttemptError(f"the server stopped sending after {part.num_bytes} bytes") from None
        raise _AttemptError(f"the connection broke after {part.num_bytes} bytes") from None


def _refuse_page(response: requests.Response, chunk: bytes) -> None:
    if is_web_page(chunk) and not re.search(r"\.html?($|\?)", response.url):
        raise _FinalError("the server sent a web page instead of the file (a log-in or error page?)")


def _check(part: _Part, sha256: str | None) -> None:
    if part.num_bytes == 0:
        raise _AttemptError("the server sent an empty file")
    if sha256 is None:
        return
    part.file.seek(0)
    found = hashlib.file_digest(part.file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
    if found != sha256:
        part.restart(None)
        raise _AttemptError(f"its SHA-256 is {found}, expected {sha256}")
