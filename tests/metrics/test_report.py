"""The results page: accepted inputs, its text, and the positions of its marks."""

import base64
import html
import io
import json
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from metrics.report import (
    COLUMNS,
    HEADINGS,
    REAL_COLOUR,
    collect,
    draw_report,
    labels,
    main,
    read_results,
    report_text,
    strip_places,
    strip_reaches,
    table_rows,
    write_html,
)
from training.charts import COLOURS, MissingMatplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def result(value: float, slope: float = 1.0, **facts: Any) -> dict[str, Any]:
    lines = [
        {"label": "generated", "x": [0, 1, 2], "y": [0, slope, 2 * slope], "band": [0.1, 0.1, 0.1]},
        {"label": "real", "x": [0, 1, 2], "y": [0, 1, 2]},
    ]
    return {
        "metric": "gap",
        "results": {"gap": value},
        "errors": {"gap": 0.25},
        "floors": {"gap": 0.5},
        "facts": {"period": 8},
        "curves": [{"title": "Gap", "x_name": "lag", "lines": lines, "band": "std", "log_x": False}],
        "num_real": 7,
        "num_fake": 9,
        "protocol": {"window": 16},
        **facts,
    }


def write(path: Path, *results: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in results))
    return path


def test_lines_and_objects_of_results_are_read(tmp_path: Path):
    lines = write(tmp_path / "a.jsonl", result(1.0), {"metric": "b", "error": "no GPU"}, result(2.0))
    assert [item["results"]["gap"] for item in read_results(lines)] == [1.0, 2.0]
    by_name = tmp_path / "b.json"
    by_name.write_text(json.dumps({"gap": result(3.0)}, indent=1))
    assert read_results(by_name)[0]["results"] == {"gap": 3.0}
    assert len(read_results(write(tmp_path / "c.jsonl", result(1.0)))) == 1


@pytest.mark.parametrize(
    "text,message",
    [("{}\nnot json\n", "line 2 of .* is not JSON"), ("[1, 2]\n", "does not hold results"), ("", "hold")],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path / "x.jsonl")


def test_files_share_charts_and_the_curve_of_real_video():
    report = collect({"mine": [result(1.0)], "theirs": [result(2.0, slope=2)]})
    assert [(line.label, line.colour) for line in report.charts[0].lines] == [
        ("mine", COLOURS[0]),
        ("theirs", COLOURS[1]),
        ("real", REAL_COLOUR),
    ]
    assert [(row.name, row.label) for row in report.rows] == [
        *(("gap", label) for label in ("mine", "theirs")),
        *(("period", label) for label in ("mine", "theirs")),
    ]
    alone = collect({"mine": [result(1.0)]})
    assert [line.label for line in alone.charts[0].lines] == ["generated", "real"]


def test_values_over_steps_are_a_chart_and_the_last_is_in_the_table():
    points = [
        {"metric": "fvd", "results": {"fvd": value}, "step": step} for step, value in ((20, 3.0), (10, 5.0), (30, 2.0))
    ]
    points[0]["errors"] = {"fvd": 0.5}
    report = collect({"run": points})
    (line,) = report.charts[0].lines
    assert line.x == [10, 20, 30] and list(line.y) == [5.0, 3.0, 2.0]
    assert line.band == pytest.approx([math.nan, 0.5, math.nan], nan_ok=True)
    assert [row.value for row in report.rows] == [2.0]


def test_the_table_says_value_error_reference_and_counts():
    rows = table_rows(collect({"a": [result(1.5)], "b": [result(2.0)]}).rows)
    assert [texts for _, texts in rows] == [
        ("gap", "a", "1.5 \u00b1 0.25", "0.5", "7 / 9"),
        ("", "b", "2 \u00b1 0.25", "0.5", "7 / 9"),
        ("period", "a", "8", "", "7 / 9"),
        ("", "b", "8", "", "7 / 9"),
    ]


def test_marks_lie_where_their_values_are():
    rows = collect({"a": [result(1.75)], "b": [result(-0.25)]}).rows
    reach = strip_reaches(rows)["gap"]
    assert reach == (-0.5, 2.0)
    assert strip_places(rows[0], reach) == pytest.approx([0.03 + 0.94 * x for x in (0.8, 0.9, 1.0, 0.4, 0.2)])
    assert strip_places(rows[2], (0, 8)) is None  # a fact has no strip


def test_warnings_are_said_once():
    files = {"a": [result(1.0, warning="few videos")], "b": [result(1.0, warnings=["few videos", "pale colours"])]}
    assert collect(files).warnings == ["a, b: few videos.", "b: pale colours."]


def texts_of(axes: "Axes") -> list[str]:
    return [text.get_text() for text in axes.texts if text.get_text()]


