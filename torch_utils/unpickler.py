"""Unpickle untrusted bytes: names are looked up in a table, and memory and time follow from the bytes that are there.

A pickle is a program for a stack machine that can call any function that it names, refer to one object any number of
times, and claim any length. This machine resolves names of a given table only, each to a stand-in that stores or checks
its arguments, and counts what the program makes against a `Budget` of the file.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import IO, Any, ClassVar

from dnnlib.text import one_line, shown

# The parts of a network's pickle number some thousands, those of a training state some ten thousands.
MAX_WORDS = 1_000_000

# Far above that of any network; a small file whose parts refer to each other could otherwise expand without limit.
MAX_PARTS = 200_000

# A network has about five for each tensor. Python's hash of deeply nested tuples has no check against overflowing the
# stack, which would end the process.
MAX_TUPLES = 20_000

# Keys that are neither text nor small whole numbers. Python's hash of a number is known, so that a dict of chosen ones
# takes a time that is quadratic in their count.
MAX_NUMERIC_KEYS = 1_000

# Memory for tensors and arrays, as a multiple of the file: values are there as bytes, as a storage and as a view of it,
# and in the second version of the format as text, too.
BYTES_PER_BYTE, FREE_BYTES = 4, 1 << 20

_CHECKED_BYTES = 1 << 16  # a read of more is checked against what is left


class RefusedError(Exception):
    """The pickle names a function or class that is not in the table."""


class ForeignError(Exception):
    """The pickle was read, but does not contain what was expected, or more than its budget allows."""


class Budget:
    """What the content of one file may take: memory for values, opcodes, tuples and numeric keys."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._num_left = BYTES_PER_BYTE * num_bytes + FREE_BYTES
        self.num_words = self._num_tuples = self._num_keys = 0

    def charge(self, num_bytes: int) -> None:
        """Take memory before it is allocated; raise ForeignError if the file is too small to need that much."""
        self._num_left -= num_bytes
        if self._num_left < 0:
            raise ForeignError(f"its values unfold to far more than its {self.num_bytes} bytes")

    def count_tuple(self) -> None:
        """Count a tuple or a set."""
        self._num_tuples += 1
        if self._num_tuples > MAX_TUPLES:
            raise ForeignError(f"it makes more than {MAX_TUPLES} tuples")

    def check_key(self, key: Any, depth: int = 0) -> None:
        """Raise ForeignError unless hashing a key is quick, in a dict with all the others."""
        kind = type(key)
        if kind is str or kind is bytes or (kind is int and 0 <= key <= MAX_PARTS) or key is None or kind is type:
            return
        self._num_keys += 1
        if kind is tuple and len(key) <= 16 and depth < 4:
            for item in key:
                self.check_key(item, depth + 1)
        elif kind not in (bool, int, float, complex):
            raise ForeignError(f"a {kind.__name__} is a key in it, expected text or numbers")
        if self._num_keys > MAX_NUMERIC_KEYS:
            raise ForeignError(f"it has more than {MAX_NUMERIC_KEYS} keys that are large numbers")


class Function:
    """Stand-in for a function that a pickle may call: a function of the budget and the arguments."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call


class StandIn:
    """Base of stand-ins for classes: a pickle may make instances, and set their state where that is defined."""

    __slots__ = ()

    def set_state(self, state: Any, budget: Budget) -> None:
        """Take the state that a pickle sets."""
        raise ForeignError(f"it sets the state of a {type(self).__name__}")

    def extend(self, items: list[Any]) -> None:
        """Take items that a pickle appends."""
        raise ForeignError(f"it appends to a {type(self).__name__}")


def _encode(budget: Budget, text: Any = None, encoding: Any = None) -> bytes:
    """Return bytes, which versions of the format before the third hold as text."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ForeignError(f"it encodes a {type(text).__name__} as {shown(encoding)}")
    budget.charge(len(text))
    return text.encode("latin-1")


