"""Write networks and training states atomically, and read them without running code stored in the file.

    checkpoints/ckpt-00005000-G-ema.pkl     the EMA generator, for generation
    checkpoints/ckpt-00005000-train.pt      the training state, to resume from: tensors and plain values only

# Show the contents of a file, and convert a network to another format
python -m training.checkpoint info model.pkl
python -m training.checkpoint convert model.pkl model.safetensors
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from dnnlib import download, util
from dnnlib.file_kinds import explain_kind
from dnnlib.text import one_line, quote
from torch_utils import torch_file
from training.config import TrainOptions, make_system, resolve
from training.contract import Bundle
from training.network_file import load_bundle, locate, save_bundle
from training.network_file import load_network as load_network
from training.network_file import save_network as save_network
from training.network_format import Budget, describe, is_torch_archive, reason_of
from training.network_format import WrongNetworkError as WrongNetworkError

NETWORK_NAME = r"ckpt-(\d{8,})-G-ema\.pkl"
STATE_NAME = r"ckpt-(\d{8,})-train\.pt"

# Types of the entries of a training state, as the loop writes it; ... stands for entries of any name.
RUN_STATE = {
    "modules": {...: {...: object}},
    "optimizers": {...: {"state": dict, "param_groups": list}},
    "system": dict,
    "loop": {
        "step": int,
        "num_batches": int,
        "total_sec": (int, float),
        "clean_step": int,
        "wandb_id": (str, type(None)),
        "stats": {"moments": {...: list}, "pending": {...: list}},
    },
    "options": {"system": str, "dataset": str, "model": dict},
    "footage": {...: str},  # optional
}
STATE_ENTRIES = tuple(name for name in RUN_STATE if name != "footage")

# Types that `torch.load(weights_only=True)` returns.
PLAIN_TYPES = (type(None), bool, int, float, complex, str, bytes, torch.Tensor, nn.Parameter)


# ----------------------------------------------------------------------------
# Training states.


def save_train_state(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write a nested dict of tensors and plain values atomically, and fsync it.

    Raises OSError if the write fails; an existing file is then left unchanged and no new one is created.
    """
    _assert_plain(state, "state")
    try:
        with util.atomic_path(path) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        # A failed write also makes torch's archive writer fail on its unfinished file; raise the original error.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def load_train_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file written by `save_train_state`, with tensors on the CPU.

    Raises ValueError naming the file if it is missing, truncated, damaged, or not a training state.
    """
    try:
        state = torch_file.load(path)
    except (OSError, ValueError) as error:
        other = explain_kind(path, "a training state") if os.path.isfile(path) else None
        raise ValueError(f"{path} is not a whole training state: {f'it {other}' if other else error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected the dict of a training state")
    return state


def load_run_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the training state of a run, as written by the loop, with tensors on the CPU.

    Raises ValueError naming the file if it is not one, and the newest readable training state before it.
    """
    try:
        state = load_train_state(path)
        missing = [name for name in STATE_ENTRIES if name not in state]
        wrong = f"it has no entry {missing[0]!r}" if missing else find_wrong(state, RUN_STATE, "", is_whole=False)
        if wrong is not None:
            raise ValueError(f"{path} is no training state of a run: {wrong}")
    except ValueError as error:
        path = Path(path)
        older = [other for _, other in _list_files(path.parent, STATE_NAME) if other.name < path.name]
        whole = [other for other in older if zipfile.is_zipfile(other)]
        raise ValueError(f"{error}; before it there is {whole[-1]}" if whole else str(error)) from error
    return state


def find_wrong(value: Any, schema: Any, name: str, is_whole: bool = True) -> str | None:
    """Return what of a value does not match a schema such as those in `RUN_STATE`, None if all does.

    Without `is_whole` entries may be missing.
    """
    if not isinstance(schema, dict):
        found = one_line(f"its {name} is of type {type(value).__name__}")
        return None if isinstance(value, schema) else found
    if not isinstance(value, dict):
        return one_line(f"its {name} is of type {type(value).__name__}, expected entries")
    missing = [key for key in schema if key is not ... and key not in value]
    if is_whole and missing:
        return one_line(f"its {name} has no entry {missing[0]!r}")
    for key, item in value.items():
        part = schema.get(key, schema.get(...))
        wrong = find_wrong(item, part, f"{name}.{key}" if name else str(key), is_whole) if part else None
        if wrong is not None:
            return wrong
    return None


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


