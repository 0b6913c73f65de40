"""TECO's networks and losses against numbers of the release's own code, for made-up weights."""

import functools
import os
import re

import numpy as np
import pytest
import torch

from tests import golden_files
from tests.training.teco.models import (
    SINGLE,
    drawing,
    embed,
    generators,
    make_noise,
    make_teco,
    make_vqgan,
    random,
    shared_inputs,
    training_draws,
)
from training.sampling import quantize
from training.teco.inference import prepare
from training.teco.layers import sinusoid
from training.teco.losses import losses, masked_share, num_masked
from training.teco.published import leaves
from training.teco.rollout import Rollout
from training.teco.sampling import sample_codes
from training.teco.system import Schedule


def close(found, expected, where=""):
    golden_files.check(found, expected, single=SINGLE, where=where)


def last(frames):
    """Channels last, as in the golden file: (..., C, h, w) -> (..., h, w, C)."""
    return frames.movedim(-3, -1)


@golden_files.entries("teco", "parameters*")
def test_names_and_shapes(entry, golden):
    network = make_teco(golden)
    state = network.state_dict()
    found = {leaf.path: list(leaf.to_flax(state[name]).shape) for name, leaf in leaves(network).items()}
    assert sorted(map(list, found.items())) == sorted(entry["names"])
    assert sum(p.numel() for p in network.parameters()) == entry["total"]


@golden_files.entries("teco", "posterior*")
@torch.no_grad()
def test_posterior(entry, golden):
    network = make_teco(golden)
    x = embed(make_vqgan(golden), random(entry["input"], "randint"))
    close(last(network.pairs(x)), entry["pair_input"], "pair_input")
    close(last(network.encode(x)), entry["u"], "u")
    cond, z, quantized = network.posterior(x)
    close(last(cond), entry["cond"], "cond")
    assert quantized.codes[:, network.n_cond :].flatten().tolist() == entry["z_codes"]["values"]
    close(last(z), entry["z_embeddings"], "z_embeddings")
    close(last(network.lookup(quantized.codes[:, network.n_cond :])), entry["z_embeddings"], "lookup")
    for name in ("commitment_loss", "codebook_loss", "perplexity"):
        assert getattr(quantized, name).item() == pytest.approx(entry[name], rel=1e-4), name


def given(golden, **changes):
    """The network, and the latents of the shared codes."""
    network, (codes, actions) = make_teco(golden, **changes), shared_inputs()
    cond, z, quantized = network.posterior(embed(make_vqgan(golden), codes))
    return network, cond, z, quantized.codes[:, network.n_cond :], actions


@golden_files.entries("teco", "temporal*")
@torch.no_grad()
def test_temporal(entry, golden):
    network, cond, z, _, actions = given(golden)
    temporal = network.temporal
    table = sinusoid(network.seq_len * temporal.num_tokens, temporal.width)
    expected = entry["sinusoid"]
    assert list(table.shape) == expected["shape"]
    close(table[1, :4], expected["row1_first"])
    half = temporal.width // 2
    close(table[1, half : half + 4], expected["row1_cos_first"])
    close(table[5], expected["row5"])
    unproject = entry["unproject"]
    (x,) = golden_files.normals(unproject["input"], golden["about"]["seed"])
    tokens = x.flatten(1, 2)
    close(last(temporal.to_latents(tokens)[:, 0]), unproject["out"], "unproject")
    latents = torch.cat([cond, z], dim=1)[:, 1:2]
    zero = torch.zeros(len(z), 1, network.action_embeds.embedding_dim)
    projected = temporal.slots(latents, zero).unflatten(1, temporal.tokens)
    close(projected, entry["project_frame1_zero_action"], "project")
    h = network.predict(cond, z, actions)
    close(last(h), entry["h"], "h")
    unknown = actions.clone()
    unknown[0] = -1
    close(network.embed_actions(unknown), entry["action_embedding_null"], "null")
    close(last(network.predict(cond, z, unknown)), entry["h_null"], "h_null")
    for name, (what, first, *_) in entry["causality"].items():
        number = int(re.findall(r"\d+", name)[0])
        changed = cond.clone(), z.clone(), actions.clone()
        if "_z_" in name:
            changed[1][:, number - network.n_cond] += 1
        elif "_action_" in name:
            changed[2][:, number] = (changed[2][:, number] + 1) % network.action_dim
        else:
            changed[0][:, number] += 1
        change = (network.predict(*changed) - h).abs().flatten(2).amax((0, 2))
        if what == "max change":
            assert change.max() == first
        else:
            assert change[:first].max() == 0 if first else True
            assert change[first] > 0


@golden_files.entries("teco", "schedule*")
def test_schedule(entry, golden):
    match = re.search(r"linspace\(0,1,(\d+)\)\[1:\] float32, total (\d+)", entry["input"])
    assert match is not None
    ratio, total = np.linspace(0, 1, int(match[1]))[1:].astype(np.float32), int(match[2])
    for name, values in entry.items():
        if isinstance(values, list):
            assert masked_share(name, ratio, total) == pytest.approx(values, abs=1e-5), name
    many = num_masked("cosine", (np.arange(1 << 16) + 0.5) / (1 << 16), total)
    (drawn,) = [value for name, value in entry.items() if name.startswith("monte_carlo")]
    assert many.mean() == pytest.approx(drawn, abs=0.05)


