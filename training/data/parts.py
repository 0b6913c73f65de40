"""What a path holds, and whether the parts of a dataset are of the same clips."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from dnnlib.text import one_line
from training.data.grids import GridStore
from training.data.layouts.base import LayoutStore
from training.data.layouts.find import find_layout
from training.data.shards import FrameStore, Size, size_name

SIZE_FOLDER = re.compile(r"(\d{4,})x(\d{4,})")
Store = FrameStore | LayoutStore | GridStore


def has_own_layout(root: Path) -> bool:
    """Return whether a folder holds frames as datasets of this project do, in a folder for each size."""
    return root.is_dir() and any(SIZE_FOLDER.fullmatch(path.name) and path.is_dir() for path in root.iterdir())


def first_size(root: Path) -> Size:
    """Return the smallest frame size of a dataset of this project."""
    matches = [match for path in root.iterdir() if (match := SIZE_FOLDER.fullmatch(path.name)) and path.is_dir()]
    return min((int(match[1]), int(match[2])) for match in matches)


def has_size(root: str | os.PathLike[str], size: Size) -> bool:
    """Return whether frames of a size can be read: from a folder of that size, or from another layout at any size."""
    root = Path(root)
    return (root / size_name(size)).is_dir() if has_own_layout(root) else find_layout(root) is not None


def check_same_clips(root: Path, first: Store, other: Store) -> None:
    """Raise ValueError naming the first difference, unless both have the same frames of the same clips."""
    names = first.directory.name, other.directory.name
    are_frames = isinstance(first, FrameStore) and isinstance(other, FrameStore)
    here, there = (
        {
            clip.path: (clip.num_frames, digest)
            for clip, digest in zip(store.clips, _digests(store, are_frames), strict=True)
        }
        for store in (first, other)
    )
    if here == there:
        return
    differing = min(clip for clip in here.keys() | there.keys() if here.get(clip) != there.get(clip))
    clip = one_line(differing)
    if differing not in there or differing not in here:
        present, absent = names if differing in here else names[::-1]
        difference = f"clip {clip} is in {present} but not in {absent}"
    elif here[differing][0] != there[differing][0]:
        counts = here[differing][0], there[differing][0]
        difference = f"clip {clip} has {counts[0]} frames in {names[0]} but {counts[1]} in {names[1]}"
    else:
        difference = f"the frames of clip {clip} have other names in {names[0]} than in {names[1]}"
    if isinstance(first, FrameStore) and isinstance(other, FrameStore):
        raise ValueError(
            f"the sizes of {root} do not show the same clips: {difference}; make all sizes in one run: --sizes "
            f"{first.size[0]}x{first.size[1]},{other.size[0]}x{other.size[1]}"
        )
    kinds = [store.kind for store in (other, first) if isinstance(store, GridStore)]
    beside = first.kind.noun if isinstance(first, GridStore) else "frames"
    raise ValueError(
        f"the {kinds[0].noun} of {root} are not of the same clips as its {beside}: {difference}; make the "
        f"{kinds[0].noun} that lack: " + kinds[0].command(root)
    )


def _digests(store: Store, are_compared: bool) -> Iterable[bytes]:
    """Return for each clip a digest of its frame names, empty if these are not compared."""
    if are_compared and isinstance(store, FrameStore):
        return (digest.tobytes() for digest in store.digests)
    return [b""] * len(store.clips)
