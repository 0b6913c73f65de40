"""Plan walks through a maze, like a rider's: shortest paths to random places, looking ahead, turning smoothly."""

import collections
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataset_tools.labdoom_maze import DIFFICULTIES, TILE, Difficulty, Maze

DISCRETE_ACTIONS = ("none", "forward", "left", "right")  # in the order of their numbers
CLEARANCE = 28.0  # map units that a walk keeps between the camera and any wall

_STEP = 8.0  # map units between the points of a path
_LOOK_AHEAD = 80.0  # map units ahead of the walker at which it aims
_ACCELERATION, _BRAKING = 0.5, 2.0  # change of speed from frame to frame, at most
_DISCRETE_SPEED = 8.0
_DISCRETE_TURN_DEG = 10.0


@dataclass(frozen=True)
class Walk:
    """A planned walk: float64 poses (frames, 3) of x and y in map units and the angle in degrees, counterclockwise
    from the x axis, and for each frame the action that led into it.

    A smooth action {"forward": f, "turn": a} turns by a degrees, then advances by f along the new direction; the
    discrete ones are "forward", "left" and "right". The first action is "none".
    """

    poses: np.ndarray
    actions: list[Any]


def plan_walk(
    maze: Maze,
    random: np.random.RandomState,
    num_frames: int,
    num_warmup: int,
    discrete: bool = False,
    difficulty: Difficulty = DIFFICULTIES["normal"],
) -> tuple[np.ndarray, Walk]:
    """The poses (num_warmup, 3) that lead from a standstill to a walk in full swing, and that walk.

    Few walks come near a wall, where a camera sees little; those are drawn again.
    """
    while True:
        poses, actions = _draw_walk(maze, random, num_warmup + num_frames, discrete, difficulty)
        if maze.wall_distance(poses[:, 0], poses[:, 1]).min() >= CLEARANCE:
            return poses[:num_warmup], Walk(poses[num_warmup:], ["none", *actions[num_warmup + 1 :]])


def _draw_walk(
    maze: Maze, random: np.random.RandomState, num_frames: int, discrete: bool, difficulty: Difficulty
) -> tuple[np.ndarray, list[Any]]:
    points = _wander(maze, random, difficulty.speeds)
    target = next(points)
    x, y = target[:2]
    angle, speed, turn = 0.0, 0.0, 0.0
    poses = [(x, y, angle)]
    actions: list[Any] = ["none"]
    while len(poses) < num_frames:
        # The walker follows a point that keeps its distance, so corners are rounded and no place is ever waited at.
        while np.hypot(target[0] - x, target[1] - y) < _LOOK_AHEAD:
            target = next(points)
        error = (np.degrees(np.arctan2(target[1] - y, target[0] - x)) - angle + 180) % 360 - 180
        if discrete:
            aside = abs(error) > _DISCRETE_TURN_DEG
            turn = float(np.copysign(_DISCRETE_TURN_DEG, error)) if aside else 0.0
            speed = 0.0 if aside else _DISCRETE_SPEED
            action = ("left" if turn > 0 else "right") if aside else "forward"
        else:
            wanted = np.clip(0.2 * error, -difficulty.max_turn, difficulty.max_turn)
            turn += float(np.clip(wanted - turn, -difficulty.turn_change, difficulty.turn_change))
            slow = max(0.1, float(np.cos(np.radians(min(1.2 * abs(error), 90)))))
            speed += float(np.clip(target[2] * slow - speed, -_BRAKING, _ACCELERATION))
            action = {"forward": round(speed, 4), "turn": round(turn, 4)}
        angle += turn
        x += speed * np.cos(np.radians(angle))
        y += speed * np.sin(np.radians(angle))
        poses.append((x, y, angle))
        actions.append(action)
    return np.array(poses), actions


def _wander(
    maze: Maze, random: np.random.RandomState, speeds: tuple[float, float]
) -> Iterator[tuple[float, float, float]]:
    """Points x, y every 8 units along shortest paths from place to place, each with the speed to walk at.

    The speed is one of the two, drawn anew for each destination.
    """
    open_tiles = np.argwhere(maze.open_tiles)
    tile, heading = maze.start, (0, 0)
    yield _centre(tile) + (speeds[0],)
    while True:
        goal = tuple(open_tiles[random.randint(len(open_tiles))].tolist())
        speed = speeds[random.randint(len(speeds))]
        distance = _distances(maze.open_tiles, goal)
        while tile != goal:
            # Straight on where the shortest path allows it, so that rooms are not crossed in zigzag.
            steps = [step for step in _steps(maze.open_tiles, tile) if distance[_add(tile, step)] < distance[tile]]
            heading = heading if heading in steps else steps[random.randint(len(steps))]
            here, tile = _centre(tile), _add(tile, heading)
            there = _centre(tile)
            for share in np.arange(1, TILE // _STEP + 1) * _STEP / TILE:
                yield here[0] + share * (there[0] - here[0]), here[1] + share * (there[1] - here[1]), speed


def _distances(open_tiles: np.ndarray, goal: tuple[int, int]) -> np.ndarray:
    """Steps to `goal` from each tile, by breadth-first search: int (rows, columns), -1 where there is no way."""
    distance = np.full(open_tiles.shape, -1)
    distance[goal] = 0
    queue = collections.deque([goal])
    while queue:
        tile = queue.popleft()
        for step in _steps(open_tiles, tile):
            if distance[_add(tile, step)] < 0:
                distance[_add(tile, step)] = distance[tile] + 1
                queue.append(_add(tile, step))
    return distance


def _steps(open_tiles: np.ndarray, tile: tuple[int, int]) -> list[tuple[int, int]]:
    return [step for step in ((0, 1), (1, 0), (0, -1), (-1, 0)) if open_tiles[_add(tile, step)]]


def _add(tile: tuple[int, int], step: tuple[int, int]) -> tuple[int, int]:
    return tile[0] + step[0], tile[1] + step[1]


def _centre(tile: tuple[int, int]) -> tuple[float, float]:
    return (tile[1] + 0.5) * TILE, (tile[0] + 0.5) * TILE
