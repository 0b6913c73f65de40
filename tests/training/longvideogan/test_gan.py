"""One training step of each stage: its draws, its updates, and its reported values."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.longvideogan.tiny import (
    STAGES,
    batches,
    largest_difference,
    make,
    record_gradients,
    train,
    video,
    weights,
)
from training import registry, resume
from training.longvideogan.gan import gan_loss, r1_penalty
from training.optim import Report, ema_decay
from training.sampling import quantize


@pytest.mark.parametrize("stage", STAGES)
def test_every_registered_system_keeps_the_contract(stage):
    assert stage in registry.SYSTEMS
    system = make(stage)
    assert set(system.modules) >= {"G", "D", "G_ema"} and set(system.optimizers) == {"G", "D"}
    taken = iter(list(batches(system, 0)))
    stats = system.step(taken, 0)
    assert next(taken, None) is None, "a step takes exactly the batches it listed"
    published = ["G_score", "G_sign", "G_loss", "D_score_fake", "D_score_real", "D_sign_fake", "D_sign_real", "D_loss"]
    assert {f"loss/{name}" for name in [*published, "r1_penalty", "r1_loss"]} <= stats.keys()
    names = ["G_lrate", "D_lrate", "G_ema_beta", "nonfinite_gradients", "G_grad_norm", "D_grad_norm", "R1_grad_norm"]
    assert {f"progress/{name}" for name in names} <= stats.keys()
    assert all(value.isfinite().all() for value in stats.values())
    json.dumps(system.state_dict())

    sizes = system.inputs().sizes

    def condition(starts, num_frames):
        return torch.zeros(2, 3, num_frames, *min(sizes))

    frames = quantize(video(system.sampler(), [3, 4], 0, 5, condition))
    assert frames.shape == (2, 5, *max(sizes), 3) and frames.dtype == torch.uint8
    assert list(system.export().networks.values()) == [system.modules["G_ema"]] and system.export().system == stage
    assert (system.info().preview_frames, system.info().suffix) == (system.options.preview_frames, "1.0gamma")


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
    assert largest_difference(weights(second), weights(whole)) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_a_training_state_of_the_unfused_optimiser_goes_on(stage):
    """The layout on disk is that of `torch.optim.Adam`, whichever kernel wrote it."""
    old, new = make(stage), make(stage, seed=0)
    for name, optimizer in old.optimizers.items():
        (group,) = optimizer.param_groups
        plain = torch.optim.Adam(group["params"], lr=group["lr"], betas=group["betas"], eps=group["eps"])
        old.optimizers[name] = plain
        setattr(old, f"{name}_opt", plain)
    train(old, range(2))
    state = {
        "modules": {name: module.state_dict() for name, module in old.modules.items()},
        "optimizers": {name: copy.deepcopy(optimizer.state_dict()) for name, optimizer in old.optimizers.items()},
        "system": old.state_dict(),
    }
    resume.restore(new, state, Path("ckpt-00000002-train.pt"))
    for name, optimizer in new.optimizers.items():
        assert optimizer.param_groups[0]["fused"] and not old.optimizers[name].param_groups[0]["fused"]
        assert optimizer.param_groups[0]["lr"] == old.optimizers[name].param_groups[0]["lr"]
        found, expected = optimizer.state_dict(), state["optimizers"][name]
        assert found["state"].keys() == expected["state"].keys()
        for mine, theirs in zip(found["state"].values(), expected["state"].values(), strict=True):
            assert mine.keys() == theirs.keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(mine[key], theirs[key]) and mine[key].dtype == theirs[key].dtype for key in mine)
    train(old, range(2, 4))
    train(new, range(2, 4))
    assert largest_difference(weights(new), weights(old)) < 1e-10


@pytest.mark.parametrize("stage", STAGES)
def test_seeds_and_steps_draw_differently(stage):
    system = make(stage)
    draws = [
        rng.standard_normal() for step in range(3) for phase in ("G", "R1") for rng in system.run.rngs(phase, step)
    ]
    assert len(set(draws)) == len(draws)
    assert make(stage, seed=1).run.rngs("G", 0)[0].standard_normal() not in draws


def test_ema_has_the_published_half_life():
    system = make("longvideogan-lres")
    half_life = np.log(0.5) / np.log(ema_decay(0.99985, 25000, 10**6))
    assert half_life == pytest.approx(4620.6, abs=0.1)
    early = np.log(0.5) / np.log(ema_decay(0.99985, 25000, 999))
    assert early == pytest.approx(4620.6 * 1000 / 25001, abs=0.1)
    with torch.no_grad():
        for parameter in system.G.parameters():
            parameter.add_(1)
        beta = system.update_average(999)
    moved = system.G_ema.to_rgb.bias - (system.G.to_rgb.bias - 1)
    assert torch.allclose(moved, torch.full_like(moved, 1 - beta))


def test_optimisers_are_the_published_ones():
    system = make("longvideogan-lres", r1_interval=16)
    group = system.D_opt.param_groups[0]
    assert group["lr"] == pytest.approx(0.00188235, rel=1e-5)
    assert group["betas"] == pytest.approx((0, 0.990585), rel=1e-6)
    assert system.G_opt.param_groups[0]["betas"] == (0, 0.99)


def test_r1_penalty_of_a_linear_critic_is_its_squared_norm():
    direction = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    video = torch.randn(5, 3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    logits = (video * direction).sum(dim=[1, 2, 3, 4])
    assert torch.allclose(r1_penalty(logits, video), direction.square().sum().expand(5))


@pytest.mark.parametrize("stage", STAGES)
def test_r1_gradient_is_the_slope_of_the_penalty(stage):
    """Through the augmentations and the discriminator, twice: against differences of the penalty itself."""
    system = make(stage, seed=1, gamma=2.0)
    if stage == "longvideogan-sres":
        system.ada.p = 0.5
    updates = record_gradients(system)
    batch = list(batches(system, 0))[-1]
    system.D_opt.param_groups[0]["lr"] = 0.0  # measure, and stay
    # At first biases are zero, and borders lie on the kink of the leaky ReLU, where the penalty jumps: away from it.
    rng = np.random.RandomState(0)
    before = {
        name: parameter + 0.3 * torch.from_numpy(rng.standard_normal(tuple(parameter.shape)))
        for name, parameter in system.D.named_parameters()
    }
    direction = {name: torch.from_numpy(rng.standard_normal(tuple(p.shape))) for name, p in before.items()}

    def loss_at(offset):
        with torch.no_grad():
            for name, parameter in system.D.named_parameters():
                parameter.copy_(before[name] + offset * direction[name])
        notes = Report()
        system.penalize_discriminator(batch, 0, notes)
        return notes.values()["loss/r1_loss"].item()

    loss_at(0.0)
    slope = sum((gradient * direction[name[2:]]).sum().item() for name, gradient in updates[0].items())
    expected = (loss_at(1e-8) - loss_at(-1e-8)) / 2e-8 * system.options.r1_interval
    assert slope == pytest.approx(expected, rel=1e-4)


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
        system.normal(system.run.rngs("G", 0), system.G.noise_channels, system.G.num_noise_frames(24)), 24
    )
    fakes = system.fakes({}, system.run.rngs("G", 0))["video"]
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
            system.logits({"lres": lres, "video": sres}, system.run.rngs("G", step))
    assert 15 <= sum(seen) <= 47  # 300 throws of probability 0.1: mean 30, standard deviation 5.2


def test_augmentation_follows_the_signs_of_the_discriminator():
    system = make("longvideogan-sres")
    assert system.ada.update(torch.ones(4)) == pytest.approx(0.000125)
    seen = []
    system.augment.register_forward_pre_hook(lambda _module, args: seen.append(args[2]))
    train(system, [1])
    assert seen == [system.ada.speed] * 3  # in G's update, and in D's for fakes and reals
    state = system.state_dict()
    system.load_state_dict({"ada": {**state["ada"], "p": 0.25}})
    train(system, [1])
    assert seen[3:] == [0.25] * 3
