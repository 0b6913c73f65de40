"""Draw the curves of training runs from their log files.

# Draw the curves of a run, also during training
python -m training.curves runs/mine/00000-clips-64batch

# Compare several runs
python -m training.curves runs/mine/00000-* runs/mine/00001-* --out=compared.png

The image is drawn from stats.jsonl and metric-*.jsonl alone and written to RUN_DIR/curves.png, or to --out. It needs
matplotlib: pip install 'longtake[plots]'.
"""

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from dnnlib.util import format_time
from training import registry
from training.charts import COLOURS, Chart, ChartSpec, Line, MissingMatplotlib, draw_charts
from training.side_files import metric_values, read_lines, read_object

# Charts of every run, below those of its system and its losses.
CHARTS = (
    ChartSpec(
        "Not finite", {"progress/nonfinite_gradients": "gradients a step", "nonfinite": "values a tick"}, exact=True
    ),
    ChartSpec("Seconds a step", {"timing/sec_per_step": "all", "wait": "waiting for data"}),
    ChartSpec("Memory in GiB", {"resources/cpu_mem_gb": "CPU", "resources/peak_gpu_mem_gb": "GPU, peak"}),
)

_warned = False  # whether the warning about missing matplotlib was printed


def update_curves(run_dir: Path, say: Callable[[str], None]) -> None:
    """Draw the curves of a run in training, if it has statistics; warn once per process if matplotlib is missing."""
    global _warned
    try:
        if _by_step(run_dir / "stats.jsonl"):
            draw_curves(run_dir)
    except MissingMatplotlib as error:
        if not _warned:
            say(f"Warning: training goes on without curves.png, since {error}")
        _warned = True


def draw_curves(run_dirs: Path | Sequence[Path], out: Path | None = None) -> Path:
    """Draw the logged statistics of one or several runs, and return the path of the image.

    Without `out`, one run is drawn into RUN_DIR/curves.png, and several into curves.png in their common parent folder.
    Raises `ValueError` for a directory without statistics, or without matplotlib.
    """
    run_dirs = [run_dirs] if isinstance(run_dirs, Path) else list(run_dirs)
    runs = {name: curves_of(run_dir) for name, run_dir in zip(_short_names(run_dirs), run_dirs, strict=True)}
    colours = dict(zip(runs, itertools.cycle(COLOURS), strict=False))
    charts = []
    for title in dict.fromkeys(title for curves in runs.values() for title in curves):
        parts = {run: curves[title] for run, curves in runs.items() if title in curves}
        if len(runs) == 1:
            charts += parts.values()
            continue
        # With several runs a colour identifies a run, so each statistic gets a chart of its own.
        for label in dict.fromkeys(line.label for chart in parts.values() for line in chart.lines):
            lines = [
                dataclasses.replace(line, label=run, colour=colours[run])
                for run, chart in parts.items()
                for line in chart.lines
                if line.label == label
            ]
            like = next(iter(parts.values()))
            charts.append(dataclasses.replace(like, title=f"{title}: {label}", lines=tuple(lines)))
    folder = Path(os.path.commonpath([run_dir.resolve() for run_dir in run_dirs]))
    out = out or (run_dirs[0] if len(run_dirs) == 1 else folder) / "curves.png"
    title = run_dirs[0].resolve().name if len(run_dirs) == 1 else f"{len(run_dirs)} runs"
    subtitle = "\n".join(_describe_run(name, run_dir) for name, run_dir in zip(runs, run_dirs, strict=True))
    draw_charts(charts, out, title, subtitle)
    return out


def curves_of(run_dir: Path) -> dict[str, Chart]:
    """Return the charts of a run by title: those of its system, its other losses, `CHARTS`, and its metrics.

    Lines and charts without a finite value are left out.
    """
    ticks = _by_step(run_dir / "stats.jsonl")
    if not ticks:
        raise ValueError(
            f"{run_dir} holds no statistics (stats.jsonl): expected a run directory, such as runs/mine/00000-..., that "
            "has trained for a step."
        )
    lines = list(ticks.values())
    for before, line in zip([{"step": -1}, *lines], lines, strict=False):
        counts = (entry.get("nonfinite") for entry in line.values() if isinstance(entry, dict))
        num_nonfinite = sum(count for count in counts if type(count) is int)
        wait = _value(line, "timing/data_wait_sec") / (line["step"] - before["step"])
        line |= {"nonfinite": {"mean": num_nonfinite}, "wait": {"mean": wait}}
    specs = charts_of(read_object(run_dir / "options.json").get("system"))
    names = dict.fromkeys(name for line in lines for name in line)
    charts = {}
    known = {name for spec in specs for name in spec.values}
    for spec in (*specs, *_loss_charts(names, known), *CHARTS):
        drawn = {
            label: {step: _value(line, name) for step, line in ticks.items() if name in line}
            for name, label in spec.values.items()
        }
        _add_chart(charts, spec, drawn)
    for path in sorted(run_dir.glob("metric-*.jsonl")):
        results = {step: metric_values(line) for step, line in _by_step(path).items()}
        labels = dict.fromkeys(label for values in results.values() for label in values)
        drawn = {
            label: {step: values[label] for step, values in results.items() if label in values} for label in labels
        }
        _add_chart(charts, ChartSpec(path.stem, {}, log=True), drawn)
    return charts


