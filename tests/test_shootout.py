"""The comparison of systems: what is finished is not repeated, time is counted, and the page says what was measured."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dataset_tools.archive import ShardWriter, describe_dataset
from dataset_tools.frames import encode_stream
from runs import shootout
from runs.shootout import Meter, Results, Settings, contestants, takes_tokenizer
from tests.metrics.walks import NAMES, headings, views
from training import registry

SETTINGS = Settings("train", "val", 4.0, 2, "shootout", ("tats",), 4, 2, 32, 8, 10, "cpu", "fp32", 0)
BUSY = "import time\nwhile True: sum(range(10000))"


def test_every_published_method_takes_part():
    names = contestants("shootout")
    assert {"tats", "mebt", "teco", "river", "longvideogan-lres"} <= set(names) and "tokenizer" not in names
    assert [name for name in names if not takes_tokenizer(name)] == ["longvideogan-lres"]
    sizes = registry.resolve(registry.spec("tokenizer").presets)["shootout"]["model"]
    assert (sizes["height"], sizes["width"]) == (48, 64)
    for name in names:
        row = registry.resolve(registry.spec(name).presets)["shootout"]
        assert row["model"].get("schedule", "constant") == "constant", "training ends by time, not at a step"


def test_finished_parts_are_not_made_again(tmp_path: Path):
    results, made = Results(tmp_path, SETTINGS), []
    for number in range(2):
        found = results.part("tats-1", lambda number=number: made.append(number) or {"value": number})
        assert found == {"part": "tats-1", "value": 0}
    with pytest.raises(RuntimeError):
        results.part("tats-2", lambda: (_ for _ in ()).throw(RuntimeError("stopped")))
    again = Results(tmp_path, SETTINGS)
    assert again.part("tats-2", lambda: {"value": 2})["value"] == 2 and made == [0]
    lines = [json.loads(line) for line in again.gather().read_text().splitlines()]
    assert [line["part"] for line in lines] == ["tats-1", "tats-2"]
    other = Settings(**{**SETTINGS.__dict__, "budget_sec": 9.0})
    with pytest.raises(ValueError, match=r"results of other settings \(budget_sec\): give another --out"):
        Results(tmp_path, other)


@pytest.mark.skipif(not hasattr(signal, "SIGTERM") or sys.platform == "win32", reason="signals of POSIX")
def test_a_process_is_stopped_by_the_time_that_it_used(tmp_path: Path):
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    meter = Meter(tmp_path / "used.json", "cpu")
    code = meter.follow(process, lambda: True, 0.3)
    assert code == -signal.SIGTERM and 0.3 <= meter.used < 5
    assert time.monotonic() - begin >= 0.25
    kept = Meter(tmp_path / "used.json", "cpu")
    assert kept.used == pytest.approx(meter.used)
    waiting = subprocess.Popen([sys.executable, "-c", "pass"])
    assert kept.follow(waiting, lambda: False, 99.0) == 0 and kept.used == pytest.approx(meter.used), "not begun"


def test_what_does_not_fit_is_refused(tmp_path: Path):
    options = [f"--train={tmp_path}", f"--val={tmp_path}", f"--out={tmp_path / 'out'}"]
    result = CliRunner().invoke(shootout.main, [*options, "--system=tast"])
    assert (
        result.exit_code == 2 and "tast is no system that has the preset shootout: take longvideogan" in result.output
    )
    result = CliRunner().invoke(shootout.main, [*options, "--preset=none"])
    assert result.exit_code == 2 and "No system has the preset none" in result.output


def write_walks(root: Path, num_walks: int, first: int) -> Path:
    """Write walks that look aside and back, and then turn on to what is new, 48x64, with actions and poses."""
    size, (left, right) = (48, 64), (NAMES.index("left"), NAMES.index("right"))
    with ShardWriter(root, [size], 0) as writer:
        for number in range(first, first + num_walks):
            row = np.resize([0] + [left] * 8 + [0] + [right] * 20, 80)
            turns = headings(row)
            poses = [[0.0, 0.0, 6.0 * float(turn)] for turn in turns]
            frames = views(number, turns).repeat(4, axis=1).repeat(4, axis=2)
            with writer.clip(f"walk/{number}", facts={}, actions=[NAMES[action] for action in row], poses=poses) as add:
                for files in encode_stream(iter(frames), [size], num_threads=1):
                    add(files)
        report = writer.report({30: num_walks})
    describe_dataset(root, [report], 1, ("numpy",), actions=NAMES)
    return root


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_systems_are_trained_and_measured_for_a_moment(tmp_path: Path):
    data = [write_walks(tmp_path / "train", 4, 0), write_walks(tmp_path / "val", 3, 10)]
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "runs.shootout", f"--train={data[0]}", f"--val={data[1]}", f"--out={out}",
        "--budget-seconds=1", "--stages=1", "--clips=2", "--long-clips=2", "--frames=32", "--turn-frames=4",
        "--action-steps=5", "--device=cpu",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment)
    parts = {line["part"]: line for line in map(json.loads, (out / "results.jsonl").read_text().splitlines())}
    for name in contestants("shootout"):
        trained = parts[f"{name}-1"]
        assert trained["step"] >= 1 and trained["used_sec"] >= 1 and 4e6 < trained["parameters"] < 6e6, name
        assert parts[f"{name}-sample"]["frames"] == 32 and Path(parts[f"{name}-sample"]["sheet"]).is_file()
        metrics = {line["metric"] for line in parts[f"{name}-alone"]["lines"]}
        assert metrics == {"fvd2_16f", "fvd_drift", "motion_energy", "flat_frames"}
    assert "cannot" in parts["tats-protocol"] and "cannot" in parts["longvideogan-lres-back"]
    for name in ("teco", "river"):
        metrics = {line["metric"] for line in parts[f"{name}-protocol"]["lines"]}
        assert {"psnr2_32f", "fvd2_68f_context36", "revisit", "turning", "action_following"} <= metrics
        assert {line["metric"] for line in parts[f"{name}-back"]["lines"]} == {"there_and_back", "there_and_back_lpips"}
    assert {line["metric"] for line in parts["mebt-protocol"]["lines"]} == {
        "psnr2_32f", "ssim2_32f", "lpips2_32f", "fvd2_68f_context36"
    }  # fmt: skip
    times = {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}
    again = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    assert "$ python" not in again.stdout and {p: p.stat().st_mtime_ns for p in (out / "parts").iterdir()} == times
    page = tmp_path / "page.md"
    subprocess.run([sys.executable, "-m", "runs.shootout_report", str(out / "results.jsonl"), f"--page={page}",
                    f"--figures={tmp_path / 'figures'}"], check=True)  # fmt: skip
    text = page.read_text()
    assert all(name in text for name in contestants("shootout"))
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "shootout-sheet.png", "shootout-time.png", "shootout-frames.png"
    }  # fmt: skip
