"""Log a run: stats.jsonl is authoritative, log.txt is for reading; wandb and tensorboard are optional listeners.

What is no weights may fail, for example on a full disk or without a network connection: that causes one warning and
never stops a run (`SilentLogger.optional`).
"""

import contextlib
import importlib.util
import netrc
import os
import platform
import shlex
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from dnnlib.text import one_line
from torch_utils import host_memory
from training.config import check_keys
from training.side_files import append_line, forget_after, metric_values
from training.side_files import read_lines as read_lines

# Values of --logger, and how to install the package that each needs.
LOGGERS = {"none": "", "wandb": "pip install wandb", "tensorboard": "pip install -e '.[tensorboard]'"}
PACKAGES = ("numpy", "pillow", "scipy", "imageio-ffmpeg")


class Listener(Protocol):
    """A receiver of everything that is logged; any method may raise, and training does not depend on it."""

    name: str

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def video(self, step: int, name: str, path: Path) -> None: ...

    def close(self) -> None: ...


class SilentLogger:
    """The logger of the ranks that write nothing."""

    wandb_id: str | None = None

    @contextlib.contextmanager
    def optional(self, what: str) -> Iterator[None]:
        """Let an error in the block, which writes `what`, stop nothing but the block; the first one is logged.

        Everything that is not weights is written in such a block. It contains no collectives.
        """
        try:
            yield
        except Exception as error:
            self.failed(what, error)

    def failed(self, what: str, error: Exception) -> None:
        pass

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


class RunLogger(SilentLogger):
    """Write the log files of a run directory and pass everything on to listeners; created on rank 0 only.

    `options["log"]` names the listeners. Lines of the JSON files for steps after `step`, from which training resumes,
    are removed, since they will be written again; None marks a new run. `wandb_id` is the existing wandb id of the run.

    Raises `ValueError` for a listener that is unknown, or whose package is not installed; no method raises.
    """

    def __init__(self, run_dir: Path, options: Mapping[str, Any], step: int = -1, wandb_id: str | None = None):
        names = listener_names(options["log"])
        self.run_dir = run_dir
        self.wandb_id = wandb_id  # a resumed run continues the same wandb charts
        self.listeners: list[Listener] = []
        self._complained: set[tuple[str, type]] = set()
        for path in [run_dir / "stats.jsonl", *run_dir.glob("metric-*.jsonl")]:
            with self.optional(path.name):
                forget_after(path, step)
        if "wandb" in names:
            self._listen("wandb", lambda: WandbListener(run_dir, options, wandb_id))
        if "tensorboard" in names:
            self._listen("tensorboard", lambda: TensorboardListener(run_dir, step))

    def failed(self, what: str, error: Exception) -> None:
        """Log that `what` failed, the first time for each kind of error."""
        if (what, type(error)) not in self._complained:
            self._complained.add((what, type(error)))
            text = isinstance(error, OSError) and error.strerror or f"{type(error).__name__}: {error}"
            reason = one_line(" ".join(text.split()))
            self.text(f"Warning: {what} failed and may be incomplete ({reason}); training goes on.")

    def text(self, line: str) -> None:
        """Print a line and append it to log.txt."""
        data = line.encode("utf-8", "backslashreplace")  # names of files may hold other bytes
        with contextlib.suppress(OSError, ValueError):  # the terminal is gone, or cannot show a character
            print(data.decode(), flush=True)
        with self.optional("log.txt"), open(self.run_dir / "log.txt", "ab") as file:
            file.write(data + b"\n")

    def scalars(self, step: int, stats: Mapping[str, Mapping[str, float]]) -> None:
        """Append a line to stats.jsonl: name -> {num, mean, std}, and the time; listeners get the means."""
        with self.optional("stats.jsonl"):
            append_line(self.run_dir / "stats.jsonl", {"step": step, **stats, "timestamp": time.time()})
        means = {name: values["mean"] for name, values in stats.items()}
        self._tell(lambda listener: listener.scalars(step, means))

    def metric(self, step: int, name: str, result: Mapping[str, Any]) -> None:
        """Append a line to metric-<name>.jsonl: the result of the metric, the step, and the time."""
        path = self.run_dir / f"metric-{name}.jsonl"
        with self.optional(path.name):
            append_line(path, {"step": step, **result, "timestamp": time.time()})
        values = {f"metric/{key}": value for key, value in metric_values(result).items()}
        self._tell(lambda listener: listener.scalars(step, values))

    def video(self, step: int, name: str, path: Path) -> None:
        """Pass on a video file, which has a PNG of the same name beside it."""
        self._tell(lambda listener: listener.video(step, name, path))

    def close(self) -> None:
        """Close the listeners and the log files; the latter also if a listener fails."""
        self._tell(lambda listener: listener.close())

    def _listen(self, name: str, make: Callable[[], Listener]) -> None:
        with self.optional(name):
            listener = make()
            self.listeners.append(listener)
            if isinstance(listener, WandbListener):
                self.wandb_id = listener.id

    def _tell(self, say: Callable[[Listener], None]) -> None:
        for listener in self.listeners:
            with self.optional(listener.name):
                say(listener)


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
    """Return the listeners that `--logger` names, without duplicates; older runs store a single name as a string.

    Raises `ValueError` for a name that is unknown, or whose package is not installed.
    """
    names = [log] if isinstance(log, str) else list(log)
    check_keys(names, LOGGERS, "--logger")
    names = [name for name in dict.fromkeys(names) if name != "none"]
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--logger={name} needs the package {name}, which is missing: {LOGGERS[name]}")
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
