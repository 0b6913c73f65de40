"""What a run writes about itself: lines that survive crashes and resuming, and wandb without a question asked."""

import json
import math
import subprocess
import sys

import pytest
import torch

from training.logger import (
    RunLogger,
    append_line,
    continue_command,
    environment_text,
    forget_after,
    metric_values,
    read_lines,
)


def entry(mean):
    return {"num": 4, "mean": mean, "std": 0.5}


def test_stats_are_one_object_a_line(tmp_path, capsys):
    logger = RunLogger(tmp_path, {"log": "none"})
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


def test_the_values_of_a_metric():
    assert metric_values({"results": {"fvd": 3.5}, "num_fake": 2048}) == {"fvd": 3.5}
    assert metric_values({"is": 3, "note": "few samples", "ok": True, "step": 5}) == {"is": 3.0}


def test_an_unknown_log_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="Unknown name 'wandv' in --log; did you mean wandb"):
        RunLogger(tmp_path, {"log": "wandv"})


def test_the_environment_says_what_ran(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_lres.py", "--data", "my videos", "--steps=3"])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert continue_command() == "python train_lres.py --data 'my videos' --steps=3"
    text = environment_text(torch.device("cpu"), 2)
    assert f"torch     {torch.__version__}" in text and "device    2 x cpu" in text and continue_command() in text
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert continue_command() == "torchrun --nproc_per_node=8 train_lres.py --data 'my videos' --steps=3"


WANDB = """
import os, sys
from pathlib import Path
for name in ("WANDB_API_KEY", "WANDB_MODE"):
    os.environ.pop(name, None)
import numpy as np
from dnnlib.video import VideoWriter
from training.logger import RunLogger
assert "wandb" not in sys.modules
run_dir = Path(sys.argv[1])
options = {"log": "wandb", "system": "tiny", "steps": 3}
logger = RunLogger(run_dir, options)
logger.scalars(0, {"a": {"num": 1, "mean": 2.0, "std": 0.0}})
logger.metric(0, "fvd", {"results": {"fvd": 1.0}})
with VideoWriter(run_dir / "fake.mp4", 16, 16) as writer:
    writer.write(np.zeros((3, 16, 16, 3), np.uint8))
logger.video(0, "samples/fake", run_dir / "fake.mp4")
logger.close()
again = RunLogger(run_dir, options, 0, logger.wandb_id)
assert again.wandb_id == logger.wandb_id
again.close()
"""


@pytest.mark.slow
def test_wandb_stays_offline_and_silent_without_a_key(tmp_path):
    command = [sys.executable, "-c", WANDB, str(tmp_path)]
    environment = {"HOME": str(tmp_path), "PYTHONPATH": ".", "WANDB_SILENT": "true"}
    subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, timeout=100, check=True)
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/videos/samples/fake_*.mp4"))) == 1
