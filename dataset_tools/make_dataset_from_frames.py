"""Make a dataset of clips from a folder of folders of images, one image per frame.

Example:
    python -m dataset_tools.make_dataset_from_frames my_frames data/mine --source-fps 25
"""

import fractions
import functools
import itertools
import json
import math
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from dataset_tools import making
from dnnlib import util
from dnnlib.json_file import listed, mapped, read_json, record, text
from training.data.listing import Remarks, list_footage
from training.data.pictures import PictureClip, picture_clips
from training.data.pictures import find_frames as find_frames
from training.data.pictures import read_image as read_image

LISTING = "listing.json"

_POLL_SEC = 2.0


def choose_frames(num_frames: int, source_fps: float, recipe: making.Recipe) -> list[int]:
    """Return the indices of the frames, recorded at `source_fps`, to store at the recipe's times and rate."""
    # As decimals, as typed: 0.1 s at 30 fps is exactly 3 frames.
    source, wanted, trim_start, trim_end = (
        fractions.Fraction(repr(value))
        for value in (source_fps, recipe.fps or source_fps, recipe.trim_start, recipe.trim_end)
    )
    first, last = math.ceil(trim_start * source), math.floor(num_frames - trim_end * source)
    chosen = (first + math.floor(index * source / wanted) for index in itertools.count())
    return list(itertools.takewhile(lambda index: index < last, chosen))


def _open(clip: PictureClip, source_fps: float, remarks: Remarks, recipe: making.Recipe) -> making.Footage:
    clip.check()
    chosen = choose_frames(len(clip.paths), source_fps, recipe)
    if not chosen:
        raise making.TooShort(f"nothing is left of {clip.name} after trimming: it holds {len(clip.paths)} frames")
    clip.remark(remarks)
    return making.Footage(recipe.fps or source_fps, _read(clip, chosen))


def _read(clip: PictureClip, chosen: Sequence[int]) -> Generator[np.ndarray, None, None]:
    for index, repeats in itertools.groupby(chosen):
        image = clip.read(index)
        for _ in repeats:
            yield image


def _describe(clip: PictureClip, source_fps: float, remarks: Remarks, recipe: making.Recipe) -> str:
    clip.check()
    clip.remark(remarks)
    image = clip.read(0)
    num_frames = len(choose_frames(len(clip.paths), source_fps, recipe))
    return f"{len(clip.paths)} images, the first {image.shape[0]}x{image.shape[1]}, make {num_frames} frames"


def list_frames(folder: Path) -> dict[str, list[str]]:
    """Return the result of `find_frames`, and print what is left out."""
    listing = list_footage(folder)
    for path in [*listing.videos, *listing.arrays]:
        listing.remarks.add(
            "Left out, a video or array, of which make_dataset_from_videos takes videos",
            path.relative_to(folder).as_posix(),
        )
    for line in listing.remarks.lines():
        click.echo(line, err=True)
    if not listing.pictures:
        remedy = ", but videos, which make_dataset_from_videos takes" if listing.videos else ""
        raise ValueError(f"{folder} holds no images that Pillow reads, such as .png or .jpg{remedy}")
    return listing.pictures


def wait_for_listing(path: Path, folder: Path) -> dict[str, list[str]]:
    """Wait for the result of `find_frames(folder)` that another process writes to `path`, and return it."""
    if not path.exists():
        click.echo(f"Waiting for {path}, which a partition without --wait-for-list-file writes.", err=True)
    while not path.exists():
        time.sleep(_POLL_SEC)
    listing = read_json(path, record({"input_dir": text, "folders": mapped(listed(text))}), "delete it to list anew")
    if listing["input_dir"] != str(folder.resolve()):
        raise ValueError(f"{path} lists {listing['input_dir']}, not {folder.resolve()}; delete it to list anew")
    return listing["folders"]


def write_listing(path: Path, folder: Path, found: dict[str, list[str]]) -> None:
    """Write the result of `find_frames` for the processes that wait for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with util.atomic_path(path) as temporary:
        temporary.write_text(json.dumps({"input_dir": str(folder.resolve()), "folders": found}))


@click.command(epilog="Example: python -m dataset_tools.make_dataset_from_frames my_frames data/mine --source-fps 25")
@click.argument("input_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("output_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--source-fps",
    help="Frames per second at which the images were recorded",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
)
@click.option(
    "--wait-for-list-file",
    help="Wait for the file listing of the partition that runs without this option, rather than scan all folders",
    is_flag=True,
)
@click.option(
    "--keep-gaps",
    help="Keep the frames of a folder in one clip, even where numbers in their names are missing",
    is_flag=True,
)
@making.maker_options()
def main(
    input_dir: Path,
    output_dir: Path,
    source_fps: float,
    wait_for_list_file: bool,
    keep_gaps: bool,
    recipe: making.Recipe,
    job: dict[str, Any],
) -> None:
    """Store each folder below INPUT_DIR that directly holds images as a clip of a dataset in OUTPUT_DIR.

    Frames follow the numbers in their names; where numbers are missing the clip is divided, unless --keep-gaps is
    given. Frames may differ in size, and are centre-cropped to the aspect ratio of each size. Images of any kind become
    RGB: EXIF orientation is applied, colour profiles are converted to sRGB, and transparent images are composited over
    black. Even a JPEG of the right size is encoded again, so that all frames have the same quality; this changes it by
    a few levels of 255. A folder with a broken image is reported and left out. The default sizes are 36x64 and 144x256,
    since training needs a small and a large size of the same clips.
    """
    if wait_for_list_file:
        found = wait_for_listing(output_dir / LISTING, input_dir)
    else:
        found = list_frames(input_dir)
        if job["partition"] is not None and not job["dry_run"]:
            write_listing(output_dir / LISTING, input_dir, found)
    remarks = Remarks()
    clips = picture_clips(input_dir, found, remarks, keep_gaps)
    for line in remarks.lines():
        click.echo(f"{line}; --keep-gaps keeps the frames of a folder together", err=True)
    remarks = Remarks()
    sources = []
    for clip in clips:
        details = (clip, source_fps, remarks)
        sources.append(
            making.Source(
                clip.name, clip.group, functools.partial(_open, *details), functools.partial(_describe, *details)
            )
        )
    facts = {"source_fps": source_fps, **({"keep_gaps": True} if keep_gaps else {})}
    origin, packages = input_dir.resolve().name, ("pillow", "numpy")
    try:
        making.make(output_dir, sources, recipe, **job, origin=origin, packages=packages, facts=facts)
    finally:
        for line in remarks.lines():
            click.echo(line, err=True)


if __name__ == "__main__":
    main()
