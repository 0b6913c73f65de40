"""What the explorer shows, without a word about how it is asked for: models, frames of any seed, saved clips.

Models are used by the thread of `Session.worker` alone. What of them can be shown is told by `explorer.views`; the
frames are computed and kept by `explorer.blocks`.
"""

import collections
import contextlib
import itertools
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from dnnlib.frames_out import SUFFIXES
from dnnlib.video import VideoWriter
from explorer.actions import is_steered
from explorer.blocks import Cache, Model, Progress
from explorer.play import Play
from explorer.views import About, View, check_sampler, compose, describe
from explorer.worker import Busy, Cancelled, Result, Steps, Task, Worker
from torch_utils.precision import set_precision
from training import network_file
from training.data.given_prompt import begin_with, make_prompt, starts_beside
from training.network_file import ModelPath
from training.sampling import Prompt, Sampler, open_sampler

VIDEO_FORMATS = tuple(name for name in SUFFIXES if name not in ("png", "npz"))

DEFAULT_FPS, CRF = 30.0, 18  # of clips
MAX_CLIP_FRAMES = 18_000
MAX_CLIPS = 8  # finished or not
CLIP_PATIENCE_SEC = 120  # after which a clip that is no longer asked about is given up
MAX_OPEN = 2  # models in memory


@dataclass(frozen=True)
class Entry:
    """A model that may be shown: its name, and its files as paths, addresses or names."""

    name: str
    files: tuple[str | ModelPath, ...]


def list_entries(files: Sequence[str | ModelPath] = ()) -> list[Entry]:
    """Return the one model whose files are given, or else those in `network_file.MODELS`.

    Raises `ValueError` if there is none.
    """
    if files:
        first = files[0]
        return [Entry(network_file.model_name(first if isinstance(first, str) else first.path), tuple(files))]
    found = [Entry(name, tuple(paths)) for name, paths in network_file.list_models().items()]
    if not found:
        raise ValueError(f"there is no model in {network_file.MODELS} (NAME.pkl): give files, as in --model=FILE.pkl")
    return found


# ----------------------------------------------------------------------------
# Saved clips.


@dataclass
class SavedClip:
    """A video file that is being written, or has been."""

    number: int
    name: str  # under which a browser saves it
    path: Path
    num_frames: int
    done: int = 0  # frames
    asked_sec: float = field(default_factory=time.monotonic)  # when its state was last asked for
    task: Task[None] | None = None


def check_fps(fps: float) -> None:
    """Raise `ValueError` for a frame rate that a clip cannot have."""
    if not 1 <= fps <= 120:
        raise ValueError(f"a clip of {fps} frames a second was asked for: use a number from 1 to 120")


def clip_name(view: View, start: int, num_frames: int, suffix: str) -> str:
    """Return the name of a clip's file, which says what it shows as those of generate.py do."""
    seeds, (rows, columns) = view.seeds, view.grid
    words = [view.model, f"seed={seeds[0]}" if len(seeds) == 1 else f"seeds={seeds[0]}-{seeds[-1]}"]
    words += ([f"start={start}"] if start else []) + [f"len={num_frames}"]
    words += ([f"grid={rows}x{columns}"] if len(seeds) > 1 else []) + [view.kind]
    return "_".join(words) + suffix


# ----------------------------------------------------------------------------
# Prompts.


@dataclass(frozen=True)
class PromptFiles:
    """What is given to samplers that need more than a seed: a video to continue or to transform, and actions."""

    context: str | None = None
    actions: str | None = None

    def open(self, sampler: Sampler, starts: str | None = None) -> Prompt:
        """Return the prompt of a sampler; without a context its videos begin with clips of the dataset `starts`.

        Raises `ValueError` for files that cannot be read or do not suit it.
        """
        if self.context is not None and not sampler.needs.frames:
            raise ValueError("a context was given, but the model takes none: leave out --context")
        streams = {} if self.actions is None else {"actions": Path(self.actions)}
        if self.context is None and starts is not None:
            return begin_with(starts, lambda context: make_prompt(sampler, context, streams))
        if self.context is None and self.actions is None:
            return Prompt()
        return make_prompt(sampler, self.context, streams)


# ----------------------------------------------------------------------------
# The session.


