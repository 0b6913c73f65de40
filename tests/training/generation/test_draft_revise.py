"""Drafts and revisions: the fast way draws what the published one draws, and visits what it should."""

import dataclasses

import pytest
import torch

from training.generation.draft_revise import (
    DraftSettings,
    Draw,
    Fast,
    Grid,
    Published,
    Query,
    draw_fast,
    from_mask,
    num_masked,
    race,
)
from training.generation.noise import KeyedNoise
from training.mebt.networks import MeBT

SHAPE = (4, 3, 2)
COUNT = 24
SETTINGS = [
    DraftSettings(6, choice_temperature=3.0),
    DraftSettings(6, choice_temperature=0.0, draw=Draw(0.6)),
    DraftSettings(40, schedule="linear", choice_schedule="constant", draw=Draw(1.0, 4)),
    DraftSettings(5, schedule="cube", choice_schedule="cosine", draw=Draw(1.2, 6, 0.7)),
    DraftSettings(5, "random", draw=Draw(1.0, None, 0.8)),
    DraftSettings(7, "bootstrap"),
    DraftSettings(30, "bootstrap", draw=Draw(0.0)),
    DraftSettings(1),
]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    modes = ["latent_enc", "latent_self", "latent_enc", "latent_dec", "lt2l", "latent_dec"]
    network = MeBT(19, SHAPE, 16, 2, 3, modes).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.mul_(6)  # so that predictions differ
    return network


class Counted:
    """A network's predictions, and what was asked for."""

    def __init__(self, network):
        self.network, self.queries = network, []

    def __call__(self, query):
        self.queries.append(query)
        return self.network.predict(query)


def both(network, seeds=(1, 2)):
    """The two implementations with equal random numbers, and what they ask."""
    counted = Counted(network), Counted(network)
    noise = KeyedNoise("test", seeds), KeyedNoise("test", seeds)
    return Fast(counted[0], noise[0]), Published(counted[1], noise[1], legacy=False), *counted


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("given", [0, 8])
def test_fast_drafts_are_published_drafts(network, settings, given):
    fast, published, asked, asked_all = both(network)
    start = Grid.given(torch.arange(COUNT).expand(2, -1) % 19, given)
    for count in (None, COUNT - given):
        changed = dataclasses.replace(settings, count=count)
        found, expected = (way.draft(start, changed, "name") for way in (fast, published))
        assert torch.equal(found.targets, expected.targets)
        assert torch.equal(found.contexts.sort(1).values, expected.contexts.sort(1).values)
        fixed = found.contexts
        assert torch.equal(found.codes.gather(1, fixed), expected.codes.gather(1, fixed))
    assert len(asked.queries) <= len(asked_all.queries)
    wanted, wanted_all = (sum(query.wanted for query in ways.queries) for ways in (asked, asked_all))
    assert wanted <= wanted_all


@pytest.mark.parametrize("parts", [1, 4, 5, COUNT])
def test_fast_parts_are_published_parts(network, parts):
    fast, published, asked, asked_all = both(network)
    draw = Draw(0.9, 5)
    found, expected = (way.draft_parts(Grid.empty(2, COUNT), parts, draw) for way in (fast, published))
    assert torch.equal(found.codes, expected.codes)
    assert sum(query.wanted for query in asked.queries) == COUNT
    revised, expected = (way.revise(Grid.given(found.codes, 0), parts, draw, 2) for way in (fast, published))
    assert torch.equal(revised.codes, expected.codes)
    assert len(asked.queries) == len(asked_all.queries) == 3 * parts


def test_ties_at_the_filter_are_drawn_alike(network):
    """Several logits equal the smallest that the filter keeps: all of them may be drawn."""
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0]).expand(2, 4000, 5)
    positions = torch.arange(4000).expand(2, -1)
    draw, noise = Draw(1.0, 2), KeyedNoise("test", (1, 2))
    found = draw_fast(logits, draw, noise, positions)[0]
    assert torch.equal(found, race(draw.probabilities(logits), noise.race(positions, 5))[0])
    assert set(found.flatten().tolist()) == {0, 1, 2, 3}


