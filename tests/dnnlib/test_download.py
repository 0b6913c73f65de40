"""Downloads from a real server that truncates, misreports, stalls and changes files; concurrent processes."""

import hashlib
import http.server
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dnnlib import download, util

BODY = bytes(range(256)) * 5000
OTHER = BODY[::-1]
HALF = len(BODY) // 2
ROOT = Path(util.__file__).parent.parent


class Server(http.server.ThreadingHTTPServer):
    """Serves BODY in good and in bad ways, and notes what it is asked for."""

    asked: list[tuple[str, str | None]]  # path and Range
    closing: threading.Event
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore a client that hangs up."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    """Words in the path say what goes wrong; `-once` only with the first request."""

    server: Server  # type: ignore[assignment]

    def do_GET(self) -> None:
        words = self.path.strip("/").split("-")
        first = not any(path == self.path for path, _ in self.server.asked)
        self.server.asked.append((self.path, self.headers["Range"]))
        faulty = first or "once" not in words
        for status in (404, 500, 503):
            if str(status) in words and faulty:
                return self.send_error(status)
        if "circle" in words:
            self.send_response(302)
            self.send_header("Location", self.path)
            return self.end_headers()
        body = b"" if "empty" in words else BODY
        body = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>" if "page" in words else body
        body = OTHER if "changes" in words and not first else body
        etag = f'"{hashlib.md5(body).hexdigest()}"'
        begin = 0
        honours = self.headers["If-Range"] == etag or "rude" in words
        if self.headers["Range"] and honours and "deaf" not in words:
            begin = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if begin >= len(body) > 0:
            return self.send_error(416)
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        if "etag" in words:
            self.send_header("ETag", etag)
        if "named" in words:
            self.send_header("Content-Disposition", 'attachment; filename="../a name.pkl"')
        if "unsaid" not in words:
            lie = 1000 if "long" in words else -1000 if "short" in words else 0
            self.send_header("Content-Length", str(len(body) - begin + lie))
        self.end_headers()
        end = HALF if {"cut", "held"} & {*words} and faulty else len(body)
        if "drip" in words or "slow" in words:
            for i in range(begin, end, 1 if "drip" in words else 1 << 16):
                self.wfile.write(body[i : i + (1 if "drip" in words else 1 << 16)])
                time.sleep(0.02)
        else:
            self.wfile.write(body[begin:end])
        if "held" in words and faulty:
            self.wfile.flush()
            self.server.closing.wait()
        if "silent" in words:
            self.wfile.flush()
            time.sleep(1)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.asked, server.closing = [], threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(util, "_cache_dir", None)
    monkeypatch.setattr(download, "FIRST_DELAY_SEC", 0.01)
    monkeypatch.delenv("DNNLIB_OFFLINE", raising=False)
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "downloads"


def finals(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.suffix not in (".part", ".etag")]


# ----------------------------------------------------------------------------
# The cache.


def test_download_is_cached_under_its_hash(server: Server, cache: Path, capsys: pytest.CaptureFixture[str]):
    url = f"{server.address}/net.pkl"
    with util.open_url(url) as file:
        assert file.read() == BODY
    path = util.open_url(url, return_filename=True)
    prefix = hashlib.md5(url.encode()).hexdigest()
    assert os.path.basename(path).startswith(f"{prefix}_http___127.0.0.1") and path.endswith("_net.pkl")
    assert [entry.name for entry in cache.iterdir()] == [os.path.basename(path)]
    assert server.asked == [("/net.pkl", None)]
    assert capsys.readouterr() == (f"Downloading {url} ...\n", "")


def test_cached_file_needs_no_server(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch):
    url = f"{server.address}/net.pkl"
    util.open_url(url, verbose=False).close()
    server.shutdown()
    server.server_close()
    for offline in ("0", "1"):
        monkeypatch.setenv("DNNLIB_OFFLINE", offline)
        with util.open_url(url, num_attempts=1) as file:
            assert file.read() == BODY


@pytest.mark.parametrize("cached", [True, False])
def test_offline_mode_opens_no_connection(cached: bool, server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DNNLIB_OFFLINE", "1")
    with pytest.raises(ValueError, match="DNNLIB_OFFLINE forbids downloads: unset DNNLIB_OFFLINE"):
        util.open_url(f"{server.address}/a", cache=cached)
    assert server.asked == [] and not cache.exists()


def test_cache_folder_can_be_given(server: Server, cache: Path, tmp_path: Path):
    folder = tmp_path / "other"
    path = util.open_url(f"{server.address}/a", cache_dir=str(folder), verbose=False, return_filename=True)
    assert Path(path).parent == folder and not cache.exists()


def test_cache_folder_that_cannot_be_written_is_one_sentence(server: Server, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot keep http.*Not a directory.*set DNNLIB_CACHE_DIR"):
        util.open_url(f"{server.address}/a", cache_dir=str(tmp_path / "file" / "cache"))


def test_name_from_the_server_is_made_safe(server: Server, cache: Path):
    path = Path(util.open_url(f"{server.address}/named", verbose=False, return_filename=True))
    assert path.parent == cache and path.name.split("_", 1)[1] == ".._a_name.pkl"


def test_uncached_download_leaves_nothing(server: Server, cache: Path):
    with util.open_url(f"{server.address}/cut-etag-once", cache=False, verbose=False) as file:
        assert file.read() == BODY
    assert not cache.exists() and server.asked[1][1] == f"bytes={HALF}-"


def test_hash_is_checked(server: Server, cache: Path):
    good, bad = hashlib.sha256(BODY).hexdigest(), hashlib.sha256(b"").hexdigest()
    url = f"{server.address}/a-etag"
    with pytest.raises(ValueError, match=f"SHA-256 is {good}, expected {bad}"):
        util.open_url(url, num_attempts=1, sha256=bad)
    assert list(cache.iterdir()) == []
    path = Path(util.open_url(f"{url}#sha256={good.upper()}", return_filename=True))
    assert path.read_bytes() == BODY and util.open_url(url, sha256=good.upper(), return_filename=True) == str(path)

    path.write_bytes(BODY[:-1])
    with util.open_url(url, sha256=good) as file:
        assert file.read() == BODY
    with pytest.raises(ValueError, match=f"has SHA-256 {good}, expected {bad}"):
        util.open_url(path.as_uri() + f"#sha256={bad}")
    with pytest.raises(ValueError, match="expected 64 hexadecimal digits"):
        util.open_url(f"{url}#sha256=12")
    with pytest.raises(ValueError, match="names another SHA-256"):
        util.open_url(f"{url}#sha256={good}", sha256=bad)


# ----------------------------------------------------------------------------
# Servers.


@pytest.mark.parametrize(
    ("page", "second"),
    [
        ("503-once", None),
        ("cut-once", None),
        ("cut-once-etag", f"bytes={HALF}-"),
        ("cut-once-etag-deaf", f"bytes={HALF}-"),
        ("cut-once-etag-changes", f"bytes={HALF}-"),
        ("cut-once-etag-changes-rude", f"bytes={HALF}-"),
    ],
)
def test_temporary_errors_are_retried(page: str, second: str | None, server: Server, cache: Path):
    path = Path(util.open_url(f"{server.address}/{page}", return_filename=True))
    assert path.read_bytes() == (OTHER if "changes" in page else BODY)
    assert server.asked[1][1] == second
    assert list(cache.iterdir()) == [path]


@pytest.mark.parametrize(
    ("page", "num_asked", "message"),
    [
        ("404", 1, "the server answered 404 Not Found; check the address"),
        ("500", 2, "the server answered 500 Internal Server Error"),
        ("circle", 31, "keeps redirecting"),
        ("cut", 2, "the connection broke after 640000 bytes|only 640000 of 1280000 bytes were received"),
        ("long", 2, "the connection broke after 1280000 bytes|only 1280000 of 1281000 bytes were received"),
        ("long-etag", 2, "the server has fewer bytes than were received before"),
        ("empty", 2, "the server sent an empty file"),
        ("page", 1, "the server sent a web page instead of the file"),
        ("page-unsaid", 1, "the server sent a web page instead of the file"),
        ("drip", 2, "the server sent only .* bytes in"),
        ("silent-long", 2, "the server stopped sending after 1280000 bytes"),
    ],
)
def test_failed_download_is_one_sentence_and_leaves_nothing(
    page: str, num_asked: int, message: str, server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(download, "READ_TIMEOUT_SEC", 0.3)
    url = f"{server.address}/{page}"
    with pytest.raises(ValueError, match=message) as caught:
        util.open_url(url, num_attempts=2)
    assert str(caught.value).startswith(f"cannot download {url}: ") and "\n" not in str(caught.value)
    assert len(server.asked) == num_asked
    assert list(cache.iterdir()) == []


def test_length_that_is_too_short_shows_in_the_hash(server: Server, cache: Path):
    with pytest.raises(ValueError, match="its SHA-256 is .*, expected"):
        util.open_url(f"{server.address}/short#sha256={hashlib.sha256(BODY).hexdigest()}", num_attempts=2)
    assert list(cache.iterdir()) == []


def test_body_without_a_length_is_taken_to_its_end(server: Server, cache: Path):
    with util.open_url(f"{server.address}/unsaid") as file:
        assert file.read() == BODY


def test_an_html_page_is_returned_if_requested(server: Server, cache: Path):
    with util.open_url(f"{server.address}/page-.html") as file:
        assert b"Sign in" in file.read()


def test_no_server_is_one_sentence(server: Server, cache: Path):
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match="no connection to the server"):
        util.open_url(f"{server.address}/a", num_attempts=2)


def test_next_call_goes_on_where_the_last_one_failed(server: Server, cache: Path):
    url = f"{server.address}/cut-etag-once"
    with pytest.raises(ValueError, match="640000"):
        util.open_url(url, num_attempts=1)
    assert sorted(path.suffix for path in cache.iterdir()) == [".etag", ".part"]
    with util.open_url(url, num_attempts=1) as file:
        assert file.read() == BODY
    assert server.asked[1][1] == f"bytes={HALF}-" and len(list(cache.iterdir())) == 1


# ----------------------------------------------------------------------------
# Several processes.


def ask(url: str) -> subprocess.Popen[str]:
    code = f"from dnnlib import util; print(len(util.open_url({url!r}).read()))"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "etag", [b"", b"\0" * 34, b'"cut', b"\xff\xfe\xfa", b'"two\r\nlines: 1"', b'"of another"', None]
)
def test_a_damaged_etag_begins_the_download_anew(etag: bytes | None, server: Server, cache: Path):
    url = f"{server.address}/cut-etag-once"
    with pytest.raises(ValueError, match="640000 bytes"):
        util.open_url(url, num_attempts=1, verbose=False)
    (path,) = cache.glob("*.etag")
    path.unlink()
    if etag is not None:
        path.write_bytes(etag)
    with util.open_url(url, num_attempts=1, verbose=False) as file:
        assert file.read() == BODY
    (stored,) = cache.iterdir()
    stored.write_bytes(b"")  # as a power cut may leave it
    with util.open_url(url, verbose=False) as file:
        assert file.read() == BODY


def test_of_two_processes_one_downloads(server: Server, cache: Path):
    both = [ask(f"{server.address}/slow") for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [output.splitlines()[-1] for output in outputs] == [str(len(BODY))] * 2
    assert len(server.asked) == 1 and len(list(cache.iterdir())) == 1
    assert sum("waiting for it" in output for output in outputs) <= 1


def test_a_killed_download_is_taken_over_by_a_waiting_process(server: Server, cache: Path):
    url = f"{server.address}/held-etag-once"
    owner = ask(url)
    while not any(path.suffix == ".part" and path.stat().st_size > 0 for path in cache.glob("*")):
        time.sleep(0.01)
    waiter = ask(url)
    assert waiter.stdout is not None
    assert "waiting for it" in waiter.stdout.readline()
    assert finals(cache) == []
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    assert waiter.communicate()[0].splitlines()[-1] == str(len(BODY))
    (path,) = cache.iterdir()
    assert path.read_bytes() == BODY and server.asked[1][1] is not None


def test_progress_is_drawn_on_a_terminal_only(server: Server, cache: Path):
    main, terminal = pty.openpty()
    code = f"from dnnlib import util; util.open_url({server.address + '/slow'!r}).close()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=terminal, check=True)
    os.close(terminal)
    assert b"100%" in os.read(main, 1 << 16)
    os.close(main)
