"""Shared parts of the benchmarks: machine facts, alternating timing, tables, bars, and one JSON file per run.

A ratio is computed from times measured alternately in one run, so that other load on the machine affects all
contestants equally; it is the median of the ratios of the rounds.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import psutil
import torch

from dnnlib.util import atomic_path
from torch_utils.ops import backends

ROOT = Path(__file__).parent.parent
WARM_UP_SEC = 2.0  # a first round that takes longer counts as a measurement
CUDA_WARM_UP = 3  # calls before the first measurement on a GPU: kernels are built, memory is allocated

Cell = str | float | None  # int is a float
Times = dict[str, list[float]]


# ----------------------------------------------------------------------------
# Timing.


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int = 5,
    device: torch.device | str = "cpu",
    budget_sec: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Return seconds of each call, name -> one entry per round: in every round each contestant is called once.

    The first round is a warm-up, unless it takes longer than `WARM_UP_SEC`: then it counts. No new round begins after
    `budget_sec`. On CUDA the time of a call is that from its first kernel to its last by device events, or the time
    that the host needs to queue them if that is longer.
    """
    device = torch.device(device)
    begin = time.perf_counter()
    times: Times = {name: [] for name in contestants}
    for _ in range(CUDA_WARM_UP - 1 if device.type == "cuda" else 0):
        for contestant in contestants.values():
            contestant()
    is_warm, done = False, 0
    while done < rounds and (done == 0 or time.perf_counter() - begin <= budget_sec):
        taken = {name: seconds(contestant, device, clock) for name, contestant in contestants.items()}
        if is_warm or sum(taken.values()) > WARM_UP_SEC:
            for name, sec in taken.items():
                times[name].append(sec)
            done += 1
        is_warm = True
    return times


