"""Time tokenizers: codebooks, decoding of long videos, encoding of datasets, each against the released or literal way.

python -m benchmarks.tokenizer                      all three, some minutes on two cores
python -m benchmarks.tokenizer --only codebook
"""

from __future__ import annotations

import copy
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import click
import numpy as np
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import harness
from dataset_tools.archive import ShardWriter, describe_dataset
from dataset_tools.encode_dataset import main as encode_dataset
from dataset_tools.frames import encode_jpeg
from torch_utils import host_memory
from torch_utils.ops import convolution
from torch_utils.precision import cpu_has_bf16, set_precision
from training.modules.quantizers import EMAQuantizer
from training.modules.vqgan3d import VQGAN3D
from training.network_file import save_network

ROUNDS = 9
CODEBOOKS = ((16384, 256), (4096, 64))  # codes and width: published, and of labdoom-3d
LATENT_SHAPE = (2, 4, 16, 16)  # of two clips of 16 frames at 128x128
CHUNK = 4  # latent frames that are decoded together with a margin
SIZE = 128

Network = TypeVar("Network", bound=nn.Module)


def ratio(contestants: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> tuple[float, dict[str, float]]:
    """Return how much longer the second takes, as the median over rounds of CPU time, and the median of each."""
    times = harness.interleave(contestants, rounds, clock=time.process_time)
    first, second = times.values()
    ratios = [b / a for a, b in zip(first, second, strict=True)]
    return statistics.median(ratios), {name: statistics.median(values) for name, values in times.items()}


def with_plain_convolutions(network: Network) -> Network:
    """Return a copy of a network whose convolutions are PyTorch's, as those of the releases are."""
    network = copy.deepcopy(network)
    for module in network.modules():
        for ours, plain in ((convolution.Conv2d, nn.Conv2d), (convolution.Conv3d, nn.Conv3d)):
            if type(module) is ours:
                module.__class__ = plain  # pyright: ignore[reportAttributeAccessIssue]
    return network


# ----------------------------------------------------------------------------
# Codebooks.


def literal_step(book: EMAQuantizer, z: Tensor) -> Tensor:
    """Take the training step of a codebook by its published formulas: one-hot vectors, and products with them."""
    rows = z.movedim(1, -1).flatten(0, -2)
    distances = rows.square().sum(1, keepdim=True) - 2 * rows @ book.embeddings.T
    one_hot = F.one_hot((distances + book.embeddings.square().sum(1)).argmin(1), book.num_codes).float()
    found = F.embedding(one_hot.argmax(1), book.embeddings)
    book.N.mul_(0.99).add_(one_hot.sum(0), alpha=0.01)
    book.z_avg.mul_(0.99).add_((rows.T @ one_hot).T, alpha=0.01)
    total = book.N.sum()
    book.embeddings.copy_(book.z_avg / ((book.N + 1e-7) / (total + book.num_codes * 1e-7) * total)[:, None])
    repeated = rows.repeat(-(-book.num_codes // len(rows)), 1)
    repeated = repeated + torch.randn_like(repeated) * (0.01 / book.channels**0.5)
    drawn = repeated[torch.randperm(len(repeated))][: book.num_codes]
    used = (book.N >= book.restart_below).float()[:, None]
    book.embeddings.mul_(used).add_(drawn * (1 - used))
    p = one_hot.mean(0)
    return (rows - found).square().mean() + (-(p * (p + 1e-10).log()).sum()).exp()


@torch.no_grad()
def time_codebooks() -> None:
    """Compare the training step of codebooks with the literal one."""
    for num_codes, channels in CODEBOOKS:
        torch.manual_seed(0)
        z = torch.randn(LATENT_SHAPE[0], channels, *LATENT_SHAPE[1:])
        ours, literal = EMAQuantizer(num_codes, channels), EMAQuantizer(num_codes, channels)
        rng = np.random.RandomState(0)
        ours(z, rng)
        literal.load_state_dict(ours.state_dict())
        steps = {"ours": functools.partial(ours, z, rng), "literal": functools.partial(literal_step, literal, z)}
        times, seconds = ratio(steps)
        click.echo(
            f"Codebook of {num_codes} codes of width {channels}, a training step: {1000 * seconds['ours']:.0f} ms of "
            f"CPU time, literal {1000 * seconds['literal']:.0f} ms, {times:.2f} times as fast"
        )


# ----------------------------------------------------------------------------
# Decoding.


def make_network(hidden: int) -> VQGAN3D:
    """Return a network of the published shape with narrower levels."""
    torch.manual_seed(0)
    return VQGAN3D(SIZE, SIZE, hidden=hidden, embedding_dim=32, num_codes=256).eval().requires_grad_(False)


def random_codes(num_frames: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(0).randint(0, 256, (1, num_frames // 4, SIZE // 8, SIZE // 8)))


def decode_all(network: VQGAN3D, codes: Tensor) -> int:
    """Decode in chunks, and return the number of frames."""
    return sum(frames.shape[2] for frames in network.decode_stream([codes]))


def decode_and_keep(network: VQGAN3D, codes: Tensor) -> int:
    """Decode in chunks while freed memory is kept, as commands do."""
    with host_memory.kept():
        return decode_all(network, codes)


def decode_at_once(network: VQGAN3D, codes: Tensor) -> int:
    """Decode all frames at once, as the release does."""
    return network.decode(codes).shape[2]


def decode_overlapping(network: VQGAN3D, codes: Tensor) -> int:
    """Decode each chunk together with the latent frames around it that it depends on."""
    starts = range(0, codes.shape[1], CHUNK)
    return sum(network.decode_part(codes, a, min(a + CHUNK, codes.shape[1])).shape[2] for a in starts)


def peak_mib(num_frames: int, hidden: int, way: str = "decode_all") -> int:
    """Return the peak memory of a process that decodes so many frames by a function of this module, in MiB.

    Freed memory is returned at once there; how much the C library keeps else varies by a third.
    """
    script = f"from benchmarks.tokenizer import *\nprint_peak({num_frames}, {hidden}, {way})"
    command, environment = [sys.executable, "-c", script], {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    options = {"cwd": harness.ROOT, "env": environment, "check": True, "capture_output": True, "text": True}
    return int(subprocess.run(command, **options).stdout)


def print_peak(num_frames: int, hidden: int, way: Callable[[VQGAN3D, Tensor], int]) -> None:
    """Decode so many frames and print the peak memory of this process in MiB."""
    torch.set_num_threads(2)
    network = make_network(hidden)
    if way is decode_at_once:
        network = with_plain_convolutions(network)
    assert way(network, random_codes(num_frames)) == num_frames
    print(int(harness.peak_mib()))


@torch.no_grad()
def time_decoding(hidden: int, rounds: int) -> None:
    """Compare decoding in chunks with the release's at once and with overlapping clips, and memory."""
    network, codes = make_network(hidden), random_codes(64)
    plain = with_plain_convolutions(network)
    contestants = {"fp32": network}
    if cpu_has_bf16():
        contestants["bf16"] = copy.deepcopy(network)
        set_precision([contestants["bf16"]], "bf16")
    for name, ours in contestants.items():
        calls = {
            "chunks": functools.partial(decode_and_keep, ours, codes),
            "released": functools.partial(decode_at_once, plain, codes),
        }
        times, seconds = ratio(calls, rounds)
        click.echo(
            f"Decoding 64 frames of {SIZE}x{SIZE} in chunks, {name}: {seconds['chunks']:.2f} s of CPU time, released, "
            f"all at once {seconds['released']:.2f} s, {times:.2f} times as fast"
        )
    calls = {"chunks": lambda: decode_and_keep(network, codes), "overlap": lambda: decode_overlapping(network, codes)}
    times, seconds = ratio(calls, rounds)
    click.echo(f"Decoding overlapping clips {seconds['overlap']:.2f} s, {times:.2f} times as long as in chunks")
    short, long = peak_mib(64, hidden), peak_mib(256, hidden)
    released = peak_mib(64, hidden, "decode_at_once")
    click.echo(
        f"Peak memory of 64 frames {short} MiB, as released {released} MiB, {short / released:.2f} of it; of 256 "
        f"frames {long} MiB, {long / short:.2f} times as much as of 64"
    )


# ----------------------------------------------------------------------------
# Encoding.


def time_encoding(hidden: int) -> None:
    """Compare encode_dataset with the encoder alone on frames that are in memory."""
    clips, frames, batch = 8, 64, 4
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "data")
        noise = np.random.RandomState(0).randint(0, 256, (16, 16, 3)).astype(np.uint8).repeat(SIZE // 16, 0)
        jpegs = [encode_jpeg(np.roll(noise.repeat(SIZE // 16, 1), i, 1)) for i in range(frames)]
        with ShardWriter(root, ((SIZE, SIZE),), 0) as writer:
            for number in range(clips):
                with writer.clip(f"clip{number}") as add:
                    for jpeg in jpegs:
                        add([jpeg])
        describe_dataset(root, [writer.report({30: clips})], 1, ())
        network = make_network(hidden)
        save_network(network, Path(folder, "tokenizer.pkl"))
        begin = time.perf_counter()
        words = [str(root), f"--tokenizer={folder}/tokenizer.pkl", f"--batch={batch}", "--device=cpu"]
        result = CliRunner().invoke(encode_dataset, words, catch_exceptions=False)
        whole = time.perf_counter() - begin
        if result.exit_code:
            raise click.ClickException(result.output)
    video = torch.zeros(batch, 3, 16, SIZE, SIZE)
    begin = time.perf_counter()
    with torch.no_grad():
        for _ in range(clips * frames // (16 * batch)):
            network.encode(video)
    alone = time.perf_counter() - begin
    click.echo(
        f"Encoding {clips * frames} frames of {SIZE}x{SIZE}: encode_dataset {whole:.1f} s, the encoder alone "
        f"{alone:.1f} s: {alone / whole:.2f} of its throughput"
    )


@click.command(help=str(__doc__).replace("\npython", "\n\n\b\npython", 1))
@click.option("--only", help="One part", type=click.Choice(["codebook", "decoding", "encoding"]))
@click.option("--hidden", help="Width of the network's first level", default=8, show_default=True)
@click.option("--rounds", help="Repetitions of decoding", default=5, show_default=True)
@click.option("--threads", help="Threads of torch", default=2, show_default=True)
def main(only: str | None, hidden: int, rounds: int, threads: int) -> None:
    torch.set_num_threads(threads)
    parts = {
        "codebook": time_codebooks,
        "decoding": lambda: time_decoding(hidden, rounds),
        "encoding": lambda: time_encoding(hidden),
    }
    for name, part in parts.items():
        if only in (None, name):
            part()


if __name__ == "__main__":
    main()
