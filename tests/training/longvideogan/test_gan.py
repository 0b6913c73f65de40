"""One training step of each stage: what it draws, what it changes, and that it does not matter how it is split."""

import copy
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from training import registry
from training.longvideogan.gan import gan_loss, r1_penalty

TINY = {
    "longvideogan-lres": {
        "height": 16,
        "width": 16,
        "num_frames": 16,
        "preview_frames": 8,
        "batch": 4,
        "grad_accum": 1,
        "r1_interval": 2,
        "generator": {
            "embedding_channels": 16,
            "num_filters": 4,
            "min_filter_taps": 4,
            "max_filter_taps": 24,
            "w_channels": 8,
            "input_channels": 6,
            "temporal_channels": [6, 6, 4, 4],
            "spatial_channels": [4, 4, 4, 4],
        },
        "discriminator": {"channels": [3, 4, 4, 4, 4], "epilogue_channels": 6},
    },
    "longvideogan-sres": {
        "height": 36,
        "width": 64,
        "lres_height": 18,
        "lres_width": 32,
        "num_frames": 2,
        "preview_frames": 4,
        "batch": 4,
        "grad_accum": 1,
        "r1_interval": 2,
        "ada_interval": 1,
        "generator": {
            "num_layers": 8,
            "channel_base": 256,
            "channel_max": 4,
            "temporal_context": 1,
            "z_channels": 6,
            "w_channels": 6,
        },
        "discriminator": {"channel_base": 256, "channel_max": 6},
    },
}
STAGES = list(TINY)


def make(stage, **changes):
    system = registry.resolve(registry.SYSTEMS[stage])({**copy.deepcopy(TINY[stage]), **changes}, "cpu")
    for module in [*system.modules.values(), *(getattr(system, name, None) for name in ("augment", "corrupt"))]:
        if isinstance(module, torch.nn.Module):
            module.double()
    return system


def batches(system, step, first=0, last=None):
    """The global batches of a step, made up, cut to clips [first, last)."""
    for index, spec in enumerate(system.batch_spec(step)):
        rng = np.random.RandomState(1000 * step + index)
        yield {
            part.name: torch.from_numpy(
                rng.uniform(-1, 1, (system.options.batch, 3, part.num_frames, part.height, part.width))
            )[first:last]
            for part in spec.parts
        }


def train(system, steps, **cut):
    return [system.step(batches(system, step, **cut), step) for step in steps]


def weights(system):
    return {
        f"{name}.{key}": tensor.clone()
        for name, module in system.modules.items()
        for key, tensor in module.state_dict().items()
    }


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    worst = max((found[key] - expected[key]).abs().max().item() for key in found)
    assert worst <= tolerance, worst


@pytest.mark.parametrize("stage", STAGES)
def test_every_registered_system_keeps_the_contract(stage):
    assert STAGES == list(registry.SYSTEMS)
    system = make(stage)
    assert set(system.modules) >= {"G", "D", "G_ema"} and set(system.optimizers) == {"G", "D"}
    taken = iter(list(batches(system, 0)))
    stats = system.step(taken, 0)
    assert next(taken, None) is None, "a step takes exactly the batches it listed"
    published = ["G_score", "G_sign", "G_loss", "D_score_fake", "D_score_real", "D_sign_fake", "D_sign_real", "D_loss"]
    assert {f"loss/{name}" for name in [*published, "r1_penalty", "r1_loss"]} <= stats.keys()
    assert {"progress/G_lrate", "progress/D_lrate", "progress/G_ema_beta"} <= stats.keys()
    assert all(value.isfinite().all() for value in stats.values())
    json.dumps(system.state_dict())

    size = min(system.dataset_sizes)

    def condition(starts, num_frames):
        return torch.zeros(2, 3, num_frames, *size)

    pieces = list(system.sample([3, 4], 0, 5, condition=condition if system.needs_condition else None))
    frames = torch.cat(pieces, dim=1)
    assert frames.shape == (2, 5, *max(system.dataset_sizes), 3) and frames.dtype == torch.uint8
    assert system.export() is system.modules["G_ema"]
    assert set(system.preview_spec()) == {"num_frames", "num_videos"}


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_training_is_uninterrupted_training_bit_for_bit(stage):
    whole = make(stage)
    train(whole, range(4))
    first, second = make(stage), make(stage, seed=0)
    train(first, range(2))
    for name in first.modules:
        second.modules[name].load_state_dict(first.modules[name].state_dict())
    for name in first.optimizers:
        second.optimizers[name].load_state_dict(copy.deepcopy(first.optimizers[name].state_dict()))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    train(second, range(2, 4))
    assert_close(weights(second), weights(whole), 0.0)


@pytest.mark.parametrize("stage", STAGES)
def test_rounds_of_accumulation_do_not_change_the_result(stage):
    one, two = make(stage), make(stage, grad_accum=2)
    train(one, range(3))
    train(two, range(3))
    assert_close(weights(two), weights(one), 1e-8)


