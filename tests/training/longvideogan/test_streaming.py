"""Pieces of any size and start are parts of the whole video, and need only their own time and memory."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.longvideogan.latents import LegacyLatents
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.streaming import History, LowResStream, Span, legacy_style_shifts, plan_window

TOLERANCE = 1e-5
WIDTHS = {3: (8, 8, 6, 6), 4: (8, 8, 8, 6, 6), 5: (8, 8, 8, 8, 6, 6)}  # of temporal blocks, by number of doublings
NETWORKS: dict[int, LowResGenerator] = {}


def network_of(num_doublings: int) -> LowResGenerator:
    """Return one network for all examples of a property test. In double precision, as half of these few channels may be
    nearly silent and a whole of hundreds of frames then differs from itself by 1e-5 through rounding alone."""
    if num_doublings not in NETWORKS:
        torch.manual_seed(0)
        network = LowResGenerator(
            16, 16, 16, 4, 10, 60, 8, 8, temporal_channels=WIDTHS[num_doublings], spatial_channels=(4, 4, 4, 4)
        )
        NETWORKS[num_doublings] = network.double().requires_grad_(False)
    return NETWORKS[num_doublings]


def noise_for(network: LowResGenerator, num_frames: int, num_videos: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_frames)
    shape = (num_videos, network.noise_channels, network.num_noise_frames(num_frames))
    return torch.randn(shape, generator=generator, dtype=network.spatial_input.dtype)


def needed_by_definition(frames: range, num_doublings: int) -> list[set[int]]:
    """Input samples of each temporal block, coarsest first, by following every sample through every layer."""
    needed: list[set[int]] = []
    outputs = set(frames)
    for level in range(num_doublings + 1):
        sums = outputs
        if level > 0:  # doubled: an even sample lies a quarter behind one, an odd one a quarter before the next
            sums = {i // 2 + step for i in outputs for step in ((-1, 0) if i % 2 == 0 else (0, 1))}
        outputs = {i + tap for i in sums for tap in (-2, -1, 0, 1, 2)}  # two 3-tap convolutions
        needed.insert(0, outputs)
    return needed


@given(
    start=st.integers(-10_000_100, 10_000_100),
    count=st.integers(1, 100),
    num_doublings=st.integers(3, 5),
    length=st.integers(1, 500),
)
def test_a_plan_is_what_the_layers_reach_and_no_more(start, count, num_doublings, length):
    shifts = legacy_style_shifts(length, num_doublings)
    plan = plan_window(Span(start, start + count), shifts)
    needed = needed_by_definition(range(start, start + count), num_doublings)
    assert [set(range(*span)) for span in plan.features] == needed
    track: set[int] = set()
    for span, features, shift in zip(plan.tracks, needed, shifts, strict=True):
        styles = {i + shift for i in features}
        track = styles | {2 * i + tap for i in track for tap in range(-5, 7)}  # 12 taps around the middle of a pair
        assert span.start <= min(track) and max(track) < span.stop
        track = set(range(*span))
    assert plan.features[0].stop - plan.features[0].start <= count / 2**num_doublings + 13


def test_styles_are_late_where_the_published_network_crops_unevenly():
    for length, frames_late in [(32, 0), (160, 0), (312, 4), (48, 8), (304, 8), (129, 15), (33, 15)]:
        assert legacy_style_shifts(length, 5)[-1] == frames_late
    assert legacy_style_shifts(64, 5) == [0] * 6 and legacy_style_shifts(24, 3) == [0] * 4


@settings(max_examples=60)
@given(data=st.data(), num_doublings=st.integers(3, 5), legacy=st.booleans())
def test_any_pieces_from_anywhere_are_parts_of_the_whole(data, num_doublings, legacy):
    network = network_of(num_doublings)
    length = data.draw(st.integers(1, 100), "length")
    start = data.draw(st.integers(0, length - 1), "start")
    cuts = sorted(data.draw(st.sets(st.integers(start + 1, length), max_size=4), "cuts") | {length})
    noise = noise_for(network, length)
    whole = network.synthesize(noise, length, legacy_alignment=legacy)
    shifts = legacy_style_shifts(length, num_doublings) if legacy else ()
    stream = LowResStream(network, LegacyLatents(network, noise), start, shifts)
    pieces = torch.cat([stream.advance(cut) for cut in cuts], dim=2)
    assert torch.allclose(pieces, whole[:, :, start:], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("length", [78, 141, 160])
def test_single_precision_agrees_as_well(tiny_lres, length):
    noise = noise_for(tiny_lres, length, num_videos=2)
    whole = tiny_lres.synthesize(noise, length, legacy_alignment=True)
    assert whole.dtype == torch.float32 and whole.std() > 0.02
    shifts = legacy_style_shifts(length, 3)
    latents = LegacyLatents(tiny_lres, noise)
    stream = LowResStream(tiny_lres, latents, 0, shifts)
    pieces = torch.cat([stream.advance(min(done + 13, length)) for done in range(0, length, 13)], dim=2)
    assert torch.allclose(pieces, whole, atol=TOLERANCE, rtol=0)
    window = LowResStream(tiny_lres, latents, 50, shifts).advance(71)
    assert torch.allclose(window, whole[:, :, 50:71], atol=TOLERANCE, rtol=0)


def held(stream: LowResStream) -> int:
    """Return numbers that a stream keeps between pieces."""
    blocks = [history for block in stream.blocks for history in (block.hidden, block.sums, block.output)]
    histories = [*stream.latents, stream.input, *blocks]
    return sum(math.prod(history.samples.shape) for history in histories if history.samples is not None)


def test_w_is_asked_for_once_and_no_more_is_held_after_many_pieces_or_far_away(tiny_lres):
    """Which is what constant memory and constant cost come down to."""
    sizes: dict[int, list[int]] = {}
    spans: dict[int, list[Span]] = {}
    for start in (0, 10_000_000, -10_000_000):
        asked = spans.setdefault(start, [])

        def tracks(first: int, last: int, asked: list[Span] = asked) -> torch.Tensor:
            asked.append(Span(first, last))
            return torch.ones(1, 24, last - first)

        stream = LowResStream(tiny_lres, tracks, start)
        for done in range(0, 400, 16):
            assert stream.advance(start + done + 16).shape == (1, 3, 16, 18, 32)
            sizes.setdefault(start, []).append(held(stream))
        assert all(earlier.stop == later.start for earlier, later in zip(asked, asked[1:], strict=False))
        assert all(stop - first == 16 for first, stop in asked[1:])
    assert len(set(sizes[0][1:])) == 1
    assert sizes[0] == sizes[10_000_000] == sizes[-10_000_000]
    relative = {start: [(a - start, b - start) for a, b in asked] for start, asked in spans.items()}
    assert relative[0] == relative[10_000_000] == relative[-10_000_000]


def test_a_history_gives_what_it_holds_by_number():
    history = History(-3)
    history.append(torch.arange(-3, 4).reshape(1, 1, -1))
    history.forget(-1)
    history.append(torch.arange(4, 6).reshape(1, 1, -1))
    assert history.read(0, 5).flatten().tolist() == [0, 1, 2, 3, 4]
    assert history.read(-1, -1).shape == (1, 1, 0)
    for start, stop in [(-2, 0), (5, 7)]:
        with pytest.raises(AssertionError):
            history.read(start, stop)


def test_what_is_left_of_a_history_stays_where_it_is():
    """Tensors allocated anew in each piece would leave gaps in the heap."""
    history, places = History(0), set()
    for stop in range(10, 200, 9):
        history.append(torch.arange(history.stop, stop).reshape(1, 1, -1))
        for first in (stop - 4 - stop % 2, stop - 3):  # the second overlaps with the first
            history.forget(first)
            assert history.read(first, stop).flatten().tolist() == list(range(first, stop))
        assert history.samples is not None
        places.add(history.samples.data_ptr())
    assert len(places) <= 2  # the first is too small for five
