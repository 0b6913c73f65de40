"""Read folders of videos, arrays or images, with the values of each frame beside them.

- TECO (Yan et al., ICML 2023): `<root>/{train,test}/*/*.npz` with `video`, uint8 (T, H, W, 3), and `actions`, or
  `*.mp4` with a `.npz` of the same name that has `actions`; without that file no action is taken.
- TATS (Ge et al., ECCV 2022): `<root>/{train,test}/<class>/*.mp4`, or folders of images.
- Recordings: `clip.mp4` with `clip.actions.json`, .npy or .csv.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

import numpy as np

from training.data.clip_files import ClipFile, open_clip_files
from training.data.layouts.base import Layout, file_fingerprint
from training.data.listing import Remarks, clip_names, free_name, kind_of
from training.data.shards import Clip, Size
from training.data.stream_files import fit_length, npz_streams, read_npz_stream
from training.data.stream_values import NONE, Values, read_values_file
from training.data.streams import StreamShard

_SAMPLES = 16  # clips that are looked at to find out which streams there are


class Folder(Layout):
    """All clips below a folder, named by their paths."""

    title = "folder of videos or images"

    def __init__(self, path: Path, split: str | None = None) -> None:
        self.path, self.split, self.remarks = path, split, Remarks()
        self._files = open_clip_files(path, self.remarks)
        # Folders of images have their names already; those of files lose the suffix.
        paths = [PurePath(file.clip.path) for file in self._files if not _is_pictures(file)]
        names, taken = clip_names(paths), {file.clip.path for file in self._files if _is_pictures(file)}
        found = {name: free_name(name, taken) for name in names.values()}
        self.clips = []
        for file in self._files:
            name = file.clip.path if _is_pictures(file) else found[names[PurePath(file.clip.path)]]
            self.clips.append(Clip(name, file.clip.num_frames))
        rates = [file.fps for file in self._files if file.fps is not None]
        self.fps = max(set(rates), key=rates.count) if rates else None
        num_files = len(self._files)
        samples = {num_files * part // _SAMPLES for part in range(_SAMPLES)}
        self._streams = sorted({name for sample in sorted(samples) for name in _streams_of(self._files[sample])})

    @property
    def size(self) -> Size:
        """See `Layout.size`."""
        return self._files[0].size

    def read(self, clip: int, frames: Sequence[int]) -> np.ndarray:
        """See `Layout.read`."""
        file = self._files[clip]
        video = file.read(frames)
        if len(video) != len(frames):
            raise ValueError(
                f"{self.path / file.clip.path} gave {len(video)} of the frames {frames[0]} to {frames[-1]}: its file "
                "is damaged, so make or copy it again"
            )
        return video

    def iterate(self, clip: int) -> Iterator[np.ndarray]:
        """See `Layout.iterate`."""
        iterate = self._files[clip].iterate
        return super().iterate(clip) if iterate is None else iterate()

    def fingerprint(self, clip: int) -> bytes:
        """See `Layout.fingerprint`."""
        file = self._files[clip]
        ends = dict.fromkeys((file.files[0], file.files[-1]))
        return f"{file.clip.num_frames}{file.version}".encode() + b"".join(map(file_fingerprint, ends))

    def stream_names(self) -> list[str]:
        """See `Layout.stream_names`."""
        return self._streams

    def stream_shards(self, name: str) -> dict[Path, StreamShard]:
        """See `Layout.stream_shards`. A clip without values has "none" in all frames."""
        found = {}
        for clip, file in zip(self.clips, self._files, strict=True):
            path, values = _read_stream(file, name)
            if values is None:
                self.remarks.add(f'Without {name}, taken as "none"', clip.path)
                values = Values(np.zeros(clip.num_frames, np.int64), [NONE])
            values = fit_length(values, clip.num_frames)
            found[path] = StreamShard([clip.path], np.array([len(values.array)], np.int64), values)
        return found


def _is_pictures(file: ClipFile) -> bool:
    return kind_of(file.files[0]) == "picture"


def _streams_of(file: ClipFile) -> list[str]:
    """Return the names of the streams that a clip has."""
    names = [name for name in file.streams if name]
    return [*names, *(npz_streams(file.streams[""]) if "" in file.streams else [])]


def _read_stream(file: ClipFile, name: str) -> tuple[Path, Values | None]:
    """Return the values of a stream of a clip, None if it has none, and the file that holds them."""
    if name in file.streams:
        return file.streams[name], read_values_file(file.streams[name], name)
    path = file.streams.get("")
    if path is not None and name in npz_streams(path):
        return path, read_npz_stream(path, name)
    return path or file.files[0], None
