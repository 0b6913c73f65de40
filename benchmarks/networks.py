"""Time the networks of both stages: the literal operators compared with the fast ones, and the time by kind of work.

python -m benchmarks.networks                   published size and toy size, one clip at a time
python -m benchmarks.networks --size toy --quick
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import click
import torch

from benchmarks import harness, profiling, subjects
from torch_utils import host_memory
from torch_utils.ops import backends

# Implementations; beyond the toy size "ref" takes minutes, so fewer are compared.
IMPLS = ("ref", "matmul", "auto")
# Minimum speed-up over the literal operators on a CPU with two threads, as commands run: auto, memory kept.
BARS = {(subjects.LRES, "G forward"): 1.25, (subjects.SRES, "G forward"): 3.0}
NOT_SLOWER = 1.0  # minimum speed relative to the matrix path, for every network
KEPT = '"Kept" is auto with freed memory kept by the process, as the commands do; the last ratio is what that gains.'
PROFILED = ("G forward", "G forward + backward", "D R1")


def time_stage(
    report: harness.Report, stage: str, size: str, device: str, rounds: int, budget_sec: float, quick: bool = False
) -> None:
    """Add the table of times of one stage, with bars, and the table of the kinds of work."""
    system = subjects.make_system(stage, size, device, batch=1)
    passes = subjects.passes(system)
    title = f"{subjects.NAMES[stage].capitalize()}, {size}: seconds, and how many times as fast auto is"
    columns = ["pass", "frames", *IMPLS, "kept", "against ref", "against matmul", "kept / auto", "rounds"]
    times = harness.Table(title, columns, note=KEPT if device == "cpu" else "")
    where = harness.Table(
        f"{subjects.NAMES[stage].capitalize()}, {size}: percent of the time", ["pass", "operators", *profiling.KINDS]
    )
    for name, function in passes.items():
        impls = IMPLS if size == "toy" or name == "G forward" else ("ref", "auto")
        contestants = {impl: functools.partial(run, function, impl) for impl in impls}
        if device == "cpu":
            contestants["kept"] = functools.partial(run_kept, function)
        found = harness.interleave(contestants, rounds, device, budget_sec)
        ratios = [harness.ratio(found, impl, "auto") if impl in found else None for impl in ("ref", "matmul")]
        medians = [harness.median(found[impl]) if impl in found else None for impl in (*IMPLS, "kept")]
        frames = subjects.num_frames(system, name)
        kept = harness.ratio(found, "auto", "kept") if "kept" in found else None
        times.rows.append([name, frames, *medians, *ratios, kept, len(found["auto"])])
        if device == "cpu" and size == "default":
            label = f"{subjects.NAMES[stage]}, {name}"
            for bar, rival in ((BARS.get((stage, name)), "ref"), (NOT_SLOWER, "matmul")):
                if rival in found and bar is not None:
                    reached = harness.ratio(found, rival, "kept")
                    report.bars.append(harness.Bar(f"{label} as commands run it, against {rival}", bar, reached))
        if name in PROFILED:
            for impl in ("ref", "auto") if size == "toy" and not quick else ("auto",):
                shares = profiling.shares(contestants[impl], device)
                where.rows.append([name, impl, *(round(100 * shares[kind]) for kind in profiling.KINDS)])
    report.add(times)
    report.add(where)


def run(function: Callable[[], object], impl: str) -> None:
    """Call with `impl` for every operator."""
    with backends.using(impl):
        function()


def run_kept(function: Callable[[], object]) -> None:
    """Call as the commands do on a CPU, where the process keeps freed memory."""
    with host_memory.kept():
        function()


@click.command()
@click.option(
    "--size",
    "sizes",
    help="Whose networks; repeatable",
    type=click.Choice(subjects.SIZES),
    multiple=True,
    default=["default", "toy"],
    show_default=True,
)
@click.option("--budget", help="Seconds after which no new round of a row begins", type=float, default=10.0)
@harness.options()
def main(
    sizes: tuple[str, ...],
    budget: float,
    device: str,
    threads: int,
    rounds: int,
    quick: bool,
    json_path: Path | None,
) -> None:
    """Print the time of the passes of training with each implementation of the operators, and its distribution."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    sizes, rounds, budget = (("toy",), 1, 0.0) if quick else (sizes, rounds, budget)
    report = harness.begin("networks", device, threads, sizes=sizes, rounds=rounds)
    for size in sizes:
        for stage in subjects.NAMES:
            time_stage(report, stage, size, device, rounds, budget, quick)
    report.finish(json_path)


if __name__ == "__main__":
    main()
