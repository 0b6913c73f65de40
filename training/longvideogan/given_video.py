"""Low-resolution videos that the user has, as files, in place of a low-resolution network's."""

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset_tools.frames import center_crop_and_resize
from dataset_tools.make_dataset_from_frames import find_frames, read_image
from dnnlib.video import iter_video_frames, scan
from training.data.dataset import to_float
from training.longvideogan.sampling import SuperResSource, latent_z

PIECE_FRAMES = 8  # frames of the file handed over at once


class GivenVideo:
    """The super-resolution of a given video: a source of frames at both resolutions, as a pair of networks is.

    Frames of the file are cut and resized to what the network enlarges, as frames of a dataset are. The frames beyond
    either end, which the network looks at, repeat the first and the last one.
    """

    def __init__(self, path: Path, sres: SuperResSource):
        self.path = path
        self.sres = sres
        self.height, self.width = sres.height, sres.width
        self.lres_size = (sres.network.lres_height, sres.network.lres_width)

    def both(self, seeds: Sequence[int], start: int, num_frames: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Frames [start, start + num_frames) of the file, or as many of them as there are, for each seed:
        successive ((N, 3, T, h, w), (N, 3, T, H, W)). ValueError if the file ends before `start`."""
        lres_frames = (piece.expand(len(seeds), -1, -1, -1, -1) for piece in self._pieces(start, num_frames))
        return self.sres.matched(lres_frames, torch.from_numpy(latent_z(seeds, self.sres.network.z_channels)))

    def _pieces(self, start: int, num_frames: int | None) -> Iterator[Tensor]:
        """The frames with their context, in float32 pieces (1, 3, T, h, w)."""
        piece: list[np.ndarray] = []
        for frame in self._with_context(start, num_frames):
            piece.append(center_crop_and_resize(frame, *self.lres_size))
            if len(piece) == PIECE_FRAMES:
                yield self._to_tensor(piece)
                piece = []
        if piece:
            yield self._to_tensor(piece)

    def _to_tensor(self, piece: list[np.ndarray]) -> Tensor:
        return to_float(torch.from_numpy(np.stack(piece)[None]), self.sres.network.SG3.mapping.w_avg.device)

    def _with_context(self, start: int, num_frames: int | None) -> Iterator[np.ndarray]:
        """Frames [start - context, start + num_frames + context) of the file, or up to `context` behind its last."""
        context = self.sres.context
        stop = None if num_frames is None else start + num_frames
        frame, number = None, -1
        for number, frame in enumerate(iter_frames(self.path)):
            if stop is not None and number >= stop + context:
                return
            repeats = max(context - start, 0) if number == 0 else 0
            yield from [frame] * (repeats + (number >= start - context))
        if frame is None or number < start:
            raise ValueError(f"{self.path} has {number + 1} frames, none at {start} or later: use a smaller --start")
        last = number if stop is None else min(number, stop - 1)
        yield from [frame] * (last + context - number)


def frame_rate(path: Path) -> float | None:
    """Frames a second of a video file; None for pictures and arrays, which have no rate."""
    return None if path.is_dir() or path.suffix.lower() == ".npz" else scan(path).fps


def iter_frames(path: Path) -> Iterator[np.ndarray]:
    """The frames of a video file, of a folder of pictures in the order of their names, or of an npz file.

    Each is uint8 (H, W, 3). Raises `ValueError` naming what cannot be read.
    """
    if path.is_dir():
        return _iter_pictures(path)
    if path.suffix.lower() == ".npz":
        return _iter_array(path)
    return iter_video_frames(path)


def _iter_pictures(folder: Path) -> Iterator[np.ndarray]:
    names = find_frames(folder).get(".")
    if names is None:
        raise ValueError(f"{folder} holds no pictures: expected files such as 000000.png, in the order of their names")
    for name in names:
        yield read_image(folder / name)


def _iter_array(path: Path) -> Iterator[np.ndarray]:
    """Stream the first array of an npz file, a frame at a time."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(archive.namelist()[0]) as file:
            np.lib.format.read_magic(file)
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[3] != 3:
                raise ValueError(f"its array is {dtype} {shape}")
            for _ in range(shape[0]):
                yield np.frombuffer(file.read(int(np.prod(shape[1:]))), np.uint8).reshape(shape[1:])
    except (OSError, ValueError, IndexError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}; expected one array of frames, uint8 (T, H, W, 3)") from error
