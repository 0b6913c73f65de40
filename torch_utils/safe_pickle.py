"""Read persistent pickles as data: no code in the file is imported, called or executed.

A pickle is a program for a stack machine that can call any function that it names. Here it can name only those below,
each replaced by a stand-in of this module that stores or checks its arguments. The source text inside a persistent
record is kept as text. The values of a tensor are embedded as a separate file, in torch's format from before its zip
archives; of that, too, only the parts of a storage are read.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import torch

PERSISTENT_VERSION = 6

# The key of a dict that is a bundle of networks as plain values, and the class name of its record.
BUNDLE = "longtake_bundle"

# Far above that of any network; a small file whose parts refer to each other could otherwise expand without limit.
MAX_PARTS = 200_000

# A network has about five for each tensor. Python's hash of deeply nested tuples has no check against overflowing the
# stack, which would end the process.
MAX_TUPLES = 20_000

# A network's pickle has about ten thousand; each may take sixty bytes of memory.
MAX_WORDS = 2_000_000

# Above it, torch's own arithmetic with shapes could overflow.
MAX_TENSOR_VALUES = 1 << 48

# The first two values of a storage's file: torch's magic number and the version of its format.
LEGACY_FORMAT = (0x1950A86A20F9469CFC6C, 1001)

# Internal attributes of torch.nn.Module, in this and in earlier versions of torch.
MODULE_INTERNALS = r"training|_parameters|_buffers|_modules|_non_persistent_buffers_set|_.*_hooks?(_.*)?"


@dataclass(frozen=True)
class Record:
    """The content of a pickle about one object.

    `class_name` is the name of its class ("dict" for a plain dict, as in train pickles) and `module_src` the source
    text of its module. `attributes` holds its plain values (numbers, text, NumPy arrays, containers of such; a
    compiled regular expression is its text), without the internal attributes of `torch.nn.Module`. `children` holds its
    sub-modules, `tensors` its own parameters and persistent buffers, on the CPU, in the order of registration.
    """

    class_name: str
    module_src: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)
    children: dict[str, Record] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the tensors of this record and its children, named and ordered as in `torch.nn.Module.state_dict`."""
        return dict(self._named_tensors(""))

    def _named_tensors(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.tensors.items():
            yield prefix + name, tensor
        for name, child in self.children.items():
            yield from child._named_tensors(f"{prefix}{name}.")


def load(file: str | os.PathLike[str] | IO[bytes]) -> Record:
    """Read a pickled network, or a dict of networks, from a path or an open file, without executing any code.

    The root of the result is the network's record. For a train pickle, which is a dict, it is a record of class "dict"
    whose children are the networks and other objects in it by their keys, for example `load(path).children["G"]`.

    Raises ValueError with the name of the file if it is damaged, is not such a pickle, or names anything not allowed.
    """
    if isinstance(file, str | os.PathLike):
        with open(file, "rb") as opened:
            return load(opened)
    name = getattr(file, "name", "the pickle")
    try:
        _refuse_overload(file)
        root = _Unpickler(file).load()
        return _Converter().root(root)
    except _RefusedError as error:
        raise ValueError(
            f"{name} was not opened: it asks for {one_line(error)}, which a network's file has no need of. "
            "Nothing in it was run. If you know its author and trust the file, open it as trusted (--trust)"
        ) from None
    except _ForeignError as error:
        raise ValueError(f"{name} is a pickle, but not one of a network: {one_line(error)}") from None
    except Exception as error:
        # A damaged pickle can raise almost any error in the unpickler: EOFError, KeyError, UnicodeDecodeError, ...
        reason = one_line(f"{type(error).__name__}: {error}")
        raise ValueError(f"{name} is damaged, or is not a pickled network ({reason})") from error


def one_line(text: Any) -> str:
    """Return text from an untrusted file for a message: one line, at most 204 characters, no control characters."""
    line = "".join(c if c.isprintable() else "?" for c in str(text)[:1000])
    return line if len(line) <= 200 else f"{line[:200]} ..."


def refuse_overload(file: IO[bytes]) -> None:
    """Read the opcodes of a pickle without executing them; raise ValueError if they could crash an unpickler.

    The position in the file is restored.
    """
    try:
        _refuse_overload(file)
    except _ForeignError as error:
        raise ValueError(str(error)) from None


def _refuse_overload(file: IO[bytes]) -> None:
    """Read the opcodes of a pickle without executing them; raise _ForeignError if they could crash the unpickler."""
    start = file.tell()
    num_tuples = 0
    for num_words, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if num_words >= MAX_WORDS:
            raise _ForeignError(f"it has more than {MAX_WORDS} words")
        num_tuples += opcode.name.startswith("TUPLE")
        # The unpickler's memo is an array: a single large index would use up the memory.
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > MAX_PARTS:
            raise _ForeignError(f"it numbers an object {argument}, expected at most {MAX_PARTS}")
    if num_tuples > MAX_TUPLES:
        raise _ForeignError(f"it makes {num_tuples} tuples, expected at most {MAX_TUPLES}")
    file.seek(start)


class _RefusedError(Exception):
    """The pickle names a function or class that is not allowed."""


class _ForeignError(Exception):
    """The pickle was read, but does not contain a network."""


# ----------------------------------------------------------------------------
# Stand-ins. A pickle can call the objects that it names, create instances of them, and set the state of both. None of
# this may change anything that exists after reading: no stand-in has a __dict__, and all have a __setstate__, without
# which the unpickler would set attributes itself.


class _Function:
    """Stand-in for an allowed function; calls the function of this module."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise _ForeignError("it sets the state of a function")


class _Sealed:
    """Container of a storage, a tensor or a pattern, so that a pickle cannot set its state."""

    __slots__ = ("content",)

    def __init__(self, content: Any):
        self.content = content

    def __setstate__(self, state: Any) -> None:
        raise _ForeignError(f"it sets the state of a {type(self.content).__name__}")


class _Mapping(dict):
    """Stand-in for OrderedDict and EasyDict."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Ignore attributes of the dict itself, for example the `_metadata` of a state dict."""


class _Object:
    """Stand-in for an object of any class whose state is a dict."""

    __slots__ = ("class_name", "module_src", "state")
    stands_for = ""

    def __new__(cls) -> _Object:
        self = object.__new__(cls)
        self.class_name, self.module_src, self.state = cls.stands_for, "", {}
        return self

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise _ForeignError(f"the state of {self.class_name} is a {type(state).__name__}, expected a dict")
        self.state = state


class _ModuleList(_Object):
    __slots__ = ()
    stands_for = "ModuleList"


class _Identity(_Object):
    __slots__ = ()
    stands_for = "Identity"


class _Collector(_Object):
    __slots__ = ()
    stands_for = "Collector"


class _Dtype:
    """Stand-in for a NumPy dtype of numbers, bools or text; objects and records are not allowed."""

    __slots__ = ("dtype",)

    def __init__(self, code: Any, *args: Any):
        if not isinstance(code, str) or not re.fullmatch("[biufcSU][0-9]{1,9}", code):
            raise _ForeignError(f"it holds NumPy values of type {code!r}, expected numbers, bools or text")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])

    def decode(self, shape: Any, data: Any, fortran: bool = False) -> np.ndarray:
        """Return the array of this dtype and of `shape` in the bytes; _ForeignError if their number differs."""
        if not isinstance(data, bytes) or len(data) != math.prod(shape) * self.dtype.itemsize:
            raise _ForeignError("a NumPy array's bytes do not fit its shape")
        array = np.frombuffer(data, self.dtype) if data else np.empty(0, self.dtype)
        return array.reshape(shape, order="F" if fortran else "C").copy()