def seconds(
    function: Callable[[], object],
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the time of one call; on CUDA including the work that it queues, excluding work queued before."""
    if torch.device(device).type != "cuda":
        begin = clock()
        function()
        return clock() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def median(times: Sequence[float]) -> float:
    return statistics.median(times)


def ratio(times: Times, slow: str, fast: str) -> float:
    """Return the speed-up of `fast` over `slow`: the median over the rounds."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


# ----------------------------------------------------------------------------
# The machine.


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return the facts about the machine that a result depends on."""
    device = torch.device(device)
    facts: dict[str, Any] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load": round(psutil.getloadavg()[0], 2),  # load by other processes at the start
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "operators": backends.select_impl("auto", torch.empty([], device=device)),  # selected by "auto"
    }
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        facts |= {"gpu": found.name, "gpu_gib": round(found.total_memory / 2**30, 1), "cuda": torch.version.cuda}
        facts["cudnn"] = torch.backends.cudnn.version()
    return facts


VARIABLES = ("TORCH_UTILS_OPS", "OMP_NUM_THREADS", "THP_MEM_ALLOC_ENABLE", "PYTORCH_CUDA_ALLOC_CONF")


def describe(facts: Mapping[str, Any]) -> str:
    """Return one line about the machine: hardware, load and date."""
    where = f"{facts['cpu']} ({facts['instructions']}), {facts['threads']} threads on {facts['cores']} cores"
    if "gpu" in facts:
        where = f"{facts['gpu']}, CUDA {facts['cuda']}; {where}"
    variables = "".join(f", {name}={value}" for name, value in facts["variables"].items())
    where += f", load {facts['load']}; torch {facts['torch']}, {facts['operators']} operators{variables}"
    return f"{where}; {facts['date'][:10]}, {facts['commit']}"


def peak_mib() -> float:
    """Return the most resident memory that this process had, in MiB.

    On Linux by VmHWM: the `ru_maxrss` of a process begins with what its parent had when it was started.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if platform.system() == "Darwin" else peak / 2**10


def cpu_name() -> str:
    """Return the name of the processor according to Linux, else to Python."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Return the short name of the current commit, with a plus sign if files differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "no commit"
    return f"commit {name.stdout.strip()}{'+' if changes.stdout.strip() else ''}"


# ----------------------------------------------------------------------------
# Tables.


@dataclass
class Table:
    """Rows of text and numbers under a title; None is a missing value."""

    title: str
    columns: Sequence[str]
    rows: list[list[Cell]] = field(default_factory=list)
    note: str = ""

    def cells(self) -> list[list[str]]:
        return [list(self.columns), *([as_text(cell) for cell in row] for row in self.rows)]

    def is_number(self, column: int) -> bool:
        return all(not isinstance(row[column], str) for row in self.rows) and bool(self.rows)

    def text(self) -> str:
        """Format for a terminal: columns of equal width, numbers right-aligned."""
        cells = self.cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = []
        for row in cells:
            parts = [
                cell.rjust(width) if self.is_number(i) else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(parts).rstrip())
        return "\n".join([self.title, *lines, *([self.note] if self.note else [])])

    def markdown(self) -> str:
        """Format as Markdown, for the documentation."""
        header, *rows = self.cells()
        rule = ["---:" if self.is_number(column) else "---" for column in range(len(header))]
        lines = [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]
        return "\n".join([f"{self.title}.", "", *lines, *(["", self.note] if self.note else [])])


def as_text(cell: Cell) -> str:
    """Format numbers with three significant digits, without exponent."""
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int) or not math.isfinite(cell):
        return str(cell)
    return f"{cell:.{max(0, 2 - math.floor(math.log10(abs(cell))))}f}" if cell else "0"


@dataclass
class Bar:
    """A required minimum, and the measured value."""

    name: str
    at_least: float
    measured: float

    def row(self) -> list[Cell]:
        verdict = "met" if self.measured >= self.at_least else f"missed by {1 - self.measured / self.at_least:.0%}"
        return [self.name, self.at_least, self.measured, verdict]


def bars_table(bars: Sequence[Bar]) -> Table:
    return Table("Bars", ["bar", "at least", "measured", ""], [bar.row() for bar in bars])


@dataclass
class Report:
    """All results of one benchmark run; tables are printed when they are added."""

    name: str
    machine: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)

    def add(self, table: Table) -> None:
        """Print a table and store it."""
        click.echo(f"\n{table.text()}")
        self.tables.append(table)

    def finish(self, path: Path | None) -> None:
        """Print the bars, and write the report to a JSON file if requested."""
        if self.bars:
            click.echo(f"\n{bars_table(self.bars).text()}")
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read a report written by `finish`."""
        values = json.loads(path.read_text())
        values["tables"] = [Table(**table) for table in values["tables"]]
        values["bars"] = [Bar(**bar) for bar in values["bars"]]
        return cls(**values)


# ----------------------------------------------------------------------------
# Command lines.


def options(
    rounds: int | None = 3, threads: int | None = 2, device: bool = True
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that adds --json and --quick, and --rounds, --threads and --device as supported."""
    path, positive = click.Path(path_type=Path, dir_okay=False), click.IntRange(min=1)
    wanted = [
        click.option("--json", "json_path", help="Write figures, machine and date to this file", type=path),
        click.option("--quick", help="Toy sizes, one round: a smoke test without meaningful results", is_flag=True),
    ]
    if rounds is not None:
        say = "Rounds; results are medians over them"
        wanted.append(click.option("--rounds", help=say, type=positive, default=rounds, show_default=True))
    if threads is not None:
        say = "Threads of the CPU"
        wanted.append(click.option("--threads", help=say, type=positive, default=threads, show_default=True))
    if device:
        choice = click.Choice(["cpu", "cuda"])
        wanted.append(click.option("--device", help="Where", type=choice, default="cpu", show_default=True))

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in wanted:
            function = option(function)
        return function

    return add


def begin(name: str, device: str = "cpu", threads: int = 1, **options: Any) -> Report:
    """Set the number of threads, and print the benchmark and the machine."""
    torch.set_num_threads(threads)
    report = Report(name, machine(device), {"device": device, "threads": threads, **options})
    click.echo(f"{name}: {describe(report.machine)}")
    return report
