"""Write and read videos through pipes to the ffmpeg program that comes with imageio-ffmpeg, a frame at a time."""

import contextlib
import math
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import imageio_ffmpeg
import numpy as np

from dnnlib import util
from dnnlib.video_probe import Timing, VideoInfo, probe, read_packets, scan

__all__ = ["Timing", "VideoInfo", "VideoWriter", "iter_video_frames", "probe", "scan", "whole_factor"]

# Encoder options by suffix; {crf} is the constant rate factor. Colours are converted by the matrix that is written into
# the file, so that players need not guess it. Every GIF frame has its own palette, since ffmpeg would hold the whole
# video in memory to compute a common one.
_BT709 = "scale=out_color_matrix=bt709:out_range=tv,format=yuv420p"
_BT709_TAGS = ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"]
_ENCODERS = {
    ".mp4": ["-vf", _BT709, "-c:v", "libx264", "-crf", "{crf}", *_BT709_TAGS, "-movflags", "+faststart"],
    ".webm": ["-vf", _BT709, "-c:v", "libvpx-vp9", "-crf", "{crf}", "-b:v", "0", "-row-mt", "1", *_BT709_TAGS],
    ".gif": [
        "-vf",
        "split[frames][same];[same]palettegen=stats_mode=single[palette];[frames][palette]paletteuse=new=1",
    ],
}

# Frames are decoded with square pixels: video with a sample aspect ratio other than 1 is scaled in width.
_SQUARE_PIXELS = "scale=w='if(gt(sar,0),max(1,round(iw*sar)),iw)':h=ih:flags=bicubic+accurate_rnd+full_chroma_int"
# PQ and HLG are mapped to standard dynamic range: white of 203 nits (ITU-R BT.2408) becomes 1; values up to 0.3 are
# unchanged, larger ones are compressed to keep highlights. In RGB, as zscale refuses odd sizes with subsampled chroma.
_TONE_MAP = (
    "format=gbrp12,zscale=tin={transfer}:pin=bt2020:min=gbr:rin=full:t=linear:npl=203,format=gbrpf32,zscale=p=bt709,"
    "tonemap=mobius:desat=0,zscale=t=bt709:m=gbr:r=full,scale"
)
# With several threads, ffmpeg's decoder of Theora and its predecessors sometimes returns pictures of the next key frame
# instead of the current ones, more often on a busy machine.
_ONE_THREAD = ("theora", "vp3", "vp4")
# ffmpeg reports these but exits with 0, although the truncated or overwritten part is missing from the frames.
_DAMAGE = re.compile(r"partial file|ended prematurely|exceeds containing master element|packet_obj_size \d+ invalid")


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
                if _DAMAGE.search(text):
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


