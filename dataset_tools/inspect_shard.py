"""Inspect the zips of a dataset for `inspect_dataset`: the contents of each, and its problems."""

import collections
import contextlib
import functools
import hashlib
import io
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from PIL.JpegImagePlugin import get_sampling

from dataset_tools import archive
from dataset_tools.frames import Size, center_crop_and_resize, encode_jpeg
from dnnlib.util import atomic_path
from dnnlib.zips import FAULTS, reason_of
from training.data.description import MAX_EDGE, read_frame_paths
from training.data.shards import decode_rgb, read_frame
from training.preview import contact_sheet

QUICK_FRAMES = 8  # decoded frames per clip, unless all are
_FORMAT_EVERY = 64  # the encoding is determined from one frame of so many of a clip
_MATCHED_FRAMES, _MATCHED_AROUND = 12, 4  # frames of a clip compared between sizes, and neighbours on either side
_SHEET_CLIPS, _SHEET_COLUMNS, _SHEET_WIDTH, _CAPTION_HEIGHT = 8, 8, 256, 16
_ASPECT_TOLERANCE = 0.03  # since sizes are whole pixels
_CHROMAS = {0: "4:4:4", 1: "4:2:2", 2: "4:2:0"}

# In grey levels: an image is flat within the first, black up to the second. An image and its smaller version differ by
# 0.5 to 3 in brightness; above the third, they are different images. There is enough motion to detect a shift if some
# neighbours differ by this factor and this much more, and another frame is a better match if it is closer by the last.
_FLAT, _BLACK, _OTHER, _MOTION_FACTOR, _MOTION_MORE, _CLOSER = 3, 16, 20.0, 1.5, 0.3, 0.1
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of luminance: subsampled chroma would hide small motion


class Problem(NamedTuple):
    """A problem: its kind in `inspect_dataset`, the place, details, and the partition if there is one."""

    kind: str
    place: str
    detail: str = ""
    partition: int | None = None


def parse_size(folder: str) -> Size | None:
    """Return the size of a folder such as "0036x0064", None for any other folder."""
    match = re.fullmatch(r"(\d{4,6})x(\d{4,6})", folder)
    size = (int(match[1]), int(match[2])) if match else (0, 0)
    return size if 0 < min(size) and max(size) <= MAX_EDGE else None


def partition_of(path: Path) -> int | None:
    """Return the number of a zip named like partition_0000.zip, None for any other."""
    index = archive.index_of(path.name)
    return index if index >= 0 else None


class Clip(NamedTuple):
    """A clip as listed in the directory of a zip."""

    shard: Path
    num_frames: int
    names: bytes  # a hash of the frames' names
    content: bytes  # a hash of the frames' checksums and lengths
    num_repeats: int  # frames whose file equals that of the previous frame
    repeats_every: int  # frames from one repeat to the next, if they come regularly; else 0


