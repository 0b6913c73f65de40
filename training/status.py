"""Report the status of a run: timing, the status line and stats.jsonl; stop the run if a loss diverges."""

import dataclasses
import math
import time
from pathlib import Path

import psutil
import torch

from dnnlib.util import format_time, format_time_brief
from torch_utils import distributed, training_stats
from training import checkpoint
from training.config import TrainOptions
from training.contract import Info
from training.logger import SilentLogger


@dataclasses.dataclass
class Clock:
    """Time of training steps, of waiting for data and in total since the last tick, and in total since the start."""

    past_sec: float  # time of the run before this process
    clean_step: int  # the last tick up to which every loss was finite
    train_sec: float = 0.0
    wait_sec: float = 0.0
    num_steps: int = 0
    begin: float = dataclasses.field(default_factory=time.monotonic)
    tick: float = dataclasses.field(default_factory=time.monotonic)
    save: float = math.inf  # when a checkpoint is due
    validated_step: int = -1  # the last one at which held-out losses were measured

    @property
    def total_sec(self) -> float:
        return self.past_sec + time.monotonic() - self.begin

    def restart_tick(self) -> None:
        self.train_sec, self.wait_sec, self.num_steps, self.tick = 0.0, 0.0, 0, time.monotonic()

    def settle(self, device: torch.device) -> None:
        """Wait for the GPU work that training has queued, and count the time as training, not as the next operation."""
        if device.type == "cuda":
            begin = time.monotonic()
            torch.cuda.synchronize(device)
            self.train_sec += time.monotonic() - begin

    def save_in(self, sec: float) -> None:
        """Schedule the next checkpoint in so many seconds; 0 means never."""
        self.save = time.monotonic() + sec if sec else math.inf

    def save_is_due(self) -> bool:
        return time.monotonic() >= self.save


def tick(
    logger: SilentLogger,
    collector: training_stats.Collector,
    clock: Clock,
    options: TrainOptions,
    info: Info,
    device: torch.device,
    step: int,
    run_dir: Path,
) -> None:
    """Log the statistics reported since the last tick; raise SharedError if a loss had no finite value since then."""
    values = measure(clock, options, device, step)
    for name, value in values.items():
        training_stats.report0(name, value)
    collector.update()
    stats = {name: entry for name, entry in collector.as_dict().items() if entry.num or "nonfinite" in entry}
    if clock.validated_step != step:  # the collector keeps the losses of the last time
        stats = {name: entry for name, entry in stats.items() if not name.startswith("validation/")}
    logger.scalars(step, stats)
    losses = {name: entry for name, entry in stats.items() if name.startswith("loss/")}
    eta = format_time_brief(values["timing/sec_per_step"] * (options.steps - step)) if clock.num_steps else "-"
    fields = [
        f"step {step}",
        f"time {format_time(clock.total_sec)}",
        f"sec/step {values['timing/sec_per_step']:.2f}",
        f"eta {eta}",
        f"kimg/s {values['progress/kimg_per_sec']:.4g}",
        f"data wait {clock.wait_sec / max(clock.train_sec, 1e-9):.0%}",
        f"maintenance {values['timing/maintenance_sec']:.1f}",
        f"cpumem {values['resources/cpu_mem_gb']:.2f}",
        f"gpumem {values['resources/peak_gpu_mem_gb']:.2f}",
        f"reserved {values['resources/peak_gpu_mem_reserved_gb']:.2f}",
        *(f"{name} {entry.mean:.4g}" for name, entry in stats.items() if is_in_status(name, info)),
    ]
    replaced = stats.get("progress/nonfinite_gradients")
    if replaced and replaced.mean > 0:
        fields.append(f"nonfinite gradients {replaced.mean * replaced.num / distributed.get_world_size():.0f}")
    logger.text("  ".join(fields))
    diverged = [name for name, entry in losses.items() if entry.num == 0]
    if diverged:
        good = last_good(run_dir, clock)
        raise distributed.SharedError(
            f"{', '.join(diverged)} has not been finite since step {step - clock.num_steps}, so training stops. The "
            f"last good checkpoint is {good[0][1] if good else 'the beginning'}. Begin again with a lower learning "
            "rate or a stronger regularisation, and find in stats.jsonl when the losses left their usual range."
        )
    if not any("nonfinite" in entry for entry in losses.values()):
        clock.clean_step = step
    clock.restart_tick()


def is_in_status(name: str, info: Info) -> bool:
    """Return whether the status line shows a statistic."""
    return name in info.status or (name.startswith(("loss/", "validation/")) and name.endswith("_loss"))


def measure(clock: Clock, options: TrainOptions, device: torch.device, step: int) -> dict[str, float]:
    """Return the measurements of the loop since the last tick: progress, seconds, GiB."""
    values = {
        "progress/step": step,
        "progress/tick": -(-step // options.tick_steps),
        "progress/kimg_per_sec": options.batch * clock.num_steps / 1000 / max(clock.train_sec, 1e-9),
        "timing/total_sec": clock.total_sec,
        "timing/sec_per_step": clock.train_sec / max(clock.num_steps, 1),
        "timing/data_wait_sec": clock.wait_sec,
        "timing/maintenance_sec": time.monotonic() - clock.tick - clock.train_sec,
        "resources/cpu_mem_gb": psutil.Process().memory_info().rss / 2**30,
        "resources/peak_gpu_mem_gb": 0.0,
        "resources/peak_gpu_mem_reserved_gb": 0.0,
    }
    if device.type == "cuda":
        values["resources/peak_gpu_mem_gb"] = torch.cuda.max_memory_allocated(device) / 2**30
        values["resources/peak_gpu_mem_reserved_gb"] = torch.cuda.max_memory_reserved(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
    return values


def last_good(run_dir: Path, clock: Clock) -> list[tuple[int, Path]]:
    """Return step and path of the newest checkpoint before a loss was not finite; empty if there is none."""
    return [(step, path) for step, path in checkpoint.list_checkpoints(run_dir) if step <= clock.clean_step][-1:]
