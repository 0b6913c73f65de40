"""Time training steps and generation with and without --compile, alternating, and the time of compilation.

python -m benchmarks.compilation                                   toy size, on a CPU
python -m benchmarks.compilation --size default --device cuda      published size
"""

from __future__ import annotations

import functools
import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import torch

from benchmarks import harness, subjects
from benchmarks.train_step import CPU_BATCH, CUDA_BATCH
from torch_utils import compilation
from training.longvideogan.gan import GAN
from training.longvideogan.sampling import LRES_CHUNK, SRES_CHUNK
from training.sampling import Prompt, Request, Sampler

PIECES = {subjects.LRES: 4, subjects.SRES: 3}  # chunks of a video; the first low-resolution one is larger internally


def train_step(system: GAN, batches: list[dict[str, torch.Tensor]], compiles: bool) -> None:
    """Take a step without R1."""
    system.compiling = compiles
    system.step(iter(batches), 1)


def generate(source: Sampler, num_frames: int, clip: torch.Tensor | None, compiles: bool) -> None:
    """Generate a video of `num_frames`; super-resolution enlarges the frames of `clip`."""
    prompt = Prompt() if clip is None else subjects.RepeatedPrompt(clip)
    with compilation.compiled(compiles):
        for chunk in source.frames(Request([0], 0, num_frames, prompt)):
            chunk["video"].cpu()


def work(stage: str, size: str, device: str) -> dict[str, Callable[[bool], None]]:
    """Return the timed functions of a stage: name -> function of whether it is compiled."""
    usual = CUDA_BATCH if device == "cuda" else CPU_BATCH
    system = subjects.make_system(stage, size, device, batch=usual[stage])
    batches = subjects.make_batches(system, 1)
    generator = subjects.make_generator(stage, size, device)
    if stage == subjects.LRES:
        source, num_frames, clip = subjects.make_sampler(generator), PIECES[stage] * LRES_CHUNK, None
    else:
        source, num_frames = subjects.make_sampler(generator), PIECES[stage] * SRES_CHUNK
        clip = batches[0]["lres"][:1].repeat(1, 1, SRES_CHUNK, 1, 1)
    name = subjects.NAMES[stage]
    return {
        f"{name}, training step of {system.run.batch} clips": functools.partial(train_step, system, batches),
        f"{name}, {num_frames} frames": functools.partial(generate, source, num_frames, clip),
    }


@click.command()
@click.option("--size", help="Whose networks", type=click.Choice(subjects.SIZES), default="toy", show_default=True)
@harness.options()
def main(size: str, device: str, threads: int, rounds: int, quick: bool, json_path: Path | None) -> None:
    """Print the speed-up of compiled steps and videos, and the number of them after which compilation pays off."""
    size, rounds = ("toy", 1) if quick else (size, rounds)
    report = harness.begin("compilation", device, threads, size=size, rounds=rounds)
    reason = compilation.why_not(device)
    if reason is not None:
        raise click.ClickException(f"nothing can be compiled here: {reason}")
    table = harness.Table(
        f"Compiled, {size}: seconds",
        ["what", "compiling, once", "eager", "compiled", "against eager", "pays after"],
        note="Compiling begins with an empty cache. It pays after as many steps or videos as make up for it, if ever.",
    )
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        subjects_of_all = (work(stage, size, device) for stage in subjects.NAMES)
        pairs = itertools.chain.from_iterable(found.items() for found in subjects_of_all)
        # Compiling takes a minute for each on a CPU; a smoke test needs only one.
        for name, function in itertools.islice(pairs, 1, 2) if quick else pairs:
            first = harness.seconds(functools.partial(function, True), device)
            times = harness.interleave(
                {"eager": functools.partial(function, False), "compiled": functools.partial(function, True)},
                rounds,
                device,
            )
            eager, compiled = harness.median(times["eager"]), harness.median(times["compiled"])
            gain = harness.ratio(times, "eager", "compiled")
            compiling = first - compiled
            pays = round(compiling / (eager - compiled)) if eager > compiled else None
            table.rows.append([name, compiling, eager, compiled, gain, pays])
            click.echo(f"{name}: {gain:.2f} after {compiling:.0f} s")
    report.add(table)
    report.finish(json_path)


if __name__ == "__main__":
    main()
