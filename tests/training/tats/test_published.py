"""Files in the release's format open without running anything in them, and write the codes that they wrote there."""

import argparse
import itertools
import os

import pytest
import torch

from tests.training.tats import tiny
from training.network_file import load_bundle, load_tokenizer, save_bundle
from training.sampling import Prompt, open_sampler
from training.tats.networks import TATSTransformer, infill_mask
from training.tats.sampling import Between, LongVideos

ARGS = {
    "n_head": 2, "n_layer": 2, "n_embd": 16, "resolution": 8, "sequence_length": 8, "unconditional": True, "gpus": 8,
    "sample_every_n_latent_frames": 0, "cond_stage_key": "label", "lr": 1e-4,
}  # fmt: skip


def save(path, network, book=None, more=None, **arguments):
    """Write a checkpoint as Lightning 1.5 does: the transformer with its masks, and its tokenizer."""
    state = {f"transformer.{name}": value for name, value in network.state_dict().items()}
    size, n = network.block_size, network.unmasked
    mask = infill_mask(size, n).float() if n else torch.ones(size, size).tril()
    for layer in range(len(network.blocks)):
        state[f"transformer.blocks.{layer}.attn.mask"] = mask.view(1, 1, size, size)
    if book is not None:
        state |= {f"first_stage_model.{name}": value for name, value in book.state_dict().items()}
        del state["first_stage_model.codebook.initialised"]
        state["first_stage_model.perceptual_model.lin0.model.1.weight"] = torch.ones(1, 2, 1, 1)
    content = {
        "epoch": 3, "global_step": 30000, "pytorch-lightning_version": "1.5.4", "state_dict": state | (more or {}),
        "callbacks": {}, "optimizer_states": [], "lr_schedulers": [], "hparams_name": "kwargs",
        "hyper_parameters": {"args": argparse.Namespace(**{**ARGS, **arguments}), "ckpt_path": None, "pkeep": 1.0},
    }  # fmt: skip
    torch.save(content, path)
    return str(path)


def network_of(latents=2, conditions=0, **options):
    return tiny.transformer(0, conditions, latents, **options)


def codes_of(sampler, count=6):
    return torch.cat(list(itertools.islice(sampler.latents([3], Prompt()), count)), dim=1)


@pytest.mark.parametrize("conditions", [0, 5])
def test_transformers_open_with_their_tokenizer(conditions, tmp_path):
    network, book = network_of(conditions=conditions), tiny.tokenizer()
    path = save(tmp_path / "gpt.ckpt", network, book, unconditional=not conditions)
    bundle = load_bundle(path)
    assert bundle.system == "tats" and bundle.networks.keys() == {"transformer", "tokenizer"}
    found = bundle.networks["transformer"]
    assert isinstance(found, TATSTransformer) and found.options == network.options
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in network.state_dict().items())
    sampler = open_sampler([path])
    assert isinstance(sampler, LongVideos) and sampler.num_labels == conditions
    assert torch.equal(codes_of(sampler), codes_of(LongVideos(network, book, sampler.facts)))
    save_bundle(bundle, tmp_path / "ours.pkl")
    converted = open_sampler([str(tmp_path / "ours.pkl")])
    assert isinstance(converted, LongVideos) and torch.equal(codes_of(converted), codes_of(sampler))
    assert load_tokenizer(path)[1] == load_tokenizer(tmp_path / "ours.pkl")[1] == bundle.tokenizer


def test_key_frames_and_in_filling(tmp_path):
    keys = save(tmp_path / "keys.ckpt", network_of(), tiny.tokenizer(), sample_every_n_latent_frames=4)
    between = save(tmp_path / "between.ckpt", tiny.filler(conditions=0), tiny.tokenizer(), n_unmasked=4)
    sampler = open_sampler([between, keys])
    assert isinstance(sampler, LongVideos) and sampler.filler is not None and sampler.facts.every == 4
    assert sampler.filler[0].unmasked == tiny.CODES
    assert isinstance(open_sampler([between]), Between)
    assert load_bundle(between).system == "tats-interpolation"


def test_the_table_of_positions_is_found(tmp_path):
    path = save(tmp_path / "gpt.ckpt", network_of(table=[2, 2, 2], latents=2), tiny.tokenizer())
    network = load_bundle(path).networks["transformer"]
    assert isinstance(network, TATSTransformer) and network.options["table"] == [2, 2, 2]


def test_the_tokenizer_of_sound_opens_too(tmp_path):
    network, sound = tiny.transformer(conditions=7, latents=2, length=32), tiny.sound_tokenizer()
    more = {f"cond_stage_model.{name}": value for name, value in sound.state_dict().items()}
    del more["cond_stage_model.codebook.initialised"]
    named = {"unconditional": False, "cond_stage_key": "stft"}
    path = save(tmp_path / "gpt.ckpt", network, tiny.tokenizer(), more, **named)
    bundle = load_bundle(path)
    assert bundle.networks.keys() == {"transformer", "tokenizer", "audio_tokenizer"}
    found = bundle.networks["audio_tokenizer"]
    names = sound.state_dict().keys() - {"codebook.initialised"}
    assert all(torch.equal(sound.state_dict()[name], found.state_dict()[name]) for name in names)
    sampler = open_sampler([path])
    assert isinstance(sampler, LongVideos) and sampler.sound is not None and sampler.sound.span == 8
    assert bundle.networks["transformer"].options == network.options
    with pytest.raises(ValueError, match="no tokenizer of sound"):
        open_sampler([save(tmp_path / "lost.ckpt", network, tiny.tokenizer(), **named)])


def test_models_of_stored_codes_have_no_tokenizer(tmp_path):
    network = TATSTransformer(16384, 0, 1, 8, 1, 2, 16)
    path = save(tmp_path / "gpt.ckpt", network)
    assert load_bundle(path).networks.keys() == {"transformer"}
    with pytest.raises(ValueError, match="holds no tokenizer, as it was trained on stored codes"):
        open_sampler([path])


def test_hostile_globals_stay_inert(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = save(tmp_path / "gpt.ckpt", network_of(), tiny.tokenizer(), hostile=Hostile())
    assert isinstance(open_sampler([path]), LongVideos)
    assert not (tmp_path / "ran").exists()


def test_files_that_lack_a_part_are_refused(tmp_path):
    network = network_of()
    more = {"transformer.extra.weight": torch.ones(2)}
    with pytest.raises(ValueError, match=r"gpt\.ckpt.*extra"):
        load_bundle(save(tmp_path / "gpt.ckpt", network, tiny.tokenizer(), more))
    wrong = {"transformer.blocks.0.attn.mask": torch.ones(1, 1, 8, 8)}
    with pytest.raises(ValueError, match="neither causal nor that of in-filling"):
        load_bundle(save(tmp_path / "mask.ckpt", network, tiny.tokenizer(), wrong))
    book = tiny.VQGAN3D(8, 8, 8, [4, 4, 4], 2, 4, 12)
    with pytest.raises(ValueError, match="transformer of 9 ids, but its tokenizer has 12 codes"):
        load_bundle(save(tmp_path / "book.ckpt", network, book))
