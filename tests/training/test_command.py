"""The training scripts: published commands, the effect of each option, and both stages stopped and resumed.

The file is a script as well, `torchrun test_command.py DATASET FOLDER`, for the test that needs two ranks.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import train_lres
import train_sres
from dataset_tools.archive import ShardWriter
from dataset_tools.frames import encode_jpeg
from tests.training.longvideogan import tiny
from torch_utils import distributed
from train import make_options as options_of
from train import training_command
from training import checkpoint, config, loop, registry
from training.config import TrainOptions, to_dict
from training.longvideogan.presets import STAGES

ROOT = Path(__file__).parents[2]
SCRIPTS = {"longvideogan-lres": train_lres.main, "longvideogan-sres": train_sres.main}
SIZES = [(16, 16), (18, 32), (36, 64)]
SHARED = {"r1_interval": 3, "preview_frames": 8}
TINY = {stage: {**options, **SHARED} for stage, options in tiny.TINY.items()}
TINY["longvideogan-sres"]["ada_interval"] = 3


def make_system(stage, stop_at=None, double=False):
    """Return the real system as a class; it may get SIGTERM within a step, and compute in double precision."""

    class Stopped(registry.resolve(registry.spec(stage).system)):
        def __init__(self, options, run):
            super().__init__(options, run)
            parts = [*self.modules.values(), *(getattr(self, name, None) for name in ("augment", "corrupt"))]
            for module in parts if double else []:
                if isinstance(module, torch.nn.Module):
                    module.double()

        def step(self, batches, number):
            if number == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step(batches, number)

    return Stopped


def make_options(stage, dataset, outdir, **changes):
    values: dict[str, Any] = {
        "steps": 4,
        "batch": 2,
        "tick_steps": 3,
        "sample_steps": 0,
        "checkpoint_steps": 0,
        "workers": 2,
    }
    return TrainOptions(outdir=str(outdir), dataset=str(dataset), system=stage, model=TINY[stage], **values | changes)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Five clips of noise at all sizes; three batches of two make an epoch, so its end lies within the runs."""
    root, rng = tmp_path_factory.mktemp("data") / "noise", np.random.RandomState(0)
    with ShardWriter(root, SIZES, 0) as writer:
        for name in "abcde":
            with writer.clip(name) as clip:
                for _ in range(24):
                    clip([encode_jpeg(rng.randint(0, 256, (*size, 3)).astype(np.uint8)) for size in SIZES])
    return root


def state_of(outdir, step=4):
    (run_dir,) = outdir.iterdir()
    return checkpoint.load_run_state(checkpoint.train_state_path(run_dir, step))


def differences(first, second, tolerance=0.0, path="state"):
    """Return the places in which two nested states differ by more than `tolerance`."""
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        return [line for key in first for line in differences(first[key], second[key], tolerance, f"{path}.{key}")]
    if isinstance(first, list | tuple):
        assert len(first) == len(second), path
        pairs = enumerate(zip(first, second, strict=True))
        return [line for i, pair in pairs for line in differences(*pair, tolerance, f"{path}[{i}]")]
    if isinstance(first, torch.Tensor):
        return [] if (first.double() - second.double()).abs().max() <= tolerance else [path]
    if isinstance(first, float):
        return [] if abs(first - second) <= tolerance else [path]
    return [] if first == second else [path]


def trained_part(state):
    return {name: state[name] for name in ("modules", "optimizers", "system")}


@pytest.mark.parametrize("stage", list(TINY))
def test_a_stage_that_is_stopped_and_continued_equals_one_that_is_not(stage, dataset, tmp_path):
    loop.train(make_system(stage), make_options(stage, dataset, tmp_path / "whole", workers=0))
    stopped = loop.train(make_system(stage, stop_at=1), make_options(stage, dataset, tmp_path / "parts"))
    assert (stopped.step, stopped.finished) == (2, False)
    loop.train(make_system(stage), make_options(stage, dataset, tmp_path / "parts"))
    whole, parts = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert not differences(trained_part(whole), trained_part(parts))
    stats = [json.loads(line) for line in (stopped.run_dir / "stats.jsonl").read_text().splitlines()]
    assert [line["step"] for line in stats] == [0, 3, 4]
    assert [line.get("loss/r1_penalty", {"num": 0})["num"] for line in stats] == [0, 2, 2]  # at steps 0 and 3


