"""The explorer's web server: safe from other pages, bounded, with a page, and answers in JSON.

with Session(list_entries()) as session, Server("127.0.0.1", 8008, partial(Handler, session)) as server:
    server.serve_forever()

There are no passwords: all who reach the port may use it. Requests that a foreign page has the browser make are
refused, by the Host header (a name that was made to point here, DNS rebinding) and by what browsers tell of their
origin.
"""

import dataclasses
import io
import ipaddress
import re
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from explorer import views
from explorer.play_routes import PlayRoutes, takes_file
from explorer.requests import Answer, Query, Refused, as_file, as_json, as_png, pack, shown
from explorer.session import DEFAULT_FPS, VIDEO_FORMATS, Session
from explorer.starts import UPLOAD_BYTES
from explorer.views import About, View
from explorer.worker import Busy, Cancelled, Task
from training.command_line import parse_grid

# What the page may do: talk to this server, and show what it made itself.
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:"
POLICY += "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

PAGE = Path(__file__).with_name("page")
STATIC = {
    "/": ("view.html", "text/html"),
    "/view.css": ("view.css", "text/css"),
    "/view.js": ("view.js", "text/javascript"),
    "/requests.js": ("requests.js", "text/javascript"),
    "/saving.js": ("saving.js", "text/javascript"),
    "/drawing.js": ("drawing.js", "text/javascript"),
    "/controls.js": ("controls.js", "text/javascript"),
    "/play": ("play.html", "text/html"),
    "/play.css": ("play.css", "text/css"),
    "/play.js": ("play.js", "text/javascript"),
    "/walking.js": ("walking.js", "text/javascript"),
    "/steering.js": ("steering.js", "text/javascript"),
}

PARAMETERS = frozenset("model kind seed grid frame start count tab turn fps format view pixels".split())

MAX_CONNECTIONS = 64
LOOK_SEC = 0.1  # how often a waiting thread looks whether its browser is still there

IDLE_SEC = 60.0  # how long a connection is kept without a request
REQUEST_SEC = 10.0  # from the first byte of a request to its last
ANSWER_SEC = 60.0  # to take an answer, and as long again for every so many bytes of it
ANSWER_BYTES = 8 << 20
PIECE_BYTES = 1 << 20
BODY_BYTES = 9999  # of a request that is no file; a body tells nothing then
FILE_BYTES_PER_SEC = 128 << 10  # at least, of a file that comes


# ----------------------------------------------------------------------------
# Connections.


class _Left(Exception):
    """The browser has closed the connection."""


def is_own_name(host: str) -> bool:
    """Return whether a Host header names this machine by its address, or by a name that others cannot give to it.

    A foreign page can have its own name point to this machine (DNS rebinding), and then its requests carry that name.
    The port is left open: a tunnel may end at another.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name == "localhost" or name.endswith(".localhost") or name == socket.gethostname().lower():
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class _Incoming(io.RawIOBase):
    """The bytes of a connection, all of which must come before a deadline.

    The deadline is set by `expect`: `idle_sec` for the first byte from then on, `request_sec` for all after it.
    """

    def __init__(self, connection: socket.socket, idle_sec: float, request_sec: float) -> None:
        self.connection, self.idle_sec, self.request_sec = connection, idle_sec, request_sec
        self.expect()

    def expect(self) -> None:
        """Wait for a new request."""
        self.deadline, self.has_begun = time.monotonic() + self.idle_sec, False

    def extend(self, extra_sec: float) -> None:
        """Give the request at hand more time."""
        self.deadline += extra_sec

    def readable(self) -> bool:
        """Return True, for the buffer around this."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Receive what is there; raise TimeoutError at the deadline."""
        set_deadline(self.connection, self.deadline)
        num_bytes = self.connection.recv_into(buffer)
        if not self.has_begun:
            self.deadline, self.has_begun = time.monotonic() + self.request_sec, True
        return num_bytes


