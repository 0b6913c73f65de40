"""Time TECO at the size of DMLab against the release's formulation: frames of a rollout, and training steps.

python -m benchmarks.teco                     all parts, some minutes on one core
python -m benchmarks.teco --only inside --rounds=7

The release predicts all slots of the trained length for each frame, computes the prior's logits of all cells in each
pass, encodes all frames again beyond the trained length, and encodes frames in training unless it is given tokens.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping

import click
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import harness
from torch_utils.precision import cpu_has_bf16, set_precision
from training.generation.draft_revise import Draw, Grid, Published, Query
from training.generation.noise import KeyedNoise
from training.modules.vqgan2d import VQGAN2D
from training.teco.inference import prepare
from training.teco.losses import Draws, losses, num_kept, num_masked
from training.teco.networks import TECO
from training.teco.presets import WIDTHS
from training.teco.rollout import Rollout
from training.teco.sampling import Drawing, sample_codes

NUM_ACTIONS = 6
Contestants = Mapping[str, Callable[[], object]]


def make_networks(seq_len: int) -> tuple[TECO, VQGAN2D]:
    """Return random networks of DMLab's size: 64x64 pixels, 16x16 codes, 8x8 codes of z, one token a frame."""
    torch.manual_seed(0)
    vqgan = VQGAN2D(64, 64, 1, 64, 128, [1, 2, 4], 2, [16], 256, 256, 1024)
    network = TECO((16, 16), 1024, 256, seq_len, **WIDTHS["dmlab"])
    return network.eval().requires_grad_(False), vqgan.eval().requires_grad_(False)


def plain(network: nn.Module) -> nn.Module:
    """Return a copy that shares all tensors, whose linear layers are those of torch."""
    shared = {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]}
    other = copy.deepcopy(network, shared)
    for module in other.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = nn.Linear
    return other


def codes_of(num_frames: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(0).randint(0, 1024, (1, num_frames, 16, 16)))


def report(what: str, contestants: Contestants, rounds: int) -> None:
    """Print the CPU time of each contestant, and how many times as fast as the first the others are."""
    times = harness.interleave(contestants, rounds, clock=time.process_time)
    first, *others = times
    click.echo(f"{what}: {first} {statistics.median(times[first]):.2f} s of CPU time")
    for name in others:
        ratios = sorted(a / b for a, b in zip(times[first], times[name], strict=True))
        middle = statistics.median(ratios)
        click.echo(
            f"  {name} {statistics.median(times[name]):.2f} s: {middle:.2f} times as fast "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f} over {len(ratios)} rounds)"
        )


# ----------------------------------------------------------------------------
# Frames.


def literal_codes(network: TECO, h: Tensor, noise: KeyedNoise) -> Tensor:
    """Draw the codes of a frame with the logits and the draws of all masked cells in each pass."""
    cells = network.cells[0] * network.cells[1]

    def ask(query: Query):
        logits = network.prior(query.codes.scatter(1, query.targets, network.prior.num_codes), h)
        yield logits.gather(1, query.wanted_targets.unsqueeze(2).expand(-1, -1, logits.shape[2]))

    steps = Published(ask, noise, legacy=False)
    grid = steps.draft_parts(Grid.empty(1, cells), 8, Draw())
    return steps.revise(Grid(grid.codes, grid.contexts[:, :0], Grid.empty(1, cells).targets), 8, Draw(), 2).codes


class Release:
    """A frame by the release's formulation, inside the trained length or beyond it."""

    def __init__(self, network: TECO, vqgan: VQGAN2D, beyond: bool):
        model = plain(network)
        assert isinstance(model, TECO)
        self.network, self.vqgan, self.beyond = model, vqgan, beyond
        self.codes, self.actions = codes_of(network.seq_len), torch.zeros(1, network.seq_len, dtype=torch.int64)
        self.latents = torch.randn(1, network.seq_len, network.codebook.channels, *network.cells)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        network = self.network
        cond, z = self.latents[:, :1], self.latents[:, 1:]
        if self.beyond:
            cond, z, _ = network.posterior(self.vqgan.quantizer.lookup(self.codes).transpose(1, 2))
        h = network.predict(cond, z, self.actions)[:, -1]
        codes = literal_codes(network, h, KeyedNoise("benchmark", [0]))
        z = network.lookup(codes.unflatten(1, network.cells).unsqueeze(1))[:, 0]
        return network.decode(h, z).argmax(1)