def test_a_draft_visits_each_position_once(network):
    fast, _, asked, _ = both(network)
    grid = fast.draft(Grid.empty(2, COUNT), DraftSettings(9, "random"))
    visited = torch.cat([query.wanted_targets for query in asked.queries], dim=1)
    assert visited.sort(1).values.tolist() == [list(range(COUNT))] * 2
    assert grid.targets.shape[1] == 0 and grid.contexts.shape[1] == COUNT


def test_a_revision_draws_each_position_once_a_round_from_all_others(network):
    fast, _, asked, _ = both(network)
    grid = Grid.given(torch.arange(COUNT).expand(2, -1) % 19, 4)
    revised = fast.revise(grid, 3, Draw(), rounds=4)
    for query in asked.queries:
        seen = torch.cat([query.contexts, query.targets], dim=1)
        assert seen.sort(1).values.tolist() == [list(range(COUNT))] * 2
    visited = torch.cat([query.wanted_targets for query in asked.queries], dim=1)
    assert visited.sort(1).values.tolist() == [sorted([*range(4, COUNT)] * 4)] * 2
    assert torch.equal(revised.codes[:, :4], grid.codes[:, :4])


def test_videos_do_not_depend_on_those_beside_them(network):
    settings = DraftSettings(6, choice_temperature=2.0)
    pair, alone = both(network, (1, 2))[0], both(network, (2,))[0]
    found = [pair.draft(Grid.empty(2, COUNT), settings).codes, alone.draft(Grid.empty(1, COUNT), settings).codes]
    assert torch.equal(found[0][1:], found[1])
    found = [way.revise(Grid.given(codes, 0), 4, Draw()).codes for way, codes in zip((pair, alone), found, strict=True)]
    assert torch.equal(found[0][1:], found[1])


def test_a_network_of_masks(network):
    """A function of codes and a mask is asked for the positions that are masked, whatever stands there."""
    table = torch.randn(19, 19, generator=torch.Generator().manual_seed(0))
    masks = []

    def predict(codes, mask):
        masks.append(mask)
        known = torch.where(mask, 0, codes)
        return table[known.roll(1, 1)] + table[known.roll(-1, 1)]

    ask = from_mask(predict)
    codes, contexts, targets = torch.arange(6)[None], torch.tensor([[0, 2, 4]]), torch.tensor([[5, 1, 3]])
    (logits,) = ask(Query(codes, contexts, targets, 2))
    assert masks[0].tolist() == [[False, True, False, True, False, True]]
    assert torch.equal(logits, (table[codes.roll(1, 1)] + table[codes.roll(-1, 1)])[:, [5, 1]])
    ways = [way(ask, KeyedNoise("test", (1, 2))) for way in (Fast, lambda *args: Published(*args, legacy=False))]
    drafts = [way.draft_parts(Grid.empty(2, 10), 4, Draw()).codes for way in ways]
    found = [way.revise(Grid.given(codes, 0), 4, Draw(), 2).codes for way, codes in zip(ways, drafts, strict=True)]
    assert torch.equal(*found)
    assert not torch.equal(found[0], drafts[0]) and found[0].max() < 19


def test_no_position_stays_masked():
    """In float64 the cosine of pi / 2 is above zero."""
    for count in (1, 16, 1024, 8192, 1_000_000):
        assert num_masked("cosine", 1.0, count) == 0
        assert num_masked("cosine", 0.0, count) == count


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Draw(-1.0), "temperature"),
        (lambda: Draw(top_k=0), "top_k"),
        (lambda: Draw(top_p=0.0), "top_p"),
        (lambda: DraftSettings(0), "steps"),
        (lambda: DraftSettings(4, "ar"), "'ar': use one of confidence, random, bootstrap"),
        (lambda: DraftSettings(4, schedule="cosin"), "schedule"),
        (lambda: DraftSettings(4, choice_schedule="square"), "choice_schedule"),
        (lambda: DraftSettings(4, choice_temperature=float("nan")), "choice_temperature"),
        (lambda: Fast(lambda query: [], KeyedNoise("a", [0])).draft_parts(Grid.empty(1, 4), 5, Draw()), "use 1 to 4"),
    ],
)
def test_bad_values_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
