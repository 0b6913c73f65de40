"""A small web server for a page on this machine: safe from other pages, bounded, and with answers in JSON.

class MyHandler(Handler):
    def route(self, method, path, text):
        return as_json({"answer": Query(text).whole("number")})

with Server("127.0.0.1", 8008, MyHandler) as server:
    server.serve_forever()

There are no passwords: whoever reaches the port may use it. Requests that a foreign page has the browser make are
refused, by the Host header (a name that was made to point here, DNS rebinding) and by what browsers tell of their
origin.
"""

import ipaddress
import json
import re
import select
import shutil
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from explorer.worker import Busy, Cancelled, Task

# What the page may do: talk to this server, and show what it made itself.
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:"
POLICY += "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

MAX_CONNECTIONS = 64
LOOK_SEC = 0.1  # how often a waiting thread looks whether its browser is still there


# ----------------------------------------------------------------------------
# What is asked.


class Refused(Exception):
    """What is answered with another status than 400, which a ValueError is."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Left(Exception):
    """The browser has closed the connection."""


class Query:
    """What stands behind the question mark of an address; ValueError for values that cannot be read."""

    def __init__(self, text: str) -> None:
        pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=32)
        self.values = dict(pairs)
        if len(self.values) < len(pairs):
            raise ValueError("a value is given twice: give each once")

    def text(self, name: str, default: str | None = None) -> str:
        """A value as it is."""
        value = self.values.pop(name, default)
        if value is None:
            raise ValueError(f"{name} is missing: give one")
        return value

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number."""
        value = self.text(name, None if default is None else str(default)).strip()
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", value):
            raise ValueError(f"{name} is {shown(value)}: use a whole number, such as 0 or 42")
        return int(value)

    def number(self, name: str, default: float) -> float:
        """A number."""
        value = self.text(name, str(default)).strip()
        if not re.fullmatch(r"[+-]?([0-9]{1,9}(\.[0-9]{0,9})?|\.[0-9]{1,9})", value):
            raise ValueError(f"{name} is {shown(value)}: use a number, such as 0.7")
        return float(value)

    def finish(self) -> None:
        """Refuse what has not been read."""
        if self.values:
            raise ValueError(f"{shown(next(iter(self.values)))} is nothing that can be given here: leave it out")


def shown(text: str) -> str:
    """What came from outside, for a message: quoted, and not too long."""
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def is_own_name(host: str) -> bool:
    """Whether a Host header names this machine by its address or by a name that nobody else can give to it.

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


# ----------------------------------------------------------------------------
# What is answered.


class Answer(NamedTuple):
    """A response."""

    body: bytes | Path  # a file is sent piece by piece
    content_type: str = "application/json"
    status: int = 200
    headers: Mapping[str, str] = {}


def as_json(value: Any, status: int = 200) -> Answer:
    """A value as JSON."""
    return Answer(json.dumps(value).encode(), status=status)


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection; what to, `route` decides."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "Longtake", ""
    timeout = 60  # seconds that an idle connection is kept

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: what the user should know stands in the page."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class calls for requests that are none."""
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
                self._read_body()
                self._check_sender()
                answer = self.route(method, *self.path.partition("?")[::2])
            except Exception as error:
                answer = self.explain(error)
            self._send(answer)
        except (_Left, ConnectionError, TimeoutError):
            self.close_connection = True

    def explain(self, error: Exception) -> Answer:
        """The answer to a request that raised an error, in one sentence."""
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
        traceback.print_exception(error)
        return as_json({"error": f"something went wrong ({type(error).__name__}): see the terminal"}, 500)

    def _read_body(self) -> None:
        """Nothing is told in bodies; what there is must be read before the next request."""
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not re.fullmatch(r"[0-9]{1,4}", length):
            self.close_connection = True
            raise Refused(413, "the request has a body: say everything in its address")
        self.rfile.read(int(length))

    def _check_sender(self) -> None:
        """Refuse requests that other pages have the browser make."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if not is_own_name(host):
            raise Refused(403, f"the host {shown(host)} is not this machine: open the page by its address or localhost")
        site = self.headers.get("Sec-Fetch-Site", "none")  # a link to the page itself may stand anywhere
        is_foreign = site not in ("none", "same-origin") and self.path != "/"
        if is_foreign or (origin is not None and urlsplit(origin).netloc != host):
            raise Refused(403, "another page asks for this: only the page of this server may")

    def route(self, method: str, path: str, text: str) -> Answer:
        """The answer to a request; `text` stands behind the question mark of its address. For errors see `explain`."""
        raise AssertionError("a handler defines its routes")

    def wait(self, task: Task[Any]) -> Any:
        """The result of a task, which is cancelled if the browser closes the connection."""
        while not task.wait(LOOK_SEC):
            if self._is_alone():
                task.cancel()
                raise _Left
        return task.result()

    def _is_alone(self) -> bool:
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        return bool(poll.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)

    def _send(self, answer: Answer) -> None:
        """Write a response."""
        body = answer.body
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(body.stat().st_size if isinstance(body, Path) else len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if isinstance(body, Path):
            with open(body, "rb") as file:
                shutil.copyfileobj(file, self.wfile)
        else:
            self.wfile.write(body)


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
        """Where a browser finds it."""
        host, port = self.server_address[:2]
        return f"http://[{host}]:{port}" if ":" in str(host) else f"http://{host}:{port}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread, or hang up."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """What the thread does."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that break are no news."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)
