"""Datasets return the right frames, name what they cannot read, and batches depend on (seed, n) alone."""

import collections
import io
import itertools
import json
import tempfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from training.contract import BatchSpec, FrameClip
from training.data.dataset import BatchStream, ClipDataset, VideoDataset, to_device, to_float
from training.random import random_state

SMALL, LARGE = (8, 16), (16, 32)


def paint(clip, frame, size):
    """Return a picture that tells its clip by red, its frame by green, and left from right by blue."""
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = 20 * clip + 10, 6 * frame + 10
    pixels[:, size[1] // 2 :, 2] = 200
    return pixels


def encode(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"quality": 100, "subsampling": 0} if kind == "JPEG" else {}))
    return buffer.getvalue()


def identify(frame):
    """Clip, frame and whether it is mirrored, of a painted picture (H, W, 3)."""
    return round((frame[0, 0, 0] - 10) / 20), round((frame[0, 0, 1] - 10) / 6), bool(frame[0, 0, 2] > 100)


def make(root, shards, sizes=(SMALL,), kind="JPEG", compression=zipfile.ZIP_STORED):
    """`shards` is a list of {clip: number of frames}; clips are numbered in order of their appearance."""
    for size in sizes:
        folder = root / f"{size[0]:04d}x{size[1]:04d}"
        folder.mkdir(parents=True)
        number = 0
        for index, clips in enumerate(shards):
            paths = {}
            with zipfile.ZipFile(folder / f"partition_{index:04d}.zip", "w", compression) as archive:
                for clip, num_frames in clips.items():
                    paths[clip] = [f"frame_{frame:06d}.jpg" for frame in range(num_frames)]
                    for frame, name in enumerate(paths[clip]):
                        archive.writestr(f"{clip}/{name}", encode(paint(number, frame, size), kind))
                    number += 1
                archive.writestr("frame_paths.json", json.dumps(paths))
    return root


def spec(num_frames):
    return BatchSpec(num_frames, (FrameClip("video", *SMALL, 0, num_frames),))


# ----------------------------------------------------------------------------
# Reading.


def test_clips_come_by_shard_then_path_with_their_own_frames(tmp_path):
    root = make(tmp_path / "d", [{"b": 3, "c/d": 4}, {"a": 2}])
    dataset = ClipDataset(root, [SMALL])
    assert [(clip.path, clip.num_frames) for clip in dataset.clips] == [("b", 3), ("c/d", 4), ("a", 2)]
    assert dataset.name == "d"
    for index, clip in enumerate(dataset.clips):
        video = dataset.read(index, SMALL, range(clip.num_frames))
        expected = np.stack([paint(index, frame, SMALL) for frame in range(clip.num_frames)])
        assert video.dtype == np.uint8 and np.abs(video.astype(int) - expected).max() <= 4
    assert [identify(frame) for frame in dataset.read(1, SMALL, [3, 0, 0])] == [
        (1, 3, False),
        (1, 0, False),
        (1, 0, False),
    ]


def test_frame_rate_is_read_or_assumed_and_said_once(tmp_path, capsys):
    root = make(tmp_path, [{"a": 2}])
    assert ClipDataset(root, [SMALL]).fps == 30
    assert ClipDataset(root, [SMALL]).fps == 30
    assert capsys.readouterr().out.count("assuming 30 frames per second") == 1
    (root / "dataset.json").write_text('{"fps": 24}')
    assert ClipDataset(root, [SMALL]).fps == 24
    (root / "dataset.json").write_text("{}")
    with pytest.raises(ValueError, match="dataset.json does not give the frame rate"):
        ClipDataset(root, [SMALL])


def test_unfinished_zips_of_a_running_maker_are_not_read(tmp_path):
    root = make(tmp_path, [{"a": 2}])
    (root / "0008x0016" / ".partition_0001.17.tmp.zip").write_bytes(b"half")
    assert len(ClipDataset(root, [SMALL]).clips) == 1


