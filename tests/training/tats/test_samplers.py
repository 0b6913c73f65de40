"""The samplers of TATS against published tokens."""

import numpy as np
import pytest
import torch

from tests import golden_files
from tests.training.tats import golden_networks
from training.generation import rollout
from training.generation.token_sampling import Draw, draw_sequence
from training.tats.networks import TATSTransformer
from training.tats.sampling import Writer, draw_in_windows, fill, fill_legacy, to_codes


def network_of(golden, entry, salt=None, **arguments):
    gpt = golden["sampling"]["gpt"]
    sizes = {name: entry.get(key, gpt[key]) for name, key in (("layers", "L"), ("heads", "H"), ("width", "d"))}
    arguments = {"num_codes": gpt["K"], "conditions": gpt["C"], "block_size": gpt["block"], **sizes, **arguments}
    return golden_networks.make(golden, salt, **arguments)


def uniform_table(seed, steps, batch):
    """Return the uniform numbers of the golden draws, one for each row in the order of the batch: (batch, steps)."""
    return torch.from_numpy(np.random.RandomState(seed).random_sample((steps, batch))).T


def draw_of(entry, **values):
    found = {name: entry[name] for name in ("top_k", "top_p", "temperature") if name in entry}
    return Draw(**{**found, **values})


def ids_of(entry):
    return torch.tensor(entry["tokens"]).view(entry["shape"])


def check_short(golden, entry):
    batch, steps = entry["shape"]
    greedy = {"temperature": 0.0} if "seed" not in entry else {}
    for fast in (True, False):
        network = network_of(golden, entry).for_sampling(only_codes=False)
        writer = Writer(network, torch.full((batch, 1), entry["cond"]))
        logits = writer.begin(torch.empty(batch, 0, dtype=torch.int64))
        uniforms = uniform_table(entry.get("seed", 0), steps, batch)
        found = draw_sequence(logits, writer.advance, uniforms, draw_of(entry, fast=fast, **greedy))
        assert torch.equal(found, ids_of(entry))


def check_long_fast(golden, entry):
    batch, n, frames = entry["shape"][0], entry["spatial"] ** 2, entry["T"]
    network = network_of(golden, entry).for_sampling(only_codes=False)
    writer = Writer(network, torch.full((batch, 1), entry["cond"]))
    numbers = uniform_table(entry["seed"], frames * n, batch).view(batch, frames, n)
    made = rollout.sliding_window(writer, lambda frame: numbers[:, frame], lambda frame: draw_of(entry), entry["p"])
    found = [to_codes(network, next(made)) for _ in range(frames)]
    assert torch.equal(torch.stack(found, 1).view(entry["shape"]), ids_of(entry))


def check_long_slow(golden, entry):
    batch, frames, height, width = entry["shape"]
    window = tuple(entry["window"])
    table = list(window[:1]) + [entry["spatial"]] * 2 if entry["vtokens_pos"] else None
    network = network_of(golden, entry, table=table)
    numbers = uniform_table(entry["seed"], frames * height * width, batch).view(batch, frames, -1)
    condition = torch.full((batch, 1), entry["cond"])
    made = draw_in_windows(
        network, condition, (frames, height, width), window, entry["p"], lambda frame: numbers[:, frame],
        draw_of(entry, top_p=1.0),
    )  # fmt: skip
    assert torch.equal(torch.stack(list(made), 1), ids_of(entry))


def infiller(golden, entry, n):
    salt = entry["interp_salt"]
    return network_of(golden, entry, salt, conditions=0, block_size=5 * n, unmasked=n).for_sampling()