class _Array:
    """Stand-in for a NumPy array, created empty before its state is set."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array = np.empty(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.array = dtype.decode(shape, data, fortran)


def _reconstruct_persistent_obj(meta: Any) -> _Object:
    if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("class_name"), str):
        raise _ForeignError("a persistent object in it lacks its type or its class name")
    if meta.get("version") != PERSISTENT_VERSION:
        raise _ForeignError(f"persistent format version {meta.get('version')!r}, expected {PERSISTENT_VERSION}")
    obj = _Object()
    obj.class_name = meta["class_name"]
    obj.module_src = meta["module_src"]
    obj.__setstate__(meta["state"])
    return obj


class _StorageUnpickler(pickle.Unpickler):
    """Unpickler of the parts of a storage's file, which may name types of storages only."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name in ("torch", "torch.storage") and global_name in STORAGE_TYPES:
            return STORAGE_TYPES[global_name]
        raise _RefusedError(f"{module_name}.{global_name}")

    def persistent_load(self, pid: Any, /) -> Any:
        return _Sealed(pid)


def _load_from_bytes(data: Any) -> _Sealed:
    """Return a storage as a 1-D tensor, sealed twice to distinguish it from a tensor."""
    file = io.BytesIO(data)
    parts = []
    for _ in range(5):  # magic number, version, system information, the storage, the keys of storages
        _refuse_overload(file)
        parts.append(_StorageUnpickler(file).load())
    magic, protocol, machine, sealed, keys = parts
    if (magic, protocol) != LEGACY_FORMAT or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise _ForeignError("the bytes of a tensor in it are not in the format of a storage")
    if not isinstance(sealed, _Sealed) or not isinstance(keys, list) or len(keys) != 1:
        raise _ForeignError("the bytes of a tensor in it do not hold one storage")
    kind, dtype, _, _, num_values, *view = sealed.content
    num_bytes = len(data) - file.tell() - 8  # the number of values is repeated before them
    if kind != "storage" or not isinstance(dtype, torch.dtype) or view != [None]:
        raise _ForeignError("the bytes of a tensor in it do not hold a storage")
    if type(num_values) is not int or num_bytes != num_values * dtype.itemsize:
        raise _ForeignError(f"a storage in it has {num_bytes} bytes, expected {num_values} values of {dtype}")
    values = bytearray(memoryview(data)[len(data) - num_bytes :])
    return _Sealed(_Sealed(torch.frombuffer(values, dtype=dtype) if num_bytes else torch.empty(0, dtype=dtype)))


