"""Images of any kind become RGB frames in the order of their numbers, cropped and resized alike everywhere."""

import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from training.data import pictures
from training.data.listing import Remarks

RED = (200, 30, 10)


@given(
    numbers=st.sets(st.integers(0, 10**6), min_size=1),
    prefix=st.text("ab1_-. ", max_size=4),
    suffix=st.sampled_from([".png", "_b.jpg", "-2.tif"]),
)
def test_frames_follow_their_numbers(numbers, prefix, suffix):
    shuffled = random.Random(0).sample(sorted(numbers), len(numbers))
    prefix = prefix.rstrip("1")  # a digit would become part of the number
    padded = [f"{prefix}{number:07d}{suffix}" for number in shuffled]
    assert sorted(padded, key=pictures.natural_key) == sorted(padded)
    plain = [f"{prefix}{number}{suffix}" for number in shuffled]
    assert sorted(plain, key=pictures.natural_key) == [f"{prefix}{number}{suffix}" for number in sorted(numbers)]


def test_suffixes_are_those_of_images_that_can_be_read():
    suffixes = pictures.image_suffixes()
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
    options: dict[str, dict[str, Any]] = {".webp": {"lossless": True}, ".jpg": {"quality": 100}}
    image.save(tmp_path / name, **options.get(name[1:], {}))
    read = pictures.read_image(tmp_path / name)
    assert read.dtype == np.uint8 and read.shape == (16, 32, 3)
    assert np.abs(read.astype(int) - np.asarray(image.convert("RGB"))).max() <= tolerance


def test_sixteen_bits_lose_the_lower_ones_and_unknown_ranges_are_refused(tmp_path):
    deep = np.arange(0, 65536, 128, dtype=np.uint16).reshape(16, 32)
    for name in ("a.png", "a.tif", "a.pgm"):
        Image.fromarray(deep).save(tmp_path / name)
        assert np.array_equal(pictures.read_image(tmp_path / name), (deep >> 8)[..., None].repeat(3, 2)), name
    for name, wrong in (("f.tif", deep.astype(np.float32)), ("i.tif", deep.astype(np.int32) * 2)):
        Image.fromarray(wrong).save(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} cannot be a frame: its pixels are .*; convert it to 8 bits"):
            pictures.read_image(tmp_path / name)


@pytest.mark.parametrize(("highest", "bits"), [(200, 8), (255, 8), (256, 12), (4095, 12), (4096, 16), (65535, 16)])
def test_values_of_fewer_bits_are_read_at_their_depth_which_is_said(tmp_path, highest, bits):
    for number in range(30):  # the brightest is not among those that are looked at first
        deep = np.linspace(0, highest * (number == 11), 24).astype(np.uint16).reshape(4, 6)
        deep[0, 0] = 1
        Image.fromarray(deep).save(tmp_path / f"{number}.png")
    remarks = Remarks()
    clip = pictures.open_pictures(tmp_path, remarks)
    assert (clip.bits, clip.read(11).max()) == (bits, highest >> bits - 8)
    assert [f"Read as {bits} bits" in line for line in remarks.lines()] == [True] * (bits < 16)
    if bits < 16:
        Image.fromarray(np.full((4, 6), 1 << bits, np.uint16)).save(tmp_path / "11.png")
        with pytest.raises(
            ValueError, match=f"its highest value is {1 << bits}, but others of the clip .* {bits} bits"
        ):
            clip.read(11)


