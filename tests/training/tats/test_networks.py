"""The transformer of TATS against published numbers, and its cached form against the plain one."""

import re

import pytest
import torch
from torch.nn import functional as F

from tests import golden_files
from tests.training.tats import golden_networks
from training.modules.vqgan3d import VQGAN3D
from training.tats.networks import TATSTransformer, infill_mask, parameter_groups
from training.tats.system import code_logits, code_losses


def check_rows(network, entry):
    x = golden_networks.ids(entry["idx"], entry["V"], tuple(entry["logits"]["shape"][:2]))
    logits = network(x)
    golden_files.check(logits, entry["logits"])
    for key, wanted in entry.items():
        if match := re.fullmatch(r"row(\d+)", key):
            golden_files.check(logits[0, int(match[1]), : len(wanted)], wanted)


@golden_files.entries("tats", "gpt_causal*", "gpt_interp", "gpt_interp_[!l]*")
def test_logits_are_the_published_ones(entry, golden):
    arguments = {"layers": entry["L"], "heads": entry["H"], "width": entry["d"], "block_size": entry["block"]}
    network = golden_networks.make(
        golden, num_codes=entry["V"], conditions=0, unmasked=entry["n_unmasked"], **arguments
    )
    check_rows(network, entry)
    if "mask_rows" in entry:
        rows = infill_mask(entry["block"], entry["n_unmasked"]).int().tolist()
        assert ["".join(map(str, row)) for row in rows] == entry["mask_rows"]


@golden_files.entries("tats", "gpt_vtokens_pos*")
def test_a_table_of_positions_adds_the_published_rows(entry, golden):
    network = golden_networks.make(
        golden, num_codes=entry["V"], conditions=0, layers=entry["L"], heads=entry["H"], width=entry["d"],
        block_size=entry["block"], table=entry["table"][1:4],
    )  # fmt: skip
    inner, rest = entry["idx"].split(" mod ")
    vocabulary, rows, columns = map(int, re.findall(r"\d+", rest))
    x = golden_networks.ids(inner, vocabulary, (rows, columns))
    golden_files.check(network(x, network.table_rows(entry["cbox"])), entry["logits"])
    for key, wanted in entry.items():
        if match := re.fullmatch(r"tbox(\d)(\d)_first\d+_logits", key):  # a range of time, and the first box for all
            rows = network.table_rows(entry["cbox"][0], slice(int(match[1]), int(match[2])))
            golden_files.check(network(x[:, : wanted["shape"][1]], rows), wanted)


def published_condition(entry, golden):
    """Return the ids of an entry's condition; those of audio are checked against its tokenizer."""
    condition = torch.tensor(entry["cond"])
    if "stft_vqgan" in entry:
        facts = entry["stft_vqgan"]
        shape = facts["x"]
        book = VQGAN3D(
            shape[3], shape[4], shape[2], hidden=facts["n_hiddens"], embedding_dim=facts.get("embedding_dim", 8),
            num_codes=facts["n_codes"], channels=1,
        )  # fmt: skip
        weights = golden_files.wave_fill(book.state_dict(), golden_files.salt_of(golden))
        book.load_state_dict(weights)
        book.eval()
        codes = book.quantizer.encode(book.features(golden_files.wave(shape, facts["f"])))
        assert codes.flatten(1).tolist() == condition.tolist()
    return condition


@golden_files.entries("tats", "gpt_class*", "gpt_uncond*", "gpt_interp_loss*", "gpt_text*", "gpt_stft*")
def test_steps_are_the_published_ones(entry, golden):
    condition, z = published_condition(entry, golden), torch.tensor(entry["z"])
    network = golden_networks.make(
        golden, num_codes=entry["K"], conditions=entry["cond_vocab"], condition_length=condition.shape[1],
        layers=entry["L"], heads=entry["H"], width=entry["d"], block_size=entry["block"],
        unmasked=entry["n_unmasked"],
    )  # fmt: skip
    groups = parameter_groups(network, 0.01)
    assert [[len(group["params"]), group["weight_decay"]] for group in groups] == entry["groups"]
    optimizer = torch.optim.AdamW(groups, lr=entry["lr"], betas=(0.9, 0.95), eps=1e-8)
    for step in entry["steps"]:
        golden_files.check(code_logits(network, condition, z), step["logits"])
        found = code_losses(network, condition, z)
        golden_files.check(found["loss"].mean(), step["loss"])
        golden_files.check(found["top1_accuracy"].mean() * 100, step["acc1"])
        golden_files.check(found["top5_accuracy"].mean() * 100, step["acc5"])
        optimizer.zero_grad()
        found["loss"].mean().backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
        golden_files.check(norm, step["grad_norm"])
        optimizer.step()
    golden_files.check(code_losses(network, condition, z)["loss"].mean(), entry["loss_after"])
    state = network.state_dict()
    for name, digest in entry["after"].items():
        golden_files.check(state[name], digest, where=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("conditions", [0, 7])
def test_cached_logits_equal_those_of_a_whole_pass(dtype, conditions):
    torch.manual_seed(0)
    network = TATSTransformer(20, conditions, 2, 12, 2, 2, 16).to(dtype)
    torch.nn.init.normal_(network.pos_emb)
    copy = network.for_sampling(dtype)
    ids = torch.randint(20 + conditions, (3, 11))
    cache = copy.cache(3, 12)
    found = [copy.feed(ids[:, :4], slice(0, 4), cache, causal=True)]
    found += [copy.feed(ids[:, i : i + 1], slice(i, i + 1), cache) for i in range(4, 11)]
    wanted = network(ids)[:, 3:, conditions:]
    assert torch.allclose(torch.stack(found, 1), wanted, atol=1e-5)


def test_a_table_of_all_positions_is_used_in_the_cached_form():
    torch.manual_seed(0)
    network = TATSTransformer(20, 1, 1, 8, 1, 2, 16, table=[2, 2, 2])
    torch.nn.init.normal_(network.vtokens_pos_emb)
    ids, rows, cache = torch.randint(20, (2, 8)), network.table_rows(), network.cache(2, 8)
    network.feed(ids[:, :5], slice(0, 5), cache, rows, causal=True)
    found = network.feed(ids[:, 5:6], slice(5, 6), cache, rows)
    assert torch.allclose(found, network(ids, rows)[:, 5], atol=1e-5)


def test_initial_weights_are_as_published():
    network = TATSTransformer(300, 2, 1, 16, 1, 4, 64)
    assert network.pos_emb.abs().max() == 0
    assert abs(network.tok_emb.weight.std().item() - 0.02) < 1e-3
    assert network.state_dict()["blocks.0.attn.key.bias"].abs().max() == 0
    with torch.no_grad():
        loss = F.cross_entropy(network(torch.zeros(1, 16, dtype=torch.int64)).flatten(0, 1), torch.arange(16))
    assert abs(loss.item() - torch.tensor(302.0).log()) < 0.2


def test_widths_that_heads_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="not divisible among 3 heads"):
        TATSTransformer(20, heads=3, width=16)