def _rebuild_tensor_v2(sealed: Any, offset: Any, shape: Any, stride: Any, *args: Any) -> _Sealed:
    if not isinstance(sealed, _Sealed) or not isinstance(sealed.content, _Sealed):
        raise _ForeignError("a tensor in it has no storage")
    values = sealed.content.content
    if any(type(number) is not int or number < 0 for number in (offset, *shape, *stride)):
        raise _ForeignError("a tensor in it has a shape or strides that are not whole numbers")
    num_needed = 0 if 0 in shape else offset + 1 + sum((s - 1) * d for s, d in zip(shape, stride, strict=True))
    if num_needed > len(values) or math.prod(shape) > MAX_TENSOR_VALUES:
        raise _ForeignError(f"a tensor of shape {tuple(shape)} is larger than its storage of {len(values)} values")
    return _Sealed(values.as_strided(tuple(shape), tuple(stride), offset))


def _rebuild_parameter(sealed: Any, *args: Any) -> _Sealed:
    return sealed


def _compile(pattern: Any, flags: Any) -> _Sealed:
    return _Sealed(str(pattern))


def _scalar(dtype: _Dtype, data: Any) -> Any:
    return dtype.decode((), data)[()]


STORAGE_TYPES = {
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
}

_ALLOWED: dict[tuple[str, str], Any] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Function(_reconstruct_persistent_obj),
    ("torch_utils.training_stats", "Collector"): _Collector,
    ("dnnlib.util", "EasyDict"): _Mapping,
    ("collections", "OrderedDict"): _Mapping,
    ("re", "_compile"): _Function(_compile),
    ("torch._utils", "_rebuild_parameter"): _Function(_rebuild_parameter),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor_v2),
    ("torch.storage", "_load_from_bytes"): _Function(_load_from_bytes),
    ("torch.nn.modules.container", "ModuleList"): _ModuleList,
    ("torch.nn.modules.linear", "Identity"): _Identity,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    # The first name is that of NumPy 1.
    ("numpy.core.multiarray", "scalar"): _Function(_scalar),
    ("numpy._core.multiarray", "scalar"): _Function(_scalar),
    ("numpy.core.multiarray", "_reconstruct"): _Function(lambda *args: _Array()),
    ("numpy._core.multiarray", "_reconstruct"): _Function(lambda *args: _Array()),
}