class Ours:
    """A frame with everything that is kept, after `frame` others."""

    def __init__(self, network: TECO, vqgan: VQGAN2D, frame: int, precision: str = "fp32"):
        set_precision([network], precision)
        self.network = prepare(network)
        set_precision([network], "fp32")
        self.rollout = Rollout(self.network, vqgan, codes_of(2), torch.zeros(1, 2, dtype=torch.int64))
        self.start(min(frame, network.seq_len - 1))
        if frame >= network.seq_len:
            self.rollout.frame = network.seq_len
            self.rollout.codes = codes_of(network.seq_len - 1)
            self.rollout.actions = torch.zeros(1, network.seq_len - 1, dtype=torch.int64)
            self.rollout.slots = torch.randn(1, network.seq_len - 2, self.network.temporal.width)
        self.frame = self.rollout.frame

    def start(self, frame: int) -> None:
        """Fill the caches as if so many frames had been made."""
        self.rollout.frame = frame
        for cache in self.rollout.caches:
            cache.keys.normal_()
            cache.values.normal_()
            cache.count = frame

    @torch.no_grad()
    def __call__(self) -> Tensor:
        noise = KeyedNoise("benchmark", [0], self.rollout.frame)
        action = torch.zeros(1, dtype=torch.int64)
        made = self.rollout.step(action, lambda h: sample_codes(self.network, h, noise, Drawing()))
        self.rollout.frame = self.frame
        for cache in self.rollout.caches:
            cache.count = self.frame
        return made


def time_frames(what: str, rounds: int, seq_len: int) -> None:
    """Compare frames inside the trained length, beyond it, or with short and long contexts."""
    network, vqgan = make_networks(seq_len)
    precisions = ["fp32", *(["bf16"] if cpu_has_bf16() else [])]
    if what == "context":
        contestants = {f"context {frame}": Ours(network, vqgan, frame) for frame in (256, 16)}
        return report("A frame after a long context", contestants, rounds)
    beyond = what == "beyond"
    frame = seq_len if beyond else seq_len // 2
    contestants = {"as released": Release(network, vqgan, beyond)}
    contestants |= {f"ours {name}": Ours(network, vqgan, frame, name) for name in precisions}
    report(f"A frame {what} the trained length of {seq_len}", contestants, rounds)


# ----------------------------------------------------------------------------
# Training.


def time_training(rounds: int, num_frames: int) -> None:
    """Compare training steps of one clip: frames that are encoded, and tokens."""
    network, vqgan = make_networks(num_frames)
    model = plain(network)
    assert isinstance(model, TECO)
    random, codes = np.random.RandomState(0), codes_of(num_frames)
    actions, frames = torch.zeros(1, num_frames, dtype=torch.int64), torch.randn(1, 3, num_frames, 64, 64)
    count = num_kept(0.9, num_frames - 1)
    hidden = random.random_sample((1, count, 64)).argsort(2) < num_masked("cosine", random.random_sample((1, 1, 1)), 64)
    kept = torch.from_numpy(random.randint(0, num_frames - 1, count))
    mask = torch.from_numpy(hidden)
    draws = Draws(torch.zeros(1, dtype=torch.bool), kept, None, mask, mask.sum().float())

    def step(trained: TECO, encodes: bool, precision: str) -> None:
        with torch.no_grad():
            read = vqgan.encode(frames) if encodes else codes
            x = vqgan.quantizer.lookup(read).transpose(1, 2)
        trained.requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = losses(trained, x, read, actions, draws).total
        loss.backward()
        trained.requires_grad_(False)
        for parameter in trained.parameters():
            parameter.grad = None

    contestants = {"as released, encoding frames": lambda: step(model, True, "fp32")}
    contestants["as released, from tokens"] = lambda: step(model, False, "fp32")
    contestants["ours, encoding frames"] = lambda: step(network, True, "fp32")
    contestants["ours, from tokens"] = lambda: step(network, False, "fp32")
    if cpu_has_bf16():
        contestants["ours, from tokens, bf16"] = lambda: step(network, False, "bf16")
    report(f"A training step of {num_frames} frames", contestants, rounds)


PARTS = ("inside", "beyond", "context", "training")


@click.command(help=str(__doc__).replace("\npython", "\n\n\b\npython", 1))
@click.option("--only", help="One part", type=click.Choice(PARTS))
@click.option("--rounds", help="Measurements of each contestant", default=7, show_default=True)
@click.option("--seq-len", help="Trained length, of frames", default=300, show_default=True)
@click.option("--clip", help="Frames of a clip in training", default=16, show_default=True)
@click.option("--threads", help="Threads of torch", default=1, show_default=True)
def main(only: str | None, rounds: int, seq_len: int, clip: int, threads: int) -> None:
    torch.set_num_threads(threads)
    for part in PARTS:
        if only not in (None, part):
            continue
        if part == "training":
            time_training(rounds, clip)
        else:
            time_frames(part, rounds, seq_len)


if __name__ == "__main__":
    main()
