"""Parse the values of a stream, and read them from files.

A list of values has whole numbers, names, lists of numbers, or objects of numbers such as {"forward": 8, "turn": 0},
whose entries are ordered by name. `null` and "none" stand for no action: 0, or a vector of zeros.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dnnlib.json_file import anything, listed, read_json
from dnnlib.text import one_line, shown
from training.data.arrays import load_npy, open_npz

NONE = "none"  # name of the null action
_MAX_GROWTH = 64  # vectors with those that are "none", as a multiple of the others


class BadValue(ValueError):
    """Entry number `position` of a list of values is invalid."""

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(reason)
        self.position = position


# ----------------------------------------------------------------------------
# Values.


class Values(NamedTuple):
    """Values of frames: int64 (F,), float32 (F, V), or, where `names` is given, int64 (F,) that index into it."""

    array: np.ndarray
    names: list[str] | None = None

    @property
    def kind(self) -> str:
        """Return the kind of the values, for messages."""
        return "names" if self.names is not None else "vectors" if self.array.ndim == 2 else "whole numbers"

    def is_empty(self) -> bool:
        """Return whether all values are "none"."""
        return self.names is not None and set(self.names) <= {NONE}


def parse_values(values: Sequence[Any]) -> Values:
    """Convert a list parsed from JSON to an array; raise `BadValue` if its entries are inconsistent."""
    types = set(map(type, values)) - {type(None)}
    if dict in types or list in types or float in types:
        return Values(_parse_vectors(values))
    if str in types and not (int in types and all(value == NONE for value in values if isinstance(value, str))):
        types.discard(str)
        _refuse_others(values, types, "a name")
        named = [NONE if value is None else value for value in values]
        names = sorted(set(named))
        places = {name: place for place, name in enumerate(names)}
        return Values(np.array([places[name] for name in named], np.int64), names)
    if int in types:
        _refuse_others(values, types - {int, str}, "a whole number")
        numbers = [0 if value is None or value == NONE else value for value in values]
        for position, number in enumerate(numbers):
            if not 0 <= number < 1 << 31:
                raise BadValue(position, f"{number}, where a whole number from 0 on was expected")
        return Values(np.array(numbers, np.int64))
    _refuse_others(values, types, "a value")
    return Values(np.zeros(len(values), np.int64), [NONE])


def _refuse_others(values: Sequence[Any], types: set[type], expected: str) -> None:
    for position, value in enumerate(values):
        if type(value) in types:
            raise BadValue(position, f"{_short(value)}, where {expected} was expected")


def _parse_vectors(values: Sequence[Any]) -> np.ndarray:
    """Convert values to vectors float32 (F, V): numbers are vectors of one entry, "none" is zeros."""
    first = next(value for value in values if isinstance(value, dict | list | float))
    keys = sorted(first) if isinstance(first, dict) else None
    width = len(first) if isinstance(first, dict | list) else 1
    zeros, rows = [0.0] * width, []
    for position, value in enumerate(values):
        if value is None or value == NONE:
            row = zeros
        elif isinstance(value, dict):
            row = [value[key] for key in keys] if keys is not None and sorted(value) == keys else None
        elif isinstance(value, list):
            row = value if keys is None and isinstance(first, list) else None
        else:
            row = [value] if isinstance(first, float) else None
        if row is None or len(row) != width or not {int, float}.issuperset(map(type, row)):
            raise BadValue(position, f"{_short(value)}, where numbers like those of {_short(first)} were expected")
        rows.append(row)
    try:
        check_growth(len(rows) * width, sum(row is not zeros for row in rows) * width)
    except ValueError as error:
        raise BadValue(0, str(error)) from None
    try:
        with np.errstate(over="ignore"):
            array = np.array(rows, np.float32).reshape(len(rows), width)
    except OverflowError as error:
        raise BadValue(0, "or after it a number that is too large") from error
    _refuse_nonfinite(array)
    return array


def _refuse_nonfinite(array: np.ndarray) -> None:
    if not np.isfinite(array).all():
        position = int(np.argmin(np.isfinite(array).all(axis=1)))
        raise BadValue(position, f"{array[position].tolist()}, where finite numbers were expected")


def _short(value: Any) -> str:
    try:
        return one_line(json.dumps(value, default=str), 40)
    except (RecursionError, ValueError):
        return shown(value)


def check_growth(num_values: int, num_given: int) -> None:
    """Raise `ValueError` if vectors of zeros, which stand for "none", take far more memory than the given ones."""
    if num_values > max(_MAX_GROWTH * num_given, 1 << 20):
        raise ValueError(f'vectors of {num_values} numbers in all, of which {num_given} are given, the others "none"')


def order_names(names: Iterable[str]) -> list[str]:
    """Return distinct names in order, "none" first."""
    return sorted(set(names), key=lambda name: (name != NONE, name))


# ----------------------------------------------------------------------------
# Files.


def read_stream_file(
    path: str | os.PathLike[str],
    name: str,
    vocabulary: Sequence[str] | None = None,
    num_values: int | None = None,
    width: int | None = None,
) -> np.ndarray:
    """Read the values of a stream from a file: int64 (T,), or float32 (T, V) if they are vectors.

    The file is .json (a list), .npy, .npz (the array of the stream's name, or the only one), or .csv or .txt with one
    value per line. Names are looked up in `vocabulary`; None, "none" and null are 0. With `num_values`, or a
    vocabulary, values must be whole numbers below that; with `width`, vectors of that many numbers.

    Raises `ValueError` if the file is missing or cannot be read, or has other values.
    """
    path, singular = Path(path), _singular(name)
    values = read_values_file(path, name)
    if width is not None:
        return _as_vectors(values, width, path, singular)
    if vocabulary is None and num_values is None and values.names is None:
        return values.array
    return _as_numbers(values, vocabulary, num_values, path, singular)


def read_values_file(path: Path, name: str) -> Values:
    """Read the values of a stream from a file, names as they are; see `read_stream_file`."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}; expected {name} as .json, .npy, .npz, .csv or .txt")
    if path.suffix not in _READERS:
        raise ValueError(f"{path} cannot be read as {name}; expected .json, .npy, .npz, .csv or .txt")
    try:
        values = _READERS[path.suffix](path, name)
    except BadValue as error:
        raise ValueError(f"{path} has at entry {error.position} {error}; correct the {_singular(name)}") from error
    except Exception as error:  # readers raise many exception types for damaged files
        reason = str(error).replace(f"{path} ", "it ", 1)
        raise ValueError(f"{path} cannot be read as {name} ({reason}); write it again") from error
    if not len(values.array):
        raise ValueError(f"{path} holds no {name}; give one value for each frame")
    return values


