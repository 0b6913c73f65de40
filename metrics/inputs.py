"""Videos to measure, in whatever form they lie on a disk: datasets, video files, folders of pictures, npz arrays.

    side = open_videos("outputs/samples", fps=None)
    frames = side.footage.read(0, side.size, range(16))        # uint8 (16, H, W, 3)

Each form has the methods of `training.data.dataset.ClipDataset`, so that a clip gives the same number in any of them.
"""

import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dnnlib.download import file_sha256
from dnnlib.video import iter_video_frames, scan
from metrics import cache, checks
from metrics.samplers import READ_THREADS, Footage
from training.contract import Size
from training.data.dataset import ClipDataset
from training.data.shards import Clip, decode_rgb

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif", ".m4v", ".3gp", ".npz")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SIZE_FOLDER = re.compile(r"(\d{4,})x(\d{4,})")
ARRAYS_HELD = 4


@dataclass(frozen=True)
class Videos:
    """One side of a comparison that exists: footage, read at one size."""

    footage: Footage
    size: Size
    kind: str  # "dataset", "files" or "array"

    @functools.cached_property
    def content(self) -> str:
        """What the frames are, wherever they lie: 16 hex digits."""
        if isinstance(self.footage, ClipDataset):
            return cache.dataset_id(self.footage.path, self.size)
        assert isinstance(self.footage, (Files, Arrays)), "the forms there are"
        return self.footage.content()


