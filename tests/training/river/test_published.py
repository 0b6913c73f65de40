"""Files in the formats of the release open without running anything in them, before the reader of tokenizers."""

import argparse
import os
import re

import pytest
import torch

from tests import golden_files
from training.checkpoint import load_network
from training.modules.vqgan2d import VQGAN2D, RiverVQVAE
from training.network_file import load_bundle, load_tokenizer, save_bundle
from training.river.networks import VectorField
from training.river.refiner import RCAN
from training.river.sampling import RiverOptions, RiverSampler
from training.sampling import open_sampler

# Nominal side with attention: {frame side: (multiples of the width, side with attention)}.
CONFIGS = {64: ([1, 2, 2, 4], 16), 256: ([1, 1, 2, 2, 4], 16)}


def autoencoder(side=64, **options):
    ch_mult, attention = CONFIGS[side]
    sizes = {"ch": 32, "num_res_blocks": 1, "z_channels": 4, "embedding_dim": 4, "num_codes": 11, **options}
    return VQGAN2D(side, side, resolution=side, ch_mult=ch_mult, attn_resolutions=[attention], **sizes)


def release(tokenizer, field, prefix="module.", own=False):
    """What the release saves: the autoencoder under `ae`, its own one under `ae.backbone`."""
    golden_files.fill_river(tokenizer, 5)
    golden_files.fill_river(field, 900)
    where = "ae.backbone." if own else "ae."
    state = {f"{prefix}{where}{name}": value for name, value in tokenizer.state_dict().items()}
    state |= {f"{prefix}vector_field_regressor.{name}": value for name, value in field.state_dict().items()}
    adam = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}
    return {"model": state, "optimizer": adam, "lr_scheduler": {"last_epoch": 3}, "global_step": 300000}


def save(path, content):
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("kind", ["f8", "f16-bn", "own", "no-reference"])
def test_predictors(kind, prefix, tmp_path):
    own, side = kind == "own", {"f16-bn": 256, "own": 128}.get(kind, 64)
    tokenizer = RiverVQVAE(num_codes=11) if own else autoencoder(side)
    grid = (side // tokenizer.stride[1],) * 2
    head, reference = "bn" if kind == "f16-bn" else "ln", kind != "no-reference"
    field = VectorField(4, grid, 32, 2, 1, head, reference=reference)
    path = save(tmp_path / "model.pth", release(tokenizer, field, prefix, own))
    bundle = load_bundle(path)
    assert bundle.system == "river"
    found = bundle.networks["field"]
    assert isinstance(found, VectorField) and found.options == field.options
    for name, value in field.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    ours = bundle.networks["tokenizer"]
    assert isinstance(ours, RiverVQVAE | VQGAN2D)
    assert type(ours) is type(tokenizer) and (ours.height, ours.width) == (side, side)
    images = golden_files.wave((1, 3, 1, 32, 32), 0.05, a=1.0)
    torch.testing.assert_close(ours.latents(images), tokenizer.eval().latents(images).detach())
    sampler = open_sampler([path], {"legacy": "true", "solver": "rk4", "steps": "100"})
    assert isinstance(sampler, RiverSampler)
    assert sampler.size == (side, side) and sampler.needs.past == 1
    assert sampler.costs["evaluations_per_frame"] == 396 and sampler.settings.past_horizon == -1
    later = sampler.with_options(RiverOptions())
    assert isinstance(later, RiverSampler) and later.settings.past_horizon == 256
    assert open_sampler([path], {"prompt_frames": 10}).needs.past == 10


def test_a_predictor_gives_its_tokenizer_and_converts(tmp_path):
    tokenizer, field = autoencoder(), VectorField(4, (8, 8), 32, 1, 1)
    path = save(tmp_path / "model.pth", release(tokenizer, field))
    _, theirs = load_tokenizer(path)
    save_bundle(load_bundle(path), tmp_path / "river.pkl")
    _, ours = load_tokenizer(tmp_path / "river.pkl")
    assert ours == theirs
    assert open_sampler([str(tmp_path / "river.pkl")]).size == (64, 64)


@golden_files.entries("river", "checkpoint_loader*")
def test_published_prefixes(entry, golden, tmp_path):
    """Both forms open here, with and without the prefix; the first names are those of the release."""
    assert entry["module_prefix"] == "loads" and entry["plain"] == "RuntimeError"
    config = next(value for key, value in golden.items() if key.startswith("train_"))["vector_field_config"]
    tokenizer, field = RiverVQVAE(num_codes=8), VectorField(**{**config, "state_res": [16, 16]})
    for prefix in ("module.", ""):
        content = release(tokenizer, field, prefix, own=True)
        names = {re.sub(r"^module\.", "", name) for name in content["model"]}
        first = {".".join(name.split(".")[:2]) for name in names}
        assert sorted(first) == entry["top_level_prefixes"]
        assert isinstance(load_bundle(save(tmp_path / "model.pth", content)).networks["field"], VectorField)


@pytest.mark.parametrize("tanh", [False, True])
def test_refiners(tanh, tmp_path):
    network = RCAN(2, 3, 16, 4, tanh)
    golden_files.fill_river(network, 3)
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    content = {"refiner": state, "optimizer": {}, "epoch": 10, "args": argparse.Namespace(exp_name="x", fp16=False)}
    path = save(tmp_path / "checkpoint.pth", content)
    found = load_network(path)
    assert isinstance(found, RCAN) and found.options == network.options
    with pytest.raises(ValueError, match="checkpoint.pth holds a refiner alone: give the predictor, too"):
        open_sampler([path])
    predictor = save(tmp_path / "model.pth", release(autoencoder(), VectorField(4, (8, 8), 32, 1, 1)))
    assert len(open_sampler([predictor, path]).networks) == 3


def test_tokenizers_of_the_release_are_tokenizers(tmp_path):
    tokenizer = autoencoder()
    path = save(tmp_path / "vqvae.ckpt", {"state_dict": tokenizer.state_dict()})
    assert load_bundle(path).system == "tokenizer"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("module.vector_field_regressor.project_in.1.weight"), "missing part: 'project_in.1"),
        (lambda state: state.pop("module.vector_field_regressor.project_out.2.bias"), "missing .project_out.2.bias"),
        (lambda state: state.update({"module.vector_field_regressor.x.weight": torch.ones(1)}), "unknown .x.weight"),
        (lambda state: [state.pop(n) for n in list(state) if ".ae." in n], "without its autoencoder"),
    ],
)
def test_files_with_other_tensors_are_refused(change, words, tmp_path):
    content = release(autoencoder(), VectorField(4, (8, 8), 32, 1, 1))
    change(content["model"])
    path = save(tmp_path / "model.pth", content)
    with pytest.raises(ValueError, match=words) as error:
        load_network(path)
    assert "model.pth" in str(error.value) and "\n" not in str(error.value)


def test_hostile_globals_stay_inert(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    content = release(autoencoder(), VectorField(4, (8, 8), 32, 1, 1))
    content["optimizer"]["more"] = Hostile()
    assert load_bundle(save(tmp_path / "model.pth", content)).system == "river"
    assert not (tmp_path / "ran").exists()