class _Unpickler(pickle.Unpickler):
    """Unpickler that resolves allowed names only; the base class raises an error for persistent ids."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise _RefusedError(f"{module_name}.{global_name}") from None


# ----------------------------------------------------------------------------
# From stand-ins to records.


class _NotPlainError(Exception):
    """A value contains tensors or objects."""


class _Converter:
    """Converter of stand-ins to records; counts the parts and raises an error above MAX_PARTS."""

    def __init__(self) -> None:
        self.num_parts = 0

    def root(self, value: Any) -> Record:
        if isinstance(value, _Object):
            return self.record(value)
        if not isinstance(value, dict):
            raise _ForeignError(f"it holds a {type(value).__name__}, expected a network or a dict of networks")
        if BUNDLE in value:
            return self.bundle(value)
        objects = {key: item for key, item in value.items() if isinstance(item, _Object)}
        if not objects:
            raise _ForeignError(f"it holds a dict without networks, with the keys {', '.join(map(repr, value))}")
        children = {str(key): self.record(item) for key, item in objects.items()}
        return Record("dict", attributes=self.plain_items(value), children=children)

    def bundle(self, value: dict[Any, Any]) -> Record:
        """Return the record of a bundle: attributes but for its networks, and each network with all its tensors."""
        if value[BUNDLE] != 1:
            raise _ForeignError(f"it is a bundle of version {value[BUNDLE]!r}, expected 1: use a newer Longtake")
        children = {}
        for role, entry in value["networks"].items():
            tensors = {str(name): self.tensor(tensor, name) for name, tensor in entry["tensors"].items()}
            children[str(role)] = Record(
                str(entry["class"]), "", {"options": self.plain(entry["options"])}, {}, tensors
            )
        own = {name: item for name, item in value.items() if name not in (BUNDLE, "networks")}
        return Record(BUNDLE, "", self.plain_items(own), children)

    def record(self, obj: _Object) -> Record:
        self.count()
        state = obj.state
        tensors = {}
        for kind in ("_parameters", "_buffers"):
            for name, tensor in state.get(kind, {}).items():
                if tensor is not None and name not in state.get("_non_persistent_buffers_set", ()):
                    tensors[str(name)] = self.tensor(tensor, name)
        modules = {name: module for name, module in state.get("_modules", {}).items() if module is not None}
        strangers = [name for name, module in modules.items() if not isinstance(module, _Object)]
        if strangers:
            raise _ForeignError(f"the sub-module {strangers[0]!r} of {obj.class_name} is not a module")
        children = {str(name): self.record(module) for name, module in modules.items()}
        own = {name: item for name, item in state.items() if not re.fullmatch(MODULE_INTERNALS, name)}
        return Record(obj.class_name, str(obj.module_src), self.plain_items(own), children, tensors)

    def tensor(self, sealed: Any, name: Any) -> torch.Tensor:
        self.count()
        if not isinstance(sealed, _Sealed) or not isinstance(sealed.content, torch.Tensor):
            raise _ForeignError(f"the parameter or buffer {name!r} in it is not a tensor")
        return sealed.content

    def plain_items(self, items: dict[Any, Any]) -> dict[str, Any]:
        plain = {}
        for name, item in items.items():
            try:
                plain[str(name)] = self.plain(item)
            except _NotPlainError:
                continue
        return plain

    def plain(self, value: Any) -> Any:
        self.count()
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic):
            return value
        if isinstance(value, _Array):
            return value.array
        if isinstance(value, _Sealed) and isinstance(value.content, str):
            return value.content
        if isinstance(value, list | tuple | set | frozenset):
            return type(value)(self.plain(item) for item in value)
        if isinstance(value, dict):
            return {self.plain(key): self.plain(item) for key, item in value.items()}
        raise _NotPlainError

    def count(self) -> None:
        self.num_parts += 1
        if self.num_parts > MAX_PARTS:
            raise _ForeignError(f"its parts unfold to more than {MAX_PARTS}")
