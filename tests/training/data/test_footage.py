"""All forms of videos give the same clips, and errors are reported."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dnnlib.video import VideoWriter, iter_video_frames
from metrics import samplers
from metrics.samplers import ClipShape
from tests.training.data import clips
from tests.training.data.clips import write
from training.data import footage
from training.data.frames import frame_rate, iter_frames

SIZE = (16, 24)


@pytest.fixture(scope="module")
def videos() -> list[np.ndarray]:
    """Three videos of 14, 30 and 22 frames: smooth noise that drifts."""
    return [clips.drifting(number, length) for number, length in enumerate((14, 30, 22))]


@pytest.fixture(scope="module")
def pictures(videos: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return folders whose names tell the numbers of frames without leading zeros, as other tools write them."""
    root = tmp_path_factory.mktemp("pictures")
    for number, video in enumerate(videos):
        clips.write_pictures(root / f"video{number}", video)
    return root


@pytest.fixture(scope="module")
def files(videos: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    for number, video in enumerate(videos):
        with VideoWriter(root / f"video{number}.mp4", *SIZE, fps=25) as writer:
            writer.write(video)
    return root


@pytest.fixture(scope="module")
def dataset_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clips.write_dataset(tmp_path_factory.mktemp("tiny"), [(16, 24), (8, 12)])


def clips_of(side: footage.Videos, shape: ClipShape, num_items: int = 6) -> np.ndarray:
    batches = samplers.real_clips(side.footage, side.size, shape, range(num_items), 0, batch=4)
    return np.concatenate([batch.numpy() for _, batch in batches])


@pytest.mark.parametrize("shape", [ClipShape(9), ClipShape(4, 3), ClipShape(1)])
def test_each_form_gives_the_same_clips(videos, pictures: Path, tmp_path: Path, shape: ClipShape):
    memory = footage.Arrays(videos, "memory")
    expected = clips_of(footage.Videos(memory, SIZE, "array"), shape)
    side = footage.open_videos(pictures)
    assert (side.kind, side.size, side.footage.fps) == ("files", SIZE, None)
    assert [clip.num_frames for clip in side.footage.clips] == [14, 30, 22]
    np.testing.assert_array_equal(clips_of(side, shape), expected)
    for number, video in enumerate(videos):
        np.savez(tmp_path / f"video{number}.npz", frames=video)
    np.testing.assert_array_equal(clips_of(footage.open_videos(tmp_path), shape), expected)


def test_one_array_of_equal_videos(videos, tmp_path: Path):
    array = np.stack([video[:12] for video in videos])
    np.savez(tmp_path / "all.npz", array)
    side = footage.open_videos(tmp_path / "all.npz")
    assert [clip.num_frames for clip in side.footage.clips] == [12, 12, 12]
    np.testing.assert_array_equal(side.footage.read(1, SIZE, range(3, 8, 2)), array[1, 3:8:2])


def test_windows_of_video_files_are_the_frames_that_decoding_gives(files: Path):
    side = footage.open_videos(files)
    assert side.footage.fps == 25 and [clip.num_frames for clip in side.footage.clips] == [14, 30, 22]
    whole = np.stack(list(iter_video_frames(files / "video1.mp4")))
    for frames in (range(0, 9), range(21, 30), range(2, 27, 5), [13]):
        np.testing.assert_array_equal(side.footage.read(1, SIZE, frames), whole[list(frames)])
    slower = footage.open_videos(files, fps=12.5)
    assert slower.footage.fps == 12.5
    assert np.abs(slower.footage.read(1, SIZE, range(8)).astype(int) - whole[:16:2]).max() <= 1


def test_content_is_that_of_the_frames_not_of_the_path(pictures: Path, files: Path, videos, tmp_path: Path):
    (tmp_path / "copy").symlink_to(pictures)
    assert footage.open_videos(tmp_path / "copy").content == footage.open_videos(pictures).content
    assert footage.open_videos(files).content != footage.open_videos(files, fps=10).content
    changed = [video.copy() for video in videos]
    changed[2][5, 3, 4, 1] ^= 1
    assert footage.Arrays(changed, "a").content() != footage.Arrays(videos, "a").content()


def test_a_dataset_of_several_sizes_needs_one(dataset_path: Path):
    assert footage.open_videos(dataset_path, (8, 12)).size == (8, 12)
    assert footage.is_dataset(dataset_path)
    with pytest.raises(ValueError, match="has frames of 8x12, 16x24 and it has several: give one of them by --size"):
        footage.open_videos(dataset_path)
    with pytest.raises(ValueError, match="has 30 frames per second, but --fps asks for 25"):
        footage.open_videos(dataset_path, (8, 12), fps=25)


# ----------------------------------------------------------------------------
# What is refused.


def test_mistakes_are_named(pictures: Path, videos, tmp_path: Path):
    with pytest.raises(ValueError, match="there is no"):
        footage.open_videos(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no video file"):
        footage.open_videos(tmp_path)
    with pytest.raises(ValueError, match=r"are 16x24, not 32x48: make a dataset of that size"):
        footage.open_videos(pictures, (32, 48))
    with pytest.raises(ValueError, match="no clip of 31 frames, which are needed; the longest of its 3 videos has 30"):
        footage.open_videos(pictures).footage.eligible(31)
    np.savez(tmp_path / "a.npz", frames=videos[0])
    np.savez(tmp_path / "b.npz", frames=videos[0][:, :8])
    with pytest.raises(ValueError, match=r"mixes sizes: a.npz is 16x24 and b.npz is 8x24"):
        footage.open_videos(tmp_path)


def test_files_of_several_rates_want_one(videos, tmp_path: Path):
    for fps in (10, 20):
        write(tmp_path / f"{fps}.mp4", videos[0], fps)
    with pytest.raises(ValueError, match="mixes frame rates from 10 to 20: give --fps=10, at which all are then read"):
        footage.open_videos(tmp_path)
    assert footage.open_videos(tmp_path, fps=10).footage.fps == 10


def test_an_image_of_another_size_is_named(tmp_path: Path):
    (tmp_path / "v").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "v" / "0.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "v" / "1.png")
    side = footage.open_videos(tmp_path)
    with pytest.raises(ValueError, match=r"1.png is 8x8, but the first image of its folder is 6x8: bring all to"):
        side.footage.read(0, side.size, range(2))


@pytest.mark.parametrize(
    ("name", "arrays", "of_videos", "of_frames"),
    [
        ("text.npz", None, "text.npz cannot be read as an npz file", "text.npz cannot be read: .*; expected one array"),
        ("two.npz", "xy", "has the arrays x, y: name the one `videos`", "has the arrays x, y: name the one `videos`"),
        ("floats.npz", "f", "holds float64 from 0 to 0, but frames are uint8", r"its array is float64 \(2, 4, 4, 3\)"),
        ("many.npz", "n", None, r"its array is uint8 \(1, 2, 4, 4, 3\)"),
    ],
)
def test_arrays_that_are_no_videos_are_refused(tmp_path: Path, name, arrays, of_videos, of_frames):
    video = np.zeros((2, 4, 4, 3), np.uint8)
    contents = {"xy": {"x": video, "y": video}, "f": {"f": video.astype(float)}, "n": {"n": video[None]}}
    if arrays is None:
        (tmp_path / name).write_text("no zip file")
    else:
        np.savez(tmp_path / name, allow_pickle=False, **contents[arrays])
    if of_videos:
        with pytest.raises(ValueError, match=of_videos):
            footage.open_videos(tmp_path / name)
    with pytest.raises(ValueError, match=of_frames):
        list(iter_frames(tmp_path / name))


# ----------------------------------------------------------------------------
# Frames, front to back.


def test_every_kind_of_file_gives_its_frames_in_order(tmp_path: Path):
    smooth = np.linspace(0, 200, 11).astype(np.uint8)[:, None, None, None].repeat(18, 1).repeat(32, 2).repeat(3, 3)
    for name in ("a.npz", "a", "a.mp4"):
        found = np.stack(list(iter_frames(write(tmp_path / name, smooth))))
        assert np.abs(found.astype(int) - smooth).max() <= (4 if name == "a.mp4" else 0)
    assert [frame_rate(tmp_path / name) for name in ("a.mp4", "a", "a.npz")] == [12, None, None]
    assert [frame_rate(tmp_path / name, 6) for name in ("a.mp4", "a")] == [6, None]
    slower = np.stack(list(iter_frames(tmp_path / "a.mp4", 6)))
    assert np.abs(slower[:5].astype(int) - smooth[:10:2]).max() <= 4
    np.savez_compressed(tmp_path / "b.npz", other=smooth[:1], frames=smooth)
    np.testing.assert_array_equal(np.stack(list(iter_frames(tmp_path / "b.npz"))), smooth)


def test_a_rate_within_a_hundredth_is_the_files_own(tmp_path: Path):
    path = write(tmp_path / "a.mp4", clips.drifting("rate", 10), fps=29.97)
    assert footage.reading_rate(path, 30)[1] is None and footage.reading_rate(path, 25) == (25, 25)
    assert len(list(iter_frames(path, 30))) == 10


def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    whole = write(tmp_path / "whole.npz", clips.drifting("whole", 20)).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    write(tmp_path / "broken", clips.drifting("broken", 6)).joinpath("000004.png").write_bytes(b"not a picture")
    for name in ("empty", "cut.npz", "broken"):
        with pytest.raises(ValueError, match=name):
            list(iter_frames(tmp_path / name))
