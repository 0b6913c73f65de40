"""The world model in training: resuming, ranks, rounds, what is learned from the first batch, bad options."""

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.training.world import tiny
from training.config import TrainOptions
from training.contract import DataFacts
from training.modules.vqgan3d import VQGAN3D
from training.network_file import load_bundle, save_bundle, save_network
from training.sampling import open_sampler
from training.world import context
from training.world.options import WorldTrainOptions
from training.world.sampling import Past
from training.world.system import World


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.save_tokenizer(tmp_path_factory.mktemp("world"))


def run(system, steps):
    """What the last of some steps reports."""
    found = {}
    for step in steps:
        found = system.step(iter([tiny.batch(step)]), step)
    return found


def states(modules):
    return {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}


def test_resuming_continues_bit_for_bit(path):
    """Also where frames of the context are the network's own, from step 2 on."""
    whole, first, second = (tiny.system(path) for _ in range(3))
    run(whole, range(6))
    assert {whole.num_own(step) for step in range(2, 20)} == {0, 1, 2, 3} and whole.num_own(1) == 0
    run(first, range(3))
    for name, module in second.modules.items():
        module.load_state_dict(first.modules[name].state_dict())
    second.optimizers["world"].load_state_dict(first.optimizers["world"].state_dict())
    run(second, range(3, 6))
    expected = states(whole.modules)
    assert all(torch.equal(value, expected[name]) for name, value in states(second.modules).items())


def test_rounds_of_accumulation_change_nothing(path):
    one, two = tiny.system(path), tiny.system(path, grad_accum=2)
    for system in (one, two):
        run(system, range(4))
    expected = states(one.modules)
    for name, value in states(two.modules).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-5, msg=name)


RANKS = """
import sys, torch
from tests.training.world import tiny
from torch_utils import distributed
distributed.init()
rank, world = distributed.get_rank(), distributed.get_world_size()
system = tiny.system(sys.argv[1])
for step in range(4):
    own = slice(rank * 4 // world, (rank + 1) * 4 // world)
    system.step(iter([{name: value[own] for name, value in tiny.batch(step).items()}]), step)
if rank == 0:
    torch.save({name: module.state_dict() for name, module in system.modules.items()}, sys.argv[2])
distributed.shutdown()
"""


def test_two_ranks_are_as_one(path, tmp_path):
    found = run_ranks(RANKS, path, tmp_path / "two.pt")
    assert [code for code, _, _ in found] == [0, 0], found
    one = tiny.system(path)
    run(one, range(4))
    expected = states(one.modules)
    for name, state in torch.load(tmp_path / "two.pt", weights_only=True).items():
        for key, value in state.items():
            torch.testing.assert_close(value, expected[f"{name}.{key}"], rtol=1e-3, atol=2e-5, msg=f"{name}.{key}")


def test_the_first_batch_tells_motions_and_scale(path):
    system = tiny.system(path)
    system.step(iter([tiny.batch(0, frames=12)]), 0)
    torch.testing.assert_close(system.network.motions, tiny.units(tiny.MOTIONS), atol=1e-4, rtol=0)
    assert torch.equal(system.average.motions, system.network.motions)
    z = system.latents.encode(tiny.batch(0)["clip"])
    torch.testing.assert_close(z.mean((0, 1, 3, 4)), torch.zeros(tiny.CHANNELS), atol=1e-4, rtol=0)
    before = system.scale.mean.clone(), system.network.motions.clone()
    system.step(iter([tiny.batch(1)]), 1)
    assert torch.equal(system.scale.mean, before[0]) and torch.equal(system.network.motions, before[1])


def test_targets_see_what_a_rollout_sees(path):
    """The context of a target in training is that of the same frame when it is generated."""
    system = tiny.system(path, context_noise=0.0, own_frames=0)
    system.network.motions.copy_(tiny.units(tiny.MOTIONS))
    given = tiny.batch(5, 1)
    z = system.latents.encode(given["clip"])
    past = Past(system.network, z[:, :8], given["actions"][:, :8], 100)
    past.move(given["actions"][:, 8])
    seen, where = past.seen()
    actions, known = past.history()

    network = system.network
    each = {
        "z": z, "poses": context.dead_reckon(given["actions"], network.motions), "actions": given["actions"],
        "firsts": torch.tensor([0]), "level": torch.zeros(1), "context_noise": torch.zeros(1, 4, *z.shape[2:]),
    }  # fmt: skip
    its_context, its_geometry, _, its_actions, its_known = system.conditions(network, each, torch.tensor([8]))
    torch.testing.assert_close(its_context, seen)
    torch.testing.assert_close(its_geometry, where, atol=1e-5, rtol=0)
    assert actions is not None and known is not None
    assert torch.equal(its_actions[its_known], actions[known]) and torch.equal(its_known, known)


