"""Where a walk may begin: the context frames of a dataset's clip, of the prompt, or of a file that the browser sent.

Files from the browser are not trusted. Their kind is told by their first bytes, so that none can be a list which names
other files; their size, pixels and frames are limited.
"""

import contextlib
import io
import tempfile
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dnnlib.video import probe, scan
from explorer.actions import ActionSpace
from training.contract import Size
from training.data.dataset import ClipDataset
from training.data.footage import is_dataset
from training.data.given_prompt import stream_readers
from training.data.prompts import ClipPrompt, FilePrompt, StreamReader, open_prompt
from training.data.streams import read_stream_file
from training.sampling import Prompt, Sampler, quantize

GIVEN, UPLOAD, SEED = "given", "upload", "seed"  # starts that are no clip of a dataset
MAX_CLIPS = 48  # of a dataset, that the page offers
UPLOAD_BYTES = 16 << 20
MAX_PIXELS = 4 << 20  # of an image or a frame
MAX_FRAMES = 3600  # of a clip
MAX_EXAMPLES = 20_000  # actions that tell their range

_IMAGES = ((b"\x89PNG\r\n\x1a\n", ".png"), (b"\xff\xd8\xff", ".jpg"), (b"BM", ".bmp"))
_VIDEOS = ((b"\x1a\x45\xdf\xa3", ".webm"), (b"GIF87a", ".gif"), (b"GIF89a", ".gif"))
_ACTIONS = (".json", ".npy", ".npz", ".csv", ".txt")


@dataclass(frozen=True)
class Context:
    """What comes before a walk: `frames` uint8 (past, H, W, 3), and `actions` int64 (past,) or float32 (past, V)."""

    frames: np.ndarray
    actions: np.ndarray


class Starts:
    """The starts that a model is offered: clips of a dataset at a path, the end of a file, or a given prompt."""

    def __init__(self, sampler: Sampler, path: str | None, prompt: Prompt | None) -> None:
        self.sampler, self.past = sampler, sampler.needs.past
        self.size: Size = sampler.needs.size or sampler.size
        self.examples: np.ndarray | None = None  # actions that tell their range
        self.prompt = prompt  # what else it says, such as a label, is that of all walks
        self._clips: dict[str, int] = {}
        self._footage: ClipPrompt | None = None
        self._lock = threading.Lock()  # of the files
        self._given = prompt
        if path is not None:
            self._open(path)

    @property
    def names(self) -> list[str]:
        """Return the names of the starts, none where only a file from the browser will do."""
        if not self.past:
            return [SEED]
        return [GIVEN] if self._given is not None else list(self._clips)

    def _open(self, path: str) -> None:
        """Find the clips of a dataset, or of ROOT:CLIP one, that are long enough; or open a file."""
        root, clip = _split(path)
        if not is_dataset(root):
            self._given = _last_frames(Path(root), self.sampler)
            return
        dataset = ClipDataset(root, [self.size])
        readers = {}
        with contextlib.suppress(ValueError):  # a dataset without actions gives frames alone
            readers = stream_readers(dataset, self.sampler, ["actions"])
            self.examples = _examples(dataset, readers["actions"])
        found = open_prompt(root, self.sampler, clip=clip, streams=lambda dataset: readers)
        assert isinstance(found, ClipPrompt)
        numbers = dataset.eligible(max(self.past, 1)) if clip is None else [found.windows[0][0]]
        self._footage = ClipPrompt(dataset, [], readers)
        self._clips = {dataset.clips[number].path: number for number in numbers[:MAX_CLIPS]}

    def context(self, name: str, space: ActionSpace) -> Context:
        """Return the context of a start; raise `ValueError` for one that there is not, or that cannot be read."""
        if name not in self.names:
            known = ", ".join([*self.names[:3], *(["..."] if len(self.names) > 3 else [])])
            raise ValueError(f"there is no start {name[:60]!r}: use {known or 'an image or a clip of your own'}")
        if not self.past:
            return Context(np.empty((0, *self.size, 3), np.uint8), _zeros(space, 0))
        with self._lock:
            prompt = self._given
            if prompt is None:
                assert self._footage is not None
                prompt = ClipPrompt(self._footage.footage, [(self._clips[name], self.past)], self._footage.streams)
            frames = quantize(prompt.frames(-self.past, self.past, self.size))[0].numpy()
            try:
                actions = prompt.stream("actions", -self.past, self.past)[0].numpy()
            except ValueError:
                actions = _zeros(space, self.past)
        if len(frames) < self.past:
            raise ValueError(f"the start {name} has {len(frames)} frames, {self.past} are needed: use another one")
        space.of_array(actions)
        return Context(frames, actions)


