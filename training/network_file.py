"""One network as one file: a persistent pickle as the published ones are, or .safetensors; read without running it.

A file of ours ends with its own SHA-256, or has that of its content in its header, so that damage is noticed. In a
pickle it comes after the last word, where no reader of pickles looks.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import io
import json
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dnnlib import download, util
from torch_utils import safe_pickle
from training import registry

Network = TypeVar("Network", bound=nn.Module)

# The entry of a .safetensors header that says which network the tensors belong to.
SAFETENSORS_KEY = "longtake"

# The networks that come with this repository, each <name>-lres.pkl or <name>-sres.pkl beside a card that tells of it.
MODELS = Path(__file__).parents[1] / "models"
DEFAULT_MODEL = "labdoom-tiny"  # what is shown to those who name no networks

# What ends a pickle of ours: it ends in the last letter of a pickle, as any pickle does.
SEAL = rb"\nsha256:([0-9a-f]{64})\."
SEAL_BYTES = 73


def save_network(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a network: a CPU copy in eval mode without gradients, as a persistent pickle or as .safetensors.

    The suffix of `path` decides. The file is read back, without running any of it, before it gets its name. A
    .safetensors file holds the tensors, the class's name and `module.options`, the arguments that make the network.
    """
    module = copy.deepcopy(module).cpu().eval().requires_grad_(False)
    with util.atomic_path(path) as temporary:
        with open(temporary, "wb") as file:
            if temporary.suffix == ".safetensors":
                description = {"class": type(module).__name__, "options": module.options}
                tensors = {name: tensor.clone().contiguous() for name, tensor in module.state_dict().items()}
                description["sha256"] = _digest(description, tensors)
                metadata = {SAFETENSORS_KEY: json.dumps(description)}
                file.write(_safetensors(path).save(tensors, metadata=metadata))
            else:
                pickle.dump(module, file, protocol=4)
                file.flush()
                file.write(b"\nsha256:%s." % download.file_sha256(temporary).encode())
            to_disk(file)
        if temporary.suffix != ".safetensors":
            try:
                record = safe_pickle.load(temporary)
            except ValueError as error:
                raise ValueError(f"{path} was not written, for it could not be opened safely again: {error}") from None
            assert record.state_dict().keys() == module.state_dict().keys()


class WrongNetworkError(ValueError):
    """A file holds a network of another class than was expected; `found` is that class."""

    def __init__(self, path: str, found: type, expected: type):
        super().__init__(f"{path} is a {describe(found)}, expected a {describe(expected)}")
        self.found = found


def locate(path_or_url: str | os.PathLike[str], expect: type = nn.Module) -> str:
    """The path or address of a network, which may be given by the name of one in `MODELS`, as labdoom-lres.

    Where a class is expected, the name may lack its end, as labdoom.
    """
    name = os.fspath(path_or_url)
    if re.fullmatch(r"[\w-]+", name) and not os.path.exists(name):
        ends = ["", *(f"-{role}" for spec, role in registry.ROLES.items() if spec.endswith(f":{expect.__name__}"))]
        found = [path for end in ends if (path := MODELS / f"{name}{end}.pkl").is_file()]
        return str(found[0]) if found else name
    return name


def default_pair() -> tuple[str, str] | None:
    """The names of the two networks of `DEFAULT_MODEL`, if they came along."""
    names = f"{DEFAULT_MODEL}-lres", f"{DEFAULT_MODEL}-sres"
    return names if all((MODELS / f"{name}.pkl").is_file() for name in names) else None


def load_network(
    path_or_url: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    trust: bool = False,
    expect: type[Network] = nn.Module,
) -> Network:
    """Opens a network from a path, an address or a name in `MODELS`: our pickles, published ones, .safetensors.

    The network comes in eval mode, without gradients. No code that came with the file is run: the file's tensors are
    matched to the classes of `training.registry`. With `trust`, the file's own code is run instead.

    Raises WrongNetworkError if the network is not of class `expect`, and ValueError if the file is missing, damaged,
    not a network, or one that no class of ours takes.
    """
    path = util.open_url(locate(path_or_url, expect), return_filename=True)
    try:
        is_safetensors = _is_safetensors(path)
        if trust and not is_safetensors:
            module = _load_trusted(path)
            if not isinstance(module, expect):
                raise WrongNetworkError(path, type(module), expect)
        else:
            cls, options, tensors = _read_safetensors(path) if is_safetensors else _read_pickle(path)
            if not issubclass(cls, expect):
                raise WrongNetworkError(path, cls, expect)
            module = _build(cls, options, tensors, path)
    except ValueError as error:
        if util.is_url(path_or_url) and not isinstance(error, WrongNetworkError):
            raise ValueError(f"{error}; it came from {path_or_url}: to fetch it again, delete the file") from error
        raise
    return cast(Network, module.to(device).eval().requires_grad_(False))


