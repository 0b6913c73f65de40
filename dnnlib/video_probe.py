"""The metadata of a video file and the times of its frames, read with ffmpeg without decoding."""

import functools
import itertools
import math
import os
import re
import subprocess
from dataclasses import dataclass, field
from fractions import Fraction

import imageio_ffmpeg
import numpy as np

_HDR_TRANSFERS = ("smpte2084", "arib-std-b67")  # PQ and HLG
# An interval between frames is regular if it is within this fraction of the usual one, besides rounding of times.
_REGULAR_SHARE = 0.15
# A file has a variable frame rate if its irregular intervals take more than this fraction of its duration. Single lost
# frames, which are common in recordings of constant rate, do not count as variable.
_IRREGULAR_TIME = 0.01
# Rates that are preferred to others in times that are too few or too coarse to tell.
_COMMON_RATES = (24, 25, 30, 50, 60, 10, 12, 15, 20, 48, 90, 100, 120, 240)
_NO_PTS = -(2**63)
_CORRUPT = 2  # flag of an incomplete packet
# ffmpeg reports these but exits with 0, although the truncated or overwritten part is missing from the frames.
DAMAGE = re.compile(
    r"partial file|ended prematurely|exceeds containing master element|packet_obj_size \d+ invalid|"
    r"Impossibly sized packet"
)


@dataclass(frozen=True)
class VideoInfo:
    """Metadata of a file's video; `height` and `width` are in pixels after rotation, fps is frames/second.

    `matrix` and `transfer` are ffmpeg's names of the colour matrix and the transfer function, None if the file does
    not name them; `is_interlaced` is from the metadata, `is_high_definition` from the coded size. `start_sec` is the
    time of the file's first packet, `stream` the number of the stream among those of the file, and `quarter_turns` says
    how often it is turned clockwise by 90 degrees to be upright.
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
    container: str
    start_sec: float
    stream: int
    quarter_turns: int
    has_alpha: bool

    @property
    def is_hdr(self) -> bool:
        """Return whether the transfer function is PQ or HLG, which needs tone mapping to standard dynamic range."""
        return self.transfer in _HDR_TRANSFERS


@dataclass(frozen=True)
class Timing:
    """Times of frames: their number, frames per second (the mean, if variable) and total duration in seconds.

    A file of variable rate is read at its mean rate, and `num_frames` counts the frames of that.
    """

    num_frames: int
    fps: float
    is_variable: bool
    duration_sec: float

    def count(self, fps: float) -> int:
        """Return the number of frames of the file at another rate."""
        return count_frames(self.duration_sec, fps)


def count_frames(duration_sec: float, fps: float) -> int:
    """Return the number of frames at a rate in a time; the last one is shown for at least a quarter of its interval."""
    return max(math.ceil(duration_sec * fps - 0.25), 0)


@dataclass(frozen=True)
class Packets:
    """Times of the frames of a file's video, in seconds from its first frame, ascending: float64 (T).

    `origin_sec` is the time of the first frame from the start of the file; `keys` are the times of key frames, from
    which decoding can start, and `key_orders` the times by which their packets are ordered in the file; `tick_sec` is
    the time unit of the file. `is_seekable`: each packet has its own time, and times in the file ascend.
    """

    times: np.ndarray
    keys: np.ndarray
    origin_sec: float
    tick_sec: float
    last_sec: float  # duration of the last frame, 0 if unknown
    num_empty: int  # packets without content, with which some formats repeat the last frame
    is_seekable: bool
    key_orders: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def end_sec(self) -> float:
        """Return the time at which the last frame ends, from the start of the file."""
        return self.origin_sec + float(self.times[-1]) + self.last_sec


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Return size, frame rate, duration, codec and colours of a file's video.

    Of several video streams it is the one that players show: one marked as the default, of these the largest. Cover
    pictures and thumbnails do not count as video. Raises ValueError if there is no video stream.
    """
    return _probe(*_identity(path))


def scan(path: str | os.PathLike[str]) -> Timing:
    """Return the timing of a file's video from the times of its packets.

    `fps` is exact where the times allow it: 30000/1001 rather than 29.97. Raises ValueError if there is no video.
    """
    return _scan(*_identity(path))


