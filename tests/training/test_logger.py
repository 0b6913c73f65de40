"""The log files of a run: lines that survive crashes and resuming, and wandb without prompts."""

import json
import math
import resource
import subprocess
import sys

import pytest
import torch
from PIL import Image

from training.logger import (
    RunLogger,
    append_line,
    continue_command,
    environment_text,
    forget_after,
    listener_names,
    metric_values,
    read_lines,
    wandb_mode,
)


def entry(mean):
    return {"num": 4, "mean": mean, "std": 0.5}


def test_stats_are_one_object_a_line(tmp_path, capsys):
    logger = RunLogger(tmp_path, {"log": []})
    logger.text("step 0  all is well")
    logger.text("step 2")
    logger.scalars(2, {"loss/G_loss": entry(0.25), "loss/D_loss": entry(math.nan)})
    logger.video(2, "samples/fake", tmp_path / "fake.mp4")
    logger.close()
    assert logger.wandb_id is None
    assert capsys.readouterr().out == (tmp_path / "log.txt").read_text() == "step 0  all is well\nstep 2\n"
    (line,) = (json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines())
    assert line["step"] == 2 and line["loss/G_loss"] == entry(0.25) and line["timestamp"] > 1e9
    assert line["loss/D_loss"]["mean"] is None


def test_a_resumed_run_writes_its_steps_again(tmp_path):
    logger = RunLogger(tmp_path, {"log": "none"})
    for step in (0, 10, 20):
        logger.scalars(step, {"a": entry(step)})
        logger.metric(step, "fvd", {"results": {"fvd": step}})
    with open(tmp_path / "stats.jsonl", "a") as file:
        file.write('{"step": 3')  # cut short by a crash
    RunLogger(tmp_path, {"log": "none"}, step=10).scalars(20, {"a": entry(7)})
    assert [(line["step"], line["a"]["mean"]) for line in read_lines(tmp_path / "stats.jsonl")] == [
        (0, 0),
        (10, 10),
        (20, 7),
    ]
    assert [line["step"] for line in read_lines(tmp_path / "metric-fvd.jsonl")] == [0, 10]
    RunLogger(tmp_path, {"log": "none"})
    assert read_lines(tmp_path / "stats.jsonl") == []


def test_forgetting_what_was_never_written(tmp_path):
    forget_after(tmp_path / "none.jsonl", 3)
    assert read_lines(tmp_path / "none.jsonl") == [] and not (tmp_path / "none.jsonl").exists()


def test_lines_hold_no_numbers_that_json_lacks(tmp_path):
    append_line(tmp_path / "a.jsonl", {"x": [math.inf, 1.5], "y": {"z": -math.inf}})
    assert (tmp_path / "a.jsonl").read_text() == '{"x": [null, 1.5], "y": {"z": null}}\n'


