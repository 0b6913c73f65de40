"""Small helpers: attribute dictionaries, atomic files, durations."""

import hashlib
import pickle
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
