"""Quantizers: published numbers, the literal formulas, ranks, resuming."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests import golden_files
from tests.ranks import run_ranks
from training.modules import quantizers
from training.modules.quantizers import (
    CosineQuantizer,
    EMAQuantizer,
    FiniteScalarQuantizer,
    LookupFreeQuantizer,
    VectorQuantizer,
    make_quantizer,
)


def close(found, expected, where=""):
    golden_files.check(found, expected, where=where)


# ----------------------------------------------------------------------------
# Published numbers.


class Recorder(np.random.RandomState):
    """A generator that lists its draws as the golden files do."""

    def __init__(self, seed):
        super().__init__(seed)
        self.draws = []

    def permutation(self, n):
        """See the base class."""
        values = super().permutation(n)
        self.draws.append(["perm", values.tolist()])
        return values

    def standard_normal(self, size):
        """See the base class."""
        self.draws.append(["normal", list(size)])
        return super().standard_normal(size)


def seed_of(text, **names):
    start = text.index("(") + 1
    return golden_files.number(text[start : text.index(")")], **names)


@golden_files.cases("tats", "codebook", "codebook_[!2]*")
def test_ema_codebook(entry, golden):
    codebook = EMAQuantizer(entry["K"], entry["D"], entry["restart"], entry["thres"], legacy=True)
    for step, expected in enumerate(entry["steps"]):
        (z,) = golden_files.normals(entry["z"], step=step)
        rng = Recorder(seed_of(entry["noise"], step=step))
        quantized = codebook(z, rng)
        assert rng.draws == expected["draws"]
        assert quantized.codes.flatten().tolist() == expected["codes"]
        close(quantized.commitment_loss, expected["commit"], "commit")
        close(quantized.perplexity, expected["perplexity"], "perplexity")
        close(quantized.output, expected["out"], "out")
        for name in ("N", "z_avg", "embeddings"):
            close(getattr(codebook, name), expected[name], name)


RANKS = """
import json, sys
import numpy as np
import torch
from tests import golden_files
from torch_utils import distributed
from training.modules.quantizers import EMAQuantizer

distributed.init()
entry = json.loads(sys.argv[1])
rank, legacy = distributed.get_rank(), entry.get("legacy", True)
codebook = EMAQuantizer(entry["K"], entry["D"], entry["restart"], entry["thres"], legacy=legacy)
for step in range(entry["num_steps"]):
    names = {"rank": rank if legacy else 0, "step": step}
    rng = golden_files.generator(entry["perm"], **names)
    (z,) = golden_files.normals(entry["z"], rank=rank, step=step)
    q = codebook(z, rng)
    print(json.dumps({
        "codes": q.codes.flatten().tolist(), "commit": q.commitment_loss.item(), "perplexity": q.perplexity.item(),
        "N": codebook.N.tolist(), "embeddings": codebook.embeddings.flatten().tolist(),
        "z_avg": codebook.z_avg.flatten().tolist(),
    }))
