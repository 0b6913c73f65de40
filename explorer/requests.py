"""What is asked of the explorer's server, and what it answers."""

import io
import json
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote

import numpy as np
from PIL import Image

FRAME_HEADER = struct.Struct(">qI")  # number of a frame, bytes of the PNG file that follows


# ----------------------------------------------------------------------------
# Requests.


class Refused(Exception):
    """A request that is answered with another status than 400, which is that of a `ValueError`."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Query:
    """The values behind the question mark of an address. Raises `ValueError` for those that cannot be read."""

    def __init__(self, text: str) -> None:
        pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=32)
        self.values = dict(pairs)
        if len(self.values) < len(pairs):
            raise ValueError("a value is given twice: give each once")

    def text(self, name: str, default: str | None = None) -> str:
        """Take a value as it is."""
        value = self.values.pop(name, default)
        if value is None:
            raise ValueError(f"{name} is missing: give one")
        return value

    def whole(self, name: str, default: int | None = None) -> int:
        """Take a whole number."""
        value = self.text(name, None if default is None else str(default)).strip()
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", value):
            raise ValueError(f"{name} is {shown(value)}: use a whole number, such as 0 or 42")
        return int(value)

    def number(self, name: str, default: float) -> float:
        """Take a number."""
        value = self.text(name, str(default)).strip()
        if not re.fullmatch(r"[+-]?([0-9]{1,9}(\.[0-9]{0,9})?|\.[0-9]{1,9})", value):
            raise ValueError(f"{name} is {shown(value)}: use a number, such as 0.7")
        return float(value)

    def rest(self) -> dict[str, str]:
        """Take all values that have not been taken."""
        values, self.values = self.values, {}
        return values

    def finish(self) -> None:
        """Raise `ValueError` for a value that has not been taken."""
        if self.values:
            raise ValueError(f"{shown(next(iter(self.values)))} is nothing that can be given here: leave it out")


def shown(text: str) -> str:
    """Return a text from outside for a message: quoted, and not too long."""
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


# ----------------------------------------------------------------------------
# Answers.


class Answer(NamedTuple):
    """A response."""

    body: bytes | Path  # a file is sent piece by piece
    content_type: str = "application/json"
    status: int = 200
    headers: Mapping[str, str] = {}


def as_json(value: Any, status: int = 200) -> Answer:
    """Return a value as JSON."""
    return Answer(json.dumps(value).encode(), status=status)


def as_file(body: bytes | Path, name: str) -> Answer:
    """Return a file that the browser saves under a name."""
    disposition = f"attachment; filename*=UTF-8''{quote(name)}"
    return Answer(body, "application/octet-stream", headers={"Content-Disposition": disposition})


def as_png(frame: np.ndarray) -> bytes:
    """Return a frame uint8 (H, W, 3) as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG", compress_level=1)
    return file.getvalue()


def pack(pictures: Iterable[tuple[int, bytes]]) -> bytes:
    """Return each picture as the number of its frame, the size of its PNG file, and this file."""
    return b"".join(FRAME_HEADER.pack(number, len(file)) + file for number, file in pictures)