def _make_set(kind: type) -> Function:
    def call(budget: Budget, items: Any = ()) -> Any:
        if not isinstance(items, list | tuple):
            raise ForeignError(f"it makes a {kind.__name__} of a {type(items).__name__}")
        for item in items:
            budget.check_key(item)
        budget.count_tuple()
        budget.charge(64 * len(items))
        return kind(items)

    return Function(call)


def _complex(budget: Budget, real: Any = 0.0, imag: Any = 0.0) -> complex:
    if type(real) is not float or type(imag) is not float:
        raise ForeignError(f"it makes a complex number of {shown(real)} and {shown(imag)}")
    return complex(real, imag)


def _reconstruct(budget: Budget, kind: Any, base: Any, state: Any) -> Any:
    """Return an object as versions of the format before the second make it."""
    if not (isinstance(kind, type) and issubclass(kind, StandIn)) or base not in (_OBJECT, _DICT):
        raise ForeignError("it makes an object of a class that it does not name")
    instance = kind.__new__(kind)
    if isinstance(instance, dict) and isinstance(state, dict):
        budget.charge(64 * len(state))
        instance.update(state)
    return instance


_OBJECT, _DICT = Function(lambda budget: None), Function(lambda budget: {})

# The modules of names whose place has changed, as Python 2 and the versions 0 to 2 of the format spell them.
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}

# Names of plain values, which every file may have.
PLAIN_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Function(lambda budget: OrderedDict()),
    ("_codecs", "encode"): Function(_encode),
    ("copyreg", "_reconstructor"): Function(_reconstruct),
    ("builtins", "object"): _OBJECT,
    ("builtins", "dict"): _DICT,
    ("builtins", "bytes"): Function(lambda budget: b""),
    ("builtins", "complex"): Function(_complex),
    ("builtins", "set"): _make_set(set),
    ("builtins", "frozenset"): _make_set(frozenset),
}


