"""Read checkpoints of flax without flax: msgpack whose extension types are NumPy arrays and scalars.

Only values are made, nothing is called. Arrays above flax's limit are stored in parts.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

CHUNKED = "__msgpack_chunked_array__"
ARRAY, SCALAR = 1, 3  # extension types of flax; 2, a complex number, occurs in no network


def load(path: str | os.PathLike[str]) -> Any:
    """Return the tree in a file: dictionaries, lists, text, numbers and arrays.

    Raises `ValueError` naming the file if it is damaged or of another format, and if msgpack is missing.
    """
    with open(path, "rb") as file:
        data = file.read()
    try:
        return loads(data)
    except ImportError:
        raise ValueError(f"{path} needs the package msgpack, which is missing: pip install -e '.[published]'") from None
    except Exception as error:  # what damaged bytes lead to may be anything
        raise ValueError(f"{path} is damaged, or is no checkpoint of flax ({error or type(error).__name__})") from error


def loads(data: bytes) -> Any:
    """Return the tree in some bytes; raises one of several errors if they are damaged."""
    import msgpack  # an optional dependency

    return _join(msgpack.unpackb(data, ext_hook=_array, raw=False))


def _join(tree: Any) -> Any:
    """Return the tree with arrays instead of their parts."""
    if not isinstance(tree, dict):
        return tree
    if CHUNKED not in tree:
        return {key: _join(item) for key, item in tree.items()}
    shape, parts = ([entry[str(i)] for i in range(len(entry))] for entry in (tree["shape"], tree["chunks"]))
    return np.concatenate(parts).reshape(shape)


def _array(kind: int, data: bytes) -> Any:
    import msgpack

    if kind not in (ARRAY, SCALAR):
        raise ValueError(f"it has an extension of unknown type {kind}")
    shape, name, values = msgpack.unpackb(data, raw=False)
    dtype = np.dtype(name)
    if dtype.kind not in "biufc" or len(values) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array of {name} and shape {shape} does not fit its bytes")
    array = np.frombuffer(values, dtype).reshape(shape)
    return array[()] if kind == SCALAR else array.copy()
