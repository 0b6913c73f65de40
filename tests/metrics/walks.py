"""A world for tests of memory and control: a panorama in which each turn moves the view by a few columns.

Its recorded walks have actions and poses; its samplers follow actions exactly, ignore them, or stand still.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metrics import inputs
from training.random import random_state
from training.sampling import Needs, Request, Sampler

NAMES = ["none", "forward", "back", "left", "right", "forward_left", "forward_right", "back_left", "back_right"]
SIZE = (12, 16)
TURN_DEG, COLUMNS = 6, 2  # columns that a turn moves the view by
CIRCLE = 360 // TURN_DEG * COLUMNS
PAST = 2


def headings(actions: np.ndarray, first: int = 0) -> np.ndarray:
    """Return the number of turns to the left at each frame: int (T,); the first action leads into frame 0."""
    turns = np.array([("left" in name) - ("right" in name) for name in NAMES])
    return first + np.cumsum(turns[actions])


def panorama(number: int) -> np.ndarray:
    """Return uint8 (H, CIRCLE, 3), which meets itself at its ends."""
    coarse = random_state("panorama", 0, number).randint(256, size=(6, CIRCLE // 4, 3), dtype=np.uint8)
    wide = np.concatenate([coarse] * 3, axis=1)
    large = np.asarray(Image.fromarray(wide).resize((3 * CIRCLE, SIZE[0]), Image.Resampling.BICUBIC))
    return large[:, CIRCLE : 2 * CIRCLE]


def views(number: int, turns: np.ndarray) -> np.ndarray:
    """Return the view at each heading: uint8 (T, H, W, 3). A turn to the left moves the picture to the right."""
    columns = (-COLUMNS * turns[:, None] + np.arange(SIZE[1])) % CIRCLE
    return panorama(number)[:, columns].transpose(1, 0, 2, 3)


class Values:
    """A stream of a list of arrays."""

    def __init__(self, values: Sequence[np.ndarray], vocabulary: Sequence[str] | None = None) -> None:
        self.values, self.vocabulary = list(values), vocabulary

    def read(self, clip: int, start: int, count: int) -> np.ndarray:
        assert 0 <= start and start + count <= len(self.values[clip])
        return self.values[clip][start : start + count]


class Walks(inputs.Arrays):
    """Walks that turn by `actions` (int (T,) each), each in a panorama of its own; steps do not move the view."""

    def __init__(self, actions: Sequence[np.ndarray], names: Sequence[str] = NAMES) -> None:
        turns = [headings(row) for row in actions]
        super().__init__([views(number, row) for number, row in enumerate(turns)], "walks")
        poses = [np.stack([0 * row, 0 * row, TURN_DEG * row], axis=1).astype(np.float32) for row in turns]
        self.streams = {"actions": Values(actions, list(names)), "poses": Values(poses)}


class Walker(Sampler):
    """Continues a walk by its actions: `way` "obey", "mirror" (turns to the wrong side), "still" or "drift".

    The latter turns left at every frame, whatever it is told.
    """

    outputs, random_access = {"video": SIZE}, False
    needs = Needs(past=PAST, size=SIZE, streams=("actions",))

    def __init__(self, footage: Walks, way: str = "obey") -> None:
        self.footage, self.way = footage, way
        self.given: list[np.ndarray] = []  # actions of each video
        self.made: list[np.ndarray] = []  # its frames

    def video(self, request: Request) -> Iterator[Tensor]:
        count = request.num_frames
        assert count is not None and request.starts == [0] * len(request.seeds)
        past = ((request.prompt.frames(-1, 1, SIZE) + 1) * 127.5).round().byte()[:, :, 0].permute(0, 2, 3, 1)
        actions = request.prompt.stream("actions", 0, count).numpy()
        self.given += list(actions)
        video = []
        for frame, row in zip(past.numpy(), actions, strict=True):
            number, heading = self._find(frame)
            if self.way == "still":
                row = np.zeros_like(row)
            if self.way == "drift":
                row = np.full_like(row, NAMES.index("left"))
            turns = headings(row)
            video.append(views(number, heading + (-turns if self.way == "mirror" else turns)))
        self.made += video
        yield from torch.from_numpy(np.stack(video)).split(5, dim=1)

    def _find(self, frame: np.ndarray) -> tuple[int, int]:
        """Return the panorama and the heading of a view."""
        for number in range(len(self.footage.clips)):
            found = [h for h in range(CIRCLE // COLUMNS) if np.array_equal(views(number, np.array([h]))[0], frame)]
            if found:
                return number, found[0]
        raise AssertionError("a prompt shows a view of its own walk")


def random_walks(num_walks: int, num_frames: int, most: int = len(NAMES)) -> list[np.ndarray]:
    """Return actions that last some frames each: int64 (T,)."""
    found = []
    for number in range(num_walks):
        random = random_state("walk", 0, number)
        row: list[int] = []
        while len(row) < num_frames:
            row += [int(random.randint(most))] * int(random.randint(2, 9))
        found.append(np.array(row[:num_frames], np.int64))
    return found


def sides(sampler_way: str, footage: Walks) -> tuple[Any, Any, Walker]:
    """Return the sides of real walks and of a sampler, and the sampler."""
    from metrics import metric_main

    real, sampler = inputs.Videos(footage, SIZE, "array"), Walker(footage, sampler_way)
    return real, metric_main.prompted(sampler, real, "walker.pkl"), sampler