def _split(path: str) -> tuple[str, str | None]:
    """Split ROOT:CLIP, where ROOT is a dataset."""
    root, colon, clip = path.rpartition(":")
    return (root, clip) if colon and not Path(path).exists() and is_dataset(root) else (path, None)


def _examples(dataset: ClipDataset, read: StreamReader) -> np.ndarray:
    """Return actions of a dataset, enough to tell their range."""
    found: list[np.ndarray] = []
    for index, clip in enumerate(dataset.clips):
        found.append(read(index, 0, clip.num_frames))
        if sum(map(len, found)) > MAX_EXAMPLES:
            break
    return np.concatenate(found)


def _zeros(space: ActionSpace, count: int) -> np.ndarray:
    return np.repeat(space.zeros[None], count, axis=0)


def _last_frames(path: Path, sampler: Sampler) -> Prompt:
    """Return a prompt of the last frames of a file, at the model's rate; the first one is repeated before it."""
    return FilePrompt(path, sampler.fps if path.suffix in _VIDEO_SUFFIXES else None, origin=None)


_VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi")


# ----------------------------------------------------------------------------
# Files from the browser.


def suffix_of(data: bytes) -> str | None:
    """Return the suffix of an image or a video by its first bytes; None for anything else."""
    for start, suffix in (*_IMAGES, *_VIDEOS):
        if data.startswith(start):
            return suffix
    if data[4:8] == b"ftyp":
        return ".mp4"
    if data[:4] == b"RIFF":
        return {b"WEBP": ".webp", b"AVI ": ".avi"}.get(data[8:12])
    return None


def read_upload(data: bytes, folder: Path, sampler: Sampler, space: ActionSpace) -> Context:
    """Return the last frames of an image or a clip as a context without actions.

    A clip that is too short begins with repeats of its first frame. Raises `ValueError` for a file of another kind, for
    one with too many pixels or frames, and for one that cannot be read.
    """
    suffix = suffix_of(data)
    if suffix is None:
        raise ValueError("the file is no image or clip that is known here: use PNG, JPEG, WebP, GIF, MP4 or WebM")
    size, past = sampler.needs.size or sampler.size, sampler.needs.past
    if not past:
        raise ValueError("this model begins from a seed alone: leave out the file")
    with _written(data, suffix, folder) as path:
        try:
            _check_size(path, data)
            with contextlib.closing(_last_frames(path, sampler)) as prompt:
                found = prompt.frames(-past, past, size)
        except (
            OSError,
            SyntaxError,
            Image.DecompressionBombError,
            Image.DecompressionBombWarning,
            ValueError,
        ) as error:
            reason = str(error).replace(str(path), "the file").replace(path.name, "the file")
            raise ValueError(f"the file cannot be used ({reason}): try another one") from error
    if found.shape[2] < past:
        raise ValueError("the file has no frames: try another one")
    return Context(quantize(found)[0].numpy(), _zeros(space, past))


def _check_size(path: Path, data: bytes) -> None:
    """Raise `ValueError` for an image or a clip that is too large to decode for anybody who asks."""
    if path.suffix in (*_VIDEO_SUFFIXES, ".gif"):
        info = probe(path)
        height, width, count = info.height, info.width, scan(path).num_frames
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "BMP", "WEBP")) as image:
                (width, height), count = image.size, getattr(image, "n_frames", 1)
    if height * width > MAX_PIXELS:
        raise ValueError(f"it has {width}x{height} pixels: use at most {MAX_PIXELS >> 20} million")
    if count > MAX_FRAMES:
        raise ValueError(f"it has {count} frames: use at most {MAX_FRAMES}")


def read_actions(data: bytes, name: str, folder: Path, sampler: Sampler, space: ActionSpace) -> np.ndarray:
    """Return the actions of a file that the browser sent; its name tells the format. Raises `ValueError`."""
    suffix = Path(name).suffix.lower()
    if suffix not in _ACTIONS:
        raise ValueError(f"a file {name[:60]!r} cannot be read as actions: use {', '.join(_ACTIONS)}")
    names = None if space.ranges else list(space.names)
    count, width = (None, len(space.ranges)) if space.ranges else (len(space.names), None)
    with _written(data, suffix, folder) as path:
        try:
            return read_stream_file(path, "actions", names, count, width)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), name[:60])) from error


@contextlib.contextmanager
def _written(data: bytes, suffix: str, folder: Path) -> Iterator[Path]:
    """Give the path of a file with these bytes, which is removed at the end."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        path = Path(own, f"upload{suffix}")
        path.write_bytes(data)
        yield path
