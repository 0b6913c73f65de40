"""Videos of MeBT: the same whatever is asked for at once; windows that continue each other; cached as not cached."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from metrics.long_video_base import ProbeOptions
from metrics.long_video_pixels import ChangeProbe, join_ratio, mean_profile
from tests.training.mebt.conftest import make_network, make_tokenizer
from training.contract import Bundle
from training.generation.draft_revise import Query
from training.mebt.extrapolation import last_frames
from training.mebt.networks import LOGIT_ROWS, ContextCache, MeBT
from training.mebt.sampling import MeBTSampler, Sampling
from training.network_file import save_bundle
from training.sampling import Prompt, Request, Start, open_sampler, quantize

OPTIONS = Sampling(steps=4, bootstrap=2, revise_parts=2, revise_rounds=1, top_k=6)
FRAMES = 16  # of a window: four latent frames
TOLERANCE = 1e-5


class Noise(Prompt):
    """Smooth noise that moves with the number of the frame; another for each of `count` videos."""

    def __init__(self, count=1):
        rng = torch.Generator().manual_seed(0)
        self.pattern = torch.rand(count, 3, 1, 4, 4, generator=rng).repeat_interleave(4, 3).repeat_interleave(4, 4)

    def frames(self, start, count, size):
        assert isinstance(start, int)
        shifted = [self.pattern.roll(number, 4) for number in range(start, start + count)]
        return torch.cat(shifted, dim=2) * 4 - 2


@pytest.fixture(scope="module")
def sampler():
    return MeBTSampler(make_network(), make_tokenizer(), OPTIONS)


def video(sampler, seeds=(0, 1), start: Start = 0, num_frames=FRAMES, prompt=None):
    request = Request(list(seeds), start, num_frames, prompt or Prompt())
    return torch.cat([chunk["video"] for chunk in sampler.frames(request)], dim=2)


def codes_of(sampler, windows, seeds=(0, 1), prompt=None):
    """The codes of the first windows: what each begins with, and what is new."""
    stream = sampler.windows(Request(list(seeds), 0, None, prompt or Prompt()))
    return [next(stream) for _ in range(windows)]


def test_frames_do_not_depend_on_how_they_are_asked_for(sampler):
    whole = video(sampler, num_frames=40)
    assert whole.shape == (2, 3, 40, 16, 16)
    assert torch.allclose(video(sampler, num_frames=7), whole[:, :, :7], atol=TOLERANCE)
    assert torch.allclose(video(sampler, (1,), 21, 9), whole[1:, :, 21:30], atol=TOLERANCE)
    shifted = video(sampler, (0, 1), [3, 18], 20)
    for row, start in enumerate((3, 18)):
        assert torch.allclose(shifted[row], whole[row, :, start : start + 20], atol=TOLERANCE)
    endless = sampler.frames(Request([1], 30))
    assert torch.allclose(next(endless)["video"][:, :, :2], whole[1:, :, 30:32], atol=TOLERANCE)


def test_seeds_differ(sampler):
    codes = codes_of(sampler, 1)[0][1]
    assert not torch.equal(codes[0], codes[1])


def test_windows_continue_what_is_there(sampler):
    """Each begins with the last frames of all before, and none is a copy of another."""
    windows = codes_of(sampler, 5)
    done = windows[0][1]
    assert windows[0][0].shape[1] == 0 and done.shape[1] == 4
    for before, new in windows[1:]:
        assert torch.equal(before, done[:, -2:]) and new.shape[1] == 2
        done = torch.cat([done, new], dim=1)
    flat = done.flatten(2)
    repeats = (flat[:, 1:] == flat[:, :-1]).all(-1)
    assert not repeats.any()


@pytest.mark.parametrize("overlap", [4, 8, 12])
def test_any_overlap_continues_without_repeats(overlap):
    """Also more than half of the window, where the release repeats one latent frame."""
    options = dataclasses.replace(OPTIONS, overlap=overlap, revise_parts=1)
    windows = codes_of(MeBTSampler(make_network(), make_tokenizer(), options), 4)
    done = windows[0][1]
    for before, new in windows[1:]:
        assert torch.equal(before, done[:, -overlap // 4 :])
        done = torch.cat([done, new], dim=1)
    assert done.shape[1] == 4 + 3 * (4 - overlap // 4)
    assert not (done.flatten(2)[:, 1:] == done.flatten(2)[:, :-1]).all(-1).any()


def test_a_short_window_is_that_of_a_shorter_network():
    """Positions beyond the window do not exist for the network."""
    network, options = make_network(), dataclasses.replace(OPTIONS, window=8, revise_parts=1)
    size = network.shape[1:]
    short = MeBT(**{**network.options, "shape": (2, *size)}).eval()
    state = network.state_dict()
    short.load_state_dict({**state, "pos_emb": state["pos_emb"][:, : 2 * math.prod(size)]})
    expected = MeBTSampler(short, make_tokenizer(), dataclasses.replace(options, window=None))
    found = MeBTSampler(network, make_tokenizer(), options)
    assert found.block == expected.block == 8
    for ours, theirs in zip(codes_of(found, 4), codes_of(expected, 4), strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_the_release_repeats_a_frame_in_long_contexts():
    """Fault of its default flags: a chunk of one latent frame fills the whole context."""
    codes = torch.arange(24).view(1, 6, 2, 2)
    assert torch.equal(last_frames(codes, codes[:, 5:], 3, legacy=True), codes[:, 5:].expand(-1, 3, -1, -1))
    assert torch.equal(last_frames(codes, codes[:, 5:], 3, legacy=False), codes[:, 3:])
    with pytest.raises(ValueError, match="at most half of the window"):
        last_frames(codes, codes[:, 4:], 3, legacy=True)
    options = dataclasses.replace(OPTIONS, overlap=12, revise_parts=1, legacy=True)
    windows = codes_of(MeBTSampler(make_network(), make_tokenizer(), options), 3)
    assert torch.equal(windows[2][0], windows[1][1].expand(-1, 3, -1, -1))


def test_windows_have_no_seams(sampler):
    """Frames change where windows meet as much as where latent frames meet within a window.

    By the measure of `seam_ratio`. Windows of 16 frames advance by 8; each is decoded with frames of the one before.
    """
    found = quantize(video(sampler, range(8), num_frames=FRAMES + 8 * 6) * 4).numpy()
    probe = ChangeProbe(ProbeOptions(), "fake")
    probe.add(found)
    profile = mean_profile(probe.finish())
    seams, others = (join_ratio(profile, 8, phase) for phase in (0, 4))
    assert 0.7 < seams / others < 1.4, (seams, others)


def test_a_video_continues_given_frames():
    options = dataclasses.replace(OPTIONS, given=8)
    sampler = MeBTSampler(make_network(), make_tokenizer(), options)
    assert sampler.needs.past == 8 and sampler.needs.size == (16, 16)
    (before, new), (again, _) = codes_of(sampler, 2, prompt=Noise())
    given = sampler.tokenizer.encode(Noise().frames(-8, 8, (16, 16)))
    assert torch.equal(before, given.expand(2, -1, -1, -1)) and new.shape[1] == 2
    assert torch.equal(again, new)
    alone = video(sampler, (1,), num_frames=20, prompt=Noise())
    assert torch.allclose(video(sampler, (0, 1), num_frames=20, prompt=Noise())[1:], alone, atol=TOLERANCE)


def test_given_frames_matter():
    """Whole sampling without randomness follows them: other frames before, other codes after."""
    options = dataclasses.replace(OPTIONS, given=8, temperature=0.0, revise_rounds=0, bootstrap=0)
    sampler = MeBTSampler(make_network(), make_tokenizer(), options)
    found = codes_of(sampler, 1, prompt=Noise(2))[0][1]
    codes = codes_of(sampler, 1, prompt=Noise(2))[0][0]
    assert not torch.equal(codes[0], codes[1])
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("strategy", ["confidence", "random", "parts"])
def test_the_cache_changes_nothing(strategy, monkeypatch):
    options = dataclasses.replace(OPTIONS, strategy=strategy)
    network = make_network()
    cached = MeBTSampler(network, make_tokenizer(), options)
    plain = MeBTSampler(network, make_tokenizer(), options)
    complete: Any = MeBTSampler.complete
    monkeypatch.setattr(plain, "complete", lambda network, *args: complete(plain, Uncached(network), *args))
    for found, expected in zip(codes_of(cached, 2), codes_of(plain, 2), strict=True):
        assert torch.equal(found[1], expected[1])


class Uncached:
    """A network that forgets keys and values."""

    def __init__(self, network):
        self.network = network

    def __getattr__(self, name):
        return getattr(self.network, name)

    def predict(self, query, cache=None):
        return self.network.predict(query)


def test_cached_keys_follow_codes():
    network, cache = make_network(), None
    cache = ContextCache(network, 2)
    rng = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 12, (2, 16), generator=rng)
    for _ in range(4):
        order = torch.stack([torch.randperm(16, generator=rng) for _ in range(2)])
        query = Query(codes, order[:, :9], order[:, 9:], 5)
        found = torch.cat(list(network.predict(query, cache)), dim=1)
        expected = network(codes, query.contexts, query.targets)[:, :5]
        assert torch.allclose(found, expected, atol=1e-5)
        codes = codes.scatter(1, order[:, 9:12], torch.randint(0, 12, (2, 3), generator=rng))


def test_logits_do_not_depend_on_order_or_pieces(monkeypatch):
    network = make_network()
    codes = torch.arange(16).expand(2, -1) % 12
    contexts, targets = torch.tensor([[3, 9, 14]] * 2), torch.tensor([[0, 5, 2, 8]] * 2)
    expected = network(codes, contexts, targets)
    flipped = network(codes, contexts.flip(1), targets.flip(1)).flip(1)
    assert torch.allclose(flipped, expected, atol=1e-5)
    monkeypatch.setattr("training.mebt.networks.ROWS", 3)
    monkeypatch.setitem(LOGIT_ROWS, "cpu", 6)  # three of each video
    with torch.no_grad():
        pieces = list(network.predict(Query(codes, contexts, targets, 4)))
    assert len(pieces) == 2 and torch.allclose(torch.cat(pieces, dim=1), expected, atol=1e-5)


def test_a_file_gives_the_same_videos(tmp_path):
    network, tokenizer = make_network(gain=1, residual="normalised"), make_tokenizer()
    sampling: dict[str, Any] = {"steps": 4, "revise_rounds": 1, "revise_parts": 2}
    save_bundle(Bundle({"prior": network, "tokenizer": tokenizer}, "mebt", {"sampling": sampling}), tmp_path / "a.pkl")
    expected = video(MeBTSampler(network, tokenizer, Sampling(**sampling)))
    sampler = open_sampler([str(tmp_path / "a.pkl")])
    assert sampler.options == Sampling(**sampling)
    assert torch.allclose(video(sampler), expected, atol=TOLERANCE)
    assert torch.allclose(video(sampler), expected, atol=TOLERANCE)  # packed once
    other = sampler.with_options(dataclasses.replace(sampler.options, revise_rounds=0))
    assert not torch.equal(codes_of(other, 1)[0][1], codes_of(sampler, 1)[0][1])


def test_weights_that_change_are_packed_again():
    network = make_network()
    sampler = MeBTSampler(network, make_tokenizer(), OPTIONS)
    first = video(sampler)
    network.tok_emb.weight.mul_(-1)
    changed = video(sampler)
    assert not torch.allclose(changed, first, atol=10 * TOLERANCE)
    assert torch.allclose(changed, video(MeBTSampler(network, make_tokenizer(), OPTIONS)), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"given": "6"}, "given is 6 frames: use a multiple of 4 below 16"),
        ({"overlap": "16"}, "overlap is 16 frames"),
        ({"window": "6"}, "window is 6 frames: use a multiple of 4 up to 16"),
        ({"window": "20"}, "window is 20 frames"),
        ({"window": "8", "given": "8"}, "given is 8 frames: use a multiple of 4 below 8"),
        ({"strategy": "ar"}, "use one of confidence, random, parts"),
        ({"steps": "0"}, "steps is 0"),
        ({"revise_rounds": "-1"}, "revise_rounds is -1"),
        ({"revise_parts": "9"}, "revise_parts is 9, but a window has 8 codes to divide"),
        ({"temperature": "-2"}, "temperature"),
        ({"top_p": "1.5"}, "top_p"),
        ({"draft": "3"}, "draft"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, words):
    bundle = Bundle({"prior": make_network(), "tokenizer": make_tokenizer()}, "mebt")
    save_bundle(bundle, tmp_path / "a.pkl")
    with pytest.raises(ValueError, match=words) as caught:
        open_sampler([str(tmp_path / "a.pkl")], options)
    assert "\n" not in str(caught.value)


def test_a_file_without_a_tokenizer_is_refused(tmp_path):
    save_bundle(Bundle({"prior": make_network()}, "mebt", {"sampling": {}}, "0" * 64), tmp_path / "a.pkl")
    with pytest.raises(ValueError, match="lacks a tokenizer"):
        open_sampler([str(tmp_path / "a.pkl")])
