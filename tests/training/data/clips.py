"""Small datasets and videos for the tests of footage and prompts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataset_tools import archive
from dataset_tools.frames import encode_at_sizes
from dnnlib.frames_out import open_writer
from training.random import random_state

NUM_FRAMES = {"a/long": 40, "a/short": 12, "b/middle": 25}


def drifting(name: object, num_frames: int, size: tuple[int, int] = (16, 24)) -> np.ndarray:
    """Return smooth noise that drifts to the right, uint8 (T, H, W, 3), another for each name."""
    coarse = random_state("test-footage", 0, str(name)).randint(256, size=(4, 6, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return np.stack([np.roll(image, frame, axis=1) for frame in range(num_frames)])


def write_dataset(root: Path, sizes: Sequence[tuple[int, int]], fps: float = 30) -> Path:
    """Write three clips of 40, 12 and 25 frames at each of the sizes and return the folder."""
    with archive.ShardWriter(root, sizes, 0) as writer:
        for name, num_frames in NUM_FRAMES.items():
            with writer.clip(name) as add:
                for frame in drifting(name, num_frames, sizes[0]):
                    add(encode_at_sizes(frame, sizes))
    archive.describe_dataset(root, [writer.report({fps: len(NUM_FRAMES)})], 1, ())
    return root


def write_pictures(folder: Path, video: np.ndarray) -> Path:
    """Write frames as PNG whose names have no leading zeros, as other tools do."""
    folder.mkdir(parents=True)
    for frame, image in enumerate(video):
        Image.fromarray(image).save(folder / f"frame{frame}.png")
    return folder


VIDEO = drifting("prompt", 20)


def write(path: Path, frames: np.ndarray = VIDEO, fps: float = 12) -> Path:
    """Write frames as the kind of file that the suffix of `path` names, a folder of PNG without one."""
    with open_writer(path, *frames.shape[1:3], fps=fps) as writer:
        writer.write(frames)
    return path


def to_float(video: np.ndarray) -> torch.Tensor:
    """Return uint8 (..., T, H, W, 3) as float32 (..., 3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(video.copy()).movedim(-1, -4).float() / 127.5 - 1
