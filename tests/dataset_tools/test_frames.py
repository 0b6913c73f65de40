"""Frames are cropped in the middle, resized without loss of level, and stored at full colour resolution."""

import io

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from dataset_tools import frames


def gradient(height, width):
    """Red tells the column and green the row, in units of a pixel."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return pixels


def test_sizes_are_height_by_width():
    assert frames.parse_sizes("36x64,144x256") == ((36, 64), (144, 256))


@pytest.mark.parametrize("text", ["36", "36x", "36x64;144x256", "0x64", "36x64,", "-1x5", "36x64,36x64", "1x10000"])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match=r"not a frame size|names a size twice"):
        frames.parse_sizes(text)


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [
        (50, 50, (0, 100), (50, 150)),  # wide: the sides go
        (10, 80, (37.5, 62.5), (0, 200)),  # narrow: above and below go
        (50, 100, (0, 100), (0, 200)),
    ],
)
def test_the_middle_is_kept(height, width, rows, columns):
    result = frames.center_crop_and_resize(gradient(100, 200), height, width).astype(float)
    assert result.shape == (height, width, 3)
    # Pixel centres of the result, in the coordinates of the source, away from the edges where the filter is cut off.
    expected_column = columns[0] + (np.arange(width) + 0.5) * (columns[1] - columns[0]) / width - 0.5
    expected_row = rows[0] + (np.arange(height) + 0.5) * (rows[1] - rows[0]) / height - 0.5
    assert np.abs(result[:, 2:-2, 0] - expected_column[2:-2]).max() <= 1
    assert np.abs(result[2:-2, :, 1] - expected_row[2:-2, None]).max() <= 1


def test_the_filter_is_lanczos_over_three_lobes():
    line = np.zeros((1, 64, 3), np.uint8)
    line[:, 32] = 255
    result = frames.center_crop_and_resize(np.repeat(line, 64, axis=0), 128, 128)[64, :, 0]
    offset = (np.arange(128) + 0.5) / 2 - 32.5
    expected = np.sinc(offset) * np.sinc(offset / 3) * (np.abs(offset) < 3)
    assert np.abs(result - (255 * expected).clip(0, 255)).max() < 6  # weights are normalised to sum to one


def test_jpegs_keep_colour_at_full_resolution():
    noise = np.random.RandomState(0).randint(0, 256, (32, 32, 3)).astype(np.uint8)
    with Image.open(io.BytesIO(frames.encode_jpeg(noise))) as image:
        assert isinstance(image, JpegImagePlugin.JpegImageFile)
        assert JpegImagePlugin.get_sampling(image) == 0  # 4:4:4
        assert {max(table) for table in image.quantization.values()} == {1}  # quality 100
        assert np.abs(np.asarray(image).astype(int) - noise).max() <= 4


def test_jpegs_of_less_quality_are_as_asked_for_and_smaller():
    noise = np.random.RandomState(0).randint(0, 256, (32, 32, 3)).astype(np.uint8)
    sizes = []
    for quality, chroma in ((100, "4:4:4"), (100, "4:2:0"), (90, "4:2:0"), (50, "4:2:0")):
        (data,) = frames.encode_at_sizes(noise, [(32, 32)], quality, chroma)
        with Image.open(io.BytesIO(data)) as image:
            assert isinstance(image, JpegImagePlugin.JpegImageFile)
            assert JpegImagePlugin.get_sampling(image) == {"4:4:4": 0, "4:2:0": 2}[chroma]
        sizes.append(len(data))
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1.5 * sizes[1]


def test_a_stream_keeps_its_order_and_passes_errors_on():
    sources = [np.full((8, 8, 3), level, np.uint8) for level in range(0, 250, 10)]
    sizes = [(4, 4), (8, 8)]
    streamed = list(frames.encode_stream(iter(sources), sizes, num_threads=3))
    assert streamed == [frames.encode_at_sizes(source, sizes) for source in sources]

    def breaking():
        yield sources[0]
        raise ValueError("broken video")

    with pytest.raises(ValueError, match="broken video"):
        list(frames.encode_stream(breaking(), sizes, num_threads=2))
