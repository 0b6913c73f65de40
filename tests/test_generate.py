"""generate.py as its user runs it: files, lengths, pictures and refusals."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import generate
from dnnlib.video import iter_video_frames
from training.checkpoint import save_network
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.sampling import make_source
from training.longvideogan.sres.generator import SuperResGenerator


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A pair of tiny networks and where they are saved."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    lres = LowResGenerator(18, 32, 16, 4, 10, 60, 8, 8, temporal_channels=(8, 8, 6, 6), spatial_channels=(4, 4, 4, 4))
    sres = SuperResGenerator(36, 64, 18, 32, 2, 8, 8, num_layers=8, channel_base=256, channel_max=4)
    save_network(lres, folder / "lres.pkl")
    save_network(sres, folder / "sres.pkl")
    return lres.requires_grad_(False), sres.requires_grad_(False), folder


def run(*arguments, **expected):
    result = CliRunner().invoke(generate.main, [str(argument) for argument in arguments])
    assert result.exit_code == expected.get("exit_code", 0), result.output
    return result.output


def count_frames(path):
    return sum(1 for _ in iter_video_frames(path))


def test_pair_writes_exactly_what_was_asked(networks, tmp_path):
    lres, sres, folder = networks
    output = run(
        *[f"--outdir={tmp_path}", "--seed=7", "--len=21", f"--lres={folder / 'lres.pkl'}"],
        *[f"--sres={folder / 'sres.pkl'}", "--save-lres=True", "-i", 0, "-i", 20, "--device=cpu"],
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "seed=7_len=21_frame=0000.png",
        "seed=7_len=21_frame=0020.png",
        "seed=7_len=21_lres.mp4",
        "seed=7_len=21_sheet.png",
        "seed=7_len=21_sres.mp4",
    ]
    assert "Next: python calc_metrics.py" in output
    assert count_frames(tmp_path / "seed=7_len=21_sres.mp4") == 21
    assert count_frames(tmp_path / "seed=7_len=21_lres.mp4") == 21
    frames = torch.cat(list(make_source(lres, sres).sample([7], 0, 21)), dim=1)[0].numpy()
    for index in (0, 20):
        picture = np.asarray(Image.open(tmp_path / f"seed=7_len=21_frame={index:04d}.png"))
        assert np.array_equal(picture, frames[index])
    sheet = np.asarray(Image.open(tmp_path / "seed=7_len=21_sheet.png"))
    assert sheet.shape == (4 * 36, 6 * 64, 3)
    assert np.array_equal(sheet[:36, 64:128], frames[1])


def test_low_resolution_alone_is_written_and_is_a_prefix_of_a_longer_one(networks, tmp_path):
    lres = networks[2] / "lres.pkl"
    for length in (9, 30):
        run(f"--outdir={tmp_path}", "--seed=1", f"--len={length}", f"--lres={lres}", "-i", 8, "--device=cpu")
        assert count_frames(tmp_path / f"seed=1_len={length}_lres.mp4") == length
    pictures = [Image.open(tmp_path / f"seed=1_len={length}_frame=0008.png") for length in (9, 30)]
    difference = np.abs(np.asarray(pictures[0], np.int16) - np.asarray(pictures[1], np.int16))
    assert difference.max() <= 1 and difference.mean() < 1e-3


def test_mistakes_are_answered_before_any_work(networks, tmp_path):
    folder = networks[2]
    base = [f"--outdir={tmp_path / 'out'}", "--seed=0", "--device=cpu", "--len=9"]
    output = run(*base, f"--lres={folder / 'lres.pkl'}", "-i", 9, exit_code=2)
    assert "frame 9 was asked for, but the video has frames 0 to 8" in output
    output = run(*base, f"--lres={folder / 'sres.pkl'}", exit_code=1)
    assert "holds a SuperResGenerator; expected a low-resolution generator" in output
    output = run(*base, f"--lres={folder / 'lres.pkl'}", f"--sres={folder / 'lres.pkl'}", exit_code=1)
    assert "holds a LowResGenerator; expected a super-resolution generator" in output
    output = run(*base, f"--lres={folder / 'nothing.pkl'}", exit_code=1)
    assert "nothing.pkl" in output
    assert not (tmp_path / "out").exists()
