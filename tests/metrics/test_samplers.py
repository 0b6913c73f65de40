"""The choice of clips: uniform over videos, independent of batch size and number of ranks."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from metrics import samplers
from metrics.families import ClipShape
from training.data.dataset import ClipDataset
from training.data.prompts import ClipPrompt
from training.sampling import Needs, Request, Sampler

SIZE, LRES_SIZE = (16, 24), (8, 12)


@pytest.fixture(scope="module")
def dataset(dataset_path: Path) -> ClipDataset:
    return ClipDataset(dataset_path, [SIZE, LRES_SIZE])


class Counter(Sampler):
    """Video whose red is the number of the frame and whose other colours are the seed, in uneven chunks."""

    period, outputs = 8, {"video": (1, 1)}

    def video(self, request: Request) -> Iterator[Tensor]:
        num_frames = request.num_frames
        assert num_frames is not None
        frame = torch.as_tensor(request.starts)[:, None] + torch.arange(num_frames)
        seed = torch.as_tensor(request.seeds)[:, None].expand_as(frame)
        video = torch.stack([frame, seed % 256, seed // 256 % 256], dim=-1).to(torch.uint8)[:, :, None, None]
        yield from video.split([1, 2, 3, num_frames - 6] if num_frames > 6 else [num_frames], dim=1)


class Enlarger(Sampler):
    """Doubles each pixel of the prompt; frame t is made of frames t - 2 to t + 2 and shows the one at t + 2."""

    outputs, needs = {"video": SIZE}, Needs(2, 2, LRES_SIZE, follows=True)

    def video(self, request: Request) -> Iterator[Tensor]:
        assert request.num_frames is not None
        for done in range(0, request.num_frames, 4):
            count = min(4, request.num_frames - done)
            lres = request.prompt.frames([first + done - 2 for first in request.starts], count + 4, LRES_SIZE)
            video = lres[:, :, 4:].repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
            yield (video * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)


def by_item(batches: Iterator[tuple[list[int], Tensor]]) -> dict[int, Tensor]:
    return {item: clip for items, clips in batches for item, clip in zip(items, clips, strict=True)}


def generated(
    sampler: Sampler, shape: ClipShape, items: Sequence[int], seed: int, batch: int, **options
) -> dict[int, Tensor]:
    counts = {shape: max(items) + 1}
    batches = samplers.generated_batches(sampler, counts, items, seed, batch, **options)
    return by_item((made.items, made.clips[shape]) for made in batches)


def test_each_pass_visits_every_video_that_is_long_enough_once(dataset: ClipDataset):
    span = 20
    eligible = dataset.eligible(span)
    windows = samplers.shuffled_windows(dataset, "metric-real", 0, 60, span)
    assert {dataset.clips[clip].path for clip in eligible} == {"a/long", "b/middle"}
    for visit in range(30):
        assert sorted(window.clip for window in windows[2 * visit : 2 * visit + 2]) == eligible
    assert all(0 <= window.start <= dataset.clips[window.clip].num_frames - span for window in windows)
    starts = {window.start for window in windows if dataset.clips[window.clip].path == "b/middle"}
    assert starts == set(range(6)), "30 draws of 6 places reach each"
    assert len({window.clip for window in windows[0::2]}) == 2, "the order changes from pass to pass"
    assert samplers.shuffled_windows(dataset, "metric-real", 0, 7, span) == windows[:7], "fewer are the first of more"


def test_other_ways_to_choose(dataset: ClipDataset):
    paths = [clip.path for clip in dataset.clips]
    first = samplers.sorted_windows(dataset, "metric-real", 0, 5, 20, is_at_start=True)
    assert [(paths[window.clip], window.start) for window in first] == [("a/long", 0), ("b/middle", 0)]
    starts = {samplers.sorted_windows(dataset, "metric-real", seed, 1, 20, False)[0].start for seed in range(200)}
    assert starts == set(range(21))
    everything = samplers.all_frames(dataset)
    assert len(everything) == len(set(everything)) == 40 + 12 + 25
    some = samplers.some_windows(dataset, "metric-real", 0, 30)
    assert len(set(some)) == 30 and set(some) < set(everything)
    assert some[:10] == samplers.some_windows(dataset, "metric-real", 0, 10)
    assert set(samplers.some_windows(dataset, "metric-real", 0, 1000)) == set(everything)
    assert samplers.num_different(dataset, 20) == 21 + 6
    longer = samplers.some_windows(dataset, "metric-real", 0, 1000, 20)
    every = {(0, first) for first in range(21)} | {(2, first) for first in range(6)}
    assert len(longer) == 27 and {(window.clip, window.start) for window in longer} == every


def test_single_frames_are_read_a_clip_at_a_time(dataset: ClipDataset):
    windows = samplers.some_windows(dataset, "metric-real", 0, 30)
    for items, clips in samplers.read_windows(dataset, SIZE, ClipShape(1), windows, range(30), batch=8):
        for item, clip in zip(items, clips, strict=True):
            expected = dataset.read(windows[item].clip, SIZE, [windows[item].start])
            np.testing.assert_array_equal(clip.permute(1, 2, 3, 0), expected)


def test_real_clips_hold_the_windows_frames(dataset: ClipDataset):
    shape = ClipShape(num_frames=5, spacing=3)
    clips = by_item(samplers.real_clips(dataset, SIZE, shape, range(4), seed=1, batch=3))
    windows = samplers.shuffled_windows(dataset, "metric-real", 1, 4, 13)
    for item, clip in clips.items():
        window = windows[item]
        expected = dataset.read(window.clip, SIZE, [window.start + 3 * i for i in range(5)])
        np.testing.assert_array_equal(clip.permute(1, 2, 3, 0), expected)


def test_items_do_not_depend_on_batch_or_ranks(dataset: ClipDataset):
    shape = ClipShape(9)
    real = by_item(samplers.real_clips(dataset, SIZE, shape, range(8), seed=0, batch=8))
    fake = generated(Counter(), shape, range(8), seed=0, batch=8)
    assert list(real) == list(fake) == list(range(8))
    for rank in range(2):
        own = range(rank, 8, 2)
        for item, clip in by_item(samplers.real_clips(dataset, SIZE, shape, own, seed=0, batch=1)).items():
            assert torch.equal(clip, real[item])
        for item, clip in generated(Counter(), shape, own, seed=0, batch=3).items():
            assert torch.equal(clip, fake[item])


def test_clips_of_several_lengths_are_cut_from_one_video():
    """Each shape's clips are those that it would have alone, and no frames are generated in vain."""
    needs = {ClipShape(9): 7, ClipShape(4, 8): 5, ClipShape(1): 11}
    asked = []

    class Asked(Counter):
        def video(self, request: Request) -> Iterator[Tensor]:
            asked.append((len(request.seeds), request.num_frames))
            return super().video(request)

    found: dict[ClipShape, dict[int, Tensor]] = {shape: {} for shape in needs}
    for made in samplers.generated_batches(Asked(), needs, range(11), seed=0, batch=4):
        for shape, video in made.clips.items():
            found[shape] |= dict(zip(made.items, video, strict=True))
    assert asked == [(4, 25), (1, 25), (2, 9), (4, 1)]
    for shape, num_items in needs.items():
        alone = generated(Counter(), shape, range(num_items), seed=0, batch=4)
        assert found[shape].keys() == alone.keys()
        assert all(torch.equal(found[shape][item], alone[item]) for item in alone)


