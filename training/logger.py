"""What a run says about itself: stats.jsonl is the truth, log.txt its reading; wandb and tensorboard may listen.

A listener is a convenience. What it fails to do, for want of a network or of room on its disk, is said once and never
stops a run.
"""

import importlib.util
import json
import math
import netrc
import os
import platform
import shlex
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from dnnlib.util import atomic_path
from torch_utils import host_memory
from training.config import check_keys

# What --log may name, and how to install what it needs.
LOGGERS = {"none": "", "wandb": "pip install wandb", "tensorboard": "pip install -e '.[tensorboard]'"}
PACKAGES = ("numpy", "pillow", "scipy", "imageio-ffmpeg")


class Listener(Protocol):
    """Something that is told what the log files are told; any of it may raise, and nothing depends on it."""

    name: str

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def video(self, step: int, name: str, path: Path) -> None: ...

    def close(self) -> None: ...


class RunLogger:
    """Writes the log files of a run directory and passes the same on to listeners; made on rank 0 only.

    `options["log"]` names the listeners. Lines of the JSON files that belong to steps after `step`, the one that
    training goes on from, are removed: they will be written again. Without a step the run is new. `wandb_id` is that
    of the run so far, if it has one.

    Raises `ValueError` for a listener that is unknown, or whose package is not installed.
    """

    def __init__(self, run_dir: Path, options: Mapping[str, Any], step: int = -1, wandb_id: str | None = None):
        names = listener_names(options["log"])
        self.run_dir = run_dir
        self.wandb_id = wandb_id  # so that a resumed run goes on in the same charts
        self.listeners: list[Listener] = []
        self._complained: set[str] = set()
        for path in [run_dir / "stats.jsonl", *run_dir.glob("metric-*.jsonl")]:
            forget_after(path, step)
        if "wandb" in names:
            self._listen("wandb", lambda: WandbListener(run_dir, options, wandb_id))
        if "tensorboard" in names:
            self._listen("tensorboard", lambda: TensorboardListener(run_dir, step))

    def text(self, line: str) -> None:
        """Print a line and keep it in log.txt."""
        print(line, flush=True)
        with open(self.run_dir / "log.txt", "a") as file:
            file.write(line + "\n")

    def scalars(self, step: int, stats: Mapping[str, Mapping[str, float]]) -> None:
        """Add a line to stats.jsonl: name -> {num, mean, std}, and when; listeners get the means."""
        line = {"step": step, **stats, "timestamp": time.time()}
        append_line(self.run_dir / "stats.jsonl", line)
        means = {name: values["mean"] for name, values in stats.items()}
        self._tell(lambda listener: listener.scalars(step, means))

    def metric(self, step: int, name: str, result: Mapping[str, Any]) -> None:
        """Add a line to metric-<name>.jsonl: the result as the metric gave it, the step, and when."""
        append_line(self.run_dir / f"metric-{name}.jsonl", {"step": step, **result, "timestamp": time.time()})
        values = {f"metric/{key}": value for key, value in metric_values(result).items()}
        self._tell(lambda listener: listener.scalars(step, values))

    def video(self, step: int, name: str, path: Path) -> None:
        """Show a video that has been written, with a PNG of the same name beside it."""
        self._tell(lambda listener: listener.video(step, name, path))

    def close(self) -> None:
        """Let the listeners finish; the log files are always closed."""
        self._tell(lambda listener: listener.close())

    def _listen(self, name: str, make: Callable[[], Listener]) -> None:
        try:
            listener = make()
        except Exception as error:
            self._complain(name, error)
        else:
            self.listeners.append(listener)
            if isinstance(listener, WandbListener):
                self.wandb_id = listener.id

    def _tell(self, say: Callable[[Listener], None]) -> None:
        for listener in self.listeners:
            try:
                say(listener)
            except Exception as error:
                self._complain(listener.name, error)

    def _complain(self, name: str, error: Exception) -> None:
        """Warn of a listener's first failure."""
        if name not in self._complained:
            self._complained.add(name)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.text(f"Warning: {name} failed and may miss some of the run ({reason}); stats.jsonl has all of it.")


class SilentLogger:
    """What the other ranks have in place of a `RunLogger`."""

    wandb_id: str | None = None

    def text(self, line: str) -> None:
        pass

    def scalars(self, step: int, stats: Mapping[str, Mapping[str, float]]) -> None:
        pass

    def metric(self, step: int, name: str, result: Mapping[str, Any]) -> None:
        pass

    def video(self, step: int, name: str, path: Path) -> None:
        pass

    def close(self) -> None:
        pass


