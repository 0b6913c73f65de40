"""Read video clips from sharded zips of JPEG frames and deal them out in batches that depend on nothing but a seed.

Layout: `<root>/<HHHHxWWWW>/<shard>.zip`, each zip holding `<clip>/<frame>.jpg` and `frame_paths.json`, an object that
maps each clip to its frame names in order. `<root>/dataset.json` may say how many frames a second there are.
"""

import collections
import concurrent.futures
import functools
import hashlib
import importlib
import io
import itertools
import json
import os
import re
import struct
import threading
import weakref
import zipfile
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from torch_utils import distributed
from training.random import random_state

ASSUMED_FPS = 30.0  # published datasets do not store a frame rate; this is theirs
_BATCHES_AHEAD = 2

# Head of a zip member: signature, then after 22 bytes that the central directory repeats, the lengths of the name and
# of the extra field, which may differ from the central ones, so that the data's place is known only from here.
_MEMBER_HEAD = struct.Struct("<4s22xHH")
_MEMBER_HEAD_ALLOWANCE = 512

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Clip:
    """One clip of a dataset: its path inside the dataset and its number of frames."""

    path: str
    num_frames: int


@dataclass(frozen=True)
class ClipPart:
    """Frames [first_frame, first_frame + num_frames) of a window, wanted at one size under one name."""

    name: str
    height: int
    width: int
    first_frame: int
    num_frames: int


@dataclass(frozen=True)
class BatchSpec:
    """Windows of `num_frames` consecutive frames, of which only the named parts are decoded."""

    num_frames: int
    parts: tuple[ClipPart, ...]

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        assert len(set(names)) == len(names), f"parts share a name: {names}"
        for part in self.parts:
            inside = part.first_frame >= 0 and part.first_frame + part.num_frames <= self.num_frames
            assert inside, f"{part} reaches out of a window of {self.num_frames} frames"


def size_name(size: Size) -> str:
    """The folder that holds frames of one size: "0036x0064" for height 36, width 64."""
    return f"{size[0]:04d}x{size[1]:04d}"


# ----------------------------------------------------------------------------
# Frames of one size.