def test_the_first_known_frame_is_never_the_networks_own(path):
    """It would be made from nothing."""
    system = tiny.system(path)
    run(system, range(3))
    batch = system.with_draws(tiny.batch(3), system.run.rngs("draw", 3), 3)

    def error(own, known):
        given = {**batch, "own": torch.full_like(batch["own"], own), "firsts": batch["targets"] - known}
        return system.errors(system.average, given)["error"]

    with torch.no_grad():
        assert torch.equal(error(3, known=1), error(0, known=1))
        assert torch.equal(error(3, known=2), error(1, known=2)) and not torch.equal(error(1, 2), error(0, 2))


def test_stored_latents_train_as_frames_do(path):
    """But for the rounding to float16, with the scale that the dataset gives."""
    mean, std = (0.1, 0.2, 0.3), (1.0, 2.0, 0.5)
    frames, stored = tiny.system(path), tiny.system(path, latents=True)
    assert stored.inputs().latents == frames.tokenizer_hash and not stored.inputs().sizes
    facts = DataFacts(30, {"actions": tiny.ACTIONS}, latents_mean=mean, latents_std=std)
    for system in (frames, stored):
        system.use_facts(facts)
    for step in range(2):
        batch = tiny.batch(step)
        latents = stored.tokenizer.latents(batch.pop("clip")).half().float()
        frames.step(iter([tiny.batch(step)]), step)
        stored.step(iter([batch | {"latents": latents}]), step)
    expected = states(frames.modules)
    np.testing.assert_allclose(expected["latents.mean"], mean, rtol=1e-6)
    for name, value in states(stored.modules).items():
        torch.testing.assert_close(value, expected[name], atol=5e-3, rtol=1e-2, msg=name)


@pytest.mark.slow
def test_it_learns_a_world_of_one_object(path):
    """A square that steps to the right at action 1 alone: errors fall below half of those of copying the last frame."""

    def batch(step):
        rng = np.random.RandomState(step)
        actions = rng.randint(0, 2, (8, 12))
        places = (actions.cumsum(1) + rng.randint(0, 6, (8, 1))) % 6
        z = np.zeros((8, tiny.CHANNELS, 12, *tiny.GRID), np.float32)
        for row, place in enumerate(places):
            z[row, :, np.arange(12), 1, place] = 3.0
        return {"latents": torch.from_numpy(z), "actions": torch.from_numpy(actions)}

    system = tiny.system(path, batch=8, steps=300, num_actions=2, latents=True, poses=False, lr=3e-3, width=64, depth=2)
    for step in range(300):
        system.step(iter([batch(step)]), step)
    found = system.validate(iter([batch(1000)]))
    assert found["loss/error"].mean() < 0.5 * found["copying"].mean(), found


@pytest.mark.parametrize("given", [{}, {"num_actions": 0}, {"num_actions": 0, "action_values": 2}, {"poses": False}])
def test_exported_files_continue_videos(path, tmp_path, given):
    system = tiny.system(path, **given)
    streams = system.inputs().streams
    batch = {name: value for name, value in tiny.batch(0).items() if name in (*streams, "clip")}
    if given.get("action_values"):
        batch["actions"] = torch.randn(4, 12, 2)
    system.step(iter([batch]), 0)
    save_bundle(system.export(), tmp_path / "world.pkl")
    bundle = load_bundle(tmp_path / "world.pkl")
    assert set(bundle.networks) == {"world", "latents", "tokenizer"} and bundle.options["prompt_frames"] == 4
    made = open_sampler([str(tmp_path / "world.pkl")], {"steps": "2"})
    assert made.needs.past == 4 and made.needs.streams == (("actions",) if streams else ())
    other = tiny.system(path, **given)
    other.init_from(bundle)
    assert torch.equal(other.network.head.weight, system.average.head.weight)
    assert torch.equal(other.scale.std, system.scale.std)


REFUSED = [
    ({"num_actions": 2, "action_values": 2}, "two kinds of actions"),
    ({"clip_frames": 4, "prompt_frames": 4}, "need more than 4: use longer clips"),
    ({"width": 30}, "must be a multiple of twice the 2 heads"),
    ({"short_context": 1.5}, "short.context"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_options_that_do_not_fit_are_refused(changes, message):
    small = {"tokenizer": "x.pkl", "width": 32, "heads": 2, "num_actions": 4, **changes}
    with pytest.raises(ValueError, match=message):
        World.check(WorldTrainOptions(**small), TrainOptions(outdir="", dataset="", system="world", steps=20))


def test_other_tokenizers_and_actions_are_refused(path, tmp_path):
    network = VQGAN3D(16, 16, 4, downsample=[4, 4, 4], hidden=2, embedding_dim=4, num_codes=8, norm="batch")
    save_network(network, tmp_path / "clips.pkl")
    with pytest.raises(ValueError, match="encodes several frames together"):
        tiny.system(tmp_path / "clips.pkl")
    with pytest.raises(ValueError, match="the actions of the dataset need --num-actions=9, but it is 4"):
        tiny.system(path).use_facts(DataFacts(30, {"actions": 9}))
