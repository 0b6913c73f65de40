"""Read actions and poses of the windows of footage that are measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metrics.long_video_base import GroupStreams, ReadStreams
from metrics.samplers import Window
from training.data.footage import Footage

ACTIONS, POSES = "actions", "poses"


def open_stream(footage: Footage, name: str) -> Any:
    """Return a stream of footage: an object with `read(clip, start, count)` and perhaps a `vocabulary`.

    Raises `ValueError` if the footage has no such stream.
    """
    opened = getattr(footage, "streams", {})
    if name in opened:
        return opened[name]
    if not hasattr(footage, "open_stream"):
        raise ValueError(f"{footage.name} has no {name}, which are needed: measure a dataset that has {name}")
    return footage.open_stream(name)  # pyright: ignore[reportAttributeAccessIssue]


def names_of(footage: Footage, name: str, vocabularies: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the names of a stream's ints: those of a model if it has such, else those of footage, else none."""
    given = vocabularies.get(name)
    if given:
        return list(given)
    return list(getattr(open_stream(footage, name), "vocabulary", None) or [])


def poses_of(streams: GroupStreams) -> np.ndarray:
    """Return the poses of a group's frames: (N, T, 3). Raises `ValueError` for other poses than x, y and angle."""
    poses = streams.values[POSES]
    if poses.ndim != 3 or poses.shape[2] != 3:
        raise ValueError(
            f"poses of {poses.shape[2] if poses.ndim == 3 else 1} values were found, but a pose is x, y and an angle "
            "in degrees: measure a dataset with such poses, as make_dataset_from_vizdoom makes"
        )
    return poses


def reader(
    footage: Footage,
    names: Sequence[str],
    windows: Sequence[Window],
    num_frames: int,
    vocabularies: Mapping[str, Sequence[str]],
) -> ReadStreams:
    """Return the function that reads streams of the windows of items, each of `num_frames` frames.

    Raises `ValueError` if the footage lacks one of the streams.
    """
    stores = {name: open_stream(footage, name) for name in names}
    known = {name: names_of(footage, name, vocabularies) for name in names}

    def read(items: Sequence[int]) -> GroupStreams:
        places = [windows[item] for item in items]
        values = {
            name: np.stack([store.read(place.clip, place.start, num_frames) for place in places])
            for name, store in stores.items()
        }
        return GroupStreams(items, values, known)

    return read
