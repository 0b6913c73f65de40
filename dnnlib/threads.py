"""How the threads of PyTorch's operators wait for each other on a CPU, chosen before PyTorch is imported.

The threads of OpenMP spin for milliseconds where one is done sooner than the others. That is fastest on free cores.
Where other processes use the cores, the spinning threads keep the one that is waited for from running: training was
several times slower (docs/performance.md). On free cores threads that sleep cost about a tenth.
"""

from __future__ import annotations

import os
import sys

import psutil

POLICY = "OMP_WAIT_POLICY"
# Environment variables with which the user decides; one thread waits for none.
CHOSEN = (POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
LOOK_SEC = 0.1
BUSY = 40.0  # percent of all cores, in use by others


def share_cores(busy: float | None = None) -> bool:
    """Let waiting threads sleep if other processes use the cores; return whether that was chosen now.

    To be called before PyTorch is imported, as OpenMP reads the environment once. `busy` is the share of the cores in
    use, in percent; it is looked up for a tenth of a second if not given.
    """
    if "torch" in sys.modules or os.environ.get("OMP_NUM_THREADS") == "1" or any(map(os.environ.get, CHOSEN)):
        return False
    if (psutil.cpu_percent(LOOK_SEC) if busy is None else busy) < BUSY:
        return False
    os.environ[POLICY] = "PASSIVE"
    return True
