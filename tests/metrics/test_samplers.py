"""Which clips are looked at: uniform over videos, the same for any batch size and number of ranks."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from metrics import samplers
from metrics.samplers import ClipShape
from training.dataset import ClipDataset

SIZE, LRES_SIZE = (16, 24), (8, 12)


@pytest.fixture(scope="module")
def dataset(dataset_path: Path) -> ClipDataset:
    return ClipDataset(dataset_path, [SIZE, LRES_SIZE])


class Counter:
    """Video whose red is the number of the frame and whose other colours tell the seed, in uneven chunks."""

    temporal_scale, context = 8, 0

    def sample(self, seeds: Sequence[int], start, num_frames: int, condition=None) -> Iterator[Tensor]:
        frame = torch.as_tensor(start)[:, None] + torch.arange(num_frames)
        seed = torch.as_tensor(seeds)[:, None].expand_as(frame)
        video = torch.stack([frame, seed % 256, seed // 256 % 256], dim=-1).to(torch.uint8)[:, :, None, None]
        yield from video.split([1, 2, 3, num_frames - 6] if num_frames > 6 else [num_frames], dim=1)


class Enlarger:
    """Doubles each pixel of the condition; frame t sees condition frames t - 2 to t + 2 and shows the one at t + 2."""

    temporal_scale, context = 1, 2

    def sample(self, seeds: Sequence[int], start, num_frames: int, condition=None) -> Iterator[Tensor]:
        assert condition is not None
        starts = [start] * len(seeds)
        for done in range(0, num_frames, 4):
            count = min(4, num_frames - done)
            lres = condition([first + done - 2 for first in starts], count + 4)
            video = lres[:, :, 4:].repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
            yield (video * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)


def by_item(batches: Iterator[tuple[list[int], Tensor]]) -> dict[int, Tensor]:
    return {item: clip for items, clips in batches for item, clip in zip(items, clips, strict=True)}


def test_each_pass_visits_every_video_that_is_long_enough_once(dataset: ClipDataset):
    span = 20
    eligible = dataset.eligible(span)
    windows = [samplers.real_window(dataset, eligible, "metric-real", 0, item, span) for item in range(60)]
    assert {dataset.clips[clip].path for clip in eligible} == {"a/long", "b/middle"}
    for visit in range(30):
        assert sorted(window.clip for window in windows[2 * visit : 2 * visit + 2]) == eligible
    assert all(0 <= window.start <= dataset.clips[window.clip].num_frames - span for window in windows)
    starts = {window.start for window in windows if dataset.clips[window.clip].path == "b/middle"}
    assert starts == set(range(6)), "30 draws of 6 places reach each"
    assert len({window.clip for window in windows[0::2]}) == 2, "the order changes from pass to pass"


def test_real_clips_hold_the_windows_frames(dataset: ClipDataset):
    shape = ClipShape(num_frames=5, spacing=3)
    clips = by_item(samplers.real_clips(dataset, SIZE, shape, range(4), seed=1, batch=3))
    eligible = dataset.eligible(13)
    for item, clip in clips.items():
        window = samplers.real_window(dataset, eligible, "metric-real", 1, item, 13)
        expected = dataset.read(window.clip, SIZE, [window.start + 3 * i for i in range(5)])
        np.testing.assert_array_equal(clip.permute(1, 2, 3, 0), expected)


def test_items_do_not_depend_on_batch_or_ranks(dataset: ClipDataset):
    shape = ClipShape(9)
    real = by_item(samplers.real_clips(dataset, SIZE, shape, range(8), seed=0, batch=8))
    fake = by_item(samplers.generated_clips(Counter(), shape, range(8), seed=0, batch=8))
    assert list(real) == list(fake) == list(range(8))
    for rank in range(2):
        own = range(rank, 8, 2)
        for item, clip in by_item(samplers.real_clips(dataset, SIZE, shape, own, seed=0, batch=1)).items():
            assert torch.equal(clip, real[item])
        for item, clip in by_item(samplers.generated_clips(Counter(), shape, own, seed=0, batch=3)).items():
            assert torch.equal(clip, fake[item])


@pytest.mark.parametrize("spacing", [1, 4])
def test_generated_clips_start_anywhere_in_a_temporal_scale(spacing: int):
    shape = ClipShape(10, spacing)
    clips = by_item(samplers.generated_clips(Counter(), shape, range(64), seed=2, batch=4))
    frames = torch.stack([clip[0, :, 0, 0].int() for clip in clips.values()])
    assert torch.equal(frames, frames[:, :1] + spacing * torch.arange(10))
    assert set(frames[:, 0].tolist()) == set(range(8))
    seeds = {tuple(clip[1:, 0, 0, 0].tolist()) for clip in clips.values()}
    assert len(seeds) > 60, "every item has a video of its own"


def test_super_resolution_alone_is_conditioned_on_real_windows(dataset: ClipDataset):
    """The first frame of the condition is `context` frames before the first generated one."""
    shape = ClipShape(9)
    clips = by_item(samplers.generated_clips(Enlarger(), shape, range(5), 3, 2, dataset, LRES_SIZE))
    eligible = dataset.eligible(13)
    assert len(eligible) == 2
    for item, clip in clips.items():
        window = samplers.real_window(dataset, eligible, "metric-condition", 3, item, 13)
        lres = dataset.read(window.clip, LRES_SIZE, range(window.start + 4, window.start + 13))
        np.testing.assert_array_equal(clip.permute(1, 2, 3, 0), lres.repeat(2, axis=1).repeat(2, axis=2))
