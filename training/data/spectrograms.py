"""Spectrograms of sound, one image for each frame of a video: what a tokenizer of sound encodes.

An image is `BINS` frequencies x `COLUMNS` times, in [-1, 1]. Row k is the frequency (k + 1) * RATE / WINDOW, 125 Hz to
8 kHz; columns divide the time of the frame evenly. 1 is a sine of full scale, -1 is `FLOOR_DB` below that or less.

The release of TATS (Ge et al., ECCV 2022) gives arrays [frames, frequencies, times] in [0, 1] for each clip, of other
sizes and without their recipe: `prepare` is how it brings them to the size of its network.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dnnlib.text import one_line
from torch_utils.safe_pickle import load_arrays
from training.data.arrays import load_npy
from training.data.audio import read_audio

BINS, COLUMNS = SIZE = 64, 16
NUM_VALUES = BINS * COLUMNS  # of a frame, in the stream of a dataset: row by row
RATE = 16000  # samples per second
WINDOW = 2 * BINS  # samples of a column
FLOOR_DB = 80.0
MISSING_SEC = 0.25  # of the end of a track that may be missing, as encoders cut it where a packet ends
SUFFIXES = (".pickle", ".npy")  # of files with arrays of the release

_PIECE_FRAMES = 1024  # that are transformed at once


def prepare(stft: np.ndarray) -> np.ndarray:
    """Return the images of an array of the release (T, F, L) in [0, 1]: float32 (T, BINS, COLUMNS) in [-1, 1].

    Bilinear without antialiasing, as published.
    """
    x = torch.from_numpy(np.ascontiguousarray(stft, np.float32)) * 2 - 1
    return F.interpolate(x[None], SIZE, mode="bilinear", align_corners=False)[0].numpy()


def spectrograms(samples: np.ndarray, fps: float, first: int, count: int) -> np.ndarray:
    """Return the images of frames first, first + 1, ... of samples at `RATE`: float32 (count, BINS, COLUMNS).

    Frame t covers the times t / fps to (t + 1) / fps; there is silence before and after the samples.
    """
    taper = np.hanning(WINDOW + 1)[:-1]
    found = np.empty((count, BINS, COLUMNS), np.float32)
    padded = np.concatenate([np.zeros(WINDOW, np.float32), samples, np.zeros(WINDOW, np.float32)])
    for done in range(0, count, _PIECE_FRAMES):
        frames = np.arange(first + done, first + min(done + _PIECE_FRAMES, count))
        centres = (frames[:, None] + (np.arange(COLUMNS) + 0.5) / COLUMNS) * (RATE / fps)
        begins = (np.rint(centres).astype(np.int64) - BINS + WINDOW).clip(0, len(padded) - WINDOW)
        windows = padded[begins[..., None] + np.arange(WINDOW)] * taper  # (frames, COLUMNS, WINDOW)
        amplitudes = np.abs(np.fft.rfft(windows)[..., 1:]) * (2 / taper.sum())
        level = 20 * np.log10(np.maximum(amplitudes, 1e-9)) / FLOOR_DB + 1
        found[done : done + len(frames)] = (2 * level.clip(0, 1) - 1).swapaxes(1, 2)
    return found


def read_sound(
    path: str | os.PathLike[str], fps: float, num_frames: int | None = None, start_sec: float = 0.0
) -> np.ndarray:
    """Return the images of the audio track of a file, from `start_sec` on: float16 (T, NUM_VALUES).

    `num_frames` are as many as are needed; without it T is the length of the track, to the nearest frame. Raises
    `ValueError` if the file has no audio track, cannot be decoded, or is too short.
    """
    reach = None if num_frames is None else int(np.ceil(num_frames / fps * RATE)) + WINDOW
    samples = read_audio(path, RATE, start_sec, reach)
    length = len(samples) / RATE
    if num_frames is not None and length < num_frames / fps - MISSING_SEC:
        raise ValueError(
            f"the audio of {path} lasts {length:.3g} s from {start_sec:g} s on, but its {num_frames} frames last "
            f"{num_frames / fps:.3g} s: give a file whose sound is as long as its pictures"
        )
    count = round(length * fps) if num_frames is None else num_frames
    if count == 0:
        raise ValueError(f"the audio of {path} lasts {length:.3g} s, which is less than a frame: give a longer one")
    return spectrograms(samples, fps, 0, count).reshape(count, NUM_VALUES).astype(np.float16)


def read_published(path: Path, num_frames: int | None = None) -> np.ndarray:
    """Return the images of a file of the release: float16 (T, NUM_VALUES).

    The file is a pickle, whose code is not run, or a .npy. Raises `ValueError` if it holds no such array, or another
    number of frames than `num_frames`.
    """
    try:
        if path.suffix == ".npy":
            stft = load_npy(path)
        else:
            with open(path, "rb") as file:
                stft = np.asarray(load_arrays(file))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as spectrograms ({one_line(error)}); copy it again") from error
    if stft.ndim != 3 or stft.dtype.kind not in "fiu" or not stft.size:
        raise ValueError(
            f"{path} holds {stft.dtype} of shape {list(stft.shape)}, expected spectrograms [frames, frequencies, times]"
        )
    if not (stft.min() >= 0 and stft.max() <= 1):
        raise ValueError(f"{path} has values from {stft.min():g} to {stft.max():g}, expected spectrograms in [0, 1]")
    if num_frames is not None and len(stft) < num_frames:
        raise ValueError(f"{path} has {len(stft)} spectrograms, but the video has {num_frames} frames: give one each")
    return prepare(stft[:num_frames]).reshape(-1, NUM_VALUES).astype(np.float16)


def images_of(values: Tensor) -> Tensor:
    """Return values of a stream (N, T, NUM_VALUES) as a clip of one channel: (N, 1, T, BINS, COLUMNS)."""
    return values.unflatten(2, SIZE).unsqueeze(1)


def is_of_sound(network: Any) -> bool:
    """Return whether a tokenizer encodes spectrograms of sound, which have one channel, and no frames."""
    return getattr(network, "options", {}).get("channels") == 1
