"""Walks keep their distance from walls, never stop, turn smoothly, and match their actions."""

import numpy as np
import pytest

from dataset_tools.labdoom_maze import DIFFICULTIES, TILE, build_maze
from dataset_tools.labdoom_walker import CLEARANCE, plan_walk


def walks(discrete, count=25, num_frames=300):
    for seed in range(count):
        random = np.random.RandomState(seed)
        maze = build_maze(random, "train")
        warmup, walk = plan_walk(maze, random, num_frames, 30, discrete)
        yield maze, warmup, walk


@pytest.mark.parametrize("discrete", [False, True])
def test_the_camera_keeps_its_distance_and_always_moves(discrete):
    places = []
    for maze, warmup, walk in walks(discrete):
        poses = np.concatenate([warmup, walk.poses])
        assert poses.shape == (330, 3) and len(walk.actions) == 300
        assert maze.wall_distance(poses[:, 0], poses[:, 1]).min() >= CLEARANCE
        advance = np.hypot(*np.diff(walk.poses[:, :2], axis=0).T)
        turn = np.abs(np.diff(walk.poses[:, 2]))
        assert (advance + turn > 0.5).all()  # no two frames are the same view
        assert advance.sum() > 3 * TILE and advance.max() <= 10
        places.append(len(set(map(tuple, (walk.poses[:, :2] // TILE).tolist()))))
    assert np.mean(places) > 8


@pytest.mark.parametrize("name", ["easy", "hard"])
def test_other_difficulties_walk_as_fast_and_turn_as_sharply_as_they_say(name):
    difficulty, fastest, sharpest = DIFFICULTIES[name], 0.0, 0.0
    for seed in range(8):
        random = np.random.RandomState(seed)
        maze = build_maze(random, "train", difficulty)
        _, walk = plan_walk(maze, random, 300, 30, difficulty=difficulty)
        assert maze.wall_distance(walk.poses[:, 0], walk.poses[:, 1]).min() >= CLEARANCE
        advance = np.hypot(*np.diff(walk.poses[:, :2], axis=0).T)
        turn = np.diff(walk.poses[:, 2])
        assert (advance + np.abs(turn) > 0.4).all()
        assert np.abs(np.diff(turn)).max() <= difficulty.turn_change + 1e-9
        fastest, sharpest = max(fastest, advance.max()), max(sharpest, np.abs(turn).max())
    assert 0.98 * difficulty.speeds[1] < fastest <= difficulty.speeds[1] + 1e-9
    assert 0.9 * difficulty.max_turn < sharpest <= difficulty.max_turn + 1e-9


def test_smooth_walks_change_speed_and_direction_little_by_little():
    for _, _, walk in walks(discrete=False):
        turn = np.diff(walk.poses[:, 2])
        assert np.abs(turn).max() <= 5 + 1e-9 and np.abs(np.diff(turn)).max() <= 0.8 + 1e-9
        speed = np.hypot(*np.diff(walk.poses[:, :2], axis=0).T)
        assert np.diff(speed).max() <= 0.5 + 1e-9 and np.diff(speed).min() >= -2 - 1e-9


def test_actions_of_a_smooth_walk_integrate_to_its_poses():
    for _, _, walk in walks(discrete=False, count=5):
        assert walk.actions[0] == "none"
        x, y, angle = walk.poses[0]
        for action, pose in zip(walk.actions[1:], walk.poses[1:], strict=True):
            angle += action["turn"]
            x += action["forward"] * np.cos(np.radians(angle))
            y += action["forward"] * np.sin(np.radians(angle))
            assert np.abs(pose - (x, y, angle)).max() < 0.05  # actions are rounded to four digits


def test_discrete_walks_consist_of_three_actions():
    seen = set()
    for _, _, walk in walks(discrete=True, count=5):
        assert walk.actions[0] == "none"
        for action, before, after in zip(walk.actions[1:], walk.poses, walk.poses[1:], strict=False):
            seen.add(action)
            distance, turn = np.hypot(*(after - before)[:2]), after[2] - before[2]
            expected = {"forward": (8, 0), "left": (0, 10), "right": (0, -10)}[action]
            assert (distance, turn) == pytest.approx(expected, abs=1e-6)
    assert seen == {"forward", "left", "right"}
