"""What the explorer shows, without a word about how it is asked for: models, frames of any seed, clips.

An endless video is made in numbered blocks, each computed alone and always in the same way. So a frame has the same
bits whenever, and by whatever way, one comes to it. Blocks are kept in a cache of bounded size; the low-resolution
frames that a super-resolution block needs come from the same cache.

Networks are used by the thread of `Studio.worker` alone.
"""

import collections
import itertools
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from dnnlib.frames_out import SUFFIXES
from dnnlib.video import VideoWriter
from explorer.worker import Busy, Cancelled, Steps, Task, Worker
from torch_utils.precision import set_precision
from training import network_file
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.sampling import (
    LRES_CHUNK,
    SRES_CHUNK,
    LowResSource,
    Pair,
    Sampling,
    Start,
    SuperResSource,
    open_source,
    quantize,
)
from training.longvideogan.sres.generator import SuperResGenerator
from training.video_files import Plan, tile

KINDS = ("lres", "sres", "both")  # both: side by side
VIDEO_FORMATS = tuple(name for name in SUFFIXES if name not in ("png", "npz"))

# A CPU takes as long for four frames at once as for four, one by one, and whoever looks waits for the first.
SRES_BLOCK_CPU = 4

MAX_FRAME = 10**12  # beyond, slow motion would run out of the digits of float64
MAX_SEED = 10**15  # what a browser counts exactly
MAX_CELLS = 36
MAX_ANSWER_BYTES = 32 << 20
MAX_ANSWER_FRAMES = 256
MAX_CLIP_FRAMES = 18_000
MAX_CLIPS = 8  # finished or not
CLIP_PATIENCE_SEC = 120  # after which a clip at which nobody looks is given up
MAX_OPEN = 2  # models in memory


@dataclass(frozen=True)
class Entry:
    """A model that may be looked at: the names, paths or addresses of its networks."""

    name: str
    lres: str
    sres: str | None = None


def list_models(lres: str | None = None, sres: str | None = None) -> list[Entry]:
    """The model given, or else those in `models/`; ValueError if there is none."""
    if lres is not None:
        return [Entry(Path(lres).stem.removesuffix("-lres"), lres, sres)]
    if sres is not None:
        raise ValueError(
            "--sres is given without --lres: the low-resolution network decides what happens in a video; give both"
        )
    found = []
    for path in sorted(network_file.MODELS.glob("*-lres.pkl")):
        name = path.name.removesuffix("-lres.pkl")
        partner = path.with_name(f"{name}-sres.pkl")
        found.append(Entry(name, str(path), str(partner) if partner.is_file() else None))
    if not found:
        raise ValueError(
            f"there is no model in {network_file.MODELS} (NAME-lres.pkl, NAME-sres.pkl): give networks, as in "
            "--lres=LRES.pkl --sres=SRES.pkl"
        )
    return found


# ----------------------------------------------------------------------------
# What may be asked for.


@dataclass(frozen=True)
class View:
    """A video, or a grid of them, and how it is drawn; ValueError for what cannot be."""

    model: str
    seed: int = 0
    kind: str = "lres"
    grid: tuple[int, int] = (1, 1)  # rows, columns; seeds ascend from `seed`, row by row
    truncation: float = 1.0
    speed: float = 1.0  # temporal scale

    def __post_init__(self) -> None:
        rows, columns = self.grid
        if abs(self.seed) > MAX_SEED:
            raise ValueError(f"seed is {self.seed}: use a number from -{MAX_SEED} to {MAX_SEED}")
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}: use one of {', '.join(KINDS)}")
        if rows < 1 or columns < 1 or rows * columns > MAX_CELLS:
            raise ValueError(f"a grid of {rows}x{columns} was asked for: use 1 to {MAX_CELLS} cells, such as 3x3")
        if not 0 <= self.truncation <= 2:
            raise ValueError(f"truncation is {self.truncation}: use a number from 0 to 2, such as 0.7")
        if not 0.05 <= self.speed <= 8:
            raise ValueError(f"speed is {self.speed}: use a number from 0.05 to 8, such as 0.5")

    @property
    def parts(self) -> tuple[str, ...]:
        """The kinds of frames that are shown side by side."""
        return ("lres", "sres") if self.kind == "both" else (self.kind,)

    @property
    def sampling(self) -> Sampling:
        """The same, for a source."""
        return Sampling(truncation=self.truncation, temporal_scale=self.speed)

    @property
    def seeds(self) -> list[int]:
        """Of all cells."""
        return list(range(self.seed, self.seed + math.prod(self.grid)))


