"""Streaming: any window, pieces and start give the same frames; valid and invalid sampling options."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.longvideogan.tiny import FunctionPrompt, make_sampler, outputs, video
from training.longvideogan import sampling
from training.longvideogan.latents import noise_blocks
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.sampling import LowResSampler, PairSampler, Sampling, SuperResSampler
from training.random import random_state
from training.sampling import Request, quantize

TOLERANCE = 1e-5


def test_noise_is_a_stream_of_numbered_blocks():
    whole = noise_blocks(5, 3, -700, 1500)
    for start, count in [(-700, 1), (-257, 514), (-1, 2), (0, 256), (255, 300)]:
        assert (noise_blocks(5, 3, start, count) == whole[:, start + 700 : start + 700 + count]).all()
    assert not (noise_blocks(6, 3, 0, 256) == noise_blocks(5, 3, 0, 256)).any()


WHOLE: dict[int, torch.Tensor] = {}


@settings(max_examples=30)
@given(
    origin=st.sampled_from([0, -10_000_000, 10_000_000]),
    offset=st.integers(-50, 50),
    count=st.integers(1, 40),
    chunk=st.integers(1, 48),
)
def test_any_window_in_any_pieces_is_part_of_the_whole(origin, offset, count, chunk):
    """The whole is computed at once, from the noise that belongs to its frames.

    In double precision: rounding in a network of a few random channels can pass the tolerance in single.
    """
    torch.manual_seed(0)
    network = (
        LowResGenerator(18, 32, 16, 4, 10, 60, 8, 8, temporal_channels=(8, 8, 6, 6), spatial_channels=(4, 4, 4, 4))
        .double()
        .requires_grad_(False)
    )
    if origin not in WHOLE:
        samples = network.num_noise_frames(192)
        noise = [torch.from_numpy(noise_blocks(seed, 4, origin - 64, samples)) for seed in (7, 8)]
        WHOLE[origin] = network.synthesize(torch.stack(noise).double(), 192)
    pieces = video(LowResSampler(network, block=chunk), [7, 8], origin + offset, count)
    assert pieces.shape == (2, 3, count, 18, 32)
    expected = WHOLE[origin][:, :, offset + 64 : offset + 64 + count]
    assert torch.allclose(pieces, expected, atol=TOLERANCE, rtol=0)


def test_each_video_may_start_elsewhere(tiny_lres):
    source = LowResSampler(tiny_lres)
    both = video(source, [1, 2], [3, 10_000_005], 20)
    assert torch.allclose(both[:1], video(source, [1], 3, 20), atol=TOLERANCE)
    assert torch.allclose(both[1:], video(source, [2], 10_000_005, 20), atol=TOLERANCE)


def test_a_short_video_is_the_beginning_of_a_long_one(tiny_lres):
    source = LowResSampler(tiny_lres)
    assert torch.allclose(video(source, [4], 0, 17), video(source, [4], 0, 90)[:, :, :17], atol=TOLERANCE)


def test_pair_enlarges_the_frames_of_its_low_resolution_video(tiny_lres, tiny_sres):
    pair = make_sampler(tiny_lres, tiny_sres)
    assert isinstance(pair, PairSampler)
    lres, sres = outputs(pair, [1, 2], [5, 9], 77).values()
    assert torch.allclose(lres, video(pair.lres, [1, 2], [5, 9], 77), atol=TOLERANCE)

    def condition(starts, num_frames):
        return video(pair.lres, [1, 2], starts, num_frames)

    alone = video(SuperResSampler(tiny_sres, block=5), [1, 2], [5, 9], 77, condition)
    assert sres.shape == (2, 3, 77, 36, 64)
    assert torch.allclose(sres, alone, atol=TOLERANCE)
    assert torch.allclose(video(pair, [2], 40, 9), sres[1:, :, 31:40], atol=TOLERANCE)


def test_super_resolution_without_a_condition_is_refused(tiny_sres):
    with pytest.raises(ValueError, match="frames of context at 18x32 are needed: give --context"):
        next(make_sampler(tiny_sres).frames(Request([0], 0, 1)))


def test_networks_of_different_runs_are_refused(tiny_lres, tiny_sres):
    tiny_lres.height = 36
    with pytest.raises(ValueError, match="makes frames of 36x32.*enlarges frames of 18x32"):
        make_sampler(tiny_lres, tiny_sres)


def test_quantisation_rounds_as_published():
    values = torch.tensor([-2.0, -1.0, -0.5 / 127.5, 0.0, 1.0, 3.0]).reshape(1, 1, 1, 1, -1)
    assert quantize(values).flatten().tolist() == [0, 0, 127, 128, 255, 255]


def test_sample_is_frames_quantised(tiny_lres):
    source = make_sampler(tiny_lres)
    whole = torch.cat(list(source.video(Request([3], 2, 70))), dim=1)
    assert whole.shape == (1, 70, 18, 32, 3) and whole.dtype == torch.uint8
    assert torch.equal(whole, quantize(video(source, [3], 2, 70)))


def test_without_a_number_of_frames_there_is_no_end(tiny_lres, tiny_sres):
    pair = PairSampler(tiny_lres, tiny_sres)
    expected = video(pair, [1], 10_000_000, 200)
    chunks = itertools.islice(pair.frames(Request([1], 10_000_000)), 24)
    endless = torch.cat([chunk["video"] for chunk in chunks], dim=2)
    assert endless.shape[2] >= 190
    assert torch.allclose(endless, expected[:, :, : endless.shape[2]], atol=TOLERANCE)

    def condition(starts, num_frames):
        return video(pair.lres, [1], starts, num_frames)

    request = Request([1], 10_000_000, None, FunctionPrompt(condition))
    alone = next(SuperResSampler(tiny_sres).frames(request))["video"]
    assert torch.allclose(alone, expected[:, :, : alone.shape[2]], atol=TOLERANCE)


def test_on_a_cpu_as_many_frames_are_enlarged_as_have_the_pixels_of_one_of_published_size(tiny_sres, monkeypatch):
    assert SuperResSampler(tiny_sres).block == sampling.SRES_CHUNK  # 36x64
    for pixels, expected in ((2 * 36 * 64, 2), (3 * 36 * 64 - 1, 2), (1, 1)):
        monkeypatch.setattr(sampling, "SRES_PIXELS_CPU", pixels)
        assert SuperResSampler(tiny_sres).block == expected


def test_on_a_cpu_large_frames_are_enlarged_one_by_one(tiny_lres, tiny_sres, monkeypatch):
    """More at once need memory in proportion, and save no time."""
    monkeypatch.setattr(sampling, "SRES_PIXELS_CPU", 36 * 64)
    pair, shapes = PairSampler(tiny_lres, tiny_sres), []
    with torch.no_grad():
        hook = tiny_sres.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
        chunks = [chunk["video"] for chunk in pair.frames(Request([1, 2], 0, 3))]
        hook.remove()
    assert {shape[0] for shape in shapes} == {1} and {shape[2] for shape in shapes} == {1 + 2 * pair.sres.context}
    assert [chunk.shape[0] for chunk in chunks] == [2, 2, 2] and len(shapes) == 6
    whole = PairSampler(tiny_lres, tiny_sres)
    whole.sres.block, whole.sres.videos_at_once = 8, None
    assert torch.allclose(torch.cat(chunks, dim=2), video(whole, [1, 2], 0, 3), atol=TOLERANCE)


# Sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [33, 48])
def test_legacy_is_the_published_video_of_that_length(tiny_lres, tiny_sres, num_frames):
    """One stream draws the noise, then z; the low-resolution video is as long as published and synthesised as a whole.

    With 33 frames it is still 48 long, and with a context of 4 at either end 56, of which the first 41 count.
    """
    legacy = Sampling(rng="legacy")
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, 4, tiny_lres.num_noise_frames(48), generator=generator)
    whole = tiny_lres.synthesize(noise, 48, legacy_alignment=True)
    alone = video(LowResSampler(tiny_lres, legacy, 11), [5], 0, num_frames)
    assert torch.allclose(alone, whole[:, :, :num_frames], atol=TOLERANCE, rtol=0)

    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, 4, tiny_lres.num_noise_frames(56), generator=generator)
    z = torch.randn(1, 16, generator=generator)
    whole = tiny_lres.synthesize(noise, 56, legacy_alignment=True)
    expected = tiny_sres(whole, z)[:, :, :num_frames]
    pair = make_sampler(tiny_lres, tiny_sres, rng="legacy")
    assert isinstance(pair, PairSampler)
    lres, sres = outputs(pair, [5], 0, num_frames).values()
    assert torch.allclose(lres, whole[:, :, 4 : 4 + num_frames], atol=TOLERANCE, rtol=0)
    assert torch.allclose(sres, expected, atol=TOLERANCE, rtol=0)


def test_truncation_pulls_every_frame_towards_one(tiny_lres, tiny_sres):
    names = set(tiny_lres.state_dict())
    plain, half, none = (video(make_sampler(tiny_lres, truncation=psi), [1, 2], 0, 20) for psi in (1.0, 0.5, 0.0))
    assert torch.equal(plain, video(make_sampler(tiny_lres), [1, 2], 0, 20))
    assert (none - none[:1, :, :1]).abs().max() < TOLERANCE
    assert plain.std(dim=2).mean() > half.std(dim=2).mean() > 100 * none.std(dim=2).mean()
    assert set(tiny_lres.state_dict()) == names

    def condition(starts, num_frames):
        frames = [noise_blocks(0, 3 * 18 * 32, start, num_frames).reshape(3, 18, 32, -1) for start in starts]
        return torch.from_numpy(np.stack(frames)).movedim(-1, 2)

    source = make_sampler(tiny_sres, truncation=0.0)
    tiny_sres.SG3.mapping.w_avg += 0.3
    same = video(source, [1, 2], 0, 3, condition)
    assert torch.allclose(same[0], same[1], atol=1e-6) and same.abs().max() > 1e-3
    other = video(make_sampler(tiny_sres), [1, 2], 0, 3, condition)
    assert not torch.allclose(other[0], other[1], atol=1e-3)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temporal_scale=0.3, truncation=0.8),
        Sampling(temporal_scale=1.7, blend=((5, 30), (6, 31))),
        Sampling(blend=((5, 16), (7, 40)), truncation=0.7),
        Sampling(loop=24),
        Sampling(loop=32, temporal_scale=0.75),
    ],
    ids=lambda sampling: ",".join(f"{k}={v}" for k, v in vars(sampling).items() if v != getattr(Sampling(), k)),
)
def test_every_sampling_gives_the_same_frames_from_any_start_in_any_pieces(tiny_lres, sampling):
    source = LowResSampler(tiny_lres, sampling)
    whole = video(source, [3, 4], -20, 80)
    assert not torch.allclose(whole, video(LowResSampler(tiny_lres), [3, 4], -20, 80), atol=1e-2)
    for start, count, chunk in [(-20, 9, 4), (-3, 30, 7), (17, 43, 64)]:
        part = video(LowResSampler(tiny_lres, sampling, chunk), [3, 4], start, count)
        assert torch.allclose(part, whole[:, :, start + 20 : start + 20 + count], atol=TOLERANCE, rtol=0)
    apart = video(source, [4, 3], [-5, 8], 20)
    assert torch.allclose(apart[0], whole[1, :, 15:35], atol=TOLERANCE, rtol=0)
    assert torch.allclose(apart[1], whole[0, :, 28:48], atol=TOLERANCE, rtol=0)


def test_a_loop_repeats_to_the_last_bit_and_moves_no_faster_across_its_seam(tiny_lres):
    for loop in (24, 72):
        frames = video(make_sampler(tiny_lres, loop=loop), list(range(20)), 0, 2 * loop)
        assert torch.equal(frames[:, :, :loop], frames[:, :, loop:])
        motion = frames.diff(dim=2).square().mean(dim=[0, 1, 3, 4]).sqrt()
        assert motion[loop - 1] < 1.25 * motion.mean() and motion.min() > 1e-3


def test_a_blend_ends_as_the_video_of_its_last_seed(tiny_lres, tiny_sres):
    """At low resolution; the super-resolution latent stays that of the video's own seed."""
    pair = make_sampler(tiny_lres, tiny_sres, blend=((9, 16),))
    assert isinstance(pair, PairSampler)
    lres, sres = outputs(pair, [3], 300, 8).values()
    assert torch.allclose(lres, video(make_sampler(tiny_lres), [9], 300, 8), atol=TOLERANCE)

    def condition(starts, num_frames):
        return video(make_sampler(tiny_lres), [9], starts, num_frames)

    assert torch.allclose(sres, video(make_sampler(tiny_sres), [3], 300, 8, condition), atol=TOLERANCE)
    early = video(pair.lres, [3], -300, 8)
    assert torch.allclose(early, video(make_sampler(tiny_lres), [3], -300, 8), atol=TOLERANCE)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rng": "old"}, "use 'blocks' or 'legacy'"),
        ({"truncation": float("nan")}, "use a number"),
        ({"temporal_scale": 0.0}, "use a positive number"),
        ({"blend": ((1, 8), (2, 8))}, r"frames \[8, 8\]: use ascending frames"),
        ({"blend": ((1, 0),)}, "use ascending frames from 1"),
        ({"loop": 0}, "use a positive number of frames"),
        ({"loop": 8, "blend": ((1, 4),)}, "loop and blend do not go together"),
        ({"rng": "legacy", "temporal_scale": 0.5}, "leave them out, or use rng 'blocks'"),
        ({"rng": "legacy", "loop": 8}, "leave them out, or use rng 'blocks'"),
    ],
)
def test_what_no_sampling_can_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_what_the_networks_cannot_do_is_refused(tiny_lres, tiny_sres):
    with pytest.raises(ValueError, match="every 8 frames, so use a multiple, such as 16"):
        make_sampler(tiny_lres, loop=18)
    with pytest.raises(ValueError, match="4.8 latent frames: use numbers whose product is whole"):
        make_sampler(tiny_lres, loop=16, temporal_scale=0.3)
    with pytest.raises(ValueError, match="act on a low-resolution network"):
        make_sampler(tiny_sres, temporal_scale=0.5)
    for source in (
        make_sampler(tiny_lres, rng="legacy"),
        make_sampler(tiny_lres, tiny_sres, rng="legacy"),
    ):
        with pytest.raises(ValueError, match="from 7 on.*begin at frame 0"):
            source.frames(Request([1], 7, 8))
        with pytest.raises(ValueError, match="without end.*give a number of frames"):
            source.frames(Request([1]))


def test_the_latent_of_a_pair_is_the_seeds_own_draw(tiny_sres):
    source = SuperResSampler(tiny_sres)
    lres = torch.randn(1, 3, 9, 18, 32)
    z = random_state("sres-z", 6, 0).standard_normal(16)
    found = video(source, [6], 4, 1, lambda starts, num_frames: lres[:, :, starts[0] : starts[0] + num_frames])
    assert torch.allclose(found, tiny_sres(lres, torch.from_numpy(z[None]).float()), atol=1e-6)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length():
    """In one process, so that the second peak can only be higher by what 16 times the frames take."""
    program = (
        "from benchmarks.generate import Task, measure\n"
        "for n in (256, 4096): print(measure(Task('stream', 'toy', False, n, 'cpu', 1)).peak)"
    )
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    short, long = map(float, output.split())
    assert long <= 1.05 * short


def test_gradients_are_enabled_for_the_consumer_of_the_frames(tiny_lres, tiny_sres):
    frames = make_sampler(tiny_lres, tiny_sres).frames(Request([0], 0, 20))
    next(frames)
    assert torch.is_grad_enabled()
