"""Token shards: any steps of any clip, the same windows as frames, and errors that name files."""

import concurrent.futures
import hashlib
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from tests.training.data.test_dataset import LARGE, SMALL, identify, make, spec
from training.contract import BatchSpec, CodeClip, FrameClip, Stream
from training.data.codes import CodeStore, codes_folder
from training.data.dataset import BatchStream, ClipDataset, to_device

SHA = hashlib.sha256(b"tokenizer").hexdigest()
SHARDS = [{"a": 9, "b/c": 12, "d": 3}, {"e": 10, "f": 20}]
GRID = (2, 4)


def tokens(number, steps):
    """Return tokens that tell their clip and step, and their cell."""
    cells = np.arange(GRID[0] * GRID[1]).reshape(GRID)
    return (1000 * number + 10 * np.arange(steps)[:, None, None] + cells % 10).astype(np.uint16)


def npy(array, version=(1, 0)):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version)
    return buffer.getvalue()


def write_zip(path, arrays, lengths=None, compression=zipfile.ZIP_STORED, **files):
    """Write a shard of {clip: array}, each as a file unless it is one already."""
    listed = {clip: [f"{clip}.npy", (lengths or {}).get(clip, len(array))] for clip, array in arrays.items()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for clip, array in arrays.items():
            archive.writestr(f"{clip}.npy", array if isinstance(array, bytes) else npy(array))
        archive.writestr("clips.json", json.dumps(listed))
        for name, content in files.items():
            archive.writestr(f"{name}.json", json.dumps(content))
    return path


def write_codes(root, shards=SHARDS, stride=1, clip_frames=1, **changes):
    """Write the tokens of a dataset of {clip: number of frames} a shard."""
    folder = codes_folder(root, SHA)
    folder.mkdir(parents=True, exist_ok=True)
    number, partitions = 0, {}
    for index, clips in enumerate(shards):
        arrays = {}
        for clip, num_frames in clips.items():
            steps = num_frames if stride == 1 else num_frames // clip_frames * clip_frames // stride
            arrays[clip] = tokens(number, steps)
            number += 1
        write_zip(folder / f"partition_{index:04d}.zip", arrays, clips)
        partitions[f"{index:04d}"] = {"clips": len(clips)}
    manifest = {"tokenizer": SHA, "grid": GRID, "vocabulary": 1 << 16, "stride": [stride, 4], "size": SMALL}
    manifest |= {"clip_frames": clip_frames, "fps": 24, "num_partitions": len(shards), "partitions": partitions}
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    return root


# ----------------------------------------------------------------------------
# Reading.


def test_any_steps_of_any_clip(tmp_path):
    store = CodeStore(write_codes(tmp_path), SHA)
    assert [(clip.path, clip.num_frames) for clip in store.clips] == [
        ("a", 9),
        ("b/c", 12),
        ("d", 3),
        ("e", 10),
        ("f", 20),
    ]
    assert (store.grid, store.vocabulary, store.stride) == (GRID, 1 << 16, (1, 4))
    for clip, first, count, stride in [(0, 0, 9, 1), (1, 3, 2, 1), (4, 1, 5, 4), (2, 2, 1, 1)]:
        found = store.read(clip, first, count, stride)
        assert found.dtype == np.uint16
        assert np.array_equal(found, tokens(clip, 20)[first : first + (count - 1) * stride + 1 : stride])
    with pytest.raises(AssertionError):
        store.read(2, 0, 4)


def test_a_slice_is_read_without_the_rest(tmp_path, monkeypatch):
    store = CodeStore(write_codes(tmp_path), SHA)
    reads, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *arguments: reads.append(arguments[1]) or pread(*arguments))
    store.read(4, 7, 2)
    assert reads == [2 * 8 * 2]


