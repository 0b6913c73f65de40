"""How many of PyTorch's threads make a frame of a steered video soonest, on a CPU.

A small network spends more time in waking threads than they save: one thread is then faster than two.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

LONG_SEC = 0.25  # for a frame, from which on all threads are worth it
TURNS, TIMED = 3, 2  # of each number of threads, and chunks of a turn after the first


@contextlib.contextmanager
def limited(count: int | None) -> Iterator[None]:
    """Let this thread's operators use `count` threads, None for as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def fastest(chunks: Iterator[Any]) -> int | None:
    """Return 1 where one thread makes the chunks of a rollout sooner than all threads, else None.

    Some chunks are made, in turns with one thread and with all. The first of a turn does not count, as layers may pack
    their weights for another number of threads then.
    """
    count = torch.get_num_threads()
    if count == 1:
        return None
    best: dict[int, float] = {}
    with contextlib.suppress(StopIteration):
        for _ in range(TURNS):
            for number in (1, count):
                with limited(number):
                    next(chunks)
                    for _ in range(TIMED):
                        start = time.perf_counter()
                        next(chunks)
                        sec = time.perf_counter() - start
                        best[number] = min(best.get(number, sec), sec)
                        if sec > LONG_SEC:
                            return None
    return 1 if len(best) == 2 and best[1] < best[count] else None
