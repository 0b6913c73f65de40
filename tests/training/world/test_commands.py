"""generate.py with a world model: videos begin with the dataset beside the model if no context is given."""

import numpy as np
import pytest
from click.testing import CliRunner

from generate import main as generate
from tests.training.river import tiny as footage
from tests.training.world import tiny
from training.contract import Bundle
from training.network_file import save_bundle


def run(outdir, *options, exit_code=0):
    found = CliRunner().invoke(generate, [f"--outdir={outdir}", "--format=npz", "--device=cpu", *options])
    assert found.exit_code == exit_code, found.output
    return found.output


@pytest.fixture
def model(tmp_path):
    networks = {
        "world": tiny.network(num_actions=2),
        "tokenizer": tiny.tokenizer(),
        "latents": tiny.latent_video().scale,
    }
    path = tmp_path / "walk.pkl"
    save_bundle(Bundle(networks, "world", {"prompt_frames": 4}), path)
    return path


def test_videos_begin_with_the_clip_of_the_seed(model, tmp_path):
    output = run(tmp_path / "out", f"--model={model}", "--seed=0", "--len=3", exit_code=1)
    assert "needs context frames of 16x24" in output
    root = footage.write_dataset(model.with_suffix(".starts"), 3, 12)
    for seed, clip in ((1, "clip1"), (5, "clip2")):
        output = run(tmp_path / "own", f"--model={model}", f"--seed={seed}")
        assert f"Begins with {root}:{clip}" in output
        run(tmp_path / "given", f"--model={model}", f"--seed={seed}", f"--context={root}:{clip}")
    pairs = zip(sorted((tmp_path / "own").glob("*.npz")), sorted((tmp_path / "given").glob("*.npz")), strict=True)
    for one, two in pairs:
        with np.load(one) as a, np.load(two) as b:
            assert a["frames"].shape == (8, 16, 24, 3)  # as far as its actions go
            np.testing.assert_array_equal(a["frames"], b["frames"])
