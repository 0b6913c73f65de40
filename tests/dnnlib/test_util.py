"""Small helpers: attribute dictionaries, files written whole, durations, names, and downloads from a real server."""

import contextlib
import hashlib
import http.server
import io
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import dnnlib
from dnnlib import EasyDict, util

BODY = bytes(range(256)) * 5000


class Server(http.server.ThreadingHTTPServer):
    """Serves BODY in good and in bad ways, and counts what it is asked for."""

    asked: list[str]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server  # type: ignore[assignment]

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        first_time = self.server.asked.count(self.path) == 1
        if self.path.startswith("/missing"):
            self.send_error(404)
            return
        if self.path.startswith("/busy") and first_time:
            self.send_error(503)
            return
        cut = self.path.startswith("/cut") or (self.path.startswith("/recovers") and first_time)
        self.send_response(200)
        self.send_header("Content-Length", "0" if self.path.startswith("/empty") else str(len(BODY)))
        if self.path.startswith("/named"):
            self.send_header("Content-Disposition", 'attachment; filename="../a name.pkl"')
        self.end_headers()
        if not self.path.startswith("/empty"):
            self.wfile.write(BODY[: len(BODY) // 2] if cut else BODY)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(util, "_cache_dir", None)
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "downloads"


# ----------------------------------------------------------------------------
# Downloads.


def test_download_is_cached_under_its_hash(server: Server, cache: Path, capsys: pytest.CaptureFixture[str]):
    url = f"{server.address}/net.pkl"
    with util.open_url(url) as file:
        assert file.read() == BODY
    path = util.open_url(url, return_filename=True)
    prefix = hashlib.md5(url.encode()).hexdigest()
    assert os.path.basename(path).startswith(f"{prefix}_http___127.0.0.1") and path.endswith("_net.pkl")
    assert [entry.name for entry in cache.iterdir()] == [os.path.basename(path)]
    assert server.asked == ["/net.pkl"]
    assert capsys.readouterr().out == f"Downloading {url} ...\n"


def test_cached_file_needs_no_server(server: Server, cache: Path):
    url = f"{server.address}/net.pkl"
    util.open_url(url, verbose=False).close()
    server.shutdown()
    server.server_close()
    with util.open_url(url, num_attempts=1) as file:
        assert file.read() == BODY


def test_cache_folder_can_be_given(server: Server, cache: Path, tmp_path: Path):
    folder = tmp_path / "other"
    path = util.open_url(f"{server.address}/a", cache_dir=str(folder), verbose=False, return_filename=True)
    assert Path(path).parent == folder and not cache.exists()


def test_name_from_the_server_is_made_safe(server: Server, cache: Path):
    path = Path(util.open_url(f"{server.address}/named", verbose=False, return_filename=True))
    assert path.parent == cache and path.name.split("_", 1)[1] == ".._a_name.pkl"


def test_uncached_download_leaves_nothing(server: Server, cache: Path):
    with util.open_url(f"{server.address}/a", cache=False, verbose=False) as file:
        assert file.read() == BODY
    assert not cache.exists()


@pytest.mark.parametrize("page", ["recovers", "busy"])
def test_passing_trouble_is_tried_again(page: str, server: Server, cache: Path, capsys: pytest.CaptureFixture[str]):
    with util.open_url(f"{server.address}/{page}") as file:
        assert file.read() == BODY
    assert len(server.asked) == 2 and "trying again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("page", "num_asked", "message"),
    [
        ("missing", 1, "the server answered 404 Not Found; check the address"),
        ("cut", 2, "the connection broke after|only 640000 of 1280000 bytes came"),
        ("empty", 2, "the server sent an empty file"),
    ],
)
def test_failed_download_is_one_sentence_and_leaves_nothing(
    page: str, num_asked: int, message: str, server: Server, cache: Path
):
    url = f"{server.address}/{page}"
    with pytest.raises(ValueError, match=message) as caught:
        util.open_url(url, num_attempts=2)
    assert str(caught.value).startswith(f"cannot download {url}: ") and "\n" not in str(caught.value)
    assert len(server.asked) == num_asked
    assert list(cache.iterdir()) == []


def test_offline_is_one_sentence(server: Server, cache: Path):
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match="no connection to the server"):
        util.open_url(f"{server.address}/a", num_attempts=2)


def test_hash_is_checked(server: Server, cache: Path, tmp_path: Path):
    good, bad = hashlib.sha256(BODY).hexdigest(), hashlib.sha256(b"").hexdigest()
    url = f"{server.address}/a"
    with pytest.raises(ValueError, match=f"SHA-256 is {good}, expected {bad}"):
        util.open_url(url, num_attempts=1, sha256=bad)
    assert list(cache.iterdir()) == []
    path = Path(util.open_url(url, sha256=good.upper(), return_filename=True))
    assert path.read_bytes() == BODY

    path.write_bytes(BODY[:-1])
    with util.open_url(url, sha256=good) as file:
        assert file.read() == BODY
    with pytest.raises(ValueError, match=f"has SHA-256 {good}, expected {bad}"):
        util.open_url(str(path), sha256=bad)