def test_the_image_holds_charts_and_the_table():
    report = collect({"a": [result(1.75, warning="few videos")], "b": [result(-0.25)]})
    figure = draw_report(report, "Title")
    chart, table = figure.axes
    assert [text.get_text() for text in figure.texts][0] == "Title"
    legend = chart.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["a  2", "b  2", "real  2"]
    assert chart.get_xlabel() == "lag; shade: std" and len(chart.collections) == 2
    assert texts_of(table)[:9] == [*HEADINGS, "gap", "a", "1.75 \u00b1 0.25", "0.5"]
    assert texts_of(table)[-1] == "a: few videos."
    dots = [line for line in table.lines if line.get_marker() == "o"]
    # On the strip from -0.5 to 2.
    assert [line.get_color() for line in dots] == list(COLOURS[:2])
    left = COLUMNS[-1]
    expected = [left + (1 - left) * (0.03 + 0.94 * place) for place in (0.9, 0.1)]
    assert [np.asarray(line.get_xdata())[0] for line in dots] == pytest.approx(expected)
    assert sum(line.get_color() == REAL_COLOUR for line in table.lines) == 2
    figure.draw_without_rendering()
    inside = table.get_window_extent()
    assert chart.get_tightbbox().y0 > inside.y1  # type: ignore[union-attr]
    assert all(inside.y0 <= text.get_window_extent().y0 for text in table.texts)


def test_a_report_needs_no_charts():
    (table,) = draw_report(collect({"a": [result(1.0, curves=[])]}), "").axes
    assert "gap" in texts_of(table)


def test_the_page_embeds_its_image_and_escapes_text():
    report = collect({"<a>": [result(1.0)], "b": [result(2.0)]})
    page = write_html(report, "R & D", draw_report(report, "R & D"))
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert Image.open(io.BytesIO(base64.b64decode(picture))).width > 1000
    assert "<a>" not in page and "&lt;a&gt;" in page and "R &amp; D" in page
    assert "http" not in page.replace(picture, "") and "&quot;window&quot;: 16" in page
    assert html.escape(report_text(report)) in page


def test_the_text_has_aligned_columns_and_warnings():
    assert report_text(collect({"a": [result(1.5, warning="few videos")], "other": [result(20.0)]})).splitlines() == [
        "measure  of     value       real reference  real / generated",
        "gap      a      1.5 \u00b1 0.25  0.5             7 / 9",
        "         other  20 \u00b1 0.25   0.5             7 / 9",
        "period   a      8                           7 / 9",
        "         other  8                           7 / 9",
        "a: few videos.",
    ]


def test_the_command_prints_the_table_and_writes_both_kinds_of_page(tmp_path: Path):
    source = write(tmp_path / "mine.jsonl", result(1.0))
    for name in ("page.html", "folder/page.png"):
        outcome = CliRunner().invoke(main, [str(source), "--out", str(tmp_path / name)])
        assert outcome.exit_code == 0, outcome.output
        assert "1 \u00b1 0.25" in outcome.output and f"The report is in {tmp_path / name}" in outcome.output
        assert (tmp_path / name).stat().st_size > 5000
    alone = CliRunner().invoke(main, [str(source)])
    assert alone.exit_code == 0 and alone.output == report_text(collect({"mine": [result(1.0)]})) + "\n"
    refused = CliRunner().invoke(main, [str(source), "--out", str(tmp_path / "page.pdf")])
    assert refused.exit_code == 1 and ".html or .png" in refused.output
    empty = CliRunner().invoke(main, [str(write(tmp_path / "none.jsonl")), "--out", str(tmp_path / "x.png")])
    assert empty.exit_code == 1 and "does not hold results" in empty.output and not (tmp_path / "x.png").exists()


def test_without_matplotlib_there_are_still_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    source = write(tmp_path / "mine.jsonl", result(1.0))
    table = report_text(collect({"mine": [result(1.0)]}))
    sentence = "charts need matplotlib: pip install 'longtake[plots]'"
    alone = CliRunner().invoke(main, [str(source)])
    assert alone.exit_code == 0 and alone.output == f"{table}\n"
    picture = CliRunner().invoke(main, [str(source), "--out", str(tmp_path / "x.png")])
    assert picture.exit_code == 1 and picture.output == f"{table}\nError: {sentence}\n"
    path = tmp_path / "x.html"
    page = CliRunner().invoke(main, [str(source), "--out", str(path)])
    assert page.exit_code == 0 and page.stderr == f"Warning: {path} has no charts, since {sentence}\n"
    assert table in path.read_text() and "<img" not in path.read_text() and not (tmp_path / "x.png").exists()
    with pytest.raises(MissingMatplotlib):
        draw_report(collect({"mine": [result(1.0)]}), "")


def test_labels_are_as_short_as_they_can_be():
    assert labels([Path("a/x.jsonl"), Path("b/y.jsonl")]) == ["x", "y"]
    assert labels([Path("r/a/x.jsonl"), Path("r/b/x.jsonl")]) == ["a/x", "b/x"]
    assert labels([Path("x.jsonl")]) == ["x"]