def check_frames(start: int, count: int) -> None:
    """ValueError for a range of frames that cannot be."""
    if abs(start) > MAX_FRAME:
        raise ValueError(f"frame {start} was asked for: use a number from -{MAX_FRAME} to {MAX_FRAME}")
    if count < 1:
        raise ValueError(f"{count} frames were asked for: use a positive number")


class BlockName(NamedTuple):
    """Names what the cache holds."""

    model: str
    sampling: Sampling
    seed: int
    kind: str  # "lres" and "sres": uint8 (T, H, W, 3); "floats": float32 (1, 3, T, h, w), which "lres" was made of
    number: int


@dataclass
class Opened:
    """A model in memory."""

    lres: LowResGenerator
    sres: SuperResGenerator | None
    sres_block: int
    average_w: Tensor | None = None  # found once, when it is first needed: it takes a while

    def source(self, sampling: Sampling) -> tuple[LowResSource, SuperResSource | None]:
        """The sources of low-resolution frames, and of those that are made sharp."""
        low = LowResSource(self.lres, sampling=sampling)
        if sampling.truncation != 1:
            if self.average_w is None:
                self.average_w = low.average_w
            low.average_w = self.average_w
        if self.sres is None:
            return low, None
        return low, SuperResSource(self.sres, chunk_frames=self.sres_block, sampling=sampling)