def describe(cls: type) -> str:
    """What the registry calls a class of networks, in words; else its name."""
    words = [words for spec, words in registry.NETWORKS.items() if spec.endswith(f":{cls.__name__}")]
    return words[0] if words else cls.__name__


def _is_safetensors(path: str) -> bool:
    """Looks at the beginning of a file, and refuses what is neither a pickle nor .safetensors."""
    if os.path.isdir(path):
        networks = sorted([*Path(path).glob("*-G-ema.pkl"), *Path(path, "checkpoints").glob("*-G-ema.pkl")])
        raise ValueError(f"{path} is a folder, expected a network{f': pass {networks[-1]}' if networks else ''}")
    if not os.path.isfile(path):
        names = ", ".join(sorted(model.stem for model in MODELS.glob("*.pkl")))
        raise ValueError(
            f"there is no file {path}; expected a network (.pkl or .safetensors) or the address of one"
            + (f", or a model that comes along: {names}" if names else "")
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
    # The length of a header fits into six of its eight bytes, and the header is JSON.
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
    """Tells whether a file is what `torch.save` writes."""
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
        if seal is None:  # from elsewhere
            return
        file.seek(0)
        while num_left > 0:
            chunk = file.read(min(num_left, 1 << 20))
            digest.update(chunk)
            num_left -= len(chunk)
    if digest.hexdigest() != seal[1].decode():
        raise ValueError(f"{path} is damaged: its checksum is wrong; copy or download it again")


def _read_pickle(path: str) -> tuple[Any, dict[str, Any], dict[str, torch.Tensor]]:
    _check_seal(path)
    record = safe_pickle.load(path)
    name = safe_pickle.one_line(record.class_name)
    if name == "dict":
        _refuse_dict(path, list(record.children))
    try:
        for spec in registry.NETWORKS:
            cls = registry.resolve(spec)
            if cls.matches(record):
                return cls, cls.options_from_record(record), record.state_dict()
    except Exception as error:  # what a file says of its network may be anything
        raise ValueError(f"{path} is damaged: its {name} cannot be made out ({reason_of(error)})") from error
    known = ", ".join(spec.partition(":")[2] for spec in registry.NETWORKS)
    raise ValueError(
        f"{path} holds a {name}, which is none of the networks known here ({known}). If you trust the "
        "file, its own code can be run instead (--trust)"
    )


def _load_trusted(path: str) -> nn.Module:
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
    if isinstance(module, dict):
        _refuse_dict(path, [key for key, item in module.items() if isinstance(item, nn.Module)])
    if not isinstance(module, nn.Module):
        raise ValueError(f"{path} holds a {type(module).__name__}, expected a network")
    return module


class _TrustingUnpickler(pickle.Unpickler):
    """The ordinary unpickler, except that tensors written on a GPU come to the CPU."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
        return super().find_class(module_name, global_name)


def _refuse_dict(path: str, names: list[str]) -> None:
    raise ValueError(
        f"{path} holds a whole training state ({safe_pickle.one_line(', '.join(map(str, names)))}), expected one "
        "network: pass the file beside it that ends in -G-ema.pkl"
    )


def _read_safetensors(path: str) -> tuple[Any, dict[str, Any], dict[str, torch.Tensor]]:
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
        description = json.loads(metadata[SAFETENSORS_KEY])
        name, options, sha256 = str(description["class"]), dict(description["options"]), description.get("sha256")
        if sha256 is not None and sha256 != _digest({"class": name, "options": options}, tensors):
            raise ValueError("its checksum is wrong")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its entry {SAFETENSORS_KEY!r} ({reason_of(error)})") from error
    specs = {spec.partition(":")[2]: spec for spec in registry.NETWORKS}
    if name not in specs:
        raise ValueError(f"{path} holds a {safe_pickle.one_line(name)}, expected one of {', '.join(specs)}")
    return registry.resolve(specs[name]), options, tensors


def _digest(description: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of all that makes a network: its description, and its tensors by name."""
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
    except Exception as error:  # options from a file may be anything
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
    """Keeps options that a file gives from making a network far larger than the tensors beside them.

    Constructors may make a few times what they keep. A tensor is measured, without memory, before it is made.
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
    """An error that a file has caused, for a message."""
    return safe_pickle.one_line(f"{type(error).__name__}: {error}")


def to_disk(file: IO[bytes]) -> None:
    """Waits until all that was written to a file is on the disk."""
    # Before the renaming: a crash of the machine must not leave the new name on a file without its bytes.
    file.flush()
    os.fsync(file.fileno())
