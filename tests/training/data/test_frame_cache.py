"""Caches return the stored frames, also after a crash, and reject sizes that do not fit."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from training.data.frame_cache import FrameCache, make_caches

SIZE = (4, 6)


def picture(row):
    return np.random.RandomState(row).randint(0, 256, (*SIZE, 3)).astype(np.uint8)


def fetch(cache, rows):
    """Return the frames that the cache has, by row."""
    out = np.zeros((len(rows), *SIZE, 3), np.uint8)
    missing = set(cache.fetch(np.array(rows), out).tolist())
    return {row: frame for position, (row, frame) in enumerate(zip(rows, out, strict=True)) if position not in missing}


@pytest.mark.parametrize("kind", ["ram", "memmap"])
def test_frames_come_back_as_they_were(tmp_path, kind):
    cache = FrameCache(tmp_path / "f" if kind == "memmap" else None, 10, SIZE)
    assert fetch(cache, range(10)) == {}
    for row in (3, 4, 9):
        cache.store(row, picture(row))
    found = fetch(cache, [9, 0, 3, 3, 4])
    assert sorted(found) == [3, 4, 9] and all(np.array_equal(frame, picture(row)) for row, frame in found.items())


def test_a_file_is_shared_by_processes_and_runs(tmp_path):
    path = tmp_path / "f"
    ours = FrameCache(path, 10, SIZE)
    child = os.fork()
    if child == 0:
        FrameCache(path, 10, SIZE).store(5, picture(5))
        os._exit(0)
    os.waitpid(child, 0)
    ours.store(6, picture(6))
    for cache in (ours, FrameCache(path, 10, SIZE), pickle.loads(pickle.dumps(ours))):
        found = fetch(cache, range(10))
        assert sorted(found) == [5, 6] and all(np.array_equal(frame, picture(row)) for row, frame in found.items())
    assert path.stat().st_size == FrameCache.num_bytes(10, SIZE)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot take the place beforehand")
def test_the_place_on_the_disk_is_taken_before_it_is_written_to(tmp_path):
    FrameCache(tmp_path / "f", 10_000, SIZE)
    assert 512 * (tmp_path / "f").stat().st_blocks >= FrameCache.num_bytes(10_000, SIZE)


def test_partial_writes_of_a_crash_are_rejected(tmp_path):
    path = tmp_path / "f"
    cache = FrameCache(path, 3, SIZE)
    for row in range(3):
        cache.store(row, picture(row))
    num_bytes = SIZE[0] * SIZE[1] * 3
    with open(path, "r+b") as file:
        file.seek(3 * 4 + num_bytes + 7)  # within frame 1, whose checksum reached the disk before its pixels
        file.write(bytes(20))
    later = FrameCache(path, 3, SIZE)
    assert sorted(fetch(later, range(3))) == [0, 2]
    later.store(1, picture(1))
    assert sorted(fetch(FrameCache(path, 3, SIZE), range(3))) == [0, 1, 2]
    os.truncate(path, 3 * 4 + num_bytes)  # as if whoever made the file was killed before it was long enough
    assert sorted(fetch(FrameCache(path, 3, SIZE), range(3))) == [0]


def test_threads_may_fill_and_read_together():
    cache = FrameCache(None, 50, SIZE)

    def work(number):
        row = number % 50
        if not fetch(cache, [row]):
            cache.store(row, picture(row))
        return np.array_equal(fetch(cache, [row])[row], picture(row))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(1000)))


def test_as_many_sizes_are_kept_as_fit_and_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    caches = make_caches("memmap", {(8, 8): (5, "large"), SIZE: (10, "small"), (9999, 9999): (10**6, "vast")})
    assert list(caches) == [SIZE, (8, 8)]
    assert sorted(path.name for path in (tmp_path / "frames").iterdir()) == ["large.frames", "small.frames"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].startswith("Cache: 10 decoded frames of 4x6 take 7.6e-07 GB in ")
    assert "1000000 decoded frames of 9999x9999 take 3e+05 GB, which is too much" in lines[2]
    assert list(make_caches("ram", {SIZE: (10, "small")})) == [SIZE]


@pytest.mark.parametrize(("kind", "remedy"), [("ram", "take cache=memmap"), ("memmap", "set DNNLIB_CACHE_DIR")])
def test_what_does_not_fit_is_refused_with_the_figures(tmp_path, monkeypatch, kind, remedy):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=rf"10000000 decoded frames of 9999x9999 take 3e\+06 GB, of .*{remedy}"):
        make_caches(kind, {(9999, 9999): (10**7, "vast")})
    assert not list(tmp_path.glob("frames/*"))
