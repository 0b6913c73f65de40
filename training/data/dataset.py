"""Read video clips from sharded zips of JPEG frames, and draw batches that depend only on the seed and the dataset.

Layout: `<root>/<HHHHxWWWW>/<shard>.zip`, each zip holding `<clip>/<frame>.jpg` and `frame_paths.json`, an object that
maps each clip to its frame names in order. `<root>/dataset.json` may give the frame rate. Tokens of the frames are read
by `training.data.codes`, their latents by `training.data.latents`, values of each frame by `training.data.streams`.
Footage in other layouts, which others have published, is read as it is by `training.data.layouts`.
"""

import collections
import concurrent.futures
import functools
import itertools
import math
import os
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torch_utils import distributed
from training.contract import BatchSpec, CodeClip, DataFacts, FrameClip, LatentClip, Part, Stream, TextClip
from training.data.audio_store import AudioStore, make_command
from training.data.captions import read_captions
from training.data.codes import CodeStore
from training.data.description import DESCRIPTION, read_description
from training.data.frame_cache import CACHE_KINDS, make_caches
from training.data.grids import GridStore
from training.data.latents import LatentStore
from training.data.layouts.base import LayoutStore
from training.data.layouts.find import find_layout
from training.data.parts import check_same_clips, first_size, has_own_layout
from training.data.shards import FrameStore, Size, size_name
from training.data.streams import AUDIO, LABEL, StreamStore
from training.random import random_state

ASSUMED_FPS = 30.0  # the frame rate of the published datasets, which do not store it
WEIGHTINGS = ("clip", "frame")
MAX_TEXTS = 256  # descriptions that a system is told of
_BATCHES_AHEAD = 2


# ----------------------------------------------------------------------------
# Datasets.


