"""The metadata of a video file and the times of its frames, read with ffmpeg without decoding."""

import functools
import os
import re
import subprocess
from dataclasses import dataclass
from fractions import Fraction

import imageio_ffmpeg
import numpy as np

_HDR_TRANSFERS = ("smpte2084", "arib-std-b67")  # PQ and HLG
# An interval between frames is regular if it is within this fraction of the usual one, besides rounding of times.
_REGULAR_SHARE = 0.15
# A file has a variable frame rate if its irregular intervals take more than this fraction of its duration. Single lost
# frames, which are common in recordings of constant rate, do not count as variable.
_IRREGULAR_TIME = 0.01
_NO_PTS = -(2**63)


@dataclass(frozen=True)
class VideoInfo:
    """Metadata of a file's first video stream; `height` and `width` are in pixels after rotation, fps is frames/second.

    `matrix` and `transfer` are ffmpeg's names of the colour matrix and the transfer function, None if the file does
    not name them; `is_interlaced` is from the metadata, `is_high_definition` from the coded size.
    """

    height: int
    width: int
    fps: float
    duration_sec: float | None
    codec: str
    bit_depth: int
    matrix: str | None
    transfer: str | None
    is_interlaced: bool
    is_high_definition: bool

    @property
    def is_hdr(self) -> bool:
        """Return whether the transfer function is PQ or HLG, which needs tone mapping to standard dynamic range."""
        return self.transfer in _HDR_TRANSFERS


@dataclass(frozen=True)
class Timing:
    """Times of frames: their number, frames per second (the mean, if variable) and total duration in seconds."""

    num_frames: int
    fps: float
    is_variable: bool
    duration_sec: float


@dataclass(frozen=True)
class Packets:
    """Times of the frames of a file's first video stream, in seconds from its first frame, ascending: float64 (T).

    `origin_sec` is the time of the first frame from the start of the file; `keys` are the times of key frames, from
    which decoding can start; `tick_sec` is the time unit of the file. `is_seekable`: each packet has its own time.
    """

    times: np.ndarray
    keys: np.ndarray
    origin_sec: float
    tick_sec: float
    last_sec: float  # duration of the last frame, 0 if unknown
    num_empty: int  # packets without content, with which some formats repeat the last frame
    is_seekable: bool


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Return size, frame rate, duration, codec and colours of a file's first video stream.

    Cover pictures do not count as video. Raises ValueError if there is no video stream.
    """
    return _probe(*_identity(path))


def scan(path: str | os.PathLike[str]) -> Timing:
    """Return the timing of a file's first video stream from the times of its packets.

    `fps` is exact where the times allow it: 30000/1001 rather than 29.97. Raises ValueError if there is no video.
    """
    return measure(read_packets(path), probe(path).fps)


def measure(packets: Packets, stated_fps: float) -> Timing:
    """Return the timing of packet times rounded to ticks; `stated_fps` (0: unknown) is used if it agrees with them."""
    steps = np.diff(packets.times)
    if len(steps) == 0:
        fps = stated_fps or 1 / (packets.last_sec or 1)
        return Timing(1, fps, False, packets.last_sec or 1 / fps)
    usual = float(np.sort(steps)[len(steps) // 2])  # an actual interval, not the mean of the middle two
    regular = np.abs(steps - usual) <= _REGULAR_SHARE * usual + 1.01 * packets.tick_sec
    odd_sec = np.abs(steps[~regular] - usual).sum() + packets.num_empty * usual
    is_variable = bool(odd_sec > _IRREGULAR_TIME * packets.times[-1])
    counted = np.ones_like(regular) if is_variable else regular
    # In a contiguous run of counted intervals only its two ends are rounded; each gap adds two more ends.
    error_sec = 1.5 * packets.tick_sec * (1 + np.count_nonzero(~counted))
    total_sec = float(steps[counted].sum())
    tolerance = max(error_sec / total_sec, 1e-4)  # the accuracy of clocks of recorders
    fps = _exact_rate(int(np.count_nonzero(counted)) / total_sec, tolerance, stated_fps)
    last_sec = packets.last_sec if is_variable and packets.last_sec else 1 / fps
    return Timing(len(packets.times), fps, is_variable, float(packets.times[-1]) + last_sec)


def read_packets(path: str | os.PathLike[str]) -> Packets:
    """Return the times of all packets of a file's first video stream; ValueError if it has none."""
    return _read_packets(*_identity(path))


