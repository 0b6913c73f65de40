"""The cache of binaries and the doctor of the operators."""

import multiprocessing
import os
import subprocess
import sys
import time

import pytest

from torch_utils import custom_ops
from torch_utils.ops import doctor


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))


def test_a_binary_is_built_once_for_each_key():
    built = []

    def build(path):
        built.append(path)
        path.write_text("binary")

    first = custom_ops.cached_file("a.so", "one", build)
    assert custom_ops.cached_file("a.so", "one", build) == first != custom_ops.cached_file("a.so", "two", build)
    assert len(built) == 2 and first.read_text() == "binary" and first.suffix == ".so"
    assert sorted(os.listdir(first.parent)) == sorted(
        p.name for p in (first, custom_ops.cached_file("a.so", "two", build))
    )


def test_a_build_that_fails_leaves_nothing():
    def build(path):
        path.write_text("half")
        raise custom_ops.Unavailable("there is no compiler", "install one")

    for _ in range(2):
        with pytest.raises(custom_ops.Unavailable, match="there is no compiler; install one"):
            custom_ops.cached_file("a.so", "key", build)
    assert os.listdir(os.path.join(os.environ["DNNLIB_CACHE_DIR"], "kernels")) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(custom_ops.Unavailable, match="file/kernels, cannot be written .* set DNNLIB_CACHE_DIR"):
        custom_ops.cached_file("a.so", "key", build_slowly)


def build_slowly(path):
    path.write_text("bin")
    time.sleep(0.2)
    path.write_text("binary")


def race(queue):
    path = custom_ops.cached_file("a.so", "key", build_slowly)
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


def test_the_doctor_finds_operators_good(repo):
    done = subprocess.run(
        [sys.executable, "-m", "torch_utils.custom_ops"], cwd=repo, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": good") >= 3 and "cuda: " in done.stdout and done.stderr == ""


def test_the_doctor_finds_a_wrong_operator(monkeypatch, capsys):
    wrong = doctor.probes()
    right = wrong["upfirdn2d"]
    wrong["upfirdn2d"] = lambda x, b, f, impl: right(x, b, f, impl) * (1 if impl == "ref" else 1.001)
    monkeypatch.setattr(doctor, "probes", lambda: wrong)
    with pytest.raises(SystemExit, match="1"):
        custom_ops.main([])
    assert capsys.readouterr().out.count("WRONG: expected at most 1e-05") == 1
