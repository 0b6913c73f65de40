"""Read archives of `torch.save` as data: no code in the file is imported, called or executed.

Checkpoints of trainers hold objects of many classes beside their tensors. Any global that such a file names becomes an
inert record of what the file says of it; only dictionaries and tensors become what they are. Tensors stay in the file
until they are asked for.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torch_utils import safe_pickle


class Inert:
    """An instance of a class that the file names, or the result of a function that it calls: what it was made of.

    `kind` is the name of the class or function. `args` are its arguments, `state` is what its state was set to, and
    `items` is what was added to it. Records may refer to each other in circles.
    """

    __slots__ = ("args", "items", "state")
    kind = ""

    def __new__(cls, *args: Any) -> Inert:
        self = object.__new__(cls)
        self.args, self.state, self.items = args, None, []
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        """Store an item that the file adds to a list."""
        self.items.append(value)

    def extend(self, values: Any) -> None:
        """Store items that the file adds to a list."""
        self.items.extend(values)

    def attributes(self) -> dict[str, Any]:
        """Return the attributes of the object, if the file gives a dictionary of them."""
        return dict(self.state) if isinstance(self.state, dict) else {}


@dataclass(frozen=True)
class Stored:
    """A tensor in an archive, not read yet."""

    key: str
    dtype: torch.dtype
    num_values: int  # of its storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __setstate__(self, state: Any) -> None:
        raise _ArchiveError("it sets the state of a tensor")


class _ArchiveError(Exception):
    """The archive is damaged or not one of torch.save."""


class _Items(dict):
    """Stand-in for dictionaries with an order or a default."""

    __slots__ = ()

    def __init__(self, *args: Any) -> None:
        """Take items like a dict; a factory of default values is left out."""
        super().__init__(*(value for value in args if isinstance(value, dict | list | tuple)))

    def __setstate__(self, state: Any) -> None:
        """Ignore attributes, such as the `_metadata` of a state dict."""


class _Storage:
    """Stand-in for a type of storages."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __setstate__(self, state: Any) -> None:
        raise _ArchiveError("it sets the state of a type")


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *args: Any) -> Stored:
    sizes = [offset, *shape, *stride]
    if not isinstance(storage, Stored) or any(type(size) is not int or size < 0 for size in sizes):
        raise _ArchiveError("a tensor in it has no storage, or a shape that is not of whole numbers")
    needed = 0 if 0 in shape else offset + 1 + sum((s - 1) * d for s, d in zip(shape, stride, strict=True))
    if max(needed, math.prod(shape)) > storage.num_values:
        raise _ArchiveError(f"a tensor of shape {tuple(shape)} is larger than its {storage.num_values} stored values")
    return Stored(storage.key, storage.dtype, storage.num_values, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(stored: Any, *args: Any) -> Any:
    return stored


class _Call:
    """Stand-in for an allowed function."""

    __slots__ = ("_function",)

    def __init__(self, function: Any):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise _ArchiveError("it sets the state of a function")


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Items,
    ("collections", "defaultdict"): _Items,
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Call(_rebuild_parameter),
}


class _Unpickler(pickle.Unpickler):
    """Unpickler that makes a class of records for every global that it does not know."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, encoding="utf-8")
        self.classes: dict[str, Any] = {}

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) in _KNOWN:
            return _KNOWN[module_name, global_name]
        dtype = safe_pickle.STORAGE_TYPES.get(global_name) if module_name in ("torch", "torch.storage") else None
        if dtype is not None:
            return _Storage(dtype)
        kind = f"{module_name}.{global_name}"
        return self.classes.setdefault(kind, type("Inert", (Inert,), {"__slots__": (), "kind": kind}))

    def persistent_load(self, pid: Any, /) -> Stored:
        kind, storage, key, _, num_values = pid
        if kind != "storage" or not isinstance(storage, _Storage) or type(num_values) is not int or num_values < 0:
            raise _ArchiveError("it refers to something other than a storage")
        return Stored(str(key), storage.dtype, num_values, 0, (num_values,), (1,))


def load_pickle(path: str | os.PathLike[str]) -> Any:
    """Return the content of a plain pickle, such as saved arguments: plain values and `Inert` records.

    Raises `ValueError` naming the file if it is damaged.
    """
    try:
        file = io.BytesIO(Path(path).read_bytes())
        safe_pickle.refuse_overload(file)
        return _Unpickler(file).load()
    except Exception as error:  # a damaged pickle can raise almost any error
        reason = safe_pickle.one_line(f"{type(error).__name__}: {error}")
        raise ValueError(f"{path} is damaged, or is no pickle ({reason})") from error


class Archive:
    """An archive of `torch.save`, open for reading.

    `content` is what was saved: plain values, containers, `Stored` tensors and `Inert` records. Raises `ValueError`
    naming the file if it is damaged or of another format.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            self._zip = zipfile.ZipFile(path)
            check_unpacked(self._zip, self.path)
            (name,) = [name for name in self._zip.namelist() if name.endswith("/data.pkl")]
            self._folder = name.removesuffix("data.pkl")
            order = f"{self._folder}byteorder"
            if order in self._zip.namelist() and self._zip.read(order) != b"little":
                raise _ArchiveError("its numbers are big-endian")
            file = io.BytesIO(self._zip.read(name))
            safe_pickle.refuse_overload(file)
            self.content: Any = _Unpickler(file).load()
        except Exception as error:  # a damaged pickle can raise almost any error
            reason = safe_pickle.one_line(f"{type(error).__name__}: {error}")
            raise ValueError(f"{path} is damaged, or is not an archive of torch.save ({reason})") from error

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *error: object) -> None:
        self._zip.close()

    def tensor(self, stored: Stored) -> torch.Tensor:
        """Read a tensor; raises `ValueError` naming the file if its values are not whole."""
        try:
            values = bytearray(self._zip.read(f"{self._folder}data/{stored.key}"))
            if len(values) != stored.num_values * stored.dtype.itemsize:
                raise _ArchiveError(f"{len(values)} bytes for {stored.num_values} values of {stored.dtype}")
        except (_ArchiveError, KeyError, zipfile.BadZipFile) as error:
            reason = safe_pickle.one_line(error)
            raise ValueError(
                f"{self.path} is damaged: a tensor cannot be read ({reason}); download it again"
            ) from error
        flat = torch.frombuffer(values, dtype=stored.dtype) if values else torch.empty(0, dtype=stored.dtype)
        return flat.as_strided(stored.shape, stored.stride, stored.offset)

    def tensors(self, entries: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
        """Read the tensors of a dictionary by their names; other entries are left out."""
        return {str(name): self.tensor(entry) for name, entry in entries.items() if isinstance(entry, Stored)}


def check_unpacked(archive: zipfile.ZipFile, path: str | os.PathLike[str]) -> None:
    """Raise `zipfile.BadZipFile` if an archive unpacks to more than its size: torch stores without compression."""
    entries = archive.infolist()
    if any(entry.compress_type for entry in entries) or sum(e.file_size for e in entries) > os.path.getsize(path):
        raise zipfile.BadZipFile("it unpacks to more than it holds")
