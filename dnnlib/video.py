"""Write and read videos through pipes to the ffmpeg program that comes with imageio-ffmpeg, a frame at a time."""

import contextlib
import functools
import itertools
import math
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Generator, Iterator
from fractions import Fraction
from typing import Any

import imageio_ffmpeg
import numpy as np

from dnnlib import util
from dnnlib.video_probe import (
    DAMAGE,
    Packets,
    Timing,
    VideoInfo,
    count_frames,
    missing_end,
    number_frames,
    probe,
    read_comment,
    read_packets,
    scan,
)

__all__ = [
    "Timing",
    "VideoInfo",
    "VideoWriter",
    "iter_video_frames",
    "missing_end",
    "pixel_factor",
    "probe",
    "scan",
    "whole_factor",
]

# Encoder options by suffix; {crf} is the constant rate factor. Colours are converted by the matrix that is written into
# the file, so that players need not guess it. Every GIF frame has its own palette, since ffmpeg would hold the whole
# video in memory to compute a common one, and is stored whole, since ffmpeg compares numbers of colours of two palettes
# to find unchanged pixels.
_BT709 = "scale=out_color_matrix=bt709:out_range=tv,format=yuv420p"
_BT709_TAGS = ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"]
_ENCODERS = {
    ".mp4": ["-vf", _BT709, "-c:v", "libx264", "-crf", "{crf}", *_BT709_TAGS, "-movflags", "+faststart"],
    ".webm": ["-vf", _BT709, "-c:v", "libvpx-vp9", "-crf", "{crf}", "-b:v", "0", "-row-mt", "1", *_BT709_TAGS],
    ".gif": [
        "-vf",
        "split[frames][same];[same]palettegen=stats_mode=single[palette];[frames][palette]paletteuse=new=1",
        *("-gifflags", "0"),
    ],
}

# Frames are decoded with square pixels: video with a sample aspect ratio other than 1 is scaled in width.
_SQUARE_PIXELS = "scale=w='if(gt(sar,0),max(1,round(iw*sar)),iw)':h=ih:flags=bicubic+accurate_rnd+full_chroma_int"
# ffmpeg converts to planar RGB by SIMD code, to packed RGB by plain C that takes four times as long. For the formats of
# these codecs both give equal values, and packing copies them.
_PLANAR = "format=gbrp,scale"
_PLANAR_CODECS = ("av1", "h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4", "vp8", "vp9")
# PQ and HLG are mapped to standard dynamic range: white of 203 nits (ITU-R BT.2408) becomes 1; values up to 0.3 are
# unchanged, larger ones are compressed to keep highlights. In RGB, as zscale refuses odd sizes with subsampled chroma.
_TONE_MAP = (
    "format=gbrp12,zscale=tin={transfer}:pin=bt2020:min=gbr:rin=full:t=linear:npl=203,format=gbrpf32,zscale=p=bt709,"
    "tonemap=mobius:desat=0,zscale=t=bt709:m=gbr:r=full,scale"
)
# Transparent parts are shown over black, as in images.
_OVER_BLACK = "scale=in_color_matrix={matrix},format={pixels},premultiply=inplace=1"
_UPRIGHT = ([], ["transpose=clock"], ["hflip", "vflip"], ["transpose=cclock"])
# Decoders that ffmpeg does not choose by itself, but which decode transparency.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# With several threads, ffmpeg's decoder of Theora and its predecessors sometimes returns pictures of the next key frame
# instead of the current ones, more often on a busy machine.
_ONE_THREAD = ("theora", "vp3", "vp4")
# A file ends early if more than this share of its frames, and this many, are missing in a row; a few may be coded but
# never shown.
_MISSING_SHARE, _MISSING_FRAMES = 0.1, 2
_NANOSECONDS = "settb=1/1000000000"  # as the unit of time, so that nothing is rounded to less
_LEAD = 32  # frames before a window in which the picture that it begins with is sought
_SLACK = 0.05  # frames that a time may lie after that of a frame which begins at it


