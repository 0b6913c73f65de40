"""Chunks of generated frames -> finished files: videos alone or side by side, pictures and a contact sheet."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.frames_out import SUFFIXES, FrameWriter, open_writer, publish, staging, write_picture
from dnnlib.video import whole_factor
from training.longvideogan.given_video import GivenVideo
from training.longvideogan.sampling import LowResSource, Pair, quantize
from training.preview import contact_sheet

SHEET_FRAMES = 24

Videos = LowResSource | Pair | GivenVideo


@dataclass(frozen=True)
class Plan:
    """What to make of the videos; the defaults are those of the command."""

    outdir: Path
    start: int = 0
    num_frames: int | None = 301  # None: until stopped
    kinds: tuple[str, ...] = ("sres",)  # "lres", "sres" or both; pictures show the last
    save_index: tuple[int, ...] = ()
    fps: float = 30.0
    format: str = "mp4"
    crf: int = 18
    grid: tuple[int, int] | None = None  # rows, columns
    batch: int = 4  # seeds computed at once
    prefix: str = ""  # of the names of all files
    depends_on_length: bool = False  # frames of a shorter video differ

    def stem(self, seeds: Sequence[int], num_frames: int) -> str:
        """The beginning of the names of the files that show these seeds."""
        parts = [f"seed={seeds[0]}" if self.grid is None else f"seeds={format_seeds(seeds)}"]
        parts += [f"start={self.start}"] if self.start else []
        is_part = self.depends_on_length and num_frames != self.num_frames
        parts += [f"len={num_frames}of{self.num_frames}" if is_part else f"len={num_frames}"]
        parts += [f"grid={self.grid[0]}x{self.grid[1]}"] if self.grid else []
        return self.prefix + "_".join(parts)


def format_seeds(seeds: Sequence[int]) -> str:
    """The shortest text that `parse_seeds` reads as these seeds, if they ascend by one; else a list."""
    in_a_row = list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
    return f"{seeds[0]}-{seeds[-1]}" if in_a_row and len(seeds) > 1 else ",".join(map(str, seeds))


class Sheet:
    """Evenly spaced frames of a video, whether or not its end is known."""

    def __init__(self, num_frames: int | None) -> None:
        self.picks: set[int] | None = None
        if num_frames is not None:
            self.picks = set(_spread(num_frames, SHEET_FRAMES))
        self.frames: list[np.ndarray] = []
        self.stride = 1
        self.num_seen = 0

    def add(self, frame: np.ndarray) -> None:
        """Look at the next frame, uint8 (H, W, 3)."""
        if self.num_seen in self.picks if self.picks is not None else self.num_seen % self.stride == 0:
            self.frames.append(frame.copy())
        if len(self.frames) == 2 * SHEET_FRAMES:
            self.frames, self.stride = self.frames[::2], 2 * self.stride
        self.num_seen += 1

    def draw(self) -> np.ndarray:
        """The frames, row after row."""
        frames = [self.frames[index] for index in _spread(len(self.frames), SHEET_FRAMES)]
        return contact_sheet(frames, columns=math.ceil((1.5 * len(frames)) ** 0.5))


def _spread(num_items: int, num_picks: int) -> list[int]:
    """At most `num_picks` indices, from the first item to the last."""
    return np.linspace(0, num_items - 1, min(num_picks, num_items)).round().astype(int).tolist()


# ----------------------------------------------------------------------------
# Frames to files.


class Film:
    """The files of one video: made in `stage`, a folder for what is not finished, then moved to where they belong."""

    def __init__(self, plan: Plan, seeds: Sequence[int], stage: Path, sizes: dict[str, tuple[int, int]]) -> None:
        self.plan = plan
        self.seeds = seeds
        self.stage = stage
        self.sizes = sizes
        self.writers: dict[str, FrameWriter] = {}
        self.pictures: dict[int, Path] = {}
        self.files: list[Path] = []  # the finished ones
        self.sheet = Sheet(plan.num_frames)
        self.num_frames = 0

    def __enter__(self) -> "Film":
        rows, columns = self.plan.grid or (1, 1)
        with contextlib.ExitStack() as stack:
            for kind in self.plan.kinds:
                height, width = (edge * self._factor(kind) for edge in self.sizes[kind])
                writer = open_writer(
                    self._path(kind + SUFFIXES[self.plan.format]),
                    *(height * rows, width * columns, self.plan.fps, self.plan.crf, self.plan.num_frames),
                )
                self.writers[kind] = stack.enter_context(writer)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.stack.__exit__(*exception)

    def write(self, frames: dict[str, np.ndarray]) -> None:
        """The next frames of each kind: uint8 (N, T, H, W, 3), N videos side by side."""
        for kind, writer in self.writers.items():
            factor = self._factor(kind)
            writer.write(tile(frames[kind].repeat(factor, axis=2).repeat(factor, axis=3), self.plan.grid))
        for frame in tile(frames[self.plan.kinds[-1]], self.plan.grid):
            self.sheet.add(frame)
            if (index := self.plan.start + self.num_frames) in self.plan.save_index:
                self.pictures[index] = self._path(f"{index}.png")
                write_picture(self.pictures[index], frame)
            self.num_frames += 1

    def finish(self) -> None:
        """Give the files, once closed, their names, which tell the number of frames that there are in the end."""
        stem = self.plan.stem(self.seeds, self.num_frames)
        outdir, suffix = self.plan.outdir, SUFFIXES[self.plan.format]
        for kind in self.plan.kinds:
            self.files.append(publish(self._path(kind + suffix), outdir / f"{stem}_{kind}{suffix}"))
        for index, path in self.pictures.items():
            self.files.append(publish(path, outdir / f"{stem}_frame={index:04d}.png"))
        sheet = self._path("sheet.png")
        write_picture(sheet, self.sheet.draw())
        self.files.append(publish(sheet, outdir / f"{stem}_sheet.png"))

    def _path(self, name: str) -> Path:
        return self.stage / f"seed={self.seeds[0]}_{name}"

    def _factor(self, kind: str) -> int:
        """How often pixels are repeated: in players small frames stay crisp, elsewhere pixels are kept as they are."""
        return 1 if self.plan.format in ("png", "npz") else whole_factor(*self.sizes[kind])


def tile(videos: np.ndarray, grid: tuple[int, int] | None) -> np.ndarray:
    """(N, T, H, W, 3) -> (T, rows * H, columns * W, 3), row by row."""
    rows, columns = grid or (1, 1)
    _, num_frames, height, width, channels = videos.shape
    cells = videos.reshape(rows, columns, num_frames, height, width, channels).transpose(2, 0, 3, 1, 4, 5)
    return cells.reshape(num_frames, rows * height, columns * width, channels)


def stream(source: Videos, seeds: Sequence[int], plan: Plan) -> Iterator[dict[str, np.ndarray]]:
    """Successive frames of all seeds, `plan.batch` of them computed at once:
    {"lres": uint8 (N, T, h, w, 3), "sres": uint8 (N, T, H, W, 3)}, of a low-resolution source without "sres"."""

    def draw(group: Sequence[int]) -> Iterator[list[np.ndarray]]:
        if isinstance(source, LowResSource):
            chunks = ((lres,) for lres in source.frames(group, plan.start, plan.num_frames))
        else:
            chunks = source.both(group, plan.start, plan.num_frames)
        for chunk in chunks:
            yield [quantize(frames).cpu().numpy() for frames in chunk]

    groups = [draw(seeds[first : first + plan.batch]) for first in range(0, len(seeds), plan.batch)]
    for parts in zip(*groups, strict=True):
        yield dict(zip(("lres", "sres"), map(np.concatenate, zip(*parts, strict=True)), strict=False))


def make_films(
    source: Videos,
    seeds: Sequence[int],
    plan: Plan,
    guard: Callable[[Iterator[Any]], Iterator[Any]] = iter,
    progress: Callable[[int], None] = lambda count: None,
) -> Iterator[Film]:
    """Make the videos of all seeds and give each film once its files are finished.

    Videos that share a file, or have no end, are made at the same time; others `plan.batch` at a time. `guard` may
    end the frames early: films then are as long as they have become. `progress` is told how many frames were made.
    """
    size = (source.height, source.width)
    lres_size = source.lres_size if isinstance(source, GivenVideo) else size
    lres_size = (source.lres.height, source.lres.width) if isinstance(source, Pair) else lres_size
    sizes = {"lres": lres_size, "sres": size}
    together = len(seeds) if plan.grid or plan.num_frames is None else plan.batch
    for first in range(0, len(seeds), together):
        group = seeds[first : first + together]
        shares = [group] if plan.grid else [[seed] for seed in group]
        with staging(plan.outdir) as stage:
            with contextlib.ExitStack() as stack:
                films: list[Film] = []
                for frames in guard(stream(source, group, plan)):
                    if not films:
                        films = [stack.enter_context(Film(plan, share, stage, sizes)) for share in shares]
                    for index, film in enumerate(films):
                        cells = slice(None) if plan.grid else slice(index, index + 1)
                        film.write({kind: videos[cells] for kind, videos in frames.items()})
                    progress(len(group) * frames["lres"].shape[1])
            for film in films:
                film.finish()
        yield from films
