"""All steps on real camera footage: videos -> dataset -> both stages -> long video -> FVD, by the scripts."""

import json
from pathlib import Path

import iscc_samples
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import calc_metrics
import generate
import train_lres
import train_sres
from dataset_tools import make_dataset_from_videos
from dnnlib.video import iter_video_frames


def run(command, *arguments):
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def footage(tmp_path_factory) -> Path:
    """Four seconds of a real clip, as a dataset at both toy sizes."""
    (video,) = [path for path in iscc_samples.videos() if path.name == "demo.mp4"]
    folder = tmp_path_factory.mktemp("footage")
    (folder / "videos").mkdir()
    (folder / "videos" / "walk.mp4").symlink_to(video)
    run(
        make_dataset_from_videos.main,
        *[folder / "videos", folder / "data", "--sizes=18x32,72x128", "--trim-start=20", "--trim-end=36"],
        "--num-partitions=1",
    )
    return folder / "data"


def test_footage_becomes_a_long_video_with_a_number(footage, tmp_path):
    networks = {}
    small = ["--preview-frames=8", "--preview-videos=1"]
    for stage, script in (("lres", train_lres), ("sres", train_sres)):
        output = run(
            script.main,
            *[f"--outdir={tmp_path / stage}", f"--dataset={footage}", "--preset=toy", "--batch=2", "--device=cpu"],
            *["--steps=2", "--tick-steps=1", "--sample-steps=2", "--checkpoint-steps=1"],
            *small,
        )
        assert "eta" in output and "Next: python" in output
        (run_dir,) = (tmp_path / stage).iterdir()
        assert run_dir.name == f"00000-data-2batch-1accum-{20.0 if stage == 'lres' else 40.0}gamma"
        lines = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 1, 2]
        assert np.isfinite(lines[-1]["loss/D_loss"]["mean"])
        assert (run_dir / "checkpoints" / "ckpt-00000002-train.pt").is_file()
        assert np.asarray(Image.open(run_dir / "samples" / "fake-00000002.png")).std() > 1
        networks[stage] = run_dir / "checkpoints" / "ckpt-00000002-G-ema.pkl"
        resumed = run(
            script.main,
            *[f"--outdir={tmp_path / stage}", f"--dataset={footage}", "--preset=toy", "--batch=2", "--device=cpu"],
            *["--steps=3", "--tick-steps=1", "--sample-steps=0", "--checkpoint-steps=0"],
            *small,
        )
        assert "goes on at step 2 of 3" in resumed and len(list((tmp_path / stage).iterdir())) == 1

    pair = [f"--lres={networks['lres']}", f"--sres={networks['sres']}", "--device=cpu"]
    run(generate.main, f"--outdir={tmp_path / 'out'}", "--seed=0", "--len=40", *pair)
    assert sum(1 for _ in iter_video_frames(tmp_path / "out" / "seed=0_len=40_sres.mp4")) == 40

    lines = tmp_path / "metrics.jsonl"
    run(calc_metrics.main, f"--dataset={footage}", *pair, "-m", "fvd2_9f", f"--path={lines}")
    result = json.loads(lines.read_text())
    assert result["results"]["fvd2_9f"] > 0 and "warning" in result
    assert result["detector"]["verified"] is True


@pytest.mark.parametrize("script", [train_lres, train_sres])
def test_dry_run_prints_every_option_and_does_nothing(script, tmp_path):
    output = run(script.main, f"--outdir={tmp_path / 'runs'}", "--dataset=data", "--gamma=2.5", "--dry-run")
    options = json.loads(output)
    assert options["model"]["gamma"] == 2.5 and options["batch"] in (32, 64) and "batch" not in options["model"]
    assert options["steps"] in (100_000, 275_000)
    assert not (tmp_path / "runs").exists()


def test_training_options_that_cannot_be_are_one_sentence(tmp_path):
    for arguments, message in [
        (["--preset=huge"], "'huge' is unknown; there are default, horseback-lres"),
        (["--size=36by64"], "is not a size; give height x width, such as 36x64"),
        (["--metric=fvd", "--preset=toy"], "Unknown metric 'fvd'"),
        (["--preset=toy"], str(tmp_path / "absent")),
    ]:
        result = CliRunner().invoke(
            train_lres.main, [f"--dataset={tmp_path / 'absent'}", f"--outdir={tmp_path / 'runs'}", *arguments]
        )
        assert result.exit_code != 0 and message in result.output, result.output
    assert not (tmp_path / "runs").exists()
