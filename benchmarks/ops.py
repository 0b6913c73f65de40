"""Times the operators: banded matrices against the literal composition, as a table of ratios from one run.

python -m benchmarks.ops --threads 1
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import click
import torch

from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from torch_utils.ops.upfirdn2d import setup_filter, upfirdn2d

Operator = Callable[[torch.Tensor, str], torch.Tensor]


def make_cases() -> list[tuple[str, list[int], Operator]]:
    """Returns (name, input shape, function of the input and impl): layers and resamplers of the published networks."""
    taps_12 = torch.hann_window(14, periodic=False)[1:-1]
    taps_24 = torch.hann_window(26, periodic=False)[1:-1]
    taps_12, taps_24 = taps_12 / taps_12.sum(), taps_24 / taps_24.sum()
    short = setup_filter([1, 3, 3, 1])
    column = taps_24[:, None]

    def layer(fu: torch.Tensor, fd: torch.Tensor, up: int, down: int, pad: int) -> Operator:
        return lambda x, impl: filtered_lrelu(x, fu, fd, None, up, down, pad, clamp=256, impl=impl)

    def fir(f: torch.Tensor, **options: object) -> Operator:
        return lambda x, impl: upfirdn2d(x, f, impl=impl, **options)  # pyright: ignore[reportArgumentType]

    return [
        ("filtered_lrelu 12/12 taps, 2x / 2", [1, 512, 148, 92], layer(taps_12, taps_12, 2, 2, 10)),
        ("filtered_lrelu 24/12 taps, 4x / 2", [1, 512, 84, 52], layer(taps_24, taps_12, 4, 2, 16)),
        ("filtered_lrelu 12/12 taps, 2x / 2", [2, 128, 276, 164], layer(taps_12, taps_12, 2, 2, 10)),
        ("upfirdn2d 12 taps, 2x", [1, 128, 148, 92], fir(taps_12, up=2, padding=[6, 5, 6, 5], gain=4)),
        ("upfirdn2d 24 taps, / 4", [1, 64, 276, 164], fir(taps_24, down=4, padding=10)),
        ("upfirdn2d [1,3,3,1], / 2", [4, 128, 128, 128], fir(short, down=2, padding=1)),
        ("upfirdn2d [24, 1], 2x in time", [2, 512, 160, 1], fir(column, up=(1, 2), padding=[0, 0, 12, 11])),
        ("upfirdn2d [24, 1], 2x in time", [1, 256, 5000, 1], fir(column, up=(1, 2), padding=[0, 0, 12, 11])),
        ("upfirdn2d [24, 1], 2x in time", [1, 64, 64, 576], fir(column, up=(1, 2), padding=[0, 0, 12, 11])),
        ("bias_act lrelu, clamp", [2, 128, 276, 164], lambda x, impl: bias_act(x, None, 1, "lrelu", clamp=256)),
    ]


def measure(function: Callable[[], object], repeats: int) -> float:
    """Returns the median time of a call in milliseconds, after one call that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def run(operator: Operator, x: torch.Tensor, impl: str, backward: bool) -> None:
    y = operator(x, impl)
    if backward:
        torch.autograd.grad(y, x, y.detach())


@click.command()
@click.option("--threads", help="CPU threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--repeats", help="Timed calls, of which the median counts", type=click.IntRange(min=1), default=3)
def main(threads: int, repeats: int) -> None:
    """Print the times of both implementations on this machine's CPU, and how many times faster matmul is."""
    torch.set_num_threads(threads)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads, float32")
    print(f"{'operator':36s}{'input':>22s}{'':10s}{'ref ms':>10s}{'matmul ms':>11s}{'ratio':>7s}")
    for name, shape, operator in make_cases():
        for backward in (False, True):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_(backward)
            ref = measure(lambda: run(operator, x, "ref", backward), repeats)  # noqa: B023
            fast = measure(lambda: run(operator, x, "matmul", backward), repeats)  # noqa: B023
            direction = "fwd+bwd" if backward else "fwd"
            print(f"{name:36s}{str(tuple(shape)):>22s}  {direction:8s}{ref:10.1f}{fast:11.1f}{ref / fast:7.1f}")


if __name__ == "__main__":
    main()