def test_a_dataset_in_the_making_is_read_as_far_as_it_is_and_that_is_said_once(tmp_path, capsys):
    root = make(tmp_path, [{"a": 2}, {"b": 2}])
    description = {
        "fps": 24,
        "num_partitions": 5,
        "partitions": {"0000": {}, "0001": {}, "0003": {}},  # the last one came to hold no clip, and has no zip
        "hashes": {"0008x0016/partition_0000.zip": "", "0008x0016/partition_0001.zip": ""},
    }
    (root / "dataset.json").write_text(json.dumps(description))
    assert len(ClipDataset(root, [SMALL]).clips) == len(ClipDataset(root, [SMALL]).clips) == 2
    assert (
        capsys.readouterr().out
        == f"{root} is unfinished: 2 of its 5 partitions have not been made; continuing with the others\n"
    )
    (root / "0008x0016" / "partition_0001.zip").unlink()
    with pytest.raises(ValueError, match=r"partition_0001.zip is missing, though dataset.json lists it"):
        ClipDataset(root, [SMALL])
    (root / "dataset.json").write_text('{"fps": 2')
    with pytest.raises(ValueError, match=r"dataset.json is damaged .*python -m dataset_tools.merge"):
        ClipDataset(root, [SMALL])


@pytest.mark.parametrize("cache", ["ram", "memmap"])
def test_a_cache_changes_no_frame(tmp_path, monkeypatch, capsys, cache):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    root = make(tmp_path / "d", [{"a": 5, "b": 7}], [SMALL, LARGE])
    plain = ClipDataset(root, [SMALL, LARGE])
    for _ in range(2):
        cached = ClipDataset(root, [SMALL, LARGE], cache)
        for clip, size, frames in [(1, SMALL, [2, 3]), (1, SMALL, range(7)), (0, SMALL, [4, 0]), (1, LARGE, [6, 2, 2])]:
            for _ in range(2):
                assert np.array_equal(cached.read(clip, size, frames), plain.read(clip, size, frames))
    assert "12 decoded frames of 8x16 take 4.66e-06 GB" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no cache 'disk'; take one of none, ram, memmap"):
        ClipDataset(root, [SMALL], cache="disk")


# ----------------------------------------------------------------------------
# Refusals.


def test_a_missing_size_names_the_sizes_there_are_and_the_command(tmp_path):
    root = make(tmp_path, [{"a": 2}], [SMALL, LARGE])
    with pytest.raises(ValueError, match=r"no frames of 36x64; sizes found: 0008x0016, 0016x0032; .*--sizes 36x64"):
        ClipDataset(root, [(36, 64)])
    with pytest.raises(ValueError, match="folder of one frame size; give the dataset's root"):
        ClipDataset(root / "0008x0016", [SMALL])
    with pytest.raises(ValueError, match="is not a folder"):
        ClipDataset(root / "nothing", [SMALL])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": 3, "c": 3}, "clip b is in 0008x0016 but not in 0016x0032"),
        ({"a": 3, "b": 2, "c": 3}, "clip b has 3 frames in 0008x0016 but 2 in 0016x0032"),
        ({"A": 3, "a": 3, "b": 3, "c": 3}, "clip A is in 0016x0032 but not in 0008x0016"),
    ],
)
def test_sizes_that_differ_name_the_first_difference(tmp_path, other, message):
    make(tmp_path, [{"a": 3, "b": 3, "c": 3}], [SMALL])
    make(tmp_path, [other], [LARGE])
    with pytest.raises(ValueError, match=message):
        ClipDataset(tmp_path, [SMALL, LARGE])


def test_sizes_may_be_sharded_differently(tmp_path):
    make(tmp_path, [{"a": 3, "b": 3, "c": 3}], [SMALL])
    make(tmp_path, [{"a": 3}, {"b": 3, "c": 3}], [LARGE])
    dataset = ClipDataset(tmp_path, [LARGE, SMALL])
    assert [identify(dataset.read(2, size, [1])[0]) for size in (SMALL, LARGE)] == [(2, 1, False)] * 2


