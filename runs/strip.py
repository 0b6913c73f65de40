"""Write an animated strip of held-out clips: real frames above, below those that a model generates in their place.

# Four clips, three seconds
python -m runs.strip --dataset=data/labdoom-val --model=MODEL.pkl --out=docs/demo.webp

# Three clips, two seconds, smaller
python -m runs.strip --dataset=data/labdoom-val --model=MODEL.pkl --out=strip.gif --clips=3 --frames=60 --enlarge=2

Each column is a clip. The model is given its first frames, as many as it needs, and the actions of all frames where it
takes actions; the strip begins with the frame after them. Frames are enlarged by repeating pixels.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

from dnnlib.util import atomic_path
from torch_utils.precision import AUTO, set_precision
from training.command_line import as_help, model_options, take_model
from training.data.dataset import ClipDataset
from training.data.given_prompt import stream_readers
from training.data.prompts import ClipPrompt
from training.network_file import ModelPath
from training.random import random_state
from training.sampling import Request, Sampler, open_sampler

GAP, LINE = 6, 2  # pixels between columns, and between a real frame and the generated one
QUALITIES = (90, 80, 70, 60, 50, 40)  # of WebP, tried in this order
SUFFIXES = (".webp", ".gif")
COUNT = click.IntRange(min=1)


def choose_clips(dataset: ClipDataset, num_frames: int, count: int, seed: int) -> list[int]:
    """Return the numbers of `count` random clips of at least `num_frames` frames.

    Raises `ValueError` if there are fewer.
    """
    eligible = dataset.eligible(num_frames)
    if len(eligible) < count:
        raise ValueError(
            f"{dataset.path} has {len(eligible)} clips of {num_frames} frames or more, {count} were asked for: use "
            "fewer clips or fewer frames"
        )
    return random_state("strip", seed, 0).permutation(eligible)[:count].tolist()


def continue_clips(
    sampler: Sampler, dataset: ClipDataset, clips: Sequence[int], num_frames: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the frames of clips after the context that the sampler needs, and those that it generates instead.

    Both are uint8 (N, T, H, W, 3). Raises `ValueError` for a sampler that does not continue videos.
    """
    needs = sampler.needs
    if needs.follows or not needs.past:
        raise ValueError("the model does not continue videos: give one that is prompted with frames, such as a world")
    windows = [(clip, needs.past) for clip in clips]
    prompt = ClipPrompt(dataset, windows, stream_readers(dataset, sampler, list(needs.streams)))
    request = Request(list(range(len(clips))), num_frames=num_frames, prompt=prompt)
    generated = torch.cat([chunk.cpu() for chunk in sampler.video(request)], dim=1).numpy()
    frames = range(needs.past, needs.past + num_frames)
    return np.stack([dataset.read(clip, sampler.size, frames) for clip in clips]), generated


def arrange(real: np.ndarray, generated: np.ndarray, enlarge: int) -> np.ndarray:
    """Return real videos above generated ones, a column each: uint8 (N, T, H, W, 3) -> (T, height, width, 3)."""
    assert real.shape == generated.shape, f"{real.shape} and {generated.shape} do not lie above each other"
    pairs = np.stack([real, generated]).repeat(enlarge, axis=3).repeat(enlarge, axis=4)
    _, num_videos, num_frames, height, width, _ = pairs.shape
    shape = (num_frames, 2 * height + LINE, num_videos * (width + GAP) - GAP, 3)
    strip = np.full(shape, 255, np.uint8)
    for row, videos in enumerate(pairs):
        for column, video in enumerate(videos):
            top, left = row * (height + LINE), column * (width + GAP)
            strip[:, top : top + height, left : left + width] = video
    return strip


def check_suffix(path: Path) -> None:
    """Raise `ValueError` if the name of a file is not that of an animation."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"cannot write {path}: use a name that ends with {' or '.join(SUFFIXES)}")


def write_animation(path: Path, frames: np.ndarray, fps: float, max_bytes: int) -> int:
    """Write frames, uint8 (T, H, W, 3), as an endless animated WebP or GIF, and return the bytes of the file.

    A WebP has the best of some qualities that fits. Raises `ValueError` for another suffix, and if nothing fits.
    """
    check_suffix(path)
    images = [Image.fromarray(frame) for frame in frames]
    unit = 1 if path.suffix == ".webp" else 10  # of times, in milliseconds
    ends = [round(1000 * i / fps / unit) * unit for i in range(len(images) + 1)]
    duration = [end - begin for begin, end in zip(ends, ends[1:], strict=False)]
    size = 0
    for quality in QUALITIES if path.suffix == ".webp" else (None,):
        options = {"quality": quality, "method": 4} if quality else {"optimize": True}
        file = io.BytesIO()
        images[0].save(
            file, path.suffix[1:], save_all=True, append_images=images[1:], duration=duration, loop=0, **options
        )
        size = file.tell()
        if size <= max_bytes:
            with atomic_path(path) as temporary:
                temporary.write_bytes(file.getvalue())
            return size
    raise ValueError(
        f"{path} would have {size / 1e6:.2f} MB, more than {max_bytes / 1e6:.2f}: use fewer frames or clips, or "
        "enlarge them less"
    )


def write_strip(
    path: Path, root: Path, models: Sequence[str | ModelPath], options: Mapping[str, Any] | None = None,
    num_clips: int = 4, num_frames: int = 90, stride: int = 2, enlarge: int = 3, max_bytes: int = 1_500_000,
    seed: int = 0,
) -> int:  # fmt: skip
    """Write the strip of a model on clips of the dataset `root`, and return its bytes; see the options of the command.

    Raises `ValueError` for what cannot be opened, is too short, or does not fit.
    """
    check_suffix(path)
    sampler = open_sampler(models, options)
    set_precision(sampler.networks, AUTO)
    dataset = ClipDataset(root, [sampler.size])
    clips = choose_clips(dataset, sampler.needs.past + num_frames, num_clips, seed)
    real, generated = continue_clips(sampler, dataset, clips, num_frames)
    frames = arrange(real[:, ::stride], generated[:, ::stride], enlarge)
    return write_animation(path, frames, dataset.fps / stride, max_bytes)


@click.command(help=as_help(__doc__))
@click.option("--dataset", "root", help="Held-out clips", required=True, type=click.Path(path_type=Path))
@model_options()
@click.option("--out", "path", help="File to write: .webp or .gif", required=True, type=click.Path(path_type=Path))
@click.option("--clips", "num_clips", help="Columns", default=4, show_default=True, type=COUNT)
@click.option("--frames", "num_frames", help="Frames to generate", default=90, show_default=True, type=COUNT)
@click.option("--stride", help="Show every so many frames", default=2, show_default=True, type=COUNT)
@click.option("--enlarge", help="Times that each pixel is repeated", default=3, show_default=True, type=COUNT)
@click.option("--max-bytes", help="Largest file", default=1_500_000, show_default=True, type=COUNT)
@click.option("--seed", help="Chooses the clips", default=0, show_default=True)
def main(root: Path, path: Path, **arguments: Any) -> None:
    """Run the command; the help text is the module's docstring."""
    given = take_model(arguments)
    if not given.models:
        raise click.UsageError("--model is missing: give a model that continues videos")
    try:
        size = write_strip(path, root, given.models, given.options, **arguments)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{path}  {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
