"""Small helpers: attribute dictionaries, atomic files, durations."""

import errno
import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import dnnlib
from dnnlib import EasyDict, util


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(util, "_cache_dir", None)
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "downloads"


# ----------------------------------------------------------------------------
# Addresses (downloads: test_download.py).


def test_local_files_are_opened_in_place(tmp_path: Path, cache: Path):
    path = tmp_path / "a b%20.bin"
    path.write_bytes(b"x")
    for name in (str(path), path.as_uri()):
        with util.open_url(name) as file:
            assert file.read() == b"x"
        assert util.open_url(name, return_filename=True) == str(path)
    with pytest.raises(ValueError, match=f"has SHA-256 {hashlib.sha256(b'x').hexdigest()}, expected 00"):
        util.open_url(str(path), sha256="00")
    assert not cache.exists()


@pytest.mark.parametrize("url", ["ftp://host/a", "s3://bucket/a", "http://"])
def test_other_urls_are_refused(url: str):
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


def test_atomic_path_brings_the_file_and_its_name_to_the_disk_in_this_order(tmp_path: Path, monkeypatch):
    synced: list[tuple[str, list[str]]] = []

    def fsync(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        synced.append((name, sorted(os.listdir(tmp_path))))

    monkeypatch.setattr(os, "fsync", fsync)
    with util.atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert synced == [(temporary.name, [temporary.name]), (tmp_path.name, ["a.txt"])]


@pytest.mark.parametrize("how", ["killed", "working", "of an earlier version", "another's", "another's, old"])
def test_temporary_files_of_killed_writers_are_removed_and_those_in_use_stay(how: str, tmp_path: Path):
    script = """
import sys, time
from dnnlib import util
with util.atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(100)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "a.pkl")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
            (left,) = tmp_path.iterdir()
            if how == "of an earlier version":
                left = left.rename(tmp_path / ".a.999999-0123abcd.tmp.pkl")
            if how != "working":
                writer.kill()
                writer.wait()
            if "old" in how:
                os.utime(left, (1e9, 1e9))
            with util.atomic_path(tmp_path / ("b.pkl" if "another's" in how else "a.pkl")) as temporary:
                temporary.write_text("whole")
            assert left.exists() == (how in ("working", "another's"))
        finally:
            writer.kill()


def test_a_failure_to_clean_up_hides_no_error(tmp_path: Path, monkeypatch):
    def unlink(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(RuntimeError, match="the writer's own"), util.atomic_path(tmp_path / "a"):
        raise RuntimeError("the writer's own")


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
