"""Read and write networks as persistent pickles (the published format), bundles, or .safetensors files.

| file | contents |
|---|---|
| persistent pickle | one network whose modules are all persistent classes, as LongVideoGAN was published |
| bundle | a pickle of plain values and tensors: networks by role, with options, tokenizer hash and frame rate |
| .safetensors | either of the two |

Reading runs no code from the file. Files written here hold a SHA-256 of their contents, which detects damage: pickles
after the last opcode, where unpicklers stop reading, .safetensors files in the header.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib
import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dnnlib import download, util
from torch_utils import persistence, safe_pickle
from training import registry
from training.contract import Bundle, Tokenizer

Network = TypeVar("Network", bound=nn.Module)

# Entry of the .safetensors header that describes the networks of the tensors.
SAFETENSORS_KEY = "longtake"

# The included models, each NAME.pkl or NAME-ROLE.pkl beside its model card.
MODELS = Path(__file__).parents[1] / "models"
DEFAULT_MODEL = "labdoom-tiny"  # used if no model is given

# The end of a pickle written here; its last byte is that of any pickle.
SEAL = rb"\nsha256:([0-9a-f]{64})\."
SEAL_BYTES = 73

# Metadata of a bundle, and their types.
FACTS: dict[str, Any] = {
    "system": str,
    "options": dict,
    "tokenizer": (str, type(None)),
    "fps": (int, float, type(None)),
    "vocabularies": dict,
}

ONLY = "network"  # role of a network that is the only one of a file


# ----------------------------------------------------------------------------
# Writing.


def save_network(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write one network; see `save_bundle`. Its class must be registered to be read again."""
    known = registry.find_network(type(module).__name__)
    save_bundle(Bundle({ONLY: module}, known[1].name if known else ""), path)


def save_bundle(bundle: Bundle, path: str | os.PathLike[str]) -> None:
    """Write CPU copies of the networks in eval mode without gradients, with the metadata of the bundle.

    A `path` that ends in .safetensors selects that format. The file is read back, without running code, before it is
    moved to `path`. Networks of non-persistent classes need an attribute `options`, their constructor arguments.
    """
    networks = {
        role: copy.deepcopy(network).cpu().eval().requires_grad_(False) for role, network in bundle.networks.items()
    }
    bundle = dataclasses.replace(bundle, networks=networks)
    with util.atomic_path(path) as temporary:
        with open(temporary, "wb") as file:
            if temporary.suffix == ".safetensors":
                file.write(_to_safetensors(bundle, path))
            else:
                pickle.dump(_to_pickle(bundle), file, protocol=4)
                file.flush()
                file.write(b"\nsha256:%s." % download.file_sha256(temporary).encode())
            to_disk(file)
        if temporary.suffix != ".safetensors":
            try:
                record = safe_pickle.load(temporary)
            except ValueError as error:
                raise ValueError(f"{path} was not written, for it could not be opened safely again: {error}") from None
            found = record.children if record.class_name == safe_pickle.BUNDLE else {ONLY: record}
            for written, network in zip(found.values(), networks.values(), strict=True):
                assert written.state_dict().keys() == network.state_dict().keys()


def _is_plain(bundle: Bundle) -> bool:
    """Return whether a bundle is one network without metadata."""
    return len(bundle.networks) == 1 and not bundle.options and bundle.tokenizer is None


def _to_pickle(bundle: Bundle) -> Any:
    """Return the object to pickle: the network itself if it fits the published format, else plain values."""
    (first, *_) = bundle.networks.values()
    if _is_plain(bundle) and all(_is_picklable(module) for module in first.modules()):
        return first
    entries = {
        role: {**_describe(network), "tensors": {name: t.clone() for name, t in network.state_dict().items()}}
        for role, network in bundle.networks.items()
    }
    return {safe_pickle.BUNDLE: 1, **_facts(bundle), "networks": entries}


def _is_picklable(module: nn.Module) -> bool:
    return persistence.is_persistent(module) or type(module) in (nn.ModuleList, nn.Identity)


