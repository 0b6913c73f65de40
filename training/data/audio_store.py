"""Read the stream "audio" of a dataset: a spectrogram of the sound of each frame (`training.data.spectrograms`).

Layout: each zip of frames or of tokens holds `audio.f16`, stored float16 (F, 64, 16) of all frames of all clips, one
clip after another, and `audio.json`, an object that maps each clip to its number of frames in that order. Numbers as
text, as other streams have, would take several times the bytes of the frames.
"""

import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from dnnlib.json_file import mapped
from dnnlib.text import one_line, quote
from dnnlib.zips import FAULTS, read_json_member, reason_of
from training.data.description import count_check
from training.data.shards import Clip, OpenFiles, locate_member
from training.data.spectrograms import NUM_VALUES
from training.data.streams import AUDIO, size_folders

VALUES, LISTING = f"{AUDIO}.f16", f"{AUDIO}.json"
DTYPE = np.dtype("<f2")
FRAME_BYTES = NUM_VALUES * DTYPE.itemsize


def make_command(root: Path) -> str:
    """Return the command that makes a dataset with sound."""
    return f"python -m dataset_tools.make_dataset_from_videos VIDEOS {quote(root)} --audio"


class AudioStore:
    """The spectrograms of given clips of a dataset, numbered in the given order; takes the place of a `StreamStore`.

    `folders` are searched for zips that have sound, then those of all frame sizes. Values are read with `os.pread`, so
    threads and forked processes may share a store. Raises `ValueError` if a clip has none, or not one for each frame.
    """

    name = AUDIO
    is_vector = True
    num_values = NUM_VALUES
    vocabulary: Sequence[str] | None = None

    def __init__(self, root: Path, clips: Sequence[Clip], folders: Sequence[Path] = ()) -> None:
        self.root, self.clips = root, list(clips)
        for folder in dict.fromkeys([*folders, *size_folders(root)]):
            self.shards = sorted(path for path in folder.glob("*.zip") if not path.name.startswith("."))
            places = {
                clip: (number, offset, length)
                for number, path in enumerate(self.shards)
                for clip, offset, length in open_audio_shard(path)
            }
            if places:
                break
        else:
            raise ValueError(
                f"{root} has no audio beside its frames; make it from videos with sound: {make_command(root)}"
            )
        self._places = [self._place(clip, places, folder) for clip in self.clips]
        self._files = OpenFiles(self.shards)

    def _place(self, clip: Clip, places: Mapping[str, tuple[int, int, int]], folder: Path) -> tuple[int, int]:
        """Return the zip of a clip and the offset of its values."""
        number, offset, length = places.get(clip.path, (0, 0, 0))
        if length != clip.num_frames:
            raise ValueError(
                f"clip {one_line(clip.path)} has {clip.num_frames} frames but audio for {length} in {folder}; make the "
                f"dataset again: {make_command(self.root)}"
            )
        return number, offset

    def read(self, clip: int, start: int, count: int, stride: int = 1) -> np.ndarray:
        """Return the spectrograms of `count` frames start, start + stride, ... of clip number `clip`.

        They are float32 (count, NUM_VALUES) in [-1, 1]. Raises `ValueError` naming the zip if it is damaged.
        """
        span = (count - 1) * stride + 1
        assert count > 0 and stride > 0 and 0 <= start and start + span <= self.clips[clip].num_frames
        number, offset = self._places[clip]
        data = os.pread(self._files.descriptor(number), span * FRAME_BYTES, offset + start * FRAME_BYTES)
        if len(data) == span * FRAME_BYTES:
            values = np.frombuffer(data, DTYPE).reshape(span, NUM_VALUES)[::stride].astype(np.float32)
            if np.abs(values).max() <= 1:  # which no value that is not finite is
                return values
        raise ValueError(
            f"the audio of clip {one_line(self.clips[clip].path)} in {self.shards[number]} is damaged; copy the shard "
            f"again, or make it: {make_command(self.root)}"
        )

    def read_all(self, clip: int) -> np.ndarray:
        """Return the spectrograms of all frames of a clip, as they are stored: float16 (T, NUM_VALUES)."""
        return self.read(clip, 0, self.clips[clip].num_frames).astype(DTYPE)


def has_audio(root: Path) -> bool:
    """Return whether a dataset has sound beside its frames, by the first zip of each size."""
    firsts = [min(folder.glob("[!.]*.zip"), default=None) for folder in (size_folders(root) if root.is_dir() else [])]
    return any(path is not None and any(True for _ in open_audio_shard(path)) for path in firsts)


def open_audio_shard(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield each clip of a zip with the offset of its spectrograms and their number; none for a zip without sound.

    Raises `ValueError` naming the zip if it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            names = set(archive.namelist())
            if LISTING not in names:
                return
            listing = read_json_member(archive, LISTING, mapped(count_check))
            offset, length, _, is_packed = locate_member(file.fileno(), archive.getinfo(VALUES), path)
            if is_packed or length != sum(listing.values()) * FRAME_BYTES:
                raise ValueError(f"{VALUES} has {length} bytes, which do not fit the frames that {LISTING} lists")
    except FAULTS as error:
        raise ValueError(f"the audio in {path} cannot be read ({reason_of(path, error)}); copy it again") from error
    for clip, num_frames in listing.items():
        yield clip, offset, num_frames
        offset += num_frames * FRAME_BYTES


def packed(arrays: Mapping[str, np.ndarray]) -> tuple[bytes, dict[str, int]]:
    """Return what `VALUES` and `LISTING` hold for the spectrograms of some clips, (T, NUM_VALUES) each."""
    content = b"".join(np.ascontiguousarray(array, DTYPE).tobytes() for array in arrays.values())
    return content, {clip: len(array) for clip, array in arrays.items()}