class VideoWriter:
    """Encode frames as they arrive: a context manager whose complete file appears when it is left without an error.

    The suffix of `path` selects the format: .mp4 (H.264, 4:2:0), .webm (VP9) or .gif. `enlarge=True` repeats each pixel
    `whole_factor` times along both edges, so that small frames stay sharp in players (36x64 becomes 144x256); otherwise
    an odd edge is made even by repeating its last line, as 4:2:0 needs. `fps` is in frames per second, `crf` is the
    constant rate factor of the encoder.
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
    ) -> None:
        self.path = os.fspath(path)
        self.height = height
        self.width = width
        self.fps = fps
        self.crf = crf
        self.factor = whole_factor(height, width) if enlarge else 1
        self.num_frames = 0
        suffix = os.path.splitext(self.path)[1].lower()
        if suffix not in _ENCODERS:
            raise ValueError(f"cannot write {self.path}: use one of {', '.join(_ENCODERS)}")
        self._encoder = [argument.format(crf=crf) for argument in _ENCODERS[suffix]]

    def __enter__(self) -> "VideoWriter":
        height, width = (edge * self.factor + edge * self.factor % 2 for edge in (self.height, self.width))
        with contextlib.ExitStack() as stack:
            try:
                temporary = stack.enter_context(util.atomic_path(self.path))
            except OSError as error:
                raise ValueError(f"cannot encode {self.path}: {error.strerror}") from error
            source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{self.fps:.12g}"]
            target = ["-i", "pipe:0", "-an", *self._encoder, "-y", f"file:{temporary}"]
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


def iter_video_frames(
    path: str | os.PathLike[str], fps: float | None = None, start_sec: float = 0.0, end_sec: float | None = None
) -> Iterator[np.ndarray]:
    """Yield the frames of a file's first video stream between two times, each uint8 (H, W, 3) RGB.

    Times are in seconds from the first frame; a frame at `end_sec` is left out. Frames are rotated as the file's
    metadata says, have square pixels, are deinterlaced if the file is marked as interlaced, are mapped from high to
    standard dynamic range, and have no alpha. With `fps` they are repeated or dropped to that rate; otherwise each
    coded frame is returned once, except that a variable frame rate is made constant at `scan(path).fps`. If the frame
    size changes, later frames are scaled to the first size. Raises ValueError if decoding fails anywhere.
    """
    info = probe(path)
    timing = scan(path)
    rate = fps if fps is not None else timing.fps if timing.is_variable else None
    window, times = _choose_frames(path, timing, rate, start_sec, end_sec)
    deinterlace = ["bwdif=mode=send_frame:deint=interlaced"] if info.is_interlaced else []
    filters = ",".join([*deinterlace, *times, *_choose_colors(info)])
    # PPM frames contain their own size, so that the size in the file's metadata is not relied on.
    output = ["-vf", filters, "-fps_mode", "passthrough", "-f", "image2pipe", "-c:v", "ppm", "pipe:1"]
    # -xerror makes damaged frames an error; ffmpeg would conceal the damage.
    threads = ["-threads", "1"] if info.codec in _ONE_THREAD else []
    source = ["-xerror", *threads, *window, "-i", f"file:{os.fspath(path)}", "-map", "0:V:0"]
    ffmpeg = _Ffmpeg([*source, *output], stdout=subprocess.PIPE)
    try:
        stdout = ffmpeg.process.stdout
        assert stdout is not None
        while stdout.readline():  # P6
            width, height = (int(edge) for edge in stdout.readline().split())
            stdout.readline()  # 255
            data = stdout.read(height * width * 3)
            if len(data) == height * width * 3:
                yield np.frombuffer(data, np.uint8).reshape(height, width, 3)
        if ffmpeg.wait() != 0 or ffmpeg.damage:
            raise ValueError(f"cannot decode {path}: {ffmpeg.damage or ffmpeg.first_line()}")
    finally:
        ffmpeg.close()


def _choose_frames(
    path: str | os.PathLike[str], timing: Timing, rate: float | None, start_sec: float, end_sec: float | None
) -> tuple[list[str], list[str]]:
    """Return ffmpeg input options and filters that keep the frames between two times, at a constant `rate` if given."""
    packets = read_packets(path)
    # Seeking in MPEG streams may land one key frame late, so seek one key frame early.
    earlier = packets.keys[packets.keys <= start_sec][:-1]
    seek_sec = 0.0
    filters = ["settb=1/1000000"]
    if packets.is_seekable:
        seek_sec = round(packets.origin_sec + float(earlier[-1]), 6) if len(earlier) and earlier[-1] > 0 else 0.0
        filters.append(f"setpts=PTS-{(packets.origin_sec + start_sec - seek_sec) * 1e6:.0f}")
    else:
        filters.append(f"setpts=PTS-STARTPTS-{start_sec * 1e6:.0f}")
    # Times in the file are rounded to its ticks.
    rounding_sec = min(packets.tick_sec, 0.25 / timing.fps) + 2e-6
    if rate is not None:
        exact = Fraction(rate).limit_denominator(100_000)
        # At half the rate each second frame is due midway between two that are wanted. It belongs to the later one,
        # however its time was rounded: else steps are uneven, and windows hold other frames than the whole video.
        filters.append(f"setpts=PTS+{rounding_sec * 1e6:.0f}")
        if timing.is_variable:  # the last frame may stay for long
            filters.append("tpad=stop=-1:stop_mode=clone")
            end_sec = min(timing.duration_sec, math.inf if end_sec is None else end_sec)
        filters += [f"fps={exact.numerator}/{exact.denominator}", "settb=1/1000000"]
        slack_sec = 0.25 / rate
    else:
        slack_sec = rounding_sec
    if start_sec > 0 or end_sec is not None:
        end = f":end={end_sec - start_sec - slack_sec:.6f}" if end_sec is not None else ""
        filters.append(f"trim=start={-slack_sec:.6f}{end}")
    return ["-ss", f"{seek_sec:.6f}", "-noaccurate_seek"] if seek_sec else [], filters


def _choose_colors(info: VideoInfo) -> list[str]:
    """Return ffmpeg filters that convert the video of a file to 8-bit RGB with square pixels."""
    if info.matrix is not None:
        matrix = "auto"  # the matrix of each frame
    else:
        matrix = "bt2020" if info.is_hdr else "bt709" if info.is_high_definition else "bt601"
    tone_map = [_TONE_MAP.format(transfer=info.transfer)] if info.is_hdr else []
    return [f"{_SQUARE_PIXELS}:in_color_matrix={matrix}", *tone_map, "format=rgb24", "setsar=1"]