class Session:
    """Models, frames and saved clips. A context manager: when it is left, work stops and temporary files go.

    `device` and `precision` are those of generate.py, and `options` those of the samplers. The cache holds at most
    `cache_bytes`. `prompt` is what all samplers are given; `prompt_files` make one for each sampler otherwise.
    """

    def __init__(
        self,
        models: Sequence[Entry],
        device: str = "cpu",
        precision: str = "fp32",
        trust: bool = False,
        cache_bytes: int = 512 << 20,
        options: Mapping[str, Any] | None = None,
        prompt: Prompt | None = None,
        prompt_files: "PromptFiles | None" = None,
    ) -> None:
        self.models = {entry.name: entry for entry in models}
        self.device, self.precision, self.trust = device, precision, trust
        self.options, self.prompt, self.prompt_files = dict(options or {}), prompt, prompt_files
        self.cache = Cache(cache_bytes)
        self.about: dict[str, About] = {}  # of models that have been opened
        self.has_stopped = False  # at the end: no step was still at work
        self.play = Play(self)
        self._loaded: collections.OrderedDict[str, Sampler] = collections.OrderedDict()
        self._opened: dict[str, Model] = {}  # those of them that can be shown
        self._clips: dict[int, SavedClip] = {}
        self._clip_numbers = itertools.count(1)
        self._lock = threading.Lock()  # of the clips

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="longtake-view-"))
        self.worker = Worker()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.has_stopped = self.worker.stop(timeout_sec=5)
        if self.has_stopped:
            for model in self._opened.values():
                model.prompt.close()
            self.play.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    # Steps, which only the worker's thread takes.

    def load(self, name: str) -> Steps[Sampler]:
        """Bring a model into memory, in place of the one that was not used for longest and that nobody steers."""
        self.check_model(name)
        if name not in self._loaded:
            while len(self._loaded) >= MAX_OPEN:
                self._forget_one()
            sampler = open_sampler(self.models[name].files, self.options, self.device, self.trust)
            set_precision(sampler.networks, self.precision)
            self._loaded[name] = sampler
            yield
        self._loaded.move_to_end(name)
        return self._loaded[name]

    def _forget_one(self) -> None:
        """Remove a model from memory."""
        name = next((name for name in self._loaded if not self.play.is_played(name)), None)
        if name is None:
            raise Busy(f"{len(self._loaded)} models are being played, more do not fit into memory")
        del self._loaded[name]
        self._opened.pop(name, None)
        self.play.suspend(name)

    def open(self, name: str) -> Steps[Model]:
        """Bring a model into memory whose videos can be shown; raise `ValueError` for one of which none can."""
        sampler = yield from self.load(name)
        if name not in self._opened:
            try:
                files, starts = self.prompt_files or PromptFiles(), self._starts_beside(name, sampler)
                prompt = self.prompt or files.open(sampler, starts)
                check_sampler(sampler, name, prompt)
            except ValueError as error:
                hint = "; or steer it: see Play" if is_steered(sampler) else ""
                raise ValueError(f"{error}{hint}") from error
            self._opened[name], self.about[name] = Model(name, sampler, prompt, self.cache), describe(sampler)
        return self._opened[name]

    def open_any(self, name: str) -> Steps[str | None]:
        """Bring a model into memory that can be shown, or steered, or both; return why it can only be steered, or None.

        Raises `ValueError` for a model that can be neither.
        """
        try:
            yield from self.open(name)
        except ValueError as error:
            try:
                yield from self.play.open(name)
            except ValueError:
                raise error from None
            return str(error)
        with contextlib.suppress(ValueError):
            yield from self.play.open(name)
        return None

    def start_of(self, name: str, sampler: Sampler) -> tuple[str | None, Prompt | None]:
        """Return where walks in a model begin: a dataset or file at a path, or a prompt, or neither.

        Unless a prompt was given, a dataset NAME.starts beside the model's file NAME.pkl serves.
        """
        files = self.prompt_files or PromptFiles()
        if self.prompt is not None:
            return None, self.prompt
        if files.context is not None:
            return (files.context, None) if files.actions is None else (None, files.open(sampler))
        return self._starts_beside(name, sampler), None

    def _starts_beside(self, name: str, sampler: Sampler) -> str | None:
        return starts_beside([file for file in self.models[name].files if isinstance(file, str | ModelPath)], sampler)

    def frames(self, view: View, start: int, count: int) -> Steps[np.ndarray]:
        """Return frames [start, start + count) of a view, fewer where a video ends: uint8 (T, height, width, 3)."""
        yield from self.open(view.model)
        about = self.about[view.model]
        about.check(view, start, count)
        if count > about.most_frames(view):
            raise ValueError(
                f"{count} frames were asked for at once: use at most {about.most_frames(view)} of this size"
            )
        found = []
        for _, name in about.runs(view):
            model = yield from self.open(view.model)  # others may have taken its place in between
            found.append((yield from model.blocks(name, start, count)))
        return compose(view, about, found, start, count)

    def _write_clip(self, clip: SavedClip, view: View, start: int, fps: float) -> Steps[None]:
        """Write the file of a clip, which is shorter than planned where the video ends."""
        yield from self.open(view.model)
        about = self.about[view.model]
        about.check(view, start, clip.num_frames)
        piece = min(about.block(view.kind), about.most_frames(view))
        with VideoWriter(clip.path, *about.frame_size(view), fps, CRF, enlarge=True) as writer:
            while clip.done < clip.num_frames:
                count = min(piece - (start + clip.done) % piece, clip.num_frames - clip.done)
                try:
                    frames = yield from _patiently(clip, self.frames(view, start + clip.done, count))
                except ValueError:
                    if not clip.done:
                        raise
                    break
                writer.write(frames)
                clip.done += len(frames)
                if len(frames) < count:
                    break
                yield
        if clip.done < clip.num_frames:
            clip.num_frames = clip.done
            clip.name = clip_name(view, start, clip.done, clip.path.suffix)

    # For all threads.

    def check_model(self, name: str) -> None:
        """Raise `ValueError` for a model that is not on the list."""
        if name not in self.models:
            raise ValueError(f"there is no model {name[:80]!r} here: use one of {', '.join(self.models)}")

    def cached(self, view: View, start: int, count: int) -> np.ndarray | None:
        """Return what `frames` gives, if nothing must be computed for it; else None."""
        about = self.about[view.model]
        if not 1 <= count <= about.most_frames(view):
            return None
        found: list[list[np.ndarray]] = []
        for part, name in about.runs(view):
            found.append([])
            for number in range(start // part.block, -(-(start + count) // part.block)):
                block = self.cache.get(name._replace(number=number))
                if block is None:
                    return None
                found[-1].append(block)
        return compose(view, about, found, start, count)

    def progress(self, owner: str) -> Progress | None:
        """Return how far the rollout is that this owner waits for, None if it waits for none."""
        return next((step for step in self.worker.progress(owner) if isinstance(step, Progress)), None)

    def save_clip(
        self, view: View, start: int, count: int, fps: float = DEFAULT_FPS, file_format: str = "mp4", owner: str = ""
    ) -> SavedClip:
        """Begin to write a clip of frames [start, start + count).

        Raises `ValueError` for what cannot be, and `Busy` while as many clips as may be are being written.
        """
        self.about[view.model].check(view, start, count)
        if count > MAX_CLIP_FRAMES:
            raise ValueError(
                f"a clip of {count} frames was asked for: save at most {MAX_CLIP_FRAMES} here, and longer ones with "
                "generate.py"
            )
        check_fps(fps)
        if file_format not in VIDEO_FORMATS:
            raise ValueError(f"a clip as {file_format[:40]!r} was asked for: use one of {', '.join(VIDEO_FORMATS)}")
        name = clip_name(view, start, count, SUFFIXES[file_format])
        return self.add_clip(name, count, owner, lambda clip: self._write_clip(clip, view, start, fps))

    def add_clip(self, name: str, count: int, owner: str, write: Callable[[SavedClip], Steps[None]]) -> SavedClip:
        """Begin to write a clip under a name, by the steps that `write` returns."""
        with self._lock:
            self._make_room()
            number = next(self._clip_numbers)
            clip = SavedClip(number, name, self.folder / f"{number}{Path(name).suffix}", count)
            clip.task = self.worker.submit(write(clip), f"{owner}/clip")
            self._clips[number] = clip
        return clip

    def _make_room(self) -> None:
        """Forget the oldest clip that has ended, if there are as many as may be."""
        ended = [clip for clip in self._clips.values() if clip.task is None or clip.task.has_ended]
        if len(self._clips) >= MAX_CLIPS:
            if not ended:
                raise Busy(f"{len(self._clips)} clips are being written")
            ended[0].path.unlink(missing_ok=True)
            del self._clips[ended[0].number]

    def clip(self, number: int) -> SavedClip:
        """Return the clip of a number; raise `ValueError` if there is none."""
        with self._lock:
            if number not in self._clips:
                raise ValueError(f"there is no clip {number} (any more): save it again")
            self._clips[number].asked_sec = time.monotonic()
            return self._clips[number]

    def drop(self, owner: str) -> None:
        """Cancel all that this owner has asked for."""
        self.worker.drop(owner)
        self.worker.drop(f"{owner}/clip")
        self.play.drop(owner)


def _patiently(clip: SavedClip, steps: Steps[Result]) -> Steps[Result]:
    """Take the steps of a clip's frames as long as its state is asked for."""
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            return end.value
        if time.monotonic() - clip.asked_sec > CLIP_PATIENCE_SEC:
            raise Cancelled("this clip has not been asked about for a while, so it was given up")
        yield step
