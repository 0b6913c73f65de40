"""Time the sampling of TATS against the released formulation, which writes the same codes, on a CPU in one thread.

python -m benchmarks.tats                       minutes on two cores
python -m benchmarks.tats --only infill

The released formulation joins the keys and values of all earlier codes, a piece for each, at every step; multiplies by
`torch.nn.functional.linear`; writes attention as products and a softmax; and sorts the whole vocabulary. The time of a
step is measured at several places, after keys and values that are made up, and weighed by the steps that it stands for.
Decoding is measured by benchmarks.tokenizer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import click
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import harness
from torch_utils.precision import cpu_has_bf16
from training.generation.token_sampling import Draw, draw_sequence, draw_tokens, filter_logits
from training.modules.attention import KeyValueCache
from training.tats.networks import TATSTransformer

TOP_K, TOP_P = 2048, 0.92
CODES = 256  # of a latent frame
WIDTH, HEADS, NUM_CODES = 1024, 16, 16384
STEPS = 6  # that are timed at a place


@dataclass(frozen=True)
class Work:
    """Codes to write: `count` after `prefix` others, in each of `groups` batches, which are joined here."""

    title: str
    layers: int
    batch: int
    prefix: int
    count: int
    groups: int = 1
    targets: tuple[float, float] = (1.0, 1.0)  # float32, bfloat16


WORKS = {
    "large": Work("1024 codes, 24 layers, batch 1", 24, 1, 1, 1024, 1, (1.8, 3.5)),
    "clip": Work("1024 codes, 6 layers, batch 4", 6, 4, 1, 1024, 1, (3.2, 5.0)),
    "window": Work("a latent frame of the window, 6 layers, batch 4", 6, 4, 1 + CODES, CODES, 1, (3.0, 4.0)),
    "infill": Work("in-filling of 4 segments, 6 layers, batch 4", 6, 4, 2 * CODES, 3 * CODES, 4, (5.0, 7.0)),
}


class Released:
    """The released formulation of a step with keys and values of the past; see the module."""

    def __init__(self, network: TATSTransformer, past: Sequence[Tensor]):
        self.state, self.heads = network.state_dict(), network.heads
        self.layers = len(network.blocks)
        self.past = list(past)  # (layers, 2, N, heads, codes, channels) each

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Multiply by a layer."""
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        """Normalise by a layer."""
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def step(self, ids: Tensor, place: int) -> Tensor:
        """Return the logits after ids (N, L) at `place`, which see each other causally: (N, V)."""
        length = ids.shape[1]
        x = F.embedding(ids, self.state["tok_emb.weight"]) + self.state["pos_emb"][:, place : place + length]
        joined = torch.cat(self.past, dim=-2) if self.past else None
        presents = []
        for layer in range(self.layers):
            name = f"blocks.{layer}"
            h = self.norm(x, f"{name}.ln1")
            parts = [self.linear(h, f"{name}.attn.{part}") for part in ("query", "key", "value")]
            q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
            presents.append(torch.stack([k, v]))
            if joined is not None:
                k, v = (torch.cat(pair, dim=-2) for pair in zip(joined[layer], (k, v), strict=True))
            weights = (q @ k.transpose(-2, -1)) * (1.0 / k.shape[-1] ** 0.5)
            if length > 1:
                mask = torch.ones(length, length, dtype=torch.bool).tril()
                weights = weights.masked_fill(~mask, -torch.inf)
            y = (weights.softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + self.linear(y, f"{name}.attn.proj")
            h = F.gelu(self.linear(self.norm(x, f"{name}.ln2"), f"{name}.mlp.0"))
            x = x + self.linear(h, f"{name}.mlp.2")
        self.past.append(torch.stack(presents))
        return self.linear(self.norm(x, "ln_f"), "head")[:, -1]

    def write(self, ids: Tensor, place: int, uniforms: Tensor) -> Tensor:
        """Return the ids (N, count) that follow ids (N, L)."""
        found = []
        for column in uniforms.unbind(1):
            logits = self.step(ids, place)
            place += ids.shape[1]
            ids = draw_tokens(filter_logits(logits, TOP_K, TOP_P), column).unsqueeze(1)
            found.append(ids)
        return torch.cat(found, dim=1)


def ours(network: TATSTransformer, cache: KeyValueCache, length: int, ids: Tensor, uniforms: Tensor) -> Tensor:
    """Return the same ids by the cached form, after the first `length` places of a cache."""
    cache.truncate(length)

    def advance(tokens: Tensor) -> Tensor:
        at = cache.length
        return network.feed(tokens.unsqueeze(1), slice(at, at + 1), cache)

    logits = network.feed(ids, slice(length, length + ids.shape[1]), cache, causal=length == 0)
    return draw_sequence(logits, advance, uniforms, Draw(TOP_K, TOP_P))


def filled_cache(network: TATSTransformer, past: Tensor) -> KeyValueCache:
    """Return a cache with keys and values (layers, 2, N, heads, codes, channels)."""
    cache = network.cache(past.shape[2], network.block_size)
    for layer, (keys, values) in enumerate(past):
        cache.write(layer, *(part.transpose(1, 2).flatten(2).to(cache.keys.dtype) for part in (keys, values)))
    cache.advance(past.shape[-2])
    return cache


def make_network(work: Work) -> TATSTransformer:
    """Return a network whose logits are spread as those of a trained one."""
    torch.manual_seed(0)
    network = TATSTransformer(NUM_CODES, 0, 1, 5 * CODES, work.layers, HEADS, WIDTH).requires_grad_(False)
    torch.nn.init.normal_(network.get_parameter("head.weight"), std=0.1)
    return network.eval()


def past_of(work: Work, batch: int, length: int) -> Tensor:
    """Return made-up keys and values."""
    torch.manual_seed(length)
    return torch.randn(work.layers, 2, batch, HEADS, length, WIDTH // HEADS)


Call = Callable[[], Tensor]


def calls(work: Work, networks: dict[str, TATSTransformer], plain: TATSTransformer, place: int) -> dict[str, Call]:
    """Return what writes `STEPS` codes after `place` others, by name; the first is the released formulation."""
    batch = work.batch * work.groups
    torch.manual_seed(place)
    ids, uniforms = torch.randint(NUM_CODES, (batch, 1)), torch.rand(batch, STEPS, dtype=torch.float64)
    past = past_of(work, batch, place)
    pieces = [past[..., at : at + 1, :].clone() for at in range(work.prefix - 1, place)]
    pieces = [past[..., : work.prefix - 1, :].clone(), *pieces] if work.prefix > 1 else pieces

    def theirs() -> Tensor:
        found = []
        for group in range(work.groups):
            rows = slice(group * work.batch, (group + 1) * work.batch)
            released = Released(plain, [piece[:, :, rows] for piece in pieces])
            found.append(released.write(ids[rows], place, uniforms[rows]))
        return torch.cat(found)

    made: dict[str, Call] = {"released": theirs}
    for name, network in networks.items():
        cache = filled_cache(network, past)
        made[name] = lambda network=network, cache=cache: ours(network, cache, place, ids, uniforms)
    return made


def prefix_calls(work: Work, networks: dict[str, TATSTransformer], plain: TATSTransformer) -> dict[str, Call]:
    """Return what takes the prefix and writes one code."""
    batch = work.batch * work.groups
    ids, uniforms = torch.randint(NUM_CODES, (batch, work.prefix)), torch.rand(batch, 1, dtype=torch.float64)

    def theirs() -> Tensor:
        rows = [slice(group * work.batch, (group + 1) * work.batch) for group in range(work.groups)]
        return torch.cat([Released(plain, []).write(ids[part], 0, uniforms[part]) for part in rows])

    made: dict[str, Call] = {"released": theirs}
    for name, network in networks.items():
        cache = network.cache(batch, network.block_size)
        made[name] = lambda network=network, cache=cache: ours(network, cache, 0, ids, uniforms)
    return made


def measure(made: dict[str, Call], rounds: int) -> tuple[dict[str, float], float]:
    """Return CPU seconds by name, and the share of ids in which "float32" agrees with the released formulation."""
    expected, found = made["released"](), made["float32"]()
    times = harness.interleave(made, rounds, clock=time.process_time)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return medians, (expected == found).double().mean().item()


@click.command(help=__doc__)
@click.option("--only", help="One of the works", type=click.Choice(list(WORKS)))
@click.option("--places", help="Places at which steps are timed", default=4, show_default=True, type=click.IntRange(2))
@click.option("--rounds", help="Times that each is timed", default=3, show_default=True, type=click.IntRange(1))
def main(only: str | None, places: int, rounds: int) -> None:
    """Time all works and print ratios."""
    torch.set_num_threads(1)
    for work in [WORKS[only]] if only else WORKS.values():
        plain = make_network(work)
        networks = {"float32": plain.for_sampling()}
        if cpu_has_bf16():
            networks["bfloat16"] = plain.for_sampling(torch.bfloat16)
        total, agreement = measure(prefix_calls(work, networks, plain), rounds)
        agreements = [agreement]
        for number in range(places):
            share = work.count / places
            place = work.prefix + round(share * (number + 0.5))
            times, agreement = measure(calls(work, networks, plain, min(place, 5 * CODES - STEPS)), rounds)
            agreements.append(agreement)
            total = {name: total[name] + times[name] * share / STEPS for name in total}
        text = ", ".join(
            f"{name} {seconds:.1f} s ({total['released'] / seconds:.2f}x)" for name, seconds in total.items()
        )
        goals = " and ".join(f"{target:g}x" for target in work.targets)
        click.echo(f"{work.title}: {text}; targets {goals}; equal ids {min(agreements):.1%}")


if __name__ == "__main__":
    main()
