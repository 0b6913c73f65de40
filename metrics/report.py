"""Draw results of metrics to one page: curves with their bands, and a table of all values with their errors.

\b
python -m metrics.report results.jsonl --out report.html
python -m metrics.report mine.jsonl theirs.jsonl runs/lres/00000-*/metric-*.jsonl --out report.png

RESULTS are files of JSON lines as calc_metrics.py and training write them, or one JSON object of results by name. Of
several files the curves share their charts. Of results of one metric with a step each, as training leaves them, the
values are drawn over the steps, and the last one stands in the table.
"""

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from PIL import Image, ImageDraw, ImageFont

from dnnlib.util import atomic_path
from training.plot import (
    AXIS,
    CHART_SIZE,
    COLOURS,
    EDGE,
    FAINT_INK,
    GRID,
    HEADER_HEIGHT,
    INK,
    PAPER,
    Chart,
    Line,
    draw_charts,
    short_number,
)

SCALE = 2
COLUMNS = 3
ROW_HEIGHT = 24  # of the table, in units of which SCALE make a pixel
STRIP_ROOM = 0.03  # share of the strip that stays free at either end
REAL, GENERATED = "real", "generated"  # what the lines of a result are called
REAL_COLOUR = "#6b7280"


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Report:
    """All that is drawn."""

    labels: list[str]  # of the files
    charts: list[Chart]
    rows: list[Row]
    warnings: list[str]
    details: dict[str, Any]  # how each result was measured


