"""Every form in which videos lie on a disk gives the same clips, and what is wrong with one is said."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dnnlib.video import VideoWriter, iter_video_frames
from metrics import inputs, samplers
from metrics.samplers import ClipShape
from training.random import random_state

SIZE = (16, 24)


@pytest.fixture(scope="module")
def videos() -> list[np.ndarray]:
    """Three videos of 14, 30 and 22 frames: smooth noise that drifts."""
    made = []
    for number, length in enumerate((14, 30, 22)):
        coarse = random_state("test-inputs", 0, number).randint(256, size=(4, 6, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize((24, 16), Image.Resampling.BICUBIC))
        made.append(np.stack([np.roll(image, frame, axis=1) for frame in range(length)]))
    return made


@pytest.fixture(scope="module")
def pictures(videos: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders whose names tell the numbers of frames without leading zeros, as other tools write them."""
    root = tmp_path_factory.mktemp("pictures")
    for number, video in enumerate(videos):
        (root / f"video{number}").mkdir()
        for frame, image in enumerate(video):
            Image.fromarray(image).save(root / f"video{number}" / f"frame{frame}.png")
    return root


@pytest.fixture(scope="module")
def films(videos: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("films")
    for number, video in enumerate(videos):
        with VideoWriter(root / f"video{number}.mp4", *SIZE, fps=25) as writer:
            writer.write(video)
    return root


def clips_of(side: inputs.Videos, shape: ClipShape, num_items: int = 6) -> np.ndarray:
    batches = samplers.real_clips(side.footage, side.size, shape, range(num_items), 0, batch=4)
    return np.concatenate([clips.numpy() for _, clips in batches])


@pytest.mark.parametrize("shape", [ClipShape(9), ClipShape(4, 3), ClipShape(1)])
def test_each_form_gives_the_same_clips(videos, pictures: Path, tmp_path: Path, shape: ClipShape):
    memory = inputs.Arrays(videos, "memory")
    expected = clips_of(inputs.Videos(memory, SIZE, "array"), shape)
    side = inputs.open_videos(pictures)
    assert (side.kind, side.size, side.footage.fps) == ("files", SIZE, None)
    assert [clip.num_frames for clip in side.footage.clips] == [14, 30, 22]
    np.testing.assert_array_equal(clips_of(side, shape), expected)
    for number, video in enumerate(videos):
        np.savez(tmp_path / f"video{number}.npz", frames=video)
    np.testing.assert_array_equal(clips_of(inputs.open_videos(tmp_path), shape), expected)


def test_one_array_of_equal_videos(videos, tmp_path: Path):
    array = np.stack([video[:12] for video in videos])
    np.savez(tmp_path / "all.npz", array)
    side = inputs.open_videos(tmp_path / "all.npz")
    assert [clip.num_frames for clip in side.footage.clips] == [12, 12, 12]
    np.testing.assert_array_equal(side.footage.read(1, SIZE, range(3, 8, 2)), array[1, 3:8:2])


def test_windows_of_video_files_are_the_frames_that_decoding_gives(films: Path):
    side = inputs.open_videos(films)
    assert side.footage.fps == 25 and [clip.num_frames for clip in side.footage.clips] == [14, 30, 22]
    whole = np.stack(list(iter_video_frames(films / "video1.mp4")))
    for frames in (range(0, 9), range(21, 30), range(2, 27, 5), [13]):
        np.testing.assert_array_equal(side.footage.read(1, SIZE, frames), whole[list(frames)])
    slower = inputs.open_videos(films, fps=12.5)
    assert slower.footage.fps == 12.5
    assert np.abs(slower.footage.read(1, SIZE, range(8)).astype(int) - whole[:16:2]).max() <= 1


def test_content_is_that_of_the_frames_not_of_the_path(pictures: Path, films: Path, videos, tmp_path: Path):
    (tmp_path / "copy").symlink_to(pictures)
    assert inputs.open_videos(tmp_path / "copy").content == inputs.open_videos(pictures).content
    assert inputs.open_videos(films).content != inputs.open_videos(films, fps=10).content
    changed = [video.copy() for video in videos]
    changed[2][5, 3, 4, 1] ^= 1
    assert inputs.Arrays(changed, "a").content() != inputs.Arrays(videos, "a").content()


def test_a_dataset_of_several_sizes_needs_one(dataset_path: Path):
    assert inputs.open_videos(dataset_path, (8, 12)).size == (8, 12)
    assert inputs.is_dataset(dataset_path)
    with pytest.raises(ValueError, match="has frames of 8x12, 16x24 and it has several: give one of them by --size"):
        inputs.open_videos(dataset_path)
    with pytest.raises(ValueError, match="has 30 frames a second, but --fps asks for 25"):
        inputs.open_videos(dataset_path, (8, 12), fps=25)


def test_mistakes_are_named(pictures: Path, videos, tmp_path: Path):
    with pytest.raises(ValueError, match="there is no"):
        inputs.open_videos(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no video file"):
        inputs.open_videos(tmp_path)
    with pytest.raises(ValueError, match=r"are 16x24, not 32x48: make a dataset of that size"):
        inputs.open_videos(pictures, (32, 48))
    np.savez(tmp_path / "a.npz", frames=videos[0])
    np.savez(tmp_path / "b.npz", frames=videos[0][:, :8])
    with pytest.raises(ValueError, match=r"mixes sizes: a.npz is 16x24 and b.npz is 8x24"):
        inputs.open_videos(tmp_path)
    np.savez(tmp_path / "c.npz", x=videos[0], y=videos[1])
    with pytest.raises(ValueError, match="has the arrays x, y: name the one `videos`"):
        inputs.open_videos(tmp_path / "c.npz")
    (tmp_path / "d.npz").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="cannot be read as an npz file"):
        inputs.open_videos(tmp_path / "d.npz")
    with pytest.raises(ValueError, match="no clip of 31 frames, which are needed; the longest of its 3 videos has 30"):
        inputs.open_videos(pictures).footage.eligible(31)


def test_a_picture_of_another_kind_is_named(tmp_path: Path):
    (tmp_path / "v").mkdir()
    Image.new("RGB", (8, 6)).save(tmp_path / "v" / "0.png")
    Image.new("RGBA", (8, 6)).save(tmp_path / "v" / "1.png")
    side = inputs.open_videos(tmp_path)
    with pytest.raises(ValueError, match=r"1.png is not an RGB picture of 6x8.*colour mode is RGBA"):
        side.footage.read(0, side.size, range(2))
