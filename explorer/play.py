"""Steered walks of all tabs: their models, starts and steps, what a page is told of them, and saving one.

Methods that return `Steps` are for the thread of the session's worker, which alone uses networks. The others may be
called from any thread.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dnnlib.video import VideoWriter, whole_factor
from explorer import threads
from explorer.actions import Action, ActionSpace, action_space, bindings, check_steered
from explorer.blocks import Options, Progress
from explorer.requests import as_png
from explorer.starts import UPLOAD, UPLOAD_BYTES, Context, Starts, read_actions, read_upload
from explorer.views import MAX_SEED, About, describe
from explorer.walks import MAX_FRAMES, Pictures, SteeredPrompt, Walk
from explorer.worker import Busy, Cancelled, Steps, Task
from training.sampling import Prompt, Request, Sampler

if TYPE_CHECKING:
    from explorer.session import SavedClip, Session

CRF, SAVED_HEIGHT = 18, 288  # of saved walks; smaller pixels are repeated while they fit into that height
MAX_WALKS = 8  # of all tabs
IDLE_SEC = 60.0  # after which a walk gives way to one that is to begin
WAIT_SEC = 10.0  # for the step before
MAX_AHEAD = 4  # steps of one walk in the queue


@dataclass(frozen=True)
class Playable:
    """What a page must know of a model that can be steered."""

    model: str
    space: ActionSpace
    about: About
    starts: Starts
    threads: int | None = None  # that make a frame soonest, None for all

    @property
    def sampler(self) -> Sampler:
        """Return the sampler with the session's options."""
        return self.starts.sampler

    def facts(self) -> dict[str, Any]:
        """Return all this for the page."""
        height, width = self.sampler.size
        return {
            "model": self.model,
            "height": height,
            "width": width,
            "past": self.sampler.needs.past,
            "fps": self.sampler.fps,
            "names": self.space.names,
            "ranges": self.space.ranges,
            "bindings": bindings(self.space),
            "starts": self.starts.names,
            "uploads": bool(self.sampler.needs.past),
            "options": [dataclasses.asdict(control) for control in self.about.controls],
            "max_frames": MAX_FRAMES,
            "max_upload": UPLOAD_BYTES,
            "max_ahead": MAX_AHEAD,
        }


class Made(NamedTuple):
    """The pictures of a step, as (number, PNG file), how long it waited, and how long the model took, in seconds."""

    pictures: list[tuple[int, bytes]]
    waited_sec: float
    model_sec: float


class _Place:
    """A walk's place in the queue of steps."""

    def __init__(self) -> None:
        self.turn = 0  # each cut begins a new one, in which steps are counted from 0
        self.num_steps = 0  # asked for in this turn
        self.last: Task[Any] | None = None
        self.asked_sec = time.monotonic()
        self.changed = threading.Condition()


