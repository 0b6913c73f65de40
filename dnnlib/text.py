"""Text, values and paths for messages: short, on one line, without control characters, and quoted for a shell."""

import os
import re
import reprlib
import shlex
from typing import Any

MAX_LETTERS = 200

_short = reprlib.Repr()
_short.maxlevel = 3
_short.maxstring = _short.maxother = _short.maxlong = 60


def one_line(text: Any, max_letters: int = MAX_LETTERS) -> str:
    """Return text for a message: one line, at most `max_letters` + 4 characters, "?" for control characters."""
    line = "".join(c if c.isprintable() else "?" for c in str(text)[: 5 * max_letters])
    return line if len(line) <= max_letters else f"{line[:max_letters]} ..."


def shown(value: Any) -> str:
    """Return a parsed value for a message, as Python writes it but shortened, at little cost for any value."""
    try:
        return one_line(_short.repr(value), 80)
    except Exception:  # for example the limit to the digits of a whole number
        return f"a {type(value).__name__}"


def escape(text: str) -> str:
    """Return a text with an escape for each character, or byte that is not UTF-8, which a terminal cannot show."""
    return "".join(c if c.isprintable() else _escape(ord(c)) for c in text)


def _escape(code: int) -> str:
    return f"\\x{code & 0xFF:02x}" if code < 0x80 or 0xDC80 <= code <= 0xDCFF else f"\\U{code:08x}"


def to_text(name: str) -> str:
    """Return a name in which control characters, and bytes that are not UTF-8, are written as %XX, as in URLs."""
    return re.sub("[\x00-\x1f\x7f\udc80-\udcff]", lambda match: f"%{ord(match[0]) & 0xFF:02X}", name)


def quote(path: str | os.PathLike[str]) -> str:
    """Return a path as bash reads it."""
    text = os.fspath(path)
    if text.isprintable():
        return shlex.quote(text)
    text = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"$'{escape(text)}'"