class ClipDataset:
    """The clips of one dataset root at one or several sizes, which must have the same frames of the same clips.

    The root may also be footage in a layout that `training.data.layouts` reads, which then has all sizes.

    With `cache` "ram" or "memmap" decoded frames are kept, in memory or in a file below the cache folder, the smallest
    sizes first and as many as fit. `codes` and `latents` are the SHA-256 of the tokenizer whose tokens or latents are
    read, in which case `sizes` may be empty, as with `streams` alone; these are names such as "actions". `vocabularies`
    gives the names of a stream's integer values, and overrides those of the dataset. `text_ids` returns the ids of a
    description; with it each clip must have one. Raises ValueError if the dataset is incomplete, does not match its
    dataset.json, or does not fit into the cache, or if its parts are not of the same clips.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        sizes: Sequence[Size],
        cache: str = "none",
        codes: str | None = None,
        streams: Sequence[str] = (),
        vocabularies: Mapping[str, Sequence[str]] | None = None,
        latents: str | None = None,
        text_ids: Callable[[str], Sequence[int]] | None = None,
    ) -> None:
        if cache not in CACHE_KINDS:
            raise ValueError(f"there is no cache {cache!r}; take one of {', '.join(CACHE_KINDS)}")
        self.path = Path(path)
        self.name = self.path.resolve().name
        self.sizes = list(sizes)
        description = read_description(self.path)
        listed = None if description is None else description.get("hashes")
        self.layout = find_layout(self.path) if sizes and not has_own_layout(self.path) else None
        self._stores: dict[Size, FrameStore | LayoutStore] = {}
        for height, width in sizes:
            self._stores[height, width] = self._open_store((height, width), listed)
        self.codes = None if codes is None else CodeStore(self.path, codes)
        self.latents = None if latents is None else LatentStore(self.path, latents)
        grids: list[GridStore] = [store for store in (self.codes, self.latents) if store is not None]
        stores: list[FrameStore | LayoutStore | GridStore] = [*self._stores.values(), *grids]
        if not stores and streams:
            if not has_own_layout(self.path):
                raise ValueError(f"{self.path} is no dataset whose {streams[0]} can be read alone; make one of it")
            stores = [FrameStore(self.path, first_size(self.path), listed)]  # which tells the clips
        if not stores:
            raise ValueError(f"neither frames nor tokens of {self.path} are read; ask for a frame size or for codes")
        first, *others = stores
        for other in others:
            check_same_clips(self.path, first, other)
        self.clips = first.clips
        self.lengths = np.array([clip.num_frames for clip in self.clips], np.int64)  # (clips,) in frames
        self.alignment = 1  # windows begin at multiples of this number of frames
        self._number_in_grid = {}
        for grid in grids:
            numbers = np.array([grid.index[clip.path] for clip in self.clips])
            self._number_in_grid[grid.kind.name] = numbers
            self.alignment = math.lcm(self.alignment, grid.stride[0])
            self.lengths = np.minimum(self.lengths, grid.steps[numbers] * grid.stride[0])
        self._number_in_store = {}
        for size, store in self._stores.items():
            self._number_in_store[size] = np.array([store.index[clip.path] for clip in self.clips])
        folders = [store.directory for store in stores]
        self.streams = {name: self.open_stream(name, (vocabularies or {}).get(name), folders) for name in streams}
        self.texts: list[list[str]] = []
        if text_ids is not None:
            root, given = (self.path, None) if self.layout is None else (self.layout.root, self.layout.texts())
            self.texts, self._text_ids = read_captions(root, self.clips, given), text_ids
        self.fps = _frame_rate(self.path, description, grids, None if self.layout is None else self.layout.fps)
        _warn_if_unfinished(self.path, (description if sizes else None) or {}, grids)
        if cache != "none":
            wanted = {size: (store.num_frames, store.content_key()) for size, store in self._stores.items()}
            for size, frames in make_caches(cache, wanted).items():
                self._stores[size].cache = frames

    def _open_store(self, size: Size, listed: Collection[str] | None) -> FrameStore | LayoutStore:
        """Return the frames of one size."""
        if self.layout is None:
            return FrameStore(self.path, size, listed)
        _say_once(f"{self.path} is read as {self.layout.title}: {len(self.layout.clips)} clips")
        for line in self.layout.remarks.lines():
            _say_once(f"{self.path}: {line}")
        return LayoutStore(self.layout, size)

    def open_stream(
        self, name: str, vocabulary: Sequence[str] | None = None, folders: Sequence[Path] | None = None
    ) -> StreamStore | AudioStore:
        """Return the values of a stream: those of the layout, or of the zips in `folders`, by default of all sizes."""
        if name == AUDIO:
            if self.layout is not None:
                raise ValueError(
                    f"{self.path} is read as {self.layout.title}, without its sound; make a dataset of it: "
                    f"{make_command(Path('DATASET'))}"
                )
            return AudioStore(self.path, self.clips, folders or ())
        if self.layout is None:
            return StreamStore(self.path, name, self.clips, folders, vocabulary)
        there = self.layout.stream_names()
        if name != LABEL and name not in there:
            raise ValueError(
                f"{self.path} has no {name} beside its frames; it has {', '.join(there) or 'none'}: add a file such as "
                f"clip.{name}.json beside each video"
            )
        shards = None if name == LABEL else self.layout.stream_shards(name)
        return StreamStore(self.layout.root, name, self.clips, folders, vocabulary, shards)

    def store(self, size: Size) -> FrameStore | LayoutStore:
        """Return all frames of one size; only the clips of the first size are numbered as in the dataset."""
        return self._stores[size]

    def read(self, clip_index: int, size: Size, frames: Sequence[int]) -> np.ndarray:
        """Decode `frames` of a clip at (height, width): uint8 (T, H, W, 3)."""
        video = np.empty((len(frames), *size, 3), np.uint8)
        self.read_into(video, clip_index, frames)
        return video

    def read_into(self, out: np.ndarray, clip_index: int, frames: Sequence[int]) -> None:
        """Decode `frames` of a clip into `out`, contiguous uint8 (T, H, W, 3), at the size of `out`."""
        size = (out.shape[1], out.shape[2])
        assert size in self._stores, f"{size_name(size)} was not opened"
        self._stores[size].read(self._number_in_store[size][clip_index], frames, out)

    def read_codes(self, clip_index: int, start: int, count: int, stride: int = 1) -> np.ndarray:
        """Return `count` steps start, start + stride, ... of a clip's tokens: uint16 (count, h, w)."""
        assert self.codes is not None, "no codes were opened"
        return self.codes.read(int(self._number_in_grid["codes"][clip_index]), start, count, stride)

    def read_latents(self, clip_index: int, start: int, count: int, stride: int = 1) -> np.ndarray:
        """Return `count` steps start, start + stride, ... of a clip's latents: float16 (count, C, h, w)."""
        assert self.latents is not None, "no latents were opened"
        return self.latents.read(int(self._number_in_grid["latents"][clip_index]), start, count, stride)

    def read_stream(self, clip_index: int, name: str, start: int, count: int, stride: int = 1) -> np.ndarray:
        """Return a stream's values for frames start, start + stride, ...: int64 (count,) or float32 (count, values)."""
        assert name in self.streams, f"{name} was not opened"
        return self.streams[name].read(clip_index, start, count, stride)

    def read_text(self, clip_index: int, draw: float, length: int) -> np.ndarray:
        """Return the ids of one of a clip's descriptions, chosen by a number in [0, 1): int64 (length,)."""
        assert self.texts, "no descriptions were opened"
        texts = self.texts[clip_index]
        ids = np.asarray(self._text_ids(texts[int(draw * len(texts))]), np.int64)
        assert ids.shape == (length,), f"{ids.shape} ids of a description, expected {length}"
        return ids

    def vocabularies(self) -> dict[str, list[str]]:
        """Return the names that whole numbers stand for, by stream, of the streams that have such."""
        return {name: list(store.vocabulary) for name, store in self.streams.items() if store.vocabulary}

    def facts(self) -> DataFacts:
        """Return what a system may have to know of the parts that it reads."""
        return DataFacts(
            fps=self.fps,
            num_values={name: store.num_values for name, store in self.streams.items()},
            vectors=frozenset(name for name, store in self.streams.items() if store.is_vector),
            latents_mean=() if self.latents is None else self.latents.mean,
            latents_std=() if self.latents is None else self.latents.std,
            texts=tuple(dict.fromkeys(texts[0] for texts in self.texts))[:MAX_TEXTS],
        )

    def eligible(self, num_frames: int) -> list[int]:
        """Return the indices of the clips of at least `num_frames` frames; raise ValueError if there is none."""
        indices = np.flatnonzero(self.lengths >= num_frames).tolist()
        if not indices:
            raise ValueError(
                f"{self.path} has no clip of {num_frames} frames, which are needed; the longest of its "
                f"{len(self.clips)} clips has {self.lengths.max(initial=0)}; add longer clips or ask for fewer frames"
            )
        return indices