class _Ffmpeg:
    """A running ffmpeg whose error output is read by a thread, so that it never blocks."""

    def __init__(self, arguments: list[str], **pipes: Any) -> None:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-v", "error", *arguments]
        # In a session of its own, as Ctrl-C in a terminal would make ffmpeg complete an unfinished file.
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, **pipes)
        self._first_line = self._last_line = ""
        self.damage: str | None = None  # an error message about missing data
        self._reader = threading.Thread(target=self._drain, daemon=True)
        self._reader.start()

    def _drain(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if text := re.sub(r" @ 0x[0-9a-f]+", "", line.decode(errors="replace").strip()):
                self._first_line = self._first_line or text
                self._last_line = text
                if DAMAGE.search(text):
                    self.damage = text

    def wait(self) -> int:
        """Wait for the process to end and return its exit code."""
        code = self.process.wait()
        self._reader.join()
        return code

    def first_line(self) -> str:
        """Return the first line of the error output, usually the cause of the others; call after `wait`."""
        return self._first_line or f"exit code {self.process.returncode}"

    def last_line(self) -> str:
        """Return the last line of the error output; call after `wait`."""
        return self._last_line or f"exit code {self.process.returncode}"

    def close(self) -> None:
        """Kill the process if it still runs, and close its pipes."""
        self.process.kill()
        self.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def whole_factor(height: int, width: int) -> int:
    """Return the smallest integer factor that makes both edges multiples of 16: 4 for 36x64, 1 for 144x256."""
    return 16 // math.gcd(16, height, width)


_REPEATED = "pixels repeated {} times, to {}x{}"  # the comment of a file: factor, height, width


def pixel_factor(path: str | os.PathLike[str]) -> int:
    """Return how often `VideoWriter` repeated each pixel of a file along both edges, 1 for any other file.

    Programs that scale a video keep its comment, so the size in it must be that of the video.
    """
    numbers = re.fullmatch(_REPEATED.replace("{}", "([0-9]+)"), read_comment(path) or "")
    if numbers is None:
        return 1
    factor, height, width = map(int, numbers.groups())
    info = probe(path)
    is_whole = factor > 0 and height % factor == width % factor == 0
    return factor if is_whole and (height, width) == (info.height, info.width) else 1


class VideoWriter:
    """Encode frames as they arrive: a context manager whose complete file appears when it is left without an error.

    The suffix of `path` selects the format: .mp4 (H.264, 4:2:0), .webm (VP9) or .gif. `enlarge=True` repeats each pixel
    `whole_factor` times along both edges, so that small frames stay sharp in players (36x64 becomes 144x256), or
    `factor` times, if given; otherwise an odd edge is made even by repeating its last line, as 4:2:0 needs. The file
    says how often, see `pixel_factor`. `fps` is in frames per second, `crf` is the constant rate factor of the encoder.
    After an exception the new file is removed, and an older file of that name is unchanged. Raises ValueError for
    another suffix, if encoding fails or if no frames were written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        height: int,
        width: int,
        fps: float = 30.0,
        crf: int = 18,
        enlarge: bool = False,
        factor: int | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self.height = height
        self.width = width
        self.fps = fps
        self.crf = crf
        self.factor = factor or (whole_factor(height, width) if enlarge else 1)
        self.num_frames = 0
        self._comment = ""
        suffix = os.path.splitext(self.path)[1].lower()
        if suffix not in _ENCODERS:
            raise ValueError(f"cannot write {self.path}: use one of {', '.join(_ENCODERS)}")
        self._encoder = [argument.format(crf=crf) for argument in _ENCODERS[suffix]]

    def __enter__(self) -> "VideoWriter":
        height, width = (edge * self.factor + edge * self.factor % 2 for edge in (self.height, self.width))
        with contextlib.ExitStack() as stack:
            try:
                self._temporary = stack.enter_context(util.atomic_path(self.path))
            except OSError as error:
                raise ValueError(f"cannot encode {self.path}: {error.strerror}") from error
            source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{self.fps:.12g}"]
            if self.factor > 1 and height % self.factor == width % self.factor == 0:
                self._comment = _REPEATED.format(self.factor, height, width)
            about = ["-metadata", f"comment={self._comment}"] if self._comment else []
            target = ["-i", "pipe:0", "-an", *self._encoder, *about, "-y", f"file:{self._temporary}"]
            self._ffmpeg = _Ffmpeg([*source, *target], stdin=subprocess.PIPE)
            stack.callback(self._ffmpeg.close)
            self._stack = stack.pop_all()
        return self

    def write(self, frames: np.ndarray) -> None:
        """Append frames: uint8 (T, height, width, 3)."""
        assert frames.dtype == np.uint8 and frames.shape[1:] == (self.height, self.width, 3), (
            f"expected uint8 (T, {self.height}, {self.width}, 3), got {frames.dtype} {frames.shape}"
        )
        assert self._ffmpeg.process.stdin is not None
        frames = frames.repeat(self.factor, axis=1).repeat(self.factor, axis=2)
        odd = [(0, edge % 2) for edge in frames.shape[1:3]]
        frames = np.pad(frames, ((0, 0), *odd, (0, 0)), mode="edge")
        try:
            for frame in frames:
                self._ffmpeg.process.stdin.write(np.ascontiguousarray(frame).data)
        except BrokenPipeError:
            self._ffmpeg.wait()
            raise ValueError(f"cannot encode {self.path}: {self._ffmpeg.last_line()}") from None
        self.num_frames += len(frames)

    def __exit__(self, *exception: Any) -> None:
        if exception[0] is not None:
            self._stack.__exit__(*exception)
            return
        with contextlib.ExitStack() as stack:
            stack.push(self._stack)
            if self.num_frames == 0:
                raise ValueError(f"no frames were written to {self.path}")
            assert self._ffmpeg.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._ffmpeg.process.stdin.close()
            if self._ffmpeg.wait() != 0:
                raise ValueError(f"cannot encode {self.path}: {self._ffmpeg.last_line()}")
            if self.path.lower().endswith(".gif") and self._comment:
                self._add_comment()

    def _add_comment(self) -> None:
        """Put the comment into a GIF, for which ffmpeg writes none; it would take one at the end for a frame."""
        comment = b"\x21\xfe" + bytes([len(self._comment)]) + self._comment.encode() + b"\0"
        with (
            util.atomic_path(self._temporary) as temporary,
            open(self._temporary, "rb") as source,
            open(temporary, "wb") as target,
        ):
            head = source.read(13)
            table = source.read(3 << (head[10] & 7) + 1 if head[10] & 0x80 else 0)
            target.write(head + table + comment)
            shutil.copyfileobj(source, target)


def iter_video_frames(
    path: str | os.PathLike[str],
    fps: float | None = None,
    start_sec: float = 0.0,
    end_sec: float | None = None,
    frames: range | None = None,
) -> Iterator[np.ndarray]:
    """Yield the frames of a file's video between two times, or those of the given numbers, each uint8 (H, W, 3) RGB.

    Times are in seconds from the first frame; a frame at `end_sec` is left out. Frames are rotated as the file's
    metadata says, have square pixels, are deinterlaced if the file is marked as interlaced, are mapped from high to
    standard dynamic range, and have black where they are transparent. With `fps` they are repeated or dropped to that
    rate; otherwise each coded frame is returned once, except that a variable frame rate is made constant at
    `scan(path).fps`. The picture before stands for one that is missing. If the frame size changes, later frames are
    scaled to the first size. Raises ValueError if decoding fails anywhere, or ends early.
    """
    timing, packets = scan(path), read_packets(path)
    rate = fps if fps is not None else timing.fps if timing.is_variable else None
    if rate is not None:
        if frames is not None:
            start_sec, end_sec = frames.start / rate, frames.stop / rate
        length_sec = min(timing.duration_sec, math.inf if end_sec is None else end_sec) - start_sec
        read = functools.partial(_read_resampled, path, timing, rate, start_sec, count_frames(length_sec, rate))
    else:
        if frames is None:
            numbers = number_frames(packets, timing.fps)
            ends = (start_sec * timing.fps, math.inf if end_sec is None else end_sec * timing.fps)
            frames = range(*(int(number) for number in np.searchsorted(numbers, np.subtract(ends, _SLACK))))
        read = functools.partial(_read_coded, path, range(frames.start, min(frames.stop, timing.num_frames)))
    for is_sought in (True, False):
        found = read(packets, is_sought)
        try:
            first = next(found, None)
        except ValueError:
            if not is_sought:
                raise
            continue  # no frame can be decoded from the key frame that was sought, or too late a one was found
        if first is not None:
            yield first
            yield from found
        return


def _read_coded(
    path: str | os.PathLike[str], frames: range, packets: Packets, is_sought: bool
) -> Generator[np.ndarray, None, None]:
    """Yield the frames of these numbers; the one before is repeated in place of those that are missing.

    If the file `is_sought`, raise ValueError if the first one is not found; else it is read from its start.
    """
    if not frames:
        return
    edges = (packets.times[1:] + packets.times[:-1]) / 2
    lead = 0 if is_sought else min(_LEAD, frames.start)
    if packets.is_seekable:
        start = [f"start={edges[frames.start - lead - 1]:.6f}"] if frames.start > lead else []
        end = [f"end={edges[frames.stop - 1]:.6f}"] if frames.stop <= len(edges) else []
        trim = [f"trim={':'.join(start + end)}"] if start or end else []
    else:  # all are decoded, and their times are guessed
        trim = [f"trim=start_frame={frames.start}:end_frame={frames.stop}"]
    due, held = frames.start, None
    seek_sec = float(packets.times[frames.start]) if is_sought else 0.0
    with contextlib.closing(_decode(path, packets, seek_sec, trim)) as decoded:
        for time, _, frame in decoded:
            number = int(np.searchsorted(edges, time)) if packets.is_seekable else due
            if number < due:  # before the window, or a second picture at one time
                held = frame if number < frames.start else held
                continue
            _refuse_gap(path, packets, due, math.inf if held is None and is_sought and number > due else number)
            yield from itertools.repeat(frame if held is None else held, number - due)
            yield frame
            held, due = frame, number + 1
    _refuse_gap(path, packets, due, math.inf if held is None else frames.stop)
    if held is not None:
        yield from itertools.repeat(held, frames.stop - due)


def _read_resampled(
    path: str | os.PathLike[str],
    timing: Timing,
    rate: float,
    start_sec: float,
    num_frames: int,
    packets: Packets,
    is_sought: bool,
) -> Generator[np.ndarray, None, None]:
    """Yield the frames from a time on at a constant rate.

    If the file `is_sought`, raise ValueError if the first one is not found; else it is read from its start.
    """
    if num_frames == 0:
        return
    # At half the rate each second frame is due midway between two that are wanted. It belongs to the later one, however
    # its time was rounded: else steps are uneven, and windows hold other frames than the whole video.
    rounding_sec = min(packets.tick_sec, 0.25 / timing.fps, 0.25 / rate) + 2e-6
    exact = Fraction(rate).limit_denominator(100_000)
    filters = [
        f"setpts=PTS-{(start_sec - rounding_sec) * 1e9:.0f}",
        f"fps={exact.numerator}/{exact.denominator}:eof_action=pass",
        "tpad=stop=-1:stop_mode=clone",  # the last frame may be shown for long
        _NANOSECONDS,
        f"trim=start={-0.25 / rate:.9f}:end={(num_frames - 0.5) / rate:.9f}",
    ]
    dues = packets.times + rounding_sec - start_sec
    edges = (packets.times[1:] + packets.times[:-1]) / 2
    num_read = 0
    with contextlib.closing(_decode(path, packets, start_sec if is_sought else 0.0, filters)) as decoded:
        for _, time, frame in decoded:
            due = int(np.searchsorted(dues, (num_read + 0.5) / rate, side="right")) - 1
            number = due if math.isnan(time) else int(np.searchsorted(edges, time))
            _refuse_gap(path, packets, number, math.inf if is_sought and number > due and num_read == 0 else due)
            yield frame
            num_read += 1
    _refuse_gap(path, packets, 0, math.inf if num_read < num_frames else 0)


def _refuse_gap(path: str | os.PathLike[str], packets: Packets, due: int, found: float) -> None:
    """Raise ValueError if too many frames are missing from frame `due` to frame `found`."""
    num_frames = len(packets.times)
    if found - due > _MISSING_FRAMES + _MISSING_SHARE * num_frames + packets.num_empty:
        raise ValueError(
            f"{path} ends early: of its {num_frames} frames none could be decoded from {packets.times[due]:g} s on"
        )


def _decode(
    path: str | os.PathLike[str], packets: Packets, seek_sec: float, filters: list[str]
) -> Generator[tuple[float, float, np.ndarray], None, None]:
    """Yield the frames that filters let pass, decoded from a key frame before `seek_sec` on.

    Each comes with its time after the filters, and that in the file, NaN if it has none. All times are in seconds from
    the first frame of the file, also those that filters see.
    """
    info = probe(path)
    seek_sec = _choose_key(packets, seek_sec)
    shift_sec = packets.origin_sec - seek_sec
    timed = [
        _NANOSECONDS,
        f"setpts=PTS-{shift_sec * 1e9:.0f}" if packets.is_seekable else "setpts=PTS-STARTPTS",
    ]
    deinterlace = ["bwdif=mode=send_frame:deint=interlaced"] if info.is_interlaced else []
    # Interlaced frames are rotated after their fields are joined.
    rotate = _UPRIGHT[info.quarter_turns] if info.is_interlaced else []
    chain = ",".join([*deinterlace, *timed, *filters, *rotate, *_choose_colors(info)])
    source = ["-noautorotate"] if info.is_interlaced else []
    source += ["-threads", "1"] if info.codec in _ONE_THREAD else []
    source += ["-c:v", _ALPHA_DECODERS[info.codec]] if info.has_alpha and info.codec in _ALPHA_DECODERS else []
    source += ["-ss", f"{seek_sec:.6f}", "-noaccurate_seek"] if seek_sec else []
    read_end, write_end = os.pipe()
    # -xerror makes damaged frames an error; ffmpeg would conceal the damage.
    command = ["-xerror", *source, "-i", f"file:{os.fspath(path)}", "-map", f"0:{info.stream}", "-vf", chain]
    # PPM frames contain their own size, so that the size in the file's metadata is not relied on.
    command += ["-fps_mode", "passthrough", "-enc_time_base", "1/1000000000", "-f", "image2pipe", "-c:v", "ppm"]
    command += ["-stats_enc_pre:v", f"pipe:{write_end}", "-stats_enc_pre_fmt:v", "{pts} {ptsi} {tbi}", "pipe:1"]
    with open(read_end, "rb") as times:
        try:
            ffmpeg = _Ffmpeg(command, stdout=subprocess.PIPE, pass_fds=[write_end])
        finally:
            os.close(write_end)
        try:
            stdout = ffmpeg.process.stdout
            assert stdout is not None
            while stdout.readline():  # P6
                width, height = (int(edge) for edge in stdout.readline().split())
                stdout.readline()  # 255
                data = stdout.read(height * width * 3)
                if len(data) == height * width * 3:
                    time, source_time, tick = times.readline().split()
                    is_timed = packets.is_seekable and int(source_time) >= 0
                    source_sec = int(source_time) * _seconds(tick) - shift_sec if is_timed else math.nan
                    yield int(time) / 1e9, source_sec, np.frombuffer(data, np.uint8).reshape(height, width, 3)
            if ffmpeg.wait() != 0 or ffmpeg.damage:
                raise ValueError(f"cannot decode {path}: {ffmpeg.damage or ffmpeg.first_line()}")
        finally:
            ffmpeg.close()


@functools.lru_cache(maxsize=8)
def _seconds(tick: bytes) -> float:
    return float(Fraction(tick.decode()))


def _choose_key(packets: Packets, start_sec: float) -> float:
    """Return the time from the start of the file to seek to, so that a frame can be decoded; 0: do not seek."""
    number = int(np.searchsorted(packets.keys, start_sec, side="right")) - 1
    if not packets.is_seekable or number < 1:
        return 0.0
    # Seeking in MPEG streams may land one key frame late, and elsewhere follows the order of packets in the file, so
    # seek one key frame early.
    time = min(float(packets.keys[number - 1]), float(packets.key_orders[number]) - packets.tick_sec)
    return round(packets.origin_sec + time, 6) if time > 0 else 0.0


def _choose_colors(info: VideoInfo) -> list[str]:
    """Return ffmpeg filters that convert the video of a file to 8-bit RGB with square pixels."""
    if info.matrix is not None:
        matrix = "auto"  # the matrix of each frame
    else:
        matrix = "bt2020" if info.is_hdr else "bt709" if info.is_high_definition else "bt601"
    pixels = "gbrap" if info.bit_depth == 8 else "gbrap12"
    blend = [_OVER_BLACK.format(matrix=matrix, pixels=pixels)] if info.has_alpha else []
    tone_map = [_TONE_MAP.format(transfer=info.transfer)] if info.is_hdr else []
    planar = [_PLANAR] if info.codec in _PLANAR_CODECS and not (info.has_alpha or info.is_hdr) else []
    return [*blend, f"{_SQUARE_PIXELS}:in_color_matrix={matrix}", *tone_map, *planar, "format=rgb24", "setsar=1"]