class _FrameStore:
    """All frames of one size: where each lies in which zip, and how to read it.

    Members are read with `os.pread` at offsets known beforehand, which moves no file position and needs no lock, so
    threads and forked processes may share a store; a pickled copy opens the files anew.
    """

    def __init__(self, root: Path, size: Size) -> None:
        self.size = size
        self.directory = root / size_name(size)
        if not self.directory.is_dir():
            raise ValueError(_missing_size_message(root, size))
        self.remedy = f"make it again: python -m dataset_tools.make_dataset_from_videos VIDEOS {root} --sizes " + (
            f"{size[0]}x{size[1]}"
        )
        self.shards = sorted(path for path in self.directory.glob("*.zip") if not path.name.startswith("."))
        if not self.shards:
            raise ValueError(f"{self.directory} holds no .zip file; {self.remedy}")
        self.clips: list[Clip] = []
        self.digests: dict[str, bytes] = {}  # clip path -> digest of its frame names
        self._clip_shard: list[int] = []
        rows = [np.zeros((0, 3), np.int64)]
        for shard, path in enumerate(self.shards):
            for clip, names, members in _index_shard(path):
                if clip in self.digests:
                    other = self.shards[self._clip_shard[[c.path for c in self.clips].index(clip)]]
                    raise ValueError(
                        f"clip {clip} is both in {other} and in {path}: the dataset was made twice with different "
                        "numbers of partitions; delete the older zips"
                    )
                self.clips.append(Clip(clip, len(names)))
                self.digests[clip] = hashlib.sha256("\n".join(names).encode()).digest()
                self._clip_shard.append(shard)
                rows.append(members)
        self._members = np.concatenate(rows)  # (all frames, 3): offset, stored bytes, compression method
        self._first_member = np.cumsum([0, *(clip.num_frames for clip in self.clips)])
        self._forget_files()

    def read(self, clip_index: int, frames: Iterable[int], out: np.ndarray) -> None:
        """Decode the given frames of a clip into `out`, uint8 (T, H, W, 3)."""
        shard = self._clip_shard[clip_index]
        descriptor = self._descriptor(shard)
        for target, frame in zip(out, frames, strict=True):
            assert 0 <= frame < self.clips[clip_index].num_frames, f"no frame {frame} in {self.clips[clip_index]}"
            name, data = _read_member(descriptor, *self._members[self._first_member[clip_index] + frame].tolist())
            try:
                target[...] = _decode_rgb(data, self.size)
            except (OSError, ValueError, zlib.error) as error:
                raise ValueError(
                    f"frame {name} of {self.shards[shard]} is not an RGB image of {self.size[0]}x{self.size[1]} "
                    f"pixels: {error}; {self.remedy}"
                ) from error

    def _forget_files(self) -> None:
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close_files, self._descriptors)

    def _descriptor(self, shard: int) -> int:
        with self._lock:
            if shard not in self._descriptors:
                self._descriptors[shard] = os.open(self.shards[shard], os.O_RDONLY)
            return self._descriptors[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_descriptors", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget_files()


def _close_files(descriptors: dict[int, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


def _missing_size_message(root: Path, size: Size) -> str:
    if not root.is_dir():
        return f"{root} is not a folder; expected the root of a dataset, which holds folders such as {size_name(size)}"
    found = [path.name for path in sorted(root.iterdir()) if re.fullmatch(r"\d{4,}x\d{4,}", path.name)]
    if not found and re.fullmatch(r"\d{4,}x\d{4,}", root.resolve().name):
        return f"{root} is the folder of one frame size; give the dataset's root, {root.resolve().parent}"
    return (
        f"{root} has no frames of {size[0]}x{size[1]}; sizes found: {', '.join(found) or 'none'}; make them as the "
        f"others were made, such as by: python -m dataset_tools.make_dataset_from_videos VIDEOS {root} --sizes "
        f"{size[0]}x{size[1]}"
    )


def _index_shard(path: Path) -> Iterator[tuple[str, list[str], np.ndarray]]:
    """For each clip of a zip, by path: its frame names and int64 (T, 3) of offset, stored bytes and method."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            frame_paths = json.loads(archive.read("frame_paths.json"))
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a whole dataset shard ({error}); make it or copy it again") from error
    for clip, names in sorted(frame_paths.items()):
        if not names:
            continue
        rows = np.empty((len(names), 3), np.int64)
        for row, name in enumerate(names):
            info = members.get(f"{clip}/{name}")
            if info is None:
                raise ValueError(f"{path} lists {clip}/{name} but does not contain it; make or copy the shard again")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{path} compresses {clip}/{name} in a way that is not read; store it uncompressed")
            rows[row] = info.header_offset, info.compress_size, info.compress_type
        yield clip, names, rows


def _read_member(descriptor: int, offset: int, num_bytes: int, method: int) -> tuple[str, bytes]:
    """Name and content of the zip member whose head is at `offset`, in one read unless the head is unusually long."""
    data = os.pread(descriptor, _MEMBER_HEAD_ALLOWANCE + num_bytes, offset)
    _, name_bytes, extra_bytes = _MEMBER_HEAD.unpack_from(data)
    start = _MEMBER_HEAD.size + name_bytes + extra_bytes
    name = data[_MEMBER_HEAD.size : _MEMBER_HEAD.size + name_bytes].decode(errors="replace")
    if start > _MEMBER_HEAD_ALLOWANCE:
        content = os.pread(descriptor, num_bytes, offset + start)
    else:
        content = data[start : start + num_bytes]
    return name, zlib.decompress(content, wbits=-zlib.MAX_WBITS) if method == zipfile.ZIP_DEFLATED else content


@functools.cache
def _simplejpeg() -> Any:
    """The module simplejpeg, which decodes to the same pixels as Pillow but faster, or None where it is absent."""
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:
        return None


def _decode_rgb(data: bytes, size: Size) -> np.ndarray:
    """The pixels of an image file, uint8 (H, W, 3); ValueError if its size or its colours are others."""
    simplejpeg = _simplejpeg()
    if simplejpeg is not None and data[:2] == b"\xff\xd8":
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if (height, width) == size and colours == "YCbCr":
            return simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False)
    with Image.open(io.BytesIO(data)) as image:
        if image.mode != "RGB":
            raise ValueError(f"its colour mode is {image.mode}")
        if (image.height, image.width) != size:
            raise ValueError(f"its size is {image.height}x{image.width}")
        return np.asarray(image)


# ----------------------------------------------------------------------------
# Datasets.


class ClipDataset:
    """The clips of one dataset root at several sizes, which must show the same frames of the same clips."""

    def __init__(self, path: str | os.PathLike[str], sizes: Sequence[Size]) -> None:
        self.path = Path(path)
        self.name = self.path.resolve().name
        self._stores = {(height, width): _FrameStore(self.path, (height, width)) for height, width in sizes}
        first, *others = self._stores.values()
        self.clips = first.clips
        self._index_in_store = {first.size: list(range(len(self.clips)))}
        for other in others:
            difference = _first_difference(first, other)
            if difference is not None:
                raise ValueError(
                    f"the sizes of {self.path} do not show the same clips: {difference}; make all sizes in one run: "
                    f"--sizes {','.join(f'{height}x{width}' for height, width in self._stores)}"
                )
            index = {clip.path: i for i, clip in enumerate(other.clips)}
            self._index_in_store[other.size] = [index[clip.path] for clip in self.clips]
        self.fps = _read_fps(self.path)

    def read(self, clip_index: int, size: Size, frames: Sequence[int], flip: bool = False) -> np.ndarray:
        """Decode `frames` of a clip at (height, width), mirrored if `flip`: uint8 (T, H, W, 3)."""
        video = np.empty((len(frames), *size, 3), np.uint8)
        self.read_into(video, clip_index, frames, flip)
        return video

    def read_into(self, out: np.ndarray, clip_index: int, frames: Sequence[int], flip: bool = False) -> None:
        """Decode `frames` of a clip into `out`, uint8 (T, H, W, 3), at the size that `out` has."""
        height, width = out.shape[1:3]
        assert (height, width) in self._stores, f"{height}x{width} was not opened"
        index = self._index_in_store[height, width][clip_index]
        self._stores[height, width].read(index, frames, out[:, :, ::-1] if flip else out)

    def eligible(self, num_frames: int) -> list[int]:
        """Indices of the clips of at least `num_frames` frames; ValueError if there is none."""
        indices = [index for index, clip in enumerate(self.clips) if clip.num_frames >= num_frames]
        if not indices:
            longest = max((clip.num_frames for clip in self.clips), default=0)
            raise ValueError(
                f"{self.path} has no clip of {num_frames} frames, which are needed; the longest of its "
                f"{len(self.clips)} clips has {longest}; add longer clips or ask for fewer frames"
            )
        return indices


def _first_difference(first: _FrameStore, other: _FrameStore) -> str | None:
    here, there = ({clip.path: clip.num_frames for clip in store.clips} for store in (first, other))
    for clip in sorted(here.keys() | there.keys()):
        if clip not in there or clip not in here:
            present, absent = (first, other) if clip in here else (other, first)
            return f"clip {clip} is in {present.directory.name} but not in {absent.directory.name}"
        if here[clip] != there[clip]:
            return (
                f"clip {clip} has {here[clip]} frames in {first.directory.name} but {there[clip]} in "
                f"{other.directory.name}"
            )
        if first.digests[clip] != other.digests[clip]:
            return f"the frames of clip {clip} have other names in {first.directory.name} than in " + (
                other.directory.name
            )
    return None


def _read_fps(root: Path) -> float:
    path = root / "dataset.json"
    if not path.exists():
        _say_once(f"{root} has no dataset.json: assuming {ASSUMED_FPS:g} frames a second")
        return ASSUMED_FPS
    try:
        fps = float(json.loads(path.read_text())["fps"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not give the frame rate ({error!r}); it should hold an entry like fps: 30"
        ) from (error)
    return fps


@functools.cache
def _say_once(message: str) -> None:
    distributed.print0(message)


class VideoDataset(torch.utils.data.Dataset):
    """Windows of one size, one for each clip; item i is a random window of clip i.

    Items hold "video", float32 (3, T, H, W) in [-1, 1], and "spacing", an int. The spacing of frames is uniform over
    [min_spacing, the largest that fits, at most max_spacing], the start uniform over all positions, and with `x_flip`
    half of the windows are mirrored; all are drawn from torch's global generator, so a loader's workers differ.
    Clips too short for `num_frames` at `min_spacing`, or shorter than `min_video_length`, are left out.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        num_frames: int,
        height: int,
        width: int,
        min_spacing: int = 1,
        max_spacing: int = 1,
        min_video_length: int | None = None,
        x_flip: bool = False,
    ) -> None:
        if not 1 <= min_spacing <= max_spacing:
            raise ValueError(f"spacings must satisfy 1 <= min <= max, not {min_spacing} and {max_spacing}")
        self.num_frames = num_frames
        self.size = (height, width)
        self.min_spacing = min_spacing
        self.max_spacing = max_spacing
        self.x_flip = x_flip
        self.clips = ClipDataset(path, [self.size])
        self.fps = self.clips.fps
        self.clip_indices = self.clips.eligible(max(min_video_length or 1, (num_frames - 1) * min_spacing + 1))

    def __len__(self) -> int:
        return len(self.clip_indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        clip_index = self.clip_indices[index]
        length = self.clips.clips[clip_index].num_frames
        widest = min(self.max_spacing, (length - 1) // max(self.num_frames - 1, 1))
        spacing = int(torch.randint(self.min_spacing, max(widest, self.min_spacing) + 1, ()))
        extent = (self.num_frames - 1) * spacing + 1
        start = int(torch.randint(length - extent + 1, ()))
        flip = self.x_flip and bool(torch.rand(()) < 0.5)
        frames = self.clips.read(clip_index, self.size, range(start, start + extent, spacing), flip)
        video = torch.from_numpy(frames).movedim(-1, 0).to(torch.float32) / 255 * 2 - 1  # (3, T, H, W)
        return {"video": video, "spacing": spacing}


# ----------------------------------------------------------------------------
# Batches.


class BatchStream:
    """An endless stream of batches whose n-th global batch is a pure function of (seed, n) and the dataset.

    Positions n * batch_size ... of the stream run through permutation after permutation of the clips that are long
    enough, so each clip is seen once an epoch however many clips there are. A rank gets its slice of each global
    batch, so the number of ranks changes nothing else.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        x_flip: bool = True,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"a batch of {batch_size} clips cannot be shared evenly by {world_size} ranks")
        self.dataset = dataset
        self.seed = seed
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.x_flip = x_flip

    def items(self, n: int, num_frames: int) -> list[tuple[int, int, bool]]:
        """Clip index, first frame and flip of each item of the n-th global batch of windows of `num_frames`."""
        eligible = self.dataset.eligible(num_frames)
        positions = [divmod(n * self.batch_size + i, len(eligible)) for i in range(self.batch_size)]
        orders = {
            epoch: random_state("data-order", self.seed, epoch).permutation(len(eligible))
            for epoch in {epoch for epoch, _ in positions}
        }
        draws = random_state("data", self.seed, n).random_sample((self.batch_size, 2))
        items = []
        for (epoch, position), (start_draw, flip_draw) in zip(positions, draws, strict=True):
            clip = eligible[orders[epoch][position]]
            start = int(start_draw * (self.dataset.clips[clip].num_frames - num_frames + 1))
            items.append((clip, start, self.x_flip and bool(flip_draw < 0.5)))
        return items

    def batch(self, n: int, spec: BatchSpec) -> dict[str, torch.Tensor]:
        """This rank's slice of the n-th global batch: part name -> uint8 (N / world_size, T, H, W, 3)."""
        batch, jobs = self._plan(n, spec)
        for job in jobs:
            job()
        return batch

    def prefetch(self, requests: Iterable[tuple[int, BatchSpec]]) -> Generator[dict[str, torch.Tensor], None, None]:
        """`batch(n, spec)` for each request in order, decoded up to two batches ahead by `num_workers` threads.

        Reading and JPEG decoding run outside Python's lock, so threads scale and nothing is copied between processes.
        """
        if self.num_workers == 0:
            yield from itertools.starmap(self.batch, requests)
            return
        pool = concurrent.futures.ThreadPoolExecutor(self.num_workers, thread_name_prefix="decode")
        ahead = collections.deque[tuple[dict[str, torch.Tensor], list[concurrent.futures.Future[None]]]]()
        try:
            for n, spec in requests:
                batch, jobs = self._plan(n, spec)
                ahead.append((batch, [pool.submit(job) for job in jobs]))
                if len(ahead) > _BATCHES_AHEAD:
                    yield _finished(*ahead.popleft())
            while ahead:
                yield _finished(*ahead.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _plan(self, n: int, spec: BatchSpec) -> tuple[dict[str, torch.Tensor], list[functools.partial[None]]]:
        """An empty batch and the jobs that fill it, one for each clip and part."""
        num_local = self.batch_size // self.world_size
        items = self.items(n, spec.num_frames)[self.rank * num_local : (self.rank + 1) * num_local]
        batch, jobs = {}, []
        for part in spec.parts:
            shape = (num_local, part.num_frames, part.height, part.width, 3)
            batch[part.name] = torch.empty(shape, dtype=torch.uint8)
            for out, (clip, start, flip) in zip(batch[part.name].numpy(), items, strict=True):
                first = start + part.first_frame
                frames = range(first, first + part.num_frames)
                jobs.append(functools.partial(self.dataset.read_into, out, clip, frames, flip))
        return batch, jobs


def _finished(batch: dict[str, torch.Tensor], jobs: list[concurrent.futures.Future[None]]) -> dict[str, torch.Tensor]:
    for job in jobs:
        job.result()
    return batch