def charts_of(system: object) -> tuple[ChartSpec, ...]:
    """Return the charts that a system defines for its statistics; empty for an unknown system."""
    if not isinstance(system, str) or system not in registry.SYSTEMS:
        return ()
    return registry.resolve(registry.spec(system).system).charts


def _loss_charts(names: Iterable[str], known: Collection[str]) -> list[ChartSpec]:
    """Return a chart for each loss that is not in `known`; a validation loss joins the chart of its training loss."""
    losses = [name for name in names if name.startswith(("loss/", "validation/")) and name not in known]
    return [
        ChartSpec(loss, {f"loss/{loss}": "train", f"validation/{loss}": "validation"}, log=True)
        for loss in dict.fromkeys(name.partition("/")[2] for name in losses)
    ]


def _by_step(path: Path) -> dict[int, dict[str, Any]]:
    """Return the lines of a log file by ascending step; the last one wins where a step occurs twice."""
    lines = {line["step"]: line for line in read_lines(path, step=int) if line["step"] >= 0}
    return dict(sorted(lines.items()))


def _add_chart(charts: dict[str, Chart], spec: ChartSpec, drawn: Mapping[str, Mapping[int, float]]) -> None:
    """Add a chart of the lines, label -> step -> value, that have at least one finite value."""
    lines = [
        Line(label, list(points), list(points.values()))
        for label, points in drawn.items()
        if np.isfinite(list(points.values())).any()
    ]
    if lines:
        charts[spec.title] = Chart(spec.title, tuple(lines), spec.log, spec.guide, spec.limits, spec.exact)


def _value(line: Mapping[str, Any], name: str) -> float:
    """Return the mean of a statistic in a line of stats.jsonl, NaN if absent."""
    entry = line.get(name)
    mean = entry.get("mean") if isinstance(entry, dict) else None
    is_known = mean != 0 or name != "timing/sec_per_step"  # the first tick precedes any step
    return float(mean) if isinstance(mean, int | float) and is_known else math.nan


def _short_names(run_dirs: Sequence[Path]) -> list[str]:
    """Return short names of the runs: their numbers, with parent folders if these repeat, or paths if both repeat."""
    paths = [run_dir.resolve() for run_dir in run_dirs]
    numbers = [path.name.partition("-")[0] for path in paths]
    for names in (numbers, [f"{path.parent.name}/{number}" for path, number in zip(paths, numbers, strict=True)]):
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _describe_run(name: str, run_dir: Path) -> str:
    """Return the progress of a run, in one line."""
    *_, last = _by_step(run_dir / "stats.jsonl").values()
    options = read_object(run_dir / "options.json")
    steps = f" of {options['steps']}" if "steps" in options else ""
    total_sec, when = _value(last, "timing/total_sec"), last.get("timestamp")
    parts = [
        *([options["system"]] if "system" in options else []),
        f"step {last['step']}{steps}",
        *([f"trained {format_time(total_sec)}"] if math.isfinite(total_sec) else []),
        *([time.strftime("%Y-%m-%d %H:%M", time.localtime(when))] if type(when) is float and 0 < when < 1e11 else []),
    ]
    return f"{name}:  {', '.join(parts)}"


@click.command(help=str(__doc__).replace("# ", "\b\n"))
@click.argument("run_dirs", metavar="RUN_DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", help="Image to write  [default: curves.png in the run directory]", type=click.Path(path_type=Path)
)
def main(run_dirs: tuple[Path, ...], out: Path | None) -> None:
    """Draw the curves; the help text is the module's docstring."""
    try:
        click.echo(draw_curves(run_dirs, out))
    except ValueError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