def _singular(name: str) -> str:
    return name[:-1] if name.endswith("s") else name


def _as_vectors(values: Values, width: int, path: Path, singular: str) -> np.ndarray:
    array = values.array
    if values.is_empty():
        return np.zeros((len(array), width), np.float32)
    if values.names is None and array.ndim == 1 and width == 1:
        return array[:, None].astype(np.float32)
    if array.ndim != 2 or array.shape[1] != width:
        found = f"{array.shape[1]} numbers each" if array.ndim == 2 else values.kind
        raise ValueError(f"{path} has {singular} values of {found}, but the model takes vectors of {width} numbers")
    return array


def _as_numbers(
    values: Values, vocabulary: Sequence[str] | None, num_values: int | None, path: Path, singular: str
) -> np.ndarray:
    known = num_values if num_values is not None else len(vocabulary or [])
    array = values.array
    if values.names is not None:
        places = {name: place for place, name in enumerate(vocabulary or [])} or {NONE: 0}
        for place, name in enumerate(values.names):
            if name not in places and name != NONE:
                entry = int(np.argmax(array == place))
                listed = ", ".join(vocabulary) if vocabulary else "no names"
                raise ValueError(f"{path} has {singular} {name!r} at entry {entry}, but the model knows {listed}")
        return np.array([places.get(name, 0) for name in values.names], np.int64)[array]
    if array.ndim != 1:
        raise ValueError(f"{path} holds vectors, but the model takes whole numbers from 0 to {known - 1}")
    if array.max() >= known:
        entry = int(np.argmax(array >= known))
        raise ValueError(
            f"{path} has {singular} {int(array[entry])} at entry {entry}, but the model knows 0 to {known - 1}"
        )
    return array


def _read_json(path: Path, name: str) -> Values:
    return parse_values(read_json(path, listed(anything)))


def _read_npy(path: Path, name: str) -> Values:
    return values_of_array(load_npy(path))


def _read_npz(path: Path, name: str) -> Values:
    with open_npz(path) as arrays:
        if name not in arrays and len(arrays) != 1:
            raise ValueError(f"it has the arrays {', '.join(arrays) or 'none'}, none of them named {name}")
        return values_of_array(arrays[name if name in arrays else next(iter(arrays))]())


def values_of_array(array: np.ndarray) -> Values:
    """Return the values of an array: one value or one vector a frame; raise `ValueError` for any other."""
    if array.ndim not in (1, 2):
        raise ValueError(f"its shape is {list(array.shape)}, not one value or one vector for each frame")
    if array.dtype.kind == "U":
        return parse_values(array.tolist())
    if array.dtype.kind not in "iuf":
        raise ValueError(f"its values are {array.dtype}, not numbers or names")
    if array.ndim == 1 and array.dtype.kind in "iu":
        return parse_values(array.tolist())
    array = array.astype(np.float32).reshape(len(array), -1)
    _refuse_nonfinite(array)
    return Values(array)


def _read_lines(path: Path, name: str) -> Values:
    lines = path.read_text().rstrip().splitlines()
    return parse_values([_parse_line(line, position) for position, line in enumerate(lines)])


def _parse_line(line: str, position: int) -> Any:
    """Parse the value on a line: a whole number, a number, a list of numbers, or a name."""
    words = [word for word in re.split(r"[,;\s]+", line.strip()) if word]
    if not words:
        raise BadValue(position, "an empty line, where a value was expected")
    numbers = []
    for word in words:
        try:
            numbers.append(int(word) if re.fullmatch(r"[+-]?\d+", word) else float(word))
        except ValueError:
            if len(words) > 1:
                raise BadValue(position, f"{_short(word)}, where a number was expected") from None
            return word.strip("\"'")
    return numbers if len(numbers) > 1 else numbers[0]


_READERS: dict[str, Callable[[Path, str], Values]] = {
    ".json": _read_json,
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".csv": _read_lines,
    ".txt": _read_lines,
}
STREAM_SUFFIXES = tuple(_READERS)