@golden_files.entries("teco", "maskgit*")
@torch.no_grad()
def test_maskgit(entry, golden):
    network, cond, z, codes, actions = given(golden)
    h = network.predict(cond, z, actions)[:, 0]
    x = codes[:, 0].clone()
    match = re.search(r"RS\((\d+)\)\.uniform\(size=\[(.+?)\]\) < ([\d.]+)", entry["input"])
    assert match is not None
    (rng,) = generators(match[0])
    x[torch.from_numpy(rng.uniform(size=x.shape) < float(match[3]))] = network.prior.num_codes
    logits = network.prior(x.flatten(1), h).unflatten(1, network.cells)
    close(logits, entry["logits"])
    assert logits.argmax(-1).flatten().tolist() == entry["argmax"]["values"]
    wanted = torch.tensor([[3, 1], [0, 5]])[: len(x)]
    some = network.prior(x.flatten(1), h, wanted)
    expected = torch.stack([row[index] for row, index in zip(logits.flatten(1, 2), wanted, strict=True)])
    assert torch.allclose(some, expected, atol=1e-5)


@golden_files.entries("teco", "decoder*")
@torch.no_grad()
def test_decoder(entry, golden):
    network, cond, z, _, actions = given(golden)
    logits = network.decode(network.predict(cond, z, actions)[:, 0], z[:, 0])
    close(last(logits), entry["logits"])
    assert logits.argmax(1).flatten().tolist() == entry["argmax"]["values"]


@golden_files.entries("teco", "small_inputs*")
@torch.no_grad()
def test_small_inputs(entry, golden):
    """Epsilons of norms; those of the VQGAN are tested with it."""
    network, seed = make_teco(golden), golden["about"]["seed"]
    places = {leaf.path: name for name, leaf in leaves(network).items()}
    tested = 0
    for match in re.finditer(r"(\w+): (\S+)/(\S+) on RS\((\d+)\) (\([\d,]+\))", entry["input"]):
        name, path = match[1], f"{match[2]}/{match[3]}"
        if name.startswith("vqgan"):
            continue
        x = np.random.RandomState(seed + int(match[4])).standard_normal(golden_files.number(match[5])) * 1e-3
        x = torch.from_numpy(x.astype(np.float32))
        prefix = os.path.commonprefix([ours for flax, ours in places.items() if flax.startswith(f"{path}/")])
        module = network.get_submodule(prefix.rpartition(".")[0])
        found = module(x.movedim(-1, 1)).movedim(1, -1) if x.ndim == 4 else module(x)
        close(found, entry[name], name)
        tested += 1
    assert tested


@golden_files.entries("teco", "train*")
def test_training(entry, golden):
    config = golden["config"]["teco"]
    network, (codes, actions) = make_teco(golden), shared_inputs()
    text, schedule = entry["input"], config["z_git"]["mask_schedule"]
    x = embed(make_vqgan(golden), codes)
    indices = torch.tensor(entry["kept_idx"])
    draws = training_draws(network, indices, schedule, text, True, legacy=True)
    assert draws.hidden.sum(2).T.tolist() == entry["masked_counts"]
    if "kept_idx_clamped" in entry:
        assert draws.frames.tolist() == entry["kept_idx_clamped"]
    found = losses(network, x, codes, actions, draws)
    check_terms(found, entry)
    for name in ("commitment_loss", "codebook_loss", "perplexity"):
        assert getattr(found.quantized, name).item() == pytest.approx(entry[name], rel=1e-4), name
    found.total.backward()
    gradients = {leaf.path: network.get_parameter(name).grad for name, leaf in leaves(network).items()}
    norms = {name: gradient.norm().item() for name, gradient in gradients.items() if gradient is not None}
    assert len(norms) == len(gradients)
    for name, norm in entry["grad_norms"].items():
        assert norms[name] == pytest.approx(norm, rel=1e-3), name
    assert sum(n**2 for n in norms.values()) ** 0.5 == pytest.approx(entry["grad_norm_total"], rel=1e-3)
    table = network.action_embeds.weight.grad
    assert table is not None and table[-1].norm().item() == pytest.approx(entry["grad_null_action_row"], rel=1e-3)


VARIANTS = {"no_action_dropout": {}, "use_actions_false": {"use_actions": False}, "drop_loss_none": {}}


