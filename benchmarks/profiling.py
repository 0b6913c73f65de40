"""Measure the time of a network by kind of work: convolutions, matrix products, filters, biases with activations,
other.

Operations are classified by name, and those inside an operator of `torch_utils.ops` by the calling operator: a profiler
range is recorded around each operator, and the autograd operations of a classified operation get the same kind.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.autograd.profiler import record_function

from torch_utils.ops import bias_act, conv2d_resample, filtered_lrelu, upfirdn2d
from training.longvideogan.lres.generator import TemporalEmbedding

KINDS = ("convolutions", "matrix products", "filters", "bias and activation", "other")
MARK = "kind: "
BACKWARD = "autograd::engine::evaluate_function"
NAMES = {  # part of an operation's name -> its kind; the first match counts
    "longtake::bias_act": "bias and activation",
    "longtake::": "filters",
    "fft": "filters",
    "conv": "convolutions",
    **dict.fromkeys(("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::matmul"), "matrix products"),
    **dict.fromkeys(("aten::linear", "aten::einsum", "aten::addbmm", "aten::addmv", "aten::mv"), "matrix products"),
}


def shares(function: Callable[[], object], device: torch.device | str = "cpu") -> dict[str, float]:
    """Return the fraction of each of KINDS in the time of a call; on CUDA in the time of its kernels."""
    cuda = torch.device(device).type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # suppresses messages at start and stop
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with marked_operators(), torch.profiler.profile(activities=activities) as profile, record_function("whole"):
        function()
    times: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for event, kind in classify(profile.events()):
        times[kind] += event.self_device_time_total if cuda else event.self_cpu_time_total
    total = sum(times.values())
    return {kind: time / total for kind, time in times.items()}


@contextlib.contextmanager
def marked_operators() -> Iterator[None]:
    """Record calls of the operators under their kind in profiles, within the block."""
    targets = [
        (filtered_lrelu, "filtered_lrelu", "filters"),
        (upfirdn2d, "upfirdn2d", "filters"),
        (conv2d_resample, "upfirdn2d", "filters"),
        (TemporalEmbedding, "forward", "filters"),
        (bias_act, "bias_act", "bias and activation"),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, kind in targets:
            stack.enter_context(mock.patch.object(owner, name, _marked(getattr(owner, name), kind)))
        yield


def _marked(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with record_function(MARK + kind):
            return function(*args, **kwargs)

    return wrapper


def classify(events: Any) -> Iterator[tuple[Any, str]]:
    """Yield each event with its kind, in the order of start times.

    An event with an unclassified name has the kind of its caller. Autograd numbers the operations of a thread, and
    records the number of the operation whose derivative it is about to evaluate.
    """
    found: dict[int, tuple[str, bool]] = {}  # event -> kind, and whether it was in a range
    marked: dict[tuple[int, int], str | None] = {}  # thread and number of an operation -> kind of its range
    for event in sorted(events, key=lambda event: (event.time_range.start, -event.time_range.end)):
        kind, is_marked = found.get(id(event.cpu_parent), ("other", False))
        if event.name.startswith(MARK) and not is_marked:
            kind, is_marked = event.name.removeprefix(MARK), True
        elif event.name.startswith(BACKWARD) and not is_marked:
            of = marked.get((event.fwd_thread, event.sequence_nr))
            kind, is_marked = (of, True) if of else (kind, False)
        elif not is_marked:
            kind = next((kind for part, kind in NAMES.items() if part in event.name.lower()), kind)
        found[id(event)] = kind, is_marked
        if event.sequence_nr >= 0 and not event.name.startswith(BACKWARD):
            marked[event.thread, event.sequence_nr] = kind if is_marked else None
        yield event, kind
