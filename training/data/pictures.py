"""Read images as frames: list the image files of a folder in order, decode, crop and resize them.

Dataset makers, metrics and prompts read every image with `read_image` and resize every frame with
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

# Formats that Pillow registers but cannot read itself.
_STUBS = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case, of all image formats that Pillow reads."""
    extensions = Image.registered_extensions()  # also fills Image.OPEN
    readable = Image.OPEN.keys() - {*_STUBS}
    return frozenset(suffix for suffix, kind in extensions.items() if kind in readable)


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Return a sort key that compares the numbers in names by value: 2.png comes before 10.png.

    Zero-padded numbers sort as plain text does.
    """
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def find_frames(folder: Path) -> dict[str, list[str]]:
    """Return the names of the images in each folder at or below `folder`, by the folder's path inside `folder`.

    Names are in natural order, folders sorted by path; "." is `folder` itself. Hidden files, hidden folders and linked
    folders are skipped.
    """
    found = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if images := _pictures_among(names):
            found[Path(parent).relative_to(folder)] = images
    return {path.as_posix(): found[path] for path in sorted(found)}


def list_pictures(folder: Path) -> list[Path]:
    """Return the images directly in a folder, in natural order of their names."""
    return [folder / name for name in _pictures_among(path.name for path in folder.iterdir() if path.is_file())]


def iter_pictures(folder: Path) -> Iterator[np.ndarray]:
    """Yield the images of a folder in natural order of their names, each uint8 (H, W, 3).

    Raises `ValueError` for a folder without images and for images that `read_image` rejects.
    """
    paths = list_pictures(folder)
    if not paths:
        raise ValueError(f"{folder} holds no images: expected files such as 000000.png, in the order of their names")
    for path in paths:
        yield read_image(path)


def read_image(path: Path) -> np.ndarray:
    """Read an image as uint8 (H, W, 3): EXIF orientation applied, in sRGB, composited over black if transparent.

    Colours are converted if the image has a colour profile; 16-bit grey is reduced to 8 bits. Raises `ValueError`,
    naming the file, if it cannot be read or holds several images.
    """
    try:
        with Image.open(path) as image:
            # JPEGs of some cameras (MPO) hold additional images after the photograph; any other sequence is rejected.
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise ValueError(f"it holds {getattr(image, 'n_frames', 1)} images; store one in each file")
            image.load()
            return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    except Exception as error:  # decoders raise many exception types for damaged files
        raise ValueError(f"{path} cannot be a frame: {error}") from error


def center_crop_and_resize(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crop the centre of `frame` (uint8 H W 3) to the aspect ratio of height x width, then resize it with a Lanczos
    filter.

    Only one dimension is cropped, so the result shows as much of the frame as its aspect ratio allows. A frame of that
    size is returned unchanged.
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
    """Return the visible names with an image suffix, in natural order."""
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
    except ImageCms.PyCMSError:  # a damaged profile, or one for another colour mode, is ignored
        return image.convert("RGB")
    assert converted is not None
    return converted


def _rounded(box: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
    left, top, right, bottom = box
    return round(left), round(top), round(right), round(bottom)
