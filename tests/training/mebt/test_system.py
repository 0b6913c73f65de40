"""Training of MeBT: masks, windows, the faults of the release behind --legacy, resuming, files, bad options."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional as F

from dataset_tools.archive import ShardWriter, describe_dataset
from dataset_tools.encode_dataset import main as encode_dataset
from dataset_tools.frames import encode_jpeg
from tests.ranks import run_ranks
from tests.training.mebt.conftest import MODES, make_network
from train import make_options
from training import loop
from training.checkpoint import network_path
from training.contract import Run
from training.generation.draft_revise import MASK_SCHEDULES
from training.mebt.masks import divide, window_prior
from training.mebt.modes import PUBLISHED_MODES
from training.mebt.networks import MeBT
from training.mebt.options import SCHEDULES, MeBTOptions, parse_modes
from training.mebt.presets import PRESETS
from training.mebt.system import MeBTTraining
from training.network_file import load_bundle
from training.sampling import Request, open_sampler

SMALL = {"num_frames": 16, "width": 16, "heads": 2, "latents": 3, "modes": MODES, "lr": 1e-3}
SHAPE = (4, 2, 2)


def small(tokenizer_file, batch=4, grad_accum=1, seed=0, steps=20, **options):
    run = Run(batch=batch, grad_accum=grad_accum, seed=seed, steps=steps)
    return MeBTTraining(MeBTOptions(tokenizer=tokenizer_file, **{**SMALL, **options}), run)


def codes(step, batch=4):
    return torch.from_numpy(np.random.RandomState(step).randint(0, 12, (batch, *SHAPE)))


def run(system, steps, first=0):
    """Weights after some steps."""
    for step in range(first, first + steps):
        system.step(iter([{"codes": codes(step)}]), step)
    return {name: value.clone() for name, value in system.network.state_dict().items()}


def same(found, expected, tolerance=0.0):
    return all(torch.allclose(found[name], value, rtol=0, atol=tolerance) for name, value in expected.items())


DROPOUT = {"embedding_dropout": 0.1, "attention_dropout": 0.1, "residual_dropout": 0.1}


@pytest.mark.parametrize("options", [{}, DROPOUT, {"legacy": True, "window_prior": "gaussian2"}, {"ema_beta": 0.9}])
def test_resuming_continues_bit_for_bit(tokenizer_file, options):
    whole, first, second = (small(tokenizer_file, **options) for _ in range(3))
    expected = run(whole, 4)
    run(first, 2)
    for name, module in second.modules.items():
        module.load_state_dict(first.modules[name].state_dict())
    for name, optimizer in second.optimizers.items():
        optimizer.load_state_dict(first.optimizers[name].state_dict())
    assert same(run(second, 2, 2), expected)


@pytest.mark.parametrize("masks_of", [1, 2, 3, 4])
def test_rounds_change_nothing(tokenizer_file, masks_of):
    options = {"window_prior": "uniform", "masks_of": masks_of, "weight_decay": 0.0}
    grads = []
    for grad_accum in (1, 2, 4):
        system = small(tokenizer_file, grad_accum=grad_accum, **options)
        system.step(iter([{"codes": codes(0)}]), 0)
        grads.append([parameter.grad for parameter in system.network.parameters()])
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            assert (a is None) == (b is None)
            assert a is None or b is None or torch.allclose(a, b, atol=1e-6)


RANK_SCRIPT = """
import sys
import torch
from tests.training.mebt.test_system import codes, small
from torch_utils import distributed
distributed.init()
rank = distributed.get_rank()
system = small(sys.argv[1], window_prior="uniform", masks_of=2)
system.step(iter([{"codes": codes(0)[2 * rank : 2 * rank + 2]}]), 0)
print(*(float(p.grad.norm()) for p in system.network.parameters() if p.grad is not None))
distributed.shutdown()
"""


@pytest.mark.slow
def test_two_ranks_are_one(tokenizer_file):
    system = small(tokenizer_file, window_prior="uniform", masks_of=2)
    system.step(iter([{"codes": codes(0)}]), 0)
    expected = [float(p.grad.norm()) for p in system.network.parameters() if p.grad is not None]
    for code, output, errors in run_ranks(RANK_SCRIPT, tokenizer_file):
        assert code == 0, errors
        assert [float(word) for word in output.split()] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_it_learns(tokenizer_file):
    system = small(tokenizer_file, lr=2e-2, masks_of=2)
    batch = (torch.arange(16).view(1, *SHAPE) % 12).expand(4, -1, -1, -1)
    losses = [float(system.step(iter([{"codes": batch}]), step)["loss/loss"].mean()) for step in range(40)]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:3])
    with torch.no_grad():
        held_out = system.validate(iter([{"codes": batch}]))
    assert held_out["loss/loss"].shape == (4,) and float(held_out["loss/loss"].mean()) < 1.3
    assert float(held_out["loss/masked"].mean()) == pytest.approx(0.5, abs=0.05)


# ----------------------------------------------------------------------------
# Masks and windows.


def test_windows_keep_absolute_positions():
    rows = torch.from_numpy(np.array([np.random.RandomState(r).permutation(16) for r in range(3)]))
    found = divide(rows, SHAPE, 0.5, 2, 1)
    both = torch.cat([found.contexts, found.targets], dim=1)
    assert both.sort(1).values.tolist() == [list(range(4, 12))] * 3
    assert found.num_positions == 8 and found.targets.shape[1] == 4


def test_the_loss_of_a_whole_clip_is_the_mean_over_its_targets(tokenizer_file):
    network = make_network()
    rows = torch.from_numpy(np.array([np.random.RandomState(r).permutation(16) for r in range(2)]))
    division, ids = divide(rows, SHAPE, 0.4, 4), codes(0, 2).flatten(1)
    losses, _ = network.losses(ids, division.contexts, division.targets)
    logits = network(ids, division.contexts, division.targets)
    expected = F.cross_entropy(logits.flatten(0, 1), ids.gather(1, division.targets).flatten())
    assert division.each(losses).mean() == pytest.approx(float(expected), abs=1e-5)


def test_losses_in_pieces_have_the_same_gradients(monkeypatch):
    grads = []
    for rows in (1024, 5):
        monkeypatch.setattr("training.mebt.networks.ROWS", rows)
        network = make_network().requires_grad_(True)
        order = torch.arange(16).expand(2, -1)
        network.losses(codes(0, 2).flatten(1), order[:, :4], order[:, 4:])[0].sum().backward()
        grads.append([p.grad for p in network.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*grads, strict=True))


def test_every_weight_has_a_gradient_whatever_is_masked():
    """Ranks exchange gradients, and some may have no context."""
    for visible in (0, 15):
        network = make_network().requires_grad_(True)
        order = torch.arange(16).expand(2, -1)
        network.losses(codes(0, 2).flatten(1), order[:, :visible], order[:, visible:])[0].sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_times_at_which_nothing_is_masked():
    """The release then takes all positions as contexts and as targets; here one is masked."""
    rows = torch.arange(16).expand(2, -1)
    released = divide(rows, SHAPE, 1.0, 4, legacy=True)
    assert released.contexts.shape == released.targets.shape == (2, 16)
    assert released.masked_share == 0
    found = divide(rows, SHAPE, 1.0, 4)
    assert found.contexts.shape == (2, 15) and found.targets.shape == (2, 1)
    assert divide(rows, SHAPE, 0.0, 4).contexts.shape == (2, 0)


def test_windows_of_the_release_grow_for_longer_than_it_trains(tokenizer_file):
    """At its last step, 2 million, windows of 32 are drawn once in 2e7 steps; here they are the rule."""
    released = window_prior("gaussian100000_2", 2_000_000, 32)
    assert released[-1] < 1e-7 and (released * np.arange(1, 33)).sum() == pytest.approx(21, abs=0.1)
    system = small(tokenizer_file, num_frames=16, window_prior="gaussian100000_2", steps=1000)
    legacy = small(tokenizer_file, num_frames=16, window_prior="gaussian100000_2", steps=1000, legacy=True)
    draws = {}
    for name, made in (("fitted", system), ("legacy", legacy)):
        rngs = [np.random.RandomState(seed) for seed in range(200)]
        draws[name] = [np.mean([made.draw_mask(rng, step)[1] for rng in rngs]) for step in (0, 999)]
    assert draws["fitted"][0] < 2.6 and draws["fitted"][1] > 3.2
    assert draws["legacy"][0] == pytest.approx(draws["legacy"][1], abs=0.1)  # 1000 steps do not count


def test_legacy_has_a_mask_for_each_round_and_the_normalised_residual(tokenizer_file):
    legacy, own = (small(tokenizer_file, grad_accum=2, masks_of=1, legacy=value) for value in (True, False))
    assert isinstance(legacy.network, MeBT) and isinstance(own.network, MeBT)
    assert legacy.network.options["residual"] == "normalised" and own.network.options["residual"] == "plain"
    masks = [made.with_draws({}, made.run.rngs("prior", 0), 0)["mask"][:, 0].tolist() for made in (legacy, own)]
    assert len(set(masks[0])) == 2 and masks[0][0] == masks[0][1]
    assert len(set(masks[1])) == 4


# ----------------------------------------------------------------------------
# Files and options.


def make_dataset(root, clips=3, frames=24):
    with ShardWriter(root, ((16, 16),), 0) as writer:
        for number in range(clips):
            noise = np.random.RandomState(number).randint(0, 256, (4, 4, 3)).astype(np.uint8)
            with writer.clip(f"clip{number}") as add:
                for i in range(frames):
                    add([encode_jpeg(np.roll(noise, i // 4, 1).repeat(4, 0).repeat(4, 1))])
    describe_dataset(root, [writer.report({30: clips})], 1, ())
    return root


def test_from_a_dataset_to_a_file_of_videos(tokenizer_file, tmp_path):
    root = make_dataset(tmp_path / "data")
    result = CliRunner().invoke(encode_dataset, [str(root), f"--tokenizer={tokenizer_file}", "--device=cpu"])
    assert result.exit_code == 0, result.output
    given = {
        "dataset": str(root), "val_dataset": str(root), "outdir": str(tmp_path / "runs"), "steps": 4, "batch": 2,
        "field_tokenizer": tokenizer_file, "field_width": 16, "field_latents": 3, "field_num_frames": 16,
        "sample_steps": 2, "metric_steps": 2, "device": "cpu", "field_warmup_steps": 1,
    }  # fmt: skip
    options = make_options("mebt", "toy", given)
    options.model["sampling"] = {"steps": 3, "revise_rounds": 1, "revise_parts": 2}
    options.model["modes"] = MODES
    done = loop.train("mebt", options)
    assert done.finished
    path = network_path(done.run_dir, done.step)
    bundle = load_bundle(str(path))
    assert set(bundle.networks) == {"prior", "tokenizer"} and bundle.options["sampling"]["steps"] == 3
    videos = [chunk["video"] for chunk in open_sampler([str(path)]).frames(Request([0, 1], num_frames=20))]
    assert torch.cat(videos, dim=2).shape == (2, 3, 20, 16, 16)
    assert (
        list(done.run_dir.rglob("*.png")) and (done.run_dir / "stats.jsonl").read_text().count("validation/loss") >= 1
    )
    system = small(tokenizer_file, ema_beta=0.9)
    system.init_from(bundle)
    assert same(system.network.state_dict(), bundle.networks["prior"].state_dict())


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_whole(preset, tokenizer_file):
    given = {"outdir": "runs", "dataset": "data", "field_tokenizer": tokenizer_file}
    options = make_options("mebt", preset, given)
    made = MeBTOptions(**options.model)
    with torch.device("meta"):
        network = MeBT(
            16384, (made.num_frames // 4, 16, 16), made.width, made.heads, made.latents, made.modes,
            made.layers or None, made.residual,
        )  # fmt: skip
    if preset in ("ucf-16", "ucf-128"):
        numbers = {"ucf-16": 337_177_600, "ucf-128": 344_517_632}  # published
        assert sum(p.numel() for p in network.parameters()) == numbers[preset]
        assert len(network.state_dict()) == 391


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"field_t_min": 0.5, "field_t_range": (0.5, 0.2)}, "--t-range is 0.5 0.2"),
        ({"field_label_smoothing": 1.5}, "label_smoothing"),
    ],
)
def test_bad_options_are_refused(tokenizer_file, options, words):
    given = {"outdir": "runs", "dataset": "data", "field_tokenizer": tokenizer_file, **options}
    given.pop("field_t_min", None)
    with pytest.raises(ValueError, match=words):
        make_options("mebt", "toy", given)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_frames": 10}, "--num-frames is 10, but the tokenizer encodes 4 frames as one step"),
        ({"heads": 5}, "a width of 16 does not divide by 5 heads"),
        ({"modes": ["latent_enc"] * 3, "layers": 2}, "3 modes for 2 layers"),
    ],
)
def test_impossible_networks_are_refused(tokenizer_file, options, words):
    with pytest.raises(ValueError, match=words):
        small(tokenizer_file, **options)


def test_modes_by_name():
    assert tuple(MASK_SCHEDULES) == SCHEDULES
    assert parse_modes("published") == PUBLISHED_MODES and len(PUBLISHED_MODES) == 24
    assert parse_modes("latent_enc, latent_dec") == ["latent_enc", "latent_dec"]
    with pytest.raises(ValueError, match="'decode' is not a mode"):
        parse_modes("latent_enc,decode")
