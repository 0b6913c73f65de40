"""What a run says about itself: stats.jsonl is the truth, log.txt its reading, wandb a listener for those who ask."""

import json
import math
import netrc
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dnnlib.util import atomic_path
from training.config import check_keys

LOGGERS = ("none", "wandb")
PACKAGES = ("numpy", "pillow", "scipy", "imageio-ffmpeg")


class RunLogger:
    """Writes the log files of a run directory and passes the same on to a listener; made on rank 0 only.

    Lines of the JSON files that belong to steps after `step`, the one that training goes on from, are removed: they
    will be written again. Without a step the run is new.
    """

    def __init__(self, run_dir: Path, options: Mapping[str, Any], step: int = -1, wandb_id: str | None = None):
        check_keys([options["log"]], LOGGERS, "--log")
        self.run_dir = run_dir
        for path in [run_dir / "stats.jsonl", *run_dir.glob("metric-*.jsonl")]:
            forget_after(path, step)
        listens = options["log"] == "wandb"
        self.listener = WandbListener(run_dir, options, wandb_id) if listens else NullListener()

    @property
    def wandb_id(self) -> str | None:
        """Identifies the run at wandb, so that a resumed run goes on in the same charts."""
        return self.listener.id

    def text(self, line: str) -> None:
        """Print a line and keep it in log.txt."""
        print(line, flush=True)
        with open(self.run_dir / "log.txt", "a") as file:
            file.write(line + "\n")

    def scalars(self, step: int, stats: Mapping[str, Mapping[str, float]]) -> None:
        """Add a line to stats.jsonl: name -> {num, mean, std}, and when; the listener gets the means."""
        line = {"step": step, **stats, "timestamp": time.time()}
        append_line(self.run_dir / "stats.jsonl", line)
        self.listener.scalars(step, {name: values["mean"] for name, values in stats.items()})

    def metric(self, step: int, name: str, result: Mapping[str, Any]) -> None:
        """Add a line to metric-<name>.jsonl: the result as the metric gave it, the step, and when."""
        append_line(self.run_dir / f"metric-{name}.jsonl", {"step": step, **result, "timestamp": time.time()})
        self.listener.scalars(step, {f"metric/{key}": value for key, value in metric_values(result).items()})

    def video(self, step: int, name: str, path: Path) -> None:
        """Show a video that has been written."""
        self.listener.video(step, name, path)

    def close(self) -> None:
        self.listener.close()


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


class NullListener:
    """Listens to nothing."""

    id: str | None = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def video(self, step: int, name: str, path: Path) -> None:
        pass

    def close(self) -> None:
        pass


class WandbListener:
    """Passes scalars and videos on to Weights & Biases; never asks for a key, and stays offline where there is none."""

    def __init__(self, run_dir: Path, options: Mapping[str, Any], run_id: str | None):
        import wandb  # imported here: it takes a second, and most runs do without

        self.wandb = wandb
        self.run = wandb.init(
            project=f"longtake-{options['system']}",
            name=run_dir.name,
            dir=str(run_dir),
            config=dict(options),
            id=run_id,
            resume="allow",
            mode="online" if _wandb_is_configured() else "offline",
        )
        self.id: str | None = self.run.id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def video(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.wandb.Video(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


def _wandb_is_configured() -> bool:
    """True if wandb may go online without asking: a key in the environment or in ~/.netrc, and no word against it."""
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"] == "online"
    if "WANDB_API_KEY" in os.environ:
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Add one JSON object to a file of them; numbers that JSON cannot say, NaN and infinities, become null."""
    with open(path, "a") as file:
        file.write(json.dumps(_finite(values)) + "\n")


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
    command = shlex.join(["python", *sys.argv])
    local_ranks = os.environ.get("LOCAL_WORLD_SIZE")
    return command if local_ranks is None else f"torchrun --nproc_per_node={local_ranks} {shlex.join(sys.argv)}"
