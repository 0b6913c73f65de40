"""Plan walks through a maze as a person with a keyboard makes them.

The player heads for places, looks around, stands, backs off, runs into walls and slides along them, and comes back on
purpose: the way that it came, round a loop, or by turning away and back. Every step is one of nine actions of constant
speed, so that a pose follows from the pose before and the action wherever no wall is in the way.
"""

import collections
import itertools
from collections.abc import Iterator

import numpy as np

from dataset_tools.labdoom_maze import TILE, Maze
from dataset_tools.labdoom_walker import Walk, neighbours

PERSON_ACTIONS = (
    "none", "forward", "back", "left", "right", "forward_left", "forward_right", "back_left", "back_right",
)  # fmt: skip
FORWARD, BACK = 6.0, 4.0  # map units a frame
TURN_DEG = 4.0  # a frame
RADIUS = 20.0  # distance in map units that is kept from any wall; the engine's player has 16

_REACHED = 40.0  # distance in map units from a point of a way at which the next one is headed for
_TURN_FIRST_DEG = 42.0  # above this error the player turns on the spot, below it while walking
_BEHAVIOURS = {
    "go": 0.18, "return": 0.2, "loop": 0.08, "glance": 0.18, "look": 0.06, "bump": 0.14, "back": 0.12, "stand": 0.04,
}  # fmt: skip

Tile = tuple[int, int]


def plan_person_walk(
    maze: Maze, random: np.random.RandomState, num_frames: int, num_warmup: int
) -> tuple[np.ndarray, Walk]:
    """Return the poses (num_warmup, 3) of the first steps, and the walk that continues them."""
    player = _Player(maze, random)
    poses, actions = [player.pose], ["none"]
    for action in itertools.islice(player.decide(), num_warmup + num_frames - 1):
        player.move(action)
        poses.append(player.pose)
        actions.append(action)
    found = np.array(poses)
    return found[:num_warmup], Walk(found[num_warmup:], ["none", *actions[num_warmup + 1 :]])