def _facts(bundle: Bundle) -> dict[str, Any]:
    facts = {name: getattr(bundle, name) for name in FACTS}
    return json.loads(json.dumps(facts))  # plain values, as they read back


def _describe(network: nn.Module) -> dict[str, Any]:
    """Return the class name and the constructor arguments of a network."""
    options = getattr(network, "options", None)
    if not isinstance(options, Mapping):
        raise ValueError(
            f"{type(network).__name__} cannot be written: it has no attribute `options`, the dictionary of the "
            "arguments that make it"
        )
    return {"class": type(network).__name__, "options": json.loads(json.dumps(dict(options)))}


def _to_safetensors(bundle: Bundle, path: str | os.PathLike[str]) -> bytes:
    if _is_plain(bundle):
        ((_, network),) = bundle.networks.items()
        description: dict[str, Any] = {"class": type(network).__name__, "options": network.options}
        tensors = {name: tensor.clone().contiguous() for name, tensor in network.state_dict().items()}
    else:
        networks = {role: _describe(network) for role, network in bundle.networks.items()}
        description = {**_facts(bundle), "networks": networks}
        tensors = {
            f"{role}.{name}": tensor.clone().contiguous()
            for role, network in bundle.networks.items()
            for name, tensor in network.state_dict().items()
        }
    description["sha256"] = _digest(description, tensors)
    return _safetensors(path).save(tensors, metadata={SAFETENSORS_KEY: json.dumps(description)})


def content_hash(network: nn.Module) -> str:
    """Return the SHA-256 (64 hex digits) of a network's class, arguments and tensors, whatever the file format."""
    return _digest(_describe(network), {name: tensor.cpu() for name, tensor in network.state_dict().items()})


# ----------------------------------------------------------------------------
# Locating files.


class WrongNetworkError(ValueError):
    """A file holds a network of a class other than expected; `found` is that class."""

    def __init__(self, path: str, found: type, expected: type):
        super().__init__(f"{path} is a {describe(found)}, expected a {describe(expected)}")
        self.found = found


@dataclass(frozen=True)
class ModelPath:
    """The file of a model: path, URL or name in `MODELS`; with a role, only a file of that role is accepted."""

    path: str
    role: str = ""


def expand(model: str | ModelPath) -> list[ModelPath]:
    """Return the files of a model, which may be given by its name in `MODELS`, with or without a role."""
    model = ModelPath(model) if isinstance(model, str) else model
    if not re.fullmatch(r"[\w-]+", model.path) or os.path.exists(model.path):
        return [model]
    names = [model.path, *(f"{model.path}-{role}" for role in ([model.role] if model.role else _roles()))]
    found = [ModelPath(str(path), model.role) for name in names if (path := MODELS / f"{name}.pkl").is_file()]
    return found or [model]


def _roles() -> list[str]:
    return list(dict.fromkeys(spec.role for spec in registry.specs() if spec.role))


def list_models() -> dict[str, list[str]]:
    """Return the models in `MODELS`: name -> paths of its files."""
    found: dict[str, list[str]] = {}
    for path in sorted(MODELS.glob("*.pkl")):
        found.setdefault(model_name(path), []).append(str(path))
    return found


def model_name(path: str | os.PathLike[str]) -> str:
    """Return the name of the model that a file belongs to."""
    stem = Path(path).stem
    ends = [f"-{role}" for role in _roles() if stem.endswith(f"-{role}")]
    return stem.removesuffix(ends[0]) if ends else stem


def locate(path_or_url: str | os.PathLike[str], role: str = "") -> str:
    """Return the path or URL of one file, which may be given by the name of a model in `MODELS`."""
    found = expand(ModelPath(os.fspath(path_or_url), role))
    return found[0].path if len(found) == 1 else os.fspath(path_or_url)


# ----------------------------------------------------------------------------
# Reading.


