"""Convolutions on a CPU: PyTorch's compared with the way that torch_utils/ops/convolution.py takes, in training.

python -m benchmarks.convolution                 every 3x3 and 1x1 convolution of LongVideoGAN at published size
python -m benchmarks.convolution --size toy
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch.nn import functional as F

from benchmarks import harness, subjects
from benchmarks.layouts import Convolutions
from torch_utils import host_memory
from torch_utils.ops import convolution


def shapes(stage: str, size: str) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Return the shapes of input and weight, and the padding, of convolutions without stride or groups."""
    passes = subjects.passes(subjects.make_system(stage, size, "meta", batch=1))
    with Convolutions() as found:
        for network in "GD":
            passes[f"{network} forward"]()
    plain = [key for key in found.found if set(key[2]) == {1} and key[4] == 1]
    return [(shape, weight, padding) for shape, weight, _, padding, _ in plain]


def contestants(shape: tuple[int, ...], weights: tuple[int, ...], padding: tuple[int, ...]) -> dict[str, Any]:
    """Return the forward pass and both gradients of a convolution by PyTorch and as chosen."""
    x = torch.randn(shape, requires_grad=True)
    weight = (torch.randn(weights) / math.sqrt(math.prod(weights[1:]))).requires_grad_(True)
    torchs, chosen = (F.conv2d, convolution.conv2d) if len(shape) == 4 else (F.conv3d, convolution.conv3d)

    def step(function: Any) -> object:
        y = function(x, weight, padding=padding)
        return torch.autograd.grad(y, (x, weight), y.detach())

    return {"torch": lambda: step(torchs), "chosen": lambda: step(chosen)}


@click.command(help=__doc__)
@click.option("--size", help="Whose networks", type=click.Choice(subjects.SIZES), default="default", show_default=True)
@harness.options(threads=1, device=False)
def main(size: str, rounds: int, threads: int, quick: bool, json_path: Path | None) -> None:
    """Print the CPU seconds of each shape, forward and backward."""
    size, rounds = ("toy", 1) if quick else (size, rounds)
    report = harness.begin("convolution", "cpu", threads, size=size, rounds=rounds)
    host_memory.keep_freed("cpu")
    for stage, name in subjects.NAMES.items():
        table = harness.Table(
            f"Convolutions of {name}, {size}, forward + backward: CPU seconds",
            ["input", "weight", "torch", "chosen", "times as fast"],
        )
        for shape, weights, padding in shapes(stage, size):
            times = harness.interleave(contestants(shape, weights, padding), rounds, clock=time.process_time)
            medians = [harness.median(times[way]) for way in ("torch", "chosen")]
            texts = ["x".join(map(str, sizes)) for sizes in (shape, weights)]
            table.rows.append([*texts, *medians, harness.ratio(times, "torch", "chosen")])
        report.add(table)
    report.finish(json_path)


if __name__ == "__main__":
    main()
