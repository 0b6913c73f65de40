"""Every benchmark from its command to its report, with tiny networks."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks import all as everything
from benchmarks import cuda_graphs, harness, layouts, loader, networks, ops, play, startup, subjects, train_step
from dnnlib import util
from tests.explorer import steered
from tests.explorer.toys import registered as registered_toys
from torch_utils.ops import backends
from training.longvideogan import gan

ROOT = Path(__file__).parents[2]


def run(command, path, *arguments) -> Any:
    """Return the report of a benchmark."""
    result = CliRunner().invoke(command, ["--json", str(path / "report.json"), *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = harness.Report.read(path / "report.json")
    for table in report.tables:
        assert table.text() in result.output
        assert all(len(row) == len(table.columns) for row in table.rows)
        numbers = [cell for row in table.rows for cell in row if isinstance(cell, float)]
        assert all(math.isfinite(number) for number in numbers)
    return report


@pytest.mark.slow
def test_operators_at_the_shapes_of_the_networks(tiny_stages, tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "TURN_SEC", 0)
    report = run(ops.main, tmp_path, "--quick", "--threads=1")
    (table,) = report.tables
    assert {row[0].partition(":")[0] for row in table.rows} == set(ops.OPERATORS) and report.bars == []
    networks_seen = {place for row in table.rows for place in row[2].split(", ")}
    assert networks_seen == {"lres G", "lres D", "sres G", "sres D"}
    assert len({tuple(row[:3]) for row in table.rows}) >= 10


def test_each_way_of_computing_an_operator_is_the_one_asked_for(tiny_stages):
    for call in ops.layer_calls("toy"):
        x, operator = ops.prepare(call, "cpu", torch.float32, quick=True)
        torch.testing.assert_close(operator(x, "matmul"), operator(x, "ref"), rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="no-such"):
            operator(x, "no-such")


def test_bars_of_operators_are_judged_by_the_worst_shape_and_by_all(tiny_stages):
    calls = [call for call in ops.layer_calls("toy") if call.operator == "upfirdn2d"][:2]
    columns = [f"against {rival}{what}" for rival in ("ref", "matmul") for what in ("", " + backward")]
    rows = [
        (call, {**dict.fromkeys([*columns, "share of copy"], ratio), "ms": milliseconds, "ms + backward": milliseconds})
        for call, ratio, milliseconds in zip(calls, (4.0, 9.0), (1.0, 3.0), strict=True)
    ]
    found = {bar.name: (bar.at_least, bar.measured) for bar in ops.bars("cpu", rows)}
    assert found["upfirdn2d forward, against ref, the worst of them"] == (5, 4)
    assert found["upfirdn2d forward, against ref, all 2 shapes together"] == (5, (4 * 1 + 9 * 3) / 4)
    assert found["upfirdn2d forward + backward, against matmul, the worst of them"] == (1, 4)
    assert all("upfirdn2d" in name for name in found)
    assert [bar.at_least for bar in ops.bars("cuda", rows)] == [0.7, 0.7]


def test_evaluations_with_and_without_graphs(tmp_path):
    (table,) = run(cuda_graphs.main, tmp_path, "--quick", "--threads=1").tables
    assert {row[0] for row in table.rows} == set(cuda_graphs.NETWORKS)


def test_layouts_of_convolutions(tiny_stages, tmp_path):
    (table,) = run(layouts.main, tmp_path, "--quick", "--threads=1").tables
    assert [row[0][-1] for row in table.rows] == list("GGDDGGDD")
    assert all(row[2] > 0 and row[6] == pytest.approx(row[3] / row[4]) for row in table.rows)


def test_networks(tiny_stages, tmp_path):
    report = run(networks.main, tmp_path, "--quick", "--threads=1")
    assert len(report.tables) == 4 and report.bars == []
    for times, where in zip(report.tables[::2], report.tables[1::2], strict=True):
        assert [row[0] for row in times.rows] == list(subjects.passes(subjects.make_system(subjects.LRES, "toy")))
        assert all(row[2] > 0 and row[6] == pytest.approx(row[2] / row[4]) for row in times.rows)
        assert all(98 <= sum(row[2:]) <= 102 for row in where.rows)


def test_networks_of_published_size_have_bars(tiny_stages, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "PROFILED", ())
    report = run(networks.main, tmp_path, "--size=default", "--rounds=1", "--threads=1", "--budget=0")
    names = [bar.name for bar in report.bars]
    assert names == [
        f"{stage}, G forward as commands run it, against {rival}"
        for stage in subjects.NAMES.values()
        for rival in ("ref", "matmul")
    ]
    assert [bar.at_least for bar in report.bars] == [1.25, 1, 3, 1]


def test_the_implementation_asked_for_is_the_one_that_runs():
    seen = []
    networks.run(lambda: seen.append(backends.select_impl("auto", torch.zeros(1))), "ref")
    networks.run(lambda: seen.append(backends.select_impl("auto", torch.zeros(1))), "matmul")
    assert seen == ["ref", "matmul"]


@pytest.mark.parametrize("stage", list(subjects.NAMES))
def test_passes_leave_no_trace(tiny_stages, stage):
    system = subjects.make_system(stage, "toy", batch=1)
    for function in subjects.passes(system).values():
        function()
    for network in (system.G, system.D):
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())


def test_train_steps(tiny_stages, tmp_path):
    report = run(train_step.main, tmp_path, "--quick", "--threads=1", "--batch=1")
    *stages, housekeeping = report.tables
    assert len(stages) == 2 and report.bars == []
    for table in stages:
        assert [row[0] for row in table.rows][:2] == ["ref, fp32", "auto, fp32"]
        assert table.rows[0][-1] == 1
        for _, plain, r1, mean, rate, _ in table.rows:
            assert mean == pytest.approx(plain + r1 / 16) and rate == pytest.approx(1 / mean)
    assert [row[0] for row in housekeeping.rows] == ["Adam", "moving average", "non-finite gradients replaced"]


@pytest.mark.parametrize("stage", list(subjects.NAMES))
def test_a_timed_step_is_a_step(tiny_stages, stage):
    """Both halves of what is timed move the weights, and take the batches that the loop would give them."""
    system = subjects.make_system(stage, "toy", batch=2)
    before = [next(network.parameters()).clone() for network in (system.G, system.D)]
    *batches, r1_batch = subjects.make_batches(system, 0)
    assert len(batches) == len(system.batch_spec(1))
    train_step.step(system, batches, train_step.REFERENCE)
    after = [next(network.parameters()).clone() for network in (system.G, system.D)]
    assert not any(map(torch.equal, before, after))
    train_step.penalty(system, r1_batch, train_step.Variant("auto", "fp32"))
    assert torch.equal(next(system.G.parameters()), after[0]) and not torch.equal(next(system.D.parameters()), after[1])


def test_every_precision_that_suits_is_timed(tiny_stages, monkeypatch):
    """Of a machine that has them all: fp16 is nothing for the low-resolution stage, nor for a CPU."""
    monkeypatch.setattr(gan, "why_not", lambda precision, device: None)
    found = {stage: list(map(str, train_step.variants(subjects.make_system(stage, "toy")))) for stage in subjects.NAMES}
    assert found[subjects.LRES] == ["ref, fp32", "auto, fp32", "auto, tf32", "auto, bf16"]
    assert found[subjects.SRES] == ["ref, fp32", "auto, fp32", "auto, tf32", "auto, fp16", "auto, bf16"]


def test_precisions_are_those_asked_for(tiny_stages, monkeypatch):
    seen = []
    system = subjects.make_system(subjects.LRES, "toy", batch=1)
    monkeypatch.setattr(gan, "why_not", lambda precision, device: None)
    monkeypatch.setattr(
        system,
        "penalize_discriminator",
        lambda *_: seen.append((system.precision, torch.backends.cuda.matmul.allow_tf32, backends._default)),
    )
    for variant in (train_step.REFERENCE, train_step.Variant("auto", "tf32"), train_step.Variant("matmul", "bf16")):
        train_step.penalty(system, {}, variant)
    assert seen == [("fp32", False, "ref"), ("tf32", True, "auto"), ("bf16", False, "matmul")]


def test_first_frame_of_a_fresh_process(tmp_path):
    paths = [str(tmp_path / f"{stage}.pkl") for stage in subjects.NAMES]
    for stage, path in zip(subjects.NAMES, paths, strict=True):
        startup.save_network(subjects.make_generator(stage, "toy"), path)
    kernels = Path(util.make_cache_dir_path("kernels"))
    kernels.mkdir(parents=True, exist_ok=True)
    (tmp_path / "kernels").symlink_to(kernels)
    moments = startup.first_frame("auto, kernels kept", paths, "cpu", 1, tmp_path)
    assert len(moments) == 5 and list(moments.values()) == sorted(moments.values())
    assert 0 < moments["Python has started"] < moments["the first frame is there"] < 120


def test_start_up(tiny_stages, tmp_path, monkeypatch):
    monkeypatch.setattr(startup, "IMPORTS", ("import dnnlib.util",))
    children = []

    def child(case, paths, device, threads, cache):
        children.append((case, cache))
        assert all(Path(path).is_file() for path in paths) and cache.is_dir()
        return {"Python has started": 0.1, "the first frame is there": float(len(children))}

    monkeypatch.setattr(startup, "first_frame", child)
    report = run(startup.main, tmp_path, "--size=toy", "--rounds=3", "--threads=1")
    imports, moments = report.tables
    assert len(imports.rows) == 2 and 0 < imports.rows[1][2] < imports.rows[1][1]
    assert moments.rows[1] == ["the first frame is there", 5, 6, 7, 8]  # medians of 1 5 9, 2 6 10, ...
    caches = [cache for _, cache in children]
    assert len(set(caches)) == 3 and caches[2] == caches[3], "the last case finds what the one before it has built"


def test_a_failing_child_process_is_reported():
    with pytest.raises(startup.click.ClickException, match="no_such_module"):
        startup.run_child("import no_such_module", [], {})


def test_the_loader(tmp_path):
    report = run(loader.main, tmp_path, "--quick")
    assert report.name == "loader" and len(report.tables) == 2


# ----------------------------------------------------------------------------
# All of them, and the page of the manual


def make_report(name, device="cpu"):
    report = harness.Report(name, harness.machine(), {"device": device})
    report.tables.append(
        harness.Table(f"Times of {name}", ["what", "seconds", "against ref"], [["this", 1.25, 0.5], ["that", 1.0, 1.0]])
    )
    report.bars.append(harness.Bar(f"bar of {name}", 2.0, 3.0))
    return report


def test_a_page_is_brought_up_to_date(tmp_path):
    page, folder = tmp_path / "page.md", tmp_path / "json"
    marks = [
        f"<!-- begin {name} on cpu -->\nold\n<!-- end {name} on cpu -->"
        for name in ("ops", "networks", "bars", "slower")
    ]
    page.write_text("\n\n".join(["# Title", *marks, "The end."]))
    for name in ("ops", "networks"):
        make_report(name).finish(folder / f"{name}.json")
    arguments = [f"--json-dir={folder}", f"--docs={page}", "--render-only"]
    for _ in range(2):  # the second time changes nothing more
        result = CliRunner().invoke(everything.main, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        text = page.read_text()
        assert text.startswith("# Title") and text.endswith("The end.") and "old" not in text
        assert text.count("| this | 1.25 | 0.500 |") == 2 and text.count("| Times of ops, this | ref | 0.500 |") == 1
        assert text.count("| bar of ops | 2.00 | 3.00 | met |") == 1
    with pytest.raises(ValueError, match="begin startup on cpu"):
        everything.fill_page(page, [make_report("startup")])
    with pytest.raises(ValueError, match="begin ops on cuda"):
        everything.fill_page(page, [make_report("ops", "cuda")])


def test_the_documentation_has_marks_for_every_result():
    page = (ROOT / "docs/performance.md").read_text()
    for name in (*everything.NAMES, "bars", "slower"):
        for device in ("cpu", "cuda"):
            everything.fill(page, f"{name} on {device}", "")


def test_a_benchmark_that_fails_stops_the_rest(tmp_path, monkeypatch):
    (tmp_path / "ops.json").write_text("an old report")
    ran = []

    class Failed:
        returncode = 1

    monkeypatch.setattr(everything.subprocess, "run", lambda command, **_: ran.append(command) or Failed)
    result = CliRunner().invoke(everything.main, [f"--json-dir={tmp_path}", "--quick"])
    assert result.exit_code == 1 and "benchmarks.ops failed" in result.output and len(ran) == 1
    assert "--quick" in ran[0] and "benchmarks.ops" in ran[0] and not (tmp_path / "ops.json").exists()


def test_steering(tmp_path):
    with steered.registered(tmp_path) as paths:
        steered.write_dataset(tmp_path / "ring.starts")
        (table,) = run(play.main, tmp_path, "--quick", "--threads=1", "--model", paths["ring"]).tables
    assert table.title == "ring, 32x48" and [row[0] for row in table.rows] == ["1", "2"]
    for _, rate, typical, late, model, rest in table.rows:
        assert rate > 1 and late >= typical >= model > 0 and rest > 0


def test_steering_needs_a_model_with_actions(tmp_path):
    with registered_toys(tmp_path) as paths:
        result = CliRunner().invoke(play.main, ["--quick", "--model", paths["colours"]])
    assert result.exit_code == 1 and "colours takes no actions" in result.output
    with steered.registered(tmp_path) as paths:
        result = CliRunner().invoke(play.main, ["--quick", "--model", paths["ring"]])
    assert result.exit_code == 1 and "ring needs frames to begin from: give a dataset as --context" in result.output
