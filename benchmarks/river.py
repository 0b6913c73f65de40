"""Time RIVER against the formulation of its release, in plain PyTorch, in the same run.

python -m benchmarks.river                      all parts, some minutes on one core
python -m benchmarks.river --only evaluation

The network is that of 64x64, with random weights: one evaluation of the field, a training step of few clips, and the
decoding of a video. Ratios are those of CPU time, interleaved.
"""

from __future__ import annotations

import copy
import functools
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from benchmarks.tokenizer import ratio, with_plain_convolutions
from torch_utils.precision import cpu_has_bf16, set_precision
from training import optim
from training.contract import Run
from training.modules.vqgan2d import VQGAN2D
from training.network_file import save_network
from training.river.draws import draw_sample, flow_losses
from training.river.networks import Layer, VectorField, prepare
from training.river.options import RiverTrainOptions
from training.river.system import River

SIDE, GRID, CHANNELS, CLIP = 64, (8, 8), 4, 16
CHUNK = 8  # frames that are decoded together


class PublishedLayer(nn.Module):
    """`training.river.networks.Layer` by PyTorch's own modules; parameters have the same names."""

    def __init__(self, width: int, heads: int, dropout: float = 0.05):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, drop: object = None) -> Tensor:
        """Transform tokens (N, L, C), with PyTorch's dropout in training mode."""
        y = self.norm1(x)
        x = x + self.drop(self.self_attn(y, y, y, need_weights=False)[0])
        return x + self.drop(self.linear2(self.drop(nn.functional.gelu(self.linear1(self.norm2(x))))))


def published(field: VectorField) -> VectorField:
    """Return a copy of a field whose blocks and large layers are PyTorch's own."""
    other = copy.deepcopy(field)
    for module in list(other.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Layer):
                made = PublishedLayer(field.inner_dim, child.self_attn.heads)
                made.load_state_dict(child.state_dict())
                setattr(module, name, made)
            elif type(child) is not nn.Linear and isinstance(child, nn.Linear):
                linear = nn.Linear(child.in_features, child.out_features)
                linear.load_state_dict(child.state_dict())
                setattr(module, name, linear)
    return other.train(field.training)


def make_field() -> VectorField:
    """Return the published field of 64x64."""
    torch.manual_seed(0)
    return VectorField(CHANNELS, GRID).eval().requires_grad_(False)


def make_tokenizer() -> VQGAN2D:
    """Return the published autoencoder of 64x64."""
    torch.manual_seed(0)
    sizes = {"ch_mult": [1, 2, 2, 4], "attn_resolutions": [16], "z_channels": CHANNELS, "num_codes": 16384}
    return VQGAN2D(SIDE, SIDE, CLIP, SIDE, embedding_dim=CHANNELS, **sizes).eval().requires_grad_(False)


# ----------------------------------------------------------------------------
# The parts.


@torch.no_grad()
def time_evaluation(rounds: int) -> None:
    """Compare an evaluation of the field, with packed weights, with that of the release."""
    field = make_field()
    reference = published(field)
    x, ref, condition = torch.randn(3, 1, CHANNELS, *GRID)
    arguments = (x, ref, condition, torch.tensor([3]), torch.tensor([0.4]))
    contestants = {"fp32": prepare(field)}
    if cpu_has_bf16():
        set_precision([field], "bf16")
        contestants["bf16"] = prepare(field)
    expected = reference(*arguments)
    for name, network in contestants.items():
        error = (network(*arguments) - expected).norm() / expected.norm()
        calls: dict[str, Callable[[], object]] = {
            "ours": functools.partial(network, *arguments),
            "released": functools.partial(reference, *arguments),
        }
        times, seconds = ratio(calls, rounds)
        click.echo(
            f"One evaluation at {SIDE}x{SIDE}, {name}: {1000 * seconds['ours']:.0f} ms of CPU time, released "
            f"{1000 * seconds['released']:.0f} ms, {times:.2f} times as fast, relative difference {error:.1e}"
        )


