"""The page of the comparison holds the numbers that were measured, and is rebuilt without leaving the old ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from runs import shootout_report
from runs.shootout_report import BEGIN, END, Shootout, number, replace_section


def line(metric: str, values: dict[str, float], curves: Any = (), **more: Any) -> dict[str, Any]:
    return {
        "metric": metric, "results": values, "errors": {key: 0.1 * value for key, value in values.items()},
        "floors": {key: 0.5 * value for key, value in values.items()}, "curves": list(curves), **more,
    }  # fmt: skip


def write_results(folder: Path) -> Path:
    """Write results of TECO, which is better where it can be, and of TATS."""
    folder.mkdir(parents=True)
    curve = {"title": "PSNR (dB) over time", "x_name": "frame", "lines": [
        {"label": "generated", "x": [1, 2], "y": [20.0, 18.0], "band": [1.0, 1.0]},
        {"label": "copy of the last frame", "x": [1, 2], "y": [19.0, 12.0]}]}  # fmt: skip
    parts: list[dict[str, Any]] = []
    for name, fvd, size in (("teco", 300.0, 5_039_000), ("tats", 800.0, 5_198_000)):
        for stage in (1, 2):
            trained = {"kind": "train", "system": name, "step": 50 * stage, "used_sec": 60.0 * stage}
            parts.append({"part": f"{name}-{stage}", **trained, "parameters": size, "batch": 4, "network": "x"})
            lines = [line("fvd8_16f", {"fvd8_16f": 2 * fvd / stage})]
            options = ["steps=8"] if name == "tats" else []
            parts.append(
                {"part": f"{name}-{stage}-curve", **trained, "kind": "curve", "options": options, "lines": lines}
            )
        still = {"copy of the last frame": {"fvd8_16f": 120.0}}
        lines = [line("fvd8_16f", {"fvd8_16f": fvd, "fvd8_16f_jk": 1.0}, baselines=still)]
        lines.append(line("motion_energy", {"motion_energy": 3.0}))
        parts.append({"part": f"{name}-alone", "kind": "measure", "system": name, "protocol": "lvg", "lines": lines})
        sheet = folder / f"{name}.png"
        Image.fromarray(np.full((48, 128, 3), len(parts), np.uint8)).save(sheet)
        cost = {"cpu_sec_per_frame": 0.0123, "frames": 32, "sheet": str(sheet)}
        parts.append({"part": f"{name}-sample", "kind": "cost", "system": name, **cost})
    psnr = line("psnr8_32f", {"psnr8_32f": 18.25}, [curve], baselines={"copy of the last frame": {"psnr8_32f": 12.5}})
    parts.append({"part": "teco-protocol", "kind": "measure", "system": "teco", "protocol": "x", "lines": [psnr]})
    parts.append({"part": "tats-protocol", "kind": "measure", "system": "tats", "cannot": "it continues no videos"})
    settings = {"preset": "shootout", "budget_sec": 120.0, "device": "cpu", "systems": ["teco", "tats", "river"]}
    (folder / "settings.json").write_text(json.dumps(settings))
    path = folder / "results.jsonl"
    path.write_text("".join(json.dumps(part) + "\n" for part in parts))
    return path


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [(612.34, 23.4, "612 ± 23"), (0.01234, None, "0.0123"), (18.246, 0.14, "18.2 ± 0.1"), (0.0, 0.0, "0")],
)
def test_numbers_have_as_many_digits_as_their_error_allows(value, error, text):
    assert number(value, error) == text
    assert number(None) == number(float("nan")) == ""


def test_the_page_holds_what_was_measured_and_is_replaced(tmp_path: Path):
    results, page, figures = write_results(tmp_path / "out"), tmp_path / "docs" / "results.md", tmp_path / "docs" / "x"
    page.parent.mkdir()
    page.write_text("# Results\n\nOlder ones.\n")
    for _ in range(2):
        done = CliRunner().invoke(
            shootout_report.main, [str(results), f"--page={page}", f"--figures={figures}"], catch_exceptions=False
        )
        assert done.exit_code == 0, done.output
    text = page.read_text()
    assert text.startswith("# Results\n\nOlder ones.\n") and text.count(BEGIN) == text.count(END) == 1
    assert "| teco | 5.04 M | 100 of 4 | 120 | 0.0123 |" in text and "| tats | 5.20 M" in text
    assert "Clips of 16 frames by tats have the options steps=8." in text and "by teco have" not in text
    assert "| teco | **300 ± 30** |" in text and "| tats | 800 ± 80 |" in text
    assert "| last context frame, repeated | " in text and "12.5" in text and "| real, or its floor | 150 |" in text
    assert "tats (it continues no videos); river (not trained)." in text
    assert (
        "- FVD, 16 frames: **teco**, 300 ± 30; better than all of them is the last context frame, repeated: 120."
        in text
    )
    assert "(x/shootout-sheet.png)" in text
    assert Image.open(figures / "shootout-sheet.png").size == (116 + 2 * 128, 2 * 2 * 48)
    found = Shootout(results)
    (chart,) = shootout_report.time_charts(found)
    assert [list(item.y) for item in chart.lines] == [[600, 300], [1600, 800]] and chart.guide == 300
    assert list(chart.lines[0].x) == [1, 2]
    (frames,) = shootout_report.frame_charts(found)
    assert [item.label for item in frames.lines] == ["teco", "copy of the last frame"]


def test_what_cannot_be_written_is_refused(tmp_path: Path):
    assert replace_section("", f"{BEGIN}a{END}") == f"# Results\n\n{BEGIN}a{END}\n"
    with pytest.raises(ValueError, match="without .* after it"):
        replace_section(f"{END} {BEGIN}", "x")
    empty = tmp_path / "results.jsonl"
    empty.write_text("")
    done = CliRunner().invoke(shootout_report.main, [str(empty), f"--page={tmp_path / 'p.md'}"])
    assert done.exit_code == 1 and "has no trained system" in done.output and not (tmp_path / "p.md").exists()
