"""The convolutional autoencoder: sizes, training, files, reconstruction; systems of codes refuse continuous latents."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dataset_tools.encode_dataset import main as encode_dataset
from tests.training.river import tiny
from training.contract import Run
from training.data.dataset import ClipDataset
from training.mebt.options import MeBTOptions
from training.mebt.system import MeBTTraining
from training.modules.conv_autoencoder import ConvAutoencoder
from training.network_file import load_tokenizer, save_bundle, save_network
from training.river.system import River
from training.sampling import open_sampler
from training.tokenizer.presets import PLAIN
from training.tokenizer.sampling import Reconstruction
from training.tokenizer.system import TokenizerOptions, TokenizerTraining

ARGUMENTS = {"widths": [8, 8], "blocks": 1, "embedding_dim": 3}
OPTIONS = {**PLAIN, "network": "conv2d", "height": 16, "width": 24, "clip_frames": 1, "lr": 5e-3, "schedule": "cosine"}


def system(steps=60, precision=None):
    options = TokenizerOptions(**{**OPTIONS, "arguments": ARGUMENTS, "quantizer": {"kind": "none"}})
    return TokenizerTraining(options, Run(batch=8, steps=steps, precision=precision))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("conv") / "tokenizer.pkl"
    save_network(ConvAutoencoder(16, 24, **ARGUMENTS), path)
    return path


@pytest.mark.parametrize("widths", [(8,), (8, 12, 16)])
def test_the_stride_is_two_for_each_level(widths):
    network = ConvAutoencoder(16, 24, widths=widths, blocks=1, embedding_dim=5)
    edge = 1 << len(widths)
    z = network.latents(torch.zeros(2, 3, 4, 16, 24))
    assert network.stride == (1, edge) and z.shape == (2, 5, 4, 16 // edge, 24 // edge)
    assert network.decode_latents(z).shape == (2, 3, 4, 16, 24)
    assert network.last_layer is network.decoder[-2].weight


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns_to_reconstruct(precision):
    """Eight images of 4x6 random colours."""
    training, losses = system(precision=precision), []
    for step in range(60):
        clips = tiny.clips(0, 8, 1)
        found = training.step(iter([{"clip": clips}]), step)
        losses.append(found["loss/recon_loss"].item())
        assert not any(name.startswith("codebook/perplexity") for name in found)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) / 3, losses
    assert all(p.dtype == torch.float32 for p in training.network.parameters())


def test_files_reconstruct_and_hold_the_same_network(tmp_path):
    training = system()
    training.step(iter([{"clip": tiny.clips(0, 8, 1)}]), 0)
    save_bundle(training.export(), tmp_path / "tokenizer.pkl")
    network, _ = load_tokenizer(str(tmp_path / "tokenizer.pkl"), "cpu")
    video = tiny.clips(1, 1, 5)
    sampler = open_sampler([str(tmp_path / "tokenizer.pkl")])
    assert isinstance(sampler, Reconstruction)
    found = sampler.reconstruct(video)
    torch.testing.assert_close(found, training.network.eval().decode_latents(network.latents(video)))


def test_systems_of_codes_and_token_shards_refuse_it(path, tmp_path):
    with pytest.raises(ValueError, match="has continuous latents, but mebt models codes"):
        MeBTTraining(MeBTOptions(tokenizer=str(path)), Run(batch=2, steps=2))
    assert isinstance(tiny.system(path), River)  # models latents
    root = tiny.write_dataset(tmp_path / "data", 2, 4)
    found = CliRunner().invoke(encode_dataset, [str(root), f"--tokenizer={path}"])
    assert found.exit_code and "continuous latents, no codes: store them by --latents" in found.output
    assert not list(root.glob("codes-*"))


def test_latents_are_stored_in_half_precision_arithmetic_too(path, tmp_path):
    found = []
    for precision in ("fp32", "bf16"):
        root = tiny.write_dataset(tmp_path / precision, 2, 4)
        words = [str(root), f"--tokenizer={path}", "--latents", f"--precision={precision}", "--device=cpu"]
        result = CliRunner().invoke(encode_dataset, words)
        assert result.exit_code == 0, result.output
        sha256 = load_tokenizer(str(path), "cpu")[1]
        dataset = ClipDataset(root, [(16, 24)], latents=sha256)
        found.append(np.stack([dataset.read_latents(clip, 0, 4) for clip in range(2)]).astype(np.float32))
    assert not np.array_equal(*found)
    np.testing.assert_allclose(found[1], found[0], atol=0.05 * found[0].std())