@pytest.mark.parametrize("spacing", [1, 4])
def test_generated_clips_start_anywhere_in_a_period(spacing: int):
    shape = ClipShape(10, spacing)
    clips = generated(Counter(), shape, range(64), seed=2, batch=4)
    frames = torch.stack([clip[0, :, 0, 0].int() for clip in clips.values()])
    assert torch.equal(frames, frames[:, :1] + spacing * torch.arange(10))
    assert set(frames[:, 0].tolist()) == set(range(8))
    seeds = {tuple(clip[1:, 0, 0, 0].tolist()) for clip in clips.values()}
    assert len(seeds) > 60, "every item has a video of its own"
    still = generated(Counter(), shape, range(4), seed=2, batch=4, has_phase=False)
    assert {int(clip[0, 0, 0, 0]) for clip in still.values()} == {0}


@pytest.mark.parametrize("num_frames", [5, 40])
def test_long_videos_and_clips_are_cut_from_one_video(num_frames: int):
    """Clips are those that they would be without long videos; long videos have no frames beyond their length."""
    needs = {ClipShape(9): 2, ClipShape(4, 5): 6}
    asked = []

    class Asked(Counter):
        def video(self, request: Request) -> Iterator[Tensor]:
            asked.extend(request.seeds)
            return super().video(request)

    long = (3, num_frames)
    found: dict[ClipShape, dict[int, Tensor]] = {shape: {} for shape in needs}
    videos: dict[int, list[Tensor]] = {item: [] for item in range(3)}
    ends = []
    for made in samplers.generated_batches(Asked(), needs, range(6), seed=0, batch=4, long=long):
        if made.chunk is not None:
            for item, frames in zip(made.items, torch.as_tensor(made.chunk), strict=True):
                videos[item].append(frames)
            ends += made.items if made.is_end else []
        for shape, video in made.clips.items():
            found[shape] |= dict(zip(made.items, video, strict=True))
    assert len(asked) == len(set(asked)) == 6, "each video was generated once"
    assert ends == [0, 1, 2]
    for shape, num_items in needs.items():
        alone = generated(Counter(), shape, range(num_items), seed=0, batch=4)
        assert found[shape].keys() == alone.keys()
        assert all(torch.equal(found[shape][item], alone[item]) for item in alone)
    for item, seed in enumerate(asked[:3]):
        whole = torch.cat(videos[item])
        assert whole[:, 0, 0, 0].tolist() == list(range(num_frames))
        assert int(whole[0, 0, 0, 1]) == seed % 256
    only = list(samplers.generated_batches(Counter(), {}, range(3), seed=0, batch=4, long=long))
    assert sum(torch.as_tensor(made.chunk).shape[1] for made in only) == num_frames and only[-1].is_end


