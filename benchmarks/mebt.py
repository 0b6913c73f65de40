"""Time and measure MeBT against the formulation of its release: the same ids from the same random numbers.

python -m benchmarks.mebt                           speed and memory, many minutes on one core
python -m benchmarks.mebt --only memory --chart memory.png
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import harness
from torch_utils.precision import cpu_has_bf16
from training import optim
from training.charts import Chart, Line, draw_charts
from training.generation.draft_revise import DraftSettings, Draw, Fast, Grid, Published, Query
from training.generation.noise import KeyedNoise
from training.mebt.networks import Block, ContextCache, MeBT
from training.mebt.optimizer import BETAS, parameter_groups
from training.mebt.sampling import pack_in_place
from training.modules.linear import pack_linears

FRAMES = (16, 32, 64, 128)
CODES = 16384


def make_network(frames: int, width: int) -> MeBT:
    """Return a network of the published shape for frames of 128x128, with random weights."""
    network = MeBT(CODES, (frames // 4, 16, 16), width, max(width // 64, 1), residual="normalised")
    return network.eval().requires_grad_(False)


# ----------------------------------------------------------------------------
# The formulation of the release.


def released_block(block: Block, x: Tensor, others: Tensor) -> Tensor:
    """Apply a block by its published formulas: weights of attention as a tensor, products by torch."""
    attention, heads = block.attn, block.attn.heads
    q, k = block.ln1(x), block.ln1(others)

    def linear(layer: nn.Module, y: Tensor) -> Tensor:
        assert isinstance(layer, nn.Linear)
        return F.linear(y, layer.weight, layer.bias)

    projected = (linear(layer, y) for layer, y in ((attention.query, q), (attention.key, k), (attention.value, k)))
    queries, keys, values = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in projected)
    weights = (queries @ keys.transpose(-2, -1) / (queries.shape[-1] ** 0.5)).softmax(-1)
    y = q + linear(attention.proj, (weights @ values).transpose(1, 2).flatten(2))
    first, second = block.mlp[0], block.mlp[2]
    return y + linear(second, F.gelu(linear(first, block.ln2(y))))


def released_logits(network: MeBT, query: Query) -> Iterator[Tensor]:
    """Yield the logits of all targets as one tensor."""
    latents, seen, hidden = network.embed(query.codes, query.contexts, query.targets)
    for mode, block in zip(network.modes, network.blocks, strict=True):
        if mode == "latent_dec":
            hidden = released_block(block, hidden, latents)
        else:
            others = {"latent_enc": seen, "latent_self": latents, "lt2l": torch.cat([latents, hidden], dim=1)}[mode]
            latents = released_block(block, latents, others)
    yield F.linear(network.transformer.ln_f(hidden), network.transformer.head.weight)


class Released(Published):
    """Sampling as released: the whole vocabulary of each target is sorted, and a map of probabilities is kept."""

    def answer(self, query: Query, draw: Draw) -> tuple[Tensor, Tensor]:
        """See `Published.answer`."""
        with torch.no_grad():
            probabilities = draw.probabilities(torch.cat(list(self.predict(query)), dim=1))
            kept = torch.zeros(*query.codes.shape, probabilities.shape[-1])
            kept.scatter_(1, query.targets.unsqueeze(-1).expand_as(probabilities), probabilities)
            drawn = probabilities / self.noise.race(query.wanted_targets, probabilities.shape[-1])
            ids = drawn.sort(-1, descending=True).indices[..., :1]
            return ids.squeeze(-1), probabilities.gather(-1, ids).squeeze(-1)


def released(network: MeBT) -> Published:
    """Return the sampler of the release for a network."""
    return Released(lambda query: released_logits(network, query), KeyedNoise("benchmark", [0]), legacy=False)


def ours(network: MeBT) -> Fast:
    """Return our sampler for a packed network; keys and values begin anew with each."""
    cache = ContextCache(network, 1)
    return Fast(lambda query: network.predict(query, cache), KeyedNoise("benchmark", [0]))


# ----------------------------------------------------------------------------
# Speed.

Sampler = Published | Fast
Work = Callable[[Sampler], Tensor]


def draft_and_revise(count: int) -> Work:
    """Return the sampling of 16 frames: 8 steps, and 2 rounds of 8 parts."""

    def work(way: Sampler) -> Tensor:
        grid = way.draft(Grid.empty(1, count), DraftSettings(8, choice_temperature=6.0))
        return way.revise(Grid.given(grid.codes, 0), 8, Draw(0.7), 2).codes

    return work


def draft_pass(count: int) -> Work:
    """Return the first pass of a draft, in which everything is a target and is drawn."""

    def work(way: Sampler) -> Tensor:
        grid = Grid.empty(1, count)
        way.noise.step("pass")
        ids, _ = way.answer(Query(grid.codes, grid.contexts, grid.targets, count), Draw())
        return ids

    return work


def revise_pass(count: int) -> Work:
    """Return a pass of a revision in two parts: half is visible, half is drawn."""

    def work(way: Sampler) -> Tensor:
        order = KeyedNoise("order", [0]).permutations(count)
        codes = torch.arange(count).unsqueeze(0) % CODES
        way.noise.step("pass")
        ids, _ = way.answer(Query(codes, order[:, count // 2 :], order[:, : count // 2], count // 2), Draw(0.7))
        return ids

    return work


CASES: dict[str, tuple[int, Callable[[int], Work]]] = {
    "16 frames, draft 8, revise 8 x 2": (16, draft_and_revise),
    "128 frames, a draft pass with all targets": (128, draft_pass),
    "128 frames, a revise pass": (128, revise_pass),
}


@torch.no_grad()
def time_case(name: str, width: int, rounds: int) -> None:
    """Print how many times as fast as the release we are, and whether ids are equal."""
    frames, make_work = CASES[name]
    torch.manual_seed(0)
    network = make_network(frames, width)
    work, found = make_work(network.num_positions), {}
    ways: dict[str, Callable[[], Sampler]] = {"release": lambda: released(network)}
    dtypes = {"ours": torch.float32} | ({"ours, bf16": torch.bfloat16} if cpu_has_bf16() else {})
    for label, dtype in dtypes.items():
        packed = pack_linears(network, dtype)
        assert isinstance(packed, MeBT)
        ways[label] = lambda packed=packed: ours(packed)

    def call(label: str) -> None:
        found[label] = work(ways[label]())

    contestants = {label: (lambda label=label: call(label)) for label in ways}
    times = harness.interleave(contestants, rounds, clock=time.process_time)
    parts = []
    for label in dtypes:
        ratio = harness.ratio(times, "release", label)
        same = float((found[label] == found["release"]).float().mean())
        seconds = statistics.median(times[label])
        parts.append(f"{label} {seconds:.1f} s, {ratio:.2f} times as fast, {100 * same:.2f} % of ids equal")
    click.echo(f"{name}: release {statistics.median(times['release']):.1f} s of CPU time; {'; '.join(parts)}")


# ----------------------------------------------------------------------------
# Memory.


def use_memory(kind: str, frames: int, width: int) -> None:
    """Take a draft pass or a training step, and print the peak memory of this process in MiB."""
    torch.set_num_threads(1)
    network = make_network(frames, width)
    count = network.num_positions
    if kind == "training":
        network.requires_grad_(True).train()
        optimizer = optim.make_adam(parameter_groups(network, 0.01), 1e-4, BETAS, 0.01)
        order = torch.randperm(count).unsqueeze(0)
        codes = torch.arange(count).unsqueeze(0) % CODES
        network.losses(codes, order[:, : count // 2], order[:, count // 2 :])[0].mean().backward()
        optimizer.step()
    elif kind == "release":
        draft_pass(count)(released(network))
    else:
        pack_in_place(network, torch.float32)
        draft_pass(count)(ours(network))
    click.echo(int(harness.peak_mib()))


def peak_mib(kind: str, frames: int, width: int) -> int:
    """Return the peak memory of a process of its own; memory that it frees is returned at once there."""
    script = f"from benchmarks.mebt import use_memory\nuse_memory({kind!r}, {frames}, {width})"
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=harness.ROOT, env=environment, check=True, capture_output=True, text=True)
    return int(done.stdout)


def measure_memory(width: int, chart: Path | None) -> None:
    """Print the peak memory of a draft pass and of a training step by frames, and draw it."""
    kinds = {"sampling": "a draft pass", "training": "a training step", "release": "a draft pass of the release"}
    found = {kind: [peak_mib(kind, frames, width) for frames in FRAMES] for kind in kinds}
    for kind, words in kinds.items():
        peaks = found[kind]
        slopes = [(b - a) / (n - m) for a, b, m, n in zip(peaks, peaks[1:], FRAMES, FRAMES[1:], strict=False)]
        text = ", ".join(f"{frames} frames {peak}" for frames, peak in zip(FRAMES, peaks, strict=True))
        click.echo(
            f"Peak memory of {words} at width {width}, MiB: {text}; MiB a frame: "
            f"{', '.join(f'{slope:.1f}' for slope in slopes)}"
        )
    click.echo(f"128 frames: {found['sampling'][-1] / found['release'][-1]:.2f} of the release")
    if chart is not None:
        lines = tuple(Line(words, FRAMES, found[kind]) for kind, words in kinds.items())
        draw_charts([Chart("Peak memory, MiB", lines, x_name="frames", exact=True)], chart)


@click.command(help=str(__doc__).replace("\npython", "\n\n\b\npython", 1))
@click.option("--only", help="One part", type=click.Choice(["speed", "memory"]))
@click.option("--case", "cases", help="One case of speed; repeatable", multiple=True, type=click.Choice(list(CASES)))
@click.option("--width", help="Width of the network in the tests of speed", default=1024, show_default=True)
@click.option("--memory-width", help="Width of the network in the tests of memory", default=256, show_default=True)
@click.option("--rounds", help="Measurements of each, in turns", default=3, show_default=True)
@click.option("--threads", help="Threads of torch", default=1, show_default=True)
@click.option("--chart", help="Draw the memory to this PNG", type=click.Path(path_type=Path))
def main(
    only: str | None,
    cases: tuple[str, ...],
    width: int,
    memory_width: int,
    rounds: int,
    threads: int,
    chart: Path | None,
) -> None:
    torch.set_num_threads(threads)
    if only in (None, "speed"):
        for name in cases or CASES:
            time_case(name, width, rounds)
    if only in (None, "memory"):
        measure_memory(memory_width, chart)


if __name__ == "__main__":
    main()
