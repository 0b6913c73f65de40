"""Rollouts: frames depend on seed, start and prompt alone; memory is bounded; actions count; precision."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch

from tests.training.world import tiny
from torch_utils.precision import set_precision
from training.generation import flow
from training.sampling import Prompt, Request, resolve_options
from training.world import sampling
from training.world.context import GEOMETRY
from training.world.networks import prepare
from training.world.sampling import Past, WorldOptions, WorldSampler


class Given(Prompt):
    """Frames of a video with some before it, and actions that depend on the frame alone."""

    def __init__(self, past=4, salt=3):
        self.past, self.salt = past, salt
        self.video = tiny.batch(0, 1, past)["clip"]

    def frames(self, start, count, size):
        assert isinstance(start, int)
        first = start + self.past
        return self.video[:, :, first : first + count]

    def stream(self, name, start, count):
        assert name == "actions" and isinstance(start, int)
        return torch.tensor([[(frame * 7 + self.salt) % 5 % 4 for frame in range(start, start + count)]])


def sampler(options=None, facts=None, **given):
    chosen = resolve_options(WorldOptions, {"steps": 2, **(options or {})})
    return WorldSampler(tiny.network(**given), tiny.latent_video(), facts or {"prompt_frames": 4, "horizon": 9}, chosen)


def video(made, seeds, num_frames, start: Any = 0, block=8, prompt=None):
    made.block = block
    request = Request(seeds, start, num_frames, prompt or Given())
    return torch.cat([chunk["video"] for chunk in made.frames(request)], dim=2)


@pytest.mark.parametrize("given", [{}, {"num_actions": 0}, {"memory": 0}])
def test_frames_depend_on_seed_start_and_prompt_alone(given):
    made = sampler(**given)
    whole = video(made, [3], 14)
    assert whole.shape == (1, 3, 14, *tiny.SIZE) and whole.std() > 0
    close = partial(torch.testing.assert_close, atol=2e-4, rtol=1e-4)
    close(video(made, [3], 14, block=3), whole)
    close(video(made.interactive(), [3], 4, block=1), whole[:, :, :4])
    close(video(made, [3], 4, start=5), whole[:, :, 5:9])
    company = video(made, [5, 3, 8], 14)
    close(company[1:2], whole)
    assert not torch.allclose(company[0], company[1])
    starts = video(made, [3, 3], 4, start=[5, 1], block=3)
    close(starts, torch.cat([whole[:, :, 5:9], whole[:, :, 1:5]]))


def test_actions_change_what_follows_and_nothing_before():
    class Later(Given):
        def stream(self, name, start, count):
            values = super().stream(name, start, count)
            numbers = torch.arange(start, start + count)
            return torch.where(numbers >= 3, (values + 1) % 4, values)

    one, two = (video(sampler(), [1], 6, prompt=prompt) for prompt in (Given(), Later()))
    assert torch.equal(one[:, :, :3], two[:, :, :3])
    assert not torch.allclose(one[:, :, 3], two[:, :, 3], atol=1e-3)


def test_videos_without_end_need_constant_memory():
    made = sampler({"steps": 1})
    made.block = 2
    chunks = list(itertools.islice(made.frames(Request([0, 1], 0, None, Given())), 12))
    assert all(chunk["video"].shape[2] == 2 for chunk in chunks)
    past = Past(made.network, torch.zeros(1, 4, tiny.CHANNELS, *tiny.GRID), torch.ones(1, 4, dtype=torch.int64), 9)
    for _ in range(30):
        past.move(torch.tensor([1]))
        past.append(torch.zeros(1, tiny.CHANNELS, *tiny.GRID))
    assert len(past.latents) == len(past.poses) == 9 and past.num_frames == 34
    assert float(past.poses[-1][0, 0]) == pytest.approx(34 / 8)  # the pose itself is never forgotten


def test_a_horizon_as_long_as_the_past_changes_nothing():
    whole = video(sampler({"horizon": 50}), [1], 5)
    torch.testing.assert_close(video(sampler({"horizon": 12}), [1], 5), whole, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(video(sampler({"horizon": 3}), [1], 5), whole, atol=1e-3)


def test_one_frame_of_context_is_enough():
    found = video(sampler({"prompt_frames": 1}), [1], 3, prompt=Given(past=1))
    assert found.isfinite().all() and found.std() > 0


def test_half_precision_is_close():
    made = sampler()
    whole = video(made, [1], 4)
    assert set_precision(made.networks, "bf16") == "bf16"
    half = video(made, [1], 4)
    assert not torch.equal(half, whole)
    torch.testing.assert_close(half, whole, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"steps": 0}, "option steps is 0"), ({"noise": "2"}, "from 0 to 1"), ({"horizon": -1}, "option horizon is -1")],
)
def test_bad_options_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        resolve_options(WorldOptions, values)


@pytest.mark.parametrize("options", [{}, {"skip": True}, {"num_actions": 0}])
def test_conditions_computed_together_are_those_of_each_evaluation(options):
    network = tiny.network(**options)
    noise, level = torch.randn(3, tiny.CHANNELS, *tiny.GRID), torch.rand(3)
    context, where = torch.randn(3, 4, tiny.CHANNELS, *tiny.GRID), torch.randn(3, 4, GEOMETRY)
    actions = None if options.get("num_actions") == 0 else torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 1, 1]])
    known = (context, where, level, actions, None)
    times = flow.time_grid(5)
    results = [
        flow.integrate(lambda t, x, way=way: (way(t, x) - x) / (1 - t), noise, times, "euler")
        for way in (sampling._one_by_one(network, known), sampling._at_once(network, known, times[:-1]))
    ]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sampling.denoise(network, noise, known, 4), results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("half", [None, "bf16"])
def test_the_network_of_generation_is_the_trained_one(half):
    """Up to rounding, and without a copy of tensors that it does not change."""
    network = tiny.network(width=192, depth=1)  # wide enough for packed weights
    network.half = half
    batch = (
        torch.randn(2, tiny.CHANNELS, *tiny.GRID), torch.rand(2), torch.randn(2, 4, tiny.CHANNELS, *tiny.GRID),
        torch.randn(2, 4, GEOMETRY), torch.rand(2), torch.tensor([[0, 1, 2, 3]] * 2),
    )  # fmt: skip
    copied = prepare(network)
    found, expected = copied(*batch), network(*batch)
    assert (found - expected).norm() < (0.1 if half else 1e-5) * expected.norm()
    assert copied.embed.weight.data_ptr() == network.embed.weight.data_ptr()
    assert network.half == half and all(p.dtype == torch.float32 for p in network.parameters())