def test_colours_of_sixteen_bits_that_are_nearly_black_are_named(tmp_path):
    """Pillow reads them, but writes none: the header of a PNG file says how many bits there are."""
    for number, highest in enumerate((4095, 65535)):
        rows = np.linspace(0, highest, 8 * 6 * 3).astype(">u2").reshape(8, 18)
        content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
        header = struct.pack(">IIBBBBB", 6, 8, 16, 2, 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", content), (b"IEND", b"")]
        parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
        remarks = Remarks()
        assert pictures.open_pictures(tmp_path / str(number), remarks).read(0).max() == highest >> 8
        assert ["Nearly black" in line for line in remarks.lines()] == [True] * (highest == 4095)


def test_transparency_shows_black(tmp_path):
    image = gradient("RGBA")
    image.putalpha(Image.new("L", image.size, 51))  # a fifth
    image.save(tmp_path / "a.png")
    assert np.abs(pictures.read_image(tmp_path / "a.png") - np.asarray(gradient()) / 5).max() <= 1
    palette = Image.new("P", (32, 16), 1)
    palette.putpalette([250, 250, 250, *RED])
    palette.paste(0, (0, 0, 16, 16))
    palette.save(tmp_path / "p.png", transparency=0)
    read = pictures.read_image(tmp_path / "p.png")
    assert (read[:, :16] == 0).all() and (read[:, 16:] == RED).all()
    Image.new("LA", (32, 16), (100, 0)).save(tmp_path / "la.png")
    assert (pictures.read_image(tmp_path / "la.png") == 0).all()


def test_photographs_are_turned_upright(tmp_path):
    image = gradient()
    for orientation, turn in ((1, 0), (3, 180), (6, 90), (8, 270)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.rotate(turn, expand=True).save(tmp_path / "a.png", exif=exif)
        assert np.array_equal(pictures.read_image(tmp_path / "a.png"), np.asarray(image)), orientation


def test_profiles_are_converted_to_srgb(tmp_path):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = gradient()
    for name, profile in (("srgb", srgb), ("noise", b"noise"), ("for another kind of image", lab)):
        image.save(tmp_path / f"{name}.png", icc_profile=profile)
        assert np.array_equal(pictures.read_image(tmp_path / f"{name}.png"), np.asarray(image)), name
    # Red and blue swapped, by swapping the names of the profile's primaries.
    swapped = srgb.replace(b"rXYZ", b"tmpp").replace(b"bXYZ", b"rXYZ").replace(b"tmpp", b"bXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")).replace(b"sRGB", b"swap")
    image.save(tmp_path / "swapped.png", icc_profile=swapped)
    assert np.abs(pictures.read_image(tmp_path / "swapped.png").astype(int) - np.asarray(image)[..., ::-1]).max() <= 3


# ----------------------------------------------------------------------------
# Cropping and resizing.


def ramp(height, width):
    """Red tells the column and green the row, in units of a pixel."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return pixels


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [
        (50, 50, (0, 100), (50, 150)),  # wide: the sides go
        (10, 80, (37.5, 62.5), (0, 200)),  # narrow: above and below go
        (50, 100, (0, 100), (0, 200)),
    ],
)
def test_the_middle_is_kept(height, width, rows, columns):
    result = pictures.center_crop_and_resize(ramp(100, 200), height, width).astype(float)
    assert result.shape == (height, width, 3)
    # Pixel centres of the result, in the coordinates of the source, away from the edges where the filter is cut off.
    expected_column = columns[0] + (np.arange(width) + 0.5) * (columns[1] - columns[0]) / width - 0.5
    expected_row = rows[0] + (np.arange(height) + 0.5) * (rows[1] - rows[0]) / height - 0.5
    assert np.abs(result[:, 2:-2, 0] - expected_column[2:-2]).max() <= 1
    assert np.abs(result[2:-2, :, 1] - expected_row[2:-2, None]).max() <= 1


def test_the_filter_is_lanczos_over_three_lobes():
    line = np.zeros((1, 64, 3), np.uint8)
    line[:, 32] = 255
    result = pictures.center_crop_and_resize(np.repeat(line, 64, axis=0), 128, 128)[64, :, 0]
    offset = (np.arange(128) + 0.5) / 2 - 32.5
    expected = np.sinc(offset) * np.sinc(offset / 3) * (np.abs(offset) < 3)
    assert np.abs(result - (255 * expected).clip(0, 255)).max() < 6  # weights are normalised to sum to one