def load_network(
    path_or_url: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    trust: bool = False,
    expect: type[Network] = nn.Module,
) -> Network:
    """Load a file of one network from a path, a URL or a name in `MODELS`; see `load_bundle`.

    Raises WrongNetworkError if the network is not of class `expect`.
    """
    bundle = load_bundle(path_or_url, "cpu", trust, role=_role_of(expect), expect=expect)
    if len(bundle.networks) > 1:
        raise ValueError(f"{path_or_url} holds {len(bundle.networks)} networks, expected one: open it as a bundle")
    (network,) = bundle.networks.values()
    return cast(Network, network.to(device))


def load_bundle(
    path_or_url: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    trust: bool = False,
    role: str = "",
    expect: type = nn.Module,
) -> Bundle:
    """Load a file from a path, a URL or a name in `MODELS`: bundles, published files, .safetensors.

    Networks are returned in eval mode, without gradients. No code from the file is run: its tensors are loaded into the
    registered classes. With `trust`, the file's own code is run instead. `role` completes a name.

    Raises WrongNetworkError if its only network is not of class `expect`, and ValueError if the file is missing,
    damaged, holds no networks, or networks of no registered class.
    """
    path = util.open_url(locate(path_or_url, role), return_filename=True)
    try:
        published = _read_published(path)
        if published is not None:
            bundle = published
        elif trust and not _is_safetensors(path):
            bundle = _load_trusted(path, expect)
        else:
            facts, networks = _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path)
            if len(networks) == 1:
                ((cls, _, _),) = networks.values()
                if not issubclass(cls, expect):
                    raise WrongNetworkError(path, cls, expect)
            built = {name: _build(*parts, path) for name, parts in networks.items()}
            bundle = Bundle(built, **facts)
    except ValueError as error:
        if util.is_url(path_or_url) and not isinstance(error, WrongNetworkError):
            raise ValueError(f"{error}; it came from {path_or_url}: to fetch it again, delete the file") from error
        raise
    for network in bundle.networks.values():
        network.to(device).eval().requires_grad_(False)
    return dataclasses.replace(bundle, path=str(path_or_url))


def load_tokenizer(path_or_url: str | os.PathLike[str], device: str | torch.device = "cpu") -> tuple[Any, str]:
    """Load a tokenizer, which satisfies `training.contract.Tokenizer`, and return it with its SHA-256."""
    bundle = load_bundle(path_or_url, device)
    found = [network for network in bundle.networks.values() if isinstance(network, Tokenizer)]
    if len(found) != 1:
        names = ", ".join(type(network).__name__ for network in bundle.networks.values())
        raise ValueError(f"{path_or_url} holds {names}, expected a tokenizer: give the file of one")
    return found[0], content_hash(found[0])


def describe(cls: type) -> str:
    """Return the name of a network class for messages."""
    words = [words for spec, words in registry.networks().items() if spec.endswith(f":{cls.__name__}")]
    return words[0] if words else cls.__name__


def _role_of(cls: type) -> str:
    """Return the role of the files that hold a class of networks."""
    known = registry.find_network(cls.__name__)
    return known[1].role if known else ""


def _read_published(path: str) -> Bundle | None:
    """Read a file of a published release through the adapters of the systems; return None if no adapter accepts it."""
    for spec in registry.specs():
        for adapter in spec.published_adapters:
            bundle = registry.resolve(adapter)(path)
            if bundle is not None:
                return bundle
    return None


def _is_safetensors(path: str) -> bool:
    """Return whether a file is .safetensors, by its first bytes; raise ValueError if it is not a pickle either."""
    if os.path.isdir(path):
        networks = sorted([*Path(path).glob("*-G-ema.pkl"), *Path(path, "checkpoints").glob("*-G-ema.pkl")])
        raise ValueError(f"{path} is a folder, expected a network{f': pass {networks[-1]}' if networks else ''}")
    if not os.path.isfile(path):
        names = ", ".join(sorted(model.stem for model in MODELS.glob("*.pkl")))
        raise ValueError(
            f"there is no file {path}; expected a network (.pkl or .safetensors) or the URL of one"
            + (f", or an included model: {names}" if names else "")
        )
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except PermissionError:
        raise ValueError(f"{path} may not be read: change its permissions (chmod +r), or copy it") from None
    if not head:
        raise ValueError(f"{path} is damaged: it is empty; copy or download it again")
    if download.is_web_page(head):
        raise ValueError(f"{path} is a web page, expected a network: download the file that the page is about")
    if head.startswith(b"PK"):
        _refuse_archive(path)
    # The header length fits into six of its eight bytes, and the header is JSON.
    return head[6:9] == b"\0\0{" or path.endswith(".safetensors")