@dataclass(frozen=True)
class About:
    """What is known of a model once it has been opened."""

    sizes: dict[str, tuple[int, int]]  # kind -> height, width
    blocks: dict[str, int]  # kind -> frames that are computed together

    def frame_size(self, view: View) -> tuple[int, int]:
        """Height and width of one frame of a view."""
        height, width = self.sizes[view.kind]
        return view.grid[0] * height, view.grid[1] * width

    def most_frames(self, view: View) -> int:
        """How many frames one answer may have."""
        return min(MAX_ANSWER_FRAMES, max(1, MAX_ANSWER_BYTES // (3 * math.prod(self.frame_size(view)))))

    def blocks_of(self, view: View, start: int, count: int) -> Iterator[BlockName]:
        """The blocks that frames [start, start + count) of a view are cut from: by seed, kind and number."""
        for seed in view.seeds:
            for kind in view.parts:
                size = self.blocks[kind]
                for number in range(start // size, -(-(start + count) // size)):
                    yield BlockName(view.model, view.sampling, seed, kind, number)


def compose(view: View, about: About, blocks: dict[BlockName, np.ndarray], start: int, count: int) -> np.ndarray:
    """Frames [start, start + count) of a view, cut from its blocks: uint8 (T, height, width, 3)."""
    videos = []
    for seed in view.seeds:
        parts = []
        for kind in view.parts:
            names = [name for name in blocks if name.seed == seed and name.kind == kind]
            skip = start - names[0].number * about.blocks[kind]
            frames = np.concatenate([blocks[name] for name in names])[skip : skip + count]
            factor = about.sizes[view.kind][0] // about.sizes[kind][0]  # of low resolution beside the sharp picture
            parts.append(frames.repeat(factor, axis=1).repeat(factor, axis=2))
        videos.append(np.concatenate(parts, axis=2))
    return tile(np.stack(videos), view.grid)


# ----------------------------------------------------------------------------
# What is kept.


class Cache:
    """The blocks used last, up to a number of bytes; for many threads."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._blocks: collections.OrderedDict[BlockName, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: BlockName) -> Any:
        """The block, or None."""
        with self._lock:
            if name in self._blocks:
                self._blocks.move_to_end(name)
            return self._blocks.get(name)

    def put(self, name: BlockName, block: np.ndarray | Tensor) -> None:
        """Keep a block, at the price of those not used for longest."""
        with self._lock:
            if name in self._blocks:
                self.num_bytes -= self._blocks.pop(name).nbytes
            self._blocks[name] = block
            self.num_bytes += block.nbytes
            while self.num_bytes > self.max_bytes and self._blocks:
                _, oldest = self._blocks.popitem(last=False)
                self.num_bytes -= oldest.nbytes


@dataclass
class Clip:
    """A video file in the making."""

    number: int
    name: str  # for whoever saves it
    path: Path
    num_frames: int
    done: int = 0  # frames
    asked_sec: float = field(default_factory=time.monotonic)  # when somebody last looked at how far it is
    task: Task[None] | None = None


# ----------------------------------------------------------------------------
# Where it comes together.


class Studio:
    """Models, frames and clips. A context manager: when it is left, work stops and temporary files go.

    `device` and `precision` are those of generate.py. The cache holds at most `cache_bytes`.
    """

    def __init__(
        self,
        models: Sequence[Entry],
        device: str = "cpu",
        precision: str = "fp32",
        trust: bool = False,
        cache_bytes: int = 512 << 20,
    ) -> None:
        self.models = {entry.name: entry for entry in models}
        self.device, self.precision, self.trust = device, precision, trust
        self.cache = Cache(cache_bytes)
        self.about: dict[str, About] = {}  # of models that have been opened
        self.has_stopped = False  # at the end: no step was still at work
        self._opened: collections.OrderedDict[str, Opened] = collections.OrderedDict()
        self._clips: dict[int, Clip] = {}
        self._clip_numbers = itertools.count(1)
        self._lock = threading.Lock()  # of the clips

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="longtake-view-"))
        self.worker = Worker()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.has_stopped = self.worker.stop(timeout_sec=5)
        shutil.rmtree(self.folder, ignore_errors=True)

    # Steps, which only the worker's thread takes.

    def open(self, name: str) -> Steps[About]:
        """Bring a model into memory, in place of the one that was not used for longest."""
        self.check_model(name)
        if name not in self._opened:
            while len(self._opened) >= MAX_OPEN:
                self._opened.popitem(last=False)
            entry = self.models[name]
            source = open_source(entry.lres, entry.sres, self.device, self.trust)
            if isinstance(source, Pair):
                opened = Opened(source.lres.network, source.sres.network, self.sres_block)
            else:
                assert isinstance(source, LowResSource)
                opened = Opened(source.network, None, self.sres_block)
            set_precision([net for net in (opened.lres, opened.sres) if net is not None], self.precision)
            self._opened[name], self.about[name] = opened, self._describe(opened)
            yield
        self._opened.move_to_end(name)
        return self.about[name]

    @property
    def sres_block(self) -> int:
        """How many frames are super-resolved at once."""
        return SRES_BLOCK_CPU if self.device == "cpu" else SRES_CHUNK

    def _describe(self, opened: Opened) -> About:
        low, high = opened.lres, opened.sres
        if high is None:
            return About({"lres": (low.height, low.width)}, {"lres": LRES_CHUNK})
        return About(
            {"lres": (low.height, low.width), "sres": (high.height, high.width), "both": (high.height, 2 * high.width)},
            {"lres": LRES_CHUNK, "sres": opened.sres_block, "both": opened.sres_block},
        )

    def frames(self, view: View, start: int, count: int) -> Steps[np.ndarray]:
        """Frames [start, start + count) of a view: uint8 (T, height, width, 3)."""
        about = yield from self.open(view.model)
        check_frames(start, count)
        if view.kind not in about.sizes:
            raise ValueError(f"{view.model} has no super-resolution network: look at its low-resolution frames")
        if count > about.most_frames(view):
            raise ValueError(
                f"{count} frames were asked for at once: use at most {about.most_frames(view)} of this size"
            )
        blocks: dict[BlockName, np.ndarray] = {}
        for name in about.blocks_of(view, start, count):
            block = self.cache.get(name)
            if block is None:
                block = (
                    (yield from self._make_low(name))[1] if name.kind == "lres" else (yield from self._make_high(name))
                )
            blocks[name] = block
        return compose(view, about, blocks, start, count)

    def _make_low(self, name: BlockName) -> Steps[tuple[Tensor, np.ndarray]]:
        """A block at low resolution: float32 (1, 3, T, h, w), which super-resolution reads, and uint8 (T, h, w, 3)."""
        yield from self.open(name.model)
        low, high = self._opened[name.model].source(name.sampling)
        floats = torch.cat(list(low.frames([name.seed], name.number * LRES_CHUNK, LRES_CHUNK)), dim=2).cpu()
        pixels = quantize(floats)[0].numpy()
        if high is not None:
            self.cache.put(name._replace(kind="floats"), floats)
        self.cache.put(name._replace(kind="lres"), pixels)
        yield
        return floats, pixels

    def _make_high(self, name: BlockName) -> Steps[np.ndarray]:
        """A block at full resolution: uint8 (T, H, W, 3)."""
        yield from self.open(name.model)
        _, high = self._opened[name.model].source(name.sampling)
        assert high is not None
        first = name.number * self.sres_block - high.context
        numbers = range(first // LRES_CHUNK, -(-(first + self.sres_block + 2 * high.context) // LRES_CHUNK))
        floats = []
        for number in numbers:
            block = self.cache.get(name._replace(kind="floats", number=number))
            floats.append((yield from self._make_low(name._replace(number=number)))[0] if block is None else block)
        window = torch.cat(floats, dim=2)[:, :, first - numbers[0] * LRES_CHUNK :]

        def condition(start: Start, num_frames: int) -> Tensor:
            assert not isinstance(start, int)
            return window[:, :, start[0] - first :][:, :, :num_frames]

        chunks = high.sample([name.seed], name.number * self.sres_block, self.sres_block, condition)
        pixels = torch.cat(list(chunks), dim=1)[0].cpu().numpy()
        self.cache.put(name, pixels)
        yield
        return pixels

    def _film(self, clip: Clip, view: View, start: int, fps: float) -> Steps[None]:
        """Make the file of a clip."""
        about = yield from self.open(view.model)
        if view.kind not in about.sizes:
            raise ValueError(f"{view.model} has no super-resolution network: save its low-resolution frames")
        piece = min(about.blocks[view.kind], about.most_frames(view))
        with VideoWriter(clip.path, *about.frame_size(view), fps, Plan.crf, enlarge=True) as writer:
            while clip.done < clip.num_frames:
                count = min(piece - (start + clip.done) % piece, clip.num_frames - clip.done)
                writer.write((yield from self.frames(view, start + clip.done, count)))
                clip.done += count
                if time.monotonic() - clip.asked_sec > CLIP_PATIENCE_SEC:
                    raise Cancelled("nobody has looked at this clip for a while, so it was given up")
                yield

    # For all threads.

    def check_model(self, name: str) -> None:
        """ValueError for a model that is not on the list."""
        if name not in self.models:
            raise ValueError(f"there is no model {name[:80]!r} here: use one of {', '.join(self.models)}")

    def cached(self, view: View, start: int, count: int) -> np.ndarray | None:
        """What `frames` gives, if it takes no network; else None."""
        about = self.about.get(view.model)
        if about is None or view.kind not in about.sizes or not 1 <= count <= about.most_frames(view):
            return None
        blocks: dict[BlockName, np.ndarray] = {}
        for name in about.blocks_of(view, start, count):
            block = self.cache.get(name)
            if block is None:
                return None
            blocks[name] = block
        return compose(view, about, blocks, start, count)

    def film(
        self, view: View, start: int, count: int, fps: float = Plan.fps, file_format: str = "mp4", owner: str = ""
    ) -> Clip:
        """Begin a clip of frames [start, start + count).

        Raises ValueError for what cannot be, and Busy while as many clips as may be are in the making.
        """
        self.check_model(view.model)
        check_frames(start, count)
        if count > MAX_CLIP_FRAMES:
            raise ValueError(
                f"a clip of {count} frames was asked for: save at most {MAX_CLIP_FRAMES} here, and longer ones with "
                "generate.py"
            )
        if not 1 <= fps <= 120:
            raise ValueError(f"a clip of {fps} frames a second was asked for: use a number from 1 to 120")
        if file_format not in VIDEO_FORMATS:
            raise ValueError(f"a clip as {file_format!r} was asked for: use one of {', '.join(VIDEO_FORMATS)}")
        grid = None if view.grid == (1, 1) else view.grid
        plan = Plan(self.folder, start=start, num_frames=count, grid=grid, prefix=f"{view.model}_")
        name = f"{plan.stem(view.seeds, count)}_{view.kind}{SUFFIXES[file_format]}"
        with self._lock:
            self._make_room()
            number = next(self._clip_numbers)
            clip = Clip(number, name, self.folder / f"{number}{SUFFIXES[file_format]}", count)
            clip.task = self.worker.submit(self._film(clip, view, start, fps), f"{owner}/clip")
            self._clips[number] = clip
        return clip

    def _make_room(self) -> None:
        """Forget the oldest clip that has ended, if there are as many as may be."""
        ended = [clip for clip in self._clips.values() if clip.task is None or clip.task.has_ended]
        if len(self._clips) >= MAX_CLIPS:
            if not ended:
                raise Busy(f"{len(self._clips)} clips are in the making")
            ended[0].path.unlink(missing_ok=True)
            del self._clips[ended[0].number]

    def clip(self, number: int) -> Clip:
        """The clip of a number; ValueError if there is none."""
        with self._lock:
            if number not in self._clips:
                raise ValueError(f"there is no clip {number} (any more): save it again")
            self._clips[number].asked_sec = time.monotonic()
            return self._clips[number]

    def drop(self, owner: str) -> None:
        """Nobody waits for what this owner has asked for."""
        self.worker.drop(owner)
        self.worker.drop(f"{owner}/clip")
