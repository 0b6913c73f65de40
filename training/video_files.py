"""Write chunks of generated frames as files: single videos or grids, images and a contact sheet."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.frames_out import SUFFIXES, FrameWriter, open_writer, publish, staging, write_picture
from dnnlib.video import whole_factor
from training.preview import contact_sheet
from training.sampling import Prompt, Request, Sampler, quantize

SHEET_FRAMES = 24
DEFAULT_FRAMES = 301
DEFAULT_FPS = 30.0
DEFAULT_CRF = 18


@dataclass(frozen=True)
class VideoPlan:
    """The files to write from the frames; the defaults are those of generate.py."""

    outdir: Path
    start: int = 0
    num_frames: int | None = DEFAULT_FRAMES  # None: until the prompt ends, or until stopped
    outputs: Mapping[str, str] = field(default_factory=lambda: {"video": "video"})  # name -> suffix of file names
    save_index: tuple[int, ...] = ()  # frames of "video" to write as PNG
    fps: float = DEFAULT_FPS
    format: str = "mp4"
    crf: int = DEFAULT_CRF
    grid: tuple[int, int] | None = None  # rows, columns
    batch: int = 4  # seeds computed at once
    prefix: str = ""  # prefix of all file names
    depends_on_length: bool = False  # whether frames of a shorter video differ

    def stem(self, seeds: Sequence[int], num_frames: int) -> str:
        """Return the stem of the file names for these seeds."""
        parts = [f"seed={seeds[0]}" if self.grid is None else f"seeds={format_seeds(seeds)}"]
        parts += [f"start={self.start}"] if self.start else []
        is_part = self.depends_on_length and num_frames != self.num_frames
        parts += [f"len={num_frames}of{self.num_frames}" if is_part else f"len={num_frames}"]
        parts += [f"grid={self.grid[0]}x{self.grid[1]}"] if self.grid else []
        return self.prefix + "_".join(parts)


def format_seeds(seeds: Sequence[int]) -> str:
    """Format seeds as text that `parse_seeds` reads: a range if they ascend by one, else a list."""
    in_a_row = list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
    return f"{seeds[0]}-{seeds[-1]}" if in_a_row and len(seeds) > 1 else ",".join(map(str, seeds))


class Sheet:
    """Evenly spaced frames of a video of known or unknown length."""

    def __init__(self, num_frames: int | None) -> None:
        self.picks: set[int] | None = None
        if num_frames is not None:
            self.picks = set(_spread(num_frames, SHEET_FRAMES))
        self.frames: list[np.ndarray] = []
        self.stride = 1
        self.num_seen = 0

    def add(self, frame: np.ndarray) -> None:
        """Add the next frame, uint8 (H, W, 3), which may be dropped."""
        if self.num_seen in self.picks if self.picks is not None else self.num_seen % self.stride == 0:
            self.frames.append(frame.copy())
        if len(self.frames) == 2 * SHEET_FRAMES:
            self.frames, self.stride = self.frames[::2], 2 * self.stride
        self.num_seen += 1

    def draw(self) -> np.ndarray:
        """Return the contact sheet of the frames."""
        frames = [self.frames[index] for index in _spread(len(self.frames), SHEET_FRAMES)]
        return contact_sheet(frames, columns=math.ceil((1.5 * len(frames)) ** 0.5))


def _spread(num_items: int, num_picks: int) -> list[int]:
    """Return at most `num_picks` evenly spaced indices, including the first and the last item."""
    return np.linspace(0, num_items - 1, min(num_picks, num_items)).round().astype(int).tolist()


# ----------------------------------------------------------------------------
# Frames to files.


class VideoFiles:
    """The files of one video: written to `stage`, a temporary folder, then moved to the output folder."""

    def __init__(
        self, plan: VideoPlan, seeds: Sequence[int], stage: Path, sizes: Mapping[str, tuple[int, int]]
    ) -> None:
        self.plan = plan
        self.seeds = seeds
        self.stage = stage
        self.sizes = sizes
        self.writers: dict[str, FrameWriter] = {}
        self.pictures: dict[int, Path] = {}
        self.files: list[Path] = []  # finished files
        self.sheet = Sheet(plan.num_frames)
        self.num_frames = 0

    def __enter__(self) -> "VideoFiles":
        rows, columns = self.plan.grid or (1, 1)
        with contextlib.ExitStack() as stack:
            for name, label in self.plan.outputs.items():
                height, width = self.sizes[name]
                writer = open_writer(
                    self._path(label + SUFFIXES[self.plan.format]),
                    *(height * rows, width * columns, self.plan.fps, self.plan.crf, self.plan.num_frames),
                    factor=whole_factor(height, width),  # small videos are enlarged
                )
                self.writers[name] = stack.enter_context(writer)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.stack.__exit__(*exception)

    def write(self, frames: dict[str, np.ndarray]) -> None:
        """Write the next frames of each output: uint8 (N, T, H, W, 3), N videos side by side."""
        for name, writer in self.writers.items():
            writer.write(tile(frames[name], self.plan.grid))
        for frame in tile(frames["video"], self.plan.grid):
            self.sheet.add(frame)
            if (index := self.plan.start + self.num_frames) in self.plan.save_index:
                self.pictures[index] = self._path(f"{index}.png")
                write_picture(self.pictures[index], frame)
            self.num_frames += 1

    def finish(self) -> None:
        """Close the files and move them to their final names, which state the number of frames."""
        stem = self.plan.stem(self.seeds, self.num_frames)
        outdir, suffix = self.plan.outdir, SUFFIXES[self.plan.format]
        for label in self.plan.outputs.values():
            self.files.append(publish(self._path(label + suffix), outdir / f"{stem}_{label}{suffix}"))
        for index, path in self.pictures.items():
            self.files.append(publish(path, outdir / f"{stem}_frame={index:04d}.png"))
        sheet = self._path("sheet.png")
        write_picture(sheet, self.sheet.draw())
        self.files.append(publish(sheet, outdir / f"{stem}_sheet.png"))

    def _path(self, name: str) -> Path:
        return self.stage / f"seed={self.seeds[0]}_{name}"


def tile(videos: np.ndarray, grid: tuple[int, int] | None) -> np.ndarray:
    """Arrange videos row by row: (N, T, H, W, 3) -> (T, rows * H, columns * W, 3)."""
    rows, columns = grid or (1, 1)
    _, num_frames, height, width, channels = videos.shape
    cells = videos.reshape(rows, columns, num_frames, height, width, channels).transpose(2, 0, 3, 1, 4, 5)
    return cells.reshape(num_frames, rows * height, columns * width, channels)


def stream(sampler: Sampler, seeds: Sequence[int], plan: VideoPlan, prompt: Prompt) -> Iterator[dict[str, np.ndarray]]:
    """Yield successive frames of all seeds, in batches of `plan.batch`: name -> uint8 (N, T, H, W, 3)."""
    size = min(plan.batch, sampler.max_batch or plan.batch)

    def draw(group: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
        for chunk in sampler.frames(Request(group, plan.start, plan.num_frames, prompt.of(group))):
            yield {name: quantize(frames).cpu().numpy() for name, frames in chunk.items()}

    groups = [draw(seeds[first : first + size]) for first in range(0, len(seeds), size)]
    for parts in zip(*groups, strict=True):
        yield {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def write_videos(
    sampler: Sampler,
    seeds: Sequence[int],
    plan: VideoPlan,
    prompt: Prompt | None = None,
    guard: Callable[[Iterator[Any]], Iterator[Any]] = iter,
    progress: Callable[[int], None] = lambda count: None,
) -> Iterator[VideoFiles]:
    """Write the videos of all seeds, and yield the files of each once they are finished.

    Videos that share a file, or have no end, are generated concurrently; others in batches of `plan.batch`. `guard` may
    stop the frames early, which shortens the videos. `progress` receives the number of new frames.
    """
    together = len(seeds) if plan.grid or plan.num_frames is None else plan.batch
    for first in range(0, len(seeds), together):
        group = seeds[first : first + together]
        shares = [group] if plan.grid else [[seed] for seed in group]
        with staging(plan.outdir) as stage:
            with contextlib.ExitStack() as stack:
                videos: list[VideoFiles] = []
                for frames in guard(stream(sampler, group, plan, prompt or Prompt())):
                    if not videos:
                        videos = [
                            stack.enter_context(VideoFiles(plan, share, stage, sampler.outputs)) for share in shares
                        ]
                    for index, video in enumerate(videos):
                        cells = slice(None) if plan.grid else slice(index, index + 1)
                        video.write({name: part[cells] for name, part in frames.items()})
                    progress(len(group) * frames["video"].shape[1])
            for video in videos:
                video.finish()
        yield from videos
