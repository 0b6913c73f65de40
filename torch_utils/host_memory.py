"""How the C library treats the memory that tensors of a CPU leave behind.

By default glibc gives every larger tensor pages fresh from the system and hands them back when it is freed: the next
tensor of the same size then waits for the system to clear the same pages again, which takes longer than many an
operator. Kept pages make a pass of the published networks 1.1 to 1.4 times as fast on a CPU (docs/performance.md), and
the process holds its peak until it ends.
"""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SWITCH = "TORCH_UTILS_KEEP_MEMORY"
# Whoever has chosen for the C library by these is obeyed.
CHOSEN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt, malloc.h
_LARGEST, _NEVER = 2**31 - 1, -1
_DEFAULT = 128 * 1024  # of both


def why_not(device: torch.device | str) -> str | None:
    """Why freed memory is not kept, as the end of a sentence; None if it may be."""
    if torch.device(device).type != "cpu":
        return f"is for CPUs, not for {torch.device(device).type}"
    if os.environ.get(SWITCH) == "0":
        return f"is turned off by {SWITCH}=0"
    for name in CHOSEN:
        if os.environ.get(name):
            return f"is left to {name}"
    if platform.libc_ver()[0] != "glibc":
        return "is for Linux with glibc"
    return None


def keep_freed(device: torch.device | str) -> bool:
    """Let this process keep freed memory from now on, where that is known to help; returns whether it does.

    Memory grows up to the peak of what is in use at once, and stays there.
    """
    return why_not(device) is None and _set(_LARGEST, _NEVER)


def describe(device: torch.device | str) -> str:
    """A line on whether commands keep freed memory here."""
    return f"keeping freed memory for reuse {why_not(device) or 'is on'}"


@contextmanager
def kept() -> Iterator[None]:
    """Keep freed memory inside, and as by default afterwards: for comparisons."""
    _set(_LARGEST, _NEVER)
    try:
        yield
    finally:
        _set(_DEFAULT, _DEFAULT)


def _set(mmap_threshold: int, trim_threshold: int) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return mallopt(_MMAP_THRESHOLD, mmap_threshold) == 1 and mallopt(_TRIM_THRESHOLD, trim_threshold) == 1
