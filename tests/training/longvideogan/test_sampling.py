"""Streaming: any window, any pieces, any start give the same frames."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.sampling import LowResSource, Pair, SuperResSource, make_source, quantize
from training.random import noise_blocks

TOLERANCE = 1e-5


def video(source, seeds, start, num_frames, condition=None):
    return torch.cat(list(source.frames(seeds, start, num_frames, condition)), dim=2)


def test_noise_is_a_stream_of_numbered_blocks():
    whole = noise_blocks(5, 3, -700, 1500)
    for start, count in [(-700, 1), (-257, 514), (-1, 2), (0, 256), (255, 300)]:
        assert (noise_blocks(5, 3, start, count) == whole[:, start + 700 : start + 700 + count]).all()
    assert not (noise_blocks(6, 3, 0, 256) == noise_blocks(5, 3, 0, 256)).any()


@settings(max_examples=20, deadline=None)
@given(start=st.integers(-50, 50), count=st.integers(1, 40), chunk=st.integers(1, 48))
def test_any_window_in_any_pieces_is_part_of_the_whole(start, count, chunk):
    source = whole_source()
    whole = WHOLE.setdefault("video", video(source, [7, 8], -64, 192))
    pieces = video(LowResSource(source.network, chunk_frames=chunk), [7, 8], start, count)
    assert pieces.shape == (2, 3, count, 18, 32)
    assert torch.allclose(pieces, whole[:, :, start + 64 : start + 64 + count], atol=TOLERANCE)


WHOLE: dict = {}


def whole_source() -> LowResSource:
    """One network for every example of a property test."""
    if "source" not in WHOLE:
        torch.manual_seed(0)
        network = LowResGenerator(
            18, 32, 16, 4, 10, 60, 8, 8, temporal_channels=(8, 8, 6, 6), spatial_channels=(4, 4, 4, 4)
        )
        WHOLE["source"] = LowResSource(network.requires_grad_(False))
    return WHOLE["source"]


def test_each_video_may_start_elsewhere(tiny_lres):
    source = LowResSource(tiny_lres)
    both = video(source, [1, 2], [3, 10_000_005], 20)
    assert torch.allclose(both[:1], video(source, [1], 3, 20), atol=TOLERANCE)
    assert torch.allclose(both[1:], video(source, [2], 10_000_005, 20), atol=TOLERANCE)


def test_a_short_video_is_the_beginning_of_a_long_one(tiny_lres):
    source = LowResSource(tiny_lres)
    assert torch.allclose(video(source, [4], 0, 17), video(source, [4], 0, 90)[:, :, :17], atol=TOLERANCE)


def test_pair_enlarges_the_frames_of_its_low_resolution_video(tiny_lres, tiny_sres):
    pair = make_source(tiny_lres, tiny_sres)
    assert isinstance(pair, Pair)
    lres, sres = (torch.cat(parts, dim=2) for parts in zip(*pair.both([1, 2], [5, 9], 77), strict=True))
    assert torch.allclose(lres, video(pair.lres, [1, 2], [5, 9], 77), atol=TOLERANCE)

    def condition(starts, num_frames):
        return video(pair.lres, [1, 2], starts, num_frames)

    alone = video(SuperResSource(tiny_sres, chunk_frames=5), [1, 2], [5, 9], 77, condition)
    assert sres.shape == (2, 3, 77, 36, 64)
    assert torch.allclose(sres, alone, atol=TOLERANCE)
    assert torch.allclose(video(pair, [2], 40, 9), sres[1:, :, 31:40], atol=TOLERANCE)


def test_super_resolution_without_a_condition_is_refused(tiny_sres):
    with pytest.raises(ValueError, match="needs low-resolution frames"):
        next(make_source(sres=tiny_sres).frames([0], 0, 1))


def test_networks_of_different_runs_are_refused(tiny_lres, tiny_sres):
    tiny_lres.height = 36
    with pytest.raises(ValueError, match="makes frames of 36x32.*enlarges frames of 18x32"):
        make_source(tiny_lres, tiny_sres)


def test_quantisation_rounds_as_published():
    values = torch.tensor([-2.0, -1.0, -0.5 / 127.5, 0.0, 1.0, 3.0]).reshape(1, 1, 1, 1, -1)
    assert quantize(values).flatten().tolist() == [0, 0, 127, 128, 255, 255]


def test_sample_is_frames_quantised(tiny_lres):
    source = make_source(tiny_lres)
    whole = torch.cat(list(source.sample([3], 2, 70)), dim=1)
    assert whole.shape == (1, 70, 18, 32, 3) and whole.dtype == torch.uint8
    assert torch.equal(whole, quantize(video(source, [3], 2, 70)))
