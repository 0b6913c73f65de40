"""Time the start-up from the command to the first frame, in fresh processes, with and without cached kernels.

python -m benchmarks.startup                    a pair of networks of the toy size and of the published one
python -m benchmarks.startup --size toy --quick
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import click

from benchmarks import harness, subjects
from training.checkpoint import save_network

# The program of a fresh process, and the events that it records, in seconds since it was started.
CHILD = """
import json, sys, time
started, device, threads, *paths = sys.argv[1:]
moments = {}
def note(name):
    moments[name] = time.time() - float(started)
note("Python has started")
import torch
note("torch is imported")
from training.sampling import Request, open_sampler
note("longtake is imported")
torch.set_num_threads(int(threads))
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
sampler = open_sampler(paths, device=device)
note("networks are opened")
next(sampler.frames(Request([0], 0, 1)))["video"].cpu()
note("the first frame is there")
print(json.dumps(moments))
"""
CASES = ("ref", "matmul", "auto, no kernels kept", "auto, kernels kept")
IMPORTS = ("import dnnlib.util", "import torch", "import generate", "import train_lres", "import calc_metrics")


def run_child(program: str, arguments: list[str], environment: Mapping[str, str]) -> str:
    """Return the output of a fresh process."""
    variables = {**os.environ, "PYTHONPATH": str(harness.ROOT), **environment}
    child = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=harness.ROOT, env=variables, capture_output=True, text=True
    )
    if child.returncode:
        raise click.ClickException(f"a fresh process failed:\n{child.stderr}")
    return child.stdout


def first_frame(case: str, paths: list[str], device: str, threads: int, cache: Path) -> dict[str, float]:
    """Return the times of the events of one process, in order; `cache` is its kernel cache, empty to build them."""
    environment = {"TORCH_UTILS_OPS": case.split(",")[0], "DNNLIB_CACHE_DIR": str(cache)}
    return json.loads(run_child(CHILD, [str(time.time()), device, str(threads), *paths], environment))


def time_first_frame(report: harness.Report, size: str, device: str, threads: int, rounds: int, folder: Path) -> None:
    """Add the table of one size: the events of each case, and the time of building kernels."""
    paths = [str(folder / f"{stage}-{size}.pkl") for stage in subjects.NAMES]
    for stage, path in zip(subjects.NAMES, paths, strict=True):
        save_network(subjects.make_generator(stage, size), path)
    found: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            for case in CASES:  # the fourth case uses the kernels that the third one builds
                found[case].append(first_frame(case, paths, device, threads, Path(cache)))
    table = harness.Table(
        f"Both stages, {size}: seconds from the command until", ["moment", *CASES], note=f"{rounds} rounds."
    )
    for moment in found[CASES[0]][0]:
        table.rows.append([moment, *(harness.median([once[moment] for once in found[case]]) for case in CASES)])
    report.add(table)


def time_imports(report: harness.Report, rounds: int) -> None:
    """Add the table of import times."""
    times: harness.Times = {program: [] for program in ("pass", *IMPORTS)}
    for _ in range(rounds):
        for program in times:
            times[program].append(harness.seconds(lambda program=program: run_child(program, [], {})))
    nothing = harness.median(times["pass"])
    rows: list[list[harness.Cell]] = [["python, importing nothing", nothing, None]]
    rows += [[program, harness.median(times[program]), harness.median(times[program]) - nothing] for program in IMPORTS]
    title = "A process that only imports: seconds"
    report.add(harness.Table(title, ["program", "from start to end", "without Python itself"], rows))


@click.command()
@click.option(
    "--size",
    "sizes",
    help="Whose networks; repeatable",
    type=click.Choice(subjects.SIZES),
    multiple=True,
    default=["toy", "default"],
    show_default=True,
)
@harness.options(rounds=2)
def main(sizes: tuple[str, ...], device: str, threads: int, rounds: int, quick: bool, json_path: Path | None) -> None:
    """Print the times at which fresh processes have imported modules, loaded both networks, and generated a frame."""
    sizes, rounds = (("toy",), 1) if quick else (sizes, rounds)
    report = harness.begin("startup", device, threads, sizes=sizes, rounds=rounds)
    time_imports(report, rounds)
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            time_first_frame(report, size, device, threads, rounds if size == "toy" else 1, Path(folder))
    report.finish(json_path)


if __name__ == "__main__":
    main()
