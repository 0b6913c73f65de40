"""Classes whose pickles contain the source code they need, in the format of the published networks (version 6).

An object of a class decorated with `persistent_class` is pickled as one call of `_reconstruct_persistent_obj` with a
plain dict: the source text of the class's module, the class's name, and the object's `__dict__`.

Reading such a file with the standard `pickle` runs the source text in it, and pickle itself can run any code: do that
only with files from trusted sources. `torch_utils.safe_pickle` reads the same files without running any of it.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import inspect
import io
import pickle
import sys
import types
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch

from dnnlib import EasyDict

VERSION = 6

AnyClass = TypeVar("AnyClass", bound=type)

_is_checking: contextvars.ContextVar[bool] = contextvars.ContextVar("is_checking", default=True)

_import_hooks: list[Callable[[EasyDict], EasyDict]] = []
_module_to_src: dict[types.ModuleType, str] = {}
_src_to_module: dict[str, types.ModuleType] = {}


def persistent_class(cls: AnyClass) -> AnyClass:
    """Decorate a class so that its pickles contain the source text of the module that defines it.

    The result is a subclass with the same name. Its objects keep a deep copy of their constructor arguments as
    `init_args` and `init_kwargs`, unless they set `_record_init_args = False`. At the end of construction an object
    must be picklable. Subclasses must be decorated as well. Decorating twice has no effect. A module that is to be
    read by other programs must use absolute imports. Objects that contain themselves cannot be pickled.
    """
    assert isinstance(cls, type)
    if is_persistent(cls):
        return cls
    module_src = _source_of(sys.modules[cls.__module__])

    class Persistent(cls):
        _persistent_module_src = module_src
        _persistent_class_name = cls.__name__

        @functools.wraps(cls.__init__)
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            # object.__setattr__ also works for frozen dataclasses.
            if getattr(self, "_record_init_args", True):
                object.__setattr__(self, "_init_args", copy.deepcopy(args))
                object.__setattr__(self, "_init_kwargs", copy.deepcopy(kwargs))
            if type(self) is Persistent and _is_checking.get():
                _check_picklable(self.__reduce__())

        @property
        def init_args(self) -> tuple[Any, ...]:
            return copy.deepcopy(self._init_args)

        @property
        def init_kwargs(self) -> EasyDict:
            return EasyDict(copy.deepcopy(self._init_kwargs))

        def __reduce__(self) -> tuple[Any, ...]:
            assert is_persistent(type(self)), f"{type(self).__name__} must be decorated with persistent_class as well"
            state = self.__getstate__() or {}
            assert isinstance(state, dict), f"{type(self).__name__} has __slots__: its state is not a dict"
            meta = {
                "type": "class",
                "version": VERSION,
                "module_src": self._persistent_module_src,
                "class_name": self._persistent_class_name,
                "state": state,
            }
            return (_reconstruct_persistent_obj, (meta,), None)

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Persistent, name, getattr(cls, name))
    return Persistent  # type: ignore[return-value]


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Leave out the check that new objects are picklable, for those that are made as a file describes them."""
    token = _is_checking.set(False)
    try:
        yield
    finally:
        _is_checking.reset(token)


def is_persistent(obj: Any) -> bool:
    """Return whether `obj` is a decorated class or an object of one; subclasses count only if decorated themselves."""
    cls = obj if isinstance(obj, type) else type(obj)
    return "_persistent_module_src" in cls.__dict__


def import_hook(hook: Callable[[EasyDict], EasyDict]) -> Callable[[EasyDict], EasyDict]:
    """Register a function that can read and replace the record of each persistent object before it is rebuilt.

    The record has `type`, `version`, `module_src`, `class_name` and `state`. Usable as a decorator.
    """
    _import_hooks.append(hook)
    return hook


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> Any:
    """Rebuild an object from its record by running its source text; pickle calls this by name."""
    record = EasyDict(meta)
    record.state = EasyDict(record.state)
    for hook in _import_hooks:
        record = hook(record)
    if record.version != VERSION:
        raise ValueError(f"a persistent object has format version {record.version!r}, expected {VERSION}")
    module = _module_with(record.module_src, record.class_name)
    cls: Any = persistent_class(module.__dict__[record.class_name])
    obj = cls.__new__(cls)
    if hasattr(obj, "__setstate__"):
        obj.__setstate__(record.state)
    else:
        obj.__dict__.update(record.state)
    return obj


def _source_of(module: types.ModuleType) -> str:
    # One string object for each module, so that a pickle contains the text once for all objects that refer to it.
    if module not in _module_to_src:
        src = inspect.getsource(module)
        _module_to_src[module] = src
        _src_to_module.setdefault(src, module)
    return _module_to_src[module]


def _module_with(src: str, class_name: str) -> types.ModuleType:
    # A module already imported from the same text is reused, so that a deep copy keeps its class. If the class is not
    # in it, as it is still being defined or was removed, the text is run.
    module = _src_to_module.get(src)
    if module is not None and class_name in module.__dict__:
        return module
    module = types.ModuleType(f"_imported_module_{uuid.uuid4().hex}")
    # Added to sys.modules before it runs, because dataclasses look up their module there.
    sys.modules[module.__name__] = module
    _module_to_src[module] = src
    exec(src, module.__dict__)
    _src_to_module[src] = module
    return module


class _TestPickler(pickle.Pickler):
    """Skip objects of types known to be picklable, so that checking a large network is cheap."""

    def persistent_id(self, obj: Any) -> str | None:
        given = (torch.Tensor, torch.storage.UntypedStorage, np.ndarray, np.generic, bool, int, float, str, bytes)
        return "given" if isinstance(obj, given) or is_persistent(obj) else None


def _check_picklable(value: Any) -> None:
    _TestPickler(io.BytesIO(), protocol=4).dump(value)
