"""Sound as a condition: published preparation, training, what a sampler hears when, files, and what is refused."""

import itertools
import re

import numpy as np
import pytest
import torch

from tests import golden_files
from tests.training.data.sounds import audio_of
from tests.training.tats import tiny
from tests.training.tats.test_sampling import video
from tests.training.tats.test_system import make, open_saved
from training.config import TrainOptions
from training.contract import CodeClip, Stream
from training.data.spectrograms import NUM_VALUES, prepare, read_published
from training.data.stream_prompts import StreamPrompt
from training.network_file import load_bundle, load_tokenizer, save_bundle
from training.sampling import Prompt, open_sampler
from training.tats.conditions import sound_ids
from training.tats.sampling import AUDIO_TOKENIZER, Facts, LongVideos, Writing
from training.tats.system import TATS


@golden_files.entries("tats", "stft_prep*")
def test_spectrograms_are_prepared_as_published(entry, golden, tmp_path):
    text = entry["stft"]
    factor, modulus, divisor = (int(n) for n in re.findall(r"(\d+) i\) mod (\d+)\)/(\d+)", text)[0])
    shape = tuple(int(n) for n in golden_files.search(r"shape \(([\d, ]+)\)", text)[1].split(","))
    stft = ((factor * np.arange(np.prod(shape))) % modulus / divisor).reshape(shape)
    golden_files.check(torch.from_numpy(prepare(stft)[None]), entry["out"], 1e-5)
    np.save(tmp_path / "a.npy", stft)
    flat = {name: value for name, value in entry["out"].items() if name != "shape"}
    golden_files.check(torch.from_numpy(read_published(tmp_path / "a.npy")), flat, 1e-3)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """Return the paths of a tokenizer and of one of sound."""
    folder = tmp_path_factory.mktemp("books")
    for name, network in (("frames", tiny.tokenizer()), ("sound", tiny.sound_tokenizer())):
        save_bundle(tiny.Bundle({"tokenizer": network}, "tokenizer"), folder / f"{name}.pkl")
    return str(folder / "frames.pkl"), str(folder / "sound.pkl")


def hearing(book, **options):
    return make(book[0], **{"condition": "audio", "audio_tokenizer": book[1], **options})


