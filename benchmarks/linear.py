"""Time linear layers and small convolutions on a CPU: by torch, by `training.modules`, and packed for inference.

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
from training.modules.packed_conv import pack_convolutions

SHAPES = ((1024, 4096), (1024, 1024), (512, 512), (128, 512))  # inputs and outputs
ROWS = (1, 4, 64, 1024)
# Images, inputs, outputs, height and width: of the included world model and of its decoder, one stream and sixteen.
IMAGES = tuple(
    (count, *shape)
    for count in (1, 16)
    for shape in ((192, 384, 6, 8), (128, 384, 6, 8), (96, 96, 12, 16), (32, 32, 24, 32))
)


def contestants(
    layer: torch.nn.Module, x: Tensor, pack: Callable[[torch.nn.Module, torch.dtype], torch.nn.Module]
) -> dict[str, Callable[[], object]]:
    """Return the ways to apply one layer to x, by name, where `pack` packs weights; "torch" is the reference."""
    packed = pack(torch.nn.Sequential(layer), torch.float32)
    calls: dict[str, Callable[[], object]] = {"torch": lambda: layer(x), "packed": lambda: packed(x)}
    if cpu_has_bf16():
        half, packed_half = x.bfloat16(), pack(torch.nn.Sequential(layer), torch.bfloat16)
        calls["packed bf16"] = lambda: packed_half(half)
    return calls


def trained(rows: int, width: int, outputs: int) -> dict[str, Callable[[], object]]:
    """Return a training step of one layer by torch and by `linear`."""
    x, weight = torch.randn(rows, width, requires_grad=True), torch.randn(outputs, width, requires_grad=True)
    dy = torch.randn(rows, outputs)

    def step(function: Callable[[Tensor, Tensor], Tensor]) -> object:
        return torch.autograd.grad(function(x, weight), (x, weight), dy)

    return {"torch": lambda: step(F.linear), "trained": lambda: step(linear)}


def print_row(name: str, multiplications: int, calls: dict[str, Callable[[], object]], rounds: int) -> None:
    """Time the calls in turns and print how many times as fast as torch each of the others is."""
    times = harness.interleave(calls, rounds, clock=time.process_time)
    rate = 2e-9 * multiplications / max(statistics.median(times["torch"]), 1e-9)
    ratios = {
        name: statistics.median(a / b for a, b in zip(times["torch"], times[name], strict=True) if b > 0)
        for name in list(calls)[1:]
    }
    text = ", ".join(f"{name} {value:.2f}" for name, value in ratios.items())
    click.echo(f"{name}: torch {rate:.0f} GFLOP/s; times as fast: {text}")


@click.command(help=__doc__)
@click.option("--rounds", default=25, show_default=True, help="Measurements of each, in turns")
@click.option("--threads", default=1, show_default=True, help="Threads of torch")
def main(rounds: int, threads: int) -> None:
    """Print one line for each shape and number of rows or images."""
    torch.set_num_threads(threads)
    for width, outputs in SHAPES:
        layer, size = f"{width} to {outputs}", width * outputs
        with torch.no_grad():
            for rows in ROWS:
                calls = contestants(torch.nn.Linear(width, outputs), torch.randn(rows, width), pack_linears)
                print_row(f"{rows} rows, {layer}", rows * size, calls, rounds)
        print_row(f"{ROWS[-1]} rows, {layer}, trained", 3 * ROWS[-1] * size, trained(ROWS[-1], width, outputs), rounds)
    with torch.no_grad():
        for count, inputs, outputs, height, width in IMAGES:
            name = f"{count} of {inputs} to {outputs} channels, {height}x{width}"
            products = 9 * count * inputs * outputs * height * width
            conv, x = torch.nn.Conv2d(inputs, outputs, 3, padding=1), torch.randn(count, inputs, height, width)
            print_row(name, products, contestants(conv, x, pack_convolutions), rounds)


if __name__ == "__main__":
    main()