# ----------------------------------------------------------------------------
# The run directory.


def network_path(run_dir: str | os.PathLike[str], step: int) -> Path:
    """Return the path of the exported networks of a step."""
    return Path(run_dir) / "checkpoints" / f"ckpt-{step:08d}-G-ema.pkl"


def train_state_path(run_dir: str | os.PathLike[str], step: int) -> Path:
    """Return the path of the training state of a step."""
    return Path(run_dir) / "checkpoints" / f"ckpt-{step:08d}-train.pt"


def list_checkpoints(run_dir: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """List the training states of a run as (step, path), ascending, including unreadable ones."""
    return _list_files(Path(run_dir, "checkpoints"), STATE_NAME)


def list_networks(run_dir: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """List the exported networks of a run as (step, path), ascending."""
    return _list_files(Path(run_dir, "checkpoints"), NETWORK_NAME)


def whole_checkpoints(run_dir: str | os.PathLike[str]) -> Iterator[tuple[int, Path, dict[str, Any]]]:
    """Load the readable training states as (step, path, state), the newest first.

    Unreadable files are skipped with a warning. The files of exported networks are not needed.
    """
    for step, path in reversed(list_checkpoints(run_dir)):
        try:
            state = load_run_state(path)
        except ValueError as error:
            print(f"Warning: {error}.", flush=True)
        else:
            yield step, path, state


def latest_whole_checkpoint(run_dir: str | os.PathLike[str]) -> tuple[int, Path, dict[str, Any]] | None:
    """Load the newest readable training state as (step, path, state); return None if there is none."""
    return next(whole_checkpoints(run_dir), None)


def prune_checkpoints(
    run_dir: str | os.PathLike[str], keep: int, protect: Iterable[int] = (), newest: int | None = None
) -> list[Path]:
    """Delete all but the newest `keep` training states and networks, and return the deleted paths.

    Call it after the new files were written. Steps in `protect` are kept. For each kind the newest `keep` readable
    files are counted, so that unreadable ones never displace readable ones; nor do those of steps after `newest`, from
    before the run went back. Temporary files of killed writers are deleted. What cannot be deleted stays.
    """
    assert keep >= 1
    folder, protected = Path(run_dir, "checkpoints"), set(protect)
    expired = []
    for pattern, is_whole in ((STATE_NAME, zipfile.is_zipfile), (NETWORK_NAME, _ends_like_a_pickle)):
        files = _list_files(folder, pattern)
        whole = [step for step, path in files if is_whole(path) and (newest is None or step <= newest)]
        oldest = min(whole[-keep:], default=0)
        expired += [path for step, path in files if step < oldest and step not in protected]
    expired += sorted(folder.glob(".ckpt-*.tmp.*"))
    return [path for path in expired if _is_deleted(path)]


def _is_deleted(path: Path) -> bool:
    """Delete a file if possible; return whether it is gone."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _list_files(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    matches = [(re.fullmatch(pattern, path.name), path) for path in folder.glob("ckpt-*")]
    return sorted((int(match[1]), path) for match, path in matches if match)


def _ends_like_a_pickle(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == pickle.STOP
    except OSError:  # it is empty, a folder, or not to be read
        return False


# ----------------------------------------------------------------------------
# Command line.


def load_any(path_or_url: str) -> Bundle:
    """Load networks from any file that `load_bundle` accepts, or export them from a training state.

    Raises ValueError as `load_bundle` and `load_run_state` do.
    """
    path = util.open_url(locate(path_or_url), return_filename=True)
    if not (os.path.isfile(path) and is_torch_archive(path)):
        return load_bundle(path_or_url)
    state = load_run_state(path)
    try:
        known = {field.name for field in dataclasses.fields(TrainOptions)}
        values = {name: value for name, value in state["options"].items() if name in known}
        places = {"outdir": "", "dataset": ""}  # paths are not needed for export
        options = resolve(TrainOptions, places | values | {"precision": None, "compile": False, "override": False})
        tensors = {(name, key): tensor for name, part in state["modules"].items() for key, tensor in part.items()}
        with Budget(tensors):
            model = make_system(options.system, options, "cpu")
        for name, module in model.modules.items():
            module.load_state_dict(state["modules"][name])
        return model.export()
    except Exception as error:  # a state may come from another version or from modified code
        raise ValueError(f"the training state {path} does not fit its own options ({reason_of(error)})") from error


@click.group(
    help=str(__doc__).replace("checkpoints/ckpt-00005000-G", "\b\ncheckpoints/ckpt-00005000-G").replace("# ", "\b\n")
)
def main() -> None:
    pass


def _halved(bundle: Bundle) -> Bundle:
    """Return a bundle with its floating-point tensors as float16; raise `ValueError` for those that are too large."""
    for role, network in bundle.networks.items():
        limit = torch.finfo(torch.float16).max
        tensors = [tensor for tensor in network.state_dict().values() if tensor.is_floating_point() and tensor.numel()]
        if any(not tensor.abs().max() <= limit for tensor in tensors):
            raise ValueError(f"the {role} has values above {limit:g}, which float16 cannot hold: leave out --half")
    return dataclasses.replace(bundle, networks={r: n.to(torch.float16) for r, n in bundle.networks.items()})


@main.command("convert")
@click.argument("source", metavar="IN")
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--half", is_flag=True, help="Store weights as float16, in half of the space; they are computed in float32"
)
def convert_command(source: str, target: Path, half: bool) -> None:
    """Write the network of IN as OUT, whose suffix is .pkl or .safetensors; without --half all tensors stay unchanged.

    IN is a path or a URL: an exported or published network, or a training state ckpt-...-train.pt, whose networks for
    generation are exported.

    \b
    python -m training.checkpoint convert model.pkl model.safetensors
    """
    if target.suffix not in (".pkl", ".safetensors"):
        raise click.ClickException(f"{target} does not end in .pkl or .safetensors: name the format that you want")
    if not target.parent.is_dir():
        raise click.ClickException(f"there is no folder {target.parent} for {target.name}: make it, or name another")
    try:
        bundle = load_any(source)
        save_bundle(_halved(bundle) if half else bundle, target)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{target}  {target.stat().st_size / 2**20:.2f} MiB")
    click.echo(f"Next: python -m training.checkpoint info {quote(target)}")


@main.command("info")
@click.argument("source", metavar="FILE")
def info_command(source: str) -> None:
    """Show the network in FILE, a path or a URL as for convert: class, options, parameters, size, SHA-256.

    \b
    python -m training.checkpoint info model.safetensors
    """
    try:
        bundle = load_any(source)
        path = util.open_url(locate(source), return_filename=True, verbose=False)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    facts: dict[str, Any] = {"file": path, "system": bundle.system or "unknown"}
    for role, network in bundle.networks.items():
        parameters = list(network.parameters())
        prefix = "" if len(bundle.networks) == 1 else f"{role} "
        facts |= {
            role: f"{type(network).__name__}, a {describe(type(network))}",
            f"{prefix}parameters": f"{sum(p.numel() for p in parameters):,} in {len(parameters)} tensors",
            **{f"{prefix}option {name}": value for name, value in getattr(network, "options", {}).items()},
        }
    facts |= {f"option {name}": value for name, value in bundle.options.items()}
    facts |= {"size": f"{os.path.getsize(path) / 2**20:.2f} MiB", "sha256": download.file_sha256(path)}
    facts |= {"tokenizer": bundle.tokenizer} if bundle.tokenizer else {}
    facts |= {"fps": f"{bundle.fps:g}"} if bundle.fps else {}
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name:<{width}}  {value}")
    suffix = ".pkl" if path.endswith(".safetensors") else ".safetensors"
    click.echo(f"Next: python -m training.checkpoint convert {quote(source)} {quote(Path(path).stem + suffix)}")


if __name__ == "__main__":
    main()
