"""Time generation and measure its memory: with streaming, in independent windows, all frames at once, by command.

python -m benchmarks.generate                                          published low-resolution network, 512 frames
python -m benchmarks.generate --size toy --pair -n 512 -n 8192 --way command   memory against length, both stages

Only `generate.py` itself, `--way command`, keeps freed memory for reuse as users have it, and writes files.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import harness, subjects
from torch_utils import thread_cache
from training.longvideogan.sampling import LRES_CHUNK
from training.network_file import save_network
from training.sampling import Request, Sampler

WAYS = ("stream", "windows", "whole", "command")


@dataclass(frozen=True)
class Task:
    """One measurement, run in a separate process."""

    way: str
    size: str
    pair: bool
    num_frames: int
    device: str
    threads: int


@dataclass(frozen=True)
class Result:
    """`peak` is resident memory in MiB, of CUDA memory when there is a GPU; `first` and `total` are seconds."""

    peak: float
    first: float | None  # not known of a command
    total: float


def frames_of(task: Task, sampler: Sampler) -> Iterator[torch.Tensor]:
    """Yield the frames of seed 0, computed in the given way, without keeping them."""
    windows = [(0, task.num_frames)]
    if task.way == "windows":
        starts = range(0, task.num_frames, LRES_CHUNK)
        windows = [(first, min(LRES_CHUNK, task.num_frames - first)) for first in starts]
    elif task.way == "whole":
        context = max(stage.needs.past for stage in sampler.stages)
        for stage in sampler.stages:
            stage.block = task.num_frames + 2 * context
    for first, count in windows:
        for chunk in sampler.frames(Request([0], first, count)):
            yield chunk["video"]


def measure(task: Task) -> Result:
    """Build the networks, then generate all frames."""
    torch.set_num_threads(task.threads)
    stages = subjects.NAMES if task.pair else [subjects.LRES]
    sampler = subjects.make_sampler(*(subjects.make_generator(stage, task.size, task.device) for stage in stages))
    begin, first, done = time.perf_counter(), 0.0, 0
    for chunk in frames_of(task, sampler):
        chunk = chunk.cpu()
        first = first or time.perf_counter() - begin
        done += chunk.shape[2]
    total = time.perf_counter() - begin
    assert done == task.num_frames
    return Result(peak_mib(task), first, total)


def peak_mib(task: Task) -> float:
    """Return the peak memory of this process on the device."""
    return torch.cuda.max_memory_allocated() / 2**20 if task.device == "cuda" else harness.peak_mib()


def save(task: Task, folder: Path) -> list[str]:
    """Write the networks of the task as files; returns the options of `generate.py` that name them."""
    stages = subjects.NAMES if task.pair else [subjects.LRES]
    options = []
    for stage in stages:
        path = folder / f"{stage}.pkl"
        save_network(subjects.make_generator(stage, task.size), path)
        options.append(f"--model={path}")
    return options


def command(task: Task, options: list[str], folder: Path) -> Result:
    """Run `generate.py` for all frames, and count from its first line on; begun as it begins itself anew."""
    thread_cache.restart_without()
    begin = time.perf_counter()
    import generate

    torch.set_num_threads(task.threads)
    given = [*options, f"--outdir={folder}", "--seed=0", f"--len={task.num_frames}", f"--device={task.device}"]
    generate.main(given, standalone_mode=False)
    total = time.perf_counter() - begin
    return Result(peak_mib(task), None, total)


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """Call the function in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def run(task: Task) -> Result:
    """Measure in a process that has done nothing else."""
    if task.way != "command":
        return alone(measure, task)
    with tempfile.TemporaryDirectory() as name:
        options = alone(save, task, Path(name))
        os.environ.update(thread_cache.WITHOUT)
        try:
            return alone(command, task, options, Path(name) / "out")
        finally:
            for variable in thread_cache.WITHOUT:
                del os.environ[variable]


@click.command()
@click.option("--way", "ways", help="What to measure; repeatable", type=click.Choice(WAYS), multiple=True, default=WAYS)
@click.option("--size", help="Whose networks", type=click.Choice(subjects.SIZES), default="default", show_default=True)
@click.option("--pair", help="Super-resolution too", is_flag=True)
@click.option("--frames", "-n", "lengths", help="Frames; repeatable", type=int, multiple=True, default=[512])
@harness.options(rounds=None)
def main(
    ways: tuple[str, ...],
    size: str,
    pair: bool,
    lengths: tuple[int, ...],
    device: str,
    threads: int,
    quick: bool,
    json_path: Path | None,
) -> None:
    """Print peak memory, the time to the first frames and the frames per second, each from a fresh process."""
    size, lengths = ("toy", (2 * LRES_CHUNK,)) if quick else (size, lengths)
    report = harness.begin("generate", device, threads, size=size, pair=pair)
    table = harness.Table(
        f"{'Both stages' if pair else 'Low resolution'}, {size}, pieces of {LRES_CHUNK} frames",
        ["way", "frames", "peak MiB", "first frames after sec", "frames/s", "frames/s after the first"],
    )
    for way in ways:
        for num_frames in lengths:
            task = Task(way, size, pair, num_frames, device, threads)
            found = run(task)
            later = None
            if found.first is not None and way != "whole" and not pair and num_frames > LRES_CHUNK:
                later = (num_frames - LRES_CHUNK) / (found.total - found.first)
            table.rows.append([way, num_frames, found.peak, found.first, num_frames / found.total, later])
    report.add(table)
    report.finish(json_path)


if __name__ == "__main__":
    main()
