"""The cache of compiled operators."""

import multiprocessing
import os
import time

import pytest

from torch_utils.ops import binaries


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))


def test_a_binary_is_built_once_for_each_key():
    built = []

    def build(path):
        built.append(path)
        path.write_text("binary")

    first = binaries.cached_file("a.so", "one", build)
    assert binaries.cached_file("a.so", "one", build) == first != binaries.cached_file("a.so", "two", build)
    assert len(built) == 2 and first.read_text() == "binary" and first.suffix == ".so"
    assert sorted(os.listdir(first.parent)) == sorted(
        p.name for p in (first, binaries.cached_file("a.so", "two", build))
    )


def test_a_build_that_fails_leaves_nothing():
    def build(path):
        path.write_text("half")
        raise binaries.Unavailable("there is no compiler", "install one")

    for _ in range(2):
        with pytest.raises(binaries.Unavailable, match="there is no compiler; install one"):
            binaries.cached_file("a.so", "key", build)
    assert os.listdir(os.path.join(os.environ["DNNLIB_CACHE_DIR"], "kernels")) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(binaries.Unavailable, match="file/kernels, cannot be written .* set DNNLIB_CACHE_DIR"):
        binaries.cached_file("a.so", "key", build_slowly)


def build_slowly(path):
    path.write_text("bin")
    time.sleep(0.2)
    path.write_text("binary")


def race(queue):
    path = binaries.cached_file("a.so", "key", build_slowly)
    queue.put(path.read_text())


def test_processes_may_all_come_first():
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=race, args=(queue,)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=60) for _ in processes] == ["binary"] * 4
    for process in processes:
        process.join()
    assert len(os.listdir(os.path.join(os.environ["DNNLIB_CACHE_DIR"], "kernels"))) == 1
