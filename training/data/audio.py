"""Read the audio track of a file as samples, through the ffmpeg program that comes with imageio-ffmpeg.

samples = read_audio("drums.mp4", 16000)                   # float32 (samples,) in [-1, 1]
"""

import os
import re
import subprocess

import imageio_ffmpeg
import numpy as np

from dnnlib.text import one_line

_MAX_RATE = 384_000


def read_audio(
    path: str | os.PathLike[str], rate: int, start_sec: float = 0.0, num_samples: int | None = None
) -> np.ndarray:
    """Return the first audio track of a file, mixed to one channel and resampled to `rate` Hz: float32 (samples,).

    Samples are in [-1, 1], or beyond where the file holds such. Times count from the begin of the file, and the track
    is padded by silence where it begins later. With `num_samples` so many are returned at most. Raises `ValueError` if
    the file has no audio track or cannot be decoded.
    """
    if not 1 <= rate <= _MAX_RATE:
        raise ValueError(f"the rate of samples is {rate} Hz, expected 1 to {_MAX_RATE}")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a file")
    # Missing samples at the begin and in the middle become silence, so that sample n is at n / rate seconds. Without
    # rematrix_maxval ffmpeg mixes floating-point channels louder than those of whole numbers, two by a factor of 1.41.
    filters = f"aresample={rate}:async=1:first_pts=0:ochl=mono:rematrix_maxval=1"
    limit = [] if num_samples is None else ["-t", f"{num_samples / rate + 1:.6f}"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-v", "error", "-xerror"]
    command += ["-ss", f"{start_sec:.6f}"] if start_sec else []
    command += ["-i", f"file:{os.fspath(path)}", "-map", "0:a:0", "-af", filters, *limit]
    command += ["-f", "f32le", "-c:a", "pcm_f32le", "pipe:1"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines()
        if any("matches no streams" in line for line in reason):
            raise ValueError(f"{path} has no audio track; give a file with sound")
        first = re.sub(r" @ 0x[0-9a-f]+", "", reason[0]) if reason else f"exit code {done.returncode}"
        raise ValueError(f"the audio track of {path} cannot be decoded ({one_line(first)}); copy or make it again")
    samples = np.frombuffer(done.stdout, "<f4", count=len(done.stdout) // 4).astype(np.float32)
    if not np.isfinite(samples).all():
        raise ValueError(f"the audio track of {path} has samples that are not finite; make it again")
    return samples[:num_samples]
