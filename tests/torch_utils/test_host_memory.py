"""Freed memory is kept where it helps, unless the user has configured the allocator."""

import platform
import subprocess
import sys

import psutil
import pytest
import torch

from torch_utils import host_memory

on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another one")


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    for name in (host_memory.SWITCH, *host_memory.CHOSEN):
        monkeypatch.delenv(name, raising=False)


def resident_after_freeing() -> int:
    """Return bytes by which this process has grown once a tensor of 64 MiB has come and gone."""
    before = psutil.Process().memory_info().rss
    torch.ones(2**24)
    return psutil.Process().memory_info().rss - before


@on_glibc
@pytest.mark.parametrize("name", host_memory.CHOSEN)
def test_what_the_user_chose_for_the_c_library_stays(monkeypatch, name):
    assert host_memory.describe("cpu") == "keeping freed memory for reuse is on"
    monkeypatch.setenv(name, "1")
    assert host_memory.describe("cpu").endswith(f"is left to {name}") and not host_memory.keep_freed("cpu")


def test_it_can_be_turned_off_and_is_for_cpus(monkeypatch):
    assert host_memory.why_not("cuda:0") == "is for CPUs, not for cuda" and not host_memory.keep_freed("cuda")
    monkeypatch.setenv(host_memory.SWITCH, "0")
    assert "TORCH_UTILS_KEEP_MEMORY=0" in str(host_memory.why_not("cpu")) and not host_memory.keep_freed("cpu")


def fresh_process(*lines: str) -> list[str]:
    """Return what lines of code print in a process whose heap holds no free memory yet, as a test's process may."""
    code = "\n".join(("from tests.torch_utils.test_host_memory import host_memory, resident_after_freeing", *lines))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@on_glibc
def test_memory_is_kept_from_the_call_on():
    before, is_kept, after = fresh_process(
        "print(resident_after_freeing(), host_memory.keep_freed('cpu'), resident_after_freeing())"
    )
    assert int(before) < 2**25 < int(after) and is_kept == "True"


@on_glibc
def test_memory_is_kept_inside_the_block_and_handed_back_after_it():
    before, inside, after = fresh_process(
        "print(resident_after_freeing())",
        "with host_memory.kept(): print(resident_after_freeing())",
        "print(resident_after_freeing())",
    )
    assert int(before) < 2**25 < int(inside) and int(after) < 2**25


@on_glibc
def test_a_limit_returns_what_grew_beyond_the_first_pieces():
    lines = (
        "import torch, psutil",
        "host_memory.keep_freed('cpu')",
        "limit = host_memory.Limit()",
        "early = [limit.check() for _ in range(limit.PIECES + 1)]",  # the last has not grown
        "tensors = [torch.ones(2**24), torch.ones(2**10)]",
        "del tensors[0]",
        "grown = psutil.Process().memory_info().rss",
        "print(any(early), limit.check(), grown - psutil.Process().memory_info().rss, limit.check())",
    )
    early, trimmed, returned, again = fresh_process(*lines)
    assert (early, trimmed, again) == ("False", "True", "False") and int(returned) > 2**25


def test_a_limit_does_nothing_where_memory_is_not_kept(monkeypatch):
    monkeypatch.setenv(host_memory.SWITCH, "0")
    limit = host_memory.Limit()
    assert not limit.check() and limit.seen == 0