def test_a_command_that_a_signal_stops_ends_with_its_number(dataset, tmp_path, monkeypatch):
    stopped = make_system("longvideogan-lres", stop_at=1)
    for module in (config, loop):
        monkeypatch.setattr(module, "system_class", lambda system: stopped)
    words = [f"--dataset={dataset}", f"--outdir={tmp_path}", "--size=16x16", "--num-frames=16", "--preset=toy"]
    words += ["--batch=2", "--device=cpu", "--sample-steps=0", "--steps=3"]
    for expected, said in ((128 + signal.SIGTERM, "Stopped at step 2"), (0, "Finished 3 steps")):
        result = CliRunner().invoke(train_lres.main, words)
        assert result.exit_code == expected and said in result.output, result.output
        assert ("Next: " in result.output) == (expected == 0)
        stopped = make_system("longvideogan-lres")


@pytest.mark.slow
def test_ranks_may_be_stopped_continued_and_changed(dataset, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launcher, __file__, dataset, tmp_path], env=environment, check=True, timeout=240)
    for stage in TINY:
        folder = tmp_path / stage
        whole, parts = state_of(folder / "whole"), state_of(folder / "parts")
        assert not differences(trained_part(whole), trained_part(parts))

        # Two steps on two ranks and two on one are four on one, and four on two.
        for outdir in (folder / "double", folder / "alone"):
            loop.train(make_system(stage, double=True), make_options(stage, dataset, outdir))
        alone = trained_part(state_of(folder / "alone"))
        assert not differences(alone, trained_part(state_of(folder / "double")), 1e-8)
        assert not differences(alone["modules"], whole["modules"], 1e-2)


@pytest.mark.slow
def test_training_survives_being_killed():
    command = [sys.executable, "-m", "benchmarks.soak_resume", "--kills=3", "--seed=3"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0 and "3 kills" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("stage", "arguments", "expected"),
    [
        (
            "longvideogan-lres",
            "--outdir=runs/lres --dataset=datasets/horseback --batch=64 --grad-accum=2 --gamma=1.0 "
            "--metric=fvd2048_128f",
            {"batch": 64, "grad_accum": 2, "steps": 100_000, "metrics": ["fvd2048_128f"], "checkpoint_steps": 500},
        ),
        (
            "longvideogan-sres",
            "--outdir=runs/sres --dataset=datasets/horseback --batch=32 --gamma=1.0 -m fvd2048_16f",
            {"batch": 32, "grad_accum": 1, "steps": 275_000, "metrics": ["fvd2048_16f"], "checkpoint_minutes": 10.0},
        ),
    ],
)
def test_published_commands_give_the_published_recipe(stage, arguments, expected):
    result = CliRunner().invoke(SCRIPTS[stage], [*arguments.split(), "--dry-run"], catch_exceptions=False)
    options = json.loads(result.output)
    assert {name: options[name] for name in expected} == expected
    model = {"gamma": 1.0, "r1_interval": 16, "g_lr": 0.003}
    assert {name: options["model"][name] for name in model} == model
    assert options["seed"] == 0 and options["x_flip"] is True and options["model"]["preview_frames"] == 256


COMMON = {
    "--steps=7": {"steps": 7},
    "--seed=3": {"seed": 3},
    "--x-flip=False": {"x_flip": False},
    "--weighting=frame": {"weighting": "frame"},
    "--init-from=https://x.org/net.pkl": {"init_from": "https://x.org/net.pkl"},
    "--precision=fp32": {"precision": "fp32"},
    "--compile": {"compile": True},
    "--batch=128": {"batch": 128},
    "--grad-accum=4": {"grad_accum": 4},
    "--gamma=2": {"model.gamma": 2.0},
    "--r1-interval=5": {"model.r1_interval": 5},
    "--g-lr=0.1": {"model.g_lr": 0.1},
    "--d-lr=0.2": {"model.d_lr": 0.2},
    "--ema-beta=0.5": {"model.ema_beta": 0.5},
    "--workers=0": {"workers": 0},
    "--cache=ram": {"cache": "ram"},
    "--tick-steps=9": {"tick_steps": 9},
    "--sample-steps=0": {"sample_steps": 0},
    "--metric-steps=11": {"metric_steps": 11},
    "--checkpoint-steps=0": {"checkpoint_steps": 0},
    "--checkpoint-minutes=0.5": {"checkpoint_minutes": 0.5},
    "--keep=8": {"keep": 8},
    "--logger=wandb --log=tensorboard": {"log": ["wandb", "tensorboard"]},
    "--resume=latest --override": {"resume": "latest", "override": True},
}
OWN = {
    "longvideogan-lres": {
        "--size=18x32": {"model.height": 18, "model.width": 32},
        "--num-frames=32": {"model.num_frames": 32},
        "--diffaug=color": {"model.diffaug": "color"},
        "--temporal-stretch=0.5": {"model.temporal_stretch": 0.5},
    },
    "longvideogan-sres": {
        "--size=72x128": {"model.height": 72, "model.width": 128},
        "--lres-size=18x32": {"model.lres_height": 18, "model.lres_width": 32},
        "--augment=none": {"model.augment": "none"},
        "--ada-target=0.7": {"model.ada_target": 0.7},
        "--ada-interval=8": {"model.ada_interval": 8},
    },
}