def regular_interval(repeats: Sequence[int], num_frames: int) -> int:
    """Return the interval of frames that repeat those before them, if they come at regular intervals, else 0.

    A source of fewer frames per second than are stored leaves such repeats throughout; one that shows something at rest
    for a while has stretches of any length anywhere. Three of four intervals between stretches are within a frame of
    the usual one, there are at least two, and together they make at least half of the clip.
    """
    begins = [frame for frame, before in zip(repeats, [-1, *repeats], strict=False) if frame != before + 1]
    intervals = [after - before for before, after in zip(begins, begins[1:], strict=False)]
    if len(intervals) < 2:
        return 0
    usual = sorted(intervals)[len(intervals) // 2]
    is_regular = 4 * sum(abs(interval - usual) <= 1 for interval in intervals) >= 3 * len(intervals)
    return usual if is_regular and 2 * usual * len(intervals) >= num_frames else 0


class Shard:
    """An open zip: `clips` maps each clip to its entries; `problems` lists the problems of its directory.

    Entries may be read by many threads at once. An incomplete zip has no clips.
    """

    def __init__(self, path: Path) -> None:
        size = parse_size(path.parent.name)
        assert size is not None, path
        self.path, self.size, self.partition = path, size, partition_of(path)
        self.name = f"{path.parent.name}/{path.name}"
        self.problems: list[Problem] = []
        self.clips: dict[str, list[zipfile.ZipInfo]] = {}
        self._zip: zipfile.ZipFile | None = None
        try:
            self._zip = zipfile.ZipFile(path)
        except FAULTS as error:
            self.report("damaged shard", "", reason_of(path, error))
            return
        infos = self._zip.infolist()
        entries = {info.filename: info for info in infos}
        self._check_entries(infos, entries)
        try:
            listed = read_frame_paths(self._zip)
            listed = {clip: [f"{clip}/{name}" for name in names] for clip, names in listed.items()}
        except FAULTS as error:
            self.report("no index", "", str(error))
            return
        for clip, names in sorted(listed.items()):
            if not names:
                self.report("empty clip", clip)
            for name in names:
                if name not in entries:
                    self.report("missing frame", name)
            self.clips[clip] = [entries[name] for name in names if name in entries]
        named = {name for names in listed.values() for name in names}
        for name in entries.keys() - named:
            if "/" in name and not name.endswith("/"):
                self.report("unlisted entry", name)

    def _check_entries(self, infos: Sequence[zipfile.ZipInfo], entries: dict[str, zipfile.ZipInfo]) -> None:
        if len(infos) > len(entries):
            counts = collections.Counter(info.filename for info in infos)
            num_double = sum(count > 1 for count in counts.values())
            same = all(entries[info.filename].CRC == info.CRC for info in infos)
            detail = f"{num_double} names, {len(infos) - len(entries)} entries too many, " + (
                "all with the same content" if same else "not all with the same content; the last of each counts"
            )
            self.report("double entry", "", detail)
        packed = [info for info in entries.values() if info.compress_type != zipfile.ZIP_STORED]
        exotic = [info for info in packed if info.compress_type != zipfile.ZIP_DEFLATED]
        for kind, found in (
            ("encrypted entry", [info for info in entries.values() if info.flag_bits & 1]),
            ("unknown compression", exotic),
            ("compressed entry", packed if not exotic else []),
        ):
            if found:
                self.report(kind, "", f"{len(found)} of {len(entries)} entries, such as {found[0].filename}")

    def report(self, kind: str, what: str, detail: str = "") -> None:
        """Add a problem of this zip, or of a clip or frame in it."""
        place = f"{self.name}  {what}".rstrip()
        self.problems.append(Problem(kind, place, detail, self.partition))

    def summary(self, clip: str) -> Clip:
        """Return the properties of a clip according to the directory."""
        entries = self.clips[clip]
        names = "\n".join(entry.filename for entry in entries)
        keys = [(entry.CRC, entry.file_size) for entry in entries]
        repeats = [frame for frame in range(1, len(keys)) if keys[frame] == keys[frame - 1]]
        return Clip(
            self.path, len(entries), _hash(names), _hash(repr(keys)), len(repeats), regular_interval(repeats, len(keys))
        )

    def read(self, entry: zipfile.ZipInfo) -> bytes:
        """Return the contents of an entry after verifying its checksum; raises one of many errors if damaged."""
        assert self._zip is not None
        return read_frame(self._zip, entry, self.size)

    def close(self) -> None:
        """Close the file, if it could be opened."""
        if self._zip is not None:
            self._zip.close()


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


# ----------------------------------------------------------------------------
# Frames.


@dataclass
class ClipScan:
    """The result of reading a clip's frames: their number, the number of single-colour frames, and their encoding.

    `sha256` is that of all files concatenated, None if not all were read.
    """

    num_frames: int = 0
    num_bytes: int = 0
    num_blank: int = 0
    sha256: str | None = None
    formats: collections.Counter[tuple[str, int]] = field(default_factory=collections.Counter)
    problems: list[Problem] = field(default_factory=list)


def scan_clip(shard: Shard, clip: str, all_frames: bool) -> ClipScan:
    """Read and decode the frames of a clip, all or a few, including the first and the last."""
    scan = ClipScan()
    entries = shard.clips[clip]
    digest = hashlib.sha256()
    out = np.empty((*shard.size, 3), np.uint8)
    chosen = range(len(entries)) if all_frames else _spread(len(entries), QUICK_FRAMES)
    for position, frame in enumerate(chosen):
        entry = entries[frame]
        try:
            data = shard.read(entry)
        except FAULTS as error:
            reason = str(error).partition(" for file ")[0]
            scan.problems.append(Problem("damaged frame", f"{shard.name}  {entry.filename}", reason, shard.partition))
            continue
        digest.update(data)
        scan.num_frames += 1
        scan.num_bytes += len(data)
        try:
            decode_rgb(data, out)
        except Exception as error:  # decoders raise many types
            kind, detail = explain(data, shard.size, error)
            scan.problems.append(Problem(kind, f"{shard.name}  {entry.filename}", detail, shard.partition))
            continue
        scan.num_blank += is_blank(out)
        if position % _FORMAT_EVERY == 0:
            scan.formats[encoding(data)] += 1
    if all_frames and scan.num_frames == len(entries):
        scan.sha256 = digest.hexdigest()
    return scan


def _spread(length: int, count: int) -> list[int]:
    return np.unique(np.linspace(0, length - 1, count).round().astype(int)).tolist() if length else []


def explain(data: bytes, size: Size, error: Exception) -> tuple[str, str]:
    """Return kind and detail of the problem of an unusable frame, given the error."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if (image.height, image.width) != size:  # before the pixels take memory
                return "frame size", f"{image.height}x{image.width}, not {size[0]}x{size[1]}"
            image.load()
            if image.mode != "RGB":
                return "colour mode", f"{image.mode}, not RGB"
    except Exception:  # as above
        if not len(data):
            return "unreadable frame", "it is empty"
    return "unreadable frame", re.sub(r" <_io\.BytesIO .*>", "", str(error))


def is_blank(frame: np.ndarray) -> bool:
    """Return whether an image, uint8 (H, W, 3), has a single colour or is black."""
    step = max(frame.shape[0] // 32, 1)
    for pixels in (frame[::step, ::step], frame):  # a few pixels decide in nearly all cases
        low, high = pixels.min(axis=(0, 1)), pixels.max(axis=(0, 1))
        if (high - low).max() > _FLAT and high.max() > _BLACK:
            return False
    return True


def encoding(data: bytes) -> tuple[str, int]:
    """Return chroma subsampling and estimated quality, 1 to 100, of a JPEG; ("PNG", 0) and the like for other files."""
    with Image.open(io.BytesIO(data)) as image:
        if image.format != "JPEG":
            return str(image.format), 0
        table = np.array(image.quantization[0])  # type: ignore
        return _CHROMAS.get(get_sampling(image), "other"), int(np.abs(_tables() - table).sum(axis=1).argmin()) + 1


@functools.cache
def _tables() -> np.ndarray:
    """Return the luminance tables of JPEG encoders for the qualities 1 to 100: (100, 64), scaled from that of 50."""
    with Image.open(io.BytesIO(encode_jpeg(np.zeros((8, 8, 3), np.uint8), 50))) as image:
        standard = np.array(image.quantization[0])  # type: ignore
    percent = np.array([5000 // quality if quality < 50 else 200 - 2 * quality for quality in range(1, 101)])
    return ((standard * percent[:, None] + 50) // 100).clip(1, 255)


# ----------------------------------------------------------------------------
# Images of two sizes.


class Match(NamedTuple):
    """The agreement of a clip's images of two sizes: medians over frames, in grey levels and frames.

    `shift` is the offset in frames of the best match of a large frame, as far as motion allows to detect it.
    """

    distance: float
    shift: int


def same_aspect(first: Size, second: Size) -> bool:
    """Return whether frames of two sizes show the same part of a source, without which they cannot be compared."""
    return abs(first[0] * second[1] / (first[1] * second[0]) - 1) < _ASPECT_TOLERANCE


def match_clip(small: Shard, large: Shard, clip: str) -> Match | None:
    """Compare some frames of a clip in two sizes of the same aspect; None if none of them can be read."""
    small_entries, large_entries = small.clips[clip], large.clips[clip]
    distances, shifts = [], []
    for frame in _spread(len(large_entries), _MATCHED_FRAMES):
        first = max(frame - _MATCHED_AROUND, 0)
        try:
            (picture,) = _pictures(large, large_entries[frame : frame + 1])
            reference = center_crop_and_resize(picture, *small.size) @ _LUMA
            others = _pictures(small, small_entries[first : frame + _MATCHED_AROUND + 1])
            around = [float(np.abs(reference - other @ _LUMA).mean()) for other in others]
        except Exception:  # as above
            continue
        here, best = around[frame - first], min(around)
        distances.append(here)
        if max(around) > _MOTION_FACTOR * best + _MOTION_MORE:
            shifts.append(first + around.index(best) - frame if here > best + _CLOSER else 0)
    return Match(float(np.median(distances)), round(float(np.median(shifts or [0])))) if distances else None


def mismatch(match: Match) -> str:
    """Return a description of the mismatch; empty if the images are the same."""
    if match.shift:
        return f"moved by {match.shift:+d} frames"
    if match.distance > _OTHER:
        return f"other images, {match.distance:.0f} grey levels different"
    return ""


def _pictures(shard: Shard, entries: Sequence[zipfile.ZipInfo]) -> Iterator[np.ndarray]:
    for entry in entries:
        out = np.empty((*shard.size, 3), np.uint8)
        decode_rgb(shard.read(entry), out)
        yield out


# ----------------------------------------------------------------------------
# Contact sheet.


def draw_sheet(clips: Mapping[str, Clip], out: Path) -> None:
    """Write a PNG of some clips: under its name a row of evenly spaced frames of each; purple for unreadable frames."""
    num_rows = min(_SHEET_CLIPS, len(clips))
    names = [sorted(clips)[row * len(clips) // num_rows] for row in range(num_rows)]
    rows = []
    for name in names:
        caption = Image.new("RGB", (_SHEET_COLUMNS * _SHEET_WIDTH, _CAPTION_HEIGHT))
        ImageDraw.Draw(caption).text((4, 2), f"{name}   {clips[name].num_frames} frames", "white")
        tiles = []
        with contextlib.closing(Shard(clips[name].shard)) as shard:
            height = max(round(shard.size[0] * _SHEET_WIDTH / shard.size[1]), 1)
            entries = shard.clips[name]
            for frame in _spread(len(entries), _SHEET_COLUMNS):
                try:
                    picture = Image.fromarray(next(_pictures(shard, entries[frame : frame + 1])))
                except Exception:  # as above
                    picture = Image.new("RGB", (1, 1), "purple")
                tiles.append(np.asarray(picture.resize((_SHEET_WIDTH, height), Image.Resampling.LANCZOS)))
        rows += [np.asarray(caption), contact_sheet(tiles, _SHEET_COLUMNS)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as path:
        Image.fromarray(np.concatenate(rows)).save(path, "PNG")
