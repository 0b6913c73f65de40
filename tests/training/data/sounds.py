"""A small dataset with sound, and videos with a tone."""

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from dataset_tools import archive
from dataset_tools.frames import encode_at_sizes
from tests.training.data.clips import drifting
from training.data.spectrograms import NUM_VALUES

CLIPS = {"a": 20, "b/c": 24}
SIZE = (8, 8)


def audio_of(name: str, num_frames: int) -> np.ndarray:
    """Return made-up spectrograms of a clip: float16 (T, NUM_VALUES) in [-1, 1]."""
    phase = np.arange(num_frames)[:, None] * 0.7 + np.arange(NUM_VALUES) * 0.013 + len(name)
    return np.sin(phase).astype(np.float16)


def write_heard(root: Path, is_heard: bool = True) -> Path:
    """Write the clips with sound at `SIZE`, one in each zip, and return the folder."""
    for index, (name, num_frames) in enumerate(CLIPS.items()):
        with archive.ShardWriter(root, [SIZE], index) as writer, writer.clip(name) as add:
            for frame in drifting(name, num_frames, SIZE):
                add(encode_at_sizes(frame, [SIZE]))
            if is_heard:
                add.notes["audio"] = audio_of(name, num_frames)
        archive.describe_dataset(root, [writer.report({30: 1})], len(CLIPS), ())
    return root


def write_tone(path: Path, seconds: float = 1.0, sound_seconds: float | None = None, hertz: int = 1000) -> Path:
    """Write a video of 10 frames a second, 32x32, with a tone of its length or of another one; 0: without."""
    length = seconds if sound_seconds is None else sound_seconds
    inputs = ["-f", "lavfi", "-i", f"testsrc=size=32x32:rate=10:duration={seconds}"]
    if length:
        inputs += ["-f", "lavfi", "-i", f"sine=frequency={hertz}:sample_rate=16000:duration={length}"]
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *inputs, "-c:a", "pcm_s16le", str(path)]
    subprocess.run(command, check=True)
    return path
