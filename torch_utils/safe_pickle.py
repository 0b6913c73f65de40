"""Read persistent pickles as data: no code in the file is imported, called or executed.

A pickle is a program for a stack machine that can call any function that it names. Here it can name only those below,
each replaced by a stand-in of this module that stores or checks its arguments. The source text inside a persistent
record is kept as text. The values of a tensor are embedded as a separate file, in torch's format from before its zip
archives; of that, too, only the parts of a storage are read. `torch_utils.unpickler` bounds what all of it may take.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import torch

from dnnlib.text import one_line as one_line
from dnnlib.text import shown
from torch_utils.torch_file import STORAGE_NAMES, TENSOR_NAMES, Storage, load_legacy
from torch_utils.unpickler import MAX_PARTS, Budget, ForeignError, Function, RefusedError, StandIn, Unpickler, explain

PERSISTENT_VERSION = 6

# The key of a dict that is a bundle of networks as plain values, and the class name of its record.
BUNDLE = "longtake_bundle"

# Of the name of an attribute, tensor or module, and of all names that lead to a tensor.
MAX_NAME, MAX_PATH = 256, 4096

MAX_VISITS = 10 * MAX_PARTS

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

    Raises ValueError with the name of the file if it is damaged, is not such a pickle, names anything not allowed, or
    unfolds to far more than its bytes.
    """
    if isinstance(file, str | os.PathLike):
        with open(file, "rb") as opened:
            return load(opened)
    trust = ". Nothing in it was run. If you know its author and trust the file, open it as trusted (--trust)"
    name = getattr(file, "name", "the pickle")
    return _read(file, name, "a network", trust, lambda root, budget: _Converter(budget).root(root))


def load_arrays(file: IO[bytes]) -> Any:
    """Read nested containers of NumPy arrays and plain values from an open pickle; raise ValueError as `load`."""
    return _read(file, "it", "arrays", "", lambda root, budget: _Converter(budget).plain(root))


def _read(file: IO[bytes], name: str, content: str, remedy: str, convert: Callable[[Any, Budget], Any]) -> Any:
    start = file.tell()
    budget = Budget(file.seek(0, io.SEEK_END) - start)
    file.seek(start)
    try:
        return convert(Unpickler(file, _ALLOWED, budget).load(), budget)
    except RefusedError as error:
        raise ValueError(f"{explain(name, error, content)}{remedy}") from None
    except Exception as error:
        # A damaged pickle can raise almost any error in the unpickler: EOFError, KeyError, UnicodeDecodeError, ...
        raise ValueError(explain(name, error, content)) from error


# ----------------------------------------------------------------------------
# Stand-ins. A pickle can call the objects that it names, make instances of them, and set their state. None of this may
# change anything that exists after reading.


class _Mapping(dict, StandIn):
    """Stand-in for EasyDict."""

    __slots__ = ()

    def set_state(self, state: Any, budget: Budget) -> None:
        """Ignore attributes of the dict itself."""


class _Object(StandIn):
    """Stand-in for an object of any class whose state is a dict."""

    __slots__ = ("class_name", "module_src", "state")
    stands_for = ""

    def __new__(cls) -> _Object:
        self = object.__new__(cls)
        self.class_name, self.module_src, self.state = cls.stands_for, "", {}
        return self

    def set_state(self, state: Any, budget: Budget) -> None:
        """Take the `__dict__` of the object."""
        if not isinstance(state, dict):
            raise ForeignError(f"the state of {self.class_name} is a {type(state).__name__}, expected a dict")
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


class _Dtype(StandIn):
    """Stand-in for a NumPy dtype of numbers, bools or text; objects and records are not allowed."""

    __slots__ = ("dtype",)

    def __init__(self, code: Any, *args: Any):
        if not isinstance(code, str) or not re.fullmatch("[biufcSU][0-9]{1,9}", code):
            raise ForeignError(f"it holds NumPy values of type {shown(code)}, expected numbers, bools or text")
        self.dtype = np.dtype(code)

    def set_state(self, state: Any, budget: Budget) -> None:
        """Take the order of bytes."""
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])

    def decode(self, budget: Budget, shape: Any, data: Any, fortran: bool = False) -> np.ndarray:
        """Return the array of this dtype and of `shape` in the bytes; ForeignError if their number differs."""
        is_shape = isinstance(shape, tuple) and all(type(number) is int and number >= 0 for number in shape)
        if not is_shape or not isinstance(data, bytes) or len(data) != math.prod(shape) * self.dtype.itemsize:
            raise ForeignError("a NumPy array's bytes do not fit its shape")
        budget.charge(len(data) or self.dtype.itemsize)  # an array without values takes memory for one
        array = np.frombuffer(data, self.dtype) if data else np.empty(0, self.dtype)
        return array.reshape(shape, order="F" if fortran else "C").copy()


