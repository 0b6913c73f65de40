"""Read the files of `torch.save` as tensors and plain values, within a budget of their bytes, without running code.

Both formats are read: zip archives, in which each storage is a member, and the one before, in which the values of all
storages follow a pickle. The latter is also how persistent pickles embed a tensor.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import torch

from torch_utils.unpickler import MAX_WORDS, Budget, ForeignError, Function, Unpickler, explain

# The first two values of a file before the zip archives: torch's magic number and the version of its format.
LEGACY_FORMAT = (0x1950A86A20F9469CFC6C, 1001)

# Above it, torch's own arithmetic with shapes could overflow.
MAX_TENSOR_VALUES = 1 << 48

_TENSOR_BYTES = 512  # of memory, besides the values
_MAX_DEPTH = 100  # of containers in a file of plain values
_PLAIN_TYPES = (type(None), bool, int, float, complex, str, bytes, torch.Tensor)


class Storage:
    """The values of one or several tensors, 1-D, or their bytes if the file does not say which type they are."""

    __slots__ = ("values",)

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values


def check_view(num_stored: int, offset: Any, shape: Any, stride: Any) -> None:
    """Raise ForeignError unless a tensor lies within its storage of so many values."""
    if not isinstance(shape, tuple | list) or not isinstance(stride, tuple | list):
        raise ForeignError("a tensor in it has no shape")
    if any(type(number) is not int or number < 0 for number in (offset, *shape, *stride)):
        raise ForeignError("a tensor in it has a shape or strides that are not whole numbers")
    num_needed = 0 if 0 in shape else offset + 1 + sum((s - 1) * d for s, d in zip(shape, stride, strict=True))
    if num_needed > num_stored or math.prod(max(s, 1) for s in shape) > MAX_TENSOR_VALUES:
        raise ForeignError(f"a tensor of shape {tuple(shape)} is larger than its storage of {num_stored} values")


def rebuild_tensor(
    budget: Budget, storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any = False, *args: Any
) -> torch.Tensor:
    """Return a view of a storage."""
    if not isinstance(storage, Storage):
        raise ForeignError("a tensor in it has no storage")
    values = storage.values
    check_view(len(values), offset, shape, stride)
    budget.charge(math.prod(shape) * values.itemsize + _TENSOR_BYTES)
    tensor = values.as_strided(tuple(shape), tuple(stride), offset)
    return tensor.requires_grad_() if requires_grad is True and tensor.is_floating_point() else tensor


def _rebuild_typed(
    budget: Budget, storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *args: Any
) -> torch.Tensor:
    """Return a view of a storage of bytes as values of `dtype`."""
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise ForeignError("a tensor in it has no storage")
    if len(storage.values) * storage.values.itemsize % dtype.itemsize:
        raise ForeignError(f"a storage in it holds no whole number of values of {dtype}")
    return rebuild_tensor(budget, Storage(storage.values.view(dtype)), offset, shape, stride, grad)


def _rebuild_parameter(budget: Budget, tensor: Any, requires_grad: Any = True, *args: Any) -> torch.nn.Parameter:
    if type(tensor) is not torch.Tensor:
        raise ForeignError("a parameter in it is no tensor")
    return torch.nn.Parameter(tensor.detach(), requires_grad is True and tensor.is_floating_point())


_STORAGE_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}

STORAGE_NAMES = {
    (module, name): dtype for name, dtype in _STORAGE_TYPES.items() for module in ("torch", "torch.storage")
}
TENSOR_NAMES = {
    ("torch._utils", "_rebuild_tensor_v2"): Function(rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): Function(_rebuild_typed),
    ("torch._utils", "_rebuild_parameter"): Function(_rebuild_parameter),
}
FILE_NAMES = {
    **STORAGE_NAMES,
    **TENSOR_NAMES,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
}


def load(path: str | os.PathLike[str]) -> Any:
    """Return what a file of `torch.save` holds: tensors on the CPU, numbers, text, and containers of such.

    Raises ValueError with the reason if it is damaged, holds or asks for anything else, or unfolds to far more than its
    bytes.
    """
    try:
        with open(path, "rb") as file:
            budget = Budget(os.fstat(file.fileno()).st_size)
            is_archive = file.read(2) == b"PK"
            file.seek(0)
            value = _load_archive(file, budget) if is_archive else load_legacy(file, FILE_NAMES, budget)
        _check_plain(value, 0, itertools.count())
        return value
    except OSError:
        raise
    except Exception as error:  # what a damaged file leads to may be anything
        raise ValueError(explain("it", error, "tensors and plain values")) from error


def find_folder(archive: zipfile.ZipFile, budget: Budget) -> str:
    """Return the folder inside an archive of `torch.save` that holds data.pkl; raise ForeignError if it is none."""
    entries = archive.infolist()
    num_bytes = sum(entry.file_size for entry in entries)
    if any(entry.compress_type for entry in entries) or num_bytes > budget.num_bytes:
        raise ForeignError("it unpacks to more than it holds")
    names = [entry.filename for entry in entries if entry.filename.endswith("/data.pkl")]
    if len(names) != 1:
        raise ForeignError("it has no data.pkl, or several")
    folder = names[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
        raise ForeignError("its values are not in the order of bytes of this machine")
    return folder


def _load_archive(file: IO[bytes], budget: Budget) -> Any:
    with zipfile.ZipFile(file) as archive:
        folder = find_folder(archive, budget)
        storages: dict[str, Storage] = {}

        def load_storage(pid: Any) -> Storage:
            dtype, key, num_values, _ = parse_pid(pid)
            if key not in storages:
                data = archive.read(f"{folder}data/{key}")
                budget.charge(len(data))
                values = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
                storages[key] = Storage(values)
            values = storages[key].values
            if values.dtype != dtype or len(values) != num_values:
                raise ForeignError(f"the storage {key} has {len(values)} values of {values.dtype}, not {num_values}")
            return storages[key]

        return Unpickler(io.BytesIO(archive.read(f"{folder}data.pkl")), FILE_NAMES, budget, load_storage).load()


def parse_pid(pid: Any) -> tuple[torch.dtype, str, int, Any]:
    """Return type, key and number of values of the storage that an identifier names, and what follows."""
    kind, dtype, key, _, num_values, *rest = pid
    if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
        raise ForeignError("it refers to something other than a storage")
    if type(num_values) is not int or num_values < 0:
        raise ForeignError("a storage in it has a size that is no whole number")
    return dtype, key, num_values, rest


def load_legacy(file: IO[bytes], names: Mapping[tuple[str, str], Any], budget: Budget) -> Any:
    """Return what a file in the format before the zip archives holds."""
    storages: dict[str, Storage] = {}

    def load_storage(pid: Any) -> Storage:
        dtype, key, num_values, view = parse_pid(pid)
        if view != [None]:
            raise ForeignError("a storage in it is a part of another one")
        if key not in storages:
            budget.charge(num_values * dtype.itemsize)
            storages[key] = Storage(torch.empty(num_values, dtype=dtype))
        return storages[key]

    def read(persistent: Callable[[Any], Any] | None = None) -> Any:
        return Unpickler(file, names, budget, persistent).load()

    magic, protocol, machine = read(), read(), read()
    if (magic, protocol) != LEGACY_FORMAT or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ForeignError("its bytes are not in the format of torch.save")
    content, keys = read(load_storage), read()
    if not isinstance(keys, list) or set(keys) != storages.keys():
        raise ForeignError("it does not hold the storages that it refers to")
    for key in keys:
        values = storages[key].values
        (num_values,) = struct.unpack("<q", file.read(8))
        if num_values != len(values):
            raise ForeignError(f"a storage in it has {num_values} values, expected {len(values)}")
        if num_values and file.readinto(memoryview(values.view(torch.uint8).numpy())) != values.nbytes:  # type: ignore
            raise EOFError("it ends within a storage")
    if file.read(1):
        raise ForeignError("it goes on after its last storage")
    return content


def _check_plain(value: Any, depth: int, parts: Iterator[int]) -> None:
    """Raise ForeignError if containers refer to each other so often that reading them would never end."""
    if depth > _MAX_DEPTH or next(parts) > MAX_WORDS:
        raise ForeignError(f"its parts unfold to more than {MAX_WORDS}, or more than {_MAX_DEPTH} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, depth + 1, parts)
            _check_plain(item, depth + 1, parts)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            _check_plain(item, depth + 1, parts)
    elif not isinstance(value, _PLAIN_TYPES):
        raise ForeignError(f"it holds a {type(value).__name__}, expected tensors and plain values")
