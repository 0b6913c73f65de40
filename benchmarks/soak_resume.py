"""Kill training at random moments repeatedly, and compare the result with an uninterrupted run.

python -m benchmarks.soak_resume --kills 50

Each attempt is a separate process, ended by kill -9: during start-up, between steps, or while writing a checkpoint. The
networks are toys; the loop, the files and the low-resolution system are the real ones.
"""

import collections
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from dataset_tools.archive import ShardWriter
from dataset_tools.frames import encode_jpeg
from training import checkpoint
from training.logger import read_lines

MOMENTS = ("start", "step", "save", "save")  # equally likely
START_SEC = 10.0  # maximum delay of a kill during start-up
STEP_SEC = 3.0  # maximum delay of a kill between steps, after training has resumed
SAVE_SEC = 0.003  # maximum delay of a kill during saving, after the temporary file appeared
LIFE_SEC = 300.0  # a process without progress for this long is a failure
CHILD = """
import json, sys, torch
from training import config, loop
torch.set_num_threads(1)
loop.train("longvideogan-lres", config.resolve(config.TrainOptions, json.loads(sys.argv[1])))
"""
MODEL = {
    "height": 16,
    "width": 16,
    "num_frames": 16,
    "preview_frames": 8,
    "batch": 2,
    "grad_accum": 1,
    "r1_interval": 3,
    "generator": {
        "embedding_channels": 32,
        "num_filters": 4,
        "min_filter_taps": 4,
        "max_filter_taps": 24,
        "w_channels": 64,
        "input_channels": 16,
        "temporal_channels": [16, 16, 8, 8],
        "spatial_channels": [8, 8, 8, 8],
    },
    "discriminator": {"channels": [3, 4, 4, 4, 4], "epilogue_channels": 6},
}


def make_dataset(root: Path) -> None:
    """Write three clips of noise."""
    rng = np.random.RandomState(0)
    with ShardWriter(root, [(16, 16)], 0) as writer:
        for name in "abc":
            with writer.clip(name) as clip:
                for _ in range(24):
                    clip([encode_jpeg(rng.randint(0, 256, (16, 16, 3)).astype(np.uint8))])


def start(folder: Path, name: str, **changes: Any) -> tuple[subprocess.Popen[bytes], Path]:
    """Start a training process; return it and its log file."""
    options: dict[str, Any] = {"outdir": str(folder / name), "dataset": str(folder / "data"), "batch": 2}
    options |= {"system": "longvideogan-lres", "model": MODEL, "workers": 1, "sample_steps": 0, "keep": 2}
    options |= {"tick_steps": 5, "checkpoint_steps": 1, **changes}
    log = folder / f"{name}.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as file:
        command = [sys.executable, "-c", CHILD, json.dumps(options)]
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment), log


def finish(folder: Path, name: str, **changes: Any) -> Path:
    """Train to the end; return the run directory."""
    process, log = start(folder, name, **changes)
    if process.wait(LIFE_SEC * 10):
        raise click.ClickException(f"training failed:\n{log.read_text()}")
    (run_dir,) = (folder / name).iterdir()
    return run_dir


def wait_for(process: subprocess.Popen[bytes], log: Path, ready: Any) -> None:
    """Wait until `ready()`; raise an error if the process exits or hangs before."""
    deadline = time.monotonic() + LIFE_SEC
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise click.ClickException(f"training ended or hung by itself:\n{log.read_text()}")
        time.sleep(0.0005)


def parts(folder: Path) -> set[Path]:
    """Return temporary files left by killed writers."""
    return set(folder.glob("killed/*/checkpoints/.ckpt-*"))


def live(folder: Path, moment: str, rng: np.random.RandomState) -> int | None:
    """Train until a random moment, then kill; return the step that training resumed from, None if it did not start."""
    before = parts(folder)
    process, log = start(folder, "killed", steps=10**6)

    def went_on() -> bool:
        return " at step " in log.read_text()

    if moment == "start":
        time.sleep(rng.uniform(0, START_SEC))
    else:
        wait_for(process, log, went_on)
        time.sleep(rng.uniform(0, STEP_SEC))
        if moment == "save":
            wait_for(process, log, lambda: parts(folder) - before)
            time.sleep(rng.uniform(0, SAVE_SEC))
    process.kill()
    process.wait()
    return int(log.read_text().partition(" at step ")[2].split()[0]) if went_on() else None


def same(first: Any, second: Any) -> bool:
    """Return whether two nested states agree bit for bit."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint, -1 if there is none; all of them must be readable."""
    steps = [-1]
    for run_dir in (folder / "killed").glob("*"):
        for step, path in checkpoint.list_checkpoints(run_dir):
            checkpoint.load_run_state(path)
            steps.append(step)
    return max(steps)


def soak(folder: Path, kills: int, seed: int) -> bool:
    """Kill training repeatedly, finish, and compare; print the events, and return whether all is equal."""
    rng = np.random.RandomState(seed)
    make_dataset(folder / "data")
    counts = collections.Counter[str]()
    expected = -1
    for kill in range(1, kills + 1):
        moment = MOMENTS[rng.randint(len(MOMENTS))]
        before = parts(folder)
        begun = live(folder, moment, rng)
        if begun is not None and begun != max(expected, 0):
            raise click.ClickException(f"resumed from step {begun}, but step {expected} had been saved")
        expected = newest_step(folder)
        left = len(parts(folder) - before)
        counts[f"killed at {moment}"] += 1
        counts["left a temporary file"] += bool(left)
        counts["resumed from a checkpoint"] += begun is not None and begun > 0
        print(f"kill {kill:3d} at {moment:5s}: began at {begun}, saved up to {expected}, {left} left over", flush=True)
    steps = max(expected, 0) + 3
    killed = finish(folder, "killed", steps=steps)
    whole = finish(folder, "whole", steps=steps, checkpoint_steps=0, checkpoint_minutes=0)
    states = [checkpoint.load_run_state(checkpoint.train_state_path(run_dir, steps)) for run_dir in (killed, whole)]
    equal = {part: same(states[0][part], states[1][part]) for part in ("modules", "optimizers", "system")}
    ticks = [[line["step"] for line in read_lines(run_dir / "stats.jsonl")] for run_dir in (killed, whole)]
    losses = [[line.get("loss/D_loss") for line in read_lines(run_dir / "stats.jsonl")] for run_dir in (killed, whole)]
    equal |= {"ticks": ticks[0] == ticks[1], "losses of every tick": losses[0] == losses[1]}
    print(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    print(f"{steps} steps, {kills} kills; compared with an uninterrupted run, bit for bit:")
    for name, answer in equal.items():
        print(f"  {name:22s} {'equal' if answer else 'DIFFERENT'}")
    return all(equal.values())


@click.command()
@click.option("--kills", help="Number of kills", type=click.IntRange(min=0), default=50, show_default=True)
@click.option("--seed", help="Random seed of the moments", type=int, default=0, show_default=True)
def main(kills: int, seed: int) -> None:
    """Kill training at random moments and compare with an uninterrupted run.

    \b
    Example: python -m benchmarks.soak_resume --kills 50
    """
    with tempfile.TemporaryDirectory() as folder:
        if not soak(Path(folder), kills, seed):
            raise click.ClickException("the interrupted run differs from the uninterrupted one")


if __name__ == "__main__":
    main()