def read_results(path: Path) -> list[dict[str, Any]]:
    """The results in a file of JSON lines, or in one JSON object of results by name, in order.

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
    """What to draw of the results of each labelled file."""
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
        _add_steps(charts, results, label, colour, len(files) == 1)
    order = {row.name: i for i, row in reversed(list(enumerate(rows)))}
    rows.sort(key=lambda row: order[row.name])
    said = [f"{', '.join(dict.fromkeys(whose))}: {warning}." for warning, whose in warnings.items()]
    return Report(list(files), list(charts.values()), rows, said, details)


def _rows(result: dict[str, Any], label: str, colour: str) -> list[Row]:
    counts = f"{result['num_real']} / {result['num_fake']}" if "num_fake" in result else ""
    errors, floors, facts = (result.get(key, {}) for key in ("errors", "floors", "facts"))
    return [
        Row(name, label, value, errors.get(name), floors.get(name), counts, colour, name in facts)
        for name, value in {**result["results"], **facts}.items()
        if isinstance(value, int | float)
    ]


def _add_curve(charts: dict[str, Chart], drawn: dict[str, Any], label: str | None, colour: str) -> None:
    """Add the lines of one result to the chart of their title; with a label, generated ones are called by it."""
    old = charts.get(drawn["title"])
    lines = list(old.lines) if old else []
    for line in drawn["lines"]:
        name, is_real = line["label"], line["label"] == REAL
        if any(is_real and other.colour == REAL_COLOUR and list(other.y) == line["y"] for other in lines):
            continue  # files of one dataset share its curve
        if label is not None:
            name = f"{REAL} ({label})" if is_real and old else name if is_real else label
        shade = line.get("band")
        lines.append(Line(name, line["x"], line["y"], shade, REAL_COLOUR if is_real else colour))
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
        legend=label is None,
    )


def _add_steps(
    charts: dict[str, Chart], results: Sequence[dict[str, Any]], label: str, colour: str, is_alone: bool
) -> None:
    """Add a line over steps for each value of which there are several."""
    points: dict[str, dict[int, float]] = {}
    for result in results:
        for name, value in result["results"].items():
            if "step" in result and isinstance(value, int | float):
                points.setdefault(name, {})[result["step"]] = value
    for name, values in points.items():
        if len(values) > 1:
            steps = sorted(values)
            lines = charts[name].lines if name in charts else ()
            line = Line(label, steps, [values[step] for step in steps], colour=colour)
            charts[name] = Chart(name, (*lines, line), log=True, exact=True, x_name="step", legend=is_alone)


# ----------------------------------------------------------------------------
# As a picture.


def draw_report(report: Report, title: str) -> Image.Image:
    """Charts above, the table below."""
    width = (COLUMNS * CHART_SIZE[0] + 2 * EDGE) * SCALE
    head = draw_charts(report.charts or [BLANK], title, subtitle(report), COLUMNS, SCALE)
    if not report.charts:
        head = head.crop((0, 0, head.width, HEADER_HEIGHT * SCALE))
    table = _draw_table(report)
    page = Image.new("RGB", (width, head.height + table.height), PAPER)
    page.paste(head, (0, 0))
    page.paste(table, (0, head.height))
    pen = ImageDraw.Draw(page)
    font: Any = ImageFont.load_default(12 * SCALE)
    x, y = width - 2 * EDGE * SCALE, 27 * SCALE
    for name, colour in reversed(legend(report)):
        x -= int(pen.textlength(name, font))
        pen.text((x, y), name, INK, font, anchor="lm")
        pen.line([(x - 18 * SCALE, y), (x - 6 * SCALE, y)], colour, 3 * SCALE)
        x -= 34 * SCALE
    return page


def _draw_table(report: Report) -> Image.Image:
    width = COLUMNS * CHART_SIZE[0] + 2 * EDGE
    columns = [2 * EDGE, 270, 470, 610, 740, 850]
    rows = table_rows(report.rows)
    height = (len(rows) + 1) * ROW_HEIGHT + (len(report.warnings) + 2) * EDGE
    image = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
    pen = ImageDraw.Draw(image)
    font: Any = ImageFont.load_default(12 * SCALE)

    def write(x: float, y: float, text: str, colour: str) -> None:
        pen.text((x * SCALE, y * SCALE), text, colour, font, anchor="lm")

    for x, text in zip(columns, HEADINGS, strict=False):
        write(x, ROW_HEIGHT / 2, text, FAINT_INK)
    reaches = strip_reaches(report.rows)
    for number, (row, texts) in enumerate(rows, start=1):
        y = (number + 0.5) * ROW_HEIGHT
        if texts[0]:
            rule = number * ROW_HEIGHT * SCALE
            pen.line([(columns[0] * SCALE, rule), ((width - 2 * EDGE) * SCALE, rule)], GRID, SCALE)
        for index, (x, text) in enumerate(zip(columns, texts, strict=False)):
            write(x, y, text, INK if index in (0, 2) else FAINT_INK)
        _draw_strip(pen, row, reaches[row.name], (columns[5], width - 2 * EDGE), y)
    for number, warning in enumerate(report.warnings):
        write(columns[0], (len(rows) + 1) * ROW_HEIGHT + (number + 1) * EDGE, warning, FAINT_INK)
    return image


def _draw_strip(
    pen: ImageDraw.ImageDraw, row: Row, reach: tuple[float, float], columns: tuple[float, float], y: float
) -> None:
    """A value as a dot, its error as a line, the reference as a stroke across."""
    places = strip_places(row, reach)
    if places is None:
        return
    x = [(columns[0] + place * (columns[1] - columns[0])) * SCALE for place in places]
    y *= SCALE
    pen.line([(columns[0] * SCALE, y), (columns[1] * SCALE, y)], GRID, SCALE)
    pen.line([(x[4], y - 5 * SCALE), (x[4], y + 5 * SCALE)], AXIS, SCALE)
    if row.floor is not None:
        pen.line([(x[3], y - 7 * SCALE), (x[3], y + 7 * SCALE)], REAL_COLOUR, 2 * SCALE)
    pen.line([(x[0], y), (x[2], y)], row.colour, 3 * SCALE)
    pen.circle((x[1], y), 4 * SCALE, fill=row.colour)


# ----------------------------------------------------------------------------
# The table.


def table_rows(rows: Sequence[Row]) -> list[tuple[Row, tuple[str, ...]]]:
    """Each row with its texts; the name of a measure stands at the first of its rows."""
    texts, previous = [], None
    for row in rows:
        value = short_number(row.value) + (f" \u00b1 {short_number(row.error)}" if row.error is not None else "")
        floor = "" if row.floor is None else short_number(row.floor)
        texts.append((row, (row.name if row.name != previous else "", row.label, value, floor, row.counts)))
        previous = row.name
    return texts


def strip_reaches(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """The least and the greatest value on the strips of each measure, zero among them."""
    reaches: dict[str, tuple[float, float]] = {}
    for row in rows:
        error = row.error or 0.0
        shown = [row.value - error, row.value + error, row.floor or 0.0, 0.0, *reaches.get(row.name, ())]
        shown = [value for value in shown if math.isfinite(value)]
        reaches[row.name] = (min(shown), max(shown))
    return reaches


def strip_places(row: Row, reach: tuple[float, float]) -> tuple[float, ...] | None:
    """Where on the strip, from 0 to 1, the error begins, the value is, the error ends, the reference and zero are."""
    low, high = reach
    if row.is_fact or high == low or not math.isfinite(row.value):
        return None
    error = row.error or 0.0
    values = (row.value - error, row.value, row.value + error, row.floor or 0.0, 0.0)
    return tuple(STRIP_ROOM + (1 - 2 * STRIP_ROOM) * (value - low) / (high - low) for value in values)


def legend(report: Report) -> list[tuple[str, str]]:
    """Name and colour of each file where there are several, and of real video."""
    if len(report.labels) == 1:
        return []
    return [*((label, COLOURS[i % len(COLOURS)]) for i, label in enumerate(report.labels)), (REAL, REAL_COLOUR)]


def subtitle(report: Report) -> str:
    """Whose results these are, and what the marks mean."""
    whose = f"{report.labels[0]}. " if len(report.labels) == 1 else ""
    return f"{whose}Errors are standard errors over videos; the grey stroke is what real video gives."


# ----------------------------------------------------------------------------
# As a page.


def write_html(report: Report, title: str) -> str:
    """One HTML file with everything in it."""
    figures = "\n".join(f'<img src="{_embedded(chart)}" alt="{html.escape(chart.title)}">' for chart in report.charts)
    reaches = strip_reaches(report.rows)
    lines = []
    for row, texts in table_rows(report.rows):
        cells = "".join(f"<td>{html.escape(text)}</td>" for text in texts)
        kind = ' class="first"' if texts[0] else ""
        lines.append(f"<tr{kind}>{cells}<td>{_strip_svg(row, reaches[row.name])}</td></tr>")
    headings = "".join(f"<th>{heading}</th>" for heading in HEADINGS)
    warnings = "".join(f"<li>{html.escape(warning)}</li>" for warning in report.warnings)
    details = "".join(
        f"<details><summary>{html.escape(name)}</summary><pre>{html.escape(text)}</pre></details>"
        for name, text in ((name, json.dumps(value, indent=2)) for name, value in report.details.items())
    )
    return PAGE.format(
        title=html.escape(title),
        subtitle=html.escape(subtitle(report)),
        legend="".join(
            f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>' for name, colour in legend(report)
        ),
        figures=figures,
        headings=headings,
        rows="\n".join(lines),
        warnings=f"<ul>{warnings}</ul>" if warnings else "",
        details=details,
        ink=INK,
        faint=FAINT_INK,
        grid=GRID,
        paper=PAPER,
        width=CHART_SIZE[0],
    )


def _embedded(chart: Chart) -> str:
    picture = draw_charts([chart], scale=SCALE, columns=1)
    picture = picture.crop((EDGE * SCALE, HEADER_HEIGHT * SCALE, picture.width - EDGE * SCALE, picture.height))
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _strip_svg(row: Row, reach: tuple[float, float]) -> str:
    places = strip_places(row, reach)
    if places is None:
        return ""
    low, value, high, floor, zero = (f"{300 * place:.1f}" for place in places)
    stroke = f'<path d="M{floor} 3V19" stroke="{REAL_COLOUR}" stroke-width="2"/>' if row.floor is not None else ""
    return (
        f'<svg width="300" height="22"><path d="M0 11H300" stroke="{GRID}"/><path d="M{zero} 6V16" stroke="{AXIS}"/>'
        f'{stroke}<path d="M{low} 11H{high}" stroke="{row.colour}" stroke-width="3"/>'
        f'<circle cx="{value}" cy="11" r="4" fill="{row.colour}"/></svg>'
    )


HEADINGS = ("measure", "of", "value", "real reference", "real / generated", "")
BLANK = Chart("", (Line("", [0, 1], [0, 1]),))
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: {ink}; background: {paper} }}
body {{ max-width: 1260px; margin: 2rem auto; padding: 0 1.5rem }}
h1 {{ font-size: 1.5rem; margin: 0 }}
p, th, ul, summary {{ color: {faint} }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax({width}px, 1fr)) }}
.charts {{ gap: 1rem; margin: 1.5rem 0 }}
.charts img {{ width: 100%; max-width: {width}px }}
.legend span {{ margin-right: 1.5rem; white-space: nowrap }}
.legend i {{ display: inline-block; width: 18px; height: 4px; margin-right: .5rem; vertical-align: middle }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }}
th {{ text-align: left; font-weight: normal }}
td, th {{ padding: .15rem .8rem .15rem 0; white-space: nowrap }}
td:nth-child(2), td:nth-child(4), td:nth-child(5) {{ color: {faint} }}
tr.first td {{ border-top: 1px solid {grid} }}
svg {{ display: block }}
pre {{ font-size: 12px; overflow-x: auto }}
</style></head><body>
<h1>{title}</h1><p>{subtitle}</p>
<div class="legend">{legend}</div>
<div class="charts">{figures}</div>
<div class="wide"><table><thead><tr>{headings}</tr></thead><tbody>
{rows}
</tbody></table></div>
{warnings}
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
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
)
@click.option("--title", help="Headline of the page", default="Metrics of generated video", show_default=True)
def main(results: Sequence[Path], output_path: Path, title: str) -> None:
    if output_path.suffix not in (".html", ".png"):
        raise click.ClickException(f"--out is {output_path}, but a page is drawn as .html or .png: name one of these")
    try:
        report = collect(dict(zip(labels(results), map(read_results, results), strict=True)))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    output_path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(output_path) as temporary:
        if output_path.suffix == ".png":
            draw_report(report, title).save(temporary, "png")
        else:
            Path(temporary).write_text(write_html(report, title))
    click.echo(f"{len(report.rows)} values and {len(report.charts)} charts are in {output_path}")


def labels(paths: Sequence[Path]) -> list[str]:
    """A name for each file: its stem, behind as much of its path as tells it from the others."""
    depth = 1
    while True:
        names = ["/".join((*path.parent.parts[len(path.parent.parts) + 1 - depth :], path.stem)) for path in paths]
        if len(set(names)) == len(names) or depth > max(len(path.parts) for path in paths):
            return names
        depth += 1


if __name__ == "__main__":
    main()
