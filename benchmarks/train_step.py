"""Time whole training steps of both stages: the reference in float32 compared with the fast path, and work besides
networks.

python -m benchmarks.train_step                                    toy size, on a CPU
python -m benchmarks.train_step --size default --device cuda       published size, in every precision
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click
import torch
from torch import Tensor

from benchmarks import harness, subjects
from torch_utils import distributed
from torch_utils.ops import backends
from torch_utils.precision import PRECISIONS, tf32
from training.longvideogan.gan import GAN
from training.optim import Report, make_adam

R1_INTERVAL = 16  # published number of steps between R1 updates
MIN_ROUNDS = 5  # for work of milliseconds
# One eighth of the published batches of 64 and 32, for one of eight GPUs; on a CPU the toy's own.
CUDA_BATCH = {subjects.LRES: 8, subjects.SRES: 4}
CPU_BATCH = {subjects.LRES: 4, subjects.SRES: 2}
# Minimum speed-up of the fastest variant over the reference on a GPU.
BARS = {subjects.LRES: 4.0, subjects.SRES: 3.0}


class Variant(NamedTuple):
    """Operators, and one of `torch_utils.precision`."""

    impl: str
    precision: str

    def __str__(self) -> str:
        return f"{self.impl}, {self.precision}"


REFERENCE = Variant("ref", "fp32")


def variants(system: GAN) -> list[Variant]:
    """Return the reference, then every precision that the stage and its device support."""
    found = []
    for precision in PRECISIONS:
        try:
            system.set_precision(precision)
        except ValueError:
            continue
        found.append(Variant("auto", precision))
    return [REFERENCE, *found]


def time_stage(report: harness.Report, stage: str, size: str, device: str, batch: int, rounds: int) -> None:
    """Add the table of one stage's steps, and on a GPU its bar."""
    system = subjects.make_system(stage, size, device, batch=batch)
    *batches, r1_batch = subjects.make_batches(system, 0)
    chosen = variants(system)
    steps: dict[str, Callable[[], object]] = {}
    for variant in chosen:
        steps[f"{variant}"] = functools.partial(step, system, batches, variant)
        steps[f"{variant}: R1"] = functools.partial(penalty, system, r1_batch, variant)
    times = harness.interleave(steps, rounds, device)
    for variant in chosen:
        pairs = zip(times[f"{variant}"], times[f"{variant}: R1"], strict=True)
        times[f"{variant}: mean"] = [plain + r1 / R1_INTERVAL for plain, r1 in pairs]
    table = harness.Table(
        f"{subjects.NAMES[stage].capitalize()}, {size}, batch {batch}: seconds",
        ["operators, precision", "step without R1", "R1 update", "mean step", "clips/s", "against the reference"],
        note=f"The mean step includes 1/{R1_INTERVAL} of an R1 update.",
    )
    gains = {variant: harness.ratio(times, f"{REFERENCE}: mean", f"{variant}: mean") for variant in chosen}
    for variant in chosen:
        plain, r1, mean = (harness.median(times[f"{variant}{part}"]) for part in ("", ": R1", ": mean"))
        table.rows.append([f"{variant}", plain, r1, mean, batch / mean, gains[variant]])
    report.add(table)
    if device == "cuda" and size == "default":
        name = f"{subjects.NAMES[stage]}, training step of {batch} clips, against the fp32 reference"
        report.bars.append(harness.Bar(name, BARS[stage], max(gains.values())))


def step(system: GAN, batches: list[dict[str, Tensor]], variant: Variant) -> None:
    """Take a step without R1."""
    system.set_precision(variant.precision)
    with backends.using(variant.impl):
        system.step(iter(batches), 1)


def penalty(system: GAN, batch: dict[str, Tensor], variant: Variant) -> None:
    """Run the R1 update."""
    system.set_precision(variant.precision)
    with backends.using(variant.impl), tf32(variant.precision == "tf32"):
        system.penalize_discriminator(batch, 0, Report())


def time_housekeeping(report: harness.Report, stage: str, size: str, device: str, rounds: int) -> None:
    """Add the work of a step besides networks, for the generator: fused over all tensors, compared with one by one."""
    system = subjects.make_system(stage, size, device, batch=1)
    parameters = list(system.G.parameters())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    loop = torch.optim.Adam(parameters, lr=1e-3, betas=(0.0, 0.99), foreach=False)
    fused = make_adam(system.G, 1e-3, (0.0, 0.99))

    @torch.no_grad()
    def average() -> None:
        for mean, parameter in zip(system.G_ema.parameters(), system.G.parameters(), strict=True):
            mean.copy_(parameter.lerp(mean, 0.999))
        for mean, buffer in zip(system.G_ema.buffers(), system.G.buffers(), strict=True):
            mean.copy_(buffer.lerp(mean, 0.999))

    @torch.no_grad()
    def replace() -> int:
        count = 0
        for parameter in parameters:
            assert parameter.grad is not None
            count += int((~parameter.grad.isfinite()).sum())
            parameter.grad.nan_to_num_(nan=0.0, posinf=1e5, neginf=-1e5)
        return count

    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "Adam": (loop.step, fused.step),
        "moving average": (average, lambda: system.update_average(1)),
        "non-finite gradients replaced": (replace, lambda: distributed.sync_grads(parameters)),
    }
    table = harness.Table(
        f"{subjects.NAMES[stage].capitalize()}, {size}: milliseconds besides networks",
        ["work", "tensor by tensor", "at once", "times as fast"],
        note=f"{len(parameters)} tensors of {sum(p.numel() for p in parameters) / 1e6:.3g} million numbers.",
    )
    for name, (plain, fast) in pairs.items():
        times = harness.interleave({"plain": plain, "fast": fast}, max(rounds, MIN_ROUNDS), device)
        medians = [1e3 * harness.median(times[key]) for key in ("plain", "fast")]
        table.rows.append([name, *medians, harness.ratio(times, "plain", "fast")])
    report.add(table)


@click.command()
@click.option(
    "--size",
    "sizes",
    help="Whose networks; repeatable",
    type=click.Choice(subjects.SIZES),
    multiple=True,
    default=["toy"],
    show_default=True,
)
@click.option("--batch", help="Clips per step, instead of the usual 8 and 4 on a GPU, 4 and 2 on a CPU", type=int)
@harness.options()
def main(
    sizes: tuple[str, ...],
    batch: int | None,
    device: str,
    threads: int,
    rounds: int,
    quick: bool,
    json_path: Path | None,
) -> None:
    """Print the times of steps, and their speed-up over the literal operators in float32."""
    sizes, rounds = (("toy",), 1) if quick else (sizes, rounds)
    report = harness.begin("train_step", device, threads, sizes=sizes, rounds=rounds)
    for size in sizes:
        for stage in subjects.NAMES:
            usual = CUDA_BATCH if device == "cuda" else CPU_BATCH
            time_stage(report, stage, size, device, batch or usual[stage], rounds)
    time_housekeeping(report, subjects.LRES, "toy" if quick else "default", device, rounds)
    report.finish(json_path)


if __name__ == "__main__":
    main()