def test_a_clip_in_two_shards_is_refused(tmp_path):
    make(tmp_path, [{"a": 3, "b": 2}, {"b": 2}])
    with pytest.raises(ValueError, match=r"clip b is both in .*partition_0000.zip and in .*partition_0001.zip"):
        ClipDataset(tmp_path, [SMALL])


def test_too_short_clips_say_what_is_needed_and_what_there_is(tmp_path):
    make(tmp_path, [{"a": 3, "b": 7}])
    with pytest.raises(ValueError, match=r"no clip of 8 frames, which are needed; the longest of its 2 clips has 7"):
        VideoDataset(tmp_path, 8, *SMALL)
    with pytest.raises(ValueError, match=r"no clip of 9 frames"):
        VideoDataset(tmp_path, 3, *SMALL, min_spacing=4, max_spacing=4)
    with pytest.raises(ValueError, match="cannot be shared evenly by 3 ranks"):
        BatchStream(ClipDataset(tmp_path, [SMALL]), seed=0, batch_size=4, world_size=3)


# ----------------------------------------------------------------------------
# VideoDataset.


def test_video_dataset_items(tmp_path):
    make(tmp_path, [{"a": 3, "b": 6}, {"c": 9}])
    dataset = VideoDataset(tmp_path, 4, *SMALL)
    assert len(dataset) == 2  # a is too short
    assert len(VideoDataset(tmp_path, 4, *SMALL, min_video_length=7)) == 1
    item = dataset[1]
    assert item["spacing"] == 1 and item["video"].shape == (3, 4, *SMALL) and item["video"].dtype == torch.float32
    frames = (127.5 * item["video"] + 128).floor().clamp(0, 255).to(torch.uint8).movedim(0, -1).numpy()
    clip, first, _ = identify(frames[0].astype(int))
    assert clip == 2
    assert np.array_equal(frames, ClipDataset(tmp_path, [SMALL]).read(2, SMALL, range(first, first + 4)))


def test_video_dataset_draws_all_starts_spacings_and_flips(tmp_path):
    make(tmp_path, [{"a": 8}])
    dataset = VideoDataset(tmp_path, 3, *SMALL, max_spacing=9, x_flip=True)
    torch.manual_seed(0)
    seen = collections.Counter()
    for _ in range(600):
        item = dataset[0]
        numbers = [identify(frame) for frame in ((item["video"].movedim(0, -1) + 1) * 127.5).numpy()]
        assert np.diff([frame for _, frame, _ in numbers]).tolist() == [item["spacing"]] * 2
        seen[item["spacing"], numbers[0][1], numbers[0][2]] += 1
    # Spacings 1, 2, 3 leave 6, 4 and 2 starts among 8 frames.
    assert {key[:2] for key in seen} == {(s, start) for s in (1, 2, 3) for start in range(8 - 2 * s)}
    for spacing in (1, 2, 3):
        assert 150 < sum(count for key, count in seen.items() if key[0] == spacing) < 250
    assert 240 < sum(count for key, count in seen.items() if key[2]) < 360


# ----------------------------------------------------------------------------
# BatchStream.


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    root = tmp_path_factory.mktemp("stream")
    return make(root, [{"a": 9, "b": 12, "c": 2}, {"d": 9, "e": 10, "f": 20}], [SMALL, LARGE])


def test_two_ranks_make_the_batches_of_one(roots):
    dataset = ClipDataset(roots, [SMALL])
    whole = BatchStream(dataset, seed=3, batch_size=4)
    halves = [BatchStream(dataset, seed=3, batch_size=4, rank=rank, world_size=2) for rank in range(2)]
    for n in (0, 1, 7):
        parts = [stream.batch(n, spec(9))["video"] for stream in halves]
        assert parts[0].shape == (2, 9, *SMALL, 3) and parts[0].dtype == torch.uint8
        assert torch.equal(torch.cat(parts), whole.batch(n, spec(9))["video"])


