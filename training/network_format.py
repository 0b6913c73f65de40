"""The formats of `training.network_file`: pickles and .safetensors as tensors and plain values, checked, then built."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dnnlib.json_file import parse_json, record
from dnnlib.text import one_line
from torch_utils import persistence, safe_pickle
from training import registry
from training.contract import Bundle

# The entry of a .safetensors header that says which networks the tensors belong to.
SAFETENSORS_KEY = "longtake"


# The end of a pickle of ours: its last byte is that of any pickle.
SEAL = rb"\nsha256:([0-9a-f]{64})\."


SEAL_BYTES = 73


# What a bundle says besides its networks, and of which types.
FACTS: dict[str, Any] = {
    "system": str,
    "options": dict,
    "tokenizer": (str, type(None)),
    "fps": (int, float, type(None)),
    "vocabularies": dict,
}


ONLY = "network"  # the role of a network that is a file by itself


class WrongNetworkError(ValueError):
    """A file holds a network of another class than was expected; `found` is that class."""

    def __init__(self, path: str, found: type, expected: type):
        super().__init__(f"{path} is a {describe(found)}, expected a {describe(expected)}")
        self.found = found


def describe(cls: type) -> str:
    """Return what the registry calls a class of networks; else its name."""
    words = [words for spec, words in registry.networks().items() if spec.endswith(f":{cls.__name__}")]
    return words[0] if words else cls.__name__


def is_torch_archive(path: str) -> bool:
    """Return whether a file is what `torch.save` writes."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):
        return False


def check_seal(path: str) -> None:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        num_left = max(file.seek(0, os.SEEK_END) - SEAL_BYTES, 0)
        file.seek(num_left)
        seal = re.fullmatch(SEAL, file.read())
        if seal is None:  # from elsewhere
            return
        file.seek(0)
        while num_left > 0:
            chunk = file.read(min(num_left, 1 << 20))
            digest.update(chunk)
            num_left -= len(chunk)
    if digest.hexdigest() != seal[1].decode():
        raise ValueError(f"{path} is damaged: its checksum is wrong; copy or download it again")


# What a file says of its networks: facts of the bundle, and by role class, arguments and tensors of each network.
Contents = tuple[dict[str, Any], dict[str, tuple[Any, dict[str, Any], dict[str, torch.Tensor]]]]


def read_pickle(path: str) -> Contents:
    check_seal(path)
    record = safe_pickle.load(path)
    if record.class_name == safe_pickle.BUNDLE:
        return _read_record(path, record)
    name = one_line(record.class_name)
    if name == "dict":
        _refuse_dict(path, list(record.children))
    try:
        for spec in registry.specs():
            for cls in map(registry.resolve, spec.networks):
                if hasattr(cls, "matches") and cls.matches(record):
                    parts = cls, cls.options_from_record(record), record.state_dict()
                    return {"system": spec.name}, {ONLY: parts}
    except Exception as error:  # what a file says of its network may be anything
        raise ValueError(f"{path} is damaged: its {name} cannot be made out ({reason_of(error)})") from error
    raise ValueError(
        f"{path} holds a {name}, which is none of the networks known here ({_known()}). If you trust the "
        "file, its own code can be run instead (--trust)"
    )


def _read_record(path: str, record: safe_pickle.Record) -> Contents:
    entries = {
        role: (child.class_name, child.attributes["options"], child.tensors) for role, child in record.children.items()
    }
    return _checked(path, record.attributes, entries)


def _checked(path: str, facts: Mapping[str, Any], entries: Mapping[str, tuple[Any, Any, Any]]) -> Contents:
    """Return the contents of a bundle, its classes found, or refuse it."""
    networks = {}
    for role, (name, options, tensors) in entries.items():
        found = registry.find_network(str(name))
        if found is None:
            raise ValueError(f"{path} holds a {one_line(name)}, expected one of {_known()}")
        if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
            raise ValueError(f"{path} is damaged: the options of its {role} are no dictionary")
        networks[role] = registry.resolve(found[0]), options, tensors
    for key, kind in FACTS.items():
        if key in facts and not isinstance(facts[key], kind):
            raise ValueError(f"{path} is damaged: its entry {key!r} is a {type(facts[key]).__name__}")
    if not networks or "system" not in facts:
        raise ValueError(f"{path} is damaged: it names no system or holds no network")
    return {key: facts[key] for key in FACTS if key in facts}, networks


