"""Time every convolution of the published networks in both memory layouts, contiguous and channels last.

python -m benchmarks.layouts
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import click
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import harness, subjects

LAYOUTS = ("contiguous", "channels last", "converted")  # the last: contiguous outside, channels last inside
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
Convolution = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


class Convolutions(TorchDispatchMode):
    """Count the convolutions of images and clips: shapes of input and weights, stride, padding, groups."""

    def __init__(self):
        super().__init__()
        self.found: Counter[Convolution] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and args[0].ndim in LAST:
            x, weight, _, stride, padding, _, _, _, groups = args
            self.found[tuple(x.shape), tuple(weight.shape), tuple(stride), tuple(padding), groups] += 1
        return func(*args, **(kwargs or {}))


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    groups: int,
    convert: bool,
    grad: bool,
) -> None:
    """Compute one convolution, with both gradients on request."""
    function = torch.nn.functional.conv2d if x.ndim == 4 else torch.nn.functional.conv3d
    with torch.set_grad_enabled(grad):
        inner = x.to(memory_format=LAST[x.ndim]) if convert else x
        y = function(inner, weight, None, list(stride), list(padding), 1, groups)
        y = y.contiguous() if convert else y
        if grad:
            torch.autograd.grad(y, (x, weight), y.detach())


@click.command()
@subjects.shape_options
@harness.options()
def main(
    size: str, dtype: str, budget: float, device: str, threads: int, rounds: int, quick: bool, json_path: Path | None
) -> None:
    """Print the total time of a network's convolutions in either layout, one clip at a time."""
    size, rounds = ("toy", 1) if quick else (size, rounds)
    report = harness.begin("layouts", device, threads, size=size, dtype=dtype, rounds=rounds)
    table = harness.Table(
        f"Convolutions of a pass in {dtype}: seconds in each layout",
        ["network", "pass", "convolutions", *LAYOUTS, "contiguous / last", "contiguous / converted"],
    )
    for stage, name in subjects.NAMES.items():
        passes = subjects.passes(subjects.make_system(stage, size, "meta", batch=1))
        for network in "GD":
            with Convolutions() as convolutions:
                passes[f"{network} forward"]()
            for grad in (False, True):
                sums = dict.fromkeys(LAYOUTS, 0.0)
                for (shape, weights, *rest), count in convolutions.found.items():
                    contestants = {}
                    for layout in LAYOUTS:
                        x = torch.randn(shape, device=device, dtype=getattr(torch, dtype))
                        weight = torch.randn(weights, device=device, dtype=x.dtype) / math.sqrt(math.prod(weights[1:]))
                        x = x.to(memory_format=LAST[x.ndim]) if layout == "channels last" else x
                        weight = weight if layout == "contiguous" else weight.to(memory_format=LAST[x.ndim])
                        tensors = [tensor.requires_grad_(grad) for tensor in (x, weight)]
                        contestants[layout] = functools.partial(convolve, *tensors, *rest, layout == "converted", grad)
                    times = harness.interleave(contestants, rounds, device, budget)
                    for layout in LAYOUTS:
                        sums[layout] += count * harness.median(times[layout])
                direction = "forward + backward" if grad else "forward"
                ratios = [sums["contiguous"] / sums[layout] for layout in LAYOUTS[1:]]
                total = convolutions.found.total()
                table.rows.append([f"{name} {network}", direction, total, *sums.values(), *ratios])
    report.add(table)
    report.finish(json_path)


if __name__ == "__main__":
    main()