class PublishedStep:
    """A training step of the release: three frames of each clip are encoded, then the field takes AdamW's step."""

    def __init__(self, field: nn.Module, tokenizer: VQGAN2D, clips: Tensor):
        self.field, self.tokenizer, self.clips = field.train().requires_grad_(True), tokenizer, clips
        self.optimizer = torch.optim.AdamW(field.parameters(), 1e-4, weight_decay=5e-6)
        self.steps = itertools.count()

    def __call__(self) -> float:
        rngs = Run(batch=len(self.clips)).rngs("benchmark", next(self.steps))
        sample = draw_sample(rngs, 2, CLIP, 1, (CHANNELS, *GRID))
        with torch.no_grad():
            frames = sample.pick(self.clips.transpose(1, 2)).flatten(0, 1)
            picked = self.tokenizer.encode_images(frames).unflatten(0, (len(self.clips), -1))
        assert isinstance(self.field, VectorField)
        loss = flow_losses(self.field, picked, sample)[0].mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def time_training(rounds: int, batch: int) -> None:
    """Compare a training step from stored latents with that of the release."""
    tokenizer = make_tokenizer()
    clips = torch.rand(batch, 3, CLIP, SIDE, SIDE) * 2 - 1
    latents = tokenizer.latents(clips)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.pkl")
        save_network(tokenizer, path)
        options = RiverTrainOptions(tokenizer=str(path), latents=True, ema_beta=0.0, normalise=False, warmup_steps=1)
        for precision in ("fp32", *(["bf16"] if cpu_has_bf16() else [])):
            system = River(options, Run(batch=batch, steps=1000, precision=precision))
            numbers = itertools.count()
            step = lambda: system.step(iter([{"latents": latents}]), next(numbers))  # noqa: B023, E731
            plain = with_plain_convolutions(tokenizer)
            reference = PublishedStep(published(optim.seeded(0, make_field)), plain, clips)
            times, seconds = ratio({"ours": step, "released": reference}, rounds)
            click.echo(
                f"A training step of {batch} clips, {precision}: from latents {seconds['ours']:.2f} s of CPU time, "
                f"released {seconds['released']:.2f} s, {times:.2f} times as fast"
            )


@torch.no_grad()
def time_decoding(rounds: int, num_frames: int) -> None:
    """Compare decoding in chunks with decoding all frames at once, as the release does."""
    tokenizer = make_tokenizer()
    plain = with_plain_convolutions(tokenizer)
    z = torch.randn(1, CHANNELS, num_frames, *GRID)

    def chunks() -> int:
        return sum(tokenizer.decode_latents(part).shape[2] for part in z.split(CHUNK, dim=2))

    def whole() -> int:
        codes = plain.quantizer.encode(z)
        return len(plain.decode_images(plain.quantizer.lookup(codes).transpose(1, 2).flatten(0, 1)))

    assert chunks() == whole() == num_frames
    times, seconds = ratio({"ours": chunks, "released": whole}, rounds)
    click.echo(
        f"Decoding {num_frames} frames of {SIDE}x{SIDE} in chunks of {CHUNK}: {seconds['ours']:.2f} s of CPU time, "
        f"released, all at once {seconds['released']:.2f} s, {times:.2f} times as fast"
    )


@click.command(help=str(__doc__).replace("\npython", "\n\n\b\npython", 1))
@click.option("--only", help="One part", type=click.Choice(["evaluation", "training", "decoding"]))
@click.option("--batch", help="Clips of a training step", default=4, show_default=True)
@click.option("--frames", help="Frames to decode", default=32, show_default=True)
@click.option("--rounds", help="Repetitions", default=7, show_default=True)
@click.option("--threads", help="Threads of torch", default=1, show_default=True)
def main(only: str | None, batch: int, frames: int, rounds: int, threads: int) -> None:
    torch.set_num_threads(threads)
    parts = {
        "evaluation": lambda: time_evaluation(rounds),
        "training": lambda: time_training(rounds, batch),
        "decoding": lambda: time_decoding(rounds, frames),
    }
    for name, part in parts.items():
        if only in (None, name):
            part()


if __name__ == "__main__":
    main()