def _known() -> str:
    return ", ".join(spec.partition(":")[2] for spec in registry.networks())


def load_trusted(path: str, expect: type) -> Bundle:
    check_seal(path)
    print(f"Trusting {path}: code that came with this file now runs with all your rights.", flush=True)
    try:
        with open(path, "rb") as file:
            module = _TrustingUnpickler(file).load()
    except (EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged, or is no pickle ({error})") from error
    except ModuleNotFoundError as error:
        name = one_line(error.name)
        remedy = "pip install 'longtake[trust]'" if error.name == "einops" else "install it"
        raise ValueError(f"the code in {path} needs the package {name}, which is missing: {remedy}") from error
    except (AttributeError, ImportError) as error:
        raise ValueError(f"the code in {path} does not run here ({reason_of(error)})") from error
    if isinstance(module, dict) and safe_pickle.BUNDLE in module:  # it brings no code
        facts, networks = _read_record(path, safe_pickle.load(path))
        return Bundle({role: build_network(*parts, path) for role, parts in networks.items()}, **facts)
    if isinstance(module, dict):
        _refuse_dict(path, [key for key, item in module.items() if isinstance(item, nn.Module)])
    if not isinstance(module, nn.Module):
        raise ValueError(f"{path} holds a {type(module).__name__}, expected a network")
    if not isinstance(module, expect):
        raise WrongNetworkError(path, type(module), expect)
    known = registry.find_network(type(module).__name__)
    return Bundle({ONLY: module}, known[1].name if known else "")


class _TrustingUnpickler(pickle.Unpickler):
    """The ordinary unpickler, except that tensors written on a GPU come to the CPU."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
        return super().find_class(module_name, global_name)


def _refuse_dict(path: str, names: list[str]) -> None:
    raise ValueError(
        f"{path} holds a whole training state ({one_line(', '.join(map(str, names)))}), expected one "
        "network: pass the file beside it that ends in -G-ema.pkl"
    )


def read_safetensors(path: str) -> Contents:
    library = safetensors_library(path)
    try:
        with library.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:
        raise ValueError(f"{path} is damaged, or is no .safetensors file ({reason_of(error)})") from error
    if SAFETENSORS_KEY not in metadata:
        raise ValueError(f"{path} does not say which network it holds: the entry {SAFETENSORS_KEY!r} is missing")
    try:
        facts = dict(parse_json(metadata[SAFETENSORS_KEY].encode(), "it", record()))
        sha256 = facts.pop("sha256", None)
        if sha256 is not None and sha256 != digest(facts, tensors):
            raise ValueError("its checksum is wrong")
        if "networks" not in facts:
            found = registry.find_network(str(facts["class"]))
            entries = {ONLY: (str(facts["class"]), dict(facts["options"]), tensors)}
            facts = {"system": found[1].name if found else ""}
        else:
            entries = {
                role: (
                    entry["class"],
                    entry["options"],
                    {name[len(role) + 1 :]: t for name, t in tensors.items() if name.startswith(f"{role}.")},
                )
                for role, entry in facts.pop("networks").items()
            }
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its entry {SAFETENSORS_KEY!r} ({reason_of(error)})") from error
    return _checked(path, facts, entries)


def digest(description: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of all that makes a network: its description, and its tensors by name."""
    digest = hashlib.sha256(json.dumps(description).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def safetensors_library(path: str | os.PathLike[str]) -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ModuleNotFoundError:
        raise ValueError(f"{path} needs the package safetensors: pip install 'longtake[safetensors]'") from None


def build_network(cls: Any, options: dict[str, Any], tensors: dict[str, torch.Tensor], path: str) -> nn.Module:
    """Return a network with the given tensors; memory for it is taken after these were found to fit its options.

    A small network is built at once, within the limits of `Budget`: arithmetic on the meta device would import torch's
    compiler, which takes a second.
    """
    try:
        is_small = sum(tensor.nbytes for tensor in tensors.values()) <= SMALL_BYTES
        shell = None if is_small else _build_shell(cls, options, tensors)
        if shell is not None:
            _check_fit(shell, tensors, path)
        with persistence.unchecked(), contextlib.nullcontext() if shell is not None else Budget(tensors, options):
            module = cls(**options)
    except _UnfitError:
        raise
    except Exception as error:  # options from a file may be anything
        raise ValueError(f"the options in {path} make no {cls.__name__} ({reason_of(error)})") from error
    if shell is None:
        _check_fit(module, tensors, path)
    module.load_state_dict(tensors, strict=True)
    return module


def _build_shell(cls: Any, options: dict[str, Any], tensors: dict[str, torch.Tensor]) -> nn.Module | None:
    """Return the network without memory for its values; None if its constructor computes with them."""
    try:
        with persistence.unchecked(), Budget(tensors, options), torch.device("meta"):
            return cls(**options)
    except (NotImplementedError, RuntimeError):
        return None


class _UnfitError(ValueError):
    """The tensors of a file are not those of the network that its options make."""


def _check_fit(module: nn.Module, tensors: dict[str, torch.Tensor], path: str) -> None:
    """Raise _UnfitError unless the tensors have the names and shapes of those of a network."""
    own = module.state_dict()
    missing = [name for name in own if name not in tensors]
    surplus = [name for name in tensors if name not in own]
    differing = [
        f"{name} {list(tensors[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    problems = [
        f"{len(names)} {kind} ({one_line('; '.join(names[:3]))}{'; ...' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unknown", surplus), ("of another shape", differing))
        if names
    ]
    if problems:
        raise _UnfitError(f"the tensors of {path} do not fit a {type(module).__name__}: {', '.join(problems)}")


