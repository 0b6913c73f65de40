"""TECO in training: random numbers, ranks and rounds, resuming, validation, and what is refused."""

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.training.teco import tiny
from train import make_options
from training.config import TrainOptions
from training.contract import CodeClip, DataFacts, FrameClip, Stream
from training.modules.vqgan3d import VQGAN3D
from training.network_file import load_bundle, save_bundle, save_network
from training.teco.presets import PRESETS
from training.teco.sampling import open_sampler
from training.teco.system import TecoOptions, TecoTraining


def train(system, steps, **part):
    """The reports of some steps."""
    return [system.step(iter([tiny.batch(step, **part)]), step) for step in steps]


def weights(system):
    return {name: value.clone() for name, value in system.network.state_dict().items()}


def distance(one, other):
    """The norm of the difference of two networks, relative to that of one.

    With 32 groups of one channel, biases in front of a norm have no gradient but rounding, which Adam enlarges.
    """
    one, other = (torch.cat([value.flatten() for value in found.values()]) for found in (one, other))
    return ((one - other).norm() / one.norm()).item()


def test_resuming_continues_bit_for_bit(tmp_path):
    whole, first, second = (tiny.system(tmp_path) for _ in range(3))
    train(whole, range(4))
    train(first, range(2))
    second.network.load_state_dict(first.network.state_dict())
    second.optimizers["teco"].load_state_dict(first.optimizers["teco"].state_dict())
    train(second, range(2, 4))
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(whole).items())


@pytest.mark.parametrize("changes", [{}, {"legacy": True}])
def test_rounds_of_accumulation_change_nothing(changes, tmp_path):
    one = tiny.system(tmp_path, **changes)
    reports = train(one, range(1, 4))
    for rounds in (2, 4):
        other = tiny.system(tmp_path, grad_accum=rounds, **changes)
        found = train(other, range(1, 4))
        for mine, theirs in zip(found, reports, strict=True):
            assert mine["loss/loss"].mean().item() == pytest.approx(theirs["loss/loss"].mean().item(), rel=1e-5)
            norm = theirs["progress/grad_norm"].item()
            assert mine["progress/grad_norm"].item() == pytest.approx(norm, rel=1e-4)
        assert distance(weights(one), weights(other)) < 2e-3


RANKS = """
import sys, torch
from pathlib import Path
from tests.training.teco import tiny
from torch_utils import distributed
torch.set_num_threads(1)
distributed.init("cpu")
rank, world = distributed.get_rank(), distributed.get_world_size()
system = tiny.system(Path(sys.argv[1]))
size = 4 // world
found = []
for step in range(1, 4):
    report = system.step(iter([tiny.batch(step, first=rank * size, last=(rank + 1) * size)]), step)
    names = ("loss/loss", "loss/trans_loss")
    losses = {name: distributed.all_reduce_mean(report[name].mean()).item() for name in names}
    found.append(losses | {"norm": report["progress/grad_norm"].item()})
torch.save(found, f"{sys.argv[1]}/rank{rank}.pt")
distributed.shutdown()
"""


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_give_the_losses_of_one(world_size, tmp_path):
    alone = train(tiny.system(tmp_path), range(1, 4))
    ranks = run_ranks(RANKS, tmp_path, world_size=world_size, timeout=200)
    assert [code for code, *_ in ranks] == [0] * world_size, ranks
    for rank in range(world_size):
        for mine, theirs in zip(torch.load(tmp_path / f"rank{rank}.pt"), alone, strict=True):
            for name in ("loss/loss", "loss/trans_loss"):
                assert mine[name] == pytest.approx(theirs[name].mean().item(), rel=1e-5)
            assert mine["norm"] == pytest.approx(theirs["progress/grad_norm"].item(), rel=1e-4)


def test_what_is_drawn(tmp_path):
    system = tiny.system(tmp_path, batch=64)
    rngs = system.run.rngs("teco", 1)
    drawn = system.draw(rngs, 1)
    frames, hidden = drawn["frames_kept"], drawn["hidden"]
    assert frames.shape == (64, 3) and (frames == frames[0]).all() and frames.max() < 7
    assert hidden.shape == (64, 3, 32) and hidden.any(2).all()
    assert drawn["num_hidden"][0] == pytest.approx(hidden.sum() / 64)
    assert 10 < drawn["unknown"].sum() < 54
    seen = {frame for step in range(200) for frame in system.draw(rngs[:1], step)["frames_kept"][0]}
    assert seen == set(range(7))
    legacy = tiny.system(tmp_path, legacy=True)
    assert {frame for step in range(200) for frame in legacy.draw(rngs[:1], step)["frames_kept"][0]} == set(range(8))
    whole = tiny.system(tmp_path, drop_loss_rate=0.0, dropout_actions=False).draw(rngs, 1)
    assert whole["frames_kept"][0].tolist() == list(range(7)) and not whole["unknown"].any()


def test_the_published_index_beyond_the_last_frame_counts_twice(tmp_path):
    """It reads the last frame, and gives no gradient to the latents."""
    system = tiny.system(tmp_path, legacy=True, dropout_actions=False)
    batch = system.with_draws(tiny.batch(0), system.run.rngs("teco", 0), 0)
    for frames in ([7, 7, 7], [6, 6, 6]):
        system.network.zero_grad()
        system.network.requires_grad_(True)
        batch["frames_kept"] = torch.tensor(frames).expand(4, -1)
        found = system.losses(batch)
        (found["recon_loss"].mean() + found["trans_loss"].mean()).backward()
        gradient = system.network.temporal.unproject.weight.grad
        assert gradient is not None and bool(gradient.any()) == (frames[0] == 6)
        assert system.network.decoder.out.get_parameter("weight").grad is not None