def _refuse_archive(path: str) -> None:
    if not is_torch_archive(path):
        raise ValueError(f"{path} is a zip archive, expected a network (.pkl or .safetensors): unpack it")
    beside = re.sub(r"-train\.pt$", "-G-ema.pkl", path)
    beside = beside if beside != path and os.path.isfile(beside) else "the file beside it that ends in -G-ema.pkl"
    raise ValueError(
        f"{path} holds a whole training state, expected one network: pass {beside}, or take the network out of it "
        f"(python -m training.checkpoint convert {path} network.pkl)"
    )


def is_torch_archive(path: str) -> bool:
    """Return whether a file was written by `torch.save`."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return False


def _check_seal(path: str) -> None:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        num_left = max(file.seek(0, os.SEEK_END) - SEAL_BYTES, 0)
        file.seek(num_left)
        seal = re.fullmatch(SEAL, file.read())
        if seal is None:  # not written by Longtake
            return
        file.seek(0)
        while num_left > 0:
            chunk = file.read(min(num_left, 1 << 20))
            digest.update(chunk)
            num_left -= len(chunk)
    if digest.hexdigest() != seal[1].decode():
        raise ValueError(f"{path} is damaged: its checksum is wrong; copy or download it again")


# Contents of a file: metadata, and by role the class, arguments and tensors of each network.
Contents = tuple[dict[str, Any], dict[str, tuple[Any, dict[str, Any], dict[str, torch.Tensor]]]]


def _read_pickle(path: str) -> Contents:
    _check_seal(path)
    record = safe_pickle.load(path)
    if record.class_name == safe_pickle.BUNDLE:
        return _read_record(path, record)
    name = safe_pickle.one_line(record.class_name)
    if name == "dict":
        _refuse_dict(path, list(record.children))
    try:
        for spec in registry.specs():
            for cls in map(registry.resolve, spec.networks):
                if hasattr(cls, "matches") and cls.matches(record):
                    parts = cls, cls.options_from_record(record), record.state_dict()
                    return {"system": spec.name}, {ONLY: parts}
    except Exception as error:  # the description of a network in a file is untrusted
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
    """Return the contents of a bundle with its classes resolved; raise ValueError if it is invalid."""
    networks = {}
    for role, (name, options, tensors) in entries.items():
        found = registry.find_network(str(name))
        if found is None:
            raise ValueError(f"{path} holds a {safe_pickle.one_line(name)}, expected one of {_known()}")
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


def _load_trusted(path: str, expect: type) -> Bundle:
    _check_seal(path)
    print(f"Trusting {path}: code that came with this file now runs with all your rights.", flush=True)
    try:
        with open(path, "rb") as file:
            module = _TrustingUnpickler(file).load()
    except (EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged, or is no pickle ({error})") from error
    except ModuleNotFoundError as error:
        name = safe_pickle.one_line(error.name)
        remedy = "pip install 'longtake[trust]'" if error.name == "einops" else "install it"
        raise ValueError(f"the code in {path} needs the package {name}, which is missing: {remedy}") from error
    except (AttributeError, ImportError) as error:
        raise ValueError(f"the code in {path} does not run here ({reason_of(error)})") from error
    if isinstance(module, dict) and safe_pickle.BUNDLE in module:  # holds no code
        facts, networks = _read_record(path, safe_pickle.load(path))
        return Bundle({role: _build(*parts, path) for role, parts in networks.items()}, **facts)
    if isinstance(module, dict):
        _refuse_dict(path, [key for key, item in module.items() if isinstance(item, nn.Module)])
    if not isinstance(module, nn.Module):
        raise ValueError(f"{path} holds a {type(module).__name__}, expected a network")
    if not isinstance(module, expect):
        raise WrongNetworkError(path, type(module), expect)
    known = registry.find_network(type(module).__name__)
    return Bundle({ONLY: module}, known[1].name if known else "")


class _TrustingUnpickler(pickle.Unpickler):
    """The standard unpickler, except that tensors written on a GPU are loaded to the CPU."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
        return super().find_class(module_name, global_name)