META = {"device": "meta"}
SMALL_BYTES = 64 << 20  # of the tensors of a network


class Budget(TorchFunctionMode):
    """Keeps options that a file gives from making a network far larger than the tensors beside them.

    Constructors may make a few times what they keep. A tensor is measured, without memory, before it is made.
    """

    FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange, torch.eye)

    def __init__(self, tensors: Mapping[Any, torch.Tensor], options: Mapping[str, Any] | None = None):
        super().__init__()
        num_values = sum({id(tensor): tensor.numel() for tensor in tensors.values()}.values())
        self.num_left = 4 * num_values + (1 << 20)
        self.num_tensors_left = 16 * len(tensors) + 1000
        self.num_calls_left = 1000 * (len(tensors) + 20)
        for name, value in (options or {}).items():
            for number in value if isinstance(value, list | tuple) else [value]:
                if isinstance(number, int) and number > self.num_left:
                    raise ValueError(f"{name} is {number}, but there are {num_values} values")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = None
        self.num_calls_left -= 1
        if func in self.FACTORIES:
            # Random numbers of the meta device would import a part of torch's compiler.
            measure = torch.empty if func in (torch.rand, torch.randn) else func
            made = measure(*args, **{name: value for name, value in kwargs.items() if name != "generator"} | META)
            self.num_left -= made.numel()
            self.num_tensors_left -= 1
        if min(self.num_left, self.num_tensors_left, self.num_calls_left) < 0:
            raise ValueError("a network far larger than its tensors")
        return made if made is not None and str(kwargs.get("device")) == "meta" else func(*args, **kwargs)


def reason_of(error: Exception) -> str:
    """Return a description of an error that a file has caused, for a message."""
    return one_line(f"{type(error).__name__}: {error}")