def set_deadline(connection: socket.socket, deadline: float) -> None:
    """Have the next call on a connection raise TimeoutError at a time; raise it now if that has passed."""
    if (left := deadline - time.monotonic()) <= 0:
        raise TimeoutError("the browser is too slow")
    connection.settimeout(left)


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection. Nothing is computed here: that is the work of the session's thread."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a picture must not wait until the headers before it have been confirmed
    server_version, sys_version = "Longtake", ""

    def __init__(
        self,
        session: Session,
        *arguments: Any,
        idle_sec: float = IDLE_SEC,
        request_sec: float = REQUEST_SEC,
        answer_sec: float = ANSWER_SEC,
    ) -> None:
        self.session = session
        self.idle_sec, self.request_sec, self.answer_sec = idle_sec, request_sec, answer_sec
        super().__init__(*arguments)

    def setup(self) -> None:
        """Read the connection under deadlines."""
        super().setup()
        self.rfile.close()
        self.incoming = _Incoming(self.connection, self.idle_sec, self.request_sec)
        self.rfile = io.BufferedReader(self.incoming)

    def handle_one_request(self) -> None:
        """Read and answer a request."""
        self.incoming.expect()
        super().handle_one_request()

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing: what the user should know stands in the page."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is no request; the base class calls this."""
        self.close_connection = True
        self._send(as_json({"error": message or self.responses[code][1]}, code))

    def do_GET(self) -> None:
        """See `route`."""
        self._answer("GET")

    def do_POST(self) -> None:
        """See `route`."""
        self._answer("POST")

    def _answer(self, method: str) -> None:
        try:
            try:
                self._read_body(method)
                self._check_sender()
                answer = self.route(method, *self.path.partition("?")[::2])
            except Exception as error:
                answer = self.explain(error)
            self._send(answer)
        except (_Left, ConnectionError, TimeoutError):
            self.close_connection = True

    def explain(self, error: Exception) -> Answer:
        """Return the answer to a request that raised an error, in one sentence."""
        if isinstance(error, _Left):
            raise error
        if isinstance(error, Refused):
            return as_json({"error": str(error)}, error.status)
        if isinstance(error, ValueError):
            return as_json({"error": str(error)}, 400)
        if isinstance(error, Cancelled):
            return as_json({"error": str(error)}, 410)
        if isinstance(error, Busy):
            return as_json({"error": f"{error}: try again in a moment"}, 503)
        if isinstance(error, torch.OutOfMemoryError):
            return as_json({"error": "the GPU has too little memory for this: start with --device=cpu"}, 503)
        traceback.print_exception(error)
        return as_json({"error": f"something went wrong ({type(error).__name__}): see the terminal"}, 500)

    def _read_body(self, method: str) -> None:
        """Read a body before the next request: a file where one is taken, of the page alone; else it tells nothing."""
        self.body = b""
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not re.fullmatch(r"[0-9]{1,9}", length):
            self.close_connection = True
            raise Refused(413, "the request has a body: say everything in its address")
        num_bytes = int(length)
        if num_bytes <= BODY_BYTES:
            self.body = self.rfile.read(num_bytes)
            return
        self.close_connection = True  # unless the body is read to its end
        if not takes_file(method, self.path.partition("?")[0]):
            raise Refused(413, "the request has a body: say everything in its address")
        if num_bytes > UPLOAD_BYTES:
            raise Refused(413, f"the file has {num_bytes >> 20} MiB: use at most {UPLOAD_BYTES >> 20}")
        self._check_sender()
        if not self.session.play.uploads.acquire(blocking=False):
            raise Busy("others are sending files")
        try:
            self.incoming.extend(num_bytes / FILE_BYTES_PER_SEC)
            self.body = self.rfile.read(num_bytes)
        finally:
            self.session.play.uploads.release()
        self.close_connection = "close" in self.headers.get("Connection", "").lower()

    def _check_sender(self) -> None:
        """Refuse requests that other pages have the browser make."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if not is_own_name(host):
            raise Refused(403, f"the host {shown(host)} is not this machine: open the page by its address or localhost")
        site = self.headers.get("Sec-Fetch-Site", "none")  # a link to a page itself may stand anywhere
        is_foreign = site not in ("none", "same-origin") and self.path not in ("/", "/play")
        if is_foreign or (origin is not None and urlsplit(origin).netloc != host):
            raise Refused(403, "another page asks for this: only the page of this server may")

    def route(self, method: str, path: str, text: str) -> Answer:
        """Return the answer to a request; `text` stands behind the question mark of its address."""
        if method == "GET" and path in STATIC:
            name, content_type = STATIC[path]
            return Answer((PAGE / name).read_bytes(), f"{content_type}; charset=utf-8")
        numbered = re.fullmatch(r"/api/(clips|walks)/([0-9]{1,9})(/[a-z]+|)", path)
        name = f"/api/{numbered[1]}/N{numbered[3]}" if numbered else path
        handle = {
            "GET /api/models": self.models,
            "GET /api/model": self.model,
            "GET /api/check": self.check,
            "GET /api/frames": self.frames,
            "GET /api/progress": self.progress,
            "POST /api/clips": self.save_clip,
            "GET /api/clips/N": self.clip,
            "GET /api/clips/N/file": self.clip_file,
            "POST /api/clips/N/cancel": self.cancel_clip,
            "POST /api/close": self.close_tab,
            **PlayRoutes(self.session, self.wait, self.body, f"{self.client_address}").table,
        }.get(f"{method} {name}")
        if handle is None:
            raise Refused(404, f"there is nothing at {method} {shown(path)}")
        query = Query(text)
        return handle(query, int(numbered[2])) if numbered else handle(query)

    def models(self, query: Query) -> Answer:
        """Answer with the names of the models."""
        query.finish()
        return as_json({"models": list(self.session.models), "formats": VIDEO_FORMATS, "fps": DEFAULT_FPS})

    def about(self, name: str) -> About:
        """Return what is known of a model, which is opened if it has not been yet."""
        self.session.check_model(name)
        if name not in self.session.about:
            self.wait(self.session.worker.submit(self.session.open(name), f"{self.client_address}/open"))
        return self.session.about[name]

    def read_view(self, query: Query) -> tuple[View, About]:
        """Take which videos are meant; all values that are left are options of the model."""
        model, seed, grid = query.text("model"), query.whole("seed", 0), parse_grid(query.text("grid", "1x1"))
        about = self.about(model)
        kind = query.text("kind", list(about.parts)[-1])
        return View(model, kind, about.read_options(query.rest(), model), seed, grid), about

    def model(self, query: Query) -> Answer:
        """Open a model and answer with its kinds of frames, their sizes, and the options that a page can offer."""
        name = query.text("model")
        query.finish()
        about = self.about(name)
        assert PARAMETERS.isdisjoint(control.name for control in about.controls), "options named like parameters"
        kinds = {}
        for kind, shows in about.kinds.items():
            height, width = about.size(kind)
            part = about.parts[shows[-1]]
            kinds[kind] = {
                "height": height, "width": width, "block": about.block(kind), "stage": part.stage, "shows": shows,
                "title": part.title if len(shows) == 1 else kind.replace("-", " ").capitalize(),
            }  # fmt: skip
        limits = {"max_frames": views.MAX_ANSWER_FRAMES, "max_bytes": views.MAX_ANSWER_BYTES}
        options = [dataclasses.asdict(control) for control in about.controls]
        return as_json({"model": name, "kinds": kinds, "options": options, "first": about.first, **limits})

    def check(self, query: Query) -> Answer:
        """Answer with values as they are understood, without computing anything."""
        frame = query.whole("frame", 0)
        view, about = self.read_view(query)
        about.check(view, frame)
        values = {"model": view.model, "kind": view.kind, "seed": view.seed, "grid": "{}x{}".format(*view.grid)}
        return as_json({**values, "frame": frame, "options": dict(view.options)})

    def frames(self, query: Query) -> Answer:
        """Answer with frames [start, start + count), see `pack`. A later `turn` of a `tab` replaces earlier ones."""
        start, count = query.whole("start"), query.whole("count", 1)
        tab, turn = query.text("tab", ""), query.whole("turn", 0)
        view, about = self.read_view(query)
        about.check(view, start, count)
        frames = self.session.cached(view, start, count)
        if frames is None:
            steps = self.session.frames(view, start, count)
            frames = self.wait(self.session.worker.submit(steps, tab or f"{self.client_address}", turn))
        pictures = ((start + index, as_png(frame)) for index, frame in enumerate(frames))
        return Answer(pack(pictures), "application/octet-stream")

    def progress(self, query: Query) -> Answer:
        """Answer with how far the rollout is that a tab waits for; null if it waits for none."""
        tab = query.text("tab")
        query.finish()
        progress = self.session.progress(tab)
        return as_json(progress and progress._asdict())

    def save_clip(self, query: Query) -> Answer:
        """Begin a file of frames [start, start + count) and answer with its number."""
        start, count = query.whole("start"), query.whole("count")
        fps, file_format = query.number("fps", DEFAULT_FPS), query.text("format", "mp4")
        tab = query.text("tab", "")
        view, _ = self.read_view(query)
        return as_json({"clip": self.session.save_clip(view, start, count, fps, file_format, tab).number})

    def clip(self, query: Query, number: int) -> Answer:
        """Answer with how far a clip is."""
        query.finish()
        clip = self.session.clip(number)
        is_finished = clip.task is not None and clip.task.has_ended
        if clip.task is not None and is_finished:
            clip.task.result()
        progress = None if clip.task is None or is_finished else clip.task.progress
        values = {"name": clip.name, "done": clip.done, "frames": clip.num_frames, "finished": is_finished}
        return as_json({**values, "progress": progress and progress._asdict()})

    def clip_file(self, query: Query, number: int) -> Answer:
        """Answer with the file of a clip, once it is finished."""
        query.finish()
        clip = self.session.clip(number)
        if clip.task is None or not clip.task.has_ended:
            raise ValueError(f"clip {number} has {clip.done} of {clip.num_frames} frames so far: wait for the others")
        clip.task.result()
        return as_file(clip.path, clip.name)

    def cancel_clip(self, query: Query, number: int) -> Answer:
        """Give a clip up."""
        query.finish()
        task = self.session.clip(number).task
        if task is not None:
            task.cancel()
        return as_json({})

    def close_tab(self, query: Query) -> Answer:
        """Give up all that a tab has asked for, which is closed."""
        tab = query.text("tab")
        query.finish()
        self.session.drop(tab)
        return as_json({})

    def wait(self, task: Task[Any]) -> Any:
        """Return the result of a task, which is cancelled if the browser closes the connection."""
        while not task.wait(LOOK_SEC):
            if self._is_alone():
                task.cancel()
                raise _Left
        return task.result()

    def _is_alone(self) -> bool:
        """Return whether the browser has closed the connection."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        return bool(poll.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)

    def _send(self, answer: Answer) -> None:
        """Write a response."""
        body = answer.body
        num_bytes = body.stat().st_size if isinstance(body, Path) else len(body)
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(num_bytes))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        deadline = time.monotonic() + self.answer_sec * (1 + num_bytes / ANSWER_BYTES)
        set_deadline(self.connection, deadline)
        self.end_headers()
        with open(body, "rb") if isinstance(body, Path) else io.BytesIO(body) as file:
            while piece := file.read(PIECE_BYTES):
                set_deadline(self.connection, deadline)  # `sendall` takes the time-out as that of all bytes
                self.wfile.write(piece)


class Server(ThreadingHTTPServer):
    """A thread for each connection, of which there are at most `max_connections`."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self, host: str, port: int, handler: Callable[..., Handler], max_connections: int = MAX_CONNECTIONS
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._places = threading.BoundedSemaphore(max_connections)
        super().__init__((host, port), handler)

    @property
    def url(self) -> str:
        """Return where a browser finds it."""
        host, port = self.server_address[:2]
        return f"http://[{host}]:{port}" if ":" in str(host) else f"http://{host}:{port}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread, or close the connection."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer the requests of a connection; the thread of the connection calls this."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print errors, except those of connections that break."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)
