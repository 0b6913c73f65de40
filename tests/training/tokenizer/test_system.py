"""Tokenizers in training: resuming, the discriminators' start, bad options, and their reconstructions."""

import json

import click
import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.training.data.sounds import audio_of
from train import make_options, training_command
from training.contract import Run, Stream, Tokenizer
from training.data.stream_prompts import StreamPrompt
from training.network_file import load_bundle, load_tokenizer, save_bundle
from training.sampling import Prompt, Request
from training.tokenizer import networks
from training.tokenizer import published as adapters
from training.tokenizer.presets import PRESETS
from training.tokenizer.sampling import Reconstruction, make_sampler
from training.tokenizer.system import TokenizerOptions, TokenizerTraining

SMALL = {
    "height": 16, "width": 16, "clip_frames": 8, "lpips": "none", "disc_channels": 2, "gan_start": 2, "lr": 1e-3,
    "arguments": {"hidden": 2, "embedding_dim": 4, "num_codes": 8, "downsample": [4, 4, 4]},
}  # fmt: skip


def small(batch=2, seed=0, **options):
    return TokenizerTraining(TokenizerOptions(**{**SMALL, **options}), Run(batch=batch, seed=seed, steps=10))


def clips(step, batch=2, frames=8):
    x = np.random.RandomState(step).standard_normal((batch, 3, frames, 4, 4)).repeat(4, 3).repeat(4, 4)
    return torch.from_numpy(np.tanh(x).astype(np.float32))


def run(system, steps):
    """What the last of some steps reports."""
    return [system.step(iter([{"clip": clips(step)}]), step) for step in steps][-1]


def states(system):
    return {
        f"{name}.{key}": value for name, module in system.modules.items() for key, value in module.state_dict().items()
    }


@pytest.mark.parametrize("legacy", [False, True])
def test_resuming_continues_bit_for_bit(legacy):
    whole, first, second = (small(legacy=legacy) for _ in range(3))
    run(whole, range(4))
    run(first, range(2))
    for name, module in second.modules.items():
        module.load_state_dict(first.modules[name].state_dict())
    for name, optimizer in second.optimizers.items():
        optimizer.load_state_dict(first.optimizers[name].state_dict())
    run(second, range(2, 4))
    expected = states(whole)
    assert all(torch.equal(value, expected[name]) for name, value in states(second).items())


def test_discriminators_are_left_alone_before_their_start():
    system = small()
    before = {name: value.clone() for name, value in states(system).items() if "discriminator" in name}
    run(system, range(2))
    now = states(system)
    assert all(torch.equal(value, now[name]) for name, value in before.items())
    assert not system.optimizers["discriminators"].state
    run(system, [2])
    assert {int(entry["step"]) for entry in system.optimizers["discriminators"].state.values()} == {1}


def test_legacy_advances_their_optimiser_before_their_start():
    """Without a gradient their weights stay, but the first real step is 1.58 times as large."""
    system = small(legacy=True)
    parameters = [p.clone() for p in system.discriminators.parameters()]
    run(system, range(2))
    assert all(torch.equal(a, b) for a, b in zip(system.discriminators.parameters(), parameters, strict=True))
    assert {int(entry["step"]) for entry in system.optimizers["discriminators"].state.values()} == {2}


def test_one_forward_pass_serves_both():
    """The release makes two: statistics of the batch norms and the codebook move twice."""
    for legacy, count in ((False, 3), (True, 6)):
        system = small(legacy=legacy)
        run(system, range(3))
        tracked = {v.item() for name, v in states(system).items() if name.endswith("final_block.0.num_batches_tracked")}
        assert tracked == {count}


def test_it_learns():
    system = small(image_gan_weight=0.0, video_gan_weight=0.0, lr=3e-3)
    assert system.modules.keys() == {"tokenizer"} and system.optimizers.keys() == {"tokenizer"}
    first = run(system, [0])["loss/recon_loss"].mean()
    for _ in range(60):
        last = run(system, [0])["loss/recon_loss"].mean()
    assert last < 0.5 * first


def test_held_out_losses():
    system = small()
    before = {name: value.clone() for name, value in states(system).items()}
    found = system.validate(iter([{"clip": clips(5)}]))
    assert found["loss/recon_loss"].shape == (2,) and found["perplexity"].shape == (1,)
    assert all(torch.equal(value, before[name]) for name, value in states(system).items())
    system = small(l1_weight=0.5, l2_weight=3.0)
    x = system.clips({"clip": clips(5)})
    made = system.network.eval()(x)[0] - x
    found = system.validate(iter([{"clip": clips(5)}]))["loss/recon_loss"].mean()
    torch.testing.assert_close(found, 0.5 * made.abs().mean() + 3 * made.square().mean())


