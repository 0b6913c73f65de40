"""List footage: which files are videos, arrays and pictures, which belong together, and what is left out.

    listing = list_footage(Path("my_footage"))
    listing.videos, listing.arrays, listing.pictures           # what can be read
    for line in listing.remarks.lines(): ...                   # what is left out, named and counted

Dataset makers, metrics and prompts use this list alone, so that the same files are footage to all of them.
"""

import collections
import functools
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from PIL import Image

from dnnlib.text import escape, to_text
from training.data.arrays import ARRAY_SUFFIX
from training.data.stream_files import find_stream_files

# Suffixes of the containers and raw streams that the bundled ffmpeg decodes, by the name of its demuxer. Streams that
# do not hold their frame rate (raw Motion JPEG, H.261, H.263, AV1, Dirac) are none of them: ffmpeg makes one up.
CONTAINERS = {
    "apng": "apng",
    "asf": "asf dvr-ms wmv",
    "avi": "amv avi divx xvid",
    "avs2": "avs2",
    "dv": "dif dv",
    "flic": "flc fli",
    "flv": "flv",
    "gif": "gif",
    "gxf": "gxf",
    "h264": "264 avc h264 h26l",
    "hevc": "265 h265 hevc",
    "ivf": "ivf",
    "matroska,webm": "mk3d mkv webm",
    "mov,mp4,m4a,3gp,3g2,mj2": "3g2 3gp 3gp2 3gpp 3gpp2 f4v insv ism ismv m4v mj2 mov mp4 mp4v psp qt",
    "mpeg": "dvd evo m2p mod mpe mpeg mpg vob vro",
    "mpegts": "m2t m2ts mts tod tp trp ts",
    "mpegvideo": "m1v m2v mp2v mpv mpv2",
    "mxf": "mxf",
    "nut": "nut",
    "ogg": "ogm ogv",
    "rm": "rm rmvb",
    "swf": "swf",
    "vvc": "266 h266 vvc",
    "webp_anim": "webp",
    "wtv": "wtv",
    "yuv4mpegpipe": "y4m",
}
VIDEO_SUFFIXES = tuple(
    sorted(
        (f".{suffix}" for suffixes in CONTAINERS.values() for suffix in suffixes.split()),
        key=lambda s: (s[1:].isdigit(), s),
    )
)

# Formats that Pillow registers but cannot read itself; it opens MPO as JPEG.
_STUBS = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
_NAMED = 5  # names that a line of remarks gives


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case, of all image formats that Pillow reads."""
    extensions = Image.registered_extensions()  # also fills Image.OPEN
    readable = (Image.OPEN.keys() | {"MPO"}) - {*_STUBS}
    return frozenset(suffix for suffix, kind in extensions.items() if kind in readable)


def kind_of(path: Path) -> str | None:
    """Return "video", "picture" or "array", as makers, metrics and prompts read a file, or None if none of them does.

    The suffix decides; where it may be either, such as .gif and .webp, several images are a video, one is a picture.
    """
    suffix = path.suffix.lower()
    if suffix == ARRAY_SUFFIX:
        return "array"
    if suffix not in image_suffixes():
        return "video" if suffix in VIDEO_SUFFIXES else None
    return "video" if suffix in VIDEO_SUFFIXES and _is_animated(path) else "picture"


def _is_animated(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            head = file.read(32)
        if head[:4] == b"RIFF":  # Pillow would read the whole file, and tens of thousands of frames may be of this kind
            return head[12:16] == b"VP8X" and bool(head[20] & 2)
        with Image.open(path) as image:
            return bool(getattr(image, "is_animated", False))
    except Exception:  # decoders raise many exception types for damaged files; reading it will tell
        return False


# ----------------------------------------------------------------------------
# Remarks.


class Remarks:
    """What is passed over, or not taken as it stands: reasons, each with the names that it concerns."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Add a name; threads may do so at once."""
        self._names.setdefault(reason, []).append(name)

    def lines(self) -> Iterator[str]:
        """Yield a line for each reason, with the number of names and the first of them."""
        for reason, names in self._names.items():
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            yield f"{reason} ({len(names)}): {', '.join(map(escape, names[:_NAMED]))}{more}"


# ----------------------------------------------------------------------------
# Folders.


@dataclass(frozen=True)
class Listing:
    """The footage below a folder: videos and arrays by path, and the pictures of each folder by its path inside it.

    `streams` are the files with values of the frames of a video, by the video's path and the name of the stream.
    """

    folder: Path
    videos: list[Path] = field(default_factory=list)
    arrays: list[Path] = field(default_factory=list)
    pictures: dict[str, list[str]] = field(default_factory=dict)  # "." is the folder itself
    remarks: Remarks = field(default_factory=Remarks)
    streams: dict[Path, dict[str, Path]] = field(default_factory=dict)