@pytest.mark.parametrize("stage", list(SCRIPTS))
def test_options_reach_what_they_are_for_and_change_nothing_else(stage):
    def resolved(arguments):
        words = ["--dataset=data", "--dry-run", *arguments.split()]
        result = CliRunner().invoke(SCRIPTS[stage], words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        options = json.loads(result.output)
        model = options.pop("model")
        return options | {f"model.{name}": value for name, value in model.items()}

    default = resolved("")
    for arguments, expected in (COMMON | OWN[stage]).items():
        found = resolved(arguments)
        changed = {name: found[name] for name in found if found[name] != default[name]}
        assert expected.items() <= found.items() and changed.keys() <= expected.keys(), arguments


def test_filters_of_a_preset_change_and_nothing_else_of_its_networks():
    words = ["--dataset=data", "--preset=toy", "--dry-run", "--filter-taps", "16", "64"]
    found = json.loads(CliRunner().invoke(train_lres.main, words, catch_exceptions=False).output)["model"]["generator"]
    expected = STAGES["longvideogan-lres"]["toy"]["model"]["generator"] | {"max_filter_taps": 64}
    assert found == json.loads(json.dumps(expected))


def test_a_stage_offers_no_option_of_the_other():
    names = {stage: {name for option in script.params for name in option.opts} for stage, script in SCRIPTS.items()}
    assert {"--diffaug", "--temporal-stretch", "--filter-taps"} <= names["longvideogan-lres"]
    only_sres = {"--lres-size", "--augment", "--ada-target", "--ada-interval"}
    assert names["longvideogan-sres"] - names["longvideogan-lres"] == only_sres
    assert names["longvideogan-lres"] - names["longvideogan-sres"] == {
        "--diffaug",
        "--temporal-stretch",
        "--filter-taps",
    }


@pytest.mark.parametrize("stage", list(STAGES))
def test_every_preset_is_offered_and_resolves(stage):
    (option,) = [option for option in SCRIPTS[stage].params if option.name == "preset"]
    assert isinstance(option, click.Option) and option.help is not None
    for preset in STAGES[stage]:
        assert preset in option.help
        options = options_of(stage, preset, {"outdir": "runs", "dataset": "data"})
        assert to_dict(options)["steps"] > 0 and not {"batch", "seed"} & to_dict(options)["model"].keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--freeze-d=2", "--init-from=net.pkl"], "only a training state holds: add --init-from="),
        (["--override"], "not with --resume=auto; add --resume=latest or --resume=<run directory>"),
        (["--resume=nowhere/ckpt-00000001-train.pt"], "ckpt-00000001-train.pt is not a whole training state"),
        (["--g-lr=0"], "0 is not in the range x>0"),
        (["--precision=fp16"], "fp16 is for CUDA, and this is cpu; use fp32"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(arguments, message, dataset, tmp_path):
    words = [f"--dataset={dataset}", f"--outdir={tmp_path}", "--size=16x16", "--num-frames=16", "--device=cpu"]
    result = CliRunner().invoke(train_lres.main, [*words, "--preset=toy", *arguments])
    assert result.exit_code != 0 and message in result.output.replace("\n", " "), result.output
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    torch.set_num_threads(1)
    data, target = Path(sys.argv[1]), Path(sys.argv[2])
    for name in TINY:
        loop.train(make_system(name), make_options(name, data, target / name / "whole"))
        for number in (2, 4):
            loop.train(make_system(name), make_options(name, data, target / name / "parts", steps=number))
        loop.train(make_system(name, double=True), make_options(name, data, target / name / "double", steps=2))
    distributed.shutdown()


PRIORS = ("river", "river-refiner", "tats", "tats-interpolation", "mebt", "teco")


@pytest.mark.parametrize("name", registry.SYSTEMS)
def test_a_dry_run_needs_no_files_and_a_run_does(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    runner, command, words = CliRunner(), training_command(name), ["--preset=toy", "--device=cpu"]
    printed = runner.invoke(command, [*words, "--dry-run"], catch_exceptions=False)
    assert printed.exit_code == 0 and json.loads(printed.output)["system"] == name
    refused = runner.invoke(command, words)
    assert refused.exit_code == 2 and "Missing option '--dataset'" in refused.output
    if name in PRIORS:
        refused = runner.invoke(command, [*words, "--dataset=data"])
        assert refused.exit_code == 2 and "--tokenizer is missing: give the file of the tokenizer" in refused.output
    assert not list(tmp_path.iterdir())
