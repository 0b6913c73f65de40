"""Text and values from untrusted files, for messages: short, on one line, without control characters."""

import reprlib
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
