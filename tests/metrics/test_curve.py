"""Evaluation of the checkpoints of a run, enlarged by a network or by interpolation."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from runs import curve
from training.checkpoint import save_network, save_train_state
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.sampling import LowResSampler
from training.longvideogan.sres.generator import SuperResGenerator
from training.sampling import Request, Resized

METRICS = ("fmd2_9f", "color_similarity")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with two checkpoints at 18x32."""
    path = tmp_path_factory.mktemp("runs") / "00000-mine"
    for step in (3, 12):
        torch.manual_seed(step)
        lres = LowResGenerator(
            18, 32, 16, 4, 10, 60, 8, 8, temporal_channels=(8, 8, 6, 6), spatial_channels=(4, 4, 4, 4)
        )
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        save_network(lres, path / f"checkpoints/ckpt-{step:08d}-G-ema.pkl")
        save_train_state(path / f"checkpoints/ckpt-{step:08d}-train.pt", {})
    return path


@pytest.fixture(scope="module")
def dataset(make_dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("pairs"), [(36, 64), (18, 32)])


def measure(*arguments: object) -> tuple[int, str]:
    options = ["--num-videos=2", "--num-frames=12", "--device=cpu", *(f"--metric={name}" for name in METRICS)]
    result = CliRunner().invoke(curve.main, [*map(str, arguments), *options])
    return result.exit_code, result.output


def test_every_checkpoint_is_a_point_and_none_is_measured_twice(run_dir, dataset, tmp_path, own_cache):
    out = tmp_path / "curve.jsonl"
    for _ in range(2):
        code, output = measure(run_dir, f"--dataset={dataset}", f"--out={out}")
        assert code == 0, output
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert [(line["step"], line["metric"]) for line in lines] == [(s, m) for s in (3, 12) for m in METRICS]
    assert len({json.dumps(line["results"]) for line in lines}) == 4
    assert "ckpt-00000003" in lines[0]["lres"] and lines[0]["sres"] is None
    first, second = (line["results"]["fmd2_9f"] for line in lines[::2])
    assert f"Lowest fmd2_9f: {lines[0 if first < second else 2]['lres']}\n" in output


def test_of_a_run_some_checkpoints_are_enough(run_dir, dataset, tmp_path, own_cache):
    out = tmp_path / "curve.jsonl"
    code, output = measure(run_dir, "--every=4", f"--dataset={dataset}", f"--out={out}")
    assert code == 0 and {json.loads(line)["step"] for line in out.read_text().splitlines()} == {12}, output


def test_a_run_that_began_with_the_state_of_another_one_goes_on_from_its_step(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "last", ignore=shutil.ignore_patterns("*-00000003-*"))
    shutil.copy(run_dir / "checkpoints/ckpt-00000003-G-ema.pkl", tmp_path / "last/checkpoints/ckpt-00000000-G-ema.pkl")
    for init_from, steps in (("https://x.org/ckpt-00000040-train.pt", [52]), ("mine.pkl", [0, 12]), (None, [0, 12])):
        (tmp_path / "last/options.json").write_text(json.dumps({"init_from": init_from}))
        assert [step for step, _ in curve.find_networks([tmp_path / "last"])] == steps


def test_ways_to_enlarge_are_distinguished(run_dir, dataset, tmp_path, own_cache):
    torch.manual_seed(1)
    widths = {"z_channels": 8, "w_channels": 8, "num_layers": 8, "channel_base": 256, "channel_max": 4}
    save_network(SuperResGenerator(36, 64, 18, 32, **widths), tmp_path / "sres.pkl")
    network, out = run_dir / "checkpoints/ckpt-00000012-G-ema.pkl", tmp_path / "curve.jsonl"
    for option in (f"--sres={tmp_path / 'sres.pkl'}", "--bicubic=36x64"):
        code, output = measure(network, option, f"--dataset={dataset}", f"--out={out}")
        assert code == 0, output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(bool(line["sres"]), line["bicubic"]) for line in lines] == [(True, None)] * 2 + [(False, "36x64")] * 2
    assert lines[0]["results"] != lines[2]["results"] and {line["protocol"].get("height") for line in lines[::2]} == {
        36
    }
    code, output = measure(network, "--bicubic=36x64", "--sres=x", f"--dataset={dataset}", f"--out={out}")
    assert code == 2 and "two ways" in output


def test_enlarged_frames_are_those_of_the_network(run_dir):
    torch.manual_seed(0)
    lres = LowResGenerator(18, 32, 16, 4, 10, 60, 8, 8, temporal_channels=(8, 8, 6, 6), spatial_channels=(4, 4, 4, 4))
    plain, request = LowResSampler(lres.eval()), Request([0, 1], [0, 5], 7)
    (large,) = (chunk["video"] for chunk in Resized(plain, (36, 64)).frames(request))
    (small,) = (chunk["video"] for chunk in plain.frames(request))
    for clip, t in ((0, 3), (1, 6)):
        expected = torch.nn.functional.interpolate(small[clip, :, t][None], (36, 64), mode="bicubic")
        torch.testing.assert_close(large[clip, :, t][None], expected)


def test_what_is_no_run_is_refused(tmp_path, dataset):
    code, output = measure(tmp_path, f"--dataset={dataset}", f"--out={tmp_path / 'x.jsonl'}")
    assert code == 1 and "has no checkpoints" in output
