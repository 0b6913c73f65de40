"""Read members of zips that may be damaged or hostile."""

import os
import struct
import zipfile
import zlib
from typing import Any

from dnnlib.file_kinds import explain_kind
from dnnlib.json_file import Check, parse_json
from dnnlib.text import one_line

MIN_LIMIT = 1 << 20

# What a zip that is damaged may lead to.
FAULTS = (
    OSError,
    EOFError,
    KeyError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def reason_of(path: str | os.PathLike[str], error: Exception) -> str:
    """Return why a zip cannot be read, given the error: what it is instead, if its first bytes tell."""
    try:
        other = explain_kind(path, "a zip")
    except OSError:
        other = None
    return f"it {other}" if other else one_line(error) or type(error).__name__


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Return a member after verifying its checksum.

    Raises ValueError if it unpacks to more bytes than the whole zip has (or `MIN_LIMIT`); `KeyError` if it is missing.
    """
    info = archive.getinfo(name)
    limit = max(os.path.getsize(str(archive.filename)), MIN_LIMIT)
    if info.file_size > limit:
        raise ValueError(f"{name} unpacks to {info.file_size} bytes, expected no more than the zip has")
    with archive.open(info) as file:
        return file.read(info.file_size + 1)  # without a number, it would unpack to more than it says


def read_json_member(archive: zipfile.ZipFile, name: str, check: Check) -> Any:
    """Return what a JSON member holds, checked; raise as `read_member`, and `JsonError`."""
    return parse_json(read_member(archive, name), name, check)
