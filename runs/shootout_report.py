"""Write the comparison of systems into a page: tables with errors and floors, curves, and a contact sheet.

python -m runs.shootout_report runs/shootout/results.jsonl --page=docs/results.md --figures=docs/results

The part of the page between its two markers is replaced; a page without them gets it at its end. Charts need
matplotlib: pip install 'longtake[plots]'.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image, ImageDraw

from dnnlib.util import atomic_path
from training import registry
from training.charts import COLOURS, Chart, Line, MissingMatplotlib, draw_charts
from training.side_files import read_lines, read_object

BEGIN, END = "<!-- shootout: begin -->", "<!-- shootout: end -->"
GENERATED, NOVEL = "generated", "generated, novel pairs"  # names of lines in results
REAL_COLOURS = ("#6b7280", "#111827", "#b0b6c0")
LABEL_WIDTH = 116  # pixels of the names beside the contact sheet
SHEET_SCALE = 2

Part = dict[str, Any]


# ----------------------------------------------------------------------------
# Reading.


class Shootout:
    """The parts of a file of results, by system."""

    def __init__(self, path: Path) -> None:
        self.parts = read_lines(path, part=str)
        self.settings = read_object(path.parent / "settings.json")
        self.trained = {p["system"]: p for p in self.parts if p.get("kind") == "train"}  # the last stage of each
        self.systems = list(self.trained)
        if not self.systems:
            raise ValueError(f"{path} has no trained system: run  python -m runs.shootout  first")
        self.costs = {p["system"]: p for p in self.parts if p.get("kind") == "cost"}
        self.lines: dict[str, dict[str, Part]] = {name: {} for name in self.systems}  # system -> metric -> result
        for part in self.parts:
            if part.get("kind") == "measure":
                self.lines[part["system"]] |= {line["metric"]: line for line in part.get("lines", [])}
        self.curves = {
            name: [p for p in self.parts if p.get("kind") == "curve" and p["system"] == name] for name in self.systems
        }

    def colour(self, system: str) -> str:
        """Return the colour of a system in all charts."""
        return COLOURS[self.systems.index(system) % len(COLOURS)]

    def value(self, system: str, key: str) -> tuple[float, float | None, float | None, str] | None:
        """Return value, error, floor and metric of a system's result of that key, None if it has none."""
        for metric, line in self.lines[system].items():
            if key in line["results"]:
                error, floor = line.get("errors", {}).get(key), line.get("floors", {}).get(key)
                return line["results"][key], error, floor, metric
        return None

    def key(self, begin: str, end: str = "") -> str | None:
        """Return the key of results that begins and ends like this, which any system has."""
        keys = [key for lines in self.lines.values() for line in lines.values() for key in line["results"]]
        return next((k for k in keys if k.startswith(begin) and k.endswith(end) and not k.endswith("_jk")), None)


# ----------------------------------------------------------------------------
# Tables.

# Title of a column, beginning and end of the key of its results, whether higher is better (None: nearest to real).
ALONE = (
    ("FVD, 16 frames", "fvd", "_16f", False),
    ("FVD at the end of a long video", "fvd_drift_last", "", False),
    ("motion, grey levels a frame", "motion_energy", "", None),
    ("flat frames", "flat_frames", "", None),
)
PREDICTED = (
    ("FVD with context", "fvd", "_context36", False),
    ("PSNR, dB", "psnr", "f", True),
    ("SSIM", "ssim", "f", True),
    ("LPIPS", "lpips", "f", False),
)
CONTROL = (
    ("there and back, dB", "there_and_back_psnr", "", True),
    ("and its motion", "there_and_back_motion", "", None),
    ("revisits less novel pairs, dB", "revisit_psnr_difference", "", True),
    ("F1 of actions", "action_f1", "", True),
    ("of turns", "action_f1_turn", "", True),
)