def test_prefetched_batches_equal_direct_ones_in_any_order(roots):
    requests = [(5, spec(9)), (0, spec(3)), (1, spec(9)), (5, spec(9)), (2, spec(1)), (9, spec(12))]
    direct = BatchStream(ClipDataset(roots, [SMALL]), seed=1, batch_size=3)
    expected = {n: direct.batch(n, request)["video"] for n, request in sorted(requests, key=lambda item: item[0])}
    for num_workers in (0, 3):
        stream = BatchStream(ClipDataset(roots, [SMALL]), seed=1, batch_size=3, num_workers=num_workers)
        batches = list(stream.prefetch(iter(requests)))
        assert len(batches) == len(requests)
        for (n, _), batch in zip(requests, batches, strict=True):
            assert torch.equal(batch["video"], expected[n])
    other = BatchStream(ClipDataset(roots, [SMALL]), seed=2, batch_size=3)
    assert not torch.equal(other.batch(5, spec(9))["video"], expected[5])


def test_prefetch_takes_from_an_endless_stream_only_what_it_needs(roots):
    taken = []

    def requests():
        while True:
            taken.append(len(taken))
            yield len(taken), spec(2)

    stream = BatchStream(ClipDataset(roots, [SMALL]), seed=0, batch_size=2, num_workers=2)
    batches = stream.prefetch(requests())
    next(batches)
    assert len(taken) == 3
    batches.close()


def test_prefetch_passes_errors_on(tmp_path):
    make(tmp_path, [{"a": 3}], kind="PNG")
    stream = BatchStream(ClipDataset(tmp_path, [SMALL]), seed=0, batch_size=2, num_workers=2)
    with pytest.raises(ValueError, match="no clip of 4 frames"):
        list(stream.prefetch([(0, spec(4))]))


def test_an_error_in_a_thread_comes_with_its_batch_and_no_thread_stays(tmp_path):
    make(tmp_path, [{"a": 1, "b": 1, "c": 1, "d": 1}])
    path = tmp_path / "0008x0016" / "partition_0000.zip"
    dataset = ClipDataset(tmp_path, [SMALL])
    stream = BatchStream(dataset, seed=0, batch_size=1, num_workers=3)
    bad = stream.items(2, 1)[0][0]
    place = path.read_bytes().index(f"{dataset.clips[bad].path}/frame".encode())
    with open(path, "r+b") as file:
        file.seek(place + 300)
        file.write(bytes(50))
    batches = stream.prefetch((n, spec(1)) for n in itertools.count())
    assert next(batches)["video"].shape == next(batches)["video"].shape
    with pytest.raises(ValueError, match=f"frame frame_000000.jpg of clip {dataset.clips[bad].path} in {path}"):
        next(batches)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_a_consumer_that_stops_early_leaves_no_thread(roots):
    stream = BatchStream(ClipDataset(roots, [SMALL]), seed=0, batch_size=4, num_workers=3)
    for _ in stream.prefetch((n, spec(9)) for n in itertools.count()):
        break  # the generator is not closed but dropped
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_parts_show_the_same_window_at_their_own_sizes(roots):
    stream = BatchStream(ClipDataset(roots, [SMALL, LARGE]), seed=0, batch_size=5)
    both = BatchSpec(8, (FrameClip("low", *SMALL, 0, 8), FrameClip("high", *LARGE, 3, 2)))
    for n in range(4):
        batch = stream.batch(n, both)
        assert batch["low"].shape == (5, 8, *SMALL, 3) and batch["high"].shape == (5, 2, *LARGE, 3)
        for low, high in zip(batch["low"].numpy(), batch["high"].numpy(), strict=True):
            clip, first, _ = identify(low[0].astype(int))
            assert [identify(frame.astype(int)) for frame in low] == [(clip, first + t, False) for t in range(8)]
            assert [identify(frame.astype(int)) for frame in high] == [(clip, first + t, False) for t in (3, 4)]