def check_hierarchical_released(golden, entry):
    batch, n = entry["shape"][0], entry["sample_resolution"] ** 2
    first = network_of(golden, entry, entry["ar_salt"], conditions=0).for_sampling()
    second = infiller(golden, entry, n)
    condition = torch.zeros(batch, 1, dtype=torch.int64)
    segments = entry["sample_length"] // 4
    rng = np.random.RandomState(entry["seed"])
    draw, keys = draw_of(entry), segments + 1
    initial = Draw(entry["top_k_init"], entry["top_p_init"])
    numbers = torch.from_numpy(rng.random_sample((keys * n, batch))).T.reshape(batch, keys, n)
    between = torch.from_numpy(rng.random_sample((segments, 3 * n, batch)))
    memory = entry["temporal_sample_pos"]
    made = rollout.sliding_window(
        Writer(first, condition), lambda frame: numbers[:, frame], lambda frame: initial if frame < memory else draw,
        memory,
    )  # fmt: skip

    def between_frames(before, after, segment_numbers):
        parts = [
            fill_legacy(second, condition, first_frame, last_frame, between[number].T, draw)
            for first_frame, last_frame, number in zip(before, after, segment_numbers, strict=True)
        ]
        return torch.stack(parts).unflatten(2, (3, n))

    found = rollout.filled((next(made) for _ in range(keys)), between_frames, 1)
    assert torch.equal(torch.stack(list(found), 1).view(entry["shape"]), ids_of(entry))


def check_infill_correct(golden, entry):
    keys = torch.tensor(entry["keys"])  # (N, keys, n)
    batch, num_keys, n = keys.shape
    network = infiller(golden, entry, n)
    segments = num_keys - 1
    rng = np.random.RandomState(entry["seed"])
    numbers = torch.from_numpy(rng.random_sample((segments, 3 * n, batch))).transpose(1, 2)  # (segments, N, 3n)

    def between_frames(before, after, segment_numbers):
        chosen = numbers[list(segment_numbers)].flatten(0, 1)
        condition = torch.zeros(len(chosen), 1, dtype=torch.int64)
        found = fill(network, condition, before.flatten(0, 1), after.flatten(0, 1), chosen, draw_of(entry))
        return found.view(len(before), batch, 3, n)

    for group in (1, segments):
        found = torch.stack(list(rollout.filled(keys.unbind(1), between_frames, group)), 1)
        assert found.flatten().tolist() == entry["tokens"]


@golden_files.entries("tats", "sampling*")
def test_tokens_are_the_published_ones(entry, golden):
    checks = {
        "window": check_long_slow,
        "keys": check_infill_correct,
        "sample_length": check_hierarchical_released,
        "T": check_long_fast,
    }
    assert entry["cases"]
    for case in entry["cases"]:
        found = next((check for field, check in checks.items() if field in case), check_short)
        found(golden | {"sampling": entry}, case)


def test_filled_joins_groups_of_any_size():
    keys = [torch.tensor([[10 * k]]) for k in range(6)]

    def between(before, after, numbers):
        assert before[:, 0, 0].tolist() == [10 * number for number in numbers]
        return torch.stack([before + 1, after - 1], 2)

    wanted = [x for k in range(5) for x in (10 * k, 10 * k + 1, 10 * k + 9)] + [50]
    for group in (1, 2, 4, 5, 9):
        assert [int(x) for x in rollout.filled(keys, between, group)] == wanted
    assert [int(x) for x in rollout.filled(keys[:1], between, 3)] == [0]


@pytest.mark.parametrize("memory", [1, 2, 3])
def test_a_window_sees_its_frames_alone(memory):
    """Frames drawn with the cache equal those drawn from whole passes over the last `memory` frames."""
    torch.manual_seed(0)
    n, batch = 3, 2
    network = TATSTransformer(11, 2, 1, 1 + 4 * n - 1, 2, 2, 16)
    torch.nn.init.normal_(network.pos_emb, std=0.5)
    torch.nn.init.normal_(network.get_parameter("head.weight"), std=0.5)
    copy, draw = network.for_sampling(), Draw(8, 0.9)
    condition = torch.tensor([[1], [0]])
    numbers = torch.rand(batch, 7, n, dtype=torch.float64)
    made = rollout.sliding_window(Writer(copy, condition), lambda f: numbers[:, f], lambda f: draw, memory)
    found = [next(made) for _ in range(7)]
    frames: list[torch.Tensor] = []
    for f in range(7):
        tokens = torch.cat(frames[max(f - memory, 0) : f] or [torch.empty(batch, 0, dtype=torch.int64)], 1)
        for j in range(n):
            ids = torch.cat([condition, tokens + 2], 1)
            token = draw(network(ids)[:, -1, 2:], numbers[:, f, j])
            tokens = torch.cat([tokens, token[:, None]], 1)
        frames.append(tokens[:, -n:])
    assert torch.equal(torch.stack(found), torch.stack(frames))