class Arrays:
    """Videos in memory, uint8 (T, H, W, 3) each: one array (N, T, H, W, 3), or videos of several lengths."""

    def __init__(self, videos: Iterable[np.ndarray], name: str, fps: float | None = None) -> None:
        self.videos = list(videos)
        self.name, self.fps = name, fps
        if not self.videos:
            raise ValueError(f"{name} holds no video: give at least one")
        for video in self.videos:
            checks.check_array(video, name)
        self.clips = [Clip(f"{number:06d}", len(video)) for number, video in enumerate(self.videos)]
        if len({video.shape[1:] for video in self.videos}) > 1:
            raise ValueError(f"the videos of {name} differ in size: bring all to one")
        self.size = (self.videos[0].shape[1], self.videos[0].shape[2])

    def eligible(self, num_frames: int) -> list[int]:
        """Indices of the videos of at least `num_frames` frames; ValueError if there is none."""
        return _eligible(self, num_frames)

    def read(self, clip_index: int, size: Size, frames: Sequence[int]) -> np.ndarray:
        """Frames of a video: uint8 (T, H, W, 3)."""
        assert size == self.size, f"frames are {self.size}"
        return self.videos[clip_index][list(frames)]

    def content(self) -> str:
        """What the frames are: 16 hex digits."""
        digest = hashlib.sha256()
        for video in self.videos:
            digest.update(str(video.shape).encode() + np.ascontiguousarray(video).tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class _Opened:
    """One video of a folder."""

    clip: Clip
    size: Size
    fps: float | None
    read: Callable[[Sequence[int]], np.ndarray]  # ascending frame numbers -> uint8 (T, H, W, 3)
    files: tuple[Path, ...]


class Files:
    """Videos below a folder: video files, npz files with an array of one, or folders of pictures, by path."""

    def __init__(self, path: Path, fps: float | None = None) -> None:
        self.path, self.name = path, path.resolve().name
        found = _find(path)
        with ThreadPoolExecutor(READ_THREADS) as pool:
            self._videos = list(pool.map(functools.partial(_open, root=path, fps=fps), found))
        self.clips = [video.clip for video in self._videos]
        first = self._videos[0]
        for video in self._videos:
            if video.size != first.size:
                sizes = ["{}x{}".format(*v.size) for v in (first, video)]
                raise ValueError(
                    f"{path} mixes sizes: {first.clip.path} is {sizes[0]} and {video.clip.path} is {sizes[1]}; move "
                    "those of one size into a folder of their own"
                )
        self.size = first.size
        rates = [video.fps for video in self._videos if video.fps is not None]
        if rates and max(rates) > min(rates) * (1 + checks.RATE_TOLERANCE):
            raise ValueError(
                f"{path} mixes frame rates from {min(rates):g} to {max(rates):g}: give --fps={min(rates):g}, at which "
                "all are then read"
            )
        self.fps = rates[0] if rates else None

    def eligible(self, num_frames: int) -> list[int]:
        """Indices of the videos of at least `num_frames` frames; ValueError if there is none."""
        return _eligible(self, num_frames)

    def read(self, clip_index: int, size: Size, frames: Sequence[int]) -> np.ndarray:
        """Frames of a video, in ascending order: uint8 (T, H, W, 3)."""
        assert size == self.size, f"frames are {self.size}"
        video = self._videos[clip_index].read(frames)
        if video.shape != (len(frames), *size, 3):
            raise ValueError(
                f"{self.path / self.clips[clip_index].path} gave {len(video)} of the frames {frames[0]} to "
                f"{frames[-1]}: its file is damaged, so make or copy it again"
            )
        return video

    def content(self) -> str:
        """What the files hold, and how they are read: 16 hex digits."""
        digest = hashlib.sha256(f"{self.fps}".encode())
        for video in self._videos:
            digest.update(f"{video.clip.path} {video.clip.num_frames}".encode())
            for file in video.files:
                digest.update(file_sha256(file).encode())
        return digest.hexdigest()[:16]


def open_videos(path: str | Path, size: Size | None = None, fps: float | None = None) -> Videos:
    """The videos at a path: a dataset, of `size` if it has several; a video file; an npz file; or a folder of either,
    or of folders of pictures. With `fps` video files are read at that rate, and other footage must have it.

    Raises ValueError, saying what to do, for what cannot be read or is not what it should be.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"there is no {path}: give a dataset, a video or npz file, or a folder of videos or pictures")
    if is_dataset(path):
        sizes = _dataset_sizes(path)
        if size not in sizes and (size or len(sizes) > 1):
            names = ", ".join(f"{h}x{w}" for h, w in sizes)
            wanted = f"{size[0]}x{size[1]} was asked for" if size else "it has several"
            raise ValueError(f"the dataset {path} has frames of {names} and {wanted}: give one of them by --size")
        chosen = size or sizes[0]
        dataset = ClipDataset(path, [chosen])
        checks.check_rate(dataset.fps, fps, str(path))
        return Videos(dataset, chosen, "dataset")
    if path.suffix == ".npz":
        arrays = [load_array(path)]
        found: Arrays | Files = Arrays(arrays[0] if arrays[0].ndim == 5 else arrays, path.name)
        side = Videos(found, found.size, "array")
    else:
        found = Files(path, fps)
        side = Videos(found, found.size, "files")
    if size is not None and size != side.size:
        raise ValueError(
            f"the frames of {path} are {side.size[0]}x{side.size[1]}, not {size[0]}x{size[1]}: make a dataset of that "
            f"size: python -m dataset_tools.make_dataset_from_videos {path} DATASET --sizes={size[0]}x{size[1]}"
        )
    return side


def is_dataset(path: str | Path) -> bool:
    """Whether a path is the root of a dataset."""
    return Path(path).is_dir() and bool(_dataset_sizes(Path(path)))


def load_array(path: Path) -> np.ndarray:
    """The one array of an npz file, or the one called `frames`, `videos` or `video`: uint8 (N, T, H, W, 3) or
    (T, H, W, 3)."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = [name for name in archive.files if name in ("frames", "videos", "video")] or archive.files
            if len(names) != 1:
                raise ValueError(f"it has the arrays {', '.join(archive.files) or 'none'}: name the one `videos`")
            array = archive[names[0]]
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as an npz file of videos: {error}") from error
    checks.check_array(array, str(path))
    return array


# ----------------------------------------------------------------------------
# Folders.


def _eligible(footage: Footage, num_frames: int) -> list[int]:
    found = [number for number, clip in enumerate(footage.clips) if clip.num_frames >= num_frames]
    if not found:
        longest = max(clip.num_frames for clip in footage.clips)
        raise ValueError(
            f"{footage.name} has no clip of {num_frames} frames, which are needed; the longest of its "
            f"{len(footage.clips)} videos has {longest}; give longer videos or ask for fewer frames"
        )
    return found


def _dataset_sizes(path: Path) -> list[Size]:
    folders = [match for match in map(SIZE_FOLDER.fullmatch, sorted(p.name for p in path.iterdir())) if match]
    return [(int(m[1]), int(m[2])) for m in folders if any((path / m[0]).glob("*.zip"))]


def _find(path: Path) -> list[Path]:
    """Video files at or below a path, else folders that hold pictures."""
    if path.is_file():
        return [path]
    visible = [p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    files = [p for p in visible if p.suffix.lower() in VIDEO_SUFFIXES]
    folders = {p.parent for p in visible if p.suffix.lower() in PICTURE_SUFFIXES}
    found = sorted(files) or sorted(folders)
    if not found:
        raise ValueError(
            f"{path} holds no video file ({', '.join(VIDEO_SUFFIXES)}) and no folder of pictures: give a folder that "
            "does, or the root of a dataset"
        )
    return found


def _open(path: Path, root: Path, fps: float | None) -> _Opened:
    name = path.name if path == root else path.relative_to(root).as_posix()
    if path.is_dir():
        files = tuple(sorted((p for p in path.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES), key=_natural))
        with Image.open(files[0]) as image:
            size = (image.height, image.width)
        return _Opened(Clip(name, len(files)), size, None, functools.partial(_read_pictures, files, size), files)
    if path.suffix.lower() == ".npz":
        array = _held_array(path)
        if array.ndim != 4:
            raise ValueError(f"{path} holds several videos; in a folder each npz file holds one: give it by itself")
        size = (array.shape[1], array.shape[2])
        return _Opened(Clip(name, len(array)), size, None, functools.partial(_read_array, path), (path,))
    timing = scan(path)
    rate = timing.fps if fps is None or abs(timing.fps / fps - 1) < checks.RATE_TOLERANCE else fps
    is_native = rate == timing.fps and not timing.is_variable
    # What ffmpeg makes of the last moment at another rate is not known exactly, so a frame is left.
    num_frames = timing.num_frames if is_native else max(1, int(timing.duration_sec * rate) - 1)
    first = next(iter_video_frames(path))
    read = functools.partial(_read_video, path, rate, None if is_native else rate)
    return _Opened(Clip(name, num_frames), (first.shape[0], first.shape[1]), rate, read, (path,))


def _read_pictures(files: Sequence[Path], size: Size, frames: Sequence[int]) -> np.ndarray:
    video = np.empty((len(frames), *size, 3), np.uint8)
    for number, frame in enumerate(frames):
        try:
            decode_rgb(files[frame].read_bytes(), video[number])
        except ValueError as error:
            raise ValueError(
                f"{files[frame]} is not an RGB picture of {size[0]}x{size[1]}, as the first of its folder is: {error}; "
                f"convert it: python -m dataset_tools.make_dataset_from_frames"
            ) from error
    return video


@functools.lru_cache(maxsize=ARRAYS_HELD)
def _held_array(path: Path) -> np.ndarray:
    return load_array(path)


def _read_array(path: Path, frames: Sequence[int]) -> np.ndarray:
    return _held_array(path)[list(frames)]


def _read_video(path: Path, rate: float, fps: float | None, frames: Sequence[int]) -> np.ndarray:
    start, stop = frames[0], frames[-1] + 1
    decoded = iter_video_frames(path, fps, start / rate, stop / rate)
    wanted = set(frames)
    found = [frame for number, frame in enumerate(itertools.islice(decoded, stop - start), start) if number in wanted]
    return np.stack(found) if found else np.empty((0, 0, 0, 3), np.uint8)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Frame 10 comes after frame 9."""
    return [(int(part or -1), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]
