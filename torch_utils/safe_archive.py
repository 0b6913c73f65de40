"""Read archives of `torch.save` as data: no code in the file is imported, called or executed.

Checkpoints of trainers hold objects of many classes beside their tensors. Any global that such a file names becomes an
inert record of what the file says of it; only containers and tensors become what they are. Tensors stay in the file
until they are asked for.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torch_utils.torch_file import STORAGE_NAMES, check_view, find_folder, parse_pid
from torch_utils.unpickler import Budget, ForeignError, Function, StandIn, Unpickler, explain


class Inert(StandIn, dict):
    """An instance of a class that the file names, or the result of a function that it calls: what it was made of.

    `kind` is the name of the class or function. `args` are its arguments, `state` is what its state was set to. The
    items of the dictionary are those that were set, `appended` are those that were appended. Records may refer to each
    other in circles.
    """

    kind = ""

    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.args, self.state, self.appended = args, None, []

    def set_state(self, state: Any, budget: Budget) -> None:
        """See `StandIn.set_state`."""
        self.state = state

    def extend(self, items: list[Any]) -> None:
        """See `StandIn.extend`."""
        self.appended.extend(items)

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


def _rebuild_tensor(budget: Budget, storage: Any, offset: Any, shape: Any, stride: Any, *args: Any) -> Stored:
    if not isinstance(storage, Stored):
        raise ForeignError("a tensor in it has no storage")
    check_view(storage.num_values, offset, shape, stride)
    return Stored(storage.key, storage.dtype, storage.num_values, offset, tuple(shape), tuple(stride))


class _Names(dict[tuple[str, str], Any]):
    """A table in which every name is a class of records, but for those of tensors and plain containers."""

    def get(self, key: tuple[str, str], default: Any = None) -> Any:
        """Return what stands in for a name; `default` is what it means in every file."""
        if key not in self and default is None:
            self[key] = type("Inert", (Inert,), {"kind": ".".join(key)})
        return super().get(key, default)


def _make_names() -> _Names:
    return _Names(
        {
            **STORAGE_NAMES,
            ("collections", "defaultdict"): Function(lambda budget, *args: {}),
            ("torch._utils", "_rebuild_tensor_v2"): Function(_rebuild_tensor),
            ("torch._utils", "_rebuild_parameter"): Function(lambda budget, stored, *args: stored),
        }
    )


def _parse_storage(pid: Any) -> Stored:
    dtype, key, num_values, _ = parse_pid(pid)
    return Stored(key, dtype, num_values, 0, (num_values,), (1,))


def load_pickle(path: str | os.PathLike[str]) -> Any:
    """Return the content of a plain pickle, such as saved arguments: plain values and `Inert` records.

    Raises `ValueError` naming the file if it is damaged.
    """
    try:
        with open(path, "rb") as file:
            return Unpickler(file, _make_names(), Budget(os.fstat(file.fileno()).st_size)).load()
    except Exception as error:  # what a damaged file leads to may be anything
        raise ValueError(explain(str(path), error, "plain values")) from error


class Archive:
    """An archive of `torch.save`, open for reading.

    `content` is what was saved: plain values, containers, `Stored` tensors and `Inert` records. Raises `ValueError`
    naming the file if it is damaged or of another format.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            budget = Budget(self.path.stat().st_size)
            self._zip = zipfile.ZipFile(path)
            self._folder = find_folder(self._zip, budget)
            file = io.BytesIO(self._zip.read(f"{self._folder}data.pkl"))
            self.content: Any = Unpickler(file, _make_names(), budget, _parse_storage).load()
        except Exception as error:  # what a damaged file leads to may be anything
            raise ValueError(explain(str(path), error, "tensors and values, as torch.save writes")) from error

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *error: object) -> None:
        self._zip.close()

    def tensor(self, stored: Stored) -> torch.Tensor:
        """Read a tensor; raises `ValueError` naming the file if its values are not whole."""
        try:
            values = bytearray(self._zip.read(f"{self._folder}data/{stored.key}"))
            if len(values) != stored.num_values * stored.dtype.itemsize:
                raise ForeignError(f"{len(values)} bytes for {stored.num_values} values of {stored.dtype}")
        except (ForeignError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.path} is damaged: a tensor cannot be read ({error}); download it again") from error
        flat = torch.frombuffer(values, dtype=stored.dtype) if values else torch.empty(0, dtype=stored.dtype)
        return flat.as_strided(stored.shape, stored.stride, stored.offset)

    def tensors(self, entries: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
        """Read the tensors of a dictionary by their names; other entries are left out."""
        return {str(name): self.tensor(entry) for name, entry in entries.items() if isinstance(entry, Stored)}
