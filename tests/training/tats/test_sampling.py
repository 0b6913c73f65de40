"""Videos of TATS: what fixes their frames, and what is refused."""

import itertools

import numpy as np
import pytest
import torch

from tests.training.tats import tiny
from torch_utils.precision import set_precision
from training.contract import Bundle
from training.generation.token_sampling import Draw, uniform_numbers
from training.network_file import save_bundle
from training.sampling import Prompt, Request, Start, open_sampler
from training.tats.sampling import Between, Facts, LongVideos, Writing


def video(sampler, seeds, start: Start = 0, num_frames=12, prompt=None):
    request = Request(seeds, start, num_frames, prompt or Prompt())
    found = torch.cat([chunk["video"] for chunk in sampler.frames(request)], dim=2)
    assert found.shape[2] == num_frames
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"memory": 1},
        {"hierarchical": True},
        {"hierarchical": True, "group": 1},
        {"size": (12, 8)},
        {"legacy": True},
    ],
    ids=str,
)
def test_frames_depend_on_seed_start_and_prompt_alone(options):
    sampler = tiny.sampler(**options)
    whole = video(sampler, [3, 4, 5], num_frames=44)
    assert not torch.equal(whole[0], whole[1])
    close = {"rtol": 0, "atol": 2e-5}
    torch.testing.assert_close(video(sampler, [4], num_frames=7), whole[1:2, :, :7], **close)
    torch.testing.assert_close(video(sampler, [5], 33, 6), whole[2:, :, 33:39], **close)
    starts = [30, 1, 17]
    wanted = torch.stack([whole[i, :, first : first + 9] for i, first in enumerate(starts)])
    torch.testing.assert_close(video(sampler, [3, 4, 5], starts, 9), wanted, **close)


def test_groups_of_segments_change_nothing():
    one, many = (video(tiny.sampler(True, group=group), [1], num_frames=40) for group in (1, 5))
    torch.testing.assert_close(one, many, rtol=0, atol=2e-5)


def test_videos_without_end_go_on():
    sampler = tiny.sampler(memory=2)
    chunks = sampler.frames(Request([0, 1], 0, None))
    found = torch.cat([chunk["video"] for chunk in itertools.islice(chunks, 6)], dim=2)
    torch.testing.assert_close(found, video(sampler, [0, 1], num_frames=found.shape[2]), rtol=0, atol=2e-5)


def literal_codes(network, tokenizer, seed, num_latents, memory, draw):
    """Codes of a video, each from a whole pass over the condition and the window, without a cache."""
    frames: list[list[int]] = []
    for f in range(num_latents):
        numbers = uniform_numbers("tats-codes", [seed], f, tiny.CODES)
        context = [token for frame in frames[max(f - memory, 0) :] for token in frame]
        new: list[int] = []
        for j in range(tiny.CODES):
            ids = torch.tensor([[0, *(token + network.conditions for token in context + new)]])
            logits = network(ids)[:, -1, network.conditions :]
            new.append(int(draw(logits, numbers[:, j])))
        frames.append(new)
    return torch.tensor(frames).view(1, num_latents, 2, 2)


@pytest.mark.parametrize("memory", [1, 2, 3])
def test_codes_are_those_of_whole_passes(memory):
    sampler = tiny.sampler(memory=memory, top_k=6, top_p=0.9)
    found = torch.cat(list(itertools.islice(sampler.latents([7], Prompt()), 9)), dim=1)
    draw = Draw(6, 0.9, fast=False)
    assert torch.equal(found, literal_codes(sampler.network, sampler.tokenizer, 7, 9, memory, draw))


def test_decoding_in_a_stream_equals_decoding_all():
    sampler = tiny.sampler()
    codes = torch.cat(list(itertools.islice(sampler.latents([7], Prompt()), 14)), dim=1)
    whole = sampler.tokenizer.decode(codes)
    torch.testing.assert_close(video(sampler, [7], 0, 32), whole[:, :, :32], rtol=0, atol=2e-5)