def _frame_rate(
    root: Path, description: Mapping[str, Any] | None, grids: Sequence[GridStore], layout_fps: float | None
) -> float:
    if description is None:
        if grids or layout_fps is not None:
            return grids[0].manifest.fps if layout_fps is None else layout_fps
        _say_once(f"{root} has no dataset.json: assuming {ASSUMED_FPS:g} frames per second")
        return ASSUMED_FPS
    if description.get("fps") is None:
        raise ValueError(f"{root / DESCRIPTION} does not give the frame rate; it should hold an entry like fps: 30")
    return float(description["fps"])


def _warn_if_unfinished(root: Path, description: Mapping[str, Any], grids: Sequence[GridStore]) -> None:
    for store in grids:
        if missing := store.missing_partitions():
            _say_once(
                f"{store.directory} is unfinished: {missing} of its {store.manifest.num_partitions} partitions have "
                "not been made; continuing with the others"
            )
    missing = description.get("num_partitions", 0) - len(description.get("partitions", {}))
    if missing > 0:
        _say_once(
            f"{root} is unfinished: {missing} of its {description['num_partitions']} partitions have not been made; "
            "continuing with the others"
        )


@functools.cache
def _say_once(message: str) -> None:
    distributed.print0(message)


class VideoDataset(torch.utils.data.Dataset):
    """Windows of one size, one per clip; item i is a random window of clip i.

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
        frames = torch.from_numpy(self.clips.read(clip_index, self.size, range(start, start + extent, spacing)))
        video = (frames.flip(2) if flip else frames).movedim(-1, 0).to(torch.float32) / 255 * 2 - 1  # (3, T, H, W)
        return {"video": video, "spacing": spacing}


# ----------------------------------------------------------------------------
# Batches.


class BatchStream:
    """An infinite stream of batches whose n-th global batch is a pure function of (seed, n) and the dataset.

    With `weighting` "clip", the stream is a sequence of permutations of the clips that are long enough, one per epoch,
    and batch n holds its positions n * batch_size ...; the window in a clip is drawn uniformly. With "frame", each item
    is drawn uniformly from all windows of all clips, so long clips have more weight. A rank gets its slice of each
    global batch, so the global batch does not depend on the number of ranks.
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
        weighting: str = "clip",
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"a batch of {batch_size} clips cannot be shared evenly by {world_size} ranks")
        if weighting not in WEIGHTINGS:
            raise ValueError(f"there is no weighting {weighting!r}; take one of {', '.join(WEIGHTINGS)}")
        self.dataset = dataset
        self.seed = seed
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.x_flip = x_flip
        self.weighting = weighting
        self._windows: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def items(self, n: int, num_frames: int) -> list[tuple[int, int, bool]]:
        """Return clip index, first frame and flip of each item of the n-th global batch of windows of `num_frames`.

        If the dataset has codes whose steps cover several frames, windows begin at the start of a step.
        """
        if num_frames not in self._windows:
            eligible = np.array(self.dataset.eligible(num_frames))
            spare = self.dataset.lengths[eligible] - num_frames
            self._windows[num_frames] = eligible, spare // self.dataset.alignment + 1
        eligible, num_windows = self._windows[num_frames]  # (clips,) each
        draws = random_state("data", self.seed, n).random_sample((self.batch_size, 2))
        if self.weighting == "clip":
            epochs, places = np.divmod(n * self.batch_size + np.arange(self.batch_size), len(eligible))
            picks = np.empty(self.batch_size, np.int64)
            for epoch in np.unique(epochs).tolist():
                picks[epochs == epoch] = _order(self.seed, epoch, len(eligible))[places[epochs == epoch]]
            starts = (draws[:, 0] * num_windows[picks]).astype(np.int64)
        else:
            ends = num_windows.cumsum()
            windows = (draws[:, 0] * ends[-1]).astype(np.int64)
            picks = np.searchsorted(ends, windows, side="right")
            starts = windows - (ends - num_windows)[picks]
        starts = starts * self.dataset.alignment
        flips = (draws[:, 1] < 0.5) & self.x_flip
        return list(zip(eligible[picks].tolist(), starts.tolist(), flips.tolist(), strict=True))

    def batch(self, n: int, spec: BatchSpec) -> dict[str, torch.Tensor]:
        """Return this rank's slice of the n-th global batch by part name, N / world_size clips.

        Frames are uint8 (N, T, H, W, 3), codes int32 (N, T, h, w), latents float16 (N, T, C, h, w), streams int64
        (N, T) or float32 (N, T, V), ids of descriptions int64 (N, length). With `x_flip` there is also "x_flip", bool
        (N,): the clips to mirror, which `to_device` does on the device, where it is cheapest.
        """
        batch, jobs = self._plan(n, spec)
        for job in jobs:
            job()
        return batch

    def prefetch(self, requests: Iterable[tuple[int, BatchSpec]]) -> Generator[dict[str, torch.Tensor], None, None]:
        """Yield `batch(n, spec)` for each request in order, decoded up to two batches ahead by `num_workers` threads.

        Reading and JPEG decoding release the GIL, so threads scale and nothing is copied between processes.
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
        """Return an empty batch and the jobs that fill it, one for each clip and part."""
        self._check_asked(spec)
        _check_parts(spec, *self._strides())
        num_local = self.batch_size // self.world_size
        own = slice(self.rank * num_local, (self.rank + 1) * num_local)
        items = self.items(n, spec.num_frames)[own]
        texts = random_state("data-text", self.seed, n).random_sample(self.batch_size)[own].tolist()
        batch, jobs = {}, []
        for part in spec.parts:
            shape, dtype = self._layout(part)
            # Pinned memory lets the copy to a GPU overlap with computation.
            batch[part.name] = torch.empty((num_local, *shape), dtype=dtype, pin_memory=torch.cuda.is_initialized())
            for out, (clip, start, _), text in zip(batch[part.name].numpy(), items, texts, strict=True):
                jobs.append(functools.partial(_fill, out, self.dataset, clip, part, start, text))
        if self.x_flip:
            batch["x_flip"] = torch.tensor([flip for _, _, flip in items])
        return batch, jobs

    def _layout(self, part: Part) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape and dtype of one clip of a part."""
        if isinstance(part, FrameClip):
            return (part.count, part.height, part.width, 3), torch.uint8
        if isinstance(part, TextClip):
            return (part.length,), torch.int64
        if isinstance(part, CodeClip):
            assert self.dataset.codes is not None, "no codes were opened"
            return (part.count, *self.dataset.codes.grid), torch.int32
        if isinstance(part, LatentClip):
            assert self.dataset.latents is not None, "no latents were opened"
            return (part.count, *self.dataset.latents.manifest.step_shape), torch.float16
        assert part.name in self.dataset.streams, f"{part.name} was not opened"
        stream = self.dataset.streams[part.name]
        return ((part.count, stream.num_values), torch.float32) if stream.is_vector else ((part.count,), torch.int64)

    def _strides(self) -> tuple[int, int]:
        """Return the number of frames per step of codes and of latents, 1 without."""
        codes, latents = self.dataset.codes, self.dataset.latents
        return 1 if codes is None else codes.stride[0], 1 if latents is None else latents.stride[0]

    def _check_asked(self, spec: BatchSpec) -> None:
        """Raise ValueError if the dataset has no such windows, or if mirroring would invalidate a part."""
        has_grid = any(isinstance(part, CodeClip | LatentClip) for part in spec.parts)
        if has_grid and spec.num_frames % self.dataset.alignment:
            raise ValueError(
                f"windows of {spec.num_frames} frames do not end where a step of the tokens does; take a multiple of "
                f"the tokenizer's {self.dataset.alignment} frames"
            )
        if self.x_flip:
            fixed = [part.name for part in spec.parts if not _can_be_mirrored(part)]
            if fixed:
                raise ValueError(
                    f"clips cannot be mirrored, for their {', '.join(fixed)} would not be; turn it off: --x-flip=false"
                )


