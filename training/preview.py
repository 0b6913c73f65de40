"""Write previews of training: real clips once, and generated videos of the same seeds at every preview."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dnnlib.util import atomic_path
from dnnlib.video import VideoWriter
from training.data.dataset import ClipDataset, Size
from training.data.prompts import ClipPrompt
from training.random import random_state
from training.sampling import Needs, Prompt

CHUNK_FRAMES = 16  # frames of real clips read at once
SHEET_COLUMNS = 8


class RealClips:
    """A few fixed clips of a dataset, for comparison and as the prompt of previews.

    Frame 0 of the preview is frame `needs.past` of a clip, so that the context frames before and after the preview are
    real. `num_frames` is less than requested if no clip of the dataset is long enough.
    """

    def __init__(
        self, dataset: ClipDataset, sizes: Sequence[Size], num_videos: int, num_frames: int, needs: Needs, seed: int
    ):
        longest = max(clip.num_frames for clip in dataset.clips)
        self.dataset, self.sizes, self.needs = dataset, sizes, needs
        around = needs.past + needs.future
        limits = needs.frames or needs.streams
        self.num_frames = min(num_frames, longest - around)
        assert self.num_frames > 0, f"no clip has more than {around} frames"
        eligible = dataset.eligible(self.num_frames + around)
        self.generated_frames = self.num_frames if limits else num_frames
        self.clips = np.resize(random_state("preview", seed, 0).permutation(eligible), num_videos).tolist()

    def chunks(self, size: Size) -> Iterator[np.ndarray]:
        """Yield all frames of the preview at (height, width) in chunks: uint8 (N, T, H, W, 3)."""
        for start in range(self.needs.past, self.needs.past + self.num_frames, CHUNK_FRAMES):
            frames = range(start, min(start + CHUNK_FRAMES, self.needs.past + self.num_frames))
            yield np.stack([self.dataset.read(clip, size, frames) for clip in self.clips])

    def prompt(self) -> Prompt:
        """Return the real frames and streams as the prompt of a sampler."""
        return ClipPrompt(
            self.dataset,
            [(clip, self.needs.past) for clip in self.clips],
            {name: store.read for name, store in self.dataset.streams.items()},
        )


def write_preview(stem: Path, chunks: Iterable[np.ndarray | torch.Tensor], num_frames: int, fps: float) -> None:
    """Write `<stem>.mp4`, all videos in a grid, and `<stem>.png`, a row of evenly spaced frames for each video.

    `chunks` are successive uint8 (N, T, H, W, 3) of `num_frames` frames in total; one chunk is in memory at a time.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    arrays = (chunk.cpu().numpy() if isinstance(chunk, torch.Tensor) else chunk for chunk in chunks)
    head = next(arrays)
    num_videos, _, height, width, _ = head.shape
    rows = max(row for row in range(1, math.isqrt(num_videos) + 1) if num_videos % row == 0)
    picks = np.unique(np.linspace(0, num_frames - 1, SHEET_COLUMNS).round().astype(int))
    columns = []
    done = 0
    with VideoWriter(stem.with_suffix(".mp4"), height * rows, width * num_videos // rows, fps, enlarge=True) as writer:
        for chunk in itertools.chain([head], arrays):
            writer.write(_tile(chunk, rows))
            columns += [chunk[:, pick - done] for pick in picks if done <= pick < done + chunk.shape[1]]
            done += chunk.shape[1]
        assert done == num_frames, f"expected {num_frames} frames, got {done}"
    sheet = np.stack(columns, axis=2).reshape(num_videos * height, len(columns) * width, 3)
    sheet = sheet.repeat(writer.factor, axis=0).repeat(writer.factor, axis=1)
    with atomic_path(stem.with_suffix(".png")) as path:
        Image.fromarray(sheet).save(path)


def contact_sheet(frames: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Arrange images uint8 (H, W, 3) row by row: uint8 (rows * H, columns * W, 3); empty cells are black."""
    height, width, _ = frames[0].shape
    rows = -(-len(frames) // columns)
    sheet = np.zeros((rows * height, columns * width, 3), np.uint8)
    for index, frame in enumerate(frames):
        row, column = divmod(index, columns)
        sheet[row * height : (row + 1) * height, column * width : (column + 1) * width] = frame
    return sheet


def _tile(videos: np.ndarray, rows: int) -> np.ndarray:
    """Arrange videos column by column: (N, T, H, W, 3) -> (T, rows * H, N / rows * W, 3)."""
    num_videos, num_frames, height, width, channels = videos.shape
    grid = videos.reshape(num_videos // rows, rows, num_frames, height, width, channels)
    grid = grid.transpose(2, 1, 3, 0, 4, 5)  # (T, rows, H, columns, W, 3)
    return grid.reshape(num_frames, rows * height, num_videos // rows * width, channels)


if __name__ == "__main__":  # alias of the command that draws curves
    from training.curves import main

    main()