class Play:
    """The walks of a session."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.known: dict[str, Playable] = {}  # models that have been opened
        self.uploads = threading.BoundedSemaphore(2)  # files that are read at once
        self._walks: dict[int, Walk] = {}
        self._places: dict[int, _Place] = {}
        self._numbers, self._turns = itertools.count(1), itertools.count(1)
        self._lock = threading.Lock()  # of the walks

    # Models and starts.

    def open(self, model: str) -> Steps[Playable]:
        """Return what is known of a model; raise `ValueError` for one that cannot be steered."""
        sampler = yield from self.session.load(model)
        found = self.known.get(model)
        if found is None or found.sampler is not sampler:
            check_steered(sampler, model)
            starts = Starts(sampler, *self.session.start_of(model, sampler))
            space = action_space(sampler, model, starts.examples)
            on_cpu = torch.device(self.session.device).type == "cpu"
            count = _fastest_threads(sampler, starts, space) if on_cpu else None
            found = Playable(model, space, describe(sampler), starts, count)
            self.known[model] = found
        return found

    def start_picture(self, found: Playable, start: str) -> bytes:
        """Return the last frame of a start as a PNG file."""
        frames = found.starts.context(start, found.space).frames
        if not len(frames):
            raise ValueError("this start has no picture: the first frame is made from the seed")
        return as_png(frames[-1])

    def read_actions(self, found: Playable, data: bytes, name: str) -> list[str]:
        """Return the actions into the frames after the context, as a page sends them, from the content of a file."""
        values = read_actions(data, name, self.session.folder, found.sampler, found.space)
        past = found.sampler.needs.past
        if len(values) <= past:
            raise ValueError(
                f"{name[:60]} has {len(values)} actions, and the first {past} are those of the context: give more"
            )
        if len(values) - past > MAX_FRAMES:
            raise ValueError(f"{name[:60]} has actions for {len(values) - past} frames: use at most {MAX_FRAMES}")
        return [found.space.text(action) for action in found.space.of_array(values)[past:]]

    # Walks.

    def begin(self, tab: str, found: Playable, start: str, seed: int, options: Options, upload: bytes | None) -> Walk:
        """Begin a walk in place of the tab's own; raise `Busy` while as many as may be are under way."""
        if abs(seed) > MAX_SEED:
            raise ValueError(f"seed is {seed}: use a number from -{MAX_SEED} to {MAX_SEED}")
        if (start == UPLOAD) != (upload is not None):
            raise ValueError("a start from a file needs the file, and no other start has one")
        context = found.starts.context(start, found.space) if upload is None else self._read_upload(upload, found)
        self.drop(tab)
        with self._lock:
            self._make_room()
            number = next(self._numbers)
            prompt = SteeredPrompt(context, found.space.still, found.starts.prompt or Prompt())
            pictures = Pictures(self.session.folder / f"walk-{number}")
            walk = Walk(number, tab, found.model, found.space, seed, options, prompt, pictures)
            self._walks[number], self._places[number] = walk, _Place()
            self._places[number].turn = next(self._turns)
        return walk

    def _read_upload(self, upload: bytes, found: Playable) -> Context:
        """Return the context that a file gives; few are decoded at once, over all pages."""
        if not self.uploads.acquire(timeout=WAIT_SEC):
            raise Busy("others are sending files")
        try:
            return read_upload(upload, self.session.folder, found.sampler, found.space)
        finally:
            self.uploads.release()

    def _make_room(self) -> None:
        """End the walk that has been idle longest, if there are as many as may be."""
        if len(self._walks) < MAX_WALKS:
            return
        number = min(self._places, key=lambda number: self._places[number].asked_sec)
        if time.monotonic() - self._places[number].asked_sec < IDLE_SEC:
            raise Busy(f"{len(self._walks)} people are playing")
        self._end(number)

    def _end(self, number: int) -> None:
        """End a walk, in the worker's thread, for a step may be under way."""
        walk, place = self._walks.pop(number), self._places.pop(number)
        with place.changed:
            place.turn = -1
            place.changed.notify_all()
        self.session.worker.drop(owner_of(walk))

        def close() -> Steps[None]:
            walk.close()
            return
            yield

        try:
            self.session.worker.submit(close(), f"{walk.number}/end")
        except (Cancelled, Busy):  # the program is ending, or the queue is full: the folder goes at the end
            walk.pictures.close()

    def drop(self, tab: str) -> None:
        """End the walk of a tab."""
        with self._lock:
            for number in [number for number, walk in self._walks.items() if walk.owner == tab]:
                self._end(number)

    def suspend(self, model: str) -> None:
        """Give up what is held of a model that leaves the memory. For the worker's thread."""
        self.known.pop(model, None)
        for walk in list(self._walks.values()):
            if walk.model == model:
                walk.suspend()

    def is_played(self, model: str) -> bool:
        """Return whether somebody steers a model now."""
        now = time.monotonic()
        with self._lock:
            return any(
                walk.model == model and now - self._places[number].asked_sec < IDLE_SEC / 4
                for number, walk in self._walks.items()
            )

    def walk(self, number: int) -> Walk:
        """Return a walk; raise `ValueError` for one that there is not."""
        with self._lock:
            if number not in self._walks:
                raise ValueError("this walk has ended, as others wanted to play or it was left: begin another")
            self._places[number].asked_sec = time.monotonic()
            return self._walks[number]

    def turn_of(self, walk: Walk) -> int:
        """Return the walk's turn."""
        return self._places[walk.number].turn

    def status(self, walk: Walk) -> dict[str, Any]:
        """Return the state of a walk, for the page."""
        place = self._places[walk.number]
        return {"walk": walk.number, "turn": place.turn, "frames": walk.num_frames, "past": walk.prompt.past}

    # Steps.

    def submit_step(self, walk: Walk, action: Action, turn: int, step: int) -> Task[Made]:
        """Queue step number `step` of a turn, once all steps before it are queued.

        Raises `Cancelled` if the turn is over, and `ValueError` if the steps before it do not come.
        """
        place = self._places.get(walk.number)
        if place is None:
            raise Cancelled("this walk has ended")
        with place.changed:
            came = place.changed.wait_for(lambda: place.turn != turn or place.num_steps >= step, WAIT_SEC)
            if place.turn != turn:
                raise Cancelled("the walk has been cut since")
            if not came or place.num_steps != step:
                raise ValueError(f"step {step} was asked for: the next one is {place.num_steps}")
            before = place.last
            place.last = self.session.worker.submit(
                self._step(walk, action, before, time.perf_counter()), owner_of(walk), turn
            )
            place.num_steps += 1
            place.changed.notify_all()
            return place.last

    def _step(self, walk: Walk, action: Action, before: Task[Any] | None, asked_sec: float) -> Steps[Made]:
        """Make the next frames of a walk, after the steps before."""
        while before is not None and not before.has_ended:
            yield
        yield from self._catch_up(walk)
        begin_sec = time.perf_counter()
        with threads.limited(self._threads_of(walk)):
            numbers = walk.advance(action)
        end_sec = time.perf_counter()
        pictures = [(number, walk.pictures.read(number)) for number in numbers]
        return Made(pictures, begin_sec - asked_sec, end_sec - begin_sec)

    def _catch_up(self, walk: Walk) -> Steps[None]:
        """Bring the rollout of a walk to where the walk is."""
        found = yield from self.open(walk.model)
        if not walk.has_begun:
            changed = dataclasses.replace(found.sampler.options, **dict(walk.options))
            sampler = found.sampler
            if changed != sampler.options:
                sampler = sampler.with_options(changed)
            walk.begin(sampler.interactive())
        while walk.made < walk.num_frames:
            with threads.limited(found.threads):
                walk.advance()
            yield Progress(walk.made, walk.num_frames)
            yield from self.open(walk.model)  # others may have taken its place in between
            if not walk.has_begun:
                yield from self._catch_up(walk)

    def _threads_of(self, walk: Walk) -> int | None:
        found = self.known.get(walk.model)
        return found.threads if found is not None else None

    def cut(self, walk: Walk, num_frames: int) -> Task[None]:
        """Have a walk go on after its first `num_frames` frames; steps in the queue are given up."""
        if not 0 <= num_frames <= walk.num_frames:
            raise ValueError(f"frame {num_frames} was asked for: the walk has {walk.num_frames} frames")
        place = self._places.get(walk.number)
        if place is None:
            raise Cancelled("this walk has ended")

        def steps() -> Steps[None]:
            walk.cut(num_frames)
            return
            yield

        with place.changed:
            place.turn, place.num_steps = next(self._turns), 0
            place.last = self.session.worker.submit(steps(), owner_of(walk), place.turn)
            place.changed.notify_all()
            return place.last

    def prepare(self, walk: Walk) -> None:
        """Have the rollout come to where the walk is while nothing else is asked, so that the next step is quick."""
        place = self._places.get(walk.number)
        if place is not None:
            with place.changed:
                place.last = self.session.worker.submit(self._prepare(walk, place.last), owner_of(walk), place.turn)

    def _prepare(self, walk: Walk, before: Task[Any] | None) -> Steps[None]:
        while before is not None and not before.has_ended:
            yield
        yield from self._catch_up(walk)

    # Saving.

    def save(self, walk: Walk, fps: float) -> SavedClip:
        """Begin to write a walk with its context as mp4; see `Session.add_clip`."""
        if not walk.num_frames:
            raise ValueError("this walk has no frames yet: take a step first")
        name = f"{walk.name}.mp4"
        count = walk.prompt.past + walk.num_frames
        return self.session.add_clip(name, count, walk.owner, lambda clip: _write(clip, walk, fps))

    def close(self) -> None:
        """End all walks, once the worker has stopped."""
        for walk in self._walks.values():
            walk.close()


def _fastest_threads(sampler: Sampler, starts: Starts, space: ActionSpace) -> int | None:
    """Return how many threads make the frames of a walk soonest, None for all; its first frames are made to see."""
    if not starts.names:
        return None
    prompt = SteeredPrompt(starts.context(starts.names[0], space), space.still, starts.prompt or Prompt())
    chunks = sampler.interactive().frames(Request([0], 0, None, prompt))
    try:
        return threads.fastest(chunks)
    finally:
        if hasattr(chunks, "close"):
            chunks.close()  # type: ignore[attr-defined]  # an iterator need not have it


def _write(clip: SavedClip, walk: Walk, fps: float) -> Steps[None]:
    """Write the file of a walk, frame by frame."""
    height, width, _ = walk.frame(0).shape
    whole = whole_factor(height, width)
    factor = whole * max(1, SAVED_HEIGHT // (whole * height))
    with VideoWriter(clip.path, height, width, fps, CRF, factor=factor) as writer:
        while clip.done < clip.num_frames:
            writer.write(walk.frame(clip.done - walk.prompt.past)[None])
            clip.done += 1
            yield


def owner_of(walk: Walk) -> str:
    """Return the name under which the worker knows a walk's tab."""
    return f"{walk.owner}/play"