def batch_of(step, batch=2, frames=8):
    """Clips whose codes follow from what is heard."""
    values = np.stack([audio_of("x" * (1 + (clip + step) % 3), frames) for clip in range(batch)])
    codes = (torch.arange(batch).unsqueeze(1) + step) % 3 + torch.arange(frames // 4 * tiny.CODES)
    return {"codes": (codes % 9).view(batch, -1, 2, 2), "audio": torch.from_numpy(values).float()}


def run(system, steps):
    return [system.step(iter([batch_of(step)]), step) for step in steps][-1]


def test_sound_is_learned_from(book):
    system = hearing(book, lr=1e-2)
    (spec,) = system.batch_spec(0)
    assert spec.parts == (CodeClip("codes", 0, 2), Stream("audio", 0, 8)) and system.inputs().streams == ("audio",)
    assert system.network.options.items() >= {"conditions": 7, "condition_length": 32, "block_size": 39}.items()
    assert system.frozen.keys() == {"tokenizer", AUDIO_TOKENIZER}
    ids = system.condition_ids(batch_of(0))
    wanted = tiny.sound_tokenizer().encode(batch_of(0)["audio"].view(2, 1, 8, 64, 16)).flatten(1)
    assert torch.equal(ids, wanted) and not torch.equal(ids[0], ids[1])
    first = run(system, [0])["loss/loss"].mean()
    assert run(system, range(1, 60))["loss/loss"].mean() < 0.3 * first
    assert system.validate(iter([batch_of(1)]))["loss/top1_accuracy"].mean() > 0.8
    sampler = system.sampler().with_options(Writing(temperature=0.0))
    for kind in range(3):
        prompt = StreamPrompt(Prompt(), {"audio": audio_of("x" * (1 + kind), 8)}, 0)
        codes = codes_of(sampler, [0], prompt, 2)
        assert codes.flatten().tolist() == [(kind + place) % 9 for place in range(8)], (
            "what is written goes with what is heard"
        )


def test_resuming_continues_bit_for_bit(book):
    whole, first, second = (hearing(book) for _ in range(3))
    run(whole, range(4))
    run(first, range(2))
    second.modules["transformer"].load_state_dict(first.modules["transformer"].state_dict())
    second.optimizers["transformer"].load_state_dict(first.optimizers["transformer"].state_dict())
    run(second, range(2, 4))
    for a, b in zip(whole.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_key_frames_hear_all_that_lies_between(book):
    system = hearing(book, frames=32, every=4)
    (spec,) = system.batch_spec(0)
    assert spec.num_frames == 20 and spec.parts[1] == Stream("audio", 0, 20)
    assert system.network.condition_length == 5 * 16


# ----------------------------------------------------------------------------
# Sampling.


def heard(num_frames=64, num_videos=1):
    """A prompt of sound that changes from moment to moment."""
    values = np.random.RandomState(num_videos).uniform(-1, 1, (num_frames, NUM_VALUES)).astype(np.float32)
    return StreamPrompt(Prompt(), {"audio": values}, 0)


def codes_of(sampler, seeds, prompt, count):
    return torch.cat(list(itertools.islice(sampler.latents(seeds, prompt), count)), dim=1)


def test_ids_are_those_of_the_window():
    """They are those of the clip that training would cut there, and equal for one video and for several."""
    sampler, prompt = tiny.hearing_sampler(), heard()
    values, book = prompt.streams["audio"], tiny.sound_tokenizer()
    conditions = sampler.conditions([5, 6], prompt)
    for window, ids in enumerate(itertools.islice(conditions, 4)):
        clip = torch.from_numpy(values[window * 4 : window * 4 + 8]).unsqueeze(0)
        assert torch.equal(ids, sound_ids(book, clip).expand(2, -1))
    short = heard(12)
    last = next(itertools.islice(sampler.conditions([5], short), 2, None))
    held = torch.from_numpy(short.streams["audio"][[8, 9, 10, 11, 11, 11, 11, 11]]).unsqueeze(0)
    assert torch.equal(last, sound_ids(book, held)), "the last moment goes on"


def test_codes_of_whole_videos_equal_those_of_streams():
    """Where all of a video's sound is at hand, its tokens are those of any pieces of it."""
    book = tiny.sound_tokenizer()
    clip = torch.from_numpy(np.random.RandomState(0).uniform(-1, 1, (2, 1, 48, 64, 16))).float()
    whole = book.encode(clip)
    assert torch.equal(torch.cat(list(book.encode_stream(clip.split(7, dim=2), chunk=8)), dim=1), whole)
    assert torch.equal(book.encode(clip[1:]), whole[1:])


@pytest.mark.parametrize("options", [{}, {"latents": 3}, {"every": 4}], ids=str)
def test_frames_depend_on_seed_start_and_sound_alone(options):
    sampler, prompt = tiny.hearing_sampler(**options), heard()
    whole = video(sampler, [3, 4, 5], num_frames=24, prompt=prompt)
    close = {"rtol": 0, "atol": 2e-5}
    torch.testing.assert_close(video(sampler, [4], num_frames=7, prompt=prompt), whole[1:2, :, :7], **close)
    torch.testing.assert_close(video(sampler, [5], 13, 6, prompt), whole[2:, :, 13:19], **close)
    assert not torch.equal(video(sampler, [4], num_frames=7, prompt=heard(64, 2)), whole[1:2, :, :7])


def test_what_is_heard_later_changes_later_frames_alone():
    """Codes follow the sound of their window: the sound of frames 24 ... 31 reaches windows 5, 6 and 7."""
    sampler, one, other = tiny.hearing_sampler(), heard(), heard()
    values = other.streams["audio"].copy()
    values[24:32] = -values[24:32]
    other = StreamPrompt(Prompt(), {"audio": values}, 0)
    a, b = (codes_of(sampler, range(8), prompt, 9) for prompt in (one, other))
    assert torch.equal(a[:, :6], b[:, :6]) and not torch.equal(a[:, 6:], b[:, 6:])


def test_codes_are_those_of_whole_passes():
    sampler, prompt = tiny.hearing_sampler(top_k=0, top_p=1.0, temperature=0.0), heard()
    found = codes_of(sampler, [7], prompt, 5)
    network, frames = sampler.network, []
    conditions = list(itertools.islice(sampler.conditions([7], prompt), 5))
    for f in range(5):
        new = []
        for _ in range(tiny.CODES):
            context = torch.tensor([[code + 7 for frame in frames[max(f - 1, 0) : f] for code in frame]]).long()
            ids = [conditions[max(f - 1, 0)], context.view(1, -1), torch.tensor([[c + 7 for c in new]]).view(1, -1)]
            logits = network(torch.cat([part.long() for part in ids], dim=1))[:, -1, 7:]
            new.append(int(logits.argmax()))
        frames.append(new)
    assert found.view(5, -1).tolist() == frames


def test_files_hold_both_tokenizers(book, tmp_path):
    system = hearing(book)
    run(system, range(2))
    sampler = open_saved(system, tmp_path / "heard.pkl")
    assert isinstance(sampler, LongVideos) and sampler.needs.streams == ("audio",) and sampler.memory == 1
    bundle = load_bundle(tmp_path / "heard.pkl")
    assert bundle.networks.keys() == {"transformer", "tokenizer", AUDIO_TOKENIZER}
    assert load_tokenizer(tmp_path / "heard.pkl")[1] == load_tokenizer(book[0])[1] == bundle.tokenizer
    prompt, again = heard(16), open_sampler([str(tmp_path / "heard.pkl")])
    assert torch.equal(video(sampler, [0], 0, 8, prompt), video(again, [0], 0, 8, prompt))


# ----------------------------------------------------------------------------
# What is refused.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"condition": "audio"}, "give --audio-tokenizer"),
        ({"audio_tokenizer": "sound.pkl"}, "add --condition=audio"),
        ({"condition": "audio", "audio_tokenizer": "sound.pkl", "table": True}, "one id, and sound has more"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        TATS.check(TATS.Options(**{"tokenizer": "tokenizer.pkl", **options}), TrainOptions("tats", "runs", "data"))


def test_tokenizers_that_do_not_fit_are_refused(book):
    facts = Facts("audio")
    with pytest.raises(ValueError, match="encodes 8x8 frames, expected a tokenizer of sound"):
        hearing(book, audio_tokenizer=book[0])
    with pytest.raises(ValueError, match="encodes sound, expected a tokenizer of frames"):
        hearing(book, tokenizer=book[1])
    with pytest.raises(ValueError, match="given 5 of 7 ids of sound, but the tokenizer of sound makes 16 of 7"):
        LongVideos(tiny.transformer(conditions=7, length=5), tiny.tokenizer(), facts, sound=tiny.sound_tokenizer())
    with pytest.raises(ValueError, match="its file has no tokenizer of sound"):
        LongVideos(tiny.transformer(conditions=7, length=32), tiny.tokenizer(), facts)
    with pytest.raises(ValueError, match="size and sound"):
        tiny.hearing_sampler(size=(12, 8))
    with pytest.raises(ValueError, match="use 1 or less"):
        tiny.hearing_sampler(memory=2)


def test_sound_that_ends_too_early_is_refused():
    sampler = tiny.hearing_sampler()
    assert video(sampler, [0], 0, 16, heard(16)).shape[2] == 16
    with pytest.raises(ValueError, match="has audio for 16 frames, 0 for the context and 17 for the video are needed"):
        video(sampler, [0], 0, 17, heard(16))
    with pytest.raises(ValueError, match="'audio' is needed for 1 frames: give --audio"):
        video(sampler, [0], 0, 8)