def measure(packets: Packets, stated_fps: float) -> Timing:
    """Return the timing of packet times rounded to ticks; `stated_fps` (0: unknown) is used if it agrees with them."""
    times = packets.times
    steps = np.diff(times)
    if len(steps) == 0:
        fps = stated_fps or 1 / (packets.last_sec or 1)
        return Timing(1, fps, False, packets.last_sec or 1 / fps)
    usual, is_regular = _find_regular(packets)
    odd_sec = np.abs(steps[~is_regular] - usual).sum() + packets.num_empty * usual
    if odd_sec > _IRREGULAR_TIME * times[-1]:
        fps = round(len(steps) / float(times[-1]), 9)
        duration_sec = float(times[-1]) + (packets.last_sec or 1 / fps)
        return Timing(count_frames(duration_sec, fps), fps, True, duration_sec)
    total_sec = float(steps[is_regular].sum())
    mean = int(np.count_nonzero(is_regular)) / total_sec
    numbers = _count_intervals(steps, is_regular, mean)

    def spread(fps: float) -> float:
        """Return the range of the differences from even times, in ticks; below 1 if rounding explains them."""
        return float(np.ptp(times - numbers / fps)) / packets.tick_sec

    # In a contiguous run of regular intervals only its two ends are rounded, or uneven; each gap adds two more ends.
    error_sec = 1.5 * packets.tick_sec * max(1.0, spread(mean)) * (1 + np.count_nonzero(~is_regular))
    tolerance = max(error_sec / total_sec, 1e-4)  # the accuracy of clocks of recorders
    common = [rate * factor for factor in (1, 1000 / 1001) for rate in _COMMON_RATES]
    near = [rate for rate in (stated_fps, *common, *_usual_rates(mean)) if rate and abs(rate / mean - 1) <= tolerance]
    # What a container states may be the mean of uneven times.
    usual_rates = [rate for rate in near if rate != stated_fps or _is_usual(rate)] or near or [mean]
    uneven = stated_fps if stated_fps in usual_rates else min(usual_rates, key=spread)
    fps = next((rate for rate in near if spread(rate) < 0.999), uneven)
    return Timing(len(packets.times), fps, False, float(packets.times[-1]) + 1 / fps)


def number_frames(packets: Packets, fps: float) -> np.ndarray:
    """Return the numbers of the frames of a file of constant rate, in which lost frames are counted: int64 (T)."""
    return _count_intervals(np.diff(packets.times), _find_regular(packets)[1], fps)


