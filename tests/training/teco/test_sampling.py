"""TECO's sampler: what decides its frames, actions, options, and what it refuses."""

import dataclasses

import pytest
import torch

from tests.training.teco import tiny
from torch_utils.precision import cpu_has_bf16, set_precision
from training.contract import Bundle
from training.sampling import Prompt, Request, Start
from training.teco.sampling import Drawing, check_actions, open_sampler

FAST = Drawing(draft=2, revise=2, rounds=1)


def video(sampler, seeds=(0,), start: Start = 0, num_frames=10, prompt=None):
    """All frames (N, 3, T, H, W) of a request."""
    prompt = prompt or tiny.RandomPrompt(tuple(seeds))
    return torch.cat([part["video"] for part in sampler.frames(Request(list(seeds), start, num_frames, prompt))], 2)


def same(found, expected):
    """Up to rounding, which depends on how many frames are computed together."""
    assert found.shape == expected.shape and (found - expected).abs().max() < 1e-4


def test_seed_and_prompt_decide_each_frame():
    sampler = tiny.sampler(FAST)
    whole = video(sampler, (3, 4), num_frames=12)
    assert whole.shape == (2, 3, 12, tiny.HEIGHT, tiny.WIDTH)
    same(video(sampler, (4,), num_frames=12), whole[1:])  # whatever is beside it
    same(video(sampler, (3, 4), num_frames=5), whole[:, :, :5])
    same(video(sampler, (3, 4), start=7, num_frames=5), whole[:, :, 7:])
    shifted = video(sampler, (3, 4), start=[2, 0], num_frames=5)
    same(shifted, torch.stack([whole[0, :, 2:7], whole[1, :, :5]]))
    sampler.block = 3
    same(video(sampler, (3, 4), num_frames=12), whole)
    other = video(sampler, (5, 4), prompt=tiny.RandomPrompt((3, 4)), num_frames=12)
    assert (other - whole)[0].abs().max() > 0.01


def test_frames_without_an_end():
    frames = tiny.sampler(FAST).frames(Request([0], 0, None, tiny.RandomPrompt()))
    assert [next(frames)["video"].shape[2] for _ in range(3)] == [8, 8, 8]


def test_an_action_changes_its_frame_and_none_before():
    sampler = tiny.sampler(dataclasses.replace(FAST, temperature=0.0))
    one, other = (video(sampler, prompt=tiny.RandomPrompt(changed_from=frame)) for frame in (None, 4))
    assert torch.equal(one[:, :, :4], other[:, :, :4]) and not torch.equal(one[:, :, 4], other[:, :, 4])


def test_actions_may_be_unknown():
    sampler = tiny.sampler(dataclasses.replace(FAST, actions=False))
    assert sampler.needs.streams == ()
    assert torch.equal(video(sampler), video(sampler, prompt=tiny.RandomPrompt(changed_from=4)))
    assert tiny.sampler(FAST, use_actions=False).needs.streams == ()


def test_the_context_is_an_option():
    prompt = tiny.RandomPrompt()
    sampler = tiny.sampler(dataclasses.replace(FAST, context=5))
    assert sampler.needs.past == 5
    video(sampler, num_frames=2, prompt=prompt)
    assert prompt.asked == [(-5, 5)]
    with pytest.raises(
        ValueError, match="option context is 8, but this model was trained on 8 frames: use a number from 1"
    ):
        sampler.with_options(Drawing(context=8))
    assert sampler.with_options(FAST).needs.past == 3


def test_revisions_and_parts_beyond_the_cells():
    sampler = tiny.sampler(Drawing(draft=99, revise=99, rounds=1))
    assert video(sampler, num_frames=1).isfinite().all()


@pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU has no bfloat16")
@torch.no_grad()
def test_half_precision_is_near_single_precision():
    sampler = tiny.sampler(FAST)
    x = tiny.tokenizer().quantizer.lookup(tiny.codes(2, 8)).transpose(1, 2)

    def found():
        cond, z, quantized = sampler.network.posterior(x)
        return sampler.network.predict(cond, z, tiny.actions(2, 8)), quantized.output

    exact, _ = found()
    full = video(sampler, num_frames=3)
    set_precision(sampler.networks[:1], "bf16")
    near, z = found()
    assert z.dtype == torch.float32
    assert 0 < (near.float() - exact).norm() / exact.norm() < 0.1
    assert video(sampler, num_frames=3).shape == full.shape
    set_precision(sampler.networks[:1], "fp32")
    assert torch.equal(video(sampler, num_frames=3), full)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "0"}, "option draft is 0: use a number from 1 on"),
        ({"temperature": "3"}, "option temperature is 3.0: use a number from 0 to 2"),
        ({"context": "none"}, "option context is 'none': use a whole number"),
        ({"top_k": "5"}, "top_k"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    networks = {"teco": tiny.network(), "tokenizer": tiny.tokenizer()}
    with pytest.raises(ValueError, match=message):
        open_sampler([Bundle(networks, "teco")], options)


def test_files_that_lack_a_part_are_refused():
    with pytest.raises(ValueError, match="holds no tokenizer"):
        open_sampler([Bundle({"teco": tiny.network()}, "teco", path="x.pkl")], {})
    with pytest.raises(ValueError, match="2 files of TECO"):
        open_sampler([Bundle({}, "teco")] * 2, {})


def test_actions_that_the_model_lacks_are_refused():
    with pytest.raises(ValueError, match="there is an action 6, but the model has actions 0 to 3"):
        check_actions(torch.tensor([[0, 6]]), 4)
    with pytest.raises(ValueError, match="there is an action -1"):
        check_actions(torch.tensor([[0, -1]]), 4)
    with pytest.raises(ValueError, match="vectors of 2 numbers, but TECO takes whole numbers"):
        check_actions(torch.zeros(1, 5, 2), 4)


def test_prompts_that_are_too_short_are_refused():
    class Short(Prompt):
        def frames(self, start, count, size):
            return torch.zeros(1, 3, 2, *size)

    with pytest.raises(ValueError, match="2 frames of context, 3 are needed"):
        video(tiny.sampler(FAST), prompt=Short())