def test_a_line_that_does_not_fit_on_the_disk_leaves_no_part(tmp_path):
    path = tmp_path / "stats.jsonl"
    append_line(path, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))  # Python turns the signal off
    try:
        with pytest.raises(OSError):
            append_line(path, {"step": 2, "much": list(range(20))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    append_line(path, {"step": 3})
    assert [line["step"] for line in read_lines(path)] == [1, 3]


def test_the_values_of_a_metric():
    assert metric_values({"results": {"fvd": 3.5}, "num_fake": 2048}) == {"fvd": 3.5}
    assert metric_values({"is": 3, "note": "few samples", "ok": True, "step": 5}) == {"is": 3.0}


def test_listeners_are_named_by_a_list_or_as_older_runs_do_by_a_string():
    assert listener_names([]) == listener_names("none") == listener_names(["none"]) == []
    assert listener_names("wandb") == listener_names(["wandb", "none", "wandb"]) == ["wandb"]
    with pytest.raises(ValueError, match="Unknown name 'wandv' in --logger; did you mean wandb"):
        listener_names(["none", "wandv"])


def test_a_missing_package_is_said_before_anything_is_touched(tmp_path, monkeypatch):
    append_line(tmp_path / "stats.jsonl", {"step": 5})
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"needs the package tensorboard.*: pip install -e '.\[tensorboard\]'$"):
        RunLogger(tmp_path, {"log": ["tensorboard"]})
    assert read_lines(tmp_path / "stats.jsonl") == [{"step": 5}]


class FullDisk:
    """A listener that hears the first tick and then fails at everything."""

    name = "charts"

    def __init__(self):
        self.steps, self.num_failed = [], 0

    def scalars(self, step, values):
        if step:
            self.fail()
        self.steps.append(step)

    def video(self, step, name, path):
        self.fail()

    def close(self):
        self.fail()

    def fail(self):
        self.num_failed += 1
        raise OSError(28, "No space left on device")


def test_a_listener_that_fails_is_said_once_and_stops_nothing(tmp_path, capsys):
    logger = RunLogger(tmp_path, {"log": "none"})
    listener = FullDisk()
    logger.listeners.append(listener)
    for step in (0, 1, 2):
        logger.scalars(step, {"a": entry(step)})
        logger.metric(step, "fvd", {"results": {"fvd": step}})
    logger.video(2, "samples/fake", tmp_path / "fake.mp4")
    logger.close()
    assert listener.steps == [0, 0] and listener.num_failed == 6
    assert [line["step"] for line in read_lines(tmp_path / "stats.jsonl")] == [0, 1, 2]
    (warning,) = capsys.readouterr().out.splitlines()
    assert warning.startswith("Warning: charts failed") and "No space left on device" in warning
    assert (tmp_path / "log.txt").read_text() == warning + "\n"


@pytest.mark.slow
def test_a_listener_that_cannot_begin_stops_nothing(tmp_path, capsys):
    pytest.importorskip("wandb")
    (tmp_path / "wandb").write_text("a file where wandb wants a folder")
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(tmp_path), "PYTHONPATH": "."}
    script = """
import sys
from pathlib import Path
from training.logger import RunLogger
logger = RunLogger(Path(sys.argv[1]), {"log": ["wandb"], "system": 3}, wandb_id="an id / that wandb refuses")
logger.scalars(0, {"a": {"num": 1, "mean": 2.0, "std": 0.0}})
assert not logger.listeners and logger.wandb_id == "an id / that wandb refuses"
logger.close()
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, timeout=100, check=True)
    assert "Warning: wandb failed" in (tmp_path / "log.txt").read_text()
    assert len(read_lines(tmp_path / "stats.jsonl")) == 1


def test_the_environment_says_what_ran(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_lres.py", "--data", "my videos", "--steps=3"])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert continue_command() == "python train_lres.py --data 'my videos' --steps=3"
    text = environment_text(torch.device("cpu"), 2)
    assert f"torch     {torch.__version__}" in text and "device    2 x cpu" in text and continue_command() in text
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    assert continue_command() == "torchrun --nproc_per_node=8 train_lres.py --data 'my videos' --steps=3"
    for name, value in {"GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    nodes = "--nnodes=2 --node_rank=NODE --master_addr=10.0.0.1 --master_port=29500"
    assert continue_command() == f"torchrun --nproc_per_node=8 {nodes} train_lres.py --data 'my videos' --steps=3"


def test_wandb_goes_online_only_with_a_key(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wandb_mode() == "offline"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.com:8080")
    assert wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"


WANDB = """
import os, sys
from pathlib import Path
for name in ("WANDB_API_KEY", "WANDB_MODE"):
    os.environ.pop(name, None)
import numpy as np
from dnnlib.video import VideoWriter
from training.logger import RunLogger
run_dir = Path(sys.argv[1])
assert RunLogger(run_dir, {"log": ["none"]}).listeners == [] and "wandb" not in sys.modules
options = {"log": ["wandb"], "system": "tiny", "steps": 3}
logger = RunLogger(run_dir, options)
logger.scalars(0, {"a": {"num": 1, "mean": 2.0, "std": 0.0}})
logger.metric(0, "fvd", {"results": {"fvd": 1.0}})
with VideoWriter(run_dir / "fake.mp4", 16, 16) as writer:
    writer.write(np.zeros((3, 16, 16, 3), np.uint8))
logger.video(0, "samples/fake", run_dir / "fake.mp4")
logger.close()
again = RunLogger(run_dir, options, 0, logger.wandb_id)
assert again.wandb_id == logger.wandb_id is not None
again.close()
print("run", logger.wandb_id)
"""


@pytest.mark.slow
def test_wandb_stays_offline_without_a_key_and_goes_on_in_the_same_run(tmp_path):
    command = [sys.executable, "-c", WANDB, str(tmp_path)]
    environment = {"HOME": str(tmp_path), "PYTHONPATH": ".", "WANDB_SILENT": "true"}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, timeout=100, check=True, capture_output=True, text=True
    )
    assert "Warning" not in done.stdout
    wandb_id = done.stdout.split()[-1]
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{wandb_id}"))) == 2
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/videos/samples/fake_*.mp4"))) == 1


def test_tensorboard_events_read_back(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    Image.new("RGB", (32, 16), "red").save(tmp_path / "fake.png")
    logger = RunLogger(tmp_path, {"log": ["tensorboard"]})
    for step in (0, 10, 20):
        logger.scalars(step, {"loss/G_loss": entry(step)})
    logger.metric(0, "fvd", {"results": {"fvd": 3.5}})
    logger.video(0, "samples/fake", tmp_path / "fake.mp4")
    logger.close()
    again = RunLogger(tmp_path, {"log": ["tensorboard"]}, step=10)
    again.scalars(20, {"loss/G_loss": entry(7)})
    again.close()
    read = events.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss/G_loss")] == [(0, 0), (10, 10), (20, 7)]
    assert [event.value for event in read.Scalars("metric/fvd")] == [3.5]
    assert [event.width for event in read.Images("samples/fake")] == [32]