def read_comment(path: str | os.PathLike[str]) -> str | None:
    """Return the comment in the metadata of a file, as ffmpeg reads it, None without one."""
    found = (re.match(r"    comment +: (.*)", line, re.IGNORECASE) for line in _about(*_identity(path)))
    return next((match[1] for match in found if match), None)


def _identity(path: str | os.PathLike[str]) -> tuple[str, int, int]:
    """Return path, size in bytes and modification time in ns, the key of the caches; ValueError if it is no file."""
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a file")
    status = os.stat(path)
    return os.fspath(path), status.st_size, status.st_mtime_ns


def _ffmpeg(*arguments: str) -> tuple[str, list[str], int]:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", *arguments]
    done = subprocess.run(command, capture_output=True, check=False)
    lines = done.stderr.decode(errors="replace").rstrip().splitlines()
    return done.stdout.decode(), lines, done.returncode


@functools.lru_cache(maxsize=64)
def _about(path: str, _size: int, _time: int) -> list[str]:
    """Return the lines in which ffmpeg describes a file."""
    return _ffmpeg("-i", f"file:{path}")[1]


@functools.lru_cache(maxsize=64)
def _probe(path: str, _size: int, _time: int) -> VideoInfo:
    lines = _about(path, _size, _time)
    # The line of a stream is followed by lines about it with a deeper indentation.
    starts = [n for n, line in enumerate(lines) if re.match(r"  Stream #0:\d+.*?: Video: ", line)]
    start = next((n for n in starts if "(attached pic)" not in lines[n]), None)
    if start is None:
        reason = "it holds a cover picture only" if starts else lines[-1]
        raise ValueError(f"{path} has no video that ffmpeg can read: {reason}")
    about = [lines[start]]
    for line in lines[start + 1 :]:
        if not line.startswith("    "):
            break
        about.append(line)
    text = "\n".join(about)

    stream = re.search(r": Video: (\w+)[^,]*, (\w+)(?:\((.*?)\))?, (\d+)x(\d+)", text)
    if stream is None:
        raise ValueError(f"{path} has no video that ffmpeg can read: {about[0].strip()}")
    codec, pixels, colors = stream[1], stream[2], (stream[3] or "").split(", ")
    width, height = int(stream[4]), int(stream[5])
    is_high_definition = height >= 720 or width >= 1280
    # The container's pixel aspect, which ffmpeg prints last, takes precedence over the codec's.
    if aspects := re.findall(r"\bSAR (\d+):(\d+)", about[0]):
        width = round(width * int(aspects[-1][0]) / int(aspects[-1][1]))
    if rotation := re.search(r"rotation of (-?[\d.]+) degrees", text):
        height, width = (width, height) if round(float(rotation[1]) / 90) % 2 else (height, width)
    # Matrix, primaries and transfer function; a single word if all have the same name.
    triple = next((c.split("/") for c in colors if re.fullmatch(r"[\w-]+(/[\w-]+/[\w-]+)?", c) and c not in _WORDS), [])
    names = [None if name in ("unknown", "reserved") else name for name in triple] or [None]
    rate = re.search(r"([\d.]+)(k?) (?:fps|tbr)", about[0])
    duration = next((match for line in lines if (match := re.search(r"^  Duration: (\d+):(\d+):([\d.]+)", line))), None)
    depth = int(digits[1]) if (digits := re.search(r"(\d\d)(?:le|be)$", pixels)) else 8
    fps = float(rate[1]) * (1000 if rate[2] else 1) if rate else 0.0
    return VideoInfo(
        height=height,
        width=width,
        fps=_exact_rate(fps, 0.0051 / fps) if fps else 0.0,  # ffmpeg prints two decimals
        duration_sec=int(duration[1]) * 3600 + int(duration[2]) * 60 + float(duration[3]) if duration else None,
        codec=codec,
        bit_depth=depth if depth <= 16 else 16 if depth in (48, 64) else 8,
        matrix=names[0],
        transfer=names[-1],
        is_interlaced=any(re.match(r"(top|bottom) ", color) for color in colors),
        is_high_definition=is_high_definition,
    )


