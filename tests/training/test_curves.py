"""Curves of runs: the charts contain the logged values, and the command draws them."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from training import curves, registry
from training.charts import COLOURS
from training.curves import charts_of, curves_of, draw_curves, main, update_curves
from training.logger import append_line
from training.longvideogan.charts import CHARTS as GAN_CHARTS

SYSTEM = "longvideogan-lres"


def write_run(run_dir, lines, metrics=(), **options):
    """Write a run directory with these lines of statistics, each name -> mean, and of a metric."""
    run_dir.mkdir(parents=True)
    for line in lines:
        step = line.pop("step")
        entries = {name: {"num": 1, "mean": mean, "std": 0.0} for name, mean in line.items()}
        append_line(run_dir / "stats.jsonl", {"step": step, **entries, "timestamp": 1.79e9})
    for step, value in metrics:
        append_line(run_dir / "metric-fvd.jsonl", {"step": step, "results": {"fvd": value}, "timestamp": 1.79e9})
    if options:
        (run_dir / "options.json").write_text(json.dumps(options))
    return run_dir


def points(chart):
    return {line.label: dict(zip(line.x, line.y, strict=True)) for line in chart.lines}


def test_curves_are_what_was_logged(tmp_path):
    lines = [
        {"step": 0, "timing/sec_per_step": 0.0, "loss/r1_loss": math.nan},
        {"step": 20, "loss/G_loss": 1.5, "loss/D_loss": math.nan, "loss/other": 3.0, "timing/sec_per_step": 2.0},
        {"step": 10, "loss/G_loss": 1.25, "loss/D_loss": 1.0, "timing/sec_per_step": 2.5, "timing/data_wait_sec": 5.0},
        {"step": 20, "loss/G_loss": 1.75, "loss/D_loss": math.nan, "progress/unknown": 1.0},
    ]
    run_dir = write_run(tmp_path / "run", lines, metrics=[(10, 500.0), (20, 300.0)], system=SYSTEM)
    nan = pytest.approx(math.nan, nan_ok=True)
    charts = curves_of(run_dir)
    assert points(charts["Loss"]) == {"G": {10: 1.25, 20: 1.75}, "D": {10: 1.0, 20: nan}}
    assert charts["Loss"].guide == pytest.approx(1.386, abs=1e-3)
    assert points(charts["Seconds a step"]) == {
        "all": {0: nan, 10: 2.5},
        "waiting for data": {0: nan, 10: 0.5, 20: nan},
    }
    assert points(charts["metric-fvd"]) == {"fvd": {10: 500.0, 20: 300.0}}
    assert points(charts["Not finite"]) == {"values a tick": {0: 0, 10: 0, 20: 0}}
    assert "R1" not in charts and "Norm of gradients" not in charts


def test_losses_without_a_chart_are_drawn(tmp_path):
    lines = [{"step": 0, "loss/codebook": 0.5, "loss/G_loss": 1.0}]
    assert points(curves_of(write_run(tmp_path / "run", lines, system=SYSTEM))["codebook"]) == {"train": {0: 0.5}}
    for number, options in enumerate([{}, {"system": "another"}]):  # whose charts are not known
        charts = curves_of(write_run(tmp_path / f"{number}", [{"step": 0, "loss/G_loss": 1.0}], **options))
        assert "Loss" not in charts and points(charts["G_loss"]) == {"train": {0: 1.0}}


def test_validation_shares_the_chart_of_its_loss(tmp_path):
    lines = [
        {"step": 0, "loss/codebook": 0.5, "validation/codebook": 0.75, "validation/G_loss": 2.0},
        {"step": 1, "loss/codebook": 0.25, "loss/G_loss": 1.0, "validation/other": 3.0},
    ]
    charts = curves_of(write_run(tmp_path / "run", lines, system=SYSTEM))
    assert points(charts["codebook"]) == {"train": {0: 0.5, 1: 0.25}, "validation": {0: 0.75}}
    assert points(charts["other"]) == {"validation": {1: 3.0}}
    assert points(charts["G_loss"]) == {"train": {1: 1.0}, "validation": {0: 2.0}}
    assert points(charts["Loss"]) == {"G": {1: 1.0}}


def test_systems_bring_their_charts():
    assert all((charts_of(system) == GAN_CHARTS) == ("gan" in system) for system in registry.SYSTEMS)
    assert all(charts_of(system) for system in registry.SYSTEMS)
    assert charts_of("another") == ()


def test_values_that_were_left_out_are_counted(tmp_path):
    run_dir = write_run(tmp_path / "run", [{"step": 0}])
    entry = {"num": 3, "mean": 1.0, "std": 0.0, "nonfinite": 2}
    append_line(run_dir / "stats.jsonl", {"step": 1, "loss/G_loss": entry, "loss/D_loss": entry, "timestamp": 1.79e9})
    assert points(curves_of(run_dir)["Not finite"])["values a tick"] == {0: 0, 1: 4}


def test_curves_are_one_image_in_the_run(tmp_path):
    lines = [{"step": step, "loss/G_loss": 1.0 + step} for step in range(3)]
    run_dir = write_run(tmp_path / "00007-maze-4batch", lines, steps=3, system=SYSTEM)
    result = CliRunner().invoke(main, [str(run_dir)])
    assert result.exit_code == 0 and result.output.strip() == str(run_dir / "curves.png")
    first = np.asarray(Image.open(run_dir / "curves.png"))
    append_line(run_dir / "stats.jsonl", {"step": 3, "loss/G_loss": {"mean": 9.0}, "timestamp": 1.79e9})
    assert draw_curves(run_dir) == run_dir / "curves.png"
    again = np.asarray(Image.open(run_dir / "curves.png"))
    assert again.shape == first.shape and (again != first).any()
    assert sorted(path.name for path in run_dir.iterdir()) == ["curves.png", "options.json", "stats.jsonl"]


@pytest.fixture
def drawn(monkeypatch):
    """Return the arguments of the last call that draws charts, which is not carried out."""
    arguments = []

    def keep(charts, out, title, subtitle):
        arguments[:] = {chart.title: chart for chart in charts}, title, subtitle

    monkeypatch.setattr(curves, "draw_charts", keep)
    return arguments


def test_runs_are_drawn_over_each_other(tmp_path, drawn):
    one = write_run(tmp_path / "lres" / "00000-maze", [{"step": 0, "loss/x": 1.0}], metrics=[(0, 5.0)])
    two = write_run(tmp_path / "lres" / "00001-maze", [{"step": 0, "loss/x": 2.0, "validation/x": 3.0}], steps=9)
    assert draw_curves([one, two]) == tmp_path / "lres" / "curves.png"
    charts, title, subtitle = drawn
    assert list(charts) == ["x: train", "x: validation", "Not finite: values a tick", "metric-fvd: fvd"]
    assert points(charts["x: train"]) == {"00000": {0: 1.0}, "00001": {0: 2.0}}
    assert [line.colour for line in charts["x: train"].lines] == list(COLOURS[:2])
    assert [line.colour for line in charts["x: validation"].lines] == [COLOURS[1]]  # of the run everywhere
    assert title == "2 runs" and len(subtitle.splitlines()) == 2 and "00001:  step 0 of 9" in subtitle

    three = write_run(tmp_path / "sres" / "00000-maze", [{"step": 0, "loss/x": 2.0}])
    assert draw_curves([one, three], tmp_path / "both.png") == tmp_path / "both.png"
    assert list(points(drawn[0]["x: train"])) == ["lres/00000", "sres/00000"]


SENTENCE = "charts need matplotlib: pip install 'longtake[plots]'"


def test_without_matplotlib_the_command_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run_dir = write_run(tmp_path / "run", [{"step": 0, "loss/x": 1.0}])
    result = CliRunner().invoke(main, [str(run_dir)])
    assert result.exit_code == 1 and result.output == f"Error: {SENTENCE}\n"
    assert not (run_dir / "curves.png").exists()


def test_without_matplotlib_a_run_warns_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(curves, "_warned", False)
    said = []
    update_curves(tmp_path, said.append)  # nothing is logged so far
    assert said == []
    run_dir = write_run(tmp_path / "run", [{"step": 0, "loss/x": 1.0}])
    for _ in range(3):
        update_curves(run_dir, said.append)
    assert said == [f"Warning: training goes on without curves.png, since {SENTENCE}"]
    monkeypatch.undo()
    update_curves(run_dir, said.append)
    assert len(said) == 1 and (run_dir / "curves.png").is_file()


def test_the_command_has_its_former_name_too(tmp_path, repo):
    run_dir = write_run(tmp_path / "run", [{"step": 0, "loss/x": 1.0}])
    command = [sys.executable, "-m", "training.preview", str(run_dir), f"--out={tmp_path / 'x.png'}"]
    assert (
        subprocess.run(command, cwd=repo, check=True, capture_output=True, text=True).stdout.strip() == command[-1][6:]
    )
    assert (tmp_path / "x.png").is_file()


def test_a_folder_without_statistics_is_no_run(tmp_path):
    result = CliRunner().invoke(main, [str(tmp_path)])
    assert result.exit_code == 1 and "holds no statistics" in result.output and "Traceback" not in result.output
