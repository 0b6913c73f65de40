"""The same file gives the same pixels to dataset makers, metrics and prompts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from dataset_tools import make_dataset_from_frames, making
from dnnlib.video import VideoWriter, iter_video_frames
from tests.training.data.clips import VIDEO, to_float, write
from training.data.footage import open_videos
from training.data.listing import Remarks
from training.data.pictures import find_frames, natural_key, picture_clips
from training.data.prompts import FilePrompt


def sideways(folder: Path) -> None:
    image = Image.fromarray(np.arange(180, dtype=np.uint8).reshape(6, 10, 3))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    for number in range(3):
        image.save(folder / f"{number}.png", exif=exif)


def translucent(folder: Path) -> None:
    for number in range(3):
        Image.new("RGBA", (10, 6), (200, 100, 50, 60 * number)).save(folder / f"{number}.png")


def with_profile(folder: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"tmpp").replace(b"bXYZ", b"rXYZ").replace(b"tmpp", b"bXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")).replace(b"sRGB", b"swap")
    for number in range(3):
        Image.new("RGB", (10, 6), (200, 30, 10 * number)).save(folder / f"{number}.png", icc_profile=swapped)


def grey_of_sixteen_bits(folder: Path) -> None:
    for number in range(3):
        deep = np.arange(0, 60 * 1000, 1000, dtype=np.uint16).reshape(6, 10) + number
        Image.fromarray(deep).save(folder / f"{number}.png")


def grey_of_twelve_bits(folder: Path) -> None:
    for number in range(3):
        deep = np.arange(0, 60 * 68, 68, dtype=np.uint16).reshape(6, 10) + number
        Image.fromarray(deep).save(folder / f"{number}.png")


def in_mode(mode: str, suffix: str, **options: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for number, frame in enumerate(VIDEO[:3]):
            image = Image.fromarray(frame).convert("L" if mode == "LA" else "RGB").convert(mode)
            if mode == "LA":
                image.putalpha(100)
            image.save(folder / f"{number}{suffix}", **options)

    make.__name__ = f"{mode}{suffix}"
    return make


def photographs(folder: Path) -> None:
    for number, frame in enumerate(VIDEO[:12]):
        Image.fromarray(frame).save(folder / f"frame {number}.jpg", quality=70)


IMAGES = [
    *(sideways, translucent, with_profile, grey_of_sixteen_bits, grey_of_twelve_bits, photographs),
    *(in_mode("P", ".png"), in_mode("P", ".gif"), in_mode("P", ".png", transparency=3), in_mode("LA", ".png")),
    *(in_mode("CMYK", ".jpg"), in_mode("CMYK", ".tif"), in_mode("1", ".png"), in_mode("RGB", ".ppm")),
]


def from_maker(path: Path, fps: float | None) -> np.ndarray:
    """Return the frames that a maker encodes."""
    recipe = making.Recipe(fps=fps)
    if path.is_dir():
        (clip,) = picture_clips(path, find_frames(path), Remarks())
        frames = make_dataset_from_frames._open(clip, 30.0, Remarks(), recipe).frames
    else:
        frames = making.open_video(path, recipe).frames
    return np.stack(list(frames))


def assert_same_everywhere(path: Path, fps: float | None = None) -> np.ndarray:
    made = from_maker(path, fps) if path.suffix != ".npz" else VIDEO
    side = open_videos(path, fps=fps)
    count = side.footage.clips[0].num_frames
    np.testing.assert_array_equal(side.footage.read(0, side.size, range(count)), made[:count])
    np.testing.assert_array_equal(
        side.footage.read(0, side.size, range(3 % count, count, 2)), made[3 % count : count : 2]
    )
    prompt = FilePrompt(path, fps)
    frames = prompt.frames(0, len(made) + 5, side.size)
    assert torch.equal(frames[0], to_float(made))
    return made


@pytest.mark.parametrize("make", IMAGES)
def test_images_give_the_same_pixels_to_makers_metrics_and_prompts(tmp_path, make):
    folder = tmp_path / "clip"
    folder.mkdir()
    make(folder)
    made = assert_same_everywhere(folder)
    if make is grey_of_twelve_bits:
        assert made.max() == 250
        return  # how many bits there are is known of a clip, not of a file
    # A file by itself is what it is in its folder.
    first = min(folder.iterdir(), key=lambda path: natural_key(path.name))
    side = open_videos(first)
    np.testing.assert_array_equal(side.footage.read(0, side.size, [0]), made[:1])
    assert torch.equal(FilePrompt(first).frames(0, 5, side.size)[0], to_float(made[:1]))


def test_enlarged_videos_have_the_size_of_their_frames_everywhere(tmp_path):
    for suffix in (".mp4", ".webm", ".gif"):
        with VideoWriter(tmp_path / f"a{suffix}", 16, 24, fps=12, enlarge=True) as writer:
            writer.write(VIDEO)
        made = assert_same_everywhere(tmp_path / f"a{suffix}")
        assert made.shape == VIDEO.shape and np.abs(made.astype(int) - VIDEO).mean() < 4
        assert next(iter_video_frames(tmp_path / f"a{suffix}")).shape == (32, 48, 3)


@pytest.mark.parametrize("fps", [None, 6, 12.05])
@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_videos_give_the_same_pixels_to_makers_metrics_and_prompts(tmp_path, suffix, fps):
    made = assert_same_everywhere(write(tmp_path / f"a{suffix}"), fps)
    assert len(made) == (10 if fps == 6 else 20)


def test_arrays_give_the_same_pixels_to_metrics_and_prompts(tmp_path):
    assert_same_everywhere(write(tmp_path / "a.npz"))