RANK_SCRIPT = """
import importlib.util, sys, torch
from torch_utils import distributed
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("test_gan", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
distributed.init("cpu")
system = module.make(sys.argv[2])
half = system.options.batch // 2
first = distributed.get_rank() * half
module.train(system, range(3), first=first, last=first + half)
if distributed.is_main():
    torch.save(module.weights(system), sys.argv[3])
distributed.shutdown()
"""


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_are_one(stage, tmp_path, repo):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK_SCRIPT, __file__, stage, str(tmp_path / "weights.pt")]
    ranks = [
        subprocess.Popen(
            command, cwd=repo, env={**os.environ, **environment, "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": "."}
        )
        for rank in "01"
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    alone = make(stage)
    train(alone, range(3))
    assert_close(torch.load(tmp_path / "weights.pt"), weights(alone), 1e-8)


@pytest.mark.parametrize("stage", STAGES)
def test_seeds_and_steps_draw_differently(stage):
    system = make(stage)
    draws = [rng.standard_normal() for step in range(3) for phase in ("G", "R1") for rng in system.rngs(phase, step)]
    assert len(set(draws)) == len(draws)
    assert make(stage, seed=1).rngs("G", 0)[0].standard_normal() not in draws


def test_moving_average_has_the_published_half_life():
    system = make("longvideogan-lres")
    half_life = np.log(0.5) / np.log(system.ema_beta_at(10**6))
    assert half_life == pytest.approx(4620.6, abs=0.1)
    early = np.log(0.5) / np.log(system.ema_beta_at(999))
    assert early == pytest.approx(4620.6 * 1000 / 25001, abs=0.1)
    with torch.no_grad():
        for parameter in system.G.parameters():
            parameter.add_(1)
        beta = system.update_ema(999)
    moved = system.G_ema.to_rgb.bias - (system.G.to_rgb.bias - 1)
    assert torch.allclose(moved, torch.full_like(moved, 1 - beta))


def test_optimisers_are_the_published_ones():
    system = registry.resolve(registry.SYSTEMS["longvideogan-lres"])(
        {**TINY["longvideogan-lres"], "r1_interval": 16}, "cpu"
    )
    group = system.D_opt.param_groups[0]
    assert group["lr"] == pytest.approx(0.00188235, rel=1e-5)
    assert group["betas"] == pytest.approx((0, 0.990585), rel=1e-6)
    assert system.G_opt.param_groups[0]["betas"] == (0, 0.99)


def test_r1_penalty_of_a_linear_critic_is_its_squared_norm():
    direction = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    video = torch.randn(5, 3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    logits = (video * direction).sum(dim=[1, 2, 3, 4])
    assert torch.allclose(r1_penalty(logits, video), direction.square().sum().expand(5))


def test_losses_are_minus_log_probabilities():
    logits = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64)
    probability = torch.sigmoid(logits)
    assert torch.allclose(gan_loss(logits, real=True), -probability.log().mean())
    assert torch.allclose(gan_loss(logits, real=False), -(1 - probability).log().mean())


@pytest.mark.parametrize("stage", STAGES)
def test_only_the_fakes_of_the_discriminator_update_move_magnitudes(stage):
    system = make(stage)
    names = {name for name, _ in system.G.named_buffers() if "magnitude_ema" in name}
    before = {name: buffer.clone() for name, buffer in system.G.named_buffers()}
    train(system, [1])
    moved = {name for name, buffer in system.G.named_buffers() if not torch.equal(buffer, before[name])}
    assert names <= moved <= names | {"SG3.mapping.w_avg"}


def test_low_resolution_fakes_start_at_any_phase():
    system = make("longvideogan-lres", batch=8)
    whole = system.G.synthesize(
        system.normal(system.rngs("G", 0), system.G.noise_channels, system.G.num_noise_frames(24)), 24
    )
    fakes = system.fakes({}, system.rngs("G", 0))["video"]
    phases = [
        next(phase for phase in range(8) if torch.equal(clip, video[:, phase : phase + 16]))
        for clip, video in zip(fakes, whole, strict=True)
    ]
    assert len(set(phases)) > 2


def test_super_resolution_discriminator_is_rarely_shown_its_condition():
    system = make("longvideogan-sres", batch=1)
    lres, sres = torch.ones(1, 3, 2, 18, 32, dtype=torch.float64), torch.zeros(1, 3, 2, 36, 64, dtype=torch.float64)
    seen = []
    system.D.register_forward_pre_hook(lambda _module, args: seen.append(bool(args[0].any())))
    for step in range(300):
        with torch.no_grad():
            system.logits({"lres": lres, "video": sres}, system.rngs("G", step))
    assert 15 <= sum(seen) <= 47  # 300 throws of probability 0.1: mean 30, standard deviation 5.2


def test_augmentation_follows_how_sure_the_discriminator_is():
    system = make("longvideogan-sres")
    system.update_ada(torch.ones(4, dtype=torch.float64))
    assert system.augment.p.item() == pytest.approx(0.000125)
    state = system.state_dict()
    system.update_ada(-torch.ones(4, dtype=torch.float64))
    assert system.augment.p.item() == 0
    system.load_state_dict(state)
    assert system.augment.p.item() == pytest.approx(0.000125)


def test_unknown_options_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean gamma"):
        make("longvideogan-lres", gama=2)
    with pytest.raises(ValueError, match="set gamma to 0"):
        make("longvideogan-sres", r1_interval=0)