def number(value: float | None, error: float | None = None) -> str:
    """Return a value and its error with as many digits as the error allows."""
    if value is None or not math.isfinite(value):
        return ""
    if not value and not error:
        return "0"
    digits = 3 - math.floor(math.log10(max(abs(value), 1e-3))) - 1
    if error:
        digits = min(digits, 1 - math.floor(math.log10(error)))
    digits = max(digits, 0)
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def table(found: Shootout, columns: Sequence[tuple[str, str, str, bool | None]]) -> list[str]:
    """Return a table of results, a row a system; the best of a column is bold, the last row has real video."""
    keys = [found.key(begin, end) for _, begin, end, _ in columns]
    rows: dict[str, list[str]] = {}
    for system in found.systems:
        if any(key and found.value(system, key) for key in keys):
            rows[system] = []
    if not rows:
        return []
    floors, baselines = [], []
    for key, (_, _, _, is_higher) in zip(keys, columns, strict=True):
        values = {system: found.value(system, key) if key else None for system in rows}
        there = {system: value for system, value in values.items() if value is not None}
        best = None
        if there and is_higher is not None:
            best = (max if is_higher else min)(there, key=lambda system: there[system][0])
        for system, value in values.items():
            text = number(value[0], value[1]) if value else ""
            rows[system].append(f"**{text}**" if system == best and len(there) > 1 else text)
        some = next(iter(there.values()), None)
        floors.append(number(some[2]) if some else "")
        baselines.append(number(_still(found, key)) if key else "")
    lines = [f"| | {' | '.join(title for title, *_ in columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {system} | {' | '.join(cells)} |" for system, cells in rows.items()]
    if any(baselines):
        lines.append(f"| last context frame, repeated | {' | '.join(baselines)} |")
    return [*lines, f"| real, or its floor | {' | '.join(floors)} |", ""]


def _still(found: Shootout, key: str) -> float | None:
    """Return what repeating the last context frame gives."""
    for lines in found.lines.values():
        for line in lines.values():
            for what, values in line.get("baselines", {}).items():
                if key in values and "last frame" in what:
                    return values[key]
    return None


def cost_table(found: Shootout) -> list[str]:
    """Return the table of sizes and costs."""
    lines = [
        "| | parameters | steps of a batch | seconds of training | CPU seconds a generated frame |",
        "|---|---|---|---|---|",
    ]
    for system, trained in found.trained.items():
        cost = found.costs.get(system, {})
        lines.append(
            f"| {system} | {trained['parameters'] / 1e6:.2f} M | {trained['step']} of {trained['batch']} | "
            f"{trained['used_sec']:.0f} | {number(cost.get('cpu_sec_per_frame'))} |"
        )
    return [*lines, ""]


def verdict(found: Shootout) -> list[str]:
    """Return sentences that say which system is best by which measure, as far as errors allow."""
    sentences = []
    for title, begin, end, is_higher in (*ALONE, *PREDICTED, *CONTROL):
        key = found.key(begin, end)
        values = {system: found.value(system, key) for system in found.systems} if key else {}
        there = {system: value for system, value in values.items() if value is not None}
        if len(there) < 2 or is_higher is None:
            continue
        ranked = sorted(there, key=lambda system: there[system][0], reverse=is_higher)
        best = there[ranked[0]]
        near = [
            system
            for system in ranked[1:]
            if abs(there[system][0] - best[0]) < 2 * math.hypot(best[1] or 0, there[system][1] or 0)
        ]
        rest = f"; within two standard errors of it: {', '.join(near)}" if near else ""
        still = _still(found, key) if key else None
        if still is not None and (still > best[0]) == is_higher:
            rest += f"; better than all of them is the last context frame, repeated: {number(still)}"
        sentences.append(f"- {title}: **{ranked[0]}**, {number(best[0], best[1])}{rest}.")
    return [*sentences, ""] if sentences else []


# ----------------------------------------------------------------------------
# Charts.


