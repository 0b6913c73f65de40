"""Poses by dead reckoning, and the frames of context that are chosen by them."""

import math

import numpy as np
import pytest
import torch

from tests.training.world import tiny
from training.world import context


def poses_of(*rows):
    """Poses of one video, angles in degrees: (1, T, 3)."""
    return torch.tensor([[[x, y, math.radians(angle)] for x, y, angle in rows]])


def test_motions_are_measured_where_walls_stop_some_steps():
    """Medians: a third of the steps forwards is stopped, and angles pass 180 degrees."""
    rng = np.random.RandomState(0)
    walks = [tiny.walk(rng, 60) for _ in range(4)]
    actions, poses = (np.stack([walk[i] for walk in walks]) for i in (0, 1))
    forward = np.argwhere(actions[:, 1:] == 1)[::3]
    for row, step in forward:  # the step does not happen, so that all later places move
        poses[row, step + 1 :, :2] -= poses[row, step + 1, :2] - poses[row, step, :2]
    found = context.measure_motions(torch.from_numpy(actions), torch.from_numpy(poses), 5)
    torch.testing.assert_close(found[:4], tiny.units(tiny.MOTIONS), atol=1e-5, rtol=0)
    assert (found[4] == 0).all()


def test_dead_reckoning_follows_a_walk():
    actions, poses = tiny.walk(np.random.RandomState(1), 50)
    motions = tiny.units(tiny.MOTIONS)
    found = context.dead_reckon(torch.from_numpy(actions)[None], motions)
    expected = np.concatenate([poses[:, :2] / 80, np.radians(poses[:, 2:])], axis=1)
    # Up to where the walk begins, and whole turns.
    ours, theirs = (context.relative(p[:, 1:], p[:, 0]) for p in (found, torch.tensor(expected)[None].float()))
    torch.testing.assert_close(ours[..., :2], theirs[..., :2], atol=1e-4, rtol=0)
    torch.testing.assert_close(ours[..., 2].cos(), theirs[..., 2].cos(), atol=1e-4, rtol=0)
    rest = context.dead_reckon(torch.from_numpy(actions)[None, 20:], motions, found[:, 19])
    torch.testing.assert_close(rest, found[:, 20:], atol=1e-5, rtol=0)


def test_poses_as_seen_from_another():
    found = context.relative(poses_of((0, 3, 90), (-2, 0, -170)), torch.tensor([[0.0, 1.0, math.radians(90)]]))
    torch.testing.assert_close(found[0, 0], torch.tensor([2.0, 0.0, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[0, 1], torch.tensor([-1.0, 2.0, math.radians(100)]), atol=1e-5, rtol=0)


def test_a_turn_away_and_back_brings_the_first_frames_back():
    """Frame 30 looks where frame 0 did; frame 24 where frame 6 did."""
    angles = [6 * min(i, 30 - i) for i in range(31)]
    poses = poses_of(*((0, 0, angle) for angle in angles))
    for target, twin in ((30, 0), (24, 6), (27, 3)):
        chosen = context.choose(poses, torch.tensor([target]), torch.tensor([0]), [1, 2, 4], 2)
        assert chosen.numbers[0, :3].tolist() == [target - 1, target - 2, target - 4] and chosen.present.all()
        assert chosen.numbers[0, 3] == twin
        assert abs(int(chosen.numbers[0, 4]) - twin) >= context.APART
        assert chosen.numbers[0, 3:].max() < target - 4


def test_frames_that_are_not_there_are_empty():
    poses = poses_of(*((i / 8, 0, 0) for i in range(12)))
    chosen = context.choose(poses, torch.tensor([9]), torch.tensor([7]), [1, 2, 4], 2)
    assert chosen.present.tolist() == [[True, True, False, False, False]] and chosen.numbers.min() >= 0
    latents = torch.randn(1, 12, 2, 3, 3)
    seen, where = context.pick(latents, chosen), context.geometry(poses, torch.tensor([9]), chosen)
    assert torch.equal(seen[0, :2], latents[0, [8, 7]]) and (seen[0, 2:] == 0).all()
    assert (where[0, 2:] == 0).all() and where[0, :2, -1].tolist() == [1, 1]
    assert where[0, :2, 0].tolist() == pytest.approx([-1 / 8, -2 / 8])
    assert where[0, :2, 4].tolist() == pytest.approx([0, math.log(2)])


def test_without_poses_the_newest_are_chosen():
    poses = torch.zeros(2, 20, 3)
    chosen = context.choose(poses, torch.tensor([15, 19]), torch.tensor([0, 12]), [1, 2], 2)
    assert chosen.numbers[0].tolist() == [14, 13, 12, 8]
    assert chosen.numbers[1].tolist() == [18, 17, 16, 12] and chosen.present.all()


def test_nothing_after_the_target_or_before_the_first_is_seen():
    rng = np.random.RandomState(2)
    poses = torch.from_numpy(rng.normal(size=(50, 40, 3)).astype(np.float32))
    targets = torch.from_numpy(rng.randint(1, 40, 50))
    firsts = torch.from_numpy(np.array([rng.randint(0, target + 1) for target in targets.tolist()]))
    chosen = context.choose(poses, targets, firsts, [1, 2, 4], 3)
    numbers = chosen.numbers.masked_fill(~chosen.present, -1)
    assert (numbers < targets[:, None]).all()
    assert ((numbers >= firsts[:, None]) | (numbers == -1)).all()
    expected = torch.stack([(firsts <= targets - offset) for offset in (1, 2, 4)], 1)
    assert torch.equal(chosen.present[:, :3], expected)
