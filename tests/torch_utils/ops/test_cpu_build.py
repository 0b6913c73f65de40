"""The library of CPU kernels is built once by the first process, and a failure is reported in one sentence."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from torch_utils.ops.binaries import Unavailable
from torch_utils.ops.cpu import kernels as cpu_kernels

USE = """
import torch
from torch_utils.ops.cpu import kernels as cpu_kernels
from torch_utils.ops.upfirdn2d import upfirdn2d
x, f = torch.linspace(0, 1, 640).reshape(2, 5, 8, 8), torch.linspace(-1, 2, 12)
y = upfirdn2d(x, f, up=2, padding=6, impl="cpu")
torch.testing.assert_close(y, upfirdn2d(x, f, up=2, padding=6, impl="ref"), rtol=1e-4, atol=1e-4)
print(cpu_kernels.describe()["library"])
"""


@pytest.fixture
def quick_compiler(tmp_path):
    """Return a compiler that notes each call, and does not optimise: the tests here build often."""
    script = tmp_path / "compiler"
    script.write_text(
        f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n'
        f'case "$*" in *" -c "*) [ -e {tmp_path}/hang ] && sleep 60;; esac\nexec c++ "$@" -O0\n'
    )
    script.chmod(0o755)
    return script


def start(tmp_path, compiler):
    environment = {
        **os.environ,
        "CXX": str(compiler),
        "DNNLIB_CACHE_DIR": str(tmp_path / "cache"),
        "TORCH_UTILS_OPS_ISA": "plain",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", USE]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)


def finish(process):
    output, _ = process.communicate(timeout=250)
    assert process.returncode == 0
    return output.strip()


def compiled(tmp_path):
    return sum("-c" in line.split() for line in (tmp_path / "calls").read_text().splitlines())


def test_every_source_is_part_of_the_key_of_the_library():
    files = {path.name for path in cpu_kernels.FOLDER.iterdir() if path.suffix in (".cpp", ".h")}
    assert files == {*cpu_kernels.SOURCES, *cpu_kernels.HEADERS}


def test_four_processes_may_be_first_at_once(tmp_path, quick_compiler):
    libraries = [finish(process) for process in [start(tmp_path, quick_compiler) for _ in range(4)]]
    assert len(set(libraries)) == 1
    assert [path.name for path in (tmp_path / "cache" / "kernels").iterdir()] == [os.path.basename(libraries[0])]
    before = compiled(tmp_path)
    assert finish(start(tmp_path, quick_compiler)) == libraries[0]
    assert compiled(tmp_path) == before > 0


def test_a_killed_build_blocks_no_other(tmp_path, quick_compiler):
    (tmp_path / "hang").touch()
    process = start(tmp_path, quick_compiler)
    deadline = time.monotonic() + 120
    while not ((tmp_path / "calls").exists() and compiled(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert compiled(tmp_path)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    (tmp_path / "hang").unlink()
    (left,) = (tmp_path / "cache" / "kernels").glob(".build-*")
    assert os.path.exists(finish(start(tmp_path, quick_compiler)))
    assert left.exists()  # it might still be at work
    week_ago = time.time() - 7 * 24 * 3600
    os.utime(left, (week_ago, week_ago))
    cpu_kernels.remove_old_builds(left.parent)
    assert not left.exists()


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """This process as if it had never loaded the library, with an empty cache."""
    monkeypatch.setattr(cpu_kernels, "_library", None)
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    for cached in (cpu_kernels._open, cpu_kernels.find_compiler):
        cached.cache_clear()
    yield monkeypatch
    for cached in (cpu_kernels._open, cpu_kernels.find_compiler):
        cached.cache_clear()


def test_a_missing_compiler_is_reported(fresh):
    fresh.setenv("CXX", "no-such-compiler")
    with pytest.raises(Unavailable, match="no working C.. compiler 'no-such-compiler'; install one"):
        cpu_kernels.load()
    assert "no-such-compiler" in cpu_kernels.describe()["problem"]


def test_a_missing_ninja_is_reported(fresh, tmp_path):
    fresh.setenv("CXX", shutil.which("c++"))
    fresh.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="ninja is not found; install it .pip install ninja."):
        cpu_kernels.load()


def test_a_failing_compiler_is_reported(fresh, tmp_path):
    script = tmp_path / "broken"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit\necho "error: out of ideas" >&2\nexit 1\n'
    )
    script.chmod(0o755)
    fresh.setenv("CXX", str(script))
    with pytest.raises(Unavailable, match="broken 1.0 could not compile the CPU kernels .*error: out of ideas"):
        cpu_kernels.load()
    assert not any((tmp_path / "cache" / "kernels").iterdir())


def test_a_folder_that_cannot_be_written_is_reported(fresh, tmp_path):
    (tmp_path / "file").touch()
    fresh.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(Unavailable, match="cannot be written.*set DNNLIB_CACHE_DIR"):
        cpu_kernels.load()


def test_an_unknown_instruction_set_is_refused(fresh):
    fresh.setenv("TORCH_UTILS_OPS_ISA", "mmx")
    with pytest.raises(ValueError, match="unknown instruction set 'mmx'"):
        cpu_kernels.load()