def test_a_store_is_shared_by_threads_and_by_a_forked_process(tmp_path):
    store = CodeStore(write_codes(tmp_path), SHA)

    def right(job, store=store):
        clip, step = job
        return np.array_equal(store.read(clip, step, 3), tokens(clip, 20)[step : step + 3])

    jobs = [(clip, step) for clip in (0, 1, 3, 4) for step in range(6)] * 10
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(right, jobs))
    child = os.fork()
    if child == 0:
        os._exit(0 if all(map(right, jobs)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert right((4, 2), pickle.loads(pickle.dumps(store)))


# ----------------------------------------------------------------------------
# Refusals.


def test_missing_tokens_name_the_command(tmp_path):
    make(tmp_path, SHARDS)
    with pytest.raises(ValueError, match=rf"no tokens of this tokenizer .*encode_dataset {tmp_path} --tokenizer=FILE"):
        ClipDataset(tmp_path, [SMALL], codes=SHA)
    with pytest.raises(ValueError, match="neither frames nor tokens"):
        ClipDataset(tmp_path, [])


def test_another_tokenizer_of_the_same_folder_name_is_refused(tmp_path):
    write_codes(tmp_path, tokenizer=SHA[:12] + "0" * 52)
    with pytest.raises(ValueError, match="holds tokens of another tokenizer"):
        CodeStore(tmp_path, SHA)


@pytest.mark.parametrize(
    "changes",
    [
        {"grid": [2]},
        {"grid": [2, 0]},
        {"vocabulary": (1 << 16) + 1},
        {"vocabulary": "many"},
        {"size": None},
        {"partitions": []},
        {"partitions": {"0000": {}}},
        {"fps": "fast"},
        {"clip_frames": True},
        {"tokenizer": 7},
    ],
)
def test_damaged_manifests_are_refused(tmp_path, changes):
    write_codes(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"manifest.json does not describe the tokens beside it"):
        CodeStore(tmp_path, SHA)


def test_no_manifest_is_refused(tmp_path):
    write_codes(tmp_path)
    (codes_folder(tmp_path, SHA) / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json does not describe .*no JSON"):
        CodeStore(tmp_path, SHA)
    (codes_folder(tmp_path, SHA) / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest.json does not describe .*FileNotFoundError"):
        CodeStore(tmp_path, SHA)


@pytest.mark.parametrize(
    ("array", "num_frames", "message"),
    [
        (
            tokens(0, 9).astype(np.int64),
            9,
            r"clip a in .* \(it is int64 of shape \[9, 2, 4\], but uint16 on a grid of 2x4",
        ),
        (tokens(0, 9)[:, :1], 9, r"it is uint16 of shape \[9, 1, 4\]"),
        (tokens(0, 9)[:, 0], 9, r"it is uint16 of shape \[9, 4\]"),
        (np.asfortranarray(tokens(0, 9)), 9, "uint16 on a grid"),
        (tokens(0, 9), 10, "it has 9 steps, but 10 frames give 10"),
        (tokens(0, 9), -1, "has -1 as a, expected a whole number from 0"),
        (npy(tokens(0, 9))[:-1], 9, "bytes, which do not fit its shape"),
        (npy(tokens(0, 9)).replace(b"(9, 2, 4)", b"(8, 2, 4)"), 8, "bytes, which do not fit its shape"),
        (npy(tokens(0, 9)).replace(b"(9, 2, 4), }    ", b"(99999999, 2, 4), }"), 9, "holds no tokens"),
        (npy(tokens(0, 9), (2, 0)), 9, "unknown version"),
        (b"", 0, "holds no tokens that can be read"),
        (b"no array at all", 9, "holds no tokens that can be read"),
    ],
)
def test_what_is_no_such_array_is_refused(tmp_path, array, num_frames, message):
    write_codes(tmp_path, SHARDS[1:])
    write_zip(codes_folder(tmp_path, SHA) / "partition_0000.zip", {"a": array}, {"a": num_frames})
    with pytest.raises(ValueError, match=message) as error:
        CodeStore(tmp_path, SHA)
    assert "partition_0000.zip and make it again: python -m dataset_tools.encode_dataset" in str(error.value)


def test_damaged_zips_are_refused(tmp_path):
    write_codes(tmp_path)
    path = codes_folder(tmp_path, SHA) / "partition_0001.zip"
    whole = path.read_bytes()
    for damaged in (
        whole[:-30],
        whole[100:],
        b"",
        whole[:40] + whole[60:],
        whole.replace(b"PK\x03\x04", b"PK\x03\x05"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"partition_0001.zip holds no tokens that can be read"):
            CodeStore(tmp_path, SHA)
    write_zip(path, {"e": tokens(0, 10)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed"):
        CodeStore(tmp_path, SHA)
    write_zip(path, {"a": tokens(0, 9)})
    with pytest.raises(ValueError, match="clip a is in two zips"):
        CodeStore(tmp_path, SHA)
    path.unlink()
    with pytest.raises(ValueError, match=r"partition_0001.zip is missing, though listed"):
        CodeStore(tmp_path, SHA)
    path.write_bytes(whole)
    path.with_name("partition_0007.zip").write_bytes(whole)
    with pytest.raises(ValueError, match=r"partition_0007.zip is there, though not listed"):
        CodeStore(tmp_path, SHA)


def test_damage_after_opening_is_named(tmp_path):
    store = CodeStore(write_codes(tmp_path, vocabulary=4005), SHA)
    assert store.read(3, 0, 10).max() < 4005
    with pytest.raises(ValueError, match=r"tokens of clip f in .*partition_0001.zip are damaged \(token 4017 of a voc"):
        store.read(4, 0, 2)
    os.truncate(codes_folder(tmp_path, SHA) / "partition_0001.zip", 300)
    with pytest.raises(ValueError, match="the file has become shorter"):
        store.read(4, 0, 20)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([{"a": 9, "b/c": 12, "e": 10, "f": 20}], "clip d is in 0008x0016 but not in codes-"),
        ([{"a": 9, "b/c": 12, "d": 4, "e": 10, "f": 20}], "clip d has 3 frames in 0008x0016 but 4 in codes-"),
        ([{"0": 9, "a": 9, "b/c": 12, "d": 3, "e": 10, "f": 20}], "clip 0 is in codes-.* but not in 0008x0016"),
    ],
)
def test_tokens_of_other_clips_name_the_first_difference(tmp_path, shards, message):
    make(tmp_path, SHARDS)
    write_codes(tmp_path, shards)
    with pytest.raises(ValueError, match=f"{message}.*encode_dataset"):
        ClipDataset(tmp_path, [SMALL], codes=SHA)


def test_unfinished_tokens_are_read_as_far_as_they_are_and_that_is_said(tmp_path, capsys):
    write_codes(tmp_path, num_partitions=5)
    assert len(ClipDataset(tmp_path, [], codes=SHA).clips) == 5
    assert "is unfinished: 3 of its 5 partitions have not been made" in capsys.readouterr().out


# ----------------------------------------------------------------------------
# Batches.


def window_of(codes):
    """Clip and first step of tokens (T, h, w)."""
    return divmod(int(codes[0, 0, 0]) // 10, 100)


def test_frames_and_tokens_of_one_window_in_threads_and_on_two_ranks(tmp_path):
    root = write_codes(make(tmp_path, SHARDS, [SMALL, LARGE]))
    dataset = ClipDataset(root, [SMALL, LARGE], codes=SHA)
    parts = (FrameClip("video", *SMALL, 1, 3, 2), CodeClip("codes", 0, 8), CodeClip("later", 2, 3, 2))
    both = BatchSpec(8, parts)
    stream = BatchStream(dataset, seed=0, batch_size=6, x_flip=False, num_workers=3)
    halves = [BatchStream(dataset, 0, 6, rank, 2, x_flip=False) for rank in range(2)]
    for n, batch in enumerate(stream.prefetch((n, both) for n in range(4))):
        assert batch["codes"].shape == (6, 8, *GRID) and batch["later"].shape == (6, 3, *GRID)
        for frames, codes, later in zip(*(batch[name].numpy() for name in ("video", "codes", "later")), strict=True):
            clip, first = window_of(codes)
            assert [identify(frame.astype(int))[:2] for frame in frames] == [(clip, first + t) for t in (1, 3, 5)]
            assert np.array_equal(later, tokens(clip, 20)[first + 2 : first + 7 : 2])
        sent = to_device(batch, torch.device("cpu"))
        assert sent["codes"].dtype == torch.int64 and torch.equal(sent["codes"], batch["codes"].to(torch.int64))
        assert sent["video"].shape == (6, 3, 3, *SMALL) and sent["video"].dtype == torch.float32
        for name in batch:
            assert torch.equal(torch.cat([half.batch(n, both)[name] for half in halves]), batch[name])


def test_tokens_alone_have_the_windows_that_frames_have(tmp_path):
    """Also where tokens are divided into other shards than frames."""
    make(tmp_path, SHARDS)
    write_codes(tmp_path, [{clip: length for clips in SHARDS for clip, length in clips.items()}])
    frames, alone = ClipDataset(tmp_path, [SMALL]), ClipDataset(tmp_path, [], codes=SHA)
    assert [clip.path for clip in frames.clips] == [clip.path for clip in alone.clips]
    assert alone.fps == 24 and frames.fps == 30
    for weighting in ("clip", "frame"):
        streams = [BatchStream(dataset, 5, 4, x_flip=False, weighting=weighting) for dataset in (frames, alone)]
        assert [streams[0].items(n, 5) for n in range(20)] == [streams[1].items(n, 5) for n in range(20)]


@pytest.mark.parametrize("weighting", ["clip", "frame"])
def test_windows_begin_where_a_step_of_several_frames_does(tmp_path, weighting):
    root = write_codes(make(tmp_path, SHARDS), stride=3, clip_frames=6)
    dataset = ClipDataset(root, [SMALL], codes=SHA)
    assert dataset.alignment == 3 and dataset.lengths.tolist() == [6, 12, 0, 6, 18]
    stream = BatchStream(dataset, seed=0, batch_size=16, x_flip=False, weighting=weighting)
    both = BatchSpec(6, (FrameClip("video", *SMALL, 0, 6), CodeClip("codes", 0, 2), CodeClip("last", 1, 1)))
    seen = set()
    for n in range(10):
        batch = stream.batch(n, both)
        for frames, codes, last in zip(*(batch[name].numpy() for name in ("video", "codes", "last")), strict=True):
            clip, first, _ = identify(frames[0].astype(int))
            assert first % 3 == 0 and window_of(codes) == (clip, first // 3)
            assert np.array_equal(codes[1:], last)
            seen.add((clip, first))
    assert seen == {(0, 0), (1, 0), (1, 3), (1, 6), (3, 0), *((4, start) for start in (0, 3, 6, 9, 12))}
    with pytest.raises(ValueError, match="windows of 7 frames do not end where a step of the tokens does.* 3 frames"):
        stream.batch(0, BatchSpec(7, (CodeClip("codes", 0, 2),)))
    with pytest.raises(AssertionError, match="reaches out"):
        stream.batch(0, BatchSpec(6, (CodeClip("codes", 0, 3),)))
    assert stream.batch(0, spec(7))["video"].shape[1] == 7  # frames alone may end anywhere


def test_what_cannot_be_mirrored_is_not(tmp_path):
    root = write_codes(make(tmp_path, SHARDS))
    (root / "labels.json").write_text(json.dumps({clip: 1 for clips in SHARDS for clip in clips}))
    dataset = ClipDataset(root, [SMALL], codes=SHA, streams=["label"])
    stream = BatchStream(dataset, seed=0, batch_size=2)
    with pytest.raises(ValueError, match="clips cannot be mirrored, for their codes would not be.*--x-flip=false"):
        stream.batch(0, BatchSpec(2, (FrameClip("video", *SMALL, 0, 2), CodeClip("codes", 0, 2))))
    batch = stream.batch(0, BatchSpec(2, (FrameClip("video", *SMALL, 0, 2), Stream("label", 0, 1))))
    assert batch["label"].tolist() == [[1], [1]] and batch["label"].dtype == torch.int64