class _Source:
    """An open file from which never more is asked than it has left."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.readline = file, file.readline
        start = file.tell()
        self.end = file.seek(0, io.SEEK_END)
        file.seek(start)

    def read(self, num_bytes: int) -> bytes:
        if num_bytes > _CHECKED_BYTES and num_bytes > self.end - self.file.tell():
            raise EOFError(f"it ends before {num_bytes} bytes that it should have")
        return self.file.read(num_bytes)


class Unpickler(pickle._Unpickler):  # the one in Python, of which each step can be checked
    """Unpickler of one object from an open file, which resolves the names of a table, and `PLAIN_NAMES`."""

    dispatch: ClassVar[dict[int, Callable[..., Any]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    memo: dict[int, Any]  # type: ignore[assignment]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]

    def __init__(
        self,
        file: IO[bytes],
        names: Mapping[tuple[str, str], Any],
        budget: Budget,
        load_persistent: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(file if isinstance(file, io.BytesIO) else _Source(file), encoding="utf-8")
        self.names, self.budget, self.load_persistent = names, budget, load_persistent
        self.dispatch = _Counted(self.dispatch, budget)  # type: ignore[misc]

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Return what stands in for a name; raise RefusedError if nothing does."""
        key = _OLD_MODULES.get(module_name, module_name), global_name
        found = self.names.get(key, PLAIN_NAMES.get(key))
        if found is None:
            raise RefusedError(".".join(key))
        return found

    def persistent_load(self, pid: Any) -> Any:
        """Return what an identifier stands for, where the file's format has such."""
        if self.load_persistent is None:
            raise ForeignError("it refers to objects outside of it")
        return self.load_persistent(pid)

    def get_extension(self, code: int) -> Any:
        """Refuse names that a registry of this process would have to resolve."""
        raise ForeignError(f"it refers to the extension {code}")

    # Opcodes, in place of those of the base class.

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(arguments, tuple | list):
            raise ForeignError(f"it calls a function with a {type(arguments).__name__}")
        if isinstance(function, Function):
            return function.call(self.budget, *arguments)
        return self._new(function, arguments)

    def _new(self, kind: Any, arguments: Any) -> Any:
        if not (isinstance(kind, type) and issubclass(kind, StandIn)):
            raise ForeignError(f"it makes an instance of a {type(kind).__name__}")
        return kind(*arguments)

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._new(self.stack[-1], arguments)

    def load_newobj_ex(self) -> None:
        raise ForeignError("it makes an instance with named arguments")

    def _instantiate(self, klass: Any, args: Any) -> None:
        self.append(self._call(klass, args))

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, StandIn):
            target.set_state(state, self.budget)
        elif type(target) is OrderedDict and isinstance(state, dict):
            target._metadata = state.get("_metadata")  # type: ignore[attr-defined]  # of a module's state_dict
        else:
            raise ForeignError(f"it sets the state of a {type(target).__name__}")

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list and not isinstance(self.stack[-1], StandIn):
            raise ForeignError(f"it appends to a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(items)

    def load_setitem(self) -> None:
        items = self.stack[-2:]
        del self.stack[-2:]
        self._update(items)

    def load_setitems(self) -> None:
        self._update(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._update(items)

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise ForeignError(f"it sets an item of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.budget.check_key(key)
            target[key] = value

    def load_empty_set(self) -> None:
        self.budget.count_tuple()
        self.append(set())

    def load_additems(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise ForeignError(f"it adds items to a {type(self.stack[-1]).__name__}")
        for item in items:
            self.budget.check_key(item)
            self.stack[-1].add(item)

    def load_frozenset(self) -> None:
        items = self.pop_mark()  # which changes what `append` is
        self.append(PLAIN_NAMES["builtins", "frozenset"].call(self.budget, items))

    def load_bytearray8(self) -> None:
        self.append(self.read(int.from_bytes(self.read(8), "little")))  # as bytes, which cannot change

    def _numbered(self, number: int) -> None:
        if number > MAX_PARTS:
            raise ForeignError(f"it numbers an object {number}, expected at most {MAX_PARTS}")
        self.memo[number] = self.stack[-1]

    def load_put(self) -> None:
        self._numbered(int(self.readline()[:-1]))

    def load_binput(self) -> None:
        self._numbered(self.read(1)[0])

    def load_long_binput(self) -> None:
        self._numbered(int.from_bytes(self.read(4), "little"))


def _counting_tuples(load: Callable[..., Any]) -> Callable[..., Any]:
    def load_counted(unpickler: Unpickler) -> None:
        unpickler.budget.count_tuple()
        load(unpickler)

    return load_counted


for _opcode, _load in pickle._Unpickler.dispatch.items():
    _own = getattr(Unpickler, _load.__name__)
    Unpickler.dispatch[_opcode] = _counting_tuples(_own) if _load.__name__.startswith("load_tuple") else _own


class _Counted:
    """A table of opcodes that counts each look-up."""

    def __init__(self, table: Mapping[int, Callable[..., Any]], budget: Budget) -> None:
        self.table, self.budget = table, budget

    def __getitem__(self, opcode: int) -> Callable[..., Any]:
        self.budget.num_words += 1
        if self.budget.num_words > MAX_WORDS:
            raise ForeignError(f"it has more than {MAX_WORDS} words")
        return self.table[opcode]


def explain(name: str, error: Exception, content: str) -> str:
    """Return one sentence on why a pickle named `name`, expected to hold `content`, could not be read."""
    if isinstance(error, RefusedError):
        return f"{name} was not opened: it asks for {one_line(error)}, which is refused"
    if isinstance(error, ForeignError):
        return f"{name} is a pickle, but not one of {content}: {one_line(error)}"
    return f"{name} is damaged, or is no pickle of {content} ({one_line(f'{type(error).__name__}: {error}')})"