distributed.shutdown()
"""


def on_two_ranks(entry, num_steps):
    """What two ranks report, step by step."""
    results = run_ranks(RANKS, json.dumps({**entry, "num_steps": num_steps}))
    assert [code for code, _, _ in results] == [0, 0], results[0][2] + results[1][2]
    return [[json.loads(line) for line in printed.splitlines()] for _, printed, _ in results]


@golden_files.entries("tats", "codebook_2ranks*")
def test_ema_codebook_of_two_ranks(entry, golden):
    given = {name: value for name, value in entry.items() if name != "ranks"}
    for found, expected in zip(on_two_ranks(given, len(entry["ranks"][0])), entry["ranks"], strict=True):
        for one, other in zip(found, expected, strict=True):
            assert one["codes"] == other["codes"]
            for name in other.keys() - {"codes"}:
                close(one[name], other[name], name)


@golden_files.entries("river", "quantiser*")
def test_codebook_loss_in_the_weighting_of_taming_transformers(entry, golden):
    z, table = golden_files.normals(entry["input"], golden["about"]["seed"])
    z.requires_grad_(True)
    quantizer = VectorQuantizer(len(table), table.shape[1], legacy=True)
    quantizer.embedding.weight.data.copy_(table)
    quantized = quantizer(z)
    assert quantized.loss.item() == pytest.approx(entry["loss"], rel=1e-4)
    close(quantized.output, entry["q"], "q")
    (quantized.loss + quantized.output.square().mean()).backward()
    close(z.grad, entry["grad_z"], "grad_z")
    close(quantizer.embedding.weight.grad, entry["grad_codebook"], "grad_codebook")


@golden_files.entries("teco", "codebook*")
def test_codebook_of_teco(entry, golden):
    about, config = golden["about"], golden["config"]["teco"]
    shapes = {name: tuple(shape) for name, shape in golden["parameters"]["names"]}
    weights = golden_files.normal_fill(shapes, about["base"], golden_files.teco_scale)
    sizes = config["codebook"]
    quantizer = CosineQuantizer(sizes["n_codes"], config["embedding_dim"], sizes["proj_dim"])
    places = {
        "codebook/codebook": quantizer.codebook,
        "codebook/Dense_0/kernel": quantizer.project_in.weight,
        "codebook/Dense_1/kernel": quantizer.project_out.weight,
    }
    for name, parameter in places.items():
        value = torch.from_numpy(weights[name])
        parameter.data.copy_(value if parameter is quantizer.codebook else value.T)
    (z,) = golden_files.normals(entry["input"], about["seed"])
    z.requires_grad_(True)
    quantized = quantizer(z.movedim(-1, 1))
    assert quantized.codes.flatten().tolist() == entry["indices"]["values"]
    golden_files.check(quantized.output.movedim(1, -1), entry["embeddings"], single=5e-5)
    close(quantized.commitment_loss, entry["commitment_loss"])
    close(quantized.codebook_loss, entry["codebook_loss"])
    close(quantized.perplexity, entry["perplexity"])
    (quantized.output.square().mean() + quantized.loss).backward()
    golden_files.check(z.grad, entry["grad_z"], single=5e-5)
    for name, norm in entry["grad_norms"].items():
        gradient = places[name].grad
        assert gradient is not None and gradient.norm().item() == pytest.approx(norm, rel=1e-3), name
    (codes,) = golden_files.draws(entry["lookup_input"], about["seed"])
    looked_up = quantizer.lookup(torch.from_numpy(codes)).movedim(1, -1)
    golden_files.check(looked_up, entry["lookup"], single=5e-5)


# ----------------------------------------------------------------------------
# The literal formulas.


def literal_ema(codebook, z, drawn):
    """One training forward of the codebook with one-hot vectors and dense products; changes the codebook."""
    rows = z.movedim(1, -1).flatten(0, -2)
    distances = rows.square().sum(1, keepdim=True) - 2 * rows @ codebook.embeddings.T
    distances = distances + codebook.embeddings.square().sum(1)
    one_hot = F.one_hot(distances.argmin(1), codebook.num_codes).float()
    found = one_hot @ codebook.embeddings
    p = one_hot.mean(0)
    codebook.N.mul_(0.99).add_(0.01 * one_hot.sum(0))
    codebook.z_avg.mul_(0.99).add_(0.01 * one_hot.T @ rows)
    total = codebook.N.sum()
    weights = (codebook.N + 1e-7) / (total + codebook.num_codes * 1e-7) * total
    codebook.embeddings.copy_(codebook.z_avg / weights[:, None])
    unused = (codebook.N < codebook.restart_below)[:, None]
    codebook.embeddings.copy_(torch.where(unused, drawn, codebook.embeddings))
    codebook.z_avg.copy_(torch.where(unused, drawn, codebook.z_avg))
    codebook.N.copy_(torch.where(unused[:, 0], torch.ones(()), codebook.N))
    return found, 0.25 * (rows - found).square().mean(), (-(p * (p + 1e-10).log()).sum()).exp()


@pytest.mark.parametrize("search_entries", [1 << 24, 40])
def test_codebook_equals_the_literal_formula(search_entries, monkeypatch):
    monkeypatch.setattr(quantizers, "SEARCH_ENTRIES", search_entries)
    own, literal = EMAQuantizer(12, 3), EMAQuantizer(12, 3)
    for step in range(4):
        z = torch.from_numpy(np.random.RandomState(step).standard_normal((2, 3, 2, 2, 2))).float()
        own._initialise(quantizers.to_rows(z), np.random.RandomState(99))
        if step == 0:
            literal.load_state_dict(own.state_dict())
        quantized = own(z, np.random.RandomState(step))
        drawn = literal._draw(quantizers.to_rows(z), np.random.RandomState(step))
        found, commitment, perplexity = literal_ema(literal, z, drawn)
        torch.testing.assert_close(quantizers.to_rows(quantized.output), found)
        torch.testing.assert_close(quantized.commitment_loss, commitment)
        torch.testing.assert_close(quantized.perplexity, perplexity)
        for name, buffer in literal.named_buffers():
            torch.testing.assert_close(own.get_buffer(name), buffer)


def test_no_gradient_reaches_the_codebook_and_all_of_it_the_latents():
    codebook = EMAQuantizer(4, 2)
    z = torch.randn(1, 2, 3, requires_grad=True)
    quantized = codebook(z, np.random.RandomState(0))
    quantized.output.sum().backward()
    assert z.grad is not None and (z.grad == 1).all()
    assert not list(codebook.parameters())


def test_eval_mode_changes_nothing():
    codebook = EMAQuantizer(4, 2).eval()
    before = {name: value.clone() for name, value in codebook.state_dict().items()}
    codebook(torch.randn(1, 2, 3))
    assert all(torch.equal(value, before[name]) for name, value in codebook.state_dict().items())


def test_resuming_keeps_the_codebook():
    """The release forgets that the codebook was initialised, and replaces it by the first batch."""
    first = EMAQuantizer(4, 2, restart=False)
    first(torch.randn(1, 2, 9), np.random.RandomState(0))
    resumed = EMAQuantizer(4, 2, restart=False)
    resumed.load_state_dict(first.state_dict())
    z = torch.randn(1, 2, 9)
    expected, found = (codebook(z, np.random.RandomState(1)) for codebook in (first, resumed))
    assert torch.equal(found.output, expected.output)
    assert torch.equal(first.embeddings, resumed.embeddings)


def test_restarted_codes_begin_anew():
    """In the release they keep their averages, and are overwritten again until chosen often."""
    codebook = EMAQuantizer(8, 2)
    codebook(torch.randn(1, 2, 64), np.random.RandomState(0))
    codebook.N[3] = 0.0
    codebook.z_avg[3] = 7.0
    codebook.embeddings[3] = 100.0
    codebook(torch.randn(1, 2, 64), np.random.RandomState(1))
    assert codebook.N[3] == 1
    assert torch.equal(codebook.z_avg[3], codebook.embeddings[3])
    assert codebook.embeddings[3].abs().max() < 10


def test_two_ranks_learn_as_one_process_does():
    """Counts, initialisation and restarts are those of the joint batch."""
    entry = {
        "K": 6, "D": 3, "restart": True, "thres": 1.0, "legacy": False, "perm": "RandomState(800 + step)",
        "z": "RandomState(700 + 10*rank + step).standard_normal((1,3,2,2,2))",
    }  # fmt: skip
    first, second = on_two_ranks(entry, 4)
    one = EMAQuantizer(entry["K"], entry["D"])
    for step in range(4):
        z = torch.cat([golden_files.normals(entry["z"], rank=rank, step=step)[0] for rank in range(2)])
        quantized = one(z, np.random.RandomState(800 + step))
        assert quantized.codes.flatten().tolist() == first[step]["codes"] + second[step]["codes"]
        for name in ("N", "z_avg", "embeddings"):
            assert first[step][name] == second[step][name]
            np.testing.assert_allclose(first[step][name], getattr(one, name).flatten(), atol=1e-6)


def test_both_weightings_of_the_codebook_loss():
    z, table = torch.randn(2, 3, 4), torch.randn(5, 3)
    for legacy, weights in ((False, (0.25, 1.0)), (True, (1.0, 0.25))):
        quantizer = VectorQuantizer(5, 3, legacy)
        quantizer.embedding.weight.data.copy_(table)
        quantized = quantizer(z)
        error = (z - quantizer.lookup(quantized.codes)).square().mean()
        torch.testing.assert_close(quantized.commitment_loss, weights[0] * error)
        torch.testing.assert_close(quantized.codebook_loss, weights[1] * error)


# ----------------------------------------------------------------------------
# Without a codebook.


@pytest.mark.parametrize("levels", [(3, 5), (3, 4, 7), (8, 5, 5, 5)])
def test_every_code_of_fsq_is_reached(levels):
    quantizer = FiniteScalarQuantizer(levels, len(levels))
    codes = torch.arange(math.prod(levels)).view(1, -1)
    vectors = quantizer.lookup(codes)  # (1, levels, K)
    assert len({tuple(v) for v in vectors[0].T.tolist()}) == codes.numel()
    assert vectors.min() >= -1 and vectors.max() <= 1
    axes = [torch.linspace(-4, 4, 41)] * len(levels)
    grid = torch.cartesian_prod(*axes).T.unsqueeze(0) if len(levels) < 4 else 4 * torch.rand(1, 4, 100_000) - 2
    assert len(quantizer.encode(grid).unique()) == codes.numel()
    quantized = quantizer(grid[..., :1000].requires_grad_(True))
    torch.testing.assert_close(quantized.output, quantizer.lookup(quantized.codes))
    assert not quantizer.encode(torch.zeros(1, len(levels), 1)).isnan().any()


def test_codes_of_lfq_are_signs():
    quantizer = LookupFreeQuantizer(5, 5)
    codes = torch.arange(32).view(1, -1)
    assert torch.equal(quantizer.encode(quantizer.lookup(codes) * 0.3), codes)
    quantized = quantizer(torch.randn(2, 5, 3, 3))
    assert torch.equal(quantized.output, quantizer.lookup(quantized.codes))


@pytest.mark.parametrize("group_bits", [1, 2, 4])
def test_entropy_of_lfq_equals_the_sum_over_codes(group_bits):
    quantizer = LookupFreeQuantizer(4, 4, group_bits=group_bits)
    values = torch.randn(7, 4)
    expected = torch.zeros(())
    for start in range(0, 4, group_bits):
        part = values[:, start : start + group_bits]
        signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=group_bits)))
        p = (-(part[:, None] - signs).square().sum(-1)).softmax(1)  # (positions, codes of the group)
        expected = expected - (p * p.log()).sum(1).mean() + (p.mean(0) * p.mean(0).log()).sum()
    torch.testing.assert_close(quantizer.entropy_loss(values), expected)


@pytest.mark.parametrize("kind", [kind for kind in quantizers.KINDS if kind != "none"])
def test_all_have_one_interface(kind):
    levels = (4, 4) if kind == "fsq" else ()
    quantizer = make_quantizer(16, 6, kind, levels=levels)
    z = torch.randn(2, 6, 3, 4, 5, requires_grad=True)
    quantized = quantizer(z, np.random.RandomState(0))
    assert quantized.output.shape == z.shape and quantized.codes.shape == (2, 3, 4, 5)
    assert 0 <= quantized.codes.min() and quantized.codes.max() < quantizer.num_codes == 16
    assert 1 <= quantized.perplexity <= 16.001 and 0 < quantized.usage <= 1
    (quantized.output.square().sum() + quantized.loss).backward()
    assert z.grad is not None and z.grad.abs().sum() > 0
    quantizer.eval()
    quantized = quantizer(z)
    assert torch.equal(quantizer.encode(z), quantized.codes)
    torch.testing.assert_close(quantizer.lookup(quantized.codes), quantized.output)
    assert quantizer(z[:, :, :0]).codes.shape == (2, 0, 4, 5)


def test_continuous_latents_carry_noise_in_training_alone():
    quantizer, z = make_quantizer(0, 6, "none", noise=0.5), torch.randn(2, 6, 3, 40, 50)
    one, two = (quantizer(z, np.random.RandomState(seed)).output for seed in (0, 0))
    assert torch.equal(one, two) and float((one - z).std()) == pytest.approx(0.5, rel=0.05)
    quantized = quantizer(z, np.random.RandomState(1))
    assert not torch.equal(quantized.output, one)
    assert float(quantized.loss) == pytest.approx(1e-4 * float(z.square().mean()))
    quantizer.eval()
    assert torch.equal(quantizer(z, np.random.RandomState(0)).output, z) and quantizer.num_codes == 0
    for refused in (quantizer.encode, quantizer.lookup):
        with pytest.raises(ValueError, match="has continuous latents, no codes"):
            refused(z)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "vae"}, "unknown: use one of ema"),
        ({"kind": "fsq", "levels": (3, 3)}, "make 9 codes"),
        ({"kind": "fsq", "levels": (2, 6)}, "at least 3"),
        ({"kind": "lfq"}, "power of two"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        make_quantizer(12, 6, **arguments)
