"""Read JSON that may be damaged or hostile: with a schema, and limits to what it may take.

    description = read_json(path, record(optional={"fps": number(0.1, 1000), "hashes": mapped(text)}))

A schema is a check, a function of a value and its place that raises `JsonError`. All that is wrong is one sentence that
begins with the name of the file.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dnnlib.file_kinds import explain_kind
from dnnlib.text import one_line, shown

MAX_BYTES = 64 << 20

# Of lists and objects, which take twenty times the memory of their text.
MAX_CONTAINERS = 4_000_000

Check = Callable[[Any, str], None]


class JsonError(ValueError):
    """JSON that cannot be read, or has other values than its schema allows."""


def read_json(
    path: str | os.PathLike[str], check: Check, remedy: str = "", max_bytes: int = MAX_BYTES, unique: bool = False
) -> Any:
    """Return what a file holds, checked. With `unique`, no key may be there twice in an object.

    Raises `JsonError` with the name of the file, and the remedy if one is given. OSError is left as it is.
    """
    with open(path, "rb") as file:
        data = file.read(max_bytes + 1)
    try:
        if len(data) > max_bytes:
            raise JsonError(f"has more than {max_bytes >> 20} MiB, expected less")
        try:
            return _parse(data, check, unique)
        except JsonError:
            if (other := explain_kind(path, "JSON", is_text=True)) is not None:
                raise JsonError(other) from None
            raise
    except JsonError as error:
        raise JsonError(f"{path} {error}{f'; {remedy}' if remedy else ''}") from None


def parse_json(data: bytes, name: str, check: Check) -> Any:
    """Return what bytes hold, checked; raise `JsonError` with `name`."""
    try:
        return _parse(data, check, False)
    except JsonError as error:
        raise JsonError(f"{name} {error}") from None


def _parse(data: bytes, check: Check, unique: bool) -> Any:
    if data.count(b"[") + data.count(b"{") > MAX_CONTAINERS:
        raise JsonError(f"has more than {MAX_CONTAINERS} lists and objects, expected fewer")
    try:
        text = data.decode("utf-8-sig")
        hook = _without_repetition if unique else None
        value = json.loads(text, object_pairs_hook=hook)
        if re.search(rb"\\u[dD][89a-fA-F]", data):  # half of a pair of UTF-16, alone, can be neither shown nor written
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise JsonError("is not text in UTF-8") from None
    except UnicodeEncodeError:
        raise JsonError("has text that is no Unicode (a surrogate without its other half)") from None
    except RecursionError:
        raise JsonError("is nested too deeply") from None
    except json.JSONDecodeError as error:
        reason = "it is empty" if not data.strip() else str(error)
        raise JsonError(f"is damaged (no JSON: {reason})") from None
    except JsonError:
        raise
    except ValueError as error:  # a whole number of thousands of digits
        raise JsonError(f"is damaged (no JSON: {one_line(error)})") from None
    check(value, "")
    return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise JsonError(f"has {shown(twice)} more than once; join the entries")
    return found


# ----------------------------------------------------------------------------
# Checks.


def _expect(is_right: bool, value: Any, place: str, expected: str) -> None:
    if not is_right:
        raise JsonError(f"has {shown(value)} as {place or 'its content'}, expected {expected}")


def _inside(place: str, key: Any) -> str:
    return f"{place} {one_line(key, 60)}".lstrip()


def anything(value: Any, place: str) -> None:
    """Accept any value."""


def text(value: Any, place: str) -> None:
    """Accept text."""
    _expect(isinstance(value, str), value, place, "text")


def whole(least: int, most: int) -> Check:
    """Accept whole numbers in a range, both ends included."""

    def check(value: Any, place: str) -> None:
        is_right = type(value) is int and least <= value <= most
        _expect(is_right, value, place, f"a whole number from {least} to {most}")

    return check


def number(least: float, most: float) -> Check:
    """Accept finite numbers in a range, both ends included."""

    def check(value: Any, place: str) -> None:
        is_right = type(value) in (int, float) and math.isfinite(value) and least <= value <= most
        _expect(is_right, value, place, f"a number from {least:g} to {most:g}")

    return check


def listed(item: Check) -> Check:
    """Accept lists of items."""

    def check(value: Any, place: str) -> None:
        _expect(isinstance(value, list), value, place, "a list")
        if item is anything or (item is text and all(type(part) is str for part in value)):
            return
        for index, part in enumerate(value):
            item(part, _inside(place, index))

    return check


def mapped(item: Check, keys: str | None = None) -> Check:
    """Accept objects whose values are items, and whose keys match the regular expression `keys`, if given."""

    def check(value: Any, place: str) -> None:
        _expect(isinstance(value, dict), value, place, "an object")
        for key, part in value.items():
            if keys is not None and not re.fullmatch(keys, key):
                raise JsonError(f"has the key {shown(key)}{f' in {place}' if place else ''}, expected one like {keys}")
            item(part, _inside(place, key))

    return check


def record(required: Mapping[str, Check] | None = None, optional: Mapping[str, Check] | None = None) -> Check:
    """Accept objects with the required entries, and perhaps the optional ones; others may be anything."""

    def check(value: Any, place: str) -> None:
        _expect(isinstance(value, dict), value, place, "an object")
        for key, item in (required or {}).items():
            if key not in value:
                raise JsonError(f"has no entry {shown(key)}{f' in {place}' if place else ''}")
            item(value[key], _inside(place, key))
        for key, item in (optional or {}).items():
            if key in value:
                item(value[key], _inside(place, key))

    return check


def either(checks: Iterable[Check], expected: str) -> Check:
    """Accept what one of several checks accepts."""

    def check(value: Any, place: str) -> None:
        for one in checks:
            try:
                return one(value, place)
            except JsonError:
                continue
        _expect(False, value, place, expected)

    return check


def null(value: Any, place: str) -> None:
    """Accept null."""
    _expect(value is None, value, place, "null")