def time_charts(found: Shootout) -> list[Chart]:
    """Return FVD over the time of training."""
    lines, floor = [], None
    for system in found.systems:
        measured = [part for part in found.curves[system] if part["lines"]]
        points = [(part["used_sec"], part["lines"][0]) for part in sorted(measured, key=lambda part: part["used_sec"])]
        if points:
            key = points[0][1]["metric"]
            floor = points[0][1].get("floors", {}).get(key) if floor is None else floor
            values = [line["results"][key] for _, line in points]
            errors = [line.get("errors", {}).get(key, math.nan) for _, line in points]
            lines.append(Line(system, [sec / 60 for sec, _ in points], values, errors, found.colour(system)))
    return [Chart("FVD, 16 frames", tuple(lines), log=True, guide=floor, exact=True, x_name="minutes of training")]


def frame_charts(found: Shootout) -> list[Chart]:
    """Return all curves over frames: generated ones by the name of the system, others once."""
    charts: dict[str, tuple[Mapping[str, Any], list[Line]]] = {}
    for system in found.systems:
        for line in found.lines[system].values():
            for drawn in line.get("curves", []):
                _, lines = charts.setdefault(drawn["title"], (drawn, []))
                for item in drawn["lines"]:
                    if item["label"] == NOVEL:  # too many lines of one colour
                        continue
                    if item["label"].startswith(GENERATED):
                        label = item["label"].replace(GENERATED, system, 1)
                        lines.append(Line(label, item["x"], item["y"], item.get("band"), found.colour(system)))
                    elif item["label"] not in [other.label for other in lines]:
                        shade = REAL_COLOURS[sum(other.colour in REAL_COLOURS for other in lines) % len(REAL_COLOURS)]
                        lines.append(Line(item["label"], item["x"], item["y"], None, shade))
    return [
        Chart(title, tuple(lines), exact=True, x_name=drawn["x_name"], log_x=drawn.get("log_x", False))
        for title, (drawn, lines) in charts.items()
    ]