def _find_regular(packets: Packets) -> tuple[float, np.ndarray]:
    """Return the usual interval between frames in seconds, and which intervals equal it but for rounding: bool."""
    steps = np.diff(packets.times)
    # An actual interval, not the mean of the middle two.
    usual = float(np.sort(steps)[len(steps) // 2]) if len(steps) else 0.0
    rounding_sec = min(1.01 * packets.tick_sec, 0.51 * usual)  # a step of two ticks instead of one is a lost frame
    return usual, np.abs(steps - usual) <= _REGULAR_SHARE * usual + rounding_sec


def _count_intervals(steps: np.ndarray, is_regular: np.ndarray, fps: float) -> np.ndarray:
    counts = np.where(is_regular, 1, np.maximum(np.rint(steps * fps), 1)).astype(np.int64)
    return np.append(0, np.cumsum(counts))


def read_packets(path: str | os.PathLike[str]) -> Packets:
    """Return the times of all packets of a file's video; ValueError if it has none."""
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
def _probe(path: str, size: int, time: int) -> VideoInfo:
    if size == 0:
        raise ValueError(f"{path} has no video that ffmpeg can read: the file is empty")
    lines = _about(path, size, time)
    streams = [_Stream(lines, n) for n, line in enumerate(lines) if re.match(r" +Stream #0:\d+.*?: Video: ", line)]
    shown = [stream for stream in streams if not stream.is_picture and stream.width]
    if not shown:
        raise ValueError(f"{path} has no video that ffmpeg can read: {_why_none(lines, streams)}")
    stream = max(shown, key=_Stream.rank)
    width, height = stream.width, stream.height
    # The container's pixel aspect, which ffmpeg prints last, takes precedence over the codec's.
    if aspects := re.findall(r"\bSAR (\d+):(\d+)", stream.line):
        width = round(width * int(aspects[-1][0]) / int(aspects[-1][1]))
    turns = 0
    if rotation := re.search(r"rotation of (-?[\d.]+) degrees", stream.text):
        turns = round(-float(rotation[1]) / 90) % 4
        height, width = (width, height) if turns % 2 else (height, width)
    # Matrix, primaries and transfer function; a single word if all have the same name.
    colors, pixels = stream.colors, stream.pixels
    triple = next((c.split("/") for c in colors if re.fullmatch(r"[\w-]+(/[\w-]+/[\w-]+)?", c) and c not in _WORDS), [])
    names = [None if name in ("unknown", "reserved") else name for name in triple] or [None]
    rate = re.search(r"([\d.]+)(k?) (?:fps|tbr)", stream.line)
    text = "\n".join(lines)
    duration = re.search(r"^  Duration: (\d+):(\d+):([\d.]+)", text, re.MULTILINE)
    start = re.search(r"^  Duration: .*, start: (-?[\d.]+)", text, re.MULTILINE)
    depth = int(digits[1]) if (digits := re.search(r"(\d\d)(?:le|be)$", pixels)) else 8
    fps = float(rate[1]) * (1000 if rate[2] else 1) if rate else 0.0
    # ffmpeg prints two decimals.
    exact = [near for near in _usual_rates(fps) if abs(near - fps) <= 0.0051] if fps else []
    # The fourth byte of uncompressed pixels in an AVI has no meaning.
    is_padded = stream.codec == "rawvideo" and "avi" in _container(lines)
    return VideoInfo(
        height=height,
        width=width,
        fps=min(exact, key=lambda near: abs(near - fps), default=fps),
        duration_sec=int(duration[1]) * 3600 + int(duration[2]) * 60 + float(duration[3]) if duration else None,
        codec=stream.codec,
        bit_depth=depth if depth <= 16 else 16 if depth in (48, 64) else 8,
        matrix=names[0],
        transfer=names[-1],
        is_interlaced=any(re.match(r"(top|bottom) ", color) for color in colors),
        is_high_definition=stream.height >= 720 or stream.width >= 1280,
        container=_container(lines),
        start_sec=float(start[1]) if start else 0.0,
        stream=stream.number,
        quarter_turns=turns,
        has_alpha=not is_padded and bool(_ALPHA.match(pixels) or re.search(r"alpha_mode *: 1", stream.text)),
    )


class _Stream:
    """What ffmpeg prints about a video stream: a line, followed by lines about it with a deeper indentation."""

    def __init__(self, lines: list[str], first: int) -> None:
        self.line = lines[first]
        indent = self.line[: self.line.index("Stream")] + "  "  # streams that belong together are printed as a group
        about = itertools.takewhile(lambda line: line.startswith(indent), lines[first + 1 :])
        self.text = "\n".join([self.line, *about])
        self.number = int(self.line.split("#0:")[1].split("[")[0].split("(")[0].split(":")[0])
        self.is_picture = any(f"({mark})" in self.line for mark in _PICTURES)
        found = re.search(r": Video: (\w+)[^,]*, (\w+)(?:\((.*?)\))?, (\d+)x(\d+)", self.text)
        self.codec, self.pixels, colors, width, height = found.groups() if found else ("", "", "", "0", "0")
        self.colors = (colors or "").split(", ")
        self.width, self.height = int(width), int(height)

    def rank(self) -> tuple[bool, bool, int]:
        """Return a key that is largest for the stream which players show."""
        return self.codec not in _PICTURE_CODECS, "(default)" in self.line, self.height * self.width


_WORDS = ("tv", "pc", "progressive")
_PICTURES = ("attached pic", "timed thumbnails", "still image", "dependent")  # streams that players do not show
_PICTURE_CODECS = ("bmp", "gif", "mjpeg", "png", "tiff", "webp")  # covers and previews, if there is another stream
_ALPHA = re.compile(r"rgba|argb|bgra|abgr|yuva|gbrap|ya\d|pal8|ayuv|vuya|uyva")


def _container(lines: list[str]) -> str:
    return next((line.split(", from ")[0].split(", ", 1)[1] for line in lines if line.startswith("Input #0, ")), "")


def _why_none(lines: list[str], streams: list[_Stream]) -> str:
    """Return why a file has no video, given what ffmpeg says about the file."""
    if any(stream.is_picture for stream in streams):
        return "it holds a cover picture only"
    if streams:
        return streams[0].line.strip()
    if any(re.match(r" +Stream #0:\d+.*?: Audio: ", line) for line in lines):
        return "it holds audio only"
    messages = [found[1] for line in lines if (found := re.match(r"\[[^]]*\] (?!Format |Error opening )(.*)", line))]
    reason = f"{messages[0]}: {lines[-1]}" if messages else lines[-1]
    is_cut = "moov atom not found" in reason and not any("misdetection possible" in line for line in lines)
    return f"its end is missing, since copying or recording was cut off ({reason})" if is_cut else reason


@functools.lru_cache(maxsize=64)
def _scan(path: str, size: int, time: int) -> Timing:
    return measure(_read_packets(path, size, time), _probe(path, size, time).fps)


@functools.lru_cache(maxsize=64)
def _read_packets(path: str, size: int, time: int) -> Packets:
    info = _probe(path, size, time)  # raises ValueError if there is no video
    stream, kind = info.stream, info.container.split(",")[0]
    ticks, table, errors, code = _list_packets(path, "-map", f"0:{stream}")
    tick, table = ticks.get(0, Fraction(0)), table[:, 1:]
    is_key = (table[:, 4] & 1 > 0) & (table[:, 3] > 0)
    # Packets before the first key frame cannot be decoded, and editors leave packets marked to be discarded.
    table = table[np.argmax(is_key) :] if is_key.any() else table
    if len(table) == 0:
        raise ValueError(f"{path} has no frames: {errors[-1] if code and errors else 'its video is empty'}")
    first = table[0]
    is_timed = table[:, 1] != _NO_PTS
    # In Matroska, pictures before the start of the file, which was cut from another, have no time.
    is_seekable = bool(is_timed[0] and (is_timed | ((kind == "matroska") & (table[:, 0] <= first[1]))).all())
    # Without presentation times, decoding times are the same except for order and a constant delay.
    delay = first[1] - first[0] if first[1] != _NO_PTS else 0
    shown = table[:, 1] if is_seekable else table[:, 0] + delay
    keep = table[:, 4] & 4 == 0
    if kind == "avi" and _is_even(shown[table[:, 3] > 0]):  # empty packets only pass the time up to the next frame
        keep &= table[:, 3] > 0
    # Pictures that are shown before the first key frame, but follow it in the file, can be decoded or not.
    leading = keep & (shown < shown[0])
    times = np.unique(shown[keep & ~leading])
    text = "\n".join(errors)
    if re.search("Non-monotonic DTS|replacing by guess", text):  # times that ffmpeg changed without being asked to
        decoded = _decode_times(path, stream)
        is_seekable = is_seekable and np.array_equal(times, decoded)
        times = times if is_seekable or _NO_PTS in decoded else decoded
    elif is_seekable and leading.any():
        decoded = _decode_times(path, stream, int(np.count_nonzero(leading)) + 1)
        times = np.union1d(times, decoded[(decoded < shown[0]) & (decoded > _NO_PTS)])
    if len(times) == 0:
        raise ValueError(f"{path} has no frames: its video is empty")
    keys = keep & (table[:, 4] & 1 > 0)
    last = table[keep][np.argmax(shown[keep])]
    return Packets(
        times=(times - times[0]) * float(tick),
        keys=(shown[keys] - times[0]) * float(tick),
        origin_sec=float(times[0] * tick),
        tick_sec=float(tick),
        last_sec=float(max(int(last[2]), 0) * tick),
        num_empty=int(np.count_nonzero(table[keep, 3] == 0)),
        is_seekable=is_seekable and "timestamp discontinuity" not in text,
        key_orders=(table[keys, 0] - times[0]) * float(tick),
    )


def _is_even(times: np.ndarray) -> bool:
    """Return whether the intervals between times differ by at most a tick."""
    return len(times) > 1 and bool(np.ptp(np.diff(np.sort(times))) <= 1)


def _list_packets(path: str, *streams: str) -> tuple[dict[int, Fraction], np.ndarray, list[str], int]:
    """Return the tick of each stream in seconds, all packets in the order of the file, messages and exit code.

    A packet is a row of int64: number of the stream, decoding and presentation time, duration, size and flags.
    """
    # The container's times need no decoding; framecrc prints them in integer ticks.
    copy = [*streams, "-c", "copy", "-copyinkf", "-f", "framecrc", "pipe:1"]
    text, errors, code = _ffmpeg("-v", "warning", "-i", f"file:{path}", *copy)
    ticks: dict[int, Fraction] = {}
    rows: list[tuple[int, ...]] = []
    for line in text.splitlines():
        if line.startswith("#tb "):
            ticks[int(line[4:].partition(":")[0])] = Fraction(line.split()[-1])
        elif not line.startswith("#"):
            *numbers, _, flags = line.split(",", 6) if line.count(",") > 5 else (*line.split(","), "")
            rows.append((*map(int, numbers), int(flags.split(",")[0][3:], 16) if flags.startswith(" F=") else 1))
    return ticks, np.array(rows, np.int64).reshape(-1, 6), errors, code


def _decode_times(path: str, stream: int, num_frames: int | None = None) -> np.ndarray:
    """Return the times of all frames, or of the first ones, that can be decoded, in ticks, ascending: int64 (T)."""
    stats = [
        "-stats_enc_pre:v",
        "pipe:1",
        "-stats_enc_pre_fmt",
        "{ptsi}",
        "-fps_mode",
        "passthrough",
        "-f",
        "null",
        "-",
    ]
    first = [] if num_frames is None else ["-frames:v", str(num_frames)]
    text = _ffmpeg("-v", "error", "-i", f"file:{path}", "-map", f"0:{stream}", *first, *stats)[0]
    return np.unique(np.array(text.split(), np.int64))


def _is_usual(fps: float) -> bool:
    return any(math.isclose(fps, rate) for rate in _usual_rates(fps))


def _usual_rates(fps: float) -> list[float]:
    """Return the rates near `fps` that videos usually have: n and n * 1000 / 1001 for an integer n."""
    return [rate for rate in (float(round(fps)), round(fps * 1.001) * 1000 / 1001) if rate]


# ----------------------------------------------------------------------------
# Files whose end is missing.

# A file may be this much shorter than it states, since lengths are often rounded or those of a plan.
_MISSING_SHARE, _MISSING_SEC = 0.1, 1.0
# Containers that state a length; that of others is an estimate of ffmpeg, wrong where times jump.
_STATING = ("mov", "matroska", "avi", "asf", "flv", "rm", "mxf", "nut")
# Of these, ffmpeg notices wherever the file is cut off or overwritten: otherwise the stated length is not its own.
_NOTICING = ("matroska", "flv")


def missing_end(path: str | os.PathLike[str]) -> str | None:
    """Return why a video file seems to be cut off, None if it is whole: if any of its streams reaches the stated end.

    Sound or subtitles may be longer than the pictures, and times may start at any value.
    """
    info, packets = probe(path), read_packets(path)
    stated_sec, kind = info.duration_sec, info.container.split(",")[0]
    size, stated_size = os.path.getsize(path), _stated_size(path) if kind == "asf" else 0
    if size < stated_size * (1 - _MISSING_SHARE):
        return f"it states {stated_size} bytes but holds {size}"
    if stated_sec is None or kind not in _STATING:
        return None
    needed_sec = stated_sec * (1 - _MISSING_SHARE) - _MISSING_SEC
    if info.start_sec + packets.end_sec >= needed_sec:
        return None
    ticks, table, messages, _ = _list_packets(os.fspath(path), "-map", "0", "-map", "-0:t?", "-copy_unknown")
    ends = [
        float((np.maximum(rows[:, 1], rows[:, 2]) + np.maximum(rows[:, 3], 0)).max() * tick)
        for number, tick in ticks.items()
        if len(rows := table[table[:, 0] == number])
    ]
    if (end_sec := info.start_sec + max(ends, default=0.0)) >= needed_sec:
        return None
    damage = next((line for line in messages if DAMAGE.search(line) or line.startswith("[in#0")), None)
    if damage is None and len(table) and table[-1, 5] & _CORRUPT:
        damage = "its last packet is incomplete"
    if damage is None and kind in _NOTICING:
        return None
    return f"it states {stated_sec:.1f} s but its last packet ends at {end_sec:.1f} s" + (
        f" ({damage})" if damage else ""
    )


def _stated_size(path: str | os.PathLike[str]) -> int:
    """Return the size in bytes that an ASF file states, 0 if it is not found; ffmpeg adapts the length to the size."""
    with open(path, "rb") as file:
        start = file.read(1 << 16)
    place = start.find(_ASF_PROPERTIES)
    return int.from_bytes(start[place + 40 : place + 48], "little") if place >= 0 else 0


_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