@golden_files.entries("teco", "train*")
@torch.no_grad()
def test_variants_of_training(entry, golden):
    config = golden["config"]["teco"]
    variants = [name for name, value in entry.items() if isinstance(value, dict) and "recon_loss" in value]
    assert set(variants) <= set(VARIANTS)
    codes, actions = shared_inputs()
    x = embed(make_vqgan(golden), codes)
    for name in variants:
        network = make_teco(golden, **VARIANTS[name])
        is_whole = name == "drop_loss_none"
        indices = torch.arange(network.seq_len - network.n_cond) if is_whole else torch.tensor(entry["kept_idx"])
        schedule = config["z_git"]["mask_schedule"]
        draws = training_draws(network, indices, schedule, entry["input"], False, legacy=True)
        check_terms(losses(network, x, codes, actions, draws), entry[name])


def check_terms(found, expected):
    assert found.recon_loss.mean().item() == pytest.approx(expected["recon_loss"], rel=1e-4)
    assert found.trans_loss.mean().item() == pytest.approx(expected["trans_loss"], rel=1e-4)
    assert found.total.item() == pytest.approx(expected["loss"], rel=1e-4)


@golden_files.entries("teco", "n_cond*")
@torch.no_grad()
def test_several_frames_that_are_not_quantized(entry, golden):
    match = re.search(r"n_cond=(\d+)", entry["input"])
    assert match is not None
    network, cond, z, _, actions = given(golden, n_cond=int(match[1]))
    close(last(cond), entry["cond"], "cond")
    close(last(z), entry["z"], "z")
    close(last(network.predict(cond, z, actions)), entry["h"], "h")


@golden_files.entries("teco", "sampler*")
@torch.no_grad()
def test_sampler_of_tokens(entry, golden):
    network, cond, z, _, actions = given(golden)
    h = network.predict(cond, z, actions)[:, 0]
    for model in (network, prepare(network)):
        noise = make_noise(network, *generators(entry["input"]))
        assert sample_codes(model, h, noise, drawing()).flatten().tolist() == entry["codes"]["values"]
        assert (noise.num_orders, noise.num_calls) == (entry["permutations"], entry["forward_calls"])


@golden_files.entries("teco", "timestep*")
@torch.no_grad()
def test_one_frame(entry, golden):
    network, cond, z, _, actions = given(golden)
    match = re.search(r"t=(\d+)", entry["input"])
    assert match is not None
    frame = int(match[1])
    noise = make_noise(network, *generators(entry["input"]))
    h = network.predict(cond, z, actions)[:, frame - network.n_cond]
    codes = sample_codes(network, h, noise, drawing()).unflatten(1, network.cells)
    z = network.lookup(codes.unsqueeze(1))[:, 0]
    close(last(z), entry["z"], "z")
    assert network.decode(h, z).argmax(1).flatten().tolist() == entry["frame_codes"]["values"]


@golden_files.entries("teco", "rollout*")
@pytest.mark.parametrize("prepared", [False, True])
@torch.no_grad()
def test_rollout(entry, golden, prepared):
    network, vqgan = make_teco(golden), make_vqgan(golden)
    codes, actions = random(entry["input"], "randint", 0), random(entry["input"], "randint", 1)
    match = re.search(r"context (\d+).*?eval_seq_len (\d+)", entry["input"])
    assert match is not None
    context, length = int(match[1]), int(match[2])
    noise = make_noise(network, *generators(entry["input"])[2:])
    network = prepare(network) if prepared else network
    rollout = Rollout(network, vqgan, codes[:, :context], actions[:, :context])
    sample = functools.partial(sample_codes, network, noise=noise, options=drawing())
    made = [rollout.step(actions[:, frame], sample) for frame in range(context, length)]
    whole = torch.cat([codes[:, :context], torch.stack(made, dim=1)], dim=1)
    assert whole.flatten(2).sum(2).tolist() == entry["per_frame_code_sums"]
    assert whole[:, context:, 0].tolist() == entry["generated_first_row"]
    assert whole[0, -1].flatten().tolist() == entry["last_frame"]["values"]
    assert (noise.num_orders, noise.num_calls) == (entry["permutations"], entry["forward_calls"])
    pixels = vqgan.decode(whole).clamp(*entry["pixels_clipped_to"]).permute(0, 2, 3, 4, 1)
    golden_files.check(pixels, entry["pixels"], single=5e-4)


@golden_files.entries("teco", "lr*")
def test_learning_rate(entry, golden):
    for kind, values in entry.items():
        schedule = Schedule(1e-4, kind, 5000, 1_000_000 - 5000)
        for step, rate in values.items():
            assert schedule.at(int(step)) == pytest.approx(rate, rel=1e-3, abs=2e-11), (kind, step)


@golden_files.entries("teco", "uint8_roundtrip*")
def test_values_of_pixels(entry, golden):
    """The release truncates pixels, which changes some; here they are rounded, and all come back as they were."""
    values = torch.arange(256, dtype=torch.uint8)
    x = 2 * (values / 255.0) - 1
    truncated = ((x * 0.5 + 0.5) * 255).to(torch.uint8).int() - values.int()
    assert torch.nonzero(truncated).flatten().tolist() == entry["changed"]
    assert sorted(set(truncated.tolist())) == sorted(entry["change"])
    frames = x.expand(1, 3, 1, 1, -1)
    assert torch.equal(quantize(frames)[0, 0, 0, :, 0], values)
