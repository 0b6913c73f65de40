"""Runs on footage in published layouts: resumed as on a dataset, and footage that is replaced is noticed."""

import shutil

import numpy as np
import pytest

from tests.training import tiny_gan
from tests.training.data.test_layouts import clips_of, write_npz, write_river
from tests.training.tiny_gan import LARGE, TinyGAN, assert_equal, final_state
from training.loop import train


def write_layout(kind, folder, change=0):
    """Write six clips of 16 frames, of which the last begins with another pixel after a change."""
    clips = clips_of([16] * 6, LARGE)
    clips[-1][0, 0, 0, 0] ^= change
    if kind == "river":
        return write_river(folder, clips, 4)
    for number, clip in enumerate(clips):
        write_npz(folder / f"{number}.npz", clip, actions=np.zeros(16, int))
    return folder


@pytest.mark.parametrize("kind", ["river", "npz"])
def test_a_run_on_a_layout_is_resumed_and_knows_its_footage(kind, tmp_path):
    root = write_layout(kind, tmp_path / "data" / "train")
    options = tiny_gan.option_maker(root, tmp_path / "runs")
    whole = train(TinyGAN, options(steps=4, sample_steps=4, outdir=str(tmp_path / "whole")))
    assert (whole.run_dir / "samples" / "real-0008x0016.png").exists()
    run_dir = train(TinyGAN, options(steps=2)).run_dir
    assert train(TinyGAN, options(steps=4)).run_dir == run_dir
    states = [final_state(folder, 4) for folder in (whole.run_dir, run_dir)]
    for name in ("modules", "optimizers", "footage"):
        assert_equal(*(state[name] for state in states))
    shutil.rmtree(root)
    write_layout(kind, root, change=1)
    with pytest.raises(ValueError, match="other footage.*of its 6 clips at 0008x0016, 1 are gone"):
        train(TinyGAN, options(steps=5))