def test_parts_with_a_stride_leave_frames_out(roots):
    stream = BatchStream(ClipDataset(roots, [SMALL, LARGE]), seed=0, batch_size=5)
    sparse = BatchSpec(9, (FrameClip("low", *SMALL, 0, 5, 2), FrameClip("high", *LARGE, 1, 3, 3)))
    for batch in stream.prefetch((n, sparse) for n in range(3)):
        for low, high in zip(batch["low"].numpy(), batch["high"].numpy(), strict=True):
            clip, first, _ = identify(low[0].astype(int))
            assert [identify(frame.astype(int))[:2] for frame in low] == [(clip, first + t) for t in (0, 2, 4, 6, 8)]
            assert [identify(frame.astype(int))[:2] for frame in high] == [(clip, first + t) for t in (1, 4, 7)]


@pytest.mark.parametrize(
    "parts",
    [
        (FrameClip("low", *SMALL, 0, 5, 2),),
        (FrameClip("low", *SMALL, -1, 2),),
        (FrameClip("low", *SMALL, 0, 0),),
        (FrameClip("low", *SMALL, 0, 1), FrameClip("low", *SMALL, 1, 1)),
        (FrameClip("x_flip", *SMALL, 0, 1),),
    ],
)
def test_parts_lie_in_the_window_under_names_of_their_own(roots, parts):
    with pytest.raises(AssertionError):
        BatchStream(ClipDataset(roots, [SMALL]), seed=0, batch_size=2).batch(0, BatchSpec(8, parts))


def test_flips_are_announced_and_made_on_the_way_to_the_device(roots):
    dataset = ClipDataset(roots, [SMALL, LARGE])
    both = BatchSpec(8, (FrameClip("low", *SMALL, 0, 8), FrameClip("high", *LARGE, 3, 2)))
    stream = BatchStream(dataset, seed=0, batch_size=6, rank=1, world_size=2)
    seen = set()
    for n in range(4):
        batch = stream.batch(n, both)
        before = {name: part.clone() for name, part in batch.items()}
        flips = [flip for _, _, flip in stream.items(n, 8)[3:]]
        assert batch["x_flip"].tolist() == flips
        sent = to_device(batch, torch.device("cpu"))
        assert sorted(sent) == ["high", "low"] and all(torch.equal(batch[name], before[name]) for name in batch)
        for name, video in sent.items():
            assert video.dtype == torch.float32 and video.is_contiguous()
            for frames, stored, flip in zip(video, batch[name].numpy(), flips, strict=True):
                expected = stored[:, :, ::-1] if flip else stored
                assert np.array_equal(
                    frames.movedim(0, -1).numpy(), expected.astype(np.float32) / np.float32(127.5) - 1
                )
        seen |= set(flips)
    assert seen == {False, True}
    assert "x_flip" not in BatchStream(dataset, seed=0, batch_size=6, x_flip=False).batch(0, both)


def test_to_float_maps_the_whole_range():
    frames = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 1, 3)
    assert to_float(frames, torch.device("cpu")).flatten().tolist() == pytest.approx([-1, -0.6, 1])


def test_what_is_no_frames_is_moved_as_it_is():
    batch = {"codes": torch.tensor([[[[7]]]], dtype=torch.int32), "actions": torch.tensor([[1, 2]])}
    batch["poses"] = torch.tensor([[[0.5, -3.0]]])
    sent = to_device({**batch, "x_flip": torch.tensor([True])}, torch.device("cpu"))
    assert {name: part.dtype for name, part in sent.items()} == {
        "codes": torch.int64,
        "actions": torch.int64,
        "poses": torch.float32,
    }
    assert all(torch.equal(sent[name], part) for name, part in batch.items())


@pytest.mark.parametrize("batch_size", [2, 5, 13])
def test_each_eligible_clip_comes_once_an_epoch_whatever_the_batch(roots, batch_size):
    stream = BatchStream(ClipDataset(roots, [SMALL]), seed=0, batch_size=batch_size)
    clips = [clip for n in range(39) for clip, _, _ in stream.items(n, 9)]
    epochs = [clips[start : start + 5] for start in range(0, len(clips) - 4, 5)]
    assert all(sorted(epoch) == [0, 1, 3, 4, 5] for epoch in epochs)  # clip 2, of two frames, is too short
    assert len({tuple(epoch) for epoch in epochs}) > 10


