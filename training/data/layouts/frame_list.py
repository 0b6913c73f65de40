"""Read lists of frames as MeBT does (Yoo et al., CVPR 2023): `train.txt` and `test.txt`, a line for each image.

Images are named `<video>_<number>.<suffix>`. A video ends where the name of the video changes or a number is missing.
"""

import re
from collections.abc import Sequence
from pathlib import Path, PurePath

import numpy as np

from dnnlib.text import one_line
from training.data.layouts.base import Layout, check_frames, file_fingerprint
from training.data.listing import Remarks, clip_name, free_name
from training.data.pictures import read_image
from training.data.shards import Clip, Size

MAX_BYTES = 1 << 30
_NAME = re.compile(r"(?P<video>.*)_(?P<number>[0-9]{1,18})\.[^./]+")


def group_frames(lines: Sequence[str], legacy: bool = False) -> list[list[str]]:
    """Return the videos of a list of images, each as the images in order.

    The released reader, which `legacy` reproduces, sorts the lines as text, so that a video whose numbers differ in
    their digits falls apart, and loses the last video. Raises `ValueError` for a name without a number.
    """
    keyed = [(*_split_name(line), line) for line in lines]
    keyed = sorted(keyed, key=lambda item: item[2]) if legacy else sorted(keyed)
    videos: list[list[str]] = []
    before: tuple[str, int] | None = None
    for video, number, line in keyed:
        if before is None or (video, number) != (before[0], before[1] + 1):
            videos.append([])
        videos[-1].append(line)
        before = video, number
    return videos[:-1] if legacy else videos


def _split_name(line: str) -> tuple[str, int]:
    match = _NAME.fullmatch(line)
    if match is None:
        raise ValueError(f"its line {one_line(line, 80)} is no image such as video_0001.png, with a number after _")
    return match["video"], int(match["number"])


class FrameList(Layout):
    """The videos of one list."""

    title = "list of frames of MeBT"
    resizer = "mebt"

    def __init__(self, path: Path, split: str | None = None) -> None:
        self.path, self.split, self.remarks = path, split, Remarks()
        try:
            if path.stat().st_size > MAX_BYTES:
                raise ValueError(f"it has more than {MAX_BYTES >> 20} MiB")
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
            videos = group_frames(list(dict.fromkeys(line for line in lines if line)))
        except (OSError, ValueError) as error:  # which includes text that is no UTF-8
            reason = one_line(error)
            raise ValueError(
                f"{path} is no list of frames ({reason}); expected the path of an image on each line"
            ) from error
        if not videos:
            raise ValueError(f"{path} is empty; expected the path of an image on each line")
        self._frames = [[self._resolve(line) for line in video] for video in videos]
        self.clips = self._name(videos)
        first = self._frames[0][0]
        if not first.is_file():
            raise ValueError(f"there is no {first}, which {path} lists; copy the images, or correct the list")
        self._size = check_frames(read_image(first).shape, np.dtype(np.uint8), str(first))

    @property
    def name(self) -> str:
        """See `Layout.name`."""
        return f"{self.path.resolve().parent.name}/{self.path.stem}"

    def _resolve(self, line: str) -> Path:
        """Return the place of an image: as it is written, or relative to the list."""
        path = Path(line)
        return path if path.is_absolute() else self.path.parent / path

    def _name(self, videos: Sequence[Sequence[str]]) -> list[Clip]:
        """Return clips named by folder and video, inside the folder that all videos share."""
        stems = [PurePath(_split_name(video[0])[0]) for video in videos]
        parents = [stem.parent.parts for stem in stems]
        shared = 0
        while len({parts[: shared + 1] for parts in parents}) == 1 and shared < min(map(len, parents)):
            shared += 1
        taken: set[str] = set()
        names = (clip_name(PurePath(*stem.parts[shared:])) for stem in stems)
        return [Clip(free_name(name, taken), len(video)) for name, video in zip(names, videos, strict=True)]

    @property
    def size(self) -> Size:
        """See `Layout.size`."""
        return self._size

    def read(self, clip: int, frames: Sequence[int]) -> np.ndarray:
        """See `Layout.read`."""
        images = []
        for frame in frames:
            path = self._frames[clip][frame]
            images.append(read_image(path))
            if images[-1].shape != images[0].shape:
                sizes = ["{}x{}".format(*image.shape) for image in (images[-1], images[0])]
                raise ValueError(
                    f"{path} is {sizes[0]}, but other images of its video are {sizes[1]}; bring all to one size"
                )
        return np.stack(images)

    def fingerprint(self, clip: int) -> bytes:
        """See `Layout.fingerprint`."""
        ends = (self._frames[clip][0], self._frames[clip][-1])
        missing = next((path for path in ends if not path.is_file()), None)
        if missing is not None:
            raise ValueError(f"there is no {missing}, which {self.path} lists; copy the images, or correct the list")
        return b"".join(map(file_fingerprint, ends))
