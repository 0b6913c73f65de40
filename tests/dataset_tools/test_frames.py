"""Frames are stored at full colour resolution, in order, at the given sizes."""

import io

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from dataset_tools import frames


def test_sizes_are_height_by_width():
    assert frames.parse_sizes("36x64,144x256") == ((36, 64), (144, 256))


@pytest.mark.parametrize("text", ["36", "36x", "36x64;144x256", "0x64", "36x64,", "-1x5", "36x64,36x64", "1x10000"])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match=r"not a frame size|names a size twice"):
        frames.parse_sizes(text)


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
