"""Read pictures as frames: which files of a folder are pictures, in which order, and what their pixels are.

Dataset makers, metrics and prompts read every picture with `read_image` and resize every frame with
`center_crop_and_resize`, so that a file gives the same pixels in all of them.
"""

import functools
import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

# Formats that Pillow registers but does not read by itself.
_STUBS = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case, of all image formats that Pillow reads."""
    extensions = Image.registered_extensions()  # which also fills Image.OPEN
    readable = Image.OPEN.keys() - {*_STUBS}
    return frozenset(suffix for suffix, kind in extensions.items() if kind in readable)


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Return a sort key that compares the numbers in names by value: 2.png comes before 10.png.

    Numbers padded with zeros sort as plain text does.
    """
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def find_frames(folder: Path) -> dict[str, list[str]]:
    """Return the names of the pictures in each folder at or below `folder`, by the folder's path inside `folder`.

    Names are in natural order, folders sorted by path; "." is `folder` itself. Hidden files and folders and linked
    folders are not looked at.
    """
    found = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if images := _pictures_among(names):
            found[Path(parent).relative_to(folder)] = images
    return {path.as_posix(): found[path] for path in sorted(found)}


def list_pictures(folder: Path) -> list[Path]:
    """Return the pictures that lie directly in a folder, in natural order of their names."""
    return [folder / name for name in _pictures_among(path.name for path in folder.iterdir() if path.is_file())]


def iter_pictures(folder: Path) -> Iterator[np.ndarray]:
    """Yield the pictures of a folder in natural order of their names, each uint8 (H, W, 3).

    Raises `ValueError` for a folder without pictures and for what `read_image` refuses.
    """
    paths = list_pictures(folder)
    if not paths:
        raise ValueError(f"{folder} holds no pictures: expected files such as 000000.png, in the order of their names")
    for path in paths:
        yield read_image(path)


def read_image(path: Path) -> np.ndarray:
    """Return an image as uint8 (H, W, 3): upright, in sRGB, over black where it is transparent.

    Colours are converted if the image holds a profile; 16 bits of grey lose the lower 8. Raises `ValueError`, naming
    the file, if it cannot be read or holds several pictures.
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


def center_crop_and_resize(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crop the middle of `frame` (uint8 H W 3) to the aspect of height x width, then resize it with a Lanczos filter.

    Only the dimension that is too long is cropped, so the result shows as much of the frame as its aspect allows. A
    frame of that size is returned as it is.
    """
    image = Image.fromarray(frame)
    if (image.height, image.width) == (height, width):
        return frame
    height_ratio, width_ratio = image.height / height, image.width / width
    if height_ratio > width_ratio:
        top = (image.height - height * width_ratio) // 2
        image = image.crop(_rounded((0, top, image.width, top + height * width_ratio)))
    elif width_ratio > height_ratio:
        left = (image.width - width * height_ratio) // 2
        image = image.crop(_rounded((left, 0, left + width * height_ratio, image.height)))
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))


# ----------------------------------------------------------------------------
# Details.


def _pictures_among(names: Iterable[str]) -> list[str]:
    """Return those names, not hidden, that have a picture's suffix, in natural order."""
    suffixes = image_suffixes()
    found = (name for name in names if not name.startswith(".") and Path(name).suffix.lower() in suffixes)
    return sorted(found, key=natural_key)


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


def _rounded(box: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
    left, top, right, bottom = box
    return round(left), round(top), round(right), round(bottom)
