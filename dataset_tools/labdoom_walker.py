"""Plan smooth walks through a maze along shortest paths to random destinations, with a look-ahead controller."""

import collections
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataset_tools.labdoom_maze import DIFFICULTIES, TILE, Difficulty, Maze

DISCRETE_ACTIONS = ("none", "forward", "left", "right")  # in the order of their numbers
CLEARANCE = 28.0  # minimum distance in map units between the camera and any wall

_STEP = 8.0  # map units between the points of a path
_LOOK_AHEAD = 80.0  # distance in map units of the point on the path that the walker turns towards
_ACCELERATION, _BRAKING = 0.5, 2.0  # maximum change of speed per frame
_DISCRETE_SPEED = 8.0
_DISCRETE_TURN_DEG = 10.0


@dataclass(frozen=True)
class Walk:
    """A planned walk: float64 poses (frames, 3) of x and y in map units and the angle, and the action of each frame.

    The angle is in degrees, counterclockwise from the x axis. A smooth action {"forward": f, "turn": a} turns by a
    degrees, then advances by f along the new direction; the discrete ones are "forward", "left" and "right". The action
    of a frame leads into it; the first one is "none".
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
    """Return the poses (num_warmup, 3) of the acceleration from standstill, and the walk that continues them.

    Walks that come near a wall, where a camera sees little, are rejected and drawn again.
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
        # The target stays ahead of the walker, so corners are rounded and the walker never stops.
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
    """Yield points x, y every 8 units along shortest paths between random destinations, each with a target speed.

    The speed is one of the two, drawn for each destination.
    """
    open_tiles = np.argwhere(maze.open_tiles)
    tile, heading = maze.start, (0, 0)
    yield _centre(tile) + (speeds[0],)
    while True:
        goal = tuple(open_tiles[random.randint(len(open_tiles))].tolist())
        speed = speeds[random.randint(len(speeds))]
        distance = _distances(maze.open_tiles, goal)
        while tile != goal:
            # Straight on where the shortest path allows it, so that rooms are not crossed in zigzags.
            steps = [step for step in _steps(maze.open_tiles, tile) if distance[_add(tile, step)] < distance[tile]]
            heading = heading if heading in steps else steps[random.randint(len(steps))]
            here, tile = _centre(tile), _add(tile, heading)
            there = _centre(tile)
            for share in np.arange(1, TILE // _STEP + 1) * _STEP / TILE:
                yield here[0] + share * (there[0] - here[0]), here[1] + share * (there[1] - here[1]), speed


def _distances(open_tiles: np.ndarray, goal: tuple[int, int]) -> np.ndarray:
    """Return the number of steps to `goal` from each tile, by breadth-first search: int (rows, columns), -1 if
    unreachable.
    """
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


def neighbours(open_tiles: np.ndarray, tile: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the open tiles beside one."""
    return [_add(tile, step) for step in _steps(open_tiles, tile)]


def _steps(open_tiles: np.ndarray, tile: tuple[int, int]) -> list[tuple[int, int]]:
    return [step for step in ((0, 1), (1, 0), (0, -1), (-1, 0)) if open_tiles[_add(tile, step)]]


def _add(tile: tuple[int, int], step: tuple[int, int]) -> tuple[int, int]:
    return tile[0] + step[0], tile[1] + step[1]


def _centre(tile: tuple[int, int]) -> tuple[float, float]:
    return (tile[1] + 0.5) * TILE, (tile[0] + 0.5) * TILE
