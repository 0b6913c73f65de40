"""Published layouts are read as they are, by training, metrics and prompts, and what is damaged is named."""

import json
import os
import pickle
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from tests import golden_files
from tests.training.data.clips import drifting, write, write_pictures
from training.contract import BatchSpec, FrameClip, Stream
from training.data import resizing
from training.data.dataset import BatchStream, ClipDataset
from training.data.footage import is_dataset, open_videos
from training.data.layouts.find import find_layout
from training.data.layouts.folder import Folder
from training.data.layouts.frame_list import group_frames
from training.data.layouts.hdf5 import IndexedHdf5, RiverHdf5

SIZE = (12, 16)


def found_layout(path):
    """Return the layout at a path, which must have one."""
    layout = find_layout(path)
    assert layout is not None
    return layout


def clips_of(lengths, size=SIZE):
    """Return random clips of the given lengths, uint8 (T, H, W, 3)."""
    return [np.random.RandomState(n).randint(0, 256, (length, *size, 3), np.uint8) for n, length in enumerate(lengths)]


def write_river(folder, clips, per_shard=2):
    """Write shards of RIVER as its converter does, with one empty shard after a multiple of the shard's clips."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(len(clips) // per_shard + 1):
        with h5py.File(folder / f"shard_{shard + 1:04d}.hdf5", "w") as file:
            file.create_group("videos")
            lengths = file.create_group("len")
            for number, clip in enumerate(clips[shard * per_shard : (shard + 1) * per_shard]):
                lengths.create_dataset(str(number), data=len(clip))
                group = file.create_group(str(number))
                for frame, pixels in enumerate(clip):
                    group.create_dataset(str(frame), data=pixels, compression="lzf")
    return folder


def write_indexed(path, clips, split="train", has_end=True, **more):
    """Write an indexed file of TATS or MeBT."""
    with h5py.File(path, "a") as file:
        file.create_dataset(f"{split}_data", data=np.concatenate(clips))
        starts = np.cumsum([0, *map(len, clips)])
        file.create_dataset(f"{split}_idx", data=starts if has_end else starts[:-1])
    return path


def read_all(dataset, size):
    return {clip.path: dataset.read(number, size, range(clip.num_frames)) for number, clip in enumerate(dataset.clips)}


# ----------------------------------------------------------------------------
# RIVER.


@golden_files.entries("river", "h5*")
def test_shards_are_those_of_river(entry, golden, tmp_path):
    """Its reader also excludes the last start, so that a clip of exactly the span cannot be read; ours takes it."""
    text, seed = entry["input"], golden["about"]["seed"]
    lengths = [int(part) for part in golden_files.search(r"clips of ([\d,]+) frames", text)[1].split(",")]
    shape = tuple(int(part) for part in golden_files.search(r"frames (\d+x\d+x3)", text)[1].split("x"))
    first, step = map(int, golden_files.search(r"RS\((\d+)\+(\d+)i\+j\)", text).groups())
    per_shard = int(golden_files.search(r"(\d+) per shard", text)[1])
    count, skip, span = map(int, golden_files.search(r"reader: (\d+) frames, skip (\d+) \(span (\d+)\)", text).groups())
    resize, crop = map(int, golden_files.search(r"resize (\d+), crop (\d+)", text).groups())
    offset = int(golden_files.search(r"seed\(seed\+(\d+)\)", text)[1])
    sides = (resize, int(resize * shape[1] / shape[0]))
    sides = sides if shape[0] <= shape[1] else (int(resize * shape[0] / shape[1]), resize)
    size = (crop, crop) if crop == resize else sides  # the resizer crops what is longer than the size
    clips = [
        np.stack([draw(seed + first + step * number + frame, shape) for frame in range(length)])
        for number, length in enumerate(lengths)
    ]
    folder = write_river(tmp_path / "river", clips, per_shard)
    for name, listed in entry["layout"].items():
        with h5py.File(folder / name) as file:
            found = []
            file.visititems(lambda path, item, found=found: found.append(describe(path, item)))
        wanted = [line for line in listed if line != "..."]
        assert found[: len(wanted)] == wanted if "..." in listed else found == wanted
    layout = found_layout(folder)
    assert isinstance(layout, RiverHdf5) and [clip.num_frames for clip in layout.clips] == lengths
    dataset = ClipDataset(folder, [size])
    for item in entry["items"]:
        start = int(np.random.RandomState(seed + offset).choice(len(clips[item["index"]]) - span))
        frames = dataset.read(item["index"], size, range(start, start + span, skip + 1))
        top, left = (round((found - crop) / 2) for found in frames.shape[1:3])
        frames = frames[:, top : top + crop, left : left + crop]
        assert len(frames) == count
        golden_files.check(frames.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1, item["clip"], 1e-5)


def draw(seed, shape):
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def describe(path, item):
    if isinstance(item, h5py.Group):
        return f"{path}/"
    return f"{path} {item.shape} {item.dtype} {item.compression}"


def test_river_is_read_by_training_metrics_and_threads(tmp_path):
    clips = clips_of([7, 5, 6])
    folder = write_river(tmp_path / "river" / "train", clips)
    write_river(tmp_path / "river" / "val", clips[:1])
    dataset = ClipDataset(tmp_path / "river", [SIZE], cache="ram")
    assert [clip.path for clip in dataset.clips] == [
        "shard_0001/000000",
        "shard_0001/000001",
        "shard_0002/000000",
    ]
    for number, clip in enumerate(clips):
        assert np.array_equal(dataset.read(number, SIZE, range(len(clip))), clip)
        assert np.array_equal(dataset.read(number, SIZE, [3, 1, 3]), clip[[3, 1, 3]])
    with ThreadPoolExecutor(4) as pool:
        jobs = [(n, t) for n in range(3) for t in range(4)] * 8
        read = pool.map(lambda job: dataset.read(job[0], SIZE, [job[1]])[0], jobs)
        assert all(np.array_equal(found, clips[n][t]) for found, (n, t) in zip(read, jobs, strict=True))
    again = pickle.loads(pickle.dumps(found_layout(folder)))
    assert np.array_equal(again.read(1, [2, 4]), clips[1][[2, 4]])
    child, layout = os.fork(), dataset.layout
    if child == 0:
        assert layout is not None
        os._exit(0 if np.array_equal(layout.read(2, [0, 5]), clips[2][[0, 5]]) else 1)
    assert os.waitpid(child, 0)[1] == 0
    videos = open_videos(folder)
    assert videos.kind == "dataset" and videos.size == SIZE
    assert np.array_equal(videos.footage.read(1, SIZE, range(5)), clips[1])
    other = open_videos(write_river(tmp_path / "copy", clips))
    assert videos.content == other.content
    clips[0][0, 0, 0, 0] ^= 1
    assert open_videos(write_river(tmp_path / "changed", clips)).content != videos.content
    assert open_videos(folder / "shard_0001.hdf5").footage.clips[1].path == "000001"
    spec = BatchSpec(4, (FrameClip("video", 6, 8, 0, 4),))
    stream = BatchStream(ClipDataset(folder, [(6, 8)]), seed=0, batch_size=4, num_workers=2)
    assert [tuple(batch["video"].shape) for batch in stream.prefetch((n, spec) for n in range(2))] == [
        (4, 4, 6, 8, 3)
    ] * 2


def test_a_clip_that_the_converter_failed_at_is_left_out(tmp_path, capsys):
    folder = write_river(tmp_path / "river", clips_of([4, 5]))
    with h5py.File(folder / "shard_0001.hdf5", "a") as file:
        del file["0"]
    dataset = ClipDataset(folder, [SIZE])
    assert [clip.num_frames for clip in dataset.clips] == [5]
    assert "Left out, a clip with a length but without frames (1): shard_0001.hdf5 0" in capsys.readouterr().out


def damage(change):
    """Return a function that changes the open first shard."""

    def apply(folder):
        with h5py.File(folder / "shard_0001.hdf5", "a") as file:
            change(file)

    return apply


def replace(name, **arguments):
    def change(file):
        del file[name]
        file.create_dataset(name, **arguments)

    return damage(change)


def link_away(file):
    del file["0/0"]
    file["0/0"] = h5py.ExternalLink("elsewhere.hdf5", "/secret")


def store_away(file):
    del file["0/0"]
    file.create_dataset("0/0", (*SIZE, 3), np.uint8, external=[("/etc/hostname", 0, h5py.h5f.UNLIMITED)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace("len/0", data="seven"), "len/0 cannot be read .it is object"),
        (replace("len/0", data=-1), "len/0 is -1, expected a number of frames"),
        (replace("len/0", data=[1, 2]), r"of shape \[2\], expected int64 of shape \[\]"),
        (replace("len/0", data=2.5), "it is float64 of shape"),
        (damage(lambda file: file["len"].create_dataset("x", data=1)), "len has the entry x, expected a number"),
        (replace("0/0", data=np.zeros((*SIZE, 3), np.float32)), "float32 of shape .*expected frames uint8"),
        (replace("0/0", data=np.zeros(SIZE, np.uint8)), "expected frames uint8 of shape"),
        (replace("0/0", shape=(100_000, 100_000, 3), dtype=np.uint8, chunks=(8, 8, 3)), "expected edges from 1 to"),
        (damage(lambda file: file.move("0/0", "0/x")), "0: 0 is missing|: 0 is missing"),
        (damage(link_away), "is a link to another place, which is not followed"),
        (damage(store_away), "is stored in other files, which are not read"),
        (damage(lambda file: file.move("len", "lengths")), "which is no layout that is known"),
        (lambda folder: os.truncate(folder / "shard_0001.hdf5", 3000), "cannot be read"),
        (lambda folder: (folder / "shard_0001.hdf5").write_text("{}"), "cannot be read as HDF5"),
        (lambda folder: (folder / "shard_0001.hdf5").write_bytes(b""), "cannot be read as HDF5"),
    ],
)
def test_damaged_shards_of_river_are_refused(tmp_path, change, message):
    folder = write_river(tmp_path / "river", clips_of([4]), 3)
    change(folder)
    with pytest.raises(ValueError, match=message):
        ClipDataset(folder, [SIZE])


def test_damage_is_found_when_a_clip_is_read(tmp_path):
    flat = np.zeros((5, *SIZE, 3), np.uint8)  # LZF stores noise as it is, and has no checksum
    folder = write_river(tmp_path / "river", [*clips_of([4]), flat], 3)
    with h5py.File(folder / "shard_0001.hdf5", "a") as file:
        del file["0/2"], file["0/3"], file["1/3"]
        file["0/3"] = h5py.ExternalLink("elsewhere.hdf5", "/secret")
        file.create_dataset("1/3", data=np.zeros((4, 4, 3), np.uint8))
        place = file["1/4"].id.get_chunk_info(0).byte_offset
    with open(folder / "shard_0001.hdf5", "r+b") as file:
        file.seek(place)
        file.write(b"\xff" * 8)
    dataset = ClipDataset(folder, [SIZE])
    with pytest.raises(ValueError, match=r"0001.hdf5: 0/2 cannot be read .it is missing"):
        dataset.read(0, SIZE, range(4))
    with pytest.raises(
        ValueError, match=r"1/3 cannot be read .it is uint8 of shape \[4, 4, 3\], expected uint8 of shape"
    ):
        dataset.read(1, SIZE, [2, 3])
    with pytest.raises(ValueError, match="1/4 cannot be read"):
        dataset.read(1, SIZE, [4])
    with pytest.raises(ValueError, match="0/3 cannot be read .it is a link to another place"):
        dataset.read(0, SIZE, [1, 3])


# ----------------------------------------------------------------------------
# TATS and MeBT.


def test_indexed_files_have_splits(tmp_path):
    clips = clips_of([4, 7, 3])
    path = write_indexed(tmp_path / "set.h5", clips)
    write_indexed(path, clips[1:], "test", has_end=False)
    dataset = ClipDataset(path, [SIZE])
    assert isinstance(dataset.layout, IndexedHdf5) and dataset.layout.name == "set.h5/train"
    for number, clip in enumerate(clips):
        assert np.array_equal(dataset.read(number, SIZE, range(len(clip))), clip)
        assert np.array_equal(dataset.read(number, SIZE, [0, 2]), clip[[0, 2]])
    assert is_dataset(path / "test") and is_dataset(path)
    test = open_videos(path / "test")
    assert [clip.num_frames for clip in test.footage.clips] == [7, 3], "the last video is kept"
    assert np.array_equal(test.footage.read(0, SIZE, range(7)), clips[1])
    with pytest.raises(ValueError, match=r"set.h5 has no split val; it has test, train"):
        ClipDataset(path / "val", [SIZE])
    small = ClipDataset(path, [(6, 6)])
    assert np.array_equal(small.read(0, (6, 6), range(4)), resizing.resize_tats(clips[0], (6, 6)))


def test_indexed_files_have_texts(tmp_path):
    path = write_indexed(tmp_path / "set.h5", clips_of([4, 7]))
    (tmp_path / "train_text_description.txt").write_text("a cat runs\tthe cat\nMugen jumps\n")
    layout = found_layout(path)
    assert layout.texts() == {"000000": ["a cat runs", "the cat"], "000001": ["Mugen jumps"]}
    (tmp_path / "train_text_description.txt").write_text("a cat runs\n")
    with pytest.raises(ValueError, match="has 1 lines, expected one for each of 2 videos"):
        layout.texts()


@pytest.mark.parametrize(
    ("data", "index", "message"),
    [
        (np.zeros((5, *SIZE, 3), np.uint8), [0, 3, 9], "is not ascending from 0 to the 5 frames"),
        (np.zeros((5, *SIZE, 3), np.uint8), [3, 0, 5], "is not ascending"),
        (np.zeros((5, *SIZE, 3), np.uint8), [-1, 5], "is not ascending"),
        (np.zeros((5, *SIZE, 3), np.uint8), [0.5, 5], "expected a list of whole numbers"),
        (np.zeros((5, *SIZE, 3), np.uint8), np.zeros(0, int), "is not ascending"),
        (np.zeros((5, *SIZE, 3), np.float32), [0, 5], "expected frames uint8"),
        (np.zeros((5, *SIZE), np.int64), [0, 5], "expected frames uint8"),
        (np.zeros((*SIZE, 3), np.uint8), [0, 5], r"expected \[frames, H, W, 3\]"),
        (np.zeros((0, *SIZE, 3), np.uint8), [0], "holds no frames in train_data"),
    ],
)
def test_damaged_indexed_files_are_refused(tmp_path, data, index, message):
    with h5py.File(tmp_path / "set.hdf5", "w") as file:
        file.create_dataset("train_data", data=data)
        file.create_dataset("train_idx", data=index)
    with pytest.raises(ValueError, match=message):
        ClipDataset(tmp_path / "set.hdf5", [SIZE])


@golden_files.entries("mebt", "frame_list*")
def test_videos_of_a_list_are_those_of_mebt(entry, golden):
    (lines,) = [value for name, value in entry.items() if name.endswith(".txt")]
    found = [video for video in group_frames(lines, legacy=True) if len(video) >= entry["sequence_length"]]
    assert found == entry["videos"]
    ours = group_frames(lines)
    assert [video for video in entry["videos"] if video not in ours] == []
    assert sorted(line for video in ours for line in video) == sorted(lines), "no frame is lost"
    numbers = [[int(Path(line).stem.rpartition("_")[2]) for line in video] for video in ours]
    assert all(video == list(range(video[0], video[0] + len(video))) for video in numbers)


def test_lists_of_frames(tmp_path):
    clips = clips_of([3, 4], (12, 12))
    lines = []
    for name, clip in zip("ab", clips, strict=True):
        (tmp_path / "images" / name).mkdir(parents=True)
        for frame, pixels in enumerate(clip, start=8):  # 8, 9, 10: numbers of different digits
            path = tmp_path / "images" / name / f"v_{frame}.png"
            Image.fromarray(pixels).save(path)
            lines.append(str(path) if name == "a" else path.relative_to(tmp_path).as_posix())
    (tmp_path / "train.txt").write_text("\n".join(reversed(lines)) + "\n\n")
    (tmp_path / "test.txt").write_text("\n".join(lines[:3]))
    dataset = ClipDataset(tmp_path, [(12, 12)])
    assert sorted(clip.path for clip in dataset.clips) == sorted(clip.path for clip in found_layout(tmp_path).clips)
    found = read_all(dataset, (12, 12))
    assert sorted(map(len, found.values())) == [3, 4]
    assert any(np.array_equal(video, clips[0]) for video in found.values())
    assert any(np.array_equal(video, clips[1]) for video in found.values())
    test = ClipDataset(tmp_path / "test", [(6, 8)])
    assert [clip.num_frames for clip in test.clips] == [3]
    assert np.array_equal(test.read(0, (6, 8), range(3)), resizing.resize_mebt(clips[0], (6, 8)))
    assert open_videos(tmp_path / "test.txt").footage.clips[0].num_frames == 3
    (tmp_path / "images" / "a" / "v_8.png").unlink()
    with pytest.raises(ValueError, match=r"there is no .*v_8.png, which .*again.txt lists"):
        ClipDataset(shutil.copy(tmp_path / "test.txt", tmp_path / "again.txt"), [(6, 8)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"/x/a.png\n", "its line /x/a.png is no image such as video_0001.png"),
        (b"\n\n", "is empty"),
        (b"\xff\xfe\x00", "is no list of frames"),
        (b"/x/a_1.png", "there is no /x/a_1.png"),
    ],
)
def test_damaged_lists_are_refused(tmp_path, text, message):
    (tmp_path / "train.txt").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        ClipDataset(tmp_path / "train.txt", [SIZE])


# ----------------------------------------------------------------------------
# TECO and folders.


def write_npz(path, video, compressed=False, **arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    (np.savez_compressed if compressed else np.savez)(path, video=video, **arrays)
    return path


def test_npz_files_of_teco(tmp_path):
    clips = clips_of([5, 5, 5])
    actions = [np.array([0, 1, 2, 0, number]) for number in range(3)]
    for number, (clip, values) in enumerate(zip(clips, actions, strict=True)):
        split = "test" if number == 2 else "train"
        write_npz(tmp_path / "dmlab" / split / str(number) / "0.npz", clip, number == 1, actions=values)
    dataset = ClipDataset(tmp_path / "dmlab", [SIZE], streams=["actions"])
    assert [clip.path for clip in dataset.clips] == ["0/0", "1/0"] and isinstance(dataset.layout, Folder)
    for number in range(2):
        assert np.array_equal(dataset.read(number, SIZE, range(5)), clips[number])
        assert np.array_equal(dataset.read_stream(number, "actions", 0, 5), actions[number])
    assert dataset.facts().num_values == {"actions": 3}
    videos = open_videos(tmp_path / "dmlab" / "test")
    assert videos.kind == "dataset" and np.array_equal(videos.footage.read(0, SIZE, [4]), clips[2][4:])
    spec = BatchSpec(3, (FrameClip("video", *SIZE, 0, 3), Stream("actions", 0, 3)))
    batch = BatchStream(dataset, seed=0, batch_size=4, x_flip=False).batch(0, spec)
    for frames, values in zip(batch["video"].numpy(), batch["actions"].numpy(), strict=True):
        clip, start = next((n, t) for n in range(2) for t in range(3) if np.array_equal(frames, clips[n][t : t + 3]))
        assert np.array_equal(values, actions[clip][start : start + 3])
    assert dataset.open_stream("actions").read(1, 2, 2).tolist() == actions[1][2:4].tolist()
    with pytest.raises(ValueError, match="has no poses beside its frames; it has actions"):
        ClipDataset(tmp_path / "dmlab", [SIZE], streams=["poses"])


def test_videos_and_npz_files_of_teco(tmp_path, capsys):
    video = drifting("teco", 12)
    for number in range(3):
        path = tmp_path / "minecraft" / "train" / "0" / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, video)
        if number < 2:
            np.savez(path.with_suffix(".npz"), actions=np.arange(12) % 3)
    folder = tmp_path / "minecraft" / "train"
    dataset = ClipDataset(folder, [(16, 24)], streams=["actions"])
    assert [clip.path for clip in dataset.clips] == ["0/0", "0/1", "0/2"] and dataset.fps == 12
    whole = dataset.read(0, (16, 24), range(12))
    assert np.abs(whole.astype(int) - video).mean() < 8
    assert np.array_equal(dataset.read(1, (16, 24), [3, 7]), whole[[3, 7]])
    assert dataset.read_stream(0, "actions", 2, 3).tolist() == [2, 0, 1]
    assert dataset.read_stream(2, "actions", 0, 12).tolist() == [0] * 12, "without a file no action is taken"
    videos = open_videos(folder)
    assert videos.kind == "dataset" and len(videos.footage.clips) == 3
    assert np.array_equal(videos.footage.read(0, (16, 24), range(12)), whole)


def test_recordings_with_actions_in_any_format(tmp_path):
    video = drifting("recording", 6)
    names = ["none", "left", "left", "right", "none", "left"]
    for number, suffix in enumerate((".json", ".csv", ".npy")):
        path = write(tmp_path / f"clip{number}.mp4", video).with_suffix(f".actions{suffix}")
        if suffix == ".json":
            path.write_text(json.dumps(names[1:]))  # one less: nothing leads into the first frame
        elif suffix == ".csv":
            path.write_text("\n".join(names) + "\n")
        else:
            np.save(path, np.array(names))
    dataset = ClipDataset(tmp_path, [(16, 24)], streams=["actions"])
    for number in range(3):
        found = dataset.read_stream(number, "actions", 0, 6)
        assert [(dataset.streams["actions"].vocabulary or [])[index] for index in found] == names
    np.save(tmp_path / "clip2.actions.npy", np.array(names[:3]))
    with pytest.raises(ValueError, match="clip clip2 has 6 frames but 3 actions"):
        ClipDataset(tmp_path, [(16, 24)], streams=["actions"])


def test_folders_of_videos_and_of_images(tmp_path):
    video = drifting("folder", 8)
    write_pictures(tmp_path / "ucf" / "train" / "run" / "one", video)
    (tmp_path / "ucf" / "train" / "ride").mkdir()
    write(tmp_path / "ucf" / "train" / "ride" / "two.mp4", video)
    dataset = ClipDataset(tmp_path / "ucf" / "train", [(16, 24)], streams=["label"])
    assert [clip.path for clip in dataset.clips] == ["ride/two", "run/one"]
    assert np.array_equal(dataset.read(1, (16, 24), range(8)), video)
    assert [dataset.read_stream(n, "label", 0, 1).tolist() for n in range(2)] == [[0], [1]]
    assert dataset.streams["label"].vocabulary == ["ride", "run"]
    assert open_videos(tmp_path / "ucf" / "train").kind == "files", "metrics read plain folders as before"


class Sneaky:
    def __reduce__(self):
        return os.mkdir, ("/tmp/longtake-sneaky",)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"actions": np.array([Sneaky()], object)}, "cannot be read as actions|expected numbers or text"),
        ({"actions": np.zeros((5, 2, 2))}, "not one value or one vector for each frame"),
        ({"actions": np.array([0, 1, 2, -1, 0])}, "where a whole number from 0 on was expected"),
        ({"actions": np.array([0.0, 1, np.nan, 1, 0])}, "finite numbers were expected"),
        ({"actions": np.zeros(7, int)}, "has 5 frames but 7 actions"),
    ],
)
def test_damaged_actions_are_refused(tmp_path, arrays, message):
    write_npz(tmp_path / "0.npz", clips_of([5])[0], **arrays)
    with pytest.raises(ValueError, match=message):
        ClipDataset(tmp_path, [SIZE], streams=["actions"])
    assert not Path("/tmp/longtake-sneaky").exists()


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((5, *SIZE, 3), np.float32), "frames are uint8 from 0 to 255"),
        (np.zeros((5, 3, *SIZE), np.uint8), "its colours come before height and width"),
        (np.zeros((2, 5, *SIZE, 3), np.uint8), "holds several videos"),
        (np.array([Sneaky()], object), "cannot be read as an npz file"),
    ],
)
def test_damaged_arrays_are_refused(tmp_path, video, message):
    write_npz(tmp_path / "0.npz", video, actions=np.zeros(5, int))
    with pytest.raises(ValueError, match=message):
        ClipDataset(tmp_path, [SIZE])
    assert not Path("/tmp/longtake-sneaky").exists()


def test_a_truncated_npz_file_is_refused(tmp_path):
    path = write_npz(tmp_path / "0.npz", clips_of([5])[0], actions=np.zeros(5, int))
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match="cannot be read as an npz file"):
        ClipDataset(tmp_path, [SIZE])


def test_without_h5py_one_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    path = write_indexed(tmp_path / "set.h5", clips_of([4]))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match=r"HDF5 files need the package h5py; install it with: pip install"):
        ClipDataset(path, [SIZE])


def test_empty_folders_are_no_dataset(tmp_path):
    assert find_layout(tmp_path) is None and not is_dataset(tmp_path)
    with pytest.raises(ValueError, match="no frames of 12x16; sizes found: none"):
        ClipDataset(tmp_path, [SIZE])