def list_footage(folder: Path, remarks: Remarks | None = None) -> Listing:
    """Return the footage at any depth below a folder, sorted by path; the remarks name all else.

    Linked folders are followed, each folder once. Hidden files and folders, and the contact sheets and single frames
    that generate.py writes beside its videos, are left out.
    """
    found = Listing(folder, remarks=remarks or Remarks())
    seen = {_identity(folder)}
    waiting = [folder]
    while waiting:
        waiting += _list_one(waiting.pop(), found, seen)
    found.videos.sort()
    found.arrays.sort()
    pictures = {path: found.pictures[path] for path in sorted(found.pictures, key=PurePath)}
    found.pictures.clear()
    found.pictures.update(pictures)
    return found


def _list_one(folder: Path, found: Listing, seen: set[tuple[int, int]]) -> list[Path]:
    """Add the footage directly in a folder to a listing; return the folders in it that are to be listed, last first."""
    inside = folder.relative_to(found.folder)
    folders = []
    try:
        with os.scandir(folder) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError as error:
        found.remarks.add(f"Left out, {error.strerror}", inside.as_posix())
        return []
    beside = _add_streams(folder, [entry.name for entry in entries], found)
    for entry in entries:
        path = folder / entry.name
        reason = None
        if entry.name in beside:
            continue
        if entry.name.startswith("."):
            reason = "hidden"
        elif entry.is_dir():
            identity = _identity(path)
            if identity in seen or (entry.is_symlink() and _is_around(path, found.folder)):
                reason = "a link to a folder that is listed already"
            else:
                seen.add(identity)
                folders.append(path)
        elif not entry.is_file():
            reason = "a broken link or no regular file"
        elif is_by_product(entry.name):
            reason = "a contact sheet or single frame of a generated video"
        elif (kind := kind_of(path)) is None:
            reason = "no kind of file that is read"
        elif kind == "picture":
            found.pictures.setdefault(inside.as_posix(), []).append(entry.name)
        else:
            (found.videos if kind == "video" else found.arrays).append(path)
        if reason is not None:
            found.remarks.add(f"Left out, {reason}", (inside / entry.name).as_posix())
    return folders[::-1]


def _add_streams(folder: Path, names: Sequence[str], found: Listing) -> set[str]:
    """Add the files of streams that lie beside videos of a folder to a listing; return their names."""
    suffixes = (*VIDEO_SUFFIXES, ARRAY_SUFFIX)
    videos = [name for name in names if not name.startswith(".") and Path(name).suffix.lower() in suffixes]
    files = find_stream_files(folder, names, videos) if videos else {}
    for video, streams in files.items():
        found.streams[folder / video] = {stream: folder / name for stream, name in streams.items()}
    return {name for streams in files.values() for name in streams.values()}


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_around(link: Path, folder: Path) -> bool:
    """Return whether a link leads to a place inside the folder, which is listed by its own name, or above it."""
    target, root = link.resolve(), folder.resolve()
    return target.is_relative_to(root) or root.is_relative_to(target)


# ----------------------------------------------------------------------------
# Names.

# The names that `training.video_files` gives: the stem, and which of the files of one video it is.
_GENERATED = re.compile(
    r"(?P<stem>(?:.+[_/])?seeds?=[-0-9,]+_(?:start=-?[0-9]+_)?len=[0-9]+(?:of[0-9]+)?(?:_grid=[0-9]+x[0-9]+)?)_(?P<part>.+)"
)


def generated_stem(name: str) -> str | None:
    """Return what the names of all files of one generated video begin with, None for any other file."""
    match = _GENERATED.fullmatch(name)
    return match["stem"] if match else None


def is_by_product(name: str) -> bool:
    """Return whether a file is a contact sheet or a single frame that generate.py wrote beside a video."""
    match = _GENERATED.fullmatch(name)
    return match is not None and re.fullmatch(r"(sheet|frame=-?[0-9]+)\.png", match["part"]) is not None


def clip_name(path: PurePath) -> str:
    """Return the name of a clip for a relative path, as text."""
    return to_text(path.as_posix())


def free_name(name: str, taken: set[str]) -> str:
    """Return a name that is not taken yet, with _2, _3, ... appended if it is, and take it."""
    free = next(
        found
        for found in itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        if found not in taken
    )
    taken.add(free)
    return free


def to_texts(names: Iterable[str]) -> list[str]:
    """Return different names, all of them text, for different names; those that are text stay the same."""
    names = list(names)
    taken = {name for name in names if to_text(name) == name}
    return [name if name in taken else free_name(to_text(name), taken) for name in names]


def clip_names(paths: Iterable[PurePath]) -> dict[PurePath, str]:
    """Return a name for the clip of each file: its path without the suffix, or with it if several files share that.

    So no name ever stands for another file, whatever is added to the folder. All are text.
    """
    names = {path: path.with_suffix("").as_posix() for path in paths}
    while shared := {name for name, count in collections.Counter(names.values()).items() if count > 1}:
        names = {path: path.as_posix() if name in shared else name for path, name in names.items()}
    return dict(zip(names, to_texts(names.values()), strict=True))
