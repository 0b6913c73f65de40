"""Keep freed memory of CPU tensors in the process, by parameters of the C library's allocator.

By default glibc maps new pages for every larger tensor and unmaps them when it is freed: the next tensor of the same
size then waits until the kernel has cleared pages again, which takes longer than many operators. Kept pages make a pass
of the published networks 1.1 to 1.4 times as fast on a CPU (docs/performance.md), and the memory use of the process
stays at its peak until it ends.
"""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from torch_utils.thread_cache import CHOSEN, SWITCH

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt, malloc.h
_LARGEST, _NEVER = 2**31 - 1, -1
_DEFAULT = 128 * 1024  # of both


def why_not(device: torch.device | str) -> str | None:
    """Return why freed memory is not kept, as the end of a sentence; None if it can be kept."""
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
    """Make this process keep freed memory from now on, where that is known to help; return whether it does.

    The memory use of the process grows to its peak and does not shrink.
    """
    return why_not(device) is None and _set(_LARGEST, _NEVER)


def describe(device: torch.device | str) -> str:
    """Return one line that says whether commands keep freed memory on `device`, and why not."""
    return f"keeping freed memory for reuse {why_not(device) or 'is on'}"


@contextmanager
def kept() -> Iterator[None]:
    """Keep freed memory while the block runs and restore the default afterwards; for comparisons."""
    _set(_LARGEST, _NEVER)
    try:
        yield
    finally:
        _set(_DEFAULT, _DEFAULT)


class Limit:
    """A bound for a process that keeps freed memory: the size that it has after its first pieces of work.

    Freed memory lies between tensors in use, and the heap grows where no gap is large enough. `check`, called after
    each piece of work, returns free memory to the system when that growth exceeds `GROWTH`.
    """

    PIECES = 8  # that determine the size
    GROWTH = 1.02

    def __init__(self) -> None:
        self.seen, self.size = 0, 0

    def check(self) -> bool:
        """Return whether memory was returned to the system; does nothing where freed memory is not kept."""
        if why_not("cpu") is not None:
            return False
        resident = _resident()
        self.seen += 1
        if self.seen <= self.PIECES:
            self.size = max(self.size, resident)
            return False
        if resident <= self.GROWTH * self.size:
            return False
        return bool(ctypes.CDLL(None).malloc_trim(0))


def _resident() -> int:
    """Return the resident bytes of this process, on Linux."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _set(mmap_threshold: int, trim_threshold: int) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return mallopt(_MMAP_THRESHOLD, mmap_threshold) == 1 and mallopt(_TRIM_THRESHOLD, trim_threshold) == 1
