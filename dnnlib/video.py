"""Write and read videos through pipes to the ffmpeg program that comes with imageio-ffmpeg, a frame at a time."""

import collections
import contextlib
import math
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import imageio_ffmpeg
import numpy as np

from dnnlib import util

# What makes a file of each kind; {crf} is the constant rate factor. Colours are converted by the matrix that the file
# then names, so that players do not guess; a GIF has a palette of its own for the whole video.
_BT709 = "scale=out_color_matrix=bt709:out_range=tv,format=yuv420p"
_BT709_TAGS = ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"]
_ENCODERS = {
    ".mp4": ["-vf", _BT709, "-c:v", "libx264", "-crf", "{crf}", *_BT709_TAGS, "-movflags", "+faststart"],
    ".webm": ["-vf", _BT709, "-c:v", "libvpx-vp9", "-crf", "{crf}", "-b:v", "0", "-row-mt", "1", *_BT709_TAGS],
    ".gif": ["-vf", "split[frames][all];[all]palettegen[palette];[frames][palette]paletteuse"],
}

# Frames leave square: footage with oblong pixels is widened to the shape at which it is meant to be seen.
_SQUARE_PIXELS = "scale=w='if(gt(sar,0),round(iw*sar),iw)':h=ih:flags=bicubic+accurate_rnd+full_chroma_int,setsar=1"


@dataclass(frozen=True)
class VideoInfo:
    """What a file says about its first video stream; `height` and `width` are as seen, after any rotation."""

    height: int
    width: int
    fps: float
    duration_sec: float | None
    codec: str


class _Ffmpeg:
    """A running ffmpeg whose error output is drained, so that it never blocks, and whose last lines are kept."""

    def __init__(self, arguments: list[str], **pipes: Any) -> None:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-v", "error", *arguments]
        # Its own session: Ctrl-C in a terminal is for us to handle, not for ffmpeg to finish a half-written file.
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, **pipes)
        self._lines = collections.deque[str](maxlen=20)
        self._reader = threading.Thread(target=self._drain, daemon=True)
        self._reader.start()

    def _drain(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if text := line.decode(errors="replace").strip():
                self._lines.append(text)

    def wait(self) -> int:
        """Wait for the end and return the exit code."""
        code = self.process.wait()
        self._reader.join()
        return code

    def last_line(self) -> str:
        """The last thing ffmpeg complained about; call after `wait`."""
        return self._lines[-1] if self._lines else f"exit code {self.process.returncode}"

    def close(self) -> None:
        """End it at once if it still runs, and close its pipes."""
        self.process.kill()
        self.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


class VideoWriter:
    """Encode frames as they come: a context manager whose file appears, whole, when the context is left normally.

    The suffix of `path` decides the kind: .mp4 (H.264, 4:2:0), .webm (VP9) or .gif. `enlarge=True` repeats each pixel
    by the smallest whole factor that makes both edges multiples of 16, so that small frames stay crisp in players
    (36x64 becomes 144x256); otherwise an odd edge is made even by repeating its last line, as 4:2:0 needs.
    After an exception nothing is left of the new file, and an older file of that name stays.
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
        self.factor = 16 // math.gcd(16, height, width) if enlarge else 1
        self.num_frames = 0
        suffix = os.path.splitext(self.path)[1].lower()
        if suffix not in _ENCODERS:
            raise ValueError(f"cannot write {self.path}: use one of {', '.join(_ENCODERS)}")
        self._encoder = [argument.format(crf=crf) for argument in _ENCODERS[suffix]]

    def __enter__(self) -> "VideoWriter":
        height, width = (edge * self.factor + edge * self.factor % 2 for edge in (self.height, self.width))
        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(util.atomic_path(self.path))
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
    """The frames of a video's first video stream between two times, each uint8 (H, W, 3), decoded when asked for.

    Frames come upright, as the file's rotation says, with square pixels, and at `fps` frames a second if given: frames
    are then repeated or dropped, else each coded frame comes once. ValueError if the file cannot be decoded.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a file")
    window = ["-ss", f"{start_sec:.6f}"] if start_sec else []
    window += ["-t", f"{end_sec - start_sec:.6f}"] if end_sec is not None else []
    rate, timing = ([f"fps={fps:.12g}"], []) if fps is not None else ([], ["-fps_mode", "passthrough"])
    filters = ",".join([*rate, _SQUARE_PIXELS])
    # PPM frames carry their own size, so nothing rests on what the file claims about itself.
    output = ["-vf", filters, *timing, "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "pipe:1"]
    ffmpeg = _Ffmpeg([*window, "-i", f"file:{os.fspath(path)}", "-map", "0:v:0", *output], stdout=subprocess.PIPE)
    try:
        stdout = ffmpeg.process.stdout
        assert stdout is not None
        while stdout.readline():  # P6
            width, height = (int(edge) for edge in stdout.readline().split())
            stdout.readline()  # 255
            data = stdout.read(height * width * 3)
            if len(data) == height * width * 3:
                yield np.frombuffer(data, np.uint8).reshape(height, width, 3)
        if ffmpeg.wait() != 0:
            raise ValueError(f"cannot decode {path}: {ffmpeg.last_line()}")
    finally:
        ffmpeg.close()


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Size, frame rate, length and codec of a file's first video stream; ValueError if it has none."""
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a file")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-i", f"file:{os.fspath(path)}"]
    text = subprocess.run(command, stderr=subprocess.PIPE, check=False).stderr.decode(errors="replace")
    stream = re.search(r"Stream #.*?: Video: (\w+).*?, (\d+)x(\d+)(.*(?:\n\s{4,}(?!Stream).*)*)", text)
    if stream is None:
        last_line = text.strip().splitlines()[-1]
        raise ValueError(f"{path} has no video that ffmpeg can read: {last_line}")
    width, height, rest = int(stream[2]), int(stream[3]), stream[4]
    if pixel_aspect := re.search(r"\[SAR (\d+):(\d+)", rest):
        width = round(width * int(pixel_aspect[1]) / int(pixel_aspect[2]))
    if rotation := re.search(r"rotation of (-?[\d.]+) degrees", rest):
        height, width = (width, height) if round(float(rotation[1]) / 90) % 2 else (height, width)
    rate = re.search(r"([\d.]+)(k?) (?:fps|tbr)", rest)
    duration = re.search(r"Duration: (\d+):(\d+):([\d.]+)", text)
    return VideoInfo(
        height=height,
        width=width,
        fps=float(rate[1]) * (1000 if rate[2] else 1) if rate else 0.0,
        duration_sec=int(duration[1]) * 3600 + int(duration[2]) * 60 + float(duration[3]) if duration else None,
        codec=stream[1],
    )