def test_a_sampler_without_random_access_is_asked_from_frame_0_on():
    """The clips are those that it gives with random access, and nothing is asked beyond their last frame."""
    asked = []

    class Forward(Counter):
        random_access = False

        def video(self, request: Request) -> Iterator[Tensor]:
            asked.append((request.starts, request.num_frames))
            return super().video(request)

    for has_phase in (True, False):
        clips = generated(Forward(), ClipShape(4, 3), range(6), 0, 3, has_phase=has_phase)
        expected = generated(Counter(), ClipShape(4, 3), range(6), 0, 3, has_phase=has_phase)
        assert all(torch.equal(clips[item], expected[item]) for item in range(6))
    assert {tuple(starts) for starts, _ in asked} == {(0, 0, 0)}
    assert [count for _, count in asked[2:]] == [10, 10]


def test_an_enlarger_is_prompted_with_real_windows(dataset: ClipDataset):
    """The first frame of a window is `past` frames before the first generated one."""
    shape = ClipShape(9)
    windows = samplers.shuffled_windows(dataset, "metric-condition", 3, 5, 13)
    places = samplers.shuffled_windows(dataset, "metric-condition", 3, 5, 13, past=2)
    assert places == [(clip, start + 2) for clip, start in windows]

    def make_prompt(items: Sequence[int]) -> ClipPrompt:
        return ClipPrompt(dataset, [places[item] for item in items])

    clips = generated(Enlarger(), shape, range(5), 3, 2, make_prompt=make_prompt)
    assert len(clips) == 5
    for item, clip in clips.items():
        window = windows[item]
        lres = dataset.read(window.clip, LRES_SIZE, range(window.start + 4, window.start + 13))
        np.testing.assert_array_equal(clip.permute(1, 2, 3, 0), lres.repeat(2, axis=1).repeat(2, axis=2))


def test_long_footage_is_read_window_by_window(dataset: ClipDataset):
    windows = samplers.shuffled_windows(dataset, "long-real", 0, 5, 36)
    found: dict[int, list[np.ndarray]] = {item: [] for item in range(5)}
    for made in samplers.read_long(dataset, SIZE, 36, windows, range(5), batch=2):
        chunk = np.asarray(made.chunk)
        assert made.is_end == (chunk.shape[1] == 4)
        for item, frames in zip(made.items, chunk, strict=True):
            found[item].append(frames)
    for window, frames in zip(windows, found.values(), strict=True):
        expected = dataset.read(window.clip, SIZE, range(window.start, window.start + 36))
        np.testing.assert_array_equal(np.concatenate(frames), expected)