class _Player:
    """A player at x, y in map units, who looks along `angle` in degrees, counterclockwise from the x axis."""

    def __init__(self, maze: Maze, random: np.random.RandomState) -> None:
        self.maze, self.random = maze, random
        row, column = maze.start
        self.x, self.y = (column + 0.5) * TILE, (row + 0.5) * TILE
        self.angle = TURN_DEG * random.randint(round(360 / TURN_DEG))
        self.visited: list[Tile] = [maze.start]  # tiles in order, each different from the one before

    @property
    def pose(self) -> tuple[float, float, float]:
        return self.x, self.y, self.angle

    @property
    def tile(self) -> Tile:
        return int(self.y // TILE), int(self.x // TILE)

    def move(self, action: str) -> None:
        """Turn, then step; a wall stops the part of the step that leads into it."""
        words = action.split("_")
        self.angle += TURN_DEG * (("left" in words) - ("right" in words))
        step = FORWARD * ("forward" in words) - BACK * ("back" in words)
        dx, dy = step * np.cos(np.radians(self.angle)), step * np.sin(np.radians(self.angle))
        self.x = self._slide(dx, 0.0)[0]
        self.y = self._slide(0.0, dy)[1]
        if self.tile != self.visited[-1]:
            self.visited.append(self.tile)

    def _slide(self, dx: float, dy: float) -> tuple[float, float]:
        """Return the place after a step along one axis, which ends `RADIUS` before a wall."""
        x, y = self.x + dx, self.y + dy
        for _ in range(8):
            missing = RADIUS - float(self.maze.wall_distance(np.array(x), np.array(y)))
            if missing <= 0:
                return x, y
            # Towards a face of a wall this is exact, towards a corner it takes a few rounds.
            back = min(missing + 1e-6, np.hypot(x - self.x, y - self.y))
            x, y = x - np.sign(dx) * back, y - np.sign(dy) * back
        return self.x, self.y

    def decide(self) -> Iterator[str]:
        """Yield actions without end."""
        names, weights = list(_BEHAVIOURS), list(_BEHAVIOURS.values())
        while True:
            yield from getattr(self, f"_{names[self.random.choice(len(names), p=weights)]}")()

    # Ways.

    def _go(self) -> Iterator[str]:
        """Head for a place some tiles away."""
        yield from self._follow(self._way(self._somewhere(5)))

    def _return(self) -> Iterator[str]:
        """Go somewhere near and come back the way that was taken, to look as before."""
        home, angle = self.tile, self.angle
        yield from self._follow(self._way(self._somewhere(3)))
        if self.random.uniform() < 0.5:
            yield from self._stand()
        yield from self._follow(self._way(home))
        yield from self._turn(angle)

    def _loop(self) -> Iterator[str]:
        """Go somewhere and come back by other tiles where there are any, in the direction of before at the end."""
        home, angle, first = self.tile, self.angle, len(self.visited)
        yield from self._follow(self._way(self._somewhere(5)))
        taken = set(self.visited[first:-1]) - {home}
        yield from self._follow(self._way(home, taken) or self._way(home))
        yield from self._turn(angle)

    def _follow(self, way: list[Tile]) -> Iterator[str]:
        """Walk along tiles, now and then not quite straight."""
        for row, column in way:
            aside = self.random.uniform(-0.16, 0.16, size=2) * TILE
            x, y = (column + 0.5) * TILE + aside[0], (row + 0.5) * TILE + aside[1]
            for _ in range(4 * TILE):  # it would give up where walls keep it from a place
                if np.hypot(x - self.x, y - self.y) < _REACHED:
                    break
                error = _difference(float(np.degrees(np.arctan2(y - self.y, x - self.x))), self.angle)
                side = "left" if error > 0 else "right"
                if abs(error) > _TURN_FIRST_DEG:
                    yield side
                else:
                    yield f"forward_{side}" if abs(error) > TURN_DEG / 2 else "forward"

    def _somewhere(self, most: int) -> Tile:
        """Return a tile one to so many steps away."""
        found = [tile for tile, steps in self._reach(set()).items() if 1 <= len(steps) <= most]
        return found[self.random.randint(len(found))] if found else self.tile

    def _way(self, goal: Tile, closed: set[Tile] = frozenset()) -> list[Tile]:  # type: ignore[assignment]
        """Return the tiles of a shortest way after the one at hand, that avoids closed ones; empty if there is none."""
        return self._reach(closed).get(goal, [])

    def _reach(self, closed: set[Tile]) -> dict[Tile, list[Tile]]:
        """Return tile -> tiles of a shortest way to it."""
        found: dict[Tile, list[Tile]] = {self.tile: []}
        queue = collections.deque([self.tile])
        while queue:
            tile = queue.popleft()
            around = neighbours(self.maze.open_tiles, tile)
            for number in self.random.permutation(len(around)):
                if around[number] not in found and around[number] not in closed:
                    found[around[number]] = [*found[tile], around[number]]
                    queue.append(around[number])
        return found

    # On the spot.

    def _turn(self, angle: float) -> Iterator[str]:
        """Turn to an angle."""
        while abs(error := _difference(angle, self.angle)) > TURN_DEG / 2:
            yield "left" if error > 0 else "right"

    def _glance(self) -> Iterator[str]:
        """Turn away, wait, and turn back to the same view."""
        sides = ["left", "right"] if self.random.uniform() < 0.5 else ["right", "left"]
        count = self.random.randint(6, 46)
        for number, side in enumerate(sides):
            yield from [side] * count
            yield from ["none"] * (self.random.randint(8) if number == 0 else 0)

    def _look(self) -> Iterator[str]:
        """Look around, once or nearly."""
        side = ("left", "right")[self.random.randint(2)]
        yield from [side] * self.random.randint(30, round(360 / TURN_DEG) + 1)

    def _stand(self) -> Iterator[str]:
        """Do nothing for a while."""
        yield from ["none"] * self.random.randint(4, 21)

    def _back(self) -> Iterator[str]:
        """Walk backwards, perhaps in a curve."""
        action = ("back", "back", "back_left", "back_right")[self.random.randint(4)]
        yield from [action] * self.random.randint(10, 46)

    def _bump(self) -> Iterator[str]:
        """Run into a wall, keep running for a moment, and turn or back off."""
        yield from self._turn(TURN_DEG * self.random.randint(round(360 / TURN_DEG)))
        for _ in range(60):
            before = self.x, self.y
            yield "forward"
            if np.hypot(self.x - before[0], self.y - before[1]) < FORWARD / 2:
                break
        yield from ["forward"] * self.random.randint(3, 16)
        if self.random.uniform() < 0.5:
            yield from ["back"] * self.random.randint(6, 21)
        else:
            yield from self._look()


def _difference(angle: float, other: float) -> float:
    """Return how far to turn to the left from another angle, in (-180, 180]."""
    return -((other - angle + 180) % 360 - 180)
