"""Find the published layout of what lies at a path.

layout = find_layout("data/bair/train")                    # HDF5 shards of RIVER
layout = find_layout("data/taichi.h5/test")                # a split of an indexed file of TATS or MeBT
layout = find_layout("data/sky/test.txt")                  # a list of frames of MeBT
layout = find_layout("data/dmlab/train")                   # npz files of TECO, or any folder of videos or images
layout = find_layout("data/dmlab")                         # its split train
"""

import contextlib
import functools
import hashlib
import os
from pathlib import Path

from training.data.clip_files import NoFootage
from training.data.layouts.base import Layout
from training.data.layouts.folder import Folder
from training.data.layouts.frame_list import FrameList
from training.data.layouts.hdf5 import hdf5_files, is_hdf5, open_hdf5_layout
from training.data.listing import list_footage
from training.data.stream_files import npz_streams

_TRAIN, _OTHERS = "train", ("test", "val")


def find_layout(path: Path) -> Layout | None:
    """Return the layout at a path, None if there is no footage; raise `ValueError` if it cannot be read.

    A folder that is divided into splits stands for its split "train".
    """
    place = _place(path)
    try:
        return None if place is None else _open(*place)
    except NoFootage:
        return None


def find_special(path: Path) -> Layout | None:
    """Return as `find_layout` does a layout that is more than the files of a folder, else None.

    That is one of HDF5 files, lists of frames, splits, or videos with streams.
    """
    place = _place(path)
    if place is None:
        return None
    kind, found, _, _ = place
    if kind != "folder" or found != path or _has_actions(path):
        return find_layout(path)
    return None


def _has_actions(folder: Path) -> bool:
    """Return whether videos of a folder have actions, by the first npz file and the files beside all videos."""
    listing = list_footage(folder)
    if listing.streams:
        return True
    try:
        return bool(listing.arrays) and "actions" in npz_streams(listing.arrays[0])
    except ValueError:
        return False  # reading the folder raises what is wrong with it


def _place(path: Path) -> tuple[str, Path, str | None, str] | None:
    """Return kind, path and split of the layout at a path, and a stamp that changes with it."""
    split = None
    if not path.exists():
        # A split of a file or of a folder of lists.
        parent, split = path.parent, path.name
        if parent.is_file() and is_hdf5(parent):
            return "hdf5", parent, split, _stamp(parent)
        beside = parent / f"{split}.txt"
        return ("list", beside, None, _stamp(beside)) if beside.is_file() else None
    if path.is_file():
        if is_hdf5(path):
            return "hdf5", path, None, _stamp(path)
        return ("list", path, None, _stamp(path)) if path.suffix == ".txt" else None
    if not path.is_dir():
        return None
    train = path / _TRAIN
    if train.is_dir() and (hdf5_files(train) or any((path / other).is_dir() for other in _OTHERS)):
        return _place(train)
    if (path / f"{_TRAIN}.txt").is_file() and any((path / f"{other}.txt").is_file() for other in _OTHERS):
        return "list", path / f"{_TRAIN}.txt", None, _stamp(path / f"{_TRAIN}.txt")
    return ("hdf5" if hdf5_files(path) else "folder"), path, None, _stamp(path)


def _stamp(path: Path) -> str:
    """Return what changes with the names, sizes and times of the files at or below a path."""
    digest = hashlib.blake2b(digest_size=16)
    folders = os.walk(path) if path.is_dir() else [(str(path.parent), [], [path.name])]
    for folder, _, names in folders:
        for name in sorted(names):
            with contextlib.suppress(OSError):  # a broken link, or a file that is just being removed
                status = os.stat(os.path.join(folder, name))
                digest.update(f"{folder}/{name} {status.st_size} {status.st_mtime_ns}\n".encode(errors="replace"))
    return digest.hexdigest()


@functools.lru_cache(maxsize=8)
def _open(kind: str, path: Path, split: str | None, _stamp: str) -> Layout:
    if kind == "hdf5":
        return open_hdf5_layout(path, split)
    return FrameList(path) if kind == "list" else Folder(path)
