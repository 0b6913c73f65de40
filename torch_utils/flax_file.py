"""Read checkpoints of flax without flax: msgpack whose extension types are NumPy arrays and scalars.

Only values are made, nothing is called. Arrays above flax's limit are stored in parts.
"""

from __future__ import annotations

import math
import os
import struct
from typing import Any

import numpy as np

CHUNKED = "__msgpack_chunked_array__"
MAX_DEPTH = 100
ARRAY, SCALAR = 1, 3  # extension types of flax; 2, a complex number, occurs in no network

# Formats with a fixed code: code -> struct of a number, or of the length that precedes a value.
_NUMBERS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i",
    0xD3: ">q",
}  # fmt: skip
_TEXT = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
_BYTES = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}
_LISTS = {0xDC: ">H", 0xDD: ">I"}
_MAPS = {0xDE: ">H", 0xDF: ">I"}
_EXTENSIONS = {0xC7: ">B", 0xC8: ">H", 0xC9: ">I"}


def load(path: str | os.PathLike[str]) -> Any:
    """Return the tree in a file: dictionaries, lists, text, numbers and arrays.

    Raises `ValueError` naming the file if it is damaged or of another format.
    """
    with open(path, "rb") as file:
        data = file.read()
    try:
        return loads(data)
    except (ValueError, TypeError, IndexError, struct.error, RecursionError) as error:
        raise ValueError(f"{path} is damaged, or is no checkpoint of flax ({error})") from error


def loads(data: bytes) -> Any:
    """Return the tree in some bytes; raises one of several errors if they are damaged."""
    reader = _Reader(data)
    tree = reader.value()
    if reader.position != len(data):
        raise ValueError(f"{len(data) - reader.position} bytes follow its end")
    return _join(tree)


def _join(tree: Any) -> Any:
    """Return the tree with arrays instead of their parts."""
    if not isinstance(tree, dict):
        return tree
    if CHUNKED not in tree:
        return {key: _join(item) for key, item in tree.items()}
    shape, parts = ([entry[str(i)] for i in range(len(entry))] for entry in (tree["shape"], tree["chunks"]))
    return np.concatenate(parts).reshape(shape)


class _Reader:
    """A reader of the values in some bytes, one after the other."""

    def __init__(self, data: bytes):
        self.data, self.position, self.depth = data, 0, 0

    def take(self, count: int) -> bytes:
        part = self.data[self.position : self.position + count]
        if len(part) < count:
            raise ValueError("it ends too early")
        self.position += count
        return part

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def value(self) -> Any:
        code = self.take(1)[0]
        if code <= 0x7F or code >= 0xE0:
            return code if code <= 0x7F else code - 256
        if code in _NUMBERS:
            return self.number(_NUMBERS[code])
        if code in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[code]
        if code <= 0x8F or code in _MAPS:
            return self.items(code - 0x80 if code <= 0x8F else self.number(_MAPS[code]), is_map=True)
        if code <= 0x9F or code in _LISTS:
            return self.items(code - 0x90 if code <= 0x9F else self.number(_LISTS[code]), is_map=False)
        if code <= 0xBF or code in _TEXT:
            return self.take(code - 0xA0 if code <= 0xBF else self.number(_TEXT[code])).decode()
        if code in _BYTES:
            return self.take(self.number(_BYTES[code]))
        if code in _EXTENSIONS or 0xD4 <= code <= 0xD8:
            length = self.number(_EXTENSIONS[code]) if code in _EXTENSIONS else 1 << (code - 0xD4)
            return _array(self.number(">b"), self.take(length))
        raise ValueError(f"it has an unknown code {code}")

    def items(self, count: int, is_map: bool) -> Any:
        if count > len(self.data) or self.depth >= MAX_DEPTH:
            raise ValueError("it nests or counts more than it holds")
        self.depth += 1
        found = [self.value() for _ in range(2 * count if is_map else count)]
        self.depth -= 1
        return dict(zip(found[::2], found[1::2], strict=True)) if is_map else found


def _array(kind: int, data: bytes) -> Any:
    if kind not in (ARRAY, SCALAR):
        raise ValueError(f"it has an extension of unknown type {kind}")
    shape, name, values = _Reader(data).value()
    dtype = np.dtype(name)
    if dtype.kind not in "biufc" or len(values) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array of {name} and shape {shape} does not fit its bytes")
    array = np.frombuffer(values, dtype).reshape(shape)
    return array[()] if kind == SCALAR else array.copy()