class WandbListener:
    """Passes scalars and videos on to Weights & Biases; never asks for a key, and stays offline where there is none."""

    name = "wandb"

    def __init__(self, run_dir: Path, options: Mapping[str, Any], run_id: str | None):
        import wandb  # imported here: it takes a second, and most runs do without

        self.wandb = wandb
        arguments = {
            "project": f"longtake-{options['system']}",
            "name": run_dir.name,
            "dir": str(run_dir),
            "config": dict(options),
            "id": run_id,
            "resume": "allow",
        }
        mode: Any = wandb_mode()
        try:
            self.run = wandb.init(**arguments, mode=mode)
        except Exception as error:
            if mode != "online":
                raise
            reason = " ".join(str(error).split())
            print(f"Warning: wandb cannot be reached ({reason}), so it records offline in {run_dir}/wandb.", flush=True)
            self.run = wandb.init(**arguments, mode="offline")
        self.id: str = self.run.id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add values at a step; those of steps that wandb has seen before, it leaves as they are."""
        self.run.log(dict(values), step=step)

    def video(self, step: int, name: str, path: Path) -> None:
        """Add an mp4."""
        self.run.log({name: self.wandb.Video(str(path))}, step=step)

    def close(self) -> None:
        """Wait until everything is sent, or on the disk."""
        self.run.finish()


class TensorboardListener:
    """Writes scalars and the sheets of previews as TensorBoard events into <run>/tensorboard."""

    name = "tensorboard"

    def __init__(self, run_dir: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter  # imported here: it is an extra

        # What an earlier process wrote of steps that will now be taken again is hidden.
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add values at a step."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def video(self, step: int, name: str, path: Path) -> None:
        """Add the sheet that lies beside an mp4: videos would need one package more."""
        with Image.open(path.with_suffix(".png")) as sheet:
            self.writer.add_image(name, np.asarray(sheet), step, dataformats="HWC")

    def close(self) -> None:
        """Write what is still in memory."""
        self.writer.close()


def listener_names(log: str | Sequence[str]) -> list[str]:
    """The listeners that `--log` names, without repetition; a plain string is a single name, as older runs have it.

    Raises `ValueError` for a name that is unknown, or whose package is not installed.
    """
    names = [log] if isinstance(log, str) else list(log)
    check_keys(names, LOGGERS, "--log")
    names = [name for name in dict.fromkeys(names) if name != "none"]
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--log={name} needs the package {name}, which is missing: {LOGGERS[name]}")
    return names


def wandb_mode() -> str:
    """What WANDB_MODE says; online, also without a word, only if there is a key, since wandb would ask for one."""
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online" or "WANDB_API_KEY" in os.environ:
        return mode
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return "online" if netrc.netrc().authenticators(str(host)) else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Add one JSON object to a file of them; numbers that JSON cannot say, NaN and infinities, become null.

    Where the disk is full, OSError is raised and the file stays as it was: half a line would spoil the next one.
    """
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a") as file:
            file.write(json.dumps(_finite(values)) + "\n")
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file, none if there is no file; a last line cut short by a crash is left out."""
    lines = path.read_text().split("\n") if path.is_file() else []
    return [json.loads(line) for line in lines[:-1]]


def forget_after(path: Path, step: int) -> None:
    """Remove what a JSON lines file says about steps after `step`."""
    if path.is_file():
        lines = [line for line in read_lines(path) if line["step"] <= step]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))


def metric_values(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that a metric measured: those under `results` if it has such an entry, else its own."""
    values = result.get("results", result)
    numbers = {key: value for key, value in values.items() if type(value) in (int, float)}
    return {key: float(value) for key, value in numbers.items() if key not in ("step", "timestamp")}


def environment_text(device: torch.device, world_size: int) -> str:
    """Versions, devices, command and git commit, so that a run can be understood years later."""
    lines = [
        f"date      {time.strftime('%Y-%m-%d %H:%M:%S %z')}",
        f"command   {continue_command()}",
        f"folder    {os.getcwd()}",
        f"machine   {platform.platform()}, {os.cpu_count()} cores",
        f"device    {world_size} x {torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}",
        f"memory    {host_memory.describe(device)}",
        f"python    {platform.python_version()}",
        f"torch     {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}",
        *(f"{name:9s} {metadata.version(name)}" for name in PACKAGES),
    ]
    root = Path(__file__).parent.parent
    for title, command in (("commit", ["rev-parse", "HEAD"]), ("changes", ["status", "--porcelain", "-uno"])):
        try:
            git = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            break
        lines.append(f"{title:9s} {git.stdout.strip() or 'none'}")
    return "\n".join(lines) + "\n"


def continue_command() -> str:
    """The command line that started this process, with torchrun where torchrun did."""
    local_ranks = os.environ.get("LOCAL_WORLD_SIZE")
    if local_ranks is None:
        return shlex.join(["python", *sys.argv])
    words = ["torchrun", f"--nproc_per_node={local_ranks}"]
    num_nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
    if num_nodes != "1":
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        words += [f"--nnodes={num_nodes}", "--node_rank=NODE", f"--master_addr={address}", f"--master_port={port}"]
    return shlex.join([*words, *sys.argv])