def test_window_starts_are_uniform_and_half_of_the_windows_are_mirrored(roots):
    stream = BatchStream(ClipDataset(roots, [SMALL]), seed=0, batch_size=8)
    items = [item for n in range(500) for item in stream.items(n, 9)]
    starts = collections.Counter(start for clip, start, _ in items if clip == 5)  # 20 frames: 12 starts
    assert sorted(starts) == list(range(12))
    assert min(starts.values()) > 35 and max(starts.values()) < 105  # 800 windows: 67 expected, sigma 8
    assert all(start == 0 for clip, start, _ in items if clip in (0, 3))
    assert 0.46 < np.mean([flip for _, _, flip in items]) < 0.54
    still = BatchStream(ClipDataset(roots, [SMALL]), seed=0, batch_size=8, x_flip=False)
    assert still.items(7, 9) == [(clip, start, False) for clip, start, _ in stream.items(7, 9)]


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    num_frames=st.integers(1, 5),
    batch_size=st.integers(1, 20),
    n=st.integers(0, 10**9),
)
def test_every_window_lies_in_its_clip_and_is_a_function_of_seed_and_number(lengths, num_frames, batch_size, n):
    with tempfile.TemporaryDirectory() as folder:
        root = make(Path(folder), [{f"{clip:02d}": length for clip, length in enumerate(lengths)}], kind="PNG")
        dataset = ClipDataset(root, [SMALL])
    eligible = [clip for clip, length in enumerate(lengths) if length >= num_frames]
    if not eligible:
        with pytest.raises(ValueError, match=f"no clip of {num_frames} frames"):
            BatchStream(dataset, 7, batch_size).items(n, num_frames)
        return
    # The stream as its definition says, item by item.
    draws = random_state("data", 7, n).random_sample((batch_size, 2))
    expected = []
    for position, (start_draw, flip_draw) in enumerate(draws):
        epoch, place = divmod(n * batch_size + position, len(eligible))
        clip = eligible[random_state("data-order", 7, epoch).permutation(len(eligible))[place]]
        expected.append((clip, int(start_draw * (lengths[clip] - num_frames + 1)), bool(flip_draw < 0.5)))
    assert BatchStream(dataset, 7, batch_size).items(n, num_frames) == expected
    windows = [(clip, start) for clip in eligible for start in range(lengths[clip] - num_frames + 1)]
    expected = [(*windows[int(start_draw * len(windows))], bool(flip_draw < 0.5)) for start_draw, flip_draw in draws]
    assert BatchStream(dataset, 7, batch_size, weighting="frame").items(n, num_frames) == expected


@pytest.mark.parametrize("weighting", ["clip", "frame"])
def test_windows_are_as_likely_as_they_should_be(roots, weighting):
    stream = BatchStream(ClipDataset(roots, [SMALL]), seed=0, batch_size=64, weighting=weighting)
    lengths = {0: 9, 1: 12, 3: 9, 4: 10, 5: 20}
    windows = [(clip, start) for clip, length in lengths.items() for start in range(length - 9 + 1)]
    found = collections.Counter((clip, start) for n in range(300) for clip, start, _ in stream.items(n, 9))
    assert set(found) == set(windows)
    share = [1 / len(windows) if weighting == "frame" else 1 / 5 / (lengths[clip] - 8) for clip, _ in windows]
    counts = np.array([found[window] for window in windows])
    assert 0.001 < scipy.stats.chisquare(counts, counts.sum() * np.array(share)).pvalue < 0.999
    wrong = (
        np.full(len(windows), 1 / len(windows))
        if weighting == "clip"
        else np.array([1 / 5 / (lengths[clip] - 8) for clip, _ in windows])
    )
    assert scipy.stats.chisquare(counts, counts.sum() * wrong).pvalue < 1e-9
    with pytest.raises(ValueError, match="no weighting 'video'; take one of clip, frame"):
        BatchStream(stream.dataset, seed=0, batch_size=64, weighting="video")
