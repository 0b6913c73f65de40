"""Training of TATS: what is learned, resuming, options that do not fit, and files."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from tests.training.tats import tiny
from training.config import TrainOptions
from training.contract import CodeClip, DataFacts, Run, Stream, TextClip
from training.network_file import load_bundle, save_bundle
from training.sampling import Prompt, open_sampler
from training.tats.presets import INTERPOLATION
from training.tats.presets import TATS as PRESETS
from training.tats.sampling import Between, Facts, LongVideos
from training.tats.system import TATS, NetworkOptions, TATSInterpolation, TATSOptions, code_logits
from training.tats.text import NUM_MERGES, BytePairs, byte_symbols, read_merges

SMALL = {"layers": 1, "heads": 2, "width": 16, "lr": 3e-3}


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """Return the path of a tokenizer."""
    path = tmp_path_factory.mktemp("book") / "tokenizer.pkl"
    save_bundle(tiny.Bundle({"tokenizer": tiny.tokenizer()}, "tokenizer"), path)
    return str(path)


def make(book, kind: Any = TATS, batch=2, grad_accum=1, **options):
    run = Run(batch=batch, grad_accum=grad_accum, steps=10)
    return kind(kind.Options(**{**SMALL, "tokenizer": book, **({"frames": 8} if kind is TATS else {}), **options}), run)


def batch_of(system, step=0, batch=2):
    """A batch whose codes count up from a number of the clip."""
    (spec,) = system.batch_spec(step)
    found = {}
    for part in spec.parts:
        first = torch.arange(batch) + step
        if isinstance(part, CodeClip):
            codes = first.unsqueeze(1) + torch.arange(part.count * tiny.CODES)
            found[part.name] = (codes % 9).view(batch, part.count, 2, 2)
        elif isinstance(part, TextClip):
            found[part.name] = (first % 3).unsqueeze(1) + torch.arange(part.length)
        else:
            assert isinstance(part, Stream)
            found[part.name] = (first % 3).unsqueeze(1).expand(-1, part.count)
    return found


def run(system, steps):
    return [system.step(iter([batch_of(system, step)]), step) for step in steps][-1]


@pytest.mark.parametrize("kind", [TATS, TATSInterpolation])
def test_it_learns(kind, book):
    system = make(book, kind, lr=1e-2)
    first = run(system, [0])["loss/loss"].mean()
    last = run(system, range(1, 80))["loss/loss"].mean()
    assert last < 0.3 * first
    found = system.validate(iter([batch_of(system, 3)]))
    assert found["loss/top1_accuracy"].mean() > 0.9 and found["loss/top5_accuracy"].mean() > 0.99


def test_resuming_continues_bit_for_bit(book):
    whole, first, second = (make(book) for _ in range(3))
    run(whole, range(4))
    run(first, range(2))
    for name, module in second.modules.items():
        module.load_state_dict(first.modules[name].state_dict())
        second.optimizers[name].load_state_dict(first.optimizers[name].state_dict())
    run(second, range(2, 4))
    for a, b in zip(whole.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_rounds_change_nothing(book):
    one, two = make(book), make(book, grad_accum=2)
    for system in (one, two):
        run(system, range(2))
    for a, b in zip(one.network.parameters(), two.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_clips_and_windows(book):
    system = make(book, frames=32, every=4)
    (spec,) = system.batch_spec(0)
    assert (spec.num_frames, spec.parts) == (20, (CodeClip("codes", 0, 2, 4),))
    assert system.network.block_size == 8 and system.export().options["every"] == 4
    (spec,) = make(book, TATSInterpolation, condition="label", classes=3).batch_spec(0)
    assert spec.num_frames == 20 and spec.parts[1] == Stream("label", 0, 1)


def test_the_start_is_an_id_of_its_own_except_as_published(book):
    assert make(book).network.conditions == 1
    assert make(book, legacy=True).network.conditions == 0


def test_in_filling_counts_the_codes_between(book):
    """The network sees all others, so that they teach nothing; the release counts them all the same."""
    system = make(book, TATSInterpolation)
    batch = batch_of(system)
    codes = batch["codes"].flatten(1)
    logits = code_logits(system.network, torch.zeros(2, 1, dtype=torch.int64), codes)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), codes + 1, reduction="none")
    n = tiny.CODES
    assert torch.allclose(system.losses(batch)["loss"], losses[:, n : 4 * n].mean(1))
    legacy = make(book, TATSInterpolation, legacy=True)
    assert legacy.counted_codes() == slice(None)


def test_labels_choose_the_first_id(book):
    system = make(book, condition="label", classes=3, lr=1e-2)
    assert system.inputs().streams == ("label",) and system.network.conditions == 3
    run(system, range(30))
    sampler = open_saved(system)
    assert isinstance(sampler, LongVideos) and sampler.num_labels == 3
    with pytest.raises(ValueError, match="the dataset has 3 classes, but --classes is 2: raise it"):
        few = make(book, condition="label", classes=2)
        few.use_facts(DataFacts(30.0, {"label": 3}))


@pytest.fixture(scope="module")
def descriptions(tmp_path_factory):
    """Return options for descriptions, with a list of merges of the published length."""
    folder = tmp_path_factory.mktemp("texts")
    symbols = list(byte_symbols().values())
    lines = [f"{a} {b}" for a, b in itertools.islice(itertools.product(symbols, symbols), NUM_MERGES)]
    (folder / "merges.txt").write_text("\n".join(["#version", *lines]))
    return {"condition": "text", "text_length": 10, "merges": str(folder / "merges.txt")}


def test_descriptions_become_ids(book, descriptions, tmp_path):
    system = make(book, **descriptions, lr=1e-2)
    pairs, texts = BytePairs(read_merges(descriptions["merges"])), ("one walks", "it jumps", "it falls")
    wanted = [pairs.ids_of(text, 10).tolist() for text in texts]
    ids = system.inputs().text_ids
    assert ids is not None and [ids(text).tolist() for text in texts] == wanted
    system.use_facts(DataFacts(30.0, texts=texts))
    assert system.condition_ids(batch_of(system)).shape == (2, 10) and system.network.block_size == 10 + 8 - 1
    first = run(system, [0])["loss/loss"].mean()
    assert run(system, range(1, 12))["loss/loss"].mean() < 0.8 * first
    sampler = open_saved(system, tmp_path / "text.pkl")
    assert isinstance(sampler, LongVideos) and sampler.takes_text and sampler.memory == 1
    prompt = Prompt()
    prompt.text = "it falls"
    assert sampler.condition_ids([0, 1], prompt).tolist() == [wanted[2]] * 2
    drawn = sampler.condition_ids(range(30), Prompt()).tolist()
    assert {tuple(row) for row in drawn} == {tuple(row) for row in wanted}
    without = LongVideos(sampler.network, sampler.tokenizer, Facts("text"))
    with pytest.raises(ValueError, match="give --text"):
        without.condition_ids([0], Prompt())


def open_saved(system, path=None):
    bundle = system.export()
    if path is None:
        return system.sampler()
    save_bundle(bundle, path)
    return open_sampler([str(path)])


def test_files_hold_the_tokenizer_and_begin_other_runs(book, tmp_path):
    system = make(book)
    run(system, range(2))
    sampler = open_saved(system, tmp_path / "tats.pkl")
    assert isinstance(sampler, LongVideos) and sampler.facts == system.facts()
    other = make(book)
    other.init_from(load_bundle(tmp_path / "tats.pkl"))
    for a, b in zip(system.network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(a, b)
    between = make(book, TATSInterpolation)
    assert isinstance(open_saved(between, tmp_path / "between.pkl"), Between)
    with pytest.raises(ValueError, match="do not fit"):
        between.init_from(load_bundle(tmp_path / "tats.pkl"))


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (TATS, {"condition": "label"}, "give --classes"),
        (TATS, {"classes": 3}, "add --condition=label"),
        (TATS, {"width": 30, "heads": 4}, "which 4 heads do not divide"),
        (TATSInterpolation, {"condition": "label"}, "give --classes"),
        (TATS, {"merges": "merges.txt"}, "add --condition=text"),
        (TATS, {"condition": "text", "table": True}, "--table needs a condition of one id"),
    ],
)
def test_options_that_do_not_fit_are_refused(kind, options, words):
    with pytest.raises(ValueError, match=words):
        kind.check(kind.Options(**{"tokenizer": "tokenizer.pkl", **options}), TrainOptions("tats", "runs", "data"))


@pytest.mark.parametrize("options", [{"frames": 6}, {"frames": 8, "every": 4}])
def test_clips_without_a_latent_frame_are_refused(options, book):
    with pytest.raises(ValueError, match="use a multiple of"):
        make(book, **options)


@pytest.mark.parametrize(("table", "kind"), [(PRESETS, TATSOptions), (INTERPOLATION, NetworkOptions)])
def test_presets_name_options_that_exist(table, kind):
    names = {field.name for field in dataclasses.fields(kind)}
    for preset in table.values():
        assert preset["model"].keys() <= names
        kind(**preset["model"])
    assert {"default", "toy", "ucf101", "sky", "taichi", "labdoom-tiny"} <= table.keys()


def test_the_published_network_has_the_published_size():
    with torch.device("meta"):
        network = tiny.TATSTransformer(conditions=0)
    assert sum(parameter.numel() for parameter in network.parameters()) == 336_914_432
    assert len(network.state_dict()) == 413 - 24  # the release stores a mask for each block