def test_frames_give_the_same_losses_as_their_codes(tmp_path):
    codes = tiny.system(tmp_path, dropout_actions=False)
    frames = tiny.system(tmp_path, dropout_actions=False, encode_frames=True)
    count = tiny.SIZES["seq_len"]
    assert codes.batch_spec(0)[0].parts == (CodeClip("codes", 0, count), Stream("actions", 0, count))
    assert isinstance(frames.batch_spec(0)[0].parts[0], FrameClip)
    assert codes.inputs().codes == codes.tokenizer_hash and frames.inputs().sizes == ((tiny.HEIGHT, tiny.WIDTH),)
    x = torch.from_numpy(np.random.RandomState(0).standard_normal((4, 3, count, 16, 32)).astype(np.float32)).tanh()
    batch = {"actions": tiny.actions(4, count)}
    (one,) = [frames.step(iter([batch | {"frames": x}]), 0)]
    other = codes.step(iter([batch | {"codes": tiny.tokenizer().encode(x)}]), 0)
    assert torch.equal(one["loss/loss"], other["loss/loss"])


def test_recomputed_activations_give_the_same_gradients(tmp_path):
    plain, again = tiny.system(tmp_path), tiny.system(tmp_path, recompute=True)
    assert again.network.encoder.recompute and again.network.prior.net.recompute
    for system in (plain, again):
        train(system, [1, 2])
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(again).items())


def test_half_precision_trains(tmp_path):
    exact, half = tiny.system(tmp_path), tiny.system(tmp_path, precision="bf16")
    (one,), (other,) = train(exact, [1]), train(half, [1])
    assert other["loss/loss"].item() == pytest.approx(one["loss/loss"].item(), rel=0.02)
    assert other["loss/loss"].item() != one["loss/loss"].item()
    # The codebook is in float32: its losses differ only by what comes in.
    assert other["loss/codebook_loss"].item() == pytest.approx(one["loss/codebook_loss"].item(), rel=0.05)


def test_validation_is_a_function_of_the_weights(tmp_path):
    system = tiny.system(tmp_path)
    first, second = (system.validate(iter([tiny.batch(3)])) for _ in range(2))
    assert first.keys() >= {"loss/recon_loss", "loss/trans_loss"}
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_files_hold_all_that_generation_needs(tmp_path):
    system = tiny.system(tmp_path)
    train(system, [1])
    save_bundle(system.export(), tmp_path / "model.pkl")
    bundle = load_bundle(tmp_path / "model.pkl")
    assert bundle.tokenizer == system.tokenizer_hash
    sampler = open_sampler([bundle], {"context": "4"})
    assert sampler.needs.past == 4 and sampler.needs.streams == ("actions",)
    other = tiny.system(tmp_path, seed=5)
    other.init_from(bundle)
    assert all(torch.equal(value, weights(system)[name]) for name, value in weights(other).items())
    with pytest.raises(ValueError, match="do not fit these options"):
        tiny.system(tmp_path, num_codes=25).init_from(bundle)


REFUSED = [
    ({"context": 8}, "Option context is 8; it must be from n_cond, 1, to below seq_len, 8"),
    ({"drop_loss_rate": 1.0}, "Option drop_loss_rate is 1.0"),
    ({"mask_schedule": "linear"}, "the mask schedule 'linear' is unknown"),
    ({"shard": True, "ema_beta": 0.9}, "a network that is divided has no moving average"),
    ({"use_actions": False}, "dropout_actions hides actions"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_options_that_do_not_fit_are_refused(changes, message):
    options = TecoOptions(**{**tiny.SIZES, "tokenizer": "x.pkl", "warmup_steps": 2, **changes})
    with pytest.raises(ValueError, match=message):
        TecoTraining.check(options, TrainOptions(outdir="", dataset="", system="teco", steps=20))


@pytest.mark.parametrize(("warmup", "found"), [(5, 5), (10, 5), (5000, 5)])
def test_a_warm_up_longer_than_half_of_the_run_is_shortened(warmup, found, tmp_path):
    system = tiny.system(tmp_path, warmup_steps=warmup)  # of 20 steps
    assert system.schedule.at(found) == system.options.lr > system.schedule.at(found - 1)
    assert system.schedule.at(0) == system.schedule.at(20 - found) == 0


def test_tokenizers_of_clips_are_refused(tmp_path):
    network = VQGAN3D(16, 16, 4, downsample=[4, 4, 4], hidden=2, embedding_dim=4, num_codes=8, norm="batch")
    save_network(network, tmp_path / "clips.pkl")
    with pytest.raises(ValueError, match="is a VQGAN3D, but TECO needs a tokenizer of single frames"):
        tiny.system(tmp_path, tokenizer=str(tmp_path / "clips.pkl"))


def test_actions_of_a_dataset_that_are_none_are_refused(tmp_path):
    system = tiny.system(tmp_path)
    system.use_facts(DataFacts(30, {"actions": 4}))
    with pytest.raises(ValueError, match="there is an action 4, but the model has actions 0 to 3"):
        system.use_facts(DataFacts(30, {"actions": 5}))
    with pytest.raises(ValueError, match="actions are vectors of 2 numbers, but TECO takes whole numbers"):
        system.use_facts(DataFacts(30, {"actions": 2}, frozenset(["actions"])))


def test_patches_are_as_large_as_the_grid_allows(tmp_path):
    assert tiny.system(tmp_path, z_ds=0).network.options["z_ds"] == 4


@pytest.mark.parametrize("name", PRESETS)
def test_presets_make_options(name):
    options = make_options("teco", name, {"outdir": "runs", "dataset": "data", "field_tokenizer": "x.pkl"})
    made = TecoOptions(**options.model)
    TecoTraining.check(made, options)
    assert 0 <= made.z_ds <= 8