def test_the_first_frames_of_the_longest_memory_are_those_of_a_clip():
    """With all the memory that fits, the window begins to move only after a clip of the length trained on."""
    short, long = tiny.sampler(length=16), tiny.sampler()
    codes = [torch.cat(list(itertools.islice(s.latents([2], Prompt()), 4)), dim=1) for s in (short, long)]
    assert torch.equal(*codes) and short.default_frames == 16
    torch.testing.assert_close(video(short, [2], 0, 16), short.tokenizer.decode(codes[0]), rtol=0, atol=2e-5)
    torch.testing.assert_close(video(short, [2, 2], [3, 8], 8)[0], video(short, [2], 0, 16)[0, :, 3:11])
    everything = torch.cat([chunk["video"] for chunk in short.frames(Request([2], 4, None))], dim=2)
    assert everything.shape[2] == 12
    with pytest.raises(ValueError, match="videos end after 16 frames"):
        video(short, [2], 8, 9)


def test_key_frames_stay_and_the_others_are_between():
    sampler = tiny.sampler(True)
    alone = LongVideos(sampler.network, sampler.tokenizer, Facts(every=4))
    keys = torch.cat(list(itertools.islice(alone.latents([5], Prompt()), 3)), dim=1)
    codes = torch.cat(list(itertools.islice(sampler.latents([5], Prompt()), 9)), dim=1)
    assert torch.equal(codes[:, ::4], keys)


def test_labels():
    sampler = tiny.sampler(condition="label", conditions=5)
    assert sampler.num_labels == 5
    prompt = Prompt()
    prompt.label = 3
    ids = sampler.condition_ids([0, 1], prompt)
    assert ids.tolist() == [[3], [3]]
    drawn = sampler.condition_ids(range(400), Prompt()).flatten()
    assert drawn.bincount(minlength=5).min() > 50, "without a label the seed draws one"
    assert sampler.condition_ids([7], Prompt()).item() == drawn[7]
    other = Prompt()
    other.label = 4
    assert not torch.equal(video(sampler, [0], prompt=prompt), video(sampler, [0], prompt=other))


def test_condition_ids_are_never_drawn():
    sampler = tiny.sampler(condition="label", conditions=5)
    network = sampler.network
    with torch.no_grad():
        network.get_parameter("head.weight")[:5] *= 50  # which would be drawn most
    codes = torch.cat(list(itertools.islice(sampler.latents([1], Prompt()), 6)), dim=1)
    legacy = sampler.with_options(Writing(legacy=True))
    theirs = torch.cat(list(itertools.islice(legacy.latents([1], Prompt()), 6)), dim=1)
    assert len(codes.unique()) > 2 and (theirs == 0).float().mean() > 0.5, "a condition id becomes code 0"


class Recorded(Prompt):
    """Frames of noise, as many as there are."""

    def __init__(self, num_frames):
        self.video = torch.from_numpy(np.random.RandomState(0).uniform(-1, 1, (1, 3, num_frames, 8, 8))).float()

    def frames(self, start, count, size):
        """See `Prompt.frames`."""
        firsts = [start] if isinstance(start, int) else start
        parts = [self.video[0, :, first : first + count] for first in firsts]
        length = min(part.shape[1] for part in parts)
        return torch.stack([part[:, :length] for part in parts])


def test_previews_of_in_filling_follow_their_prompt():
    sampler = Between(tiny.filler(), tiny.tokenizer(), Facts())
    prompt = Recorded(43)
    whole = torch.cat([chunk["video"] for chunk in sampler.frames(Request([0, 1], 0, None, prompt))], dim=2)
    assert whole.shape == (2, 3, 43, 8, 8), "it ends with its prompt"
    torch.testing.assert_close(video(sampler, [1], 20, 9, prompt)[0], whole[1, :, 20:29], rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="no frames at 99 or later"):
        video(sampler, [1], 99, 9, prompt)


