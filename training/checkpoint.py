"""Networks and training states as files: written whole or not at all, read without running code that came along.

checkpoints/ckpt-00005000-G-ema.pkl     the averaged generator, a persistent pickle as the published ones are
checkpoints/ckpt-00005000-train.pt      all that training needs to go on: tensors and plain values only
"""

from __future__ import annotations

import copy
import importlib
import io
import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from dnnlib import util
from torch_utils import safe_pickle
from training import registry

NETWORK_NAME = r"ckpt-(\d{8,})-G-ema\.pkl"
STATE_NAME = r"ckpt-(\d{8,})-train\.pt"

# What `torch.load(weights_only=True)` gives back.
PLAIN_TYPES = (type(None), bool, int, float, complex, str, bytes, torch.Tensor, nn.Parameter)

# The entry of a .safetensors header that says which network the tensors belong to.
SAFETENSORS_KEY = "longtake"


# ----------------------------------------------------------------------------
# Networks.


def save_network(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a network: a CPU copy in eval mode without gradients, as a persistent pickle or as .safetensors.

    The suffix of `path` decides. The file is read back, without running any of it, before it gets its name. A
    .safetensors file holds the tensors, the class's name and `module.options`, the arguments that make the network.
    """
    module = copy.deepcopy(module).cpu().eval().requires_grad_(False)
    with util.atomic_path(path) as temporary:
        with open(temporary, "wb") as file:
            if temporary.suffix == ".safetensors":
                description = json.dumps({"class": type(module).__name__, "options": module.options})
                tensors = {name: tensor.clone().contiguous() for name, tensor in module.state_dict().items()}
                file.write(_safetensors(path).save(tensors, metadata={SAFETENSORS_KEY: description}))
            else:
                pickle.dump(module, file, protocol=4)
            _to_disk(file)
        if temporary.suffix != ".safetensors":
            try:
                record = safe_pickle.load(temporary)
            except ValueError as error:
                raise ValueError(f"{path} was not written, for it could not be opened safely again: {error}") from None
            assert record.state_dict().keys() == module.state_dict().keys()


def load_network(
    path_or_url: str | os.PathLike[str], device: str | torch.device = "cpu", trust: bool = False
) -> nn.Module:
    """Opens a network from a path or an address: our pickles, published LongVideoGAN pickles, .safetensors.

    The network comes in eval mode, without gradients. No code that came with the file is run: the file's tensors are
    matched to the classes of `training.registry`. With `trust`, the file's own code is run instead.

    Raises ValueError if the file is missing, damaged, not a network, or one that no class of ours takes.
    """
    path = util.open_url(os.fspath(path_or_url), return_filename=True)
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path}; expected a network (.pkl or .safetensors) or the address of one")
    if path.endswith(".safetensors"):
        module = _load_safetensors(path)
    elif trust:
        module = _load_trusted(path)
    else:
        module = _load_passively(path)
    return module.to(device).eval().requires_grad_(False)


def _load_passively(path: str) -> nn.Module:
    record = safe_pickle.load(path)
    if record.class_name == "dict":
        _refuse_dict(path, list(record.children))
    for spec in registry.NETWORKS:
        cls = registry.resolve(spec)
        if cls.matches(record):
            return _build(cls, cls.options_from_record(record), record.state_dict(), path)
    known = ", ".join(spec.partition(":")[2] for spec in registry.NETWORKS)
    raise ValueError(
        f"{path} holds a {record.class_name}, which is none of the networks known here ({known}). If you trust the "
        "file, its own code can be run instead (--trust)"
    )


def _load_trusted(path: str) -> nn.Module:
    print(f"Trusting {path}: code that came with this file now runs with all your rights.", flush=True)
    try:
        with open(path, "rb") as file:
            module = _TrustingUnpickler(file).load()
    except (EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged, or is no pickle ({error})") from error
    except ModuleNotFoundError as error:
        remedy = "pip install 'longtake[trust]'" if error.name == "einops" else "install it"
        raise ValueError(f"the code in {path} needs the package {error.name}, which is missing: {remedy}") from error
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
        f"{path} holds a whole training state ({', '.join(names)}), expected one network: pass the file beside it "
        "that ends in -G-ema.pkl"
    )


def _load_safetensors(path: str) -> nn.Module:
    library = _safetensors(path)
    try:
        with library.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:
        raise ValueError(f"{path} is damaged, or is no .safetensors file ({error})") from error
    if SAFETENSORS_KEY not in metadata:
        raise ValueError(f"{path} does not say which network it holds: the entry {SAFETENSORS_KEY!r} is missing")
    description = json.loads(metadata[SAFETENSORS_KEY])
    specs = {spec.partition(":")[2]: spec for spec in registry.NETWORKS}
    if description["class"] not in specs:
        raise ValueError(f"{path} holds a {description['class']}, expected one of {', '.join(specs)}")
    return _build(registry.resolve(specs[description["class"]]), description["options"], tensors, path)


def _safetensors(path: str | os.PathLike[str]) -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ModuleNotFoundError:
        raise ValueError(f"{path} needs the package safetensors: pip install 'longtake[safetensors]'") from None


def _build(cls: Any, options: dict[str, Any], tensors: dict[str, torch.Tensor], path: str) -> nn.Module:
    module = cls(**options)
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        own = module.state_dict()
        missing = [name for name in own if name not in tensors]
        surplus = [name for name in tensors if name not in own]
        differing = [
            f"{name} {list(tensors[name].shape)}, expected {list(tensor.shape)}"
            for name, tensor in own.items()
            if name in tensors and tensors[name].shape != tensor.shape
        ]
        problems = [
            f"{len(names)} {kind} ({'; '.join(names[:3])}{'; ...' if len(names) > 3 else ''})"
            for kind, names in (("missing", missing), ("unknown", surplus), ("of another shape", differing))
            if names
        ]
        raise ValueError(f"the tensors of {path} do not fit a {cls.__name__}: {', '.join(problems)}") from error
    return module


# ----------------------------------------------------------------------------
# Training states.


def save_train_state(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Writes a nested dict of tensors and plain values; the file is on the disk, whole, when this returns."""
    _assert_plain(state, "state")
    with util.atomic_path(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)
        _to_disk(file)


def load_train_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what `save_train_state` wrote, tensors on the CPU.

    Raises ValueError naming the file if it is missing, truncated, damaged, or something else.
    """
    try:
        # torch itself does not compare the checksums that it stores.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a whole training state ({type(error).__name__}: {reason})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected the dict of a training state")
    return state


def _assert_plain(value: Any, where: str) -> None:
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _assert_plain(key, f"{where} key")
            _assert_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for i, item in enumerate(value):
            _assert_plain(item, f"{where}[{i}]")
    else:
        assert type(value) in PLAIN_TYPES, f"{where} is a {type(value)}: it would be written, but never read again"


def _to_disk(file: IO[bytes]) -> None:
    # Before the renaming: a crash of the machine must not leave the new name on a file without its bytes.
    file.flush()
    os.fsync(file.fileno())


# ----------------------------------------------------------------------------
# The folder of a run.


def network_path(run_dir: str | os.PathLike[str], step: int) -> Path:
    """Returns the name of the averaged generator of a step."""
    return Path(run_dir) / "checkpoints" / f"ckpt-{step:08d}-G-ema.pkl"


def train_state_path(run_dir: str | os.PathLike[str], step: int) -> Path:
    """Returns the name of the training state of a step."""
    return Path(run_dir) / "checkpoints" / f"ckpt-{step:08d}-train.pt"


def list_checkpoints(run_dir: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """Lists the training states of a run as (step, path), ascending; whether they are whole is not looked at."""
    return _list_files(run_dir, STATE_NAME)


def latest_whole_checkpoint(run_dir: str | os.PathLike[str]) -> tuple[int, Path, dict[str, Any]] | None:
    """Opens the newest training state that can be read, as (step, path, state); None if there is none.

    Broken files are passed over, and said to be. The averaged generator's file is not needed.
    """
    for step, path in reversed(list_checkpoints(run_dir)):
        try:
            return step, path, load_train_state(path)
        except ValueError as error:
            print(f"Warning: {error}; trying the one before it.", flush=True)
    return None


def prune_checkpoints(run_dir: str | os.PathLike[str], keep: int, protect: Iterable[int] = ()) -> list[Path]:
    """Deletes all but the newest `keep` training states and networks, and returns what it deleted.

    To be called after the new files were written. Steps in `protect` stay. Of each kind the newest `keep` whole files
    are counted, so broken ones never push out good ones. What killed writers left behind goes as well.
    """
    assert keep >= 1
    protected = set(protect)
    doomed = []
    for pattern, is_whole in ((STATE_NAME, zipfile.is_zipfile), (NETWORK_NAME, _ends_like_a_pickle)):
        files = _list_files(run_dir, pattern)
        whole = [step for step, path in files if is_whole(path)]
        oldest = min(whole[-keep:], default=0)
        doomed += [path for step, path in files if step < oldest and step not in protected]
    doomed += sorted(Path(run_dir, "checkpoints").glob(".ckpt-*.tmp.*"))
    for path in doomed:
        path.unlink(missing_ok=True)
    return doomed


def _list_files(run_dir: str | os.PathLike[str], pattern: str) -> list[tuple[int, Path]]:
    paths = Path(run_dir, "checkpoints").glob("ckpt-*")
    matches = [(re.fullmatch(pattern, path.name), path) for path in paths]
    return sorted((int(match[1]), path) for match, path in matches if match)


def _ends_like_a_pickle(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read() == pickle.STOP
