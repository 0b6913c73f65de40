"""The page of results: what it takes in, what it says, and where its marks lie."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from metrics.report import (
    REAL_COLOUR,
    collect,
    draw_report,
    labels,
    main,
    read_results,
    strip_places,
    strip_reaches,
    table_rows,
    write_html,
)
from training.plot import COLOURS


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


def pixels(image: Image.Image, colour: str) -> int:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(np.asarray(image).astype(int) - wanted).sum(axis=2) < 12).sum())


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
    report = collect({"run": points})
    assert [(line.x, line.y) for line in report.charts[0].lines] == [([10, 20, 30], [5.0, 3.0, 2.0])]
    assert [row.value for row in report.rows] == [2.0]
    assert draw_report(report, "").height > 0


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


def test_the_picture_holds_all_lines_and_marks():
    one, two = (collect(dict(list(FILES.items())[:count])) for count in (1, 2))
    pages = [draw_report(report, "Title") for report in (one, two)]
    assert pages[0].width == pages[1].width and pages[1].height > pages[0].height
    assert pixels(pages[0], COLOURS[0]) > 500 and pixels(pages[0], REAL_COLOUR) > 500
    assert pixels(pages[0], COLOURS[1]) == 0 and pixels(pages[1], COLOURS[1]) > 500


FILES = {"a": [result(1.0)], "b": [result(2.0, slope=2)]}


def test_the_page_holds_its_pictures_and_escapes_what_it_is_given():
    page = write_html(collect({"<a>": [result(1.0)], "b": [result(2.0)]}), "R & D")
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 1 and Image.open(io.BytesIO(base64.b64decode(pictures[0]))).width > 400
    assert "<a>" not in page and "&lt;a&gt;" in page and "R &amp; D" in page
    assert page.count("<svg") == 2 and "http" not in page and "&quot;window&quot;: 16" in page


def test_the_command_writes_both_kinds_of_page(tmp_path: Path):
    source = write(tmp_path / "mine.jsonl", result(1.0))
    for name in ("page.html", "folder/page.png"):
        outcome = CliRunner().invoke(main, [str(source), "--out", str(tmp_path / name)])
        assert outcome.exit_code == 0, outcome.output
        assert "2 values and 1 charts" in outcome.output and (tmp_path / name).stat().st_size > 5000
    refused = CliRunner().invoke(main, [str(source), "--out", str(tmp_path / "page.pdf")])
    assert refused.exit_code == 1 and ".html or .png" in refused.output
    empty = CliRunner().invoke(main, [str(write(tmp_path / "none.jsonl")), "--out", str(tmp_path / "x.png")])
    assert empty.exit_code == 1 and "does not hold results" in empty.output and not (tmp_path / "x.png").exists()


def test_labels_are_as_short_as_they_can_be():
    assert labels([Path("a/x.jsonl"), Path("b/y.jsonl")]) == ["x", "y"]
    assert labels([Path("r/a/x.jsonl"), Path("r/b/x.jsonl")]) == ["a/x", "b/x"]
    assert labels([Path("x.jsonl")]) == ["x"]
