"""Images of any kind become honest RGB frames, in the order of their numbers, at the rate asked for."""

import io
import json
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from dataset_tools import make_dataset_from_frames as maker
from dataset_tools.making import Recipe
from training.data.dataset import ClipDataset

SIZE = (8, 16)
RED = (200, 30, 10)


def run(*arguments):
    return CliRunner().invoke(maker.main, [str(argument) for argument in arguments])


def save(path, content=RED, height=16, width=32, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = content if isinstance(content, Image.Image) else Image.new("RGB", (width, height), content)
    image.save(path, **options)


def content(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def walk(folder, count=4, names="{:04d}.png"):
    for index in range(count):
        save(folder / names.format(index), (index * 20,) * 3)


def levels(dataset, index):
    clip = dataset.read(index, SIZE, range(dataset.clips[index].num_frames))
    return [round(float(frame.mean())) for frame in clip]


def test_each_folder_with_images_becomes_a_clip(tmp_path):
    walk(tmp_path / "in" / "b" / "deep", 12, "{}.png")
    walk(tmp_path / "in" / "b", 2, "frame {:03d}.JPG")
    save(tmp_path / "in" / "root.bmp", (90,) * 3)
    save(tmp_path / "in" / "._root.bmp")
    (tmp_path / "in" / "notes").mkdir()
    (tmp_path / "in" / "notes" / "a.txt").write_text("not an image")
    result = run(tmp_path / "in", tmp_path / "out", "--height", 8, "--width", 16, "--source-fps", 25)
    assert result.exit_code == 0, result.output
    dataset = ClipDataset(tmp_path / "out", [SIZE])
    assert [clip.path for clip in dataset.clips] == ["in", "b", "b/deep"] and dataset.fps == 25
    assert levels(dataset, 0) == [90] and levels(dataset, 1) == [0, 20]
    assert levels(dataset, 2) == list(range(0, 240, 20))  # 2.png comes before 10.png
    description = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert description["source_fps"] == 25 and description["source"] == "in"


@given(
    numbers=st.sets(st.integers(0, 10**6), min_size=1),
    prefix=st.text("ab1_-. ", max_size=4),
    suffix=st.sampled_from([".png", "_b.jpg", "-2.tif"]),
)
def test_frames_follow_their_numbers(numbers, prefix, suffix):
    shuffled = random.Random(0).sample(sorted(numbers), len(numbers))
    prefix = prefix.rstrip("1")  # a digit would become part of the number
    padded = [f"{prefix}{number:07d}{suffix}" for number in shuffled]
    assert sorted(padded, key=maker.natural_key) == sorted(padded)
    plain = [f"{prefix}{number}{suffix}" for number in shuffled]
    assert sorted(plain, key=maker.natural_key) == [f"{prefix}{number}{suffix}" for number in sorted(numbers)]


def test_suffixes_are_those_of_images_that_can_be_read():
    suffixes = maker.image_suffixes()
    assert {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".jp2"} <= suffixes
    assert not {".mpg", ".mpeg", ".pdf", ".eps", ".h5"} & suffixes


def gradient(mode="RGB"):
    ramp = np.linspace(0, 255, 32).astype(np.uint8)[None, :].repeat(16, 0)
    return Image.merge("RGB", [Image.fromarray(part) for part in (ramp, ramp[:, ::-1], ramp // 2)]).convert(mode)


@pytest.mark.parametrize(
    ("mode", "name", "tolerance"),
    [
        ("RGB", "a.png", 0),
        ("RGB", "a.TIF", 0),
        ("RGB", "a.webp", 0),
        ("RGB", "a.jp2", 0),
        ("L", "a.png", 0),
        ("1", "a.png", 0),
        ("P", "a.png", 0),
        ("CMYK", "a.tif", 1),
        ("HSV", "a.tif", 8),
        ("CMYK", "a.jpg", 8),
        ("YCbCr", "a.jpg", 8),
    ],
)
def test_all_kinds_of_images_become_rgb(tmp_path, mode, name, tolerance):
    image = gradient("RGB" if mode == "HSV" else mode)
    options = {"lossless": True} if name.endswith("webp") else {"quality": 100} if name.endswith("jpg") else {}
    save(tmp_path / name, image, **options)
    read = maker.read_image(tmp_path / name)
    assert read.dtype == np.uint8 and read.shape == (16, 32, 3)
    assert np.abs(read.astype(int) - np.asarray(image.convert("RGB"))).max() <= tolerance


def test_sixteen_bits_lose_the_lower_ones_and_unknown_ranges_are_refused(tmp_path):
    deep = np.arange(0, 65536, 128, dtype=np.uint16).reshape(16, 32)
    for name in ("a.png", "a.tif", "a.pgm"):
        Image.fromarray(deep).save(tmp_path / name)
        assert np.array_equal(maker.read_image(tmp_path / name), (deep >> 8)[..., None].repeat(3, 2)), name
    for name, wrong in (("f.tif", deep.astype(np.float32)), ("i.tif", deep.astype(np.int32) * 2)):
        Image.fromarray(wrong).save(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} cannot be a frame: its pixels are .*; convert it to 8 bits"):
            maker.read_image(tmp_path / name)


def test_transparency_shows_black(tmp_path):
    image = gradient("RGBA")
    image.putalpha(Image.new("L", image.size, 51))  # a fifth
    image.save(tmp_path / "a.png")
    assert np.abs(maker.read_image(tmp_path / "a.png") - np.asarray(gradient()) / 5).max() <= 1
    palette = Image.new("P", (32, 16), 1)
    palette.putpalette([250, 250, 250, *RED])
    palette.paste(0, (0, 0, 16, 16))
    palette.save(tmp_path / "p.png", transparency=0)
    read = maker.read_image(tmp_path / "p.png")
    assert (read[:, :16] == 0).all() and (read[:, 16:] == RED).all()
    Image.new("LA", (32, 16), (100, 0)).save(tmp_path / "la.png")
    assert (maker.read_image(tmp_path / "la.png") == 0).all()


def test_photographs_are_turned_upright(tmp_path):
    image = gradient()
    for orientation, turn in ((1, 0), (3, 180), (6, 90), (8, 270)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.rotate(turn, expand=True).save(tmp_path / "a.png", exif=exif)
        assert np.array_equal(maker.read_image(tmp_path / "a.png"), np.asarray(image)), orientation


def test_profiles_are_converted_to_srgb(tmp_path):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = gradient()
    for name, profile in (("srgb", srgb), ("noise", b"noise"), ("for another kind of image", lab)):
        save(tmp_path / f"{name}.png", image, icc_profile=profile)
        assert np.array_equal(maker.read_image(tmp_path / f"{name}.png"), np.asarray(image)), name
    # Red and blue swapped, by swapping the names of the profile's primaries.
    swapped = srgb.replace(b"rXYZ", b"tmpp").replace(b"bXYZ", b"rXYZ").replace(b"tmpp", b"bXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")).replace(b"sRGB", b"swap")
    save(tmp_path / "swapped.png", image, icc_profile=swapped)
    assert np.abs(maker.read_image(tmp_path / "swapped.png").astype(int) - np.asarray(image)[..., ::-1]).max() <= 3


def test_broken_and_moving_images_break_their_clip_only(tmp_path):
    walk(tmp_path / "in" / "good")
    walk(tmp_path / "in" / "torn")
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8))
    data = io.BytesIO()
    noise.save(data, "PNG")
    (tmp_path / "in" / "torn" / "0002.png").write_bytes(data.getvalue()[:5000])
    save(tmp_path / "in" / "moving" / "a.gif", noise, save_all=True, append_images=[gradient()])
    result = run(tmp_path / "in", tmp_path / "out", "--sizes", "8x16")
    assert result.exit_code == 1 and "2 of 3 sources are broken" in result.output
    assert "torn/0002.png cannot be a frame: " in result.output
    assert "moving/a.gif cannot be a frame: it holds 2 pictures; store one in each file" in result.output
    assert [clip.path for clip in ClipDataset(tmp_path / "out", [SIZE]).clips] == ["good"]
    result = run(tmp_path / "in", tmp_path / "out", "--sizes", "8x16", "--dry-run")
    assert "good  4 images, the first 16x32, make 4 frames" in result.output and "moving  broken: " in result.output


def test_frames_that_differ_in_size_are_each_cropped(tmp_path):
    ramp = np.linspace(0, 255, 256).astype(np.uint8)[None, :, None].repeat(3, 2)
    for index, (height, width) in enumerate([(128, 256), (64, 256), (128, 512)]):
        image = Image.fromarray(ramp.repeat(8, 0)).resize((width, height))
        save(tmp_path / "in" / "a" / f"{index}.png", image)
    assert run(tmp_path / "in", tmp_path / "out", "--sizes", "8x16").exit_code == 0
    clip = ClipDataset(tmp_path / "out", [SIZE]).read(0, SIZE, range(3))[:, 4, :, 0].astype(float)
    assert np.abs(clip[0] - (np.arange(16) * 16 + 7.5)).max() < 4
    for cropped in clip[1:]:
        assert np.abs(cropped - (np.arange(16) * 8 + 67.5)).max() < 4


@given(
    num_frames=st.integers(1, 60),
    source=st.sampled_from([10.0, 12.5, 25.0, 29.97, 30.0]),
    wanted=st.sampled_from([None, 5.0, 10.0, 24.0, 29.97, 60.0]),
    trims=st.tuples(*[st.sampled_from([0.0, 0.1, 0.5])] * 2),
)
def test_resampling_takes_the_frame_shown_at_each_time(num_frames, source, wanted, trims):
    chosen = maker.choose_frames(num_frames, source, Recipe(fps=wanted, trim_start=trims[0], trim_end=trims[1]))
    # In whole thousandths of a frame and a second.
    rate = round((wanted or source) * 1000)
    period = round(source * 1000)
    first = next(i for i in range(10**6) if i * 10**6 >= round(trims[0] * 1000) * period)
    stop = [i for i in range(num_frames + 1) if (num_frames - i) * 10**6 >= round(trims[1] * 1000) * period]
    expected, index = [], 0
    while stop and (frame := first + index * period // rate) < stop[-1]:
        expected.append(frame)
        index += 1
    assert chosen == expected


def test_a_rate_is_resampled_and_recorded(tmp_path):
    walk(tmp_path / "in" / "a", 10)
    result = run(tmp_path / "in", tmp_path / "out", "--sizes", "8x16", "--fps", 15, "--trim-start", 0.1)
    assert result.exit_code == 0, result.output
    dataset = ClipDataset(tmp_path / "out", [SIZE])
    assert dataset.fps == 15 and levels(dataset, 0) == [60, 100, 140, 180]
    result = run(tmp_path / "in", tmp_path / "none", "--sizes", "8x16", "--trim-start", 1)
    assert "nothing is left of" in result.output and "after trimming: it holds 10 frames" in result.output


def test_partitions_that_wait_for_one_listing_make_what_one_run_makes(tmp_path, repo):
    for name in "abcde":
        walk(tmp_path / "in" / name)
    options = ["--sizes", "8x16", "--num-partitions", "3"]
    command = [sys.executable, "-m", "dataset_tools.make_dataset_from_frames", tmp_path / "in", tmp_path / "out"]
    waiting = [
        subprocess.Popen([*command, *options, "--partition", index, "--wait-for-list-file"], cwd=repo)
        for index in ("0", "2")
    ]
    time.sleep(1)
    assert [process.poll() for process in waiting] == [None, None]
    before = content(tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "out", *options, "--partition", 1).exit_code == 0
    assert [process.wait(60) for process in waiting] == [0, 0]
    assert run(tmp_path / "in", tmp_path / "one", *options).exit_code == 0
    (tmp_path / "out" / maker.LISTING).unlink()
    assert content(tmp_path / "out") == content(tmp_path / "one")
    assert content(tmp_path / "in") == before


def test_a_listing_of_another_folder_is_refused(tmp_path):
    for name in ("one", "two"):
        walk(tmp_path / name / "a")
    assert run(tmp_path / "one", tmp_path / "out", "--partition", 0).exit_code == 0
    result = run(tmp_path / "two", tmp_path / "out", "--partition", 1, "--wait-for-list-file")
    assert result.exit_code == 1 and "delete it to list anew" in result.output


def test_folders_without_images_or_with_two_of_one_name_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    result = run(tmp_path / "in", tmp_path / "out")
    assert result.exit_code == 1 and "holds no images that Pillow reads" in result.output
    walk(tmp_path / "in")
    walk(tmp_path / "in" / "in")
    result = run(tmp_path / "in", tmp_path / "out")
    assert result.exit_code == 1 and "would make the same clip in; rename the latter" in result.output
