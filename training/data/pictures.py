"""Read images as frames: order the image files of a folder, decode, crop and resize them.

Dataset makers, metrics and prompts read every image with `read_image` and resize every frame with
`center_crop_and_resize`, so that a file gives the same pixels in all of them. `training.data.frame_order` defines which
images of a folder are successive frames.
"""

import dataclasses
import functools
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath

import numpy as np
from PIL import Image, ImageCms, ImageOps

from training.data import reduction
from training.data.frame_order import natural_key as natural_key
from training.data.frame_order import order_frames
from training.data.listing import Remarks, clip_name, free_name, list_footage
from training.data.listing import image_suffixes as image_suffixes

_SAMPLES = 9  # images of a clip that are looked at first, to find how many bits its values have


def find_frames(folder: Path) -> dict[str, list[str]]:
    """Return the names of the images in each folder at or below `folder`, by the folder's path inside `folder`.

    Folders are sorted by path; "." is `folder` itself. See `list_footage` for what is left out.
    """
    return list_footage(folder).pictures


@dataclasses.dataclass(frozen=True)
class PictureClip:
    """Image files that are successive frames; `group` is the name of their folder, `problem` why they are no clip."""

    name: str
    group: str
    paths: tuple[Path, ...]
    problem: str | None = None

    def check(self) -> None:
        """Raise `ValueError` if there is a problem."""
        if self.problem is not None:
            raise ValueError(self.problem)

    @functools.cached_property
    def _highest(self) -> tuple[int, int]:
        """Return the highest values: of 16-bit grey images, and of the upper 8 bits of 16-bit colours.

        Of a clip that is bright enough for 16 bits, or has 8, only some images are looked at.
        """
        num_left = len(self.paths) - 1
        samples = [self.paths[num_left * part // (_SAMPLES - 1)] for part in range(_SAMPLES)]
        highest = 0, 0
        for number, path in enumerate([*samples, *self.paths]):
            grey, colour = _highest_deep(path)
            highest = max(highest[0], grey), max(highest[1], colour)
            if number >= _SAMPLES - 1 and (highest[0] >= 1 << 12 or highest[1] >= 1 << 4 or highest == (0, 0)):
                break
        return highest

    @property
    def bits(self) -> int:
        """Return how many bits the values of 16-bit grey images have: 8 or 12 if no value of the clip exceeds them.

        Cameras of 12 bits store their values as they are. A whole clip so dark is not likely to have 16 bits.
        """
        return next((bits for bits in (8, 12) if 0 < self._highest[0] < 1 << bits), 16)

    def read(self, index: int) -> np.ndarray:
        """Return a frame, uint8 (H, W, 3)."""
        return read_image(self.paths[index], self.bits)

    def remark(self, remarks: Remarks) -> None:
        """Add what is done to the values of the images, if they seem to have fewer bits than 16."""
        if self.bits != 16:
            remarks.add(f"Read as {self.bits} bits, since no 16-bit value exceeds {(1 << self.bits) - 1}", self.name)
        if 0 < self._highest[1] < 1 << 4:
            remarks.add(
                "Nearly black, as the upper 8 of 16 bits of a colour are read; convert images that have 12 bits",
                self.name,
            )


def picture_clips(
    folder: Path, found: Mapping[str, list[str]], remarks: Remarks, keeps_gaps: bool = False
) -> list[PictureClip]:
    """Return the clips of what `find_frames` found, in its order.

    A folder makes a clip of its name. Where the numbers of its frames jump it is divided into clips named by their
    first frame, which the remarks name; with `keeps_gaps` it is not.
    """
    clips: list[PictureClip] = []
    taken: set[str] = set()
    groups = {path: free_name(clip_name(PurePath(path)), taken) for path in found if path != "."}
    if "." in found:
        groups["."] = free_name(clip_name(PurePath(folder.resolve().name)), taken)
    for path in found:
        inside, group = folder / path, groups[path]
        try:
            parts = order_frames(found[path])
        except ValueError as error:
            parts, problem = [found[path]], f"{inside} cannot be a clip: {error}"
        else:
            problem = None
        if keeps_gaps:
            parts = [[name for part in parts for name in part]]
        for before, after in itertools.pairwise(parts):
            remarks.add(
                "Divided where numbers of frames are missing or begin anew",
                f"{group} between {before[-1]} and {after[0]}",
            )
        for part in parts:
            name = group
            if len(parts) > 1:
                name = free_name(f"{group}/{clip_name(PurePath(part[0]).with_suffix(''))}", taken)
            clips.append(PictureClip(name, group, tuple(inside / file for file in part), problem))
    return clips


def open_pictures(folder: Path, remarks: Remarks | None = None) -> PictureClip:
    """Return the images directly in a folder as one clip; the remarks name what is left out.

    Raises `ValueError` if there are none, or if they are not successive frames by their names.
    """
    remarks = remarks or Remarks()
    listing = list_footage(folder, remarks)
    names = listing.pictures.pop(".", [])
    others = [path.relative_to(folder).as_posix() for path in [*listing.videos, *listing.arrays]]
    if not names:
        remedy = f"; give one of its videos, such as {folder / others[0]}" if others else ""
        raise ValueError(
            f"{folder} holds no images: expected files such as 000000.png, in the order of their names{remedy}"
        )
    for name in [*others, *listing.pictures]:
        remarks.add("Left out, no image directly in the folder", name)
    clip, *more = picture_clips(folder, {".": names}, Remarks())
    clip.check()
    if more:
        raise ValueError(
            f"{folder} holds no successive frames: {more[0].paths[0].name} does not follow {clip.paths[-1].name}; "
            "give a folder of frames whose numbers have no gap"
        )
    clip.remark(remarks)
    return clip


def iter_pictures(folder: Path) -> Iterator[np.ndarray]:
    """Yield the images of a folder in the order of their names, each uint8 (H, W, 3); see `open_pictures`."""
    clip = open_pictures(folder)
    for index in range(len(clip.paths)):
        yield clip.read(index)


def read_image(path: Path, bits: int = 16) -> np.ndarray:
    """Read an image as uint8 (H, W, 3): EXIF orientation applied, in sRGB, composited over black if transparent.

    Colours are converted if the image has a colour profile; 16-bit grey, whose values have `bits` bits, is reduced to
    8. Raises `ValueError`, naming the file, if it cannot be read or holds several images.
    """
    try:
        with Image.open(path) as image:
            # JPEGs of some cameras (MPO) hold additional images after the photograph; any other sequence is rejected.
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise ValueError(f"it holds {getattr(image, 'n_frames', 1)} images; store one in each file")
            image.load()
            return np.asarray(_to_rgb(ImageOps.exif_transpose(image), bits))
    except Exception as error:  # decoders raise many exception types for damaged files
        raise ValueError(f"{path} cannot be a frame: {error}") from error


def center_crop_and_resize(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crop the centre of `frame` (uint8 H W 3) to the aspect ratio of height x width, then resize it with a Lanczos
    filter.

    Only one dimension is cropped, so the result shows as much of the frame as its aspect ratio allows. A frame of that
    size is returned unchanged. Large frames are reduced by `reduction.reduce`, a function of the sizes alone.
    """
    return resize_to_each(frame, [(height, width)])[0]


def resize_to_each(frame: np.ndarray, sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Return `center_crop_and_resize` of a frame for each size; sizes of one aspect ratio share work."""
    found = {}
    of_crop: dict[tuple[int, int, int, int], list[tuple[int, int]]] = {}
    for size in sizes:
        of_crop.setdefault(_centre(frame.shape[0], frame.shape[1], *size), []).append(size)
    for (top, bottom, left, right), same in of_crop.items():
        crop, rows, columns = frame[top:bottom, left:right], bottom - top, right - left
        reduced = [size for size in same if size != frame.shape[:2] and reduction.suits(rows, columns, *size)]
        if reduced:
            found.update(zip(reduced, reduction.reduce(crop, reduced), strict=True))
        for height, width in same:
            if (height, width) == frame.shape[:2]:
                found[height, width] = frame
            elif (height, width) not in found:
                image = Image.fromarray(crop).resize((width, height), Image.Resampling.LANCZOS)
                found[height, width] = np.asarray(image)
    return [found[size] for size in sizes]


# ----------------------------------------------------------------------------
# Details.


def _centre(rows: int, columns: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Return top, bottom, left and right of the largest centred part with the aspect ratio of height x width."""
    height_ratio, width_ratio = rows / height, columns / width
    top, left, bottom, right = 0.0, 0.0, float(rows), float(columns)
    if height_ratio > width_ratio:
        top = (rows - height * width_ratio) // 2
        bottom = top + height * width_ratio
    elif width_ratio > height_ratio:
        left = (columns - width * height_ratio) // 2
        right = left + width * height_ratio
    return round(top), round(bottom), round(left), round(right)


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _highest_deep(path: Path) -> tuple[int, int]:
    """Return the highest value of an image of more than 8 bits, as `PictureClip._highest`, zeros for any other file."""
    try:
        with Image.open(path) as image:
            if _is_deep(image):
                return int(np.asarray(image).max()), 0
            is_deep_colour = any(";16" in str(tile.args) for tile in image.tile)
            return 0, int(np.asarray(image.convert("RGB")).max()) if is_deep_colour else 0
    except Exception:  # reading the frame will tell
        return 0, 0


def _to_rgb(image: Image.Image, bits: int) -> Image.Image:
    profile = image.info.get("icc_profile")
    if _is_deep(image):
        values = np.asarray(image)
        if values.dtype.kind == "f" or values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(
                f"its pixels are {values.dtype} from {values.min()} to {values.max()}; convert it to 8 bits"
            )
        if values.max() >> bits:
            raise ValueError(
                f"its highest value is {values.max()}, but others of the clip seem to have {bits} bits; convert all to "
                "8 bits"
            )
        image = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
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
