"""Make a dataset of clips from a folder of folders of images, one image a frame.

Example:
  python -m dataset_tools.make_dataset_from_frames my_frames data/mine --source-fps 25
"""

import fractions
import functools
import io
import itertools
import json
import math
import os
import re
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image, ImageCms, ImageOps

from dataset_tools import making
from dnnlib import util

LISTING = "listing.json"

# Registered by Pillow, which however reads none of them by itself.
_STUBS = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")

_POLL_SEC = 2.0


def image_suffixes() -> set[str]:
    """The suffixes, in small letters, of all kinds of image that Pillow reads."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN.keys() - {*_STUBS}}


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts numbers in names by value: 2.png before 10.png. Numbers padded with zeros sort as plain text does."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def find_frames(folder: Path) -> dict[str, list[str]]:
    """Folders at or below `folder` that hold images -> the names of these in order; sorted by path, "." is `folder`.

    Hidden files and folders and linked folders are not looked at.
    """
    suffixes = image_suffixes()
    found = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = [name for name in names if not name.startswith(".") and Path(name).suffix.lower() in suffixes]
        if images:
            found[Path(parent).relative_to(folder)] = sorted(images, key=natural_key)
    return {path.as_posix(): found[path] for path in sorted(found)}


def name_clips(found: dict[str, list[str]], folder: Path) -> dict[str, str]:
    """Clip path -> folder with its images: the same, but images in `folder` itself make a clip of its name."""
    name = folder.resolve().name
    if "." in found and name in found:
        raise ValueError(f"{folder} and {folder / name} would make the same clip {name}; rename the latter")
    return {name if path == "." else path: path for path in found}


def read_image(path: Path) -> np.ndarray:
    """An image as uint8 (H, W, 3): upright, in sRGB, over black where it is transparent.

    Colours are converted if the image holds a profile; 16 bits of grey lose the lower 8. ValueError, naming the file,
    if it cannot be read or holds several pictures.
    """
    try:
        with Image.open(path) as image:
            # Some cameras' JPEGs hold further pictures after the photograph; any other sequence is not a frame.
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise ValueError(f"it holds {getattr(image, 'n_frames', 1)} pictures; store one in each file")
            image.load()
            return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    except Exception as error:  # readers of damaged files fail in all kinds of ways
        raise ValueError(f"{path} cannot be a frame: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.dtype.kind == "f" or values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(
                f"its pixels are {values.dtype} from {values.min()} to {values.max()}; convert it to 8 bits"
            )
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    elif image.mode == "P" or (profile is None and image.mode != "RGB"):
        image = image.convert("RGB")
    return image if profile is None else _to_srgb(image, profile)


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image.convert("RGB")
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except ImageCms.PyCMSError:  # a profile that is damaged or for another kind of image says nothing
        return image.convert("RGB")
    assert converted is not None
    return converted


def choose_frames(num_frames: int, source_fps: float, recipe: making.Recipe) -> list[int]:
    """Which of the frames, taken at `source_fps`, to store: those shown at the times of the recipe's rate."""
    # Decimals as they were typed: 0.1 s at 30 a second are 3 frames.
    source, wanted, trim_start, trim_end = (
        fractions.Fraction(repr(value))
        for value in (source_fps, recipe.fps or source_fps, recipe.trim_start, recipe.trim_end)
    )
    first, last = math.ceil(trim_start * source), math.floor(num_frames - trim_end * source)
    chosen = (first + math.floor(index * source / wanted) for index in itertools.count())
    return list(itertools.takewhile(lambda index: index < last, chosen))


def _open(folder: Path, names: Sequence[str], source_fps: float, recipe: making.Recipe) -> making.Footage:
    chosen = choose_frames(len(names), source_fps, recipe)
    if not chosen:
        raise ValueError(f"nothing is left of {folder} after trimming: it holds {len(names)} frames")
    return making.Footage(recipe.fps or source_fps, _read([folder / names[index] for index in chosen]))


def _read(paths: Sequence[Path]) -> Generator[np.ndarray, None, None]:
    for path, repeats in itertools.groupby(paths):
        image = read_image(path)
        for _ in repeats:
            yield image


def _describe(folder: Path, names: Sequence[str], source_fps: float, recipe: making.Recipe) -> str:
    image = read_image(folder / names[0])
    num_frames = len(choose_frames(len(names), source_fps, recipe))
    return f"{len(names)} images, the first {image.shape[0]}x{image.shape[1]}, make {num_frames} frames"


def wait_for_listing(path: Path, folder: Path) -> dict[str, list[str]]:
    """What `find_frames(folder)` found in another process, which writes it to `path`."""
    if not path.exists():
        click.echo(f"Waiting for {path}, which a partition without --wait-for-list-file writes.", err=True)
    while not path.exists():
        time.sleep(_POLL_SEC)
    listing = json.loads(path.read_text())
    if listing["input_dir"] != str(folder.resolve()):
        raise ValueError(f"{path} lists {listing['input_dir']}, not {folder.resolve()}; delete it to list anew")
    return listing["folders"]


def write_listing(path: Path, folder: Path, found: dict[str, list[str]]) -> None:
    """Tell those that wait for it what was found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with util.atomic_path(path) as temporary:
        temporary.write_text(json.dumps({"input_dir": str(folder.resolve()), "folders": found}))


@click.command(epilog="Example: python -m dataset_tools.make_dataset_from_frames my_frames data/mine --source-fps 25")
@click.argument("input_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("output_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--source-fps",
    help="Frames a second at which the images were taken",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
)
@click.option(
    "--wait-for-list-file",
    help="Wait for the listing that the partition started without this writes, rather than look through all folders",
    is_flag=True,
)
@making.maker_options()
def main(
    input_dir: Path,
    output_dir: Path,
    source_fps: float,
    wait_for_list_file: bool,
    recipe: making.Recipe,
    job: dict[str, Any],
) -> None:
    """Store each folder below INPUT_DIR that directly holds images as a clip of a dataset in OUTPUT_DIR.

    Frames follow the numbers in their names, may differ in size, and are cropped around their middle to the aspect of
    each size. Images of any kind become RGB: turned upright, converted to sRGB if they hold a profile, laid over black
    where they are transparent. Even a JPEG of the right size is coded anew, so that all frames have the same quality;
    that changes it by a few levels of 255. A folder with a broken image is named and left out. The sizes are 36x64 and
    144x256 unless given, since training needs a small and a large size of the same clips.
    """
    if wait_for_list_file:
        found = wait_for_listing(output_dir / LISTING, input_dir)
    else:
        found = find_frames(input_dir)
        if job["partition"] is not None and not job["dry_run"]:
            write_listing(output_dir / LISTING, input_dir, found)
    if not found:
        raise ValueError(f"{input_dir} holds no images that Pillow reads, such as .png or .jpg")
    sources = []
    for name, path in name_clips(found, input_dir).items():
        details = (input_dir / path, found[path], source_fps)
        sources.append(
            making.Source(name, name, functools.partial(_open, *details), functools.partial(_describe, *details))
        )
    facts = {"source_fps": source_fps}
    origin, packages = input_dir.resolve().name, ("pillow", "numpy")
    making.make(output_dir, sources, recipe, **job, origin=origin, packages=packages, facts=facts)


if __name__ == "__main__":
    main()
