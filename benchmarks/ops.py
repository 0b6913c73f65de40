"""Time the operators at every shape of the published networks, compared with other implementations and a plain copy.

The implementation that "auto" selects is compared with the literal composition, with banded matrices, and with a copy
of the same number of bytes.

python -m benchmarks.ops
python -m benchmarks.ops --device=cuda --dtype=float16
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import click
import torch

from benchmarks import harness, subjects
from torch_utils import host_memory
from torch_utils.ops import bias_act, conv2d_resample, filtered_lrelu, upfirdn2d

OPERATORS: dict[str, ModuleType] = {"filtered_lrelu": filtered_lrelu, "upfirdn2d": upfirdn2d, "bias_act": bias_act}
CALLED_IN = [*((module, name) for name, module in OPERATORS.items()), (conv2d_resample, "upfirdn2d")]
IMPLS = ("ref", "matmul", "auto")
LEAST_VALUES = 2**17  # of an input; smaller ones take only the call overhead
LEAST_BYTES = 2**25  # of an input on a GPU: smaller ones fit its cache, and do not measure its memory
TURN_SEC = 0.02
BOTH = "ms + backward"
COPIED_BYTES = 2**27  # size of the copy that measures the bandwidth

Operator = Callable[[torch.Tensor, str], torch.Tensor]

# Minimum speed-ups on a CPU with two threads: over the literal composition forward, forward and backward, and over
# banded matrices forward. Nothing may be slower than banded matrices.
CPU_BARS = {"filtered_lrelu": (12, 8, 3), "upfirdn2d": (5, 5, 1.5)}
# Minimum fraction of the bandwidth of a copy on a GPU, counting the bytes that must be read and written.
CUDA_BARS = {"bias_act": 0.85, "upfirdn2d": 0.70, "filtered_lrelu": 1 / 2.2}


@dataclass(frozen=True)
class Call:
    """A call of an operator by a network; tensors among the arguments are represented by their shapes."""

    operator: str
    shape: tuple[int, ...]
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    options: tuple[tuple[str, Any], ...]

    def is_identity(self) -> bool:
        """Return whether it is an activation that returns its input."""
        options = dict(self.options)
        plain = options.get("act") == "linear" and options.get("gain", 1) == 1 and "clamp" not in options
        return self.operator == "bias_act" and plain and not self.tensors

    def label(self) -> str:
        """Return a label, such as "upfirdn2d 12 taps, up 2"."""
        options = dict(self.options)
        tensors = dict(self.tensors)
        sizes = ["x".join(map(str, tensors[name])) for name in ("f", "fu", "fd") if name in tensors]
        parts = [
            f"{'/'.join(sizes)} taps" if sizes else "",
            str(options.get("act", "")),
            "bias" if "b" in tensors else "",
        ]
        for name in ("up", "down"):
            factor = options.get(name, 1)
            across, along = factor if isinstance(factor, tuple) else (factor, factor)
            if (across, along) != (1, 1):
                parts.append(f"{name} {along}" if across == along else f"{name} {along}x{across}")
        parts += ["clamp"] if self.operator == "bias_act" and "clamp" in options else []
        return f"{self.operator}: {', '.join(part for part in parts if part) or 'no filter'}"


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Record each call of an operator in the yielded list."""
    calls: list[Call] = []

    def recorder(name: str, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(function)
        def record(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            names = function.__code__.co_varnames[1 : 1 + len(args)]
            given = {**dict(zip(names, args, strict=True)), **kwargs}
            tensors = [(key, tuple(value.shape)) for key, value in given.items() if isinstance(value, torch.Tensor)]
            options = [
                (key, tuple(value) if isinstance(value, list) else round(value, 9) if key == "gain" else value)
                for key, value in given.items()
                if not isinstance(value, torch.Tensor) and value is not None and key != "impl"
            ]
            calls.append(Call(name, tuple(x.shape), tuple(tensors), tuple(options)))
            return function(x, *args, **kwargs)

        return record

    with ExitStack() as stack:
        for module, name in CALLED_IN:
            stack.enter_context(patch.object(module, name, recorder(name, getattr(module, name))))
        yield calls


def layer_calls(size: str) -> dict[Call, str]:
    """Return each distinct call of the networks of a preset, one clip at a time, with the networks that make it.

    The networks run on the meta device, which computes nothing.
    """
    found: dict[Call, list[str]] = {}
    for stage, short in ((subjects.LRES, "lres"), (subjects.SRES, "sres")):
        passes = subjects.passes(subjects.make_system(stage, size, "meta", batch=1))
        for network in "GD":
            with recorded() as calls:
                passes[f"{network} forward"]()
            for call in calls:
                if math.prod(call.shape) < LEAST_VALUES and size != "toy":
                    continue
                places = found.setdefault(call, [])
                places += [] if f"{short} {network}" in places else [f"{short} {network}"]
    return {call: ", ".join(places) for call, places in found.items()}


def prepare(
    call: Call, device: str, dtype: torch.dtype, quick: bool
) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
    """Return an input of the call's shape, with more clips on a GPU, and the operator as a function of it and of
    `impl`.
    """
    rng = torch.Generator().manual_seed(0)
    shape = [min(edge, 32) for edge in call.shape] if quick else list(call.shape)
    if device == "cuda" and not quick:
        shape[0] *= math.ceil(LEAST_BYTES / (math.prod(shape) * dtype.itemsize))
    x = torch.randn(shape, generator=rng).to(device, dtype)
    options: dict[str, Any] = {key: list(value) if isinstance(value, tuple) else value for key, value in call.options}
    tensors: dict[str, torch.Tensor] = {}
    for name, size in call.tensors:
        if name == "b":
            tensors[name] = torch.randn(shape[int(options.get("dim", 1))], generator=rng).to(device, dtype)
        else:  # all 2-D filters of the networks are separable
            taps = [torch.rand(length, generator=rng) + 0.1 for length in size]
            f = functools.reduce(torch.outer, [values / values.sum() for values in taps])
            tensors[name] = f.to(device)
    function = getattr(OPERATORS[call.operator], call.operator)
    return x, lambda x, impl: function(x, **tensors, **{**options, "impl": impl})


def run(operator: Operator, x: torch.Tensor, impl: str, backward: bool) -> None:
    """Run the operator's forward pass, and its backward pass on request."""
    y = operator(x, impl)
    if backward:
        torch.autograd.grad(y, x, y.detach())


def interleave_often(
    contestants: dict[str, Callable[[], object]], rounds: int, device: str, budget_sec: float
) -> harness.Times:
    """Run `harness.interleave` with as many calls per turn as fit into `TURN_SEC`.

    The first call after those of other contestants finds caches and threads cold, unlike in a network.
    """
    counts = {}
    for name, contestant in contestants.items():
        contestant()
        counts[name] = max(1, min(100, int(TURN_SEC / harness.seconds(contestant, device))))

    def repeat(name: str) -> None:
        for _ in range(counts[name]):
            contestants[name]()

    turns = {name: functools.partial(repeat, name) for name in contestants}
    times = harness.interleave(turns, rounds, device, budget_sec)
    return {name: [sec / counts[name] for sec in taken] for name, taken in times.items()}


def measure(
    operator: Operator, x: torch.Tensor, copied: torch.Tensor, device: str, rounds: int, budget_sec: float
) -> dict[str, float]:
    """Return the results of one shape, by column; "+ backward" is both passes."""
    figures: dict[str, float] = {}
    num_bytes = (x.numel() + operator(x, "auto").numel()) * x.element_size()
    for backward, what in ((False, ""), (True, " + backward")):
        x.requires_grad_(backward)
        contestants = {impl: functools.partial(run, operator, x, impl, backward) for impl in IMPLS}
        times = interleave_often({**contestants, "copy": copied.clone}, rounds, device, budget_sec)
        figures[f"ms{what}"] = 1e3 * harness.median(times["auto"])
        for rival in ("ref", "matmul"):
            figures[f"against {rival}{what}"] = harness.ratio(times, rival, "auto")
        if not backward:
            # Time of copying as many bytes as must be read and written, as a fraction of the measured time.
            figures["share of copy"] = harness.ratio(times, "copy", "auto") * num_bytes / (2 * copied.nbytes)
    return figures


def bars(device: str, rows: Sequence[tuple[Call, Mapping[str, float]]]) -> list[harness.Bar]:
    """Return the required speed of each operator: for the worst shape, and for all shapes with equal weight."""
    found = []

    def add(what: str, at_least: float, column: str, operators: Sequence[str], unit: str = "ms") -> None:
        chosen = [figures for call, figures in rows if call.operator in operators]
        if not chosen:
            return
        total = sum(figures[column] * figures[unit] for figures in chosen) / sum(figures[unit] for figures in chosen)
        found.append(harness.Bar(f"{what}, all {len(chosen)} shapes together", at_least, total))
        found.append(harness.Bar(f"{what}, the worst of them", at_least, min(figures[column] for figures in chosen)))

    if device == "cpu":
        for operator, (forward, both, matmul) in CPU_BARS.items():
            add(f"{operator} forward, against ref", forward, "against ref", [operator])
            add(f"{operator} forward + backward, against ref", both, "against ref + backward", [operator], BOTH)
            add(f"{operator} forward, against matmul", matmul, "against matmul", [operator])
        for operator in OPERATORS:
            add(f"{operator} forward + backward, against matmul", 1, "against matmul + backward", [operator], BOTH)
        add("bias_act forward, against matmul", 1, "against matmul", ["bias_act"])
    else:
        for operator, share in CUDA_BARS.items():
            add(f"{operator} forward, share of a copy's bandwidth", share, "share of copy", [operator])
    return found


@click.command()
@subjects.shape_options
@harness.options()
def main(
    size: str, dtype: str, budget: float, device: str, threads: int, rounds: int, quick: bool, json_path: Path | None
) -> None:
    """Print the times of each implementation, and the speed-up of the selected one over the others."""
    size, rounds = ("toy", 1) if quick else (size, rounds)
    report = harness.begin("ops", device, threads, size=size, dtype=dtype, rounds=rounds)
    kind = getattr(torch, dtype)
    copied = torch.zeros(COPIED_BYTES if not quick else 2**20, dtype=torch.uint8, device=device)
    rows: list[tuple[Call, dict[str, float]]] = []
    table = harness.Table("", [])
    for call, places in layer_calls(size).items():
        if call.is_identity():
            continue
        x, operator = prepare(call, device, kind, quick)
        with host_memory.kept() if device == "cpu" else nullcontext():
            figures = measure(operator, x, copied, device, rounds, budget)
        rows.append((call, figures))
        table.columns = ["operator", "input", "of", *figures]
        table.rows.append([call.label(), "x".join(map(str, x.shape)), places, *figures.values()])
    table.title = f"Operators in {dtype}: time of auto, and how many times as fast it is"
    if not quick:
        report.bars += bars(device, rows)
    if device == "cpu":
        table.note = "Memory that was freed is kept, by all alike, as in the commands: no pages are cleared in between."
    report.add(table)
    report.finish(json_path)


if __name__ == "__main__":
    main()
