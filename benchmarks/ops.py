"""Times the operators at every shape the published networks have: what is chosen against the literal composition,
against banded matrices, and against a plain copy of the same bytes.

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
LEAST_VALUES = 2**17  # of an input; smaller ones take as long as a call does
LEAST_BYTES = 2**25  # of an input on a GPU: smaller ones stay in its cache, and say nothing of its memory
TURN_SEC = 0.02
BOTH = "ms + backward"
COPIED_BYTES = 2**27  # whose copy tells the bandwidth

Operator = Callable[[torch.Tensor, str], torch.Tensor]

# Least speed-ups on a CPU with two threads: over the literal composition forward, forward and backward, and over
# banded matrices forward. Nothing may be slower than banded matrices.
CPU_BARS = {"filtered_lrelu": (12, 8, 3), "upfirdn2d": (5, 5, 1.5)}
# Least share of the bandwidth of a copy on a GPU, counting what must be read and written.
CUDA_BARS = {"bias_act": 0.85, "upfirdn2d": 0.70, "filtered_lrelu": 1 / 2.2}


@dataclass(frozen=True)
class Call:
    """An operator as a network calls it; tensors among the arguments are told by their shapes."""

    operator: str
    shape: tuple[int, ...]
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    options: tuple[tuple[str, Any], ...]

    def is_identity(self) -> bool:
        """True of an activation that returns what it gets."""
        options = dict(self.options)
        plain = options.get("act") == "linear" and options.get("gain", 1) == 1 and "clamp" not in options
        return self.operator == "bias_act" and plain and not self.tensors

    def label(self) -> str:
        """What it does, such as "upfirdn2d 12 taps, up 2"."""
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
    """While open, the list grows by each call of an operator."""
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
    """Each distinct call of the networks of a preset, one clip at a time, with the networks that make it.

    The networks run on the meta device, where nothing is computed.
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
    """An input of the call's shape, of more clips on a GPU, and the operator as a function of it and of `impl`."""
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
        else:  # all filters of the networks that have two dimensions are products of two that have one
            taps = [torch.rand(length, generator=rng) + 0.1 for length in size]
            f = functools.reduce(torch.outer, [values / values.sum() for values in taps])
            tensors[name] = f.to(device)
    function = getattr(OPERATORS[call.operator], call.operator)
    return x, lambda x, impl: function(x, **tensors, **{**options, "impl": impl})


def run(operator: Operator, x: torch.Tensor, impl: str, backward: bool) -> None:
    """The operator's forward pass, and its backward pass on demand."""
    y = operator(x, impl)
    if backward:
        torch.autograd.grad(y, x, y.detach())


def interleave_often(
    contestants: dict[str, Callable[[], object]], rounds: int, device: str, budget_sec: float
) -> harness.Times:
    """`harness.interleave`, but in its turn each contestant is called as often as fits into `TURN_SEC`: the first call
    after others have had their turn finds caches and threads cold, as in a network it would not."""
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
    """The figures of one shape, by column; "+ backward" is both passes."""
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
            # What a copy of as many bytes as must be read and written would take, of what was taken.
            figures["share of copy"] = harness.ratio(times, "copy", "auto") * num_bytes / (2 * copied.nbytes)
    return figures


def bars(device: str, rows: Sequence[tuple[Call, Mapping[str, float]]]) -> list[harness.Bar]:
    """What each operator should reach: the worst shape, and all shapes together, each as often as any other."""
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
    """Print what each implementation takes, and how many times as fast as the others the one that is chosen is."""
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