_WORDS = ("tv", "pc", "progressive")


@functools.lru_cache(maxsize=8)
def _read_packets(path: str, _size: int, _time: int) -> Packets:
    _probe(path, _size, _time)  # raises ValueError if there is no video
    # The container's times need no decoding; framecrc prints them in integer ticks.
    copy = ["-map", "0:V:0", "-c", "copy", "-copyinkf", "-f", "framecrc", "pipe:1"]
    text, errors, code = _ffmpeg("-v", "error", "-i", f"file:{path}", *copy)
    tick = Fraction(0)
    rows: list[tuple[int, int, int, int, int]] = []
    for line in text.splitlines():
        if line.startswith("#tb 0:"):
            tick = Fraction(line.split()[-1])
        elif not line.startswith("#"):
            _, dts, pts, duration, size, _, *rest = line.split(",")
            flags = int(rest[0].split("=")[1], 16) if rest and rest[0].startswith(" F=") else 1
            rows.append((int(dts), int(pts), int(duration), int(size), flags))
    table = np.array(rows, np.int64).reshape(-1, 5)
    # Packets before the first key frame cannot be decoded, and editors leave packets marked to be discarded.
    is_key = table[:, 4] & 1 > 0
    table = table[np.argmax(is_key) :] if is_key.any() else table
    if len(table) == 0:
        raise ValueError(f"{path} has no frames: {errors[-1] if code and errors else 'its video is empty'}")
    first = table[0]
    is_seekable = bool((table[:, 1] != _NO_PTS).all())
    # Without presentation times, decoding times are the same except for order and a constant delay.
    delay = first[1] - first[0] if first[1] != _NO_PTS else 0
    shown = table[:, 1] if is_seekable else table[:, 0] + delay
    keep = (table[:, 4] & 4 == 0) & (shown >= shown[0]) if is_seekable else table[:, 4] & 4 == 0
    if not keep.any():
        raise ValueError(f"{path} has no frames: its video is empty")
    table, shown = table[keep], shown[keep]
    times = np.unique(shown)  # a frame that is never shown has the same time as another
    keys = np.unique(shown[table[:, 4] & 1 > 0])
    return Packets(
        times=(times - times[0]) * float(tick),
        keys=(keys - times[0]) * float(tick),
        origin_sec=float(times[0] * tick),
        tick_sec=float(tick),
        last_sec=float(max(int(table[np.argmax(shown), 2]), 0) * tick),
        num_empty=int(np.count_nonzero(table[:, 3] == 0)),
        is_seekable=is_seekable,
    )


def _exact_rate(fps: float, tolerance: float, stated_fps: float = 0.0) -> float:
    """Return the stated rate, n or n * 1000 / 1001 for an integer n, if within the relative `tolerance`, else `fps`."""
    if stated_fps and abs(stated_fps / fps - 1) <= tolerance:
        return stated_fps
    nearest = min((round(fps), round(fps * 1.001) * 1000 / 1001), key=lambda rate: abs(rate - fps))
    return float(nearest) if nearest and abs(nearest / fps - 1) <= tolerance else fps
