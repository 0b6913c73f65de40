"""The requests of the page that steers: models, starts, walks and their steps."""

from collections.abc import Callable
from typing import Any

from explorer.play import Playable
from explorer.requests import Answer, Query, as_file, as_json, pack
from explorer.session import DEFAULT_FPS, Session, check_fps
from explorer.starts import UPLOAD
from explorer.worker import Task

_TAKE_FILES = ("/api/walks", "/api/play/actions")
MAX_PICTURES = 64  # in one answer


def takes_file(method: str, path: str) -> bool:
    """Return whether the body of a request may be a file."""
    return method == "POST" and path in _TAKE_FILES


class PlayRoutes:
    """Answers to the requests of one connection.

    `wait` returns the result of a task of the worker, `body` is that of the request, and `client` names the connection.
    """

    def __init__(self, session: Session, wait: Callable[[Task[Any]], Any], body: bytes, client: str) -> None:
        self.session, self.play, self.wait, self.body, self.client = session, session.play, wait, body, client
        self.table: dict[str, Callable[..., Answer]] = {
            "GET /api/play/model": self.model,
            "GET /api/play/start": self.start,
            "POST /api/play/actions": self.read_actions,
            "POST /api/walks": self.begin,
            "GET /api/walks/N": self.status,
            "POST /api/walks/N/step": self.step,
            "GET /api/walks/N/frames": self.frames,
            "POST /api/walks/N/cut": self.cut,
            "POST /api/walks/N/save": self.save,
            "GET /api/walks/N/actions": self.actions,
        }

    def open(self, name: str) -> Playable:
        """Return what is known of a model, which is opened if it has not been yet."""
        self.session.check_model(name)
        return self.play.known.get(name) or self.wait(
            self.session.worker.submit(self.play.open(name), f"{self.client}/open")
        )

    def model(self, query: Query) -> Answer:
        """Answer with what a page must know of a model."""
        name = query.text("model")
        query.finish()
        return as_json(self.open(name).facts())

    def start(self, query: Query) -> Answer:
        """Answer with the picture of a start: its last frame."""
        model, start = query.text("model"), query.text("start")
        query.finish()
        return Answer(self.play.start_picture(self.open(model), start), "image/png")

    def read_actions(self, query: Query) -> Answer:
        """Answer with the actions of a file, which is the body."""
        model, name = query.text("model"), query.text("name")
        query.finish()
        return as_json({"actions": self.play.read_actions(self.open(model), self.body, name)})

    def begin(self, query: Query) -> Answer:
        """Begin the walk of a tab; the body is the file of a start that was sent. What is left are options."""
        model, start, tab = query.text("model"), query.text("start"), query.text("tab")
        seed, found = query.whole("seed", 0), self.open(model)
        options = found.about.read_options(query.rest(), model)
        walk = self.play.begin(tab, found, start, seed, options, self.body if start == UPLOAD else None)
        return as_json(self.play.status(walk))

    def status(self, query: Query, number: int) -> Answer:
        """Answer with how long a walk is."""
        query.finish()
        return as_json(self.play.status(self.play.walk(number)))

    def step(self, query: Query, number: int) -> Answer:
        """Answer with the frames of one more step; how long it took stands in the headers."""
        walk = self.play.walk(number)
        action = walk.space.parse(query.text("action"))
        turn, step = query.whole("turn"), query.whole("step")
        query.finish()
        made = self.wait(self.play.submit_step(walk, action, turn, step))
        timing = f"queue;dur={1000 * made.waited_sec:.2f}, model;dur={1000 * made.model_sec:.2f}"
        headers = {"Server-Timing": timing}
        return Answer(pack(made.pictures), "application/octet-stream", headers=headers)

    def frames(self, query: Query, number: int) -> Answer:
        """Answer with frames [start, start + count) that were seen; the one before frame 0 is the start's last."""
        walk, start, count = self.play.walk(number), query.whole("start"), query.whole("count", 1)
        query.finish()
        if not 1 <= count <= MAX_PICTURES:
            raise ValueError(f"{count} frames were asked for at once: use 1 to {MAX_PICTURES}")
        return Answer(pack(walk.seen(start, count)), "application/octet-stream")

    def cut(self, query: Query, number: int) -> Answer:
        """Have a walk go on after its first frames, the number of which is given."""
        walk, frame = self.play.walk(number), query.whole("frame")
        query.finish()
        self.wait(self.play.cut(walk, frame))
        self.play.prepare(walk)
        return as_json(self.play.status(walk))

    def save(self, query: Query, number: int) -> Answer:
        """Begin to write a walk as mp4 and answer with the number of the clip."""
        walk, fps = self.play.walk(number), query.number("fps", DEFAULT_FPS)
        query.finish()
        check_fps(fps)
        return as_json({"clip": self.play.save(walk, fps).number})

    def actions(self, query: Query, number: int) -> Answer:
        """Answer with the actions of context and walk as a file."""
        walk = self.play.walk(number)
        query.finish()
        return as_file(walk.actions_file(), f"{walk.name}.actions.json")
