"""Rollouts equal to computing everything again for each frame, inside the trained length and beyond it."""

import functools

import pytest
import torch

from tests.training.teco import tiny
from training.generation.noise import KeyedNoise
from training.teco.inference import prepare
from training.teco.layers import KeyValueCache
from training.teco.rollout import Rollout
from training.teco.sampling import Drawing, sample_codes

OPTIONS = Drawing(draft=2, revise=2, rounds=1)
CONTEXT, LENGTH = 3, 14  # the trained length is 8


class Recorder:
    """Samples codes, and keeps the h of every frame."""

    def __init__(self, network):
        self.network, self.h = network, []

    def __call__(self, h):
        self.h.append(h)
        return sample_codes(self.network, h, KeyedNoise("test", [0, 1], len(self.h)), OPTIONS)


def rollout(network, length=LENGTH, context=CONTEXT):
    """The codes of all frames and the h of those that were made."""
    codes, moves = tiny.codes(2, context), tiny.actions(2, length)
    made, recorder = Rollout(network, tiny.tokenizer(), codes, moves[:, :context]), Recorder(network)
    new = [made.step(moves[:, frame], recorder) for frame in range(context, length)]
    return torch.cat([codes, torch.stack(new, 1)], 1), recorder.h


def embed(codes):
    return tiny.tokenizer().quantizer.lookup(codes).transpose(1, 2)


def published(network, length=LENGTH, context=CONTEXT):
    """The same by the release's way: everything is encoded and predicted again for each frame."""
    codes, moves, size = tiny.codes(2, context), tiny.actions(2, length), network.seq_len
    cond, z, _ = network.posterior(embed(codes))
    recorder = Recorder(network)
    for frame in range(context, length):
        if frame < size:
            held = torch.cat([z, torch.zeros_like(z[:, :1])], 1)
            h = network.predict(cond, held, moves[:, : frame + 1])[:, -1]
        else:
            window = torch.cat([codes[:, -size + 1 :], torch.zeros_like(codes[:, :1])], 1)
            first, rest, _ = network.posterior(embed(window))
            h = network.predict(first, rest, moves[:, frame - size + 1 : frame + 1])[:, -1]
        new = network.lookup(recorder(h).unflatten(1, network.cells).unsqueeze(1))
        z = torch.cat([z, new], 1)
        codes = torch.cat([codes, network.decode(h, new[:, 0]).argmax(1).unsqueeze(1)], 1)
    return codes, recorder.h


@pytest.mark.parametrize("changes", [{}, {"n_cond": 2}, {"z_ds": 2}, {"use_actions": False}])
@torch.no_grad()
def test_caches_and_kept_slots_change_nothing(changes):
    network = tiny.network(**changes)
    expected, wanted = published(network)
    for model in (network, prepare(network)):
        codes, found = rollout(model)
        assert torch.equal(codes, expected)
        assert max((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True)) < 1e-5
    assert len({tuple(h.flatten().tolist()) for h in wanted}) == len(wanted)


@pytest.mark.parametrize("z_ds", [4, 2])
@torch.no_grad()
def test_rotary_positions_roll_on_without_an_end(z_ds):
    """Each frame sees the last slots of the video: the same as one pass over all of it."""
    network = tiny.network(positions="rotary", z_ds=z_ds)
    codes, found = rollout(network, length=30)
    latents, moves = [], tiny.actions(2, 30)
    again, recorder = Rollout(network, tiny.tokenizer(), codes[:, :CONTEXT], moves[:, :CONTEXT]), Recorder(network)
    cond, z, _ = network.posterior(embed(codes[:, :CONTEXT]))
    for frame in range(CONTEXT, 30):
        again.step(moves[:, frame], recorder)
        latents.append(again.last)
    whole = torch.cat([cond, z, *latents[:-1]], dim=1)
    h = network.temporal(whole, network.embed_actions(moves[:, 1:]))[:, CONTEXT - 1 :]
    assert max((a - b).abs().max().item() for a, b in zip(found, h.unbind(1), strict=True)) < 1e-5


@torch.no_grad()
def test_memory_does_not_grow():
    for positions in ("sinusoid", "rotary"):
        network = tiny.network(positions=positions)
        made = Rollout(network, tiny.tokenizer(), tiny.codes(2, 3), tiny.actions(2, 3))
        sizes = []
        for frame in range(3, 26):
            noise = KeyedNoise("test", [0, 1], frame)
            made.step(
                torch.zeros(2, dtype=torch.int64),
                functools.partial(sample_codes, network, noise=noise, options=OPTIONS),
            )
            tensors = [made.codes, made.actions, made.last, *([] if made.slots is None else [made.slots])]
            tensors += [part for cache in made.caches for part in (cache.keys, cache.values)]
            sizes.append(sum(tensor.numel() for tensor in tensors))
        assert len(set(sizes[8:])) == 1


def test_caches_hold_what_they_are_asked_to():
    with pytest.raises(AssertionError):
        KeyValueCache(2).push(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))