def test_two_processes_download_at_once(server: Server, cache: Path):
    url = f"{server.address}/net.pkl"
    code = f"from dnnlib import util; print(len(util.open_url({url!r}, verbose=False).read()))"
    root = Path(util.__file__).parent.parent
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [process.communicate()[0] for process in both] == [f"{len(BODY)}\n"] * 2
    assert len(list(cache.iterdir())) == 1


def test_local_files_are_opened_in_place(tmp_path: Path, cache: Path):
    path = tmp_path / "a b%20.bin"
    path.write_bytes(b"x")
    for name in (str(path), path.as_uri()):
        with util.open_url(name) as file:
            assert file.read() == b"x"
        assert util.open_url(name, return_filename=True) == str(path)
    assert not cache.exists()


@pytest.mark.parametrize("url", ["ftp://host/a", "s3://bucket/a", "http://"])
def test_other_addresses_are_refused(url: str):
    with pytest.raises(ValueError, match="expected a local path or an https://"):
        util.open_url(url)


def test_is_url():
    assert util.is_url("https://example.org/a") and util.is_url("http://localhost:8000")
    assert not any(map(util.is_url, ["a/b", "C:\\a", "file:///a", "ftp://example.org/a", "https://", 3, None]))
    assert util.is_url("file:///a", allow_file_urls=True)


def test_cache_root_follows_setting_variable_and_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(util, "_cache_dir", None)
    monkeypatch.delenv("DNNLIB_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert dnnlib.make_cache_dir_path("a", "b") == str(tmp_path / ".cache" / "dnnlib" / "a" / "b")
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "variable"))
    assert dnnlib.make_cache_dir_path() == str(tmp_path / "variable")
    util.set_cache_dir(tmp_path / "set")
    assert dnnlib.make_cache_dir_path("a") == str(tmp_path / "set" / "a")


# ----------------------------------------------------------------------------
# Files.


def test_atomic_path_renames_on_success(tmp_path: Path):
    path = tmp_path / "a.tar.mp4"
    path.write_text("old")
    with util.atomic_path(path) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".mp4" and temporary.name.startswith(".")
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_atomic_path_keeps_the_old_file_on_failure(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), util.atomic_path(str(path)) as temporary:
        temporary.write_text("part")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_logger_copies_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "log.txt"
    stdout = sys.stdout
    with util.Logger(path) as logger:
        print("one")
        print("two", file=sys.stderr)
        logger.write("three\n")
    assert sys.stdout is stdout
    print("four")
    assert path.read_text() == "one\ntwo\nthree\n"
    assert capsys.readouterr() == ("one\nthree\nfour\n", "two\n")


# ----------------------------------------------------------------------------
# The rest.


def test_easy_dict_is_a_dict_with_attributes():
    options = EasyDict(a=1, items=2)
    options.b = [3]
    assert options == {"a": 1, "items": 2, "b": [3]} and options.a == 1 and callable(options.items)
    del options.a
    assert "a" not in options and not hasattr(options, "a")
    with pytest.raises(AttributeError):
        del options.a
    again = pickle.loads(pickle.dumps(options))
    assert type(again) is EasyDict and again == options


@pytest.mark.parametrize(
    ("seconds", "text", "brief"),
    [
        (0.4, "0s", "0s"),
        (59.6, "1m 00s", "1m 00s"),
        (125, "2m 05s", "2m 05s"),
        (10809, "3h 00m 09s", "3h 00m"),
        (86400 + 7380, "1d 02h 03m", "1d 02h"),
    ],
)
def test_durations(seconds: float, text: str, brief: str):
    assert util.format_time(seconds) == text and util.format_time_brief(seconds) == brief


def test_objects_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert util.get_obj_by_name("dnnlib.util.EasyDict") is EasyDict
    assert util.get_obj_by_name("os.path.join") is os.path.join
    assert util.call_func_by_name(3, 4, func_name="builtins.divmod") == (0, 3)
    assert util.construct_class_by_name(class_name="dnnlib.util.EasyDict", a=1) == {"a": 1}
    with pytest.raises(ValueError, match="dnnlib.util was imported, but it has no 'Nothing'"):
        util.get_obj_by_name("dnnlib.util.Nothing")
    with pytest.raises(ValueError, match="there is no module 'nowhere_at_all'"):
        util.get_obj_by_name("nowhere_at_all.Nothing")
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_missing"):
        util.get_obj_by_name("needs_more.Thing")


def test_yes_or_no(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("maybe\nYES\nn\n"))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert util.ask_yes_no("Sure?") is True
        assert util.ask_yes_no("Sure?") is False
    assert out.getvalue().count("Sure? [y/n]") == 3
