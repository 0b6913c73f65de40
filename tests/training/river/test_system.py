"""RIVER in training: resuming, ranks, what is drawn, actions, scales of latents, bad options; and the refiner."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from metrics.detectors import i3d
from tests.ranks import run_ranks
from tests.training.river import tiny
from train import make_options
from training.contract import DataFacts, Run
from training.generation import flow
from training.network_file import load_bundle, save_bundle
from training.river import draws
from training.river.options import TIME_LAWS, RefinerOptions, RiverTrainOptions
from training.river.presets import PRESETS, REFINER_PRESETS
from training.river.refiner_system import RefinerTraining
from training.river.system import River
from training.sampling import open_sampler


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.save_tokenizer(tmp_path_factory.mktemp("river"))


def preset(name, row):
    """The options of a run that names its tokenizer alone."""
    return make_options(name, row, {"outdir": "runs", "dataset": "data", "field_tokenizer": "t.pkl"})


def run(system, steps, batch=4):
    """What the last of some steps reports."""
    found = {}
    for step in steps:
        rng = np.random.RandomState(step)
        actions = torch.from_numpy(rng.randint(0, 2, (batch, 6)))
        found = system.step(iter([{"clip": tiny.clips(step, batch), "actions": actions}]), step)
    return found


def states(system):
    return {
        f"{name}.{key}": value for name, module in system.modules.items() for key, value in module.state_dict().items()
    }


def copy_state(source, target):
    for name, module in target.modules.items():
        module.load_state_dict(source.modules[name].state_dict())
    for name, optimizer in target.optimizers.items():
        optimizer.load_state_dict(source.optimizers[name].state_dict())


@pytest.mark.parametrize("given", [{}, {"legacy": True}, {"num_actions": 2, "context_frames": 3, "colours": True}])
def test_resuming_continues_bit_for_bit(path, given):
    whole, first, second = (tiny.system(path, **given) for _ in range(3))
    run(whole, range(4))
    run(first, range(2))
    copy_state(first, second)
    run(second, range(2, 4))
    expected = states(whole)
    assert all(torch.equal(value, expected[name]) for name, value in states(second).items())


def test_rounds_of_accumulation_change_nothing(path):
    """With dropout, whose masks belong to the clips."""
    one, two = tiny.system(path, dropout=0.3), tiny.system(path, grad_accum=2, dropout=0.3)
    for system in (one, two):
        run(system, range(3))
    check_equal(states(two), states(one))


def check_equal(found, expected):
    """But for rounding. The bias of keys has no gradient but rounding, which Adam enlarges."""
    for name, value in expected.items():
        others = value, found[name]
        if name.endswith("in_proj_bias"):
            others = [torch.cat([part.chunk(3)[0], part.chunk(3)[2]]) for part in others]
        torch.testing.assert_close(others[1], others[0], rtol=1e-4, atol=1e-5, msg=name)


RANKS = """
import sys, torch
from tests.training.river import tiny
from torch_utils import distributed
distributed.init()
rank, world = distributed.get_rank(), distributed.get_world_size()
system = tiny.system(sys.argv[1], dropout=0.3)
for step in range(3):
    own = slice(rank * 4 // world, (rank + 1) * 4 // world)
    system.step(iter([{"clip": tiny.clips(step)[own]}]), step)
if rank == 0:
    torch.save({name: module.state_dict() for name, module in system.modules.items()}, sys.argv[2])
distributed.shutdown()
"""


def test_two_ranks_are_as_one(path, tmp_path):
    found = run_ranks(RANKS, path, tmp_path / "two.pt")
    assert [code for code, _, _ in found] == [0, 0], found
    one = tiny.system(path, dropout=0.3)
    run(one, range(3))
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    check_equal({f"{name}.{key}": value for name, state in two.items() for key, value in state.items()}, states(one))


def test_laws_of_the_sample():
    """Targets and conditions are uniform; the only frame before a target counts twice."""
    rngs = [np.random.RandomState(i) for i in range(4000)]
    sample = draws.draw_sample(rngs, 1, 5, 2, (1, 2, 2))
    targets, conditions, distances = sample.targets, sample.conditions, sample.distances
    assert np.abs(np.bincount(targets, minlength=5)[1:] / 1000 - 1).max() < 0.1
    assert (conditions[:, 0] >= conditions[:, 1]).all() and (conditions >= 0).all()
    late = conditions[targets == 4]
    assert set(late.flatten().tolist()) == {0, 1, 2}
    shares = np.bincount(late.flatten(), minlength=3) / late.numel()
    assert np.abs(shares - 1 / 3).max() < 0.05
    assert (distances[targets == 1] == 1).all() and (
        distances == (targets[:, None] - 1 - conditions).clamp(min=1)
    ).all()
    assert sample.frames[:, :2].tolist() == torch.stack([targets, targets - 1], dim=1).tolist()
    assert draws.draw_sample(rngs, 3, 5, 1, (1, 2, 2)).targets.min() == 3


def test_published_samples_have_two_frames_before_the_target(path):
    system = tiny.system(path, legacy=True)
    targets = [system.draw_frames(system.run.rngs("field", step), step).targets for step in range(30)]
    assert torch.cat(targets).min() == 2 and torch.cat(targets).max() == 5


def test_latents_are_normalised_by_the_first_batch(path):
    system = tiny.system(path)
    run(system, range(1))
    sample = system.draw_frames(system.run.rngs("field", 0), 0)
    z = system.latents.encode(sample.pick(tiny.clips(0).transpose(1, 2)).transpose(1, 2))
    torch.testing.assert_close(z.mean((0, 1, 3, 4)), torch.zeros(tiny.CHANNELS), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std((0, 1, 3, 4), unbiased=False), torch.ones(tiny.CHANNELS), atol=1e-4, rtol=0)
    before = system.scale.mean.clone()
    run(system, range(1, 2))
    assert torch.equal(system.scale.mean, before)
    plain = tiny.system(path, normalise=False)
    run(plain, range(1))
    assert (plain.scale.mean == 0).all() and (plain.scale.std == 1).all()


def test_stored_latents_train_as_frames_do(path):
    """But for the rounding to float16, with the scale that the dataset gives."""
    mean, std = (0.1, 0.2, 0.3), (1.0, 2.0, 0.5)
    frames, stored = tiny.system(path), tiny.system(path, latents=True)
    assert stored.inputs().latents == frames.tokenizer_hash and not stored.inputs().sizes
    for system in (frames, stored):
        system.use_facts(DataFacts(30, latents_mean=mean, latents_std=std))
    for step in range(2):
        clips = tiny.clips(step)
        latents = stored.tokenizer.latents(clips).half().float()
        frames.step(iter([{"clip": clips}]), step)
        stored.step(iter([{"latents": latents}]), step)
    expected = states(frames)
    np.testing.assert_allclose(expected["latents.mean"], mean, rtol=1e-6)
    for name, value in states(stored).items():
        torch.testing.assert_close(value, expected[name], atol=5e-3, rtol=1e-2, msg=name)


def test_dropout_is_that_of_each_clip():
    x = torch.ones(3, 1000)
    whole = draws.ClipDropout(0.2, [torch.Generator().manual_seed(i) for i in range(3)])(x)
    alone = draws.ClipDropout(0.2, [torch.Generator().manual_seed(2)])(x[:1])
    assert torch.equal(whole[2:], alone)
    assert set(whole.unique().tolist()) == {0.0, 1.25} and abs(float((whole == 0).float().mean()) - 0.2) < 0.03


def test_hidden_actions_do_not_matter(path):
    network = tiny.field(num_actions=2, context_frames=1)
    x, t, distances = torch.randn(3, 2, tiny.CHANNELS, *tiny.GRID), torch.tensor([0.2, 0.7]), torch.ones(2, 1)
    actions = torch.tensor([0, 1])
    shown = network(*x, distances, t, actions)
    assert not torch.allclose(shown, network(*x, distances, t, 1 - actions))
    hidden = network(*x, distances, t, actions, torch.tensor([False, True]))
    assert torch.equal(hidden[0], network(*x, distances, t)[0]) and torch.equal(hidden[1], shown[1])
    vectors = tiny.field(action_values=3)
    a = torch.randn(2, 3)
    assert not torch.allclose(vectors(*x, distances, t, a), vectors(*x, distances, t, -a))
    with_none = vectors(*x, distances, t, a, torch.tensor([False, False]))
    assert torch.equal(with_none, vectors(*x, distances, t))


def test_bfloat16_trains_about_the_same(path):
    options = tiny.options(path, dropout=0.0)
    losses = []
    for precision in ("fp32", "bf16"):
        system = River(options, Run(batch=4, steps=20, precision=precision))
        losses.append(run(system, range(3))["loss/loss"].mean().item())
        assert all(p.dtype == torch.float32 for p in system.network.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[0] != losses[1]


def test_exported_files_continue_videos(path, tmp_path):
    system = tiny.system(path, prompt_frames=2, num_actions=2)
    run(system, range(2))
    save_bundle(system.export(), tmp_path / "river.pkl")
    sampler = open_sampler([str(tmp_path / "river.pkl")])
    assert (sampler.needs.past, sampler.needs.streams, sampler.size) == (2, ("actions",), tiny.SIZE)
    assert sampler.costs == {"evaluations_per_frame": 10}
    bundle = load_bundle(str(tmp_path / "river.pkl"))
    assert torch.equal(bundle.networks["latents"].get_buffer("mean"), system.scale.mean)
    assert bundle.tokenizer == system.tokenizer_hash and bundle.options["past_horizon"] == 5
    other = tiny.system(path, prompt_frames=2, num_actions=2)
    other.init_from(bundle)
    average = system.average.state_dict()
    assert all(torch.equal(value, average[name]) for name, value in other.network.state_dict().items())
    assert torch.equal(other.scale.std, system.scale.std) and other.scale.measured == 1


def test_validation_leaves_the_run_as_it_is(path):
    system = tiny.system(path)
    system.network.train()
    before = {name: value.clone() for name, value in states(system).items()}
    with torch.no_grad():
        first, second = (system.validate(iter([{"clip": tiny.clips(3)}]))["loss/loss"] for _ in range(2))
    assert torch.equal(first, second) and first.shape == (4,)
    assert all(torch.equal(value, before[name]) for name, value in states(system).items())
    assert system.network.training


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompt_frames": 6}, "--prompt-frames is 6"),
        ({"num_actions": 2, "action_values": 3}, "two kinds of actions"),
        ({"legacy": True, "context_frames": 2}, "--legacy takes one old frame"),
        ({"latents": True, "colours": True}, "--colours changes frames"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"inner_dim": 20}, "multiple of the 8 heads"),
    ],
)
def test_bad_options_are_refused(path, given, words):
    options = tiny.options(path, **given) if "tokenizer" not in given else RiverTrainOptions()
    with pytest.raises(ValueError, match=words):
        River.check(options, preset("river", "toy"))


def test_actions_must_be_those_of_the_dataset(path):
    facts = DataFacts(30, {"actions": 4})
    with pytest.raises(ValueError, match="need --num-actions=4, but it is 2"):
        tiny.system(path, num_actions=2).use_facts(facts)
    with pytest.raises(ValueError, match="need --action-values=3, but it is 0"):
        tiny.system(path, num_actions=3).use_facts(DataFacts(30, {"actions": 3}, frozenset({"actions"})))
    tiny.system(path, num_actions=4).use_facts(facts)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_make_options(name):
    options = preset("river", name)
    assert options.model["clip_frames"] > options.model["prompt_frames"] and options.x_flip is False
    json.dumps(dataclasses.asdict(options))


@pytest.mark.parametrize("name", REFINER_PRESETS)
def test_refiner_presets_make_options(name):
    assert preset("river-refiner", name).model["width"] > 0


def test_options_name_the_laws_that_there_are():
    assert TIME_LAWS == flow.TIME_LAWS and RiverTrainOptions().sigma == flow.SIGMA


# ----------------------------------------------------------------------------
# The refiner.


def refiner(path, **given):
    sizes = {"clip_frames": 4, "groups": 1, "blocks": 1, "width": 8, "perceptual_weight": 0.0, "lr": 0.3, **given}
    return RefinerTraining(RefinerOptions(tokenizer=str(path), **sizes), Run(batch=4, steps=40))


def test_refiner_learns_and_is_a_part_of_the_predictor(path, tmp_path):
    system = refiner(path)
    clips = tiny.clips(0, frames=4)
    losses = [system.step(iter([{"clip": clips}]), step)["loss/loss"].mean().item() for step in range(12)]
    assert losses[-1] < 0.95 * losses[0]
    with torch.no_grad():
        found = system.validate(iter([{"clip": clips}]))
    assert found["psnr"].shape == found["ssim"].shape == (12,)
    save_bundle(system.export(), tmp_path / "refiner.pkl")
    predictor = tiny.system(path)
    run(predictor, range(1))
    save_bundle(predictor.export(), tmp_path / "river.pkl")
    sampler = open_sampler([str(tmp_path / name) for name in ("river.pkl", "refiner.pkl")])
    assert sampler.needs.past == 1 and len(sampler.networks) == 3
    assert open_sampler([str(tmp_path / "refiner.pkl")]).needs.follows


def test_refiner_resumes(path):
    whole, first, second = (refiner(path) for _ in range(3))
    for system, steps in ((whole, range(4)), (first, range(2))):
        for step in steps:
            system.step(iter([{"clip": tiny.clips(step, frames=4)}]), step)
    copy_state(first, second)
    for step in range(2, 4):
        second.step(iter([{"clip": tiny.clips(step, frames=4)}]), step)
    assert all(torch.equal(value, states(whole)[name]) for name, value in states(second).items())


@pytest.mark.slow
def test_the_loss_of_features_reaches_the_network(path):
    """Its gradient is that of the same distance by other code: I3D applied to refined clips one at a time."""
    system = refiner(path, clip_frames=10, perceptual_weight=0.1)
    clips = tiny.clips(0, frames=10)[:2]
    found = system.losses({"clip": clips})
    assert torch.allclose(found["loss"], found["pixel_loss"] + 0.1 * found["perceptual_loss"])
    parameters = [p for p in system.network.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(found["perceptual_loss"].sum(), parameters)
    refined, true = system.refine(clips)
    net, distances = i3d.load(), []
    for number in range(2):
        pair = [x[9 * number : 9 * number + 9].transpose(0, 1).unsqueeze(0) for x in (refined, true)]
        ours, theirs = (net(F.interpolate(x, (9, 224, 224), mode="trilinear", align_corners=False)) for x in pair)
        distances.append((ours - theirs.detach()).square().mean())
    assert torch.allclose(found["perceptual_loss"], torch.stack(distances), rtol=1e-3)
    wanted = torch.autograd.grad(torch.stack(distances).sum(), parameters)
    ours, theirs = (torch.cat([x.flatten() for x in values]) for values in (gradients, wanted))
    assert theirs.norm() > 0 and (ours - theirs).norm() < 0.02 * theirs.norm()  # rounding moves maxima of pooling


def test_features_need_frames(path):
    with pytest.raises(ValueError, match="I3D needs 9 frames"):
        RefinerTraining.check(
            RefinerOptions(tokenizer=str(path), clip_frames=9),
            preset("river", "toy"),
        )