def _refuse_dict(path: str, names: list[str]) -> None:
    raise ValueError(
        f"{path} holds a whole training state ({safe_pickle.one_line(', '.join(map(str, names)))}), expected one "
        "network: pass the file beside it that ends in -G-ema.pkl"
    )


def _read_safetensors(path: str) -> Contents:
    library = _safetensors(path)
    try:
        with library.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:
        raise ValueError(f"{path} is damaged, or is no .safetensors file ({reason_of(error)})") from error
    if SAFETENSORS_KEY not in metadata:
        raise ValueError(f"{path} does not say which network it holds: the entry {SAFETENSORS_KEY!r} is missing")
    try:
        facts = dict(json.loads(metadata[SAFETENSORS_KEY]))
        sha256 = facts.pop("sha256", None)
        if sha256 is not None and sha256 != _digest(facts, tensors):
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


def _digest(description: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of a network: its description, and its tensors by name."""
    digest = hashlib.sha256(json.dumps(description).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _safetensors(path: str | os.PathLike[str]) -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ModuleNotFoundError:
        raise ValueError(f"{path} needs the package safetensors: pip install 'longtake[safetensors]'") from None


def _build(cls: Any, options: dict[str, Any], tensors: dict[str, torch.Tensor], path: str) -> nn.Module:
    try:
        with _Budget(sum(tensor.numel() for tensor in tensors.values()), options):
            module = cls(**options)
    except Exception as error:  # options from a file are untrusted
        raise ValueError(f"the options in {path} make no {cls.__name__} ({reason_of(error)})") from error
    own = module.state_dict()
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        missing = [name for name in own if name not in tensors]
        surplus = [name for name in tensors if name not in own]
        differing = [
            f"{name} {list(tensors[name].shape)}, expected {list(tensor.shape)}"
            for name, tensor in own.items()
            if name in tensors and tensors[name].shape != tensor.shape
        ]
        problems = [
            f"{len(names)} {kind} ({safe_pickle.one_line('; '.join(names[:3]))}{'; ...' if len(names) > 3 else ''})"
            for kind, names in (("missing", missing), ("unknown", surplus), ("of another shape", differing))
            if names
        ]
        raise ValueError(f"the tensors of {path} do not fit a {cls.__name__}: {', '.join(problems)}") from error
    return module


class _Budget(TorchFunctionMode):
    """Limit the memory of a network built from untrusted options to a multiple of that of its tensors.

    Constructors may allocate a few times more than they keep. The size of a tensor is checked before it is allocated.
    """

    FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange, torch.eye)

    def __init__(self, num_values: int, options: dict[str, Any]):
        super().__init__()
        self.num_left = 4 * num_values + (1 << 20)
        for name, value in options.items():
            for number in value if isinstance(value, list | tuple) else [value]:
                if isinstance(number, int) and number > self.num_left:
                    raise ValueError(f"{name} is {number}, but there are {num_values} values")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.FACTORIES:
            self.num_left -= func(*args, **kwargs | {"device": "meta"}).numel()
            if self.num_left < 0:
                raise ValueError("a network far larger than its tensors")
        return func(*args, **kwargs)


def reason_of(error: Exception) -> str:
    """Return a one-line reason for an error caused by a file."""
    return safe_pickle.one_line(f"{type(error).__name__}: {error}")


def to_disk(file: IO[bytes]) -> None:
    """Flush a file and fsync it."""
    # fsync before the rename: after a crash the new name must not refer to missing data.
    file.flush()
    os.fsync(file.fileno())
