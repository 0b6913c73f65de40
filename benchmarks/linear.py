"""Time linear layers on a CPU: by torch, by `training.modules.linear` in training, and packed for inference.

python -m benchmarks.linear
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import click
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import harness
from torch_utils.precision import cpu_has_bf16
from training.modules.linear import linear, pack_linears

SHAPES = ((1024, 4096), (1024, 1024), (512, 512), (128, 512))  # inputs and outputs
ROWS = (1, 4, 64, 1024)


def contestants(rows: int, width: int, outputs: int) -> dict[str, Callable[[], object]]:
    """Return the ways to multiply `rows` vectors by one layer, by name; "torch" is the reference."""
    layer, x = torch.nn.Linear(width, outputs), torch.randn(rows, width)
    packed = pack_linears(torch.nn.Sequential(layer))
    calls: dict[str, Callable[[], object]] = {"torch": lambda: layer(x), "packed": lambda: packed(x)}
    if cpu_has_bf16():
        half, packed_half = x.bfloat16(), pack_linears(torch.nn.Sequential(layer), torch.bfloat16)
        calls["packed bf16"] = lambda: packed_half(half)
    return calls


def trained(rows: int, width: int, outputs: int) -> dict[str, Callable[[], object]]:
    """Return a training step of one layer by torch and by `linear`."""
    x, weight = torch.randn(rows, width, requires_grad=True), torch.randn(outputs, width, requires_grad=True)
    dy = torch.randn(rows, outputs)

    def step(function: Callable[[Tensor, Tensor], Tensor]) -> object:
        return torch.autograd.grad(function(x, weight), (x, weight), dy)

    return {"torch": lambda: step(F.linear), "trained": lambda: step(linear)}


def print_row(
    rows: int, width: int, outputs: int, calls: dict[str, Callable[[], object]], rounds: int, products: int = 1
) -> None:
    """Time the calls in turns and print how many times as fast as torch each of the others is."""
    times = harness.interleave(calls, rounds, clock=time.process_time)
    rate = 2e-9 * products * rows * width * outputs / max(statistics.median(times["torch"]), 1e-9)
    ratios = {
        name: statistics.median(a / b for a, b in zip(times["torch"], times[name], strict=True) if b > 0)
        for name in list(calls)[1:]
    }
    text = ", ".join(f"{name} {value:.2f}" for name, value in ratios.items())
    click.echo(f"{rows} rows, {width} to {outputs}: torch {rate:.0f} GFLOP/s; times as fast: {text}")


@click.command(help=__doc__)
@click.option("--rounds", default=25, show_default=True, help="Measurements of each, in turns")
@click.option("--threads", default=1, show_default=True, help="Threads of torch")
def main(rounds: int, threads: int) -> None:
    """Print one line for each shape and number of rows."""
    torch.set_num_threads(threads)
    for width, outputs in SHAPES:
        with torch.no_grad():
            for rows in ROWS:
                print_row(rows, width, outputs, contestants(rows, width, outputs), rounds)
        print_row(ROWS[-1], width, outputs, trained(ROWS[-1], width, outputs), rounds, products=3)


if __name__ == "__main__":
    main()
