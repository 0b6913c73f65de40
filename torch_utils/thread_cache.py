"""Run a command without glibc's caches of freed small blocks. Imports no torch: it is called before all else.

For each thread and each small size glibc keeps up to seven freed blocks without joining them to free memory beside
them. PyTorch's tensors leave such blocks at their edges, so that a tensor often does not fit where one of its size was
before, and the heap of a long video grows by a tenth; without the caches it stays within a hundredth (docs/LOG.md).
They can only be turned off by the environment of a new program.
"""

import os
import sys

SWITCH = "TORCH_UTILS_KEEP_MEMORY"
# Environment variables with which the user configures the allocator; if one is set, it is not changed.
CHOSEN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")
RESTARTED = "TORCH_UTILS_RESTARTED"
WITHOUT = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0", RESTARTED: "1"}  # environment of the new program


def restart_without() -> None:
    """Replace this program by itself, in the same process, without the caches; return in the new one.

    To be called by a script before it imports anything large. Returns at once where the C library is another, the user
    has configured it, or the script is not what the process was started with, as in a notebook.
    """
    if os.environ.pop(RESTARTED, None) is not None:
        os.environ.pop("GLIBC_TUNABLES", None)  # programs started from here have the caches
        return
    if not _is_glibc() or os.environ.get(SWITCH) == "0" or any(map(os.environ.get, CHOSEN)):
        return
    if not sys.executable or sys.argv[0] not in sys.orig_argv[1:]:
        return
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **WITHOUT})
    except OSError:
        return  # it costs memory only


def _is_glibc() -> bool:
    try:
        return str(os.confstr("CS_GNU_LIBC_VERSION")).startswith("glibc")
    except (AttributeError, ValueError, OSError):
        return False
