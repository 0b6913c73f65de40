"""Print a table of all values of metrics with their errors, and draw it with their curves to one page.

\b
python -m metrics.report results.jsonl
python -m metrics.report results.jsonl --out report.html
python -m metrics.report mine.jsonl theirs.jsonl runs/lres/00000-*/metric-*.jsonl --out report.png

RESULTS are files of JSON lines as calc_metrics.py and training write them, or one JSON object of results by name. Of
several files the curves share their charts. Of results of one metric with a step each, as training leaves them, the
values are drawn over the steps, and the last one stands in the table. Charts need matplotlib: pip install
'longtake[plots]'.
"""

import base64
import dataclasses
import html
import io
import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dnnlib.util import atomic_path
from training.charts import (
    AXIS,
    COLOURS,
    DPI,
    EDGE,
    FAINT_INK,
    GRID,
    INK,
    Chart,
    Line,
    MissingMatplotlib,
    make_figure,
    short_number,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW_HEIGHT = 0.24  # of the table, in inches
COLUMNS = (0.0, 0.2, 0.39, 0.51, 0.62, 0.73)  # where those of the table begin, and its strips, as shares of its width
HEADINGS = ("measure", "of", "value", "real reference", "real / generated")
STRIP_ROOM = 0.03  # share of the strip that stays free at either end
REAL, GENERATED = "real", "generated"  # what the lines of a result are called
REAL_COLOUR = "#6b7280"


@dataclasses.dataclass(frozen=True)
class Row:
    """A value of the table. `floor` is what real video gives, or reaches by chance; facts are not drawn on a strip."""

    name: str
    label: str  # of the file
    value: float
    error: float | None
    floor: float | None
    counts: str
    colour: str
    is_fact: bool = False


@dataclasses.dataclass(frozen=True)
class Report:
    """All that is drawn."""

    labels: list[str]  # of the files
    charts: list[Chart]
    rows: list[Row]
    warnings: list[str]
    details: dict[str, Any]  # how each result was measured


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the results in a file of JSON lines, or in one JSON object of results by name, in order.

    Raises `ValueError` where a line is not JSON or not a result.
    """
    text = path.read_text()
    try:
        found = [json.loads(text)]
    except json.JSONDecodeError:
        found = []
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                found += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} of {path} is not JSON ({error}): remove it") from error
    if len(found) == 1 and isinstance(found[0], dict) and "results" not in found[0]:
        found = list(found[0].values())
    if not found or not all(isinstance(item, dict) and ("results" in item or "error" in item) for item in found):
        raise ValueError(f"{path} does not hold results of metrics: give a file that calc_metrics.py --path wrote")
    return [item for item in found if "results" in item]


def collect(files: dict[str, list[dict[str, Any]]]) -> Report:
    """Return what to draw of the results of each labelled file."""
    charts: dict[str, Chart] = {}
    rows: list[Row] = []
    warnings: dict[str, list[str]] = {}
    details: dict[str, Any] = {}
    for number, (label, results) in enumerate(files.items()):
        colour = COLOURS[number % len(COLOURS)]
        latest: dict[str, dict[str, Any]] = {str(result.get("metric", i)): result for i, result in enumerate(results)}
        for name, result in latest.items():
            rows += _rows(result, label, colour)
            for drawn in result.get("curves", []):
                _add_curve(charts, drawn, label if len(files) > 1 else None, colour)
            for warning in result.get("warnings", [result["warning"]] if "warning" in result else []):
                warnings.setdefault(warning, []).append(label)
            details[f"{label}: {name}"] = {key: result[key] for key in result if key not in ("curves", "results")}
        _add_steps(charts, results, label, colour)
    order = {row.name: i for i, row in reversed(list(enumerate(rows)))}
    rows.sort(key=lambda row: order[row.name])
    said = [f"{', '.join(dict.fromkeys(whose))}: {warning}." for warning, whose in warnings.items()]
    return Report(list(files), list(charts.values()), rows, said, details)


def _rows(result: dict[str, Any], label: str, colour: str) -> list[Row]:
    counts = f"{result['num_real']} / {result['num_fake']}" if "num_fake" in result else ""
    errors, floors, facts, baselines = (result.get(key, {}) for key in ("errors", "floors", "facts", "baselines"))
    rows = []
    for name, value in {**result["results"], **facts}.items():
        if isinstance(value, int | float):
            rows.append(Row(name, label, value, errors.get(name), floors.get(name), counts, colour, name in facts))
    for what, values in baselines.items():
        rows += [Row(name, what, value, None, None, "", REAL_COLOUR) for name, value in values.items()]
    return rows


def _add_curve(charts: dict[str, Chart], drawn: dict[str, Any], label: str | None, colour: str) -> None:
    """Add the lines of one result to the chart of their title; with a label, generated ones are called by it."""
    old = charts.get(drawn["title"])
    lines = list(old.lines) if old else []
    for line in drawn["lines"]:
        name = what = line["label"]
        is_shared = any(list(other.y) == line["y"] and other.label.split(" (")[0] == what for other in lines)
        if what != GENERATED and is_shared:
            continue  # files of one dataset share its curves
        if label is not None and what == GENERATED:
            name = label
        elif label is not None and (what != REAL or old):
            name = f"{what} ({label})"
        own = {REAL: REAL_COLOUR, GENERATED: colour}
        shade = COLOURS[-1 - len(lines) % (len(COLOURS) - 1)]
        lines.append(Line(name, line["x"], line["y"], line.get("band"), own.get(what, shade)))
    lines.sort(key=lambda line: line.colour == REAL_COLOUR)
    limits = drawn.get("limits")
    charts[drawn["title"]] = Chart(
        drawn["title"],
        tuple(lines),
        limits=(limits[0], limits[1]) if limits else None,
        guide=drawn.get("guide"),
        exact=True,
        x_name=drawn["x_name"] + (f"; shade: {drawn['band']}" if "band" in drawn else ""),
        log_x=drawn.get("log_x", False),
    )


def _add_steps(charts: dict[str, Chart], results: Sequence[dict[str, Any]], label: str, colour: str) -> None:
    """Add a line over steps, with a band of errors, for each value of which there are several."""
    points: dict[str, dict[int, tuple[float, float]]] = {}
    for result in results:
        for name, value in result["results"].items():
            if "step" in result and isinstance(value, int | float):
                error = result.get("errors", {}).get(name)
                points.setdefault(name, {})[result["step"]] = (value, math.nan if error is None else error)
    for name, values in points.items():
        if len(values) > 1:
            steps = sorted(values)
            drawn, errors = zip(*(values[step] for step in steps), strict=True)
            lines = charts[name].lines if name in charts else ()
            line = Line(label, steps, drawn, errors, colour)
            charts[name] = Chart(name, (*lines, line), log=True, exact=True)


# ----------------------------------------------------------------------------
# As a picture.


def draw_report(report: Report, title: str) -> "Figure":
    """Return a figure of the charts above and the table below. Raises `MissingMatplotlib` without matplotlib."""
    warnings = [line for warning in report.warnings for line in textwrap.wrap(warning, 190)]
    num_lines = len(report.rows) + len(warnings) + 2
    height = num_lines * ROW_HEIGHT
    figure = make_figure(report.charts, title, subtitle(report), below=height)
    width, whole = figure.get_size_inches()
    axes = figure.add_axes((2 * EDGE / width, 0, 1 - 4 * EDGE / width, height / whole))
    axes.set(xlim=(0, 1), ylim=(num_lines, 0))
    axes.axis("off")

    def write(x: float, y: float, text: str, colour: str) -> None:
        axes.text(x, y + 0.5, text, color=colour, fontsize=8, va="center", parse_math=False)

    for x, text in zip(COLUMNS, HEADINGS, strict=False):
        write(x, 0, text, FAINT_INK)
    reaches = strip_reaches(report.rows)
    for y, (row, texts) in enumerate(table_rows(report.rows), start=1):
        if texts[0]:
            axes.plot([0, 1], [y, y], color=GRID, linewidth=0.8)
        for index, (x, text) in enumerate(zip(COLUMNS, texts, strict=False)):
            write(x, y, text, INK if index in (0, 2) else FAINT_INK)
        _draw_strip(axes, row, reaches[row.name], y + 0.5)
    for number, warning in enumerate(warnings):
        write(0, len(report.rows) + 1.5 + number, warning, FAINT_INK)
    return figure


def _draw_strip(axes: "Axes", row: Row, reach: tuple[float, float], y: float) -> None:
    """Draw a value as a dot, its error as a line, the reference as a stroke across."""
    places = strip_places(row, reach)
    if places is None:
        return
    left = COLUMNS[-1]
    low, value, high, floor, zero = (left + place * (1 - left) for place in places)
    axes.plot([left, 1], [y, y], color=GRID, linewidth=0.8)
    axes.plot([zero, zero], [y - 0.2, y + 0.2], color=AXIS, linewidth=0.8)
    if row.floor is not None:
        axes.plot([floor, floor], [y - 0.3, y + 0.3], color=REAL_COLOUR, linewidth=1.6)
    axes.plot([low, high], [y, y], color=row.colour, linewidth=2)
    axes.plot([value], [y], "o", color=row.colour, markersize=5)


# ----------------------------------------------------------------------------
# The table.


def table_rows(rows: Sequence[Row]) -> list[tuple[Row, tuple[str, ...]]]:
    """Return each row with its texts; the name of a measure stands at the first of its rows."""
    texts, previous = [], None
    for row in rows:
        value = short_number(row.value) + (f" \u00b1 {short_number(row.error)}" if row.error is not None else "")
        floor = "" if row.floor is None else short_number(row.floor)
        texts.append((row, (row.name if row.name != previous else "", row.label, value, floor, row.counts)))
        previous = row.name
    return texts


def strip_reaches(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Return the least and the greatest value on the strips of each measure, zero among them."""
    reaches: dict[str, tuple[float, float]] = {}
    for row in rows:
        error = row.error or 0.0
        shown = [row.value - error, row.value + error, row.floor or 0.0, 0.0, *reaches.get(row.name, ())]
        shown = [value for value in shown if math.isfinite(value)]
        reaches[row.name] = (min(shown), max(shown))
    return reaches


def strip_places(row: Row, reach: tuple[float, float]) -> tuple[float, ...] | None:
    """Return where on the strip, from 0 to 1, error, value, end of the error, reference and zero are."""
    low, high = reach
    if row.is_fact or high == low or not math.isfinite(row.value):
        return None
    error = row.error or 0.0
    values = (row.value - error, row.value, row.value + error, row.floor or 0.0, 0.0)
    return tuple(STRIP_ROOM + (1 - 2 * STRIP_ROOM) * (value - low) / (high - low) for value in values)


def report_text(report: Report) -> str:
    """Return the table, in columns of equal width, and the warnings as text."""
    lines = [HEADINGS, *(texts for _, texts in table_rows(report.rows))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n".join([*table, *report.warnings])


def subtitle(report: Report) -> str:
    """Return whose results these are, and what the marks mean."""
    whose = f"{report.labels[0]}. " if len(report.labels) == 1 else ""
    return f"{whose}Errors are standard errors over videos; the grey stroke is what real video gives."


# ----------------------------------------------------------------------------
# As a page.


def write_html(report: Report, title: str, figure: "Figure | None") -> str:
    """Return one HTML file with everything in it: the figure, if there is one, the table as text, and the details."""
    picture = io.BytesIO()
    if figure is not None:
        figure.savefig(picture, dpi=DPI, format="png")
    details = "".join(
        f"<details><summary>{html.escape(name)}</summary><pre>{html.escape(text)}</pre></details>"
        for name, text in ((name, json.dumps(value, indent=2)) for name, value in report.details.items())
    )
    name = html.escape(title)
    encoded = base64.b64encode(picture.getvalue()).decode()
    return PAGE.format(
        title=name,
        heading=f'<img src="data:image/png;base64,{encoded}" alt="{name}">' if encoded else f"<h1>{name}</h1>",
        table=html.escape(report_text(report)),
        details=details,
    )


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1260px; margin: 2rem auto; padding: 0 1.5rem }}
img {{ width: 100% }}
pre {{ font-size: 12px; overflow-x: auto }}
</style></head><body>
{heading}
<h2>Values</h2>
<pre>{table}</pre>
<h2>How it was measured</h2>
{details}
</body></html>
"""


@click.command(help=__doc__)
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--out",
    "output_path",
    help="Page to write: .html, with the pictures inside, or .png",
    type=click.Path(path_type=Path, dir_okay=False),
)
@click.option("--title", help="Headline of the page", default="Metrics of generated video", show_default=True)
def main(results: Sequence[Path], output_path: Path | None, title: str) -> None:
    if output_path is not None and output_path.suffix not in (".html", ".png"):
        raise click.ClickException(f"--out is {output_path}, but a page is drawn as .html or .png: name one of these")
    try:
        report = collect(dict(zip(labels(results), map(read_results, results), strict=True)))
        click.echo(report_text(report))
        if output_path is not None:
            write_report(report, output_path, title)
            click.echo(f"The report is in {output_path}")
    except ValueError as error:
        raise click.ClickException(str(error)) from error


def write_report(report: Report, path: Path, title: str) -> None:
    """Write a report as .png or .html; without matplotlib, a page has no picture, which is said.

    Raises `MissingMatplotlib` for a picture without matplotlib.
    """
    figure = None
    try:
        figure = draw_report(report, title)
    except MissingMatplotlib as error:
        if path.suffix == ".png":
            raise
        click.echo(f"Warning: {path} has no charts, since {error}", err=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        if figure is not None and path.suffix == ".png":
            figure.savefig(temporary, dpi=DPI, format="png")
        else:
            Path(temporary).write_text(write_html(report, title, figure))


def labels(paths: Sequence[Path]) -> list[str]:
    """Return a name for each file: its stem, behind as much of its path as tells it from the others."""
    depth = 1
    while True:
        names = ["/".join((*path.parent.parts[len(path.parent.parts) + 1 - depth :], path.stem)) for path in paths]
        if len(set(names)) == len(names) or depth > max(len(path.parts) for path in paths):
            return names
        depth += 1


if __name__ == "__main__":
    main()
