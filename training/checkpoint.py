"""Write networks and training states atomically, and read them without running code stored in the file.

    checkpoints/ckpt-00005000-G-ema.pkl     the EMA generator, for generation
    checkpoints/ckpt-00005000-train.pt      the training state, to resume from: tensors and plain values only

# Show the contents of a file, and convert a network to another format
python -m training.checkpoint info model.pkl
python -m training.checkpoint convert model.pkl model.safetensors
"""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from dnnlib import download, util
from torch_utils import safe_archive, safe_pickle
from training.config import TrainOptions, make_system, resolve
from training.contract import Bundle
from training.network_file import load_bundle, locate, save_bundle
from training.network_file import load_network as load_network
from training.network_file import save_network as save_network
from training.network_format import WrongNetworkError as WrongNetworkError
from training.network_format import describe, is_torch_archive, reason_of, to_disk

NETWORK_NAME = r"ckpt-(\d{8,})-G-ema\.pkl"
STATE_NAME = r"ckpt-(\d{8,})-train\.pt"

# Entries of a training state, as the loop writes it.
STATE_ENTRIES = ("modules", "optimizers", "system", "loop", "options")

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
            to_disk(file)
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
        # torch.load neither verifies the stored checksums nor limits the size of the unpacked data.
        with zipfile.ZipFile(path) as archive:
            safe_archive.check_unpacked(archive, path)
            for entry in archive.infolist():
                if entry.filename.endswith("/data.pkl"):
                    safe_pickle.refuse_overload(io.BytesIO(archive.read(entry)))
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


def load_run_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the training state of a run, as written by the loop, with tensors on the CPU.

    Raises ValueError naming the file if it is not one, and the newest readable training state before it.
    """
    try:
        state = load_train_state(path)
        missing = [name for name in STATE_ENTRIES if name not in state]
        if missing:
            raise ValueError(f"{path} is no training state of a run: it has no entry {missing[0]!r}")
    except ValueError as error:
        path = Path(path)
        older = [other for _, other in _list_files(path.parent, STATE_NAME) if other.name < path.name]
        whole = [other for other in older if zipfile.is_zipfile(other)]
        raise ValueError(f"{error}; before it there is {whole[-1]}" if whole else str(error)) from error
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


def latest_whole_checkpoint(run_dir: str | os.PathLike[str]) -> tuple[int, Path, dict[str, Any]] | None:
    """Load the newest readable training state as (step, path, state); return None if there is none.

    Unreadable files are skipped with a warning. The file of exported networks is not needed.
    """
    for step, path in reversed(list_checkpoints(run_dir)):
        try:
            return step, path, load_run_state(path)
        except ValueError as error:
            print(f"Warning: {error}.", flush=True)
    return None


def prune_checkpoints(run_dir: str | os.PathLike[str], keep: int, protect: Iterable[int] = ()) -> list[Path]:
    """Delete all but the newest `keep` training states and networks, and return the deleted paths.

    Call it after the new files were written. Steps in `protect` are kept. For each kind the newest `keep` readable
    files are counted, so that unreadable ones never displace readable ones. Temporary files of killed writers are
    deleted.
    """
    assert keep >= 1
    protected = set(protect)
    expired = []
    for pattern, is_whole in ((STATE_NAME, zipfile.is_zipfile), (NETWORK_NAME, _ends_like_a_pickle)):
        files = _list_files(Path(run_dir, "checkpoints"), pattern)
        whole = [step for step, path in files if is_whole(path)]
        oldest = min(whole[-keep:], default=0)
        expired += [path for step, path in files if step < oldest and step not in protected]
    expired += sorted(Path(run_dir, "checkpoints").glob(".ckpt-*.tmp.*"))
    for path in expired:
        path.unlink(missing_ok=True)
    return expired


def _list_files(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    matches = [(re.fullmatch(pattern, path.name), path) for path in folder.glob("ckpt-*")]
    return sorted((int(match[1]), path) for match, path in matches if match)


def _ends_like_a_pickle(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read() == pickle.STOP


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


@main.command("convert")
@click.argument("source", metavar="IN")
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path, dir_okay=False))
def convert_command(source: str, target: Path) -> None:
    """Write the network of IN as OUT, whose suffix is .pkl or .safetensors; all tensors stay unchanged.

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
        save_bundle(load_any(source), target)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{target}  {target.stat().st_size / 2**20:.2f} MiB")
    click.echo(f"Next: python -m training.checkpoint info {target}")


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
    click.echo(f"Next: python -m training.checkpoint convert {source} {Path(path).stem}{suffix}")


if __name__ == "__main__":
    main()
