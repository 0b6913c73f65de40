"""Time generation and measure its memory: with streaming, in independent windows, and all frames at once.

python -m benchmarks.generate                                          published low-resolution network, 512 frames
python -m benchmarks.generate --size toy --pair -n 512 -n 8192 --way stream    memory against length, both stages
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from benchmarks import harness, subjects
from training.longvideogan.sampling import LRES_CHUNK
from training.sampling import Request, Sampler

WAYS = ("stream", "windows", "whole")


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
    first: float
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
    if task.device == "cuda":
        return Result(torch.cuda.max_memory_allocated() / 2**20, first, total)
    return Result(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, first, total)


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
    context = multiprocessing.get_context("spawn")
    for way in ways:
        for num_frames in lengths:
            task = Task(way, size, pair, num_frames, device, threads)
            with ProcessPoolExecutor(1, context) as pool:
                found = pool.submit(measure, task).result()
            steady = way != "whole" and not pair and num_frames > LRES_CHUNK
            later = (num_frames - LRES_CHUNK) / (found.total - found.first) if steady else None
            table.rows.append([way, num_frames, found.peak, found.first, num_frames / found.total, later])
    report.add(table)
    report.finish(json_path)


if __name__ == "__main__":
    main()
