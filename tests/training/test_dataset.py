"""Datasets give the right frames, refuse what they cannot read by name, and batches depend on (seed, n) alone."""

import collections
import io
import json
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from training.dataset import BatchSpec, BatchStream, ClipDataset, ClipPart, VideoDataset, _decode_rgb

SMALL, LARGE = (8, 16), (16, 32)


def paint(clip, frame, size):
    """A picture that tells its clip by red, its frame by green, and left from right by blue."""
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
    return BatchSpec(num_frames, (ClipPart("video", *SMALL, 0, num_frames),))


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
    assert [identify(frame) for frame in dataset.read(1, SMALL, [3, 0, 0], flip=True)] == [
        (1, 3, True),
        (1, 0, True),
        (1, 0, True),
    ]


def test_compressed_members_and_long_local_heads_read_like_stored_ones(tmp_path):
    packed = ClipDataset(make(tmp_path / "packed", [{"a": 3}], compression=zipfile.ZIP_DEFLATED), [SMALL])
    stored = ClipDataset(make(tmp_path / "stored", [{"a": 3}]), [SMALL])
    path = tmp_path / "head" / "0008x0016" / "shard.zip"
    path.parent.mkdir(parents=True)
    long_name = "n" * 600 + ".jpg"
    with zipfile.ZipFile(path, "w") as archive:
        for frame, name in enumerate(["0.jpg", "1.jpg", long_name]):
            # A zip64 entry carries an extra field in its local head alone.
            with archive.open(zipfile.ZipInfo(f"a/{name}"), "w", force_zip64=True) as file:
                file.write(encode(paint(0, frame, SMALL), "JPEG"))
        archive.writestr("frame_paths.json", json.dumps({"a": ["0.jpg", "1.jpg", long_name]}))
    expected = stored.read(0, SMALL, range(3))
    assert np.array_equal(packed.read(0, SMALL, range(3)), expected)
    assert np.array_equal(ClipDataset(tmp_path / "head", [SMALL]).read(0, SMALL, range(3)), expected)


def test_the_faster_decoder_gives_the_same_pixels():
    pytest.importorskip("simplejpeg")
    noise = np.random.RandomState(0).randint(0, 256, (*SMALL, 3)).astype(np.uint8)
    data = encode(noise, "JPEG")
    assert np.array_equal(_decode_rgb(data, SMALL), np.asarray(Image.open(io.BytesIO(data))))


def test_reading_from_threads_and_from_a_pickled_copy(tmp_path):
    dataset = ClipDataset(make(tmp_path, [{"a": 20}, {"b": 20}]), [SMALL])
    before = dataset.read(1, SMALL, range(20))
    copy = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(copy.read(1, SMALL, range(20)), before)
    with ThreadPoolExecutor(8) as pool:
        jobs = [(index % 2, index % 20) for index in range(400)]
        found = list(pool.map(lambda job: identify(copy.read(job[0], SMALL, [job[1]])[0])[:2], jobs))
    assert found == jobs


def test_frame_rate_is_read_or_assumed_and_said_once(tmp_path, capsys):
    root = make(tmp_path, [{"a": 2}])
    assert ClipDataset(root, [SMALL]).fps == 30
    assert ClipDataset(root, [SMALL]).fps == 30
    assert capsys.readouterr().out.count("assuming 30 frames a second") == 1
    (root / "dataset.json").write_text('{"fps": 24}')
    assert ClipDataset(root, [SMALL]).fps == 24
    (root / "dataset.json").write_text("{}")
    with pytest.raises(ValueError, match="dataset.json does not give the frame rate"):
        ClipDataset(root, [SMALL])


def test_unfinished_zips_of_a_running_maker_are_not_read(tmp_path):
    root = make(tmp_path, [{"a": 2}])
    (root / "0008x0016" / ".partition_0001.17.tmp.zip").write_bytes(b"half")
    assert len(ClipDataset(root, [SMALL]).clips) == 1


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


@pytest.mark.parametrize(
    ("pixels", "kind", "reason"),
    [
        (paint(0, 0, SMALL)[..., 0], "JPEG", "colour mode is L"),
        (np.concatenate([paint(0, 0, SMALL), paint(0, 0, SMALL)[..., :1]], axis=2), "PNG", "colour mode is RGBA"),
        (paint(0, 0, (8, 18)), "JPEG", "size is 8x18"),
    ],
)
def test_foreign_frames_are_refused_by_name(tmp_path, pixels, kind, reason):
    path = tmp_path / "0008x0016" / "shard.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/good.jpg", encode(paint(0, 0, SMALL)))
        archive.writestr("a/bad.jpg", encode(pixels, kind))
        archive.writestr("frame_paths.json", '{"a": ["good.jpg", "bad.jpg"]}')
    dataset = ClipDataset(tmp_path, [SMALL])
    assert identify(dataset.read(0, SMALL, [0])[0]) == (0, 0, False)
    with pytest.raises(ValueError, match=rf"frame a/bad.jpg of .*shard.zip is not an RGB image of 8x16 .*{reason}"):
        dataset.read(0, SMALL, [1])


def test_broken_shards_are_refused_by_name(tmp_path):
    make(tmp_path, [{"a": 3}])
    path = tmp_path / "0008x0016" / "partition_0000.zip"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"partition_0000.zip is not a whole dataset shard"):
        ClipDataset(tmp_path, [SMALL])
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("frame_paths.json", '{"a": ["x.jpg"]}')
    with pytest.raises(ValueError, match=r"lists a/x.jpg but does not contain it"):
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


def test_parts_show_the_same_window_at_their_own_sizes(roots):
    stream = BatchStream(ClipDataset(roots, [SMALL, LARGE]), seed=0, batch_size=5)
    both = BatchSpec(8, (ClipPart("low", *SMALL, 0, 8), ClipPart("high", *LARGE, 3, 2)))
    for n in range(4):
        batch = stream.batch(n, both)
        assert batch["low"].shape == (5, 8, *SMALL, 3) and batch["high"].shape == (5, 2, *LARGE, 3)
        for low, high in zip(batch["low"].numpy(), batch["high"].numpy(), strict=True):
            clip, first, flip = identify(low[0].astype(int))
            assert [identify(frame.astype(int)) for frame in low] == [(clip, first + t, flip) for t in range(8)]
            assert [identify(frame.astype(int)) for frame in high] == [(clip, first + t, flip) for t in (3, 4)]


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