RANKS = """
import json, sys
import torch
from tests.training.tokenizer import test_system as t
from torch_utils import distributed
from torch_utils.misc import check_ddp_consistency

distributed.init()
rank = distributed.get_rank()
system = t.small(quantizer={"kind": "ema"})
for module in system.modules.values():
    distributed.broadcast_module(module)
for step in range(3):
    losses = system.step(iter([{"clip": t.clips(step)[rank : rank + 1]}]), step)
for module in system.modules.values():
    check_ddp_consistency(module)
network = system.network.eval()
print(json.dumps({
    "loss": losses["loss/recon_loss"].item(), "N": network.codebook.N.tolist(),
    "video": network(t.clips(9) / 2)[0].flatten()[::50].tolist(),
}))
distributed.shutdown()
"""


def test_two_ranks_equal_one():
    results = run_ranks(RANKS)
    assert [code for code, _, _ in results] == [0, 0], results[0][2] + results[1][2]
    first, second = (json.loads(printed) for _, printed, _ in results)
    system = small(quantizer={"kind": "ema"})
    loss = run(system, range(3))["loss/recon_loss"].item()
    network = system.network.eval()
    assert first["N"] == second["N"] and first["video"] == second["video"]
    assert (first["loss"] + second["loss"]) / 2 == pytest.approx(loss, rel=1e-4)
    np.testing.assert_allclose(first["N"], network.get_buffer("codebook.N").numpy(), atol=1e-5)
    # Biases in front of a batch norm have no gradient but rounding, which Adam enlarges.
    video = network(clips(9) / 2)[0].flatten()[::50].detach()
    np.testing.assert_allclose(first["video"], video, atol=2e-3)


# ----------------------------------------------------------------------------
# Sound.

SOUND = {
    "content": "audio", "height": 64, "width": 16, "clip_frames": 4, "image_gan_weight": 0.0, "video_gan_weight": 0.0,
    "lr": 3e-3, "arguments": {"hidden": 2, "embedding_dim": 4, "num_codes": 8, "channels": 1},
}  # fmt: skip


def test_sound_is_learned():
    system = small(**SOUND, frame_stride=2)
    assert system.inputs().streams == ("audio",) and not system.inputs().sizes
    (spec,) = system.batch_spec(0)
    assert (spec.num_frames, spec.parts) == (7, (Stream("audio", 0, 4, 2),))
    batch = {"audio": torch.stack([torch.from_numpy(audio_of(name, 4)).float() for name in ("a", "bc")])}
    first = system.step(iter([batch]), 0)["loss/recon_loss"].mean()
    for step in range(1, 20):
        last = system.step(iter([batch]), step)["loss/recon_loss"].mean()
    assert last < 0.8 * first
    assert system.validate(iter([batch]))["loss/recon_loss"].shape == (2,)


def test_sound_is_shown_as_spectrograms():
    network = small(**SOUND).network.eval()
    prompt = StreamPrompt(Prompt(), {"audio": audio_of("a", 21)}, 0)
    sampler = make_sampler(network)
    whole = torch.cat([chunk["video"] for chunk in sampler.frames(Request([0], 0, 21, prompt))], dim=2)
    images = torch.from_numpy(audio_of("a", 8)[4:]).float().view(1, 1, 4, 64, 16)
    torch.testing.assert_close(whole[:, :1, 4:8], network.decode(network.encode(images)), atol=1e-5, rtol=1e-4)
    assert whole.shape == (1, 3, 21, 64, 16) and torch.equal(whole[:, 0], whole[:, 2])
    part = torch.cat([chunk["video"] for chunk in sampler.frames(Request([0, 1], [5, 9], 11, prompt))], dim=2)
    torch.testing.assert_close(part[1], whole[0, :, 9:20], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="has audio for 21 frames, 0 for the context and 22 for the video"):
        next(sampler.frames(Request([0], 0, 22, prompt)))


# ----------------------------------------------------------------------------
# Options.


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_make_their_networks(preset):
    options = make_options("tokenizer", preset, {"outdir": "runs", "dataset": "data"})
    own = TokenizerOptions(**options.model)
    with torch.device("meta"):
        network = networks.make_tokenizer(own)
    assert isinstance(network, Tokenizer)
    assert own.clip_frames % network.stride[0] == 0
    options.check_ranks(1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"height": 20, "width": 18}, "--size is 20x18; the stride of 4"),
        ({"clip_frames": 6}, "--clip-frames is 6; the stride of 4"),
        ({"arguments": {"num_codes": 1 << 17}}, "--num-codes is 131072"),
        ({"arguments": {"downsample": [4, 4, 8]}}, "must be equal"),
        ({"arguments": {"ch_mult": [1, 2]}}, "vqgan3d does not take"),
        ({"lr": 0.0}, "lr is 0"),
        ({"content": "audio"}, "--content=audio is of 64x16 and one channel"),
        ({"arguments": {"channels": 1}}, "add --content=audio"),
        ({"quantizer": {"kind": "lfq"}, "arguments": {"num_codes": 9}}, "power of two"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes, words):
    arguments = {**SMALL["arguments"], **changes.get("arguments", {})}
    options = TokenizerOptions(**{**SMALL, **changes, "arguments": arguments})
    with pytest.raises(ValueError, match=words):
        TokenizerTraining.check(options, make_options("tokenizer", "toy", {"outdir": "runs", "dataset": "data"}))


