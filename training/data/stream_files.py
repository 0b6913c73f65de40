"""Find and read the files of streams beside a video: `clip.mp4` with `clip.actions.json`, or with `clip.npz` as TECO.

A stream has one value a frame; entry t leads into frame t. Recordings often have one value less, since nothing leads
into the first frame: it then gets "none".
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from dnnlib.zips import FAULTS
from training.data.arrays import open_npz
from training.data.stream_values import STREAM_SUFFIXES, BadValue, Values, read_values_file, values_of_array

_FRAME_ARRAYS = ("video", "videos", "frames")


def find_stream_files(folder: Path, names: Iterable[str], videos: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the files of streams by video and stream, given the names of all files of a folder, and of its videos.

    `clip.actions.json`, .npy, .npz, .csv or .txt belongs to the video `clip.mp4`. So does `clip.npz` if it has actions
    and no frames: its arrays are streams, and it is given under the name "".
    """
    stems: dict[str, list[str]] = {}
    for video in videos:
        stems.setdefault(Path(video).stem, []).append(video)
    found: dict[str, dict[str, str]] = {}
    for name in sorted(names):
        path = Path(name)
        match = re.fullmatch(r"(?P<stem>.+)\.(?P<stream>\w+)", path.stem)
        if path.suffix not in STREAM_SUFFIXES:
            continue
        others = [video for video in stems.get(path.stem, ()) if video != name]
        if match is not None and match["stem"] in stems:
            for video in stems[match["stem"]]:
                found.setdefault(video, {})[match["stream"]] = name
        elif path.suffix == ".npz" and others and _is_streams(folder / name):
            for video in others:
                found.setdefault(video, {})[""] = name
    return found


def _is_streams(path: Path) -> bool:
    """Return whether an npz file holds actions and no frames."""
    try:
        with open_npz(path) as arrays:
            return "actions" in arrays and not set(_FRAME_ARRAYS) & set(arrays)
    except FAULTS:  # reading it as footage will tell
        return False


def npz_streams(path: Path) -> list[str]:
    """Return the names of the arrays of an npz file that are no frames; raise `ValueError` if it is damaged."""
    try:
        with open_npz(path) as arrays:
            return sorted(name for name in arrays if name not in _FRAME_ARRAYS and re.fullmatch(r"\w+", name))
    except FAULTS as error:
        raise ValueError(f"{path} cannot be read as an npz file ({error}); copy or make it again") from error


def read_npz_stream(path: Path, name: str) -> Values:
    """Return the values of the array of that name; raise `ValueError` if they cannot be read."""
    try:
        with open_npz(path) as arrays:
            if name not in arrays:
                raise ValueError(f"it has the arrays {', '.join(arrays) or 'none'}, none of them named {name}")
            return values_of_array(arrays[name]())
    except BadValue as error:
        raise ValueError(f"{path} has in {name} at entry {error.position} {error}; correct it") from error
    except FAULTS as error:
        raise ValueError(f"{path} cannot be read as {name} ({error}); copy or make it again") from error


def read_streams(files: Mapping[str, Path], names: Iterable[str] | None = None) -> dict[str, Values]:
    """Return the values of the streams that belong to one video, of all of them or of the given names."""
    found = {}
    for stream, path in files.items():
        if stream == "":
            found |= {name: read_npz_stream(path, name) for name in npz_streams(path) if names is None or name in names}
        elif names is None or stream in names:
            found[stream] = read_values_file(path, stream)
    return found


def fit_length(values: Values, num_frames: int, is_after: bool = False) -> Values:
    """Return values so that entry t leads into frame t, if there is one a frame or one less.

    With `is_after`, entry t was recorded at frame t and leads out of it: values move by one, and what follows the last
    frame is left out. Other numbers of values are returned as they are, to be refused.
    """
    if len(values.array) not in (num_frames, num_frames - 1) or not num_frames:
        return values
    if len(values.array) == num_frames and not is_after:
        return values
    array, names = values.array[: num_frames - 1], values.names
    if names is not None:
        names = list(names) if "none" in names else [*names, "none"]
        first = np.array([names.index("none")], np.int64)
    else:
        first = np.zeros((1, *array.shape[1:]), array.dtype)
    return Values(np.concatenate([first, array]), names)


def to_list(values: Values) -> list:
    """Return values as JSON has them: names, whole numbers, or lists of numbers."""
    if values.names is not None:
        return [values.names[index] for index in values.array.tolist()]
    return values.array.tolist()
