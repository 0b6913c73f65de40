"""The person with a keyboard: what the actions do, where walls stop them, how often it stands, bumps and comes back."""

import collections
import queue

import numpy as np
import pytest

from dataset_tools import archive, make_dataset_from_vizdoom
from dataset_tools.labdoom_maze import TILE, build_maze
from dataset_tools.labdoom_person import BACK, FORWARD, PERSON_ACTIONS, RADIUS, TURN_DEG, plan_person_walk
from tests.explorer.steered import shift_between
from training.data.dataset import ClipDataset
from training.data.streams import StreamStore


@pytest.fixture(scope="module")
def walks():
    """Return mazes and walks of 330 frames."""
    found = []
    for seed in range(24):
        random = np.random.RandomState(seed)
        maze = build_maze(random, "train")
        warmup, walk = plan_person_walk(maze, random, 300, 30)
        assert warmup.shape == (30, 3) and walk.poses.shape == (300, 3) and len(walk.actions) == 300
        found.append((maze, warmup, walk))
    return found


def steps(walk):
    """Yield action, distance and turn of each step, and its part along the direction of view."""
    for action, before, after in zip(walk.actions[1:], walk.poses, walk.poses[1:], strict=False):
        dx, dy = after[:2] - before[:2]
        ahead = dx * np.cos(np.radians(after[2])) + dy * np.sin(np.radians(after[2]))
        yield action, np.hypot(dx, dy), after[2] - before[2], ahead


def test_a_pose_follows_from_the_one_before_and_the_action_where_no_wall_is_near(walks):
    seen = collections.Counter()
    for maze, _, walk in walks:
        assert walk.actions[0] == "none"
        space = maze.wall_distance(walk.poses[:, 0], walk.poses[:, 1])
        assert space.min() >= RADIUS
        for index, (action, distance, turn, ahead) in enumerate(steps(walk)):
            words = action.split("_")
            assert turn == pytest.approx(TURN_DEG * (("left" in words) - ("right" in words)))
            wanted = FORWARD * ("forward" in words) - BACK * ("back" in words)
            assert distance <= abs(wanted) + 1e-6
            if space[index] > RADIUS + FORWARD:
                assert ahead == pytest.approx(wanted, abs=1e-6) and distance == pytest.approx(abs(wanted), abs=1e-6)
            seen[action] += 1
    assert set(seen) == set(PERSON_ACTIONS)
    assert min(seen.values()) > 10, seen


def test_it_stands_turns_on_the_spot_bumps_and_slides(walks):
    counts, num_steps = collections.Counter(), 0
    for _, _, walk in walks:
        for action, distance, _, _ in steps(walk):
            num_steps += 1
            counts["stands"] += action == "none"
            counts["turns"] += action in ("left", "right")
            counts["bumps"] += action.startswith(("forward", "back")) and distance < 0.5
            counts["slides"] += action.startswith("forward") and 0.5 <= distance < 0.9 * FORWARD
            counts["walks"] += distance > 0.9 * BACK
    shares = {name: count / num_steps for name, count in counts.items()}
    assert 0.02 < shares["stands"] < 0.15 and 0.2 < shares["turns"] < 0.6
    assert 0.005 < shares["bumps"] < 0.1 and 0.002 < shares["slides"] < 0.1 and shares["walks"] > 0.35


def test_it_comes_back_to_the_same_view_on_purpose(walks):
    shares, places = [], []
    for _, _, walk in walks:
        x, y, angle = walk.poses.T
        near = np.hypot(x[:, None] - x, y[:, None] - y) < TILE / 2
        same = near & (np.abs((angle[:, None] - angle + 180) % 360 - 180) < 20)
        has_left = [
            any(same[late, early] and not same[late, early:late].all() for early in range(late - 30))
            for late in range(300)
        ]
        shares.append(np.mean(has_left))
        places.append(len(set(map(tuple, (walk.poses[:, :2] // TILE).tolist()))))
    assert np.mean(shares) > 0.15 and np.mean(places) > 3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a rendered set of square frames."""
    root = tmp_path_factory.mktemp("person")
    plan = make_dataset_from_vizdoom.Plan(((64, 64),), 2, 150, "train", 5, "person", "easy", textures="soft")
    with pytest.MonkeyPatch.context() as context:
        context.chdir(root)  # the engine leaves a folder where it runs
        report = make_dataset_from_vizdoom.make_shard(root, plan, 0, queue.SimpleQueue())
    facts = {name: fact for name, fact in plan.facts().items() if fact is not None}
    archive.describe_dataset(root, [report], 1, ("vizdoom",), **facts)
    return ClipDataset(root, [(64, 64)])


def test_frames_poses_and_actions_belong_together(made):
    poses = StreamStore(made.path, "poses", made.clips)
    actions = StreamStore(made.path, "actions", made.clips)
    assert actions.vocabulary == list(PERSON_ACTIONS)
    shifts = {"left": [], "right": []}
    for clip in range(2):
        found = poses.read(clip, 0, 150).astype(float)
        names = [PERSON_ACTIONS[number] for number in actions.read(clip, 0, 150)]
        frames = made.read(clip, (64, 64), range(150))
        for index in range(1, 150):
            turn = (found[index, 2] - found[index - 1, 2] + 180) % 360 - 180
            words = names[index].split("_")
            assert turn == pytest.approx(TURN_DEG * (("left" in words) - ("right" in words)), abs=0.02)
            distance = np.hypot(*(found[index] - found[index - 1])[:2])
            limit = FORWARD * ("forward" in words) + BACK * ("back" in words)
            assert distance <= limit + 0.6, "the engine rounds"
            if names[index] == "none":
                assert np.abs(frames[index].astype(int) - frames[index - 1]).mean() < 2
            if names[index] in shifts:
                shifts[names[index]].append(shift_between(frames[index - 1], frames[index]))
    assert len(shifts["left"]) > 10 and len(shifts["right"]) > 10
    assert 2 <= np.median(shifts["left"]) <= 8, "a turn to the left moves the picture to the right"
    assert -8 <= np.median(shifts["right"]) <= -2