class _Array(StandIn):
    """Stand-in for a NumPy array, created empty before its state is set."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array = np.empty(0)

    def set_state(self, state: Any, budget: Budget) -> None:
        """Take version, shape, dtype, order and bytes."""
        _, shape, dtype, fortran, data = state
        self.array = _Dtype.decode(dtype, budget, shape, data, fortran)


def _reconstruct_persistent_obj(budget: Budget, meta: Any) -> _Object:
    if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("class_name"), str):
        raise ForeignError("a persistent object in it lacks its type or its class name")
    if meta.get("version") != PERSISTENT_VERSION:
        raise ForeignError(f"persistent format version {shown(meta.get('version'))}, expected {PERSISTENT_VERSION}")
    obj = _Object()
    if not isinstance(meta["module_src"], str):
        raise ForeignError("the source text of a persistent object in it is no text")
    obj.class_name, obj.module_src = meta["class_name"], meta["module_src"]
    obj.set_state(meta["state"], budget)
    return obj


def _load_from_bytes(budget: Budget, data: Any) -> Storage:
    """Return a storage from its file."""
    storage = load_legacy(io.BytesIO(data), STORAGE_NAMES, budget)
    if not isinstance(storage, Storage):
        raise ForeignError("the bytes of a tensor in it do not hold a storage")
    return storage


def _compile(budget: Budget, pattern: Any, flags: Any) -> str:
    """Return the text of a regular expression."""
    if not isinstance(pattern, str):
        raise ForeignError(f"a regular expression in it is a {type(pattern).__name__}")
    return pattern


def _frombuffer(budget: Budget, data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.array = _Dtype.decode(dtype, budget, shape, data, order == "F")
    return array


def _scalar(budget: Budget, dtype: Any, data: Any) -> Any:
    return _Dtype.decode(dtype, budget, (), data)[()]


_MAKE_ARRAY = Function(lambda budget, *args: _Array())

_ALLOWED: dict[tuple[str, str], Any] = {
    **TENSOR_NAMES,
    ("torch._utils", "_rebuild_parameter"): Function(lambda budget, tensor, *args: tensor),
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): Function(_reconstruct_persistent_obj),
    ("torch_utils.training_stats", "Collector"): _Collector,
    ("dnnlib.util", "EasyDict"): _Mapping,
    ("re", "_compile"): Function(_compile),
    ("torch.storage", "_load_from_bytes"): Function(_load_from_bytes),
    ("torch.nn.modules.container", "ModuleList"): _ModuleList,
    ("torch.nn.modules.linear", "Identity"): _Identity,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    # The first name is that of NumPy 1.
    ("numpy.core.multiarray", "scalar"): Function(_scalar),
    ("numpy._core.multiarray", "scalar"): Function(_scalar),
    ("numpy.core.numeric", "_frombuffer"): Function(_frombuffer),
    ("numpy._core.numeric", "_frombuffer"): Function(_frombuffer),
    ("numpy.core.multiarray", "_reconstruct"): _MAKE_ARRAY,
    ("numpy._core.multiarray", "_reconstruct"): _MAKE_ARRAY,
}


# ----------------------------------------------------------------------------
# From stand-ins to records.


class _NotPlainError(Exception):
    """A value contains tensors or objects."""


class _Converter:
    """Converter of stand-ins to records; counts the parts and raises an error above MAX_PARTS."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.num_parts = self.num_visits = 0

    def root(self, value: Any) -> Record:
        if isinstance(value, _Object):
            return self.record(value)
        if not isinstance(value, dict):
            raise ForeignError(f"it holds a {type(value).__name__}, expected a network or a dict of networks")
        if BUNDLE in value:
            return self.bundle(value)
        objects = {key: item for key, item in value.items() if isinstance(item, _Object)}
        if not objects:
            names = ", ".join(map(shown, [*value][:8]))
            raise ForeignError(f"it holds a dict without networks, with the keys {names}")
        children = {self.name(key): self.record(item) for key, item in objects.items()}
        return Record("dict", attributes=self.plain_items(value), children=children)

    def bundle(self, value: dict[Any, Any]) -> Record:
        """Return the record of a bundle: attributes but for its networks, and each network with all its tensors."""
        if value[BUNDLE] != 1:
            raise ForeignError(f"it is a bundle of version {shown(value[BUNDLE])}, expected 1: use a newer Longtake")
        children = {}
        for role, entry in value["networks"].items():
            tensors = {self.name(name): self.tensor(tensor, name) for name, tensor in entry["tensors"].items()}
            options = {"options": self.plain(entry["options"])}
            children[self.name(role)] = Record(self.name(entry["class"]), "", options, {}, tensors)
        own = {name: item for name, item in value.items() if name not in (BUNDLE, "networks")}
        return Record(BUNDLE, "", self.plain_items(own), children)

    def record(self, obj: _Object, path_letters: int = 0) -> Record:
        self.count()
        state = obj.state
        parts = [state, *(state.get(kind, {}) for kind in ("_parameters", "_buffers", "_modules"))]
        passing = set(state.get("_non_persistent_buffers_set", ()))
        self.visit(sum(map(len, parts)) + len(passing))
        tensors = {}
        for name, tensor in [*parts[1].items(), *parts[2].items()]:
            if tensor is not None and name not in passing:
                tensors[self.name(name)] = self.tensor(tensor, name)
                self.budget.charge(path_letters + len(str(name)))  # of its name in the state dict
        modules = {name: module for name, module in parts[3].items() if module is not None}
        foreign = [name for name, module in modules.items() if not isinstance(module, _Object)]
        if foreign:
            raise ForeignError(f"the sub-module {shown(foreign[0])} of {obj.class_name} is not a module")
        children = {}
        for name, module in modules.items():
            letters = path_letters + len(self.name(name))
            if letters > MAX_PATH:
                raise ForeignError(f"the names of its modules add up to more than {MAX_PATH} letters")
            children[str(name)] = self.record(module, letters)
        own = {name: item for name, item in state.items() if not re.fullmatch(MODULE_INTERNALS, self.name(name))}
        return Record(obj.class_name, obj.module_src, self.plain_items(own), children, tensors)

    def name(self, name: Any) -> str:
        """Return the name of something as text."""
        if not isinstance(name, str | int) or len(text := str(name)) > MAX_NAME:
            raise ForeignError(f"{shown(name)} is a name in it, expected at most {MAX_NAME} letters")
        return text

    def tensor(self, tensor: Any, name: Any) -> torch.Tensor:
        self.count()
        if not isinstance(tensor, torch.Tensor):
            raise ForeignError(f"the parameter or buffer {shown(name)} in it is not a tensor")
        return tensor

    def plain_items(self, items: dict[Any, Any]) -> dict[str, Any]:
        plain = {}
        for name, item in items.items():
            try:
                plain[self.name(name)] = self.plain(item)
            except _NotPlainError:
                continue
        return plain

    def plain(self, value: Any) -> Any:
        self.count()
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic):
            return value
        if isinstance(value, _Array):
            return value.array
        if isinstance(value, list | tuple | set | frozenset):
            return type(value)(self.plain(item) for item in value)
        if isinstance(value, dict):
            return {self.plain(key): self.plain(item) for key, item in value.items()}
        raise _NotPlainError

    def visit(self, num_items: int) -> None:
        """Count items of containers, which many objects may share, also of those that are passed over."""
        self.num_visits += num_items
        if self.num_visits > MAX_VISITS:
            raise ForeignError(f"the objects in it share {MAX_VISITS} items or more")

    def count(self) -> None:
        self.num_parts += 1
        if self.num_parts > MAX_PARTS:
            raise ForeignError(f"its parts unfold to more than {MAX_PARTS}")
