"""Rollouts: frames do not depend on chunks, batch mates, starts or lengths; conditions, guidance, options."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.river import tiny
from torch_utils.precision import set_precision
from training.generation import flow
from training.river import prediction
from training.river.networks import prepare
from training.river.refiner import RCAN
from training.river.sampling import RiverOptions, RiverSampler
from training.sampling import Prompt, Request, resolve_options


class Given(Prompt):
    """Frames of a video with some before it, and actions that depend on the frame alone."""

    def __init__(self, past=4, seed=0):
        self.past = past
        self.video = tiny.clips(seed, 1, past)

    def frames(self, start, count, size):
        assert isinstance(start, int)
        first = start + self.past
        return self.video[:, :, first : first + count]

    def stream(self, name, start, count):
        assert name == "actions" and isinstance(start, int)
        return torch.tensor([[(frame * 7 + 3) % 5 % 2 for frame in range(start, start + count)]])


class Opposite(Given):
    """The other actions."""

    def stream(self, name, start, count):
        return 1 - super().stream(name, start, count)


def close(found, expected, atol=2e-4, rtol=1e-4):
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)


def sampler(options=None, refined=False, facts=None, **given):
    refiner = None
    if refined:
        torch.manual_seed(3)
        refiner = RCAN(1, 1, 8, tanh=True).eval().requires_grad_(False)
    chosen = resolve_options(RiverOptions, {"steps": 2, **(options or {})})
    return RiverSampler(tiny.field(**given), tiny.latent_video(), refiner, facts or {"prompt_frames": 2}, chosen)


def video(made, seeds, num_frames, start: Any = 0, block=8, prompt=None):
    made.block = block
    request = Request(seeds, start, num_frames, prompt or Given())
    return torch.cat([chunk["video"] for chunk in made.frames(request)], dim=2)


@pytest.mark.parametrize(
    ("options", "refined", "given"),
    [
        ({}, False, {}),
        ({"solver": "rk4", "context_resample": "step", "warm_start": 0.3}, False, {"context_frames": 3}),
        ({"context_resample": "frame", "past_horizon": 3, "guidance": 2.0}, False, {"num_actions": 2}),
        ({"solver": "euler"}, True, {}),
    ],
)
def test_frames_depend_on_seed_start_and_prompt_alone(options, refined, given):
    made = sampler(options, refined, **given)
    whole = video(made, [3], 10)
    assert whole.shape == (1, 3, 10, *tiny.SIZE) and whole.std() > 0
    close(video(made, [3], 10, block=3), whole)
    close(video(made, [3], 4), whole[:, :, :4])
    close(video(made, [3], 4, start=5), whole[:, :, 5:9])
    company = video(made, [5, 3, 8], 10)
    close(company[1:2], whole)
    assert not torch.allclose(company[0], company[1])
    starts = video(made, [3, 3], 4, start=[5, 1], block=3)
    close(starts, torch.cat([whole[:, :, 5:9], whole[:, :, 1:5]]))


def test_videos_without_end_need_constant_memory():
    made = sampler({"past_horizon": 4, "steps": 1, "solver": "euler"})
    made.block = 2
    sizes = []
    for past in itertools.islice(Recorded(made).pasts(Request([0, 1], 0, None, Given())), 40):
        sizes.append((len(past.latents), len(past)))
    assert sizes[-1] == (4, 42) and max(kept for kept, _ in sizes) == 4
    chunks = list(itertools.islice(made.frames(Request([0], 0, None, Given())), 6))
    assert all(chunk["video"].shape[2] == 2 for chunk in chunks)


class Recorded:
    """The pasts of a rollout, seen through the function that continues them."""

    def __init__(self, made):
        self.made = made

    def pasts(self, request):
        given = self.made.latents.encode(request.prompt.frames(-2, 2, None)).expand(2, -1, -1, -1, -1)
        past = prediction.begin(given, self.made.settings.past_horizon)
        for frame in itertools.count():
            draws = prediction.SeededDraws(request.seeds, frame)
            past.append(prediction.next_latents(self.made.field, past, draws, self.made.settings))
            yield past


def test_a_horizon_as_long_as_the_past_changes_nothing():
    whole = video(sampler({"past_horizon": -1}), [1], 5)
    close(video(sampler({"past_horizon": 50}), [1], 5), whole)
    assert not torch.allclose(video(sampler({"past_horizon": 2}), [1], 5), whole)


def test_law_of_conditions():
    """Uniform over the frames before the reference, or the newest of them; distances count from the reference."""
    field = tiny.field(context_frames=2)
    past = prediction.Past([torch.full((1, 1, 1, 1), float(i)) for i in range(6)])
    counts = {-1: np.zeros(6), 4: np.zeros(6)}
    for horizon, seen in counts.items():
        settings = prediction.Integration(past_horizon=horizon)
        for seed in range(1500):
            chosen = prediction.Conditions(past, prediction.SeededDraws([seed], 0), field.context_frames, settings)
            chosen.redraw()
            numbers = chosen.frames.flatten()
            assert (chosen.distances.flatten() == 5 - numbers).all() and numbers[0] >= numbers[1]
            np.add.at(seen, numbers.long().numpy(), 1)
    np.testing.assert_allclose(counts[-1] / 3000, [0.2] * 5 + [0], atol=0.03)
    np.testing.assert_allclose(counts[4] / 3000, [0, 0, 1 / 3, 1 / 3, 1 / 3, 0], atol=0.03)


@pytest.mark.parametrize(("resample", "draws"), [("eval", 12), ("step", 3), ("frame", 1)])
def test_conditions_are_drawn_again(resample, draws):
    calls = []

    class Counting(prediction.SeededDraws):
        def indices(self, low, high, count):
            calls.append((low, high))
            return super().indices(low, high, count)

    grid = tuple(flow.time_grid(4))
    settings = prediction.Integration("rk4", grid, resample)
    past = prediction.Past(list(torch.randn(4, 1, tiny.CHANNELS, *tiny.GRID)))
    prediction.next_latents(tiny.field(), past, Counting([0], 0), settings)
    assert calls == [(0, 3)] * draws


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"solver": "rk4", "steps": 100, "legacy": True}, 396),
        ({"solver": "rk4", "steps": 10, "legacy": True}, 36),
        ({"solver": "rk4", "steps": 100, "warm_start": 0.1, "legacy": True}, 356),
        ({"solver": "euler", "steps": 7}, 7),
        ({"solver": "midpoint", "steps": 10, "warm_start": 0.5}, 10),
        ({"solver": "heun", "steps": 3, "guidance": 2.0}, 12),
        ({"solver": "heun", "steps": 3, "guidance": 0.0}, 6),
    ],
)
def test_evaluations_are_counted(options, count):
    made = sampler(options, num_actions=2)
    assert made.costs == {"evaluations_per_frame": count} and made.settings.evaluations == count
    calls = []
    hook = made.field.register_forward_pre_hook(lambda *_: calls.append(1))
    past = prediction.Past(list(torch.randn(4, 1, tiny.CHANNELS, *tiny.GRID)))
    actions = torch.zeros(1, dtype=torch.int64)
    prediction.next_latents(made.field, past, prediction.SeededDraws([0], 0), made.settings, actions)
    hook.remove()
    assert len(calls) == count


def test_guidance_weighs_the_actions():
    made = [sampler({"guidance": g}, num_actions=2) for g in (0.0, 1.0, 3.0)]
    assert made[0].needs.streams == () and made[1].needs.streams == ("actions",)
    none, plain, strong = (video(one, [0], 2) for one in made)
    assert not torch.allclose(none, plain) and not torch.allclose(strong, plain)
    other = sampler({"guidance": 1.0}, num_actions=2)
    assert not torch.allclose(video(other, [0], 2, prompt=Opposite()), plain)


def test_one_frame_of_context_counts_twice():
    z = torch.randn(2, 1, tiny.CHANNELS, *tiny.GRID)
    past = prediction.begin(z)
    assert len(past) == 2 and torch.equal(past.latents[0], past.latents[1])
    assert video(sampler({"prompt_frames": 1}), [0], 3).shape[2] == 3


def test_packed_copies_agree():
    """The copy for inference is the network up to rounding, in half precision about it."""
    network = tiny.field(inner_dim=512, context_frames=2)
    x = torch.randn(3, 1, tiny.CHANNELS, *tiny.GRID)
    arguments = (x[0], x[1], torch.stack([x[2], x[1]], dim=1), torch.tensor([[3, 1]]), torch.tensor([0.3]))
    expected, packed = network(*arguments), prepare(network)
    close(packed(*arguments), expected, atol=1e-5, rtol=1e-4)
    set_precision([network], "bf16")
    error = (prepare(network)(*arguments) - expected).norm() / expected.norm()
    assert 0 < error < 0.03
    set_precision([network], "fp32")
    assert torch.equal(network(*arguments), expected)


def test_library_call_is_deterministic():
    arguments = tiny.field(), tiny.latent_video(), tiny.clips(0, 2, 1).transpose(1, 2)
    first, again, other = (prediction.generate_frames(*arguments, 3, 3, seed=seed) for seed in (5, 5, 6))
    assert first.shape == (2, 4, 3, *tiny.SIZE)
    assert torch.equal(first, again) and not torch.equal(first, other)
    reconstruction = arguments[1].decode(arguments[1].encode(arguments[2].transpose(1, 2))).transpose(1, 2)
    close(first[:, :1], reconstruction)
    noise = prediction.generate_frames(*arguments, 1, 1)  # one point of the grid: nothing is integrated
    assert noise.shape[1] == 2
    with pytest.raises(ValueError, match="no point"):
        prediction.generate_frames(*arguments, 1, 10, 0.95)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver": "rk5"}, "solver is 'rk5': use one of euler, midpoint"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": "some"}, "use a whole number"),
        ({"warm_start": 1.0}, "warm_start is 1"),
        ({"past_horizon": 1}, "past_horizon is 1"),
        ({"prompt_frames": 0}, "prompt_frames is 0"),
        ({"guidance": -1.0}, "guidance is -1"),
        ({"legacy": True, "steps": 5, "warm_start": 0.9}, "no point"),
        ({"context_resample": "never"}, "use one of eval, step, frame"),
        ({"stepz": 3}, "steps"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        resolve_options(RiverOptions, options)


def test_latents_do_not_depend_on_batch_mates():
    made = sampler({"past_horizon": 4}, context_frames=2)
    given = made.latents.encode(Given().video[:, :, -2:])

    def latents(seeds):
        rollout = made.rollout(Request(seeds), given.expand(len(seeds), -1, -1, -1, -1))
        return torch.stack(list(itertools.islice(rollout, 8)), dim=1)

    close(latents([5, 3, 8])[1:2], latents([3]), atol=1e-5, rtol=0)