def test_bf16_copies_compute_in_bf16():
    network = tiny.transformer()
    found = network.for_sampling(torch.bfloat16)
    assert found.pos_emb.dtype == torch.bfloat16 and network.pos_emb.dtype == torch.float32
    sampler = tiny.sampler(True)
    set_precision(sampler.networks, "bf16")
    assert sampler.copies.get(True).pos_emb.dtype == torch.bfloat16
    assert video(sampler, [0]).dtype == torch.float32


def test_copies_follow_the_weights():
    sampler = tiny.sampler()
    before = video(sampler, [0])
    assert sampler.copies.get(True) is sampler.copies.get(True)
    with torch.no_grad():
        sampler.network.tok_emb.weight.neg_()
    assert not torch.equal(video(sampler, [0]), before)


# ----------------------------------------------------------------------------
# Files and bad input.


def bundle_of(network, facts=None, book=None):
    name = "tats-interpolation" if network.unmasked else "tats"
    book = book or tiny.tokenizer()
    return Bundle({"transformer": network, "tokenizer": book}, name, vars(facts or Facts()))


def save(path, *arguments):
    save_bundle(bundle_of(*arguments), path)
    return str(path)


def test_two_files_make_one_model_in_any_order(tmp_path):
    first = save(tmp_path / "keys.pkl", tiny.transformer(), Facts(every=4))
    second = save(tmp_path / "between.pkl", tiny.filler())
    wanted = video(tiny.sampler(True), [0])
    for paths in ([first, second], [second, first]):
        assert torch.equal(video(open_sampler(paths), [0]), wanted)
    assert isinstance(open_sampler([second]), Between)
    assert open_sampler([first], {"memory": "2", "size": "12x8"}).size == (12, 8)


def test_files_that_do_not_fit_are_refused(tmp_path):
    keys = save(tmp_path / "keys.pkl", tiny.transformer(), Facts(every=4))
    plain = save(tmp_path / "plain.pkl", tiny.transformer())
    between = save(tmp_path / "between.pkl", tiny.filler())
    labelled = save(tmp_path / "labelled.pkl", tiny.filler(conditions=3), Facts("label"))
    book = tiny.tokenizer()
    with torch.no_grad():
        book.decoder.conv_last.conv.weight.neg_()
    other = save(tmp_path / "other.pkl", tiny.filler(), Facts(), book)
    for paths, words in (
        ([plain, between], "trained with --every=4"),
        ([keys, plain], "give one of them, or one of each kind"),
        ([between, between], "fill in between key frames"),
        ([keys, other], "different tokenizers"),
        ([keys, labelled], "conditions of the two transformers are none with 1 ids and label with 3 ids"),
    ):
        with pytest.raises(ValueError, match=words):
            open_sampler(paths)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory": 4}, "are 3 latent frames of 4 codes and a new one: use 3 or less"),
        ({"memory": 0}, "from 1 on"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"length": 6}, "multiple of 4 frames"),
        ({"size": (6, 8)}, "use multiples of 4, from 8x8 on"),
        ({"size": (12, 8), "hierarchical": True}, "size and key frames"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        tiny.sampler(**options)


def test_networks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="table of positions"):
        LongVideos(tiny.transformer(table=[4, 2, 2]), tiny.tokenizer(), Facts(), options=Writing(size=(12, 8)))
    with pytest.raises(ValueError, match="knows 9 codes, but the tokenizer has 12"):
        LongVideos(tiny.transformer(), tiny.VQGAN3D(8, 8, 8, [4, 4, 4], 2, 4, 12), Facts())
    short = tiny.TATSTransformer(9, 1, 3, 5, 1, 2, 16)
    with pytest.raises(ValueError, match="takes 5 ids, but a condition of 3 and a latent frame of 4 codes"):
        LongVideos(short, tiny.tokenizer(), Facts())