def contact_sheet(found: Shootout) -> np.ndarray | None:
    """Return the rows of all systems under the recorded one, with names: uint8 (H, W, 3); None without rows."""
    rows = [part for part in found.parts if part.get("kind") in ("real", "cost") and Path(part["sheet"]).is_file()]
    rows.sort(key=lambda part: part["kind"] != "real")
    if not rows:
        return None
    strips = []
    for part in rows:
        strip = np.asarray(Image.open(part["sheet"]).convert("RGB"))
        strip = strip.repeat(SHEET_SCALE, axis=0).repeat(SHEET_SCALE, axis=1)
        label = Image.new("RGB", (LABEL_WIDTH, len(strip)), "white")
        ImageDraw.Draw(label).text((6, len(strip) // 2 - 6), part["system"], fill="black")
        strips.append(np.concatenate([np.asarray(label), strip], axis=1))
    width = min(strip.shape[1] for strip in strips)
    return np.concatenate([strip[:, :width] for strip in strips])


# ----------------------------------------------------------------------------
# The page.


def section(found: Shootout, figures: str) -> str:
    """Return the text between the markers; `figures` is the folder of pictures as the page links to it."""
    s = found.settings
    titles = [registry.spec(system).title for system in found.systems]
    frames = next((part["frames"] for part in found.parts if part.get("kind") == "real"), [])
    cannot = [f"{p['system']} ({p['cannot']})" for p in found.parts if "cannot" in p]
    cannot += [f"{name} (not trained)" for name in s.get("systems", []) if name not in found.trained]
    short = {part["system"]: part["options"] for part in found.parts if part.get("options")}
    lines = [line for lines in found.lines.values() for line in lines.values()]
    kinds = sorted({line.get("precision", "fp32") for line in lines})
    precision = "" if kinds == ["fp32"] else f" Videos that are measured were generated in {' or '.join(kinds)}."
    given = " ".join(f"--{name.replace('_', '-')}={s.get(name)}" for name in ("stages", "clips", "long_clips"))
    options = "".join(f" Clips of 16 frames by {name} have the options {', '.join(short[name])}." for name in short)
    text = [
        BEGIN, "", "## Five systems, one dataset, one budget" if len(titles) == 5 else "## Systems at one budget", "",
        f"Each system has about five million parameters (preset `{s.get('preset')}`), one training of "
        f"{s.get('budget_sec', 0) / 60:.3g} minutes ({'CPU time' if s.get('device') == 'cpu' else 'of a GPU'}) on the "
        f"same clips, and the same measurements, with {s.get('clips')} clips of 16 frames and {s.get('long_clips')} "
        f"long ones of {s.get('frames')} frames a side. All but LongVideoGAN share one tokenizer of frames "
        "(48x64 to 6x8 codes of 512), trained for as long; systems of latents read them before quantization. "
        f"± is the standard error.{precision}{options}", "", *cost_table(found),
        f"![A video of each system]({figures}/shootout-sheet.png)", "",
        f"Frames {', '.join(map(str, frames))} after a context of 36; above the recorded ones. Systems without a "
        "context begin anywhere.", "", "### Videos by themselves", "", *table(found, ALONE),
        "Systems that continue videos were given real context frames, and those that follow actions the recorded "
        "ones, so that the first column favours them.", "", "### Prediction, `labdoom-36to264`", "",
        *table(found, PREDICTED), "### Memory and control", "", *table(found, CONTROL),
        *([f"Not measured: {'; '.join(cannot)}.", ""] if cannot else []),
        f"![FVD over time]({figures}/shootout-time.png)", "", f"![Over frames]({figures}/shootout-frames.png)", "",
        "### Which is best", "", *verdict(found),
        "What this does not show: how they compare at published sizes, with longer training, or on other footage; each "
        "was trained once, so that differences between seeds are not in the errors, and no preset was tuned beyond "
        "its first setting.", "", f'Repeat it: `OPTIONS="{given}" bash runs/shootout.sh`', "", END,
    ]  # fmt: skip
    return "\n".join(text)


def replace_section(page: str, text: str) -> str:
    """Return a page whose part between the markers is `text`; it is at the end of a page without them."""
    before, found, rest = page.partition(BEGIN)
    if not found:
        return f"{page.rstrip()}\n\n{text}\n" if page.strip() else f"# Results\n\n{text}\n"
    _, closed, after = rest.partition(END)
    if not closed:
        raise ValueError(f"the page has {BEGIN} without {END} after it: put it where the part ends")
    return before + text + after


@click.command(help=str(__doc__))
@click.argument("results", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--page",
    help="Page to write into",
    default="docs/results.md",
    show_default=True,
    type=click.Path(dir_okay=False, path_type=Path),
)
@click.option(
    "--figures",
    help="Folder of its pictures",
    default="docs/results",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
)
def main(results: Path, page: Path, figures: Path) -> None:
    """See the module's docstring."""
    try:
        found = Shootout(results)
        figures.mkdir(parents=True, exist_ok=True)
        sheet = contact_sheet(found)
        if sheet is not None:
            with atomic_path(figures / "shootout-sheet.png") as path:
                Image.fromarray(sheet).save(path, "png")
        draw_charts(time_charts(found), figures / "shootout-time.png", "Over the time of training")
        draw_charts(frame_charts(found), figures / "shootout-frames.png", "Over frames")
        text = section(found, os.path.relpath(figures, page.parent))
        whole = replace_section(page.read_text() if page.exists() else "", text)
    except (MissingMatplotlib, ValueError) as error:
        raise click.ClickException(str(error)) from error
    with atomic_path(page) as path:
        path.write_text(whole)
    click.echo(f"Written: {page} and {figures}; settings {json.dumps(found.settings)}")


if __name__ == "__main__":
    main()
