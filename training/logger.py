"""Log a run: stats.jsonl is authoritative, log.txt is for reading; wandb and tensorboard are optional listeners.

A listener that fails, for example without a network connection or with a full disk, causes one warning and never
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

# Values of --log, and how to install the package that each needs.
LOGGERS = {"none": "", "wandb": "pip install wandb", "tensorboard": "pip install -e '.[tensorboard]'"}
PACKAGES = ("numpy", "pillow", "scipy", "imageio-ffmpeg")


class Listener(Protocol):
    """A receiver of everything that is logged; any method may raise, and training does not depend on it."""

    name: str

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def video(self, step: int, name: str, path: Path) -> None: ...

    def close(self) -> None: ...


class RunLogger:
    """Write the log files of a run directory and pass everything on to listeners; created on rank 0 only.

    `options["log"]` names the listeners. Lines of the JSON files for steps after `step`, from which training resumes,
    are removed, since they will be written again; None marks a new run. `wandb_id` is the existing wandb id of the run.

    Raises `ValueError` for a listener that is unknown, or whose package is not installed.
    """

    def __init__(self, run_dir: Path, options: Mapping[str, Any], step: int = -1, wandb_id: str | None = None):
        names = listener_names(options["log"])
        self.run_dir = run_dir
        self.wandb_id = wandb_id  # a resumed run continues the same wandb charts
        self.listeners: list[Listener] = []
        self._complained: set[str] = set()
        for path in [run_dir / "stats.jsonl", *run_dir.glob("metric-*.jsonl")]:
            forget_after(path, step)
        if "wandb" in names:
            self._listen("wandb", lambda: WandbListener(run_dir, options, wandb_id))
        if "tensorboard" in names:
            self._listen("tensorboard", lambda: TensorboardListener(run_dir, step))

    def text(self, line: str) -> None:
        """Print a line and append it to log.txt."""
        print(line, flush=True)
        with open(self.run_dir / "log.txt", "a") as file:
            file.write(line + "\n")

    def scalars(self, step: int, stats: Mapping[str, Mapping[str, float]]) -> None:
        """Append a line to stats.jsonl: name -> {num, mean, std}, and the time; listeners get the means."""
        line = {"step": step, **stats, "timestamp": time.time()}
        append_line(self.run_dir / "stats.jsonl", line)
        means = {name: values["mean"] for name, values in stats.items()}
        self._tell(lambda listener: listener.scalars(step, means))

    def metric(self, step: int, name: str, result: Mapping[str, Any]) -> None:
        """Append a line to metric-<name>.jsonl: the result of the metric, the step, and the time."""
        append_line(self.run_dir / f"metric-{name}.jsonl", {"step": step, **result, "timestamp": time.time()})
        values = {f"metric/{key}": value for key, value in metric_values(result).items()}
        self._tell(lambda listener: listener.scalars(step, values))

    def video(self, step: int, name: str, path: Path) -> None:
        """Pass on a video file, which has a PNG of the same name beside it."""
        self._tell(lambda listener: listener.video(step, name, path))

    def close(self) -> None:
        """Close the listeners and the log files; the latter also if a listener fails."""
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
        """Print a warning on the first failure of a listener."""
        if name not in self._complained:
            self._complained.add(name)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.text(f"Warning: {name} failed and may miss some of the run ({reason}); stats.jsonl has all of it.")


class SilentLogger:
    """The `RunLogger` of the other ranks, which does nothing."""

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
    """Pass scalars and videos to Weights & Biases; never ask for a key, and record offline without one."""

    name = "wandb"

    def __init__(self, run_dir: Path, options: Mapping[str, Any], run_id: str | None):
        import wandb  # imported here: it takes a second, and most runs do not use it

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
        """Log values at a step; wandb ignores steps that it has seen before."""
        self.run.log(dict(values), step=step)

    def video(self, step: int, name: str, path: Path) -> None:
        """Log an mp4."""
        self.run.log({name: self.wandb.Video(str(path))}, step=step)

    def close(self) -> None:
        """Wait until everything is uploaded or written."""
        self.run.finish()


class TensorboardListener:
    """Write scalars and the contact sheets of previews as TensorBoard events to <run>/tensorboard."""

    name = "tensorboard"

    def __init__(self, run_dir: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter  # imported here: an optional dependency

        # Hides events that an earlier process wrote for steps that are repeated now.
        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log values at a step."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def video(self, step: int, name: str, path: Path) -> None:
        """Log the contact sheet beside an mp4; videos would need a further package."""
        with Image.open(path.with_suffix(".png")) as sheet:
            self.writer.add_image(name, np.asarray(sheet), step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close the event file."""
        self.writer.close()


def listener_names(log: str | Sequence[str]) -> list[str]:
    """Return the listeners that `--log` names, without duplicates; older runs store a single name as a string.

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
    """Return WANDB_MODE, by default "online" if an API key is configured and "offline" if wandb would ask for one."""
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online" or "WANDB_API_KEY" in os.environ:
        return mode
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return "online" if netrc.netrc().authenticators(str(host)) else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append one JSON object to a JSON Lines file; NaN and infinities become null.

    Raises OSError if the write fails, and leaves the file unchanged: a partial line would corrupt the next one.
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
    """Return the objects of a JSON Lines file, empty without a file; a last line truncated by a crash is skipped."""
    lines = path.read_text().split("\n") if path.is_file() else []
    return [json.loads(line) for line in lines[:-1]]


def forget_after(path: Path, step: int) -> None:
    """Remove the lines of a JSON Lines file for steps after `step`."""
    if path.is_file():
        lines = [line for line in read_lines(path) if line["step"] <= step]
        with atomic_path(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))


def metric_values(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of a metric: the numbers under `results` if the result has that entry, else its own numbers."""
    values = result.get("results", result)
    numbers = {key: value for key, value in values.items() if type(value) in (int, float)}
    return {key: float(value) for key, value in numbers.items() if key not in ("step", "timestamp")}


def environment_text(device: torch.device, world_size: int) -> str:
    """Return versions, devices, command and git commit, for reproducibility."""
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
    """Return the command line that started this process, including torchrun."""
    local_ranks = os.environ.get("LOCAL_WORLD_SIZE")
    if local_ranks is None:
        return shlex.join(["python", *sys.argv])
    words = ["torchrun", f"--nproc_per_node={local_ranks}"]
    num_nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
    if num_nodes != "1":
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        words += [f"--nnodes={num_nodes}", "--node_rank=NODE", f"--master_addr={address}", f"--master_port={port}"]
    return shlex.join([*words, *sys.argv])
