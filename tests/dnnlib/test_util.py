"""Small helpers: attribute dictionaries, files written whole, durations, names."""

import contextlib
import hashlib
import io
import os
import pickle
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
