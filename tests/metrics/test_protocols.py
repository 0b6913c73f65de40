"""Protocols: their tables, and a predictor measured by one of its own from the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import calc_metrics
from dataset_tools.archive import ShardWriter, describe_dataset
from dataset_tools.frames import encode_jpeg
from metrics import families
from metrics.protocols import protocols
from tests.recall.networks import Blocks, Predictor
from training import registry
from training.contract import Bundle
from training.network_file import content_hash, save_bundle
from training.random import random_state

SIZE, NUM_FRAMES = (32, 64), 50
ACTIONS: tuple[str, ...] = ("none", "forward", "left", "right")


@pytest.mark.parametrize("name", protocols())
def test_metrics_of_a_protocol_fit_its_context_and_horizon(name: str):
    rules = protocols()[name]
    assert rules.name == name and rules.runs >= 1 and rules.samples >= 1
    families.check_names(rules.metrics)
    for metric in [families.parse(name) for name in rules.metrics if name not in families.LONG_MEASURES]:
        if rules.context is not None and rules.horizon is not None:
            assert metric.shape.context in (0, rules.context) and metric.shape.new_span == rules.horizon
        assert rules.group_size is None or metric.num_items % rules.group_size == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a dataset of noise that moves as the actions say, an untrained Recall, and its tokenizer."""
    root = tmp_path_factory.mktemp("recall")
    with ShardWriter(root / "data", (SIZE,), 0) as writer:
        for number in range(4):
            random = random_state("test-protocols", 0, number)
            moves = random.randint(0, 4, NUM_FRAMES).tolist()
            image = random.randint(0, 256, (*SIZE, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)[: SIZE[0], : SIZE[1]]
            with writer.clip(f"clip{number}", actions=[ACTIONS[move] for move in moves]) as add:
                for move in np.cumsum(moves):
                    add([encode_jpeg(np.roll(image, move, axis=1))])
    describe_dataset(root / "data", [writer.report({30: 4})], 1, (), actions=list(ACTIONS))
    torch.manual_seed(0)
    tokenizer, network = Blocks(*SIZE), Predictor((4, 8))
    save_bundle(Bundle({"tokenizer": tokenizer}, "recall", {}, "", 30.0), root / "tokenizer.pkl")
    networks = {"predictor": network, "tokenizer": tokenizer}
    bundle = Bundle(networks, "recall", {}, content_hash(tokenizer), 30.0, {"actions": list(ACTIONS)})
    save_bundle(bundle, root / "model.pkl")
    return root


@pytest.fixture(autouse=True)
def recall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register Recall."""
    monkeypatch.setitem(registry.SYSTEMS, "recall", "tests.recall.spec:SPEC")


def run(folder: Path, *arguments: str, model: str = "model.pkl") -> tuple[int, str, list[dict]]:
    words = [f"--dataset={folder / 'data'}", *([f"--model={folder / model}"] if model else []), "--device=cpu"]
    result = CliRunner().invoke(calc_metrics.main, [*words, *arguments])
    lines = [json.loads(line) for line in result.output.splitlines() if line.startswith("{")]
    return result.exit_code, result.output, lines


def test_a_predictor_is_measured_by_the_protocol_of_its_system(folder: Path, own_cache: Path):
    code, output, lines = run(folder, "--protocol=recall-36to8")
    assert code == 0, output
    assert [line["metric"] for line in lines] == ["fmd4_9f_context1", "psnr4_8f", "ssim4_8f", "lpips4_8f"]
    for line in lines:
        protocol = line["protocol"]
        assert protocol["name"] == "recall-36to8"
        assert (protocol["context"], protocol["horizon"], protocol["samples"]) == (36, 8, 2)
        assert (line["num_real"], line["num_fake"]) == (4, 8)
        assert line["metric"] in line["floors"] and line["metric"] in line["baselines"]["copy of the last frame"]
        assert line["fake"]["options"] == {"temperature": 1.0}
    assert all(f"{line['metric']}_best2" in line["results"] for line in lines[1:])
    assert "--context=" in output.splitlines()[-1]


def test_options_take_precedence_and_context_may_be_longer_than_needed(folder: Path, own_cache: Path):
    options = ["--protocol=recall-36to8", "--samples=1", "--context-frames=40", "--horizon=5", "-m", "psnr3_5f"]
    code, output, (line,) = run(folder, *options, "--num-runs=2")
    assert code == 0, output
    assert line["protocol"]["context"] == 40 and line["num_fake"] == 3
    assert {"psnr3_5f_run01", "psnr3_5f_mean"} <= line["results"].keys() & line["floors"].keys()
    assert line["baselines"]["copy of the last frame"].keys() == {"psnr3_5f_mean"}


def test_its_tokenizer_is_measured(folder: Path, own_cache: Path):
    code, output, lines = run(folder, "-m", "psnr3_8f", "-m", "fmd3_8f", model="tokenizer.pkl")
    assert code == 0, output
    psnr, rfmd = lines
    assert rfmd["results"]["rfmd3_8f"] > 0 and 0 < psnr["results"]["psnr3_8f"] < 100 and "baselines" not in psnr


def test_the_bound_of_its_tokenizer_comes_first(folder: Path, own_cache: Path):
    code, output, lines = run(folder, "--bound=true", "-m", "fmd3_8f", "-m", "psnr3_8f", "--context-frames=38")
    assert code == 0, output
    assert [line["metric"] for line in lines] == ["rfmd3_8f", "fmd3_8f", "psnr3_8f"]
    assert lines[0]["bounds"] and "bounds" not in lines[1]
    _, _, (alone,) = run(folder, "-m", "fmd3_8f", model="tokenizer.pkl")
    assert lines[0]["results"] == pytest.approx(alone["results"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--protocol=labdoom-36to264"],
            "data has no clip of 300 frames, which are needed; the longest of its",
        ),
        (["--protocol=kth-10to30"], "the model needs 36 context frames, and 10 are given: give more"),
        (["--protocol=kth-10to3"], "there is no protocol 'kth-10to3'"),
        (["--bound=true", "--fake={folder}/data"], "--bound is for models whose file holds a tokenizer"),
        (["-m", "psnr3_8f", "--horizon=4"], "8 generated frames are compared, and the horizon is 4"),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, arguments: list[str], message: str):
    arguments = [argument.format(folder=folder) for argument in arguments]
    code, output, _ = run(folder, *arguments, model="" if "--fake" in " ".join(arguments) else "model.pkl")
    assert code != 0 and "Traceback" not in output
    assert message in output.replace("\n", " ")
