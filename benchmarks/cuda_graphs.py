"""Time evaluations of the networks that make a frame from noise, with CUDA graphs and without.

python -m benchmarks.cuda_graphs --device=cuda

On a CPU there are no graphs, and both columns are of the same calls.
"""

from __future__ import annotations

import functools
from pathlib import Path

import click
import torch
from torch import nn

from benchmarks import harness
from torch_utils.cuda_graphs import replayed
from torch_utils.precision import set_precision, why_not
from training.river import networks as river
from training.world import networks as world

CALLS = 8  # evaluations in a measurement
BATCHES = (1, 16)


def make_river(batch: int, device: str, quick: bool = False) -> tuple[nn.Module, list[torch.Tensor]]:
    """Return RIVER's published field of 64x64, or with `quick` a narrow one, and arguments."""
    field = river.VectorField(4, (8, 8), 64 if quick else 768).to(device)
    x, reference, condition = torch.randn(3, batch, 4, 8, 8, device=device)
    distances, t = torch.full((batch,), 3, device=device), torch.full((batch,), 0.4, device=device)
    return field, [x, reference, condition, distances, t]


def make_world(batch: int, device: str, quick: bool = False) -> tuple[nn.Module, list[torch.Tensor]]:
    """Return a world model of the included one's size, and arguments."""
    del quick  # it is small
    network = world.WorldModel(8, (6, 8), 192, heads=6, num_actions=9, skip=True).to(device)
    x, seen = torch.randn(batch, 8, 6, 8, device=device), torch.randn(batch, network.slots, 8, 6, 8, device=device)
    geometry = torch.randn(batch, network.slots, world.GEOMETRY, device=device)
    actions = torch.zeros(batch, network.history, dtype=torch.int64, device=device)
    level = torch.full((batch,), 0.05, device=device)
    return network, [x, level + 0.4, seen, geometry, level, actions, actions == 0]


NETWORKS = {"RIVER, 64x64": (make_river, river.prepare), "world, 48x64": (make_world, world.prepare)}


def evaluate(network: nn.Module, arguments: list[torch.Tensor]) -> None:
    for _ in range(CALLS):
        network(*arguments)


@click.command(help=str(__doc__).replace("\npython", "\n\n\b\npython", 1))
@harness.options()
@torch.no_grad()
def main(device: str, threads: int, rounds: int, quick: bool, json_path: Path | None) -> None:
    rounds = 1 if quick else rounds
    report = harness.begin("cuda_graphs", device, threads, rounds=rounds)
    table = harness.Table(
        "Milliseconds of an evaluation", ["network", "batch", "precision", "without", "with graphs", "times as fast"]
    )
    for name, (make, copied) in NETWORKS.items():
        for batch in BATCHES[: 1 if quick else None]:
            for precision in ("fp32", *([] if why_not("bf16", device) else ["bf16"])):
                torch.manual_seed(0)
                network, arguments = make(batch, device, quick)
                set_precision([network], precision)
                plain = copied(network)
                calls = {
                    "without": functools.partial(evaluate, plain, arguments),
                    "with": functools.partial(evaluate, replayed(plain), arguments),
                }
                times = harness.interleave(calls, rounds, device)
                shown = [1000 * harness.median(times[way]) / CALLS for way in calls]
                table.rows.append([name, str(batch), precision, *shown, harness.ratio(times, "without", "with")])
    report.add(table)
    report.finish(json_path)


if __name__ == "__main__":
    main()