def test_options_of_the_network_come_from_the_command_line():
    command = training_command("tokenizer")
    words = [
        "--dataset=data",
        "--preset=toy-3d",
        "--downsample=2,4,4",
        "--num-codes=64",
        "--quantizer=fsq",
        "--levels=8,8",
    ]
    with command.make_context("tokenizer", [*words, "--dry-run"]) as context:
        parameters = context.params
    assert parameters["field_downsample"] == [2, 4, 4] and parameters["field_levels"] == [8, 8]
    with pytest.raises(click.UsageError, match="not a list of whole numbers"):
        command.make_context("tokenizer", ["--dataset=data", "--downsample=4;8;8"])


# ----------------------------------------------------------------------------
# Reconstruction.


class Footage(Prompt):
    """A video of some length as the context of every seed."""

    def __init__(self, video):
        self.video = video

    def frames(self, start, count, size):
        """See `Prompt.frames`."""
        starts = [start] if isinstance(start, int) else start
        parts = [self.video[:, first : first + count] for first in starts]
        shortest = min(part.shape[1] for part in parts)
        return torch.stack([part[:, :shortest] for part in parts])


def reconstruction(network, video, starts=(0,), num_frames=None):
    request = Request(list(range(len(starts))), list(starts), num_frames, Footage(video))
    parts = [chunk["video"] for chunk in Reconstruction(network).frames(request)]
    return torch.cat(parts, dim=2) if parts else torch.zeros(len(starts), 3, 0, 16, 16)


@pytest.mark.parametrize("num_frames", [16, 40, 45, 3])
def test_reconstructions_are_those_of_encoded_clips(num_frames):
    network = small().network.eval()
    video = torch.cat([clips(i, 1)[0] for i in range(6)], dim=1)[:, :num_frames]
    whole = reconstruction(network, video)
    assert whole.shape == (1, 3, num_frames, 16, 16)
    for first in range(0, num_frames // 8 * 8, 8):
        expected = network.decode(network.encode(video[None, :, first : first + 8]))
        torch.testing.assert_close(whole[:, :, first : first + 8], expected, atol=1e-5, rtol=1e-4)
    for start, count in ((0, 5), (3, 9), (9, 24)):
        part = reconstruction(network, video, [start], count)
        torch.testing.assert_close(part, whole[:, :, start : start + count], atol=1e-5, rtol=1e-4)


def test_seeds_may_begin_at_different_frames():
    network = small().network.eval()
    video = torch.cat([clips(i, 1)[0] for i in range(6)], dim=1)
    whole = reconstruction(network, video)
    found = reconstruction(network, video, [2, 9], 12)
    for one, start in zip(found, (2, 9), strict=True):
        torch.testing.assert_close(one, whole[0, :, start : start + 12], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["ema", "vq", "cosine", "fsq", "lfq"])
def test_exported_files_are_tokenizers(kind, tmp_path):
    quantizer = {"kind": kind, "levels": [4, 4]} if kind == "fsq" else {"kind": kind}
    arguments = {**SMALL["arguments"], "num_codes": 16}
    system = small(quantizer=quantizer, arguments=arguments)
    run(system, range(1))
    save_bundle(system.export(), tmp_path / "tokenizer.pkl")
    network, _ = load_tokenizer(tmp_path / "tokenizer.pkl")
    codes = network.encode(clips(3))
    assert torch.equal(codes, system.network.eval().encode(clips(3)))
    assert codes.max() < network.vocabulary == 16
    assert adapters.open_published(str(tmp_path / "tokenizer.pkl")) is None
    # A file of a prior holds its tokenizer, too, and not as the first network.
    bundle = load_bundle(tmp_path / "tokenizer.pkl")
    bundle.networks = {"prior": torch.nn.Linear(1, 1), **bundle.networks}
    other = small(quantizer=quantizer, arguments=arguments, seed=5)
    other.init_from(bundle)
    assert torch.equal(other.network.eval().encode(clips(3)), codes)