def _can_be_mirrored(part: Part) -> bool:
    return isinstance(part, FrameClip) or (isinstance(part, Stream) and part.name in (LABEL, AUDIO))


def _fill(out: np.ndarray, dataset: ClipDataset, clip: int, part: Part, start: int, text: float) -> None:
    """Read a part of the window of a clip that begins at frame `start` into `out`; `text` chooses its description."""
    if isinstance(part, TextClip):
        out[...] = dataset.read_text(clip, text, part.length)
    elif isinstance(part, FrameClip):
        dataset.read_into(out, clip, _steps(part, start))
    elif isinstance(part, CodeClip):
        assert dataset.codes is not None
        first = start // dataset.codes.stride[0] + part.first
        out[...] = dataset.read_codes(clip, first, part.count, part.stride)
    elif isinstance(part, LatentClip):
        assert dataset.latents is not None
        first = start // dataset.latents.stride[0] + part.first
        out[...] = dataset.read_latents(clip, first, part.count, part.stride)
    else:
        out[...] = dataset.read_stream(clip, part.name, start + part.first, part.count, part.stride)


def _steps(part: FrameClip | CodeClip | LatentClip | Stream, start: int) -> range:
    """Return the frames, or steps of the tokens, of a part in a window that begins at `start`."""
    first = start + part.first
    return range(first, first + part.count * part.stride, part.stride)


