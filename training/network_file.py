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
import json
import os
import pickle
import re
import runpy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from dnnlib import download, util
from dnnlib.file_kinds import explain_kind
from dnnlib.text import quote
from torch_utils import persistence, safe_pickle
from training import registry
from training.contract import Bundle, Tokenizer
from training.network_format import (
    FACTS,
    ONLY,
    SAFETENSORS_KEY,
    WrongNetworkError,
    build_network,
    digest,
    is_torch_archive,
    load_trusted,
    read_pickle,
    read_safetensors,
    safetensors_library,
)

Network = TypeVar("Network", bound=nn.Module)


# The included models, each NAME.pkl or NAME-ROLE.pkl beside its model card.
MODELS = Path(__file__).parents[1] / "models"
DEFAULT_MODEL = "labdoom-walk"  # used if no model is given


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
    description["sha256"] = digest(description, tensors)
    return safetensors_library(path).save(tensors, metadata={SAFETENSORS_KEY: json.dumps(description)})


def content_hash(network: nn.Module) -> str:
    """Return the SHA-256 of a network's class, arguments and tensors, whatever file it is in: 64 hex digits."""
    return digest(_describe(network), {name: tensor.cpu() for name, tensor in network.state_dict().items()})


# ----------------------------------------------------------------------------
# Locating files.


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
            bundle = load_trusted(path, expect)
        else:
            facts, networks = read_safetensors(path) if _is_safetensors(path) else read_pickle(path)
            if len(networks) == 1:
                ((cls, _, _),) = networks.values()
                if not issubclass(cls, expect):
                    raise WrongNetworkError(path, cls, expect)
            built = {name: build_network(*parts, path) for name, parts in networks.items()}
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
    if len(found) > 1 and bundle.networks.get("tokenizer") in found:  # the others make conditions
        found = [bundle.networks["tokenizer"]]
    if len(found) != 1:
        names = ", ".join(type(network).__name__ for network in bundle.networks.values())
        raise ValueError(f"{path_or_url} holds {names}, expected a tokenizer: give the file of one")
    return found[0], content_hash(found[0])


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
        other = explain_kind(path, "a network")
        with open(path, "rb") as file:
            head = file.read(16)
    except PermissionError:
        raise ValueError(f"{path} may not be read: change its permissions (chmod +r), or copy it") from None
    if other is not None:
        raise ValueError(f"{path} {other}")
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
        f"(python -m training.checkpoint convert {quote(path)} network.pkl)"
    )


if __name__ == "__main__":  # alias of the command that shows and converts files, which imports this module
    runpy.run_module("training.checkpoint", run_name="__main__")