@functools.lru_cache(maxsize=64)
def _check_parts(spec: BatchSpec, codes_stride: int, latents_stride: int) -> None:
    """Assert that the parts of a batch have unique names and lie in its windows."""
    names = [part.name for part in spec.parts]
    assert len({*names, "x_flip"}) == len(names) + 1, f"parts share a name, or take that of the flips: {names}"
    for part in spec.parts:
        if isinstance(part, TextClip):
            continue
        frames = {CodeClip: codes_stride, LatentClip: latents_stride}.get(type(part), 1)
        num_steps = spec.num_frames // frames
        inside = part.first >= 0 and part.count > 0 and part.stride > 0 and _steps(part, 0)[-1] < num_steps
        assert inside, f"{part} reaches out of a window of {spec.num_frames} frames"


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, num_clips: int) -> np.ndarray:
    """Return the order of the clips in an epoch, (num_clips,), read-only because it is cached."""
    order = random_state("data-order", seed, epoch).permutation(num_clips)
    order.flags.writeable = False
    return order


def _finished(batch: dict[str, torch.Tensor], jobs: list[concurrent.futures.Future[None]]) -> dict[str, torch.Tensor]:
    for job in jobs:
        job.result()
    return batch


def to_device(batch: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the parts of a batch on `device`, with the selected clips mirrored.

    Frames, uint8 (N, T, H, W, 3), become float32 (N, 3, T, H, W) in [-1, 1], int32 codes (N, T, h, w) become int64, and
    float16 latents (N, T, C, h, w) become float32 (N, C, T, h, w). Everything else is moved unchanged.
    """
    x_flip = batch.get("x_flip")
    return {name: _send(part, device, x_flip) for name, part in batch.items() if name != "x_flip"}


def _send(part: torch.Tensor, device: torch.device, x_flip: torch.Tensor | None) -> torch.Tensor:
    if part.dtype == torch.uint8 and part.dim() == 5:
        return to_float(part, device, x_flip)
    part = part.to(device, non_blocking=True)
    if part.dtype == torch.float16 and part.dim() == 5:
        return part.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return part.to(torch.int64) if part.dtype == torch.int32 else part


def to_float(frames: torch.Tensor, device: torch.device, x_flip: torch.Tensor | None = None) -> torch.Tensor:
    """Convert uint8 (N, T, H, W, 3) to float32 (N, 3, T, H, W) in [-1, 1] on `device`.

    Clips for which `x_flip`, bool (N,) on the CPU, is true are mirrored.
    """
    # Permute before the conversion to float32, which takes four times as much memory.
    planes = frames.to(device, non_blocking=True).permute(0, 4, 1, 2, 3).contiguous()
    for n in [] if x_flip is None else x_flip.nonzero()[:, 0].tolist():
        planes[n] = planes[n].flip(3)
    return planes.to(torch.float32).div_(127.5).sub_(1)
