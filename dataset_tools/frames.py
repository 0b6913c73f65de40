"""Convert decoded frames to stored ones: centre crop, Lanczos resize and JPEG, the same in every dataset maker."""

import collections
import concurrent.futures
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import click
import numpy as np
from PIL import Image

from training.data.pictures import center_crop_and_resize as center_crop_and_resize
from training.data.pictures import resize_to_each
from training.data.resizing import RESIZERS

# Colour resolutions, as Pillow numbers them.
CHROMAS = {"4:4:4": 0, "4:2:0": 2}

Size = tuple[int, int]  # height, width


class SizesType(click.ParamType):
    """A comma-separated list of frame sizes, each HEIGHTxWIDTH."""

    name = "HxW,HxW,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Size, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return parse_sizes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def parse_sizes(text: str) -> tuple[Size, ...]:
    """Parse "36x64,144x256" as ((36, 64), (144, 256)), height first; raise ValueError on anything else or a repeat."""
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)x(\d+)\s*", part)
        if match is None or 0 in (size := (int(match[1]), int(match[2]))) or max(size) > 9999:
            raise ValueError(f"{part.strip()!r} is not a frame size; sizes look like 36x64,144x256 (height x width)")
        sizes.append(size)
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"{text!r} names a size twice; give each size once")
    return tuple(sizes)


def encode_jpeg(frame: np.ndarray, quality: int = 100, chroma: str = "4:4:4") -> bytes:
    """Encode a frame (uint8 H W 3) as JPEG; the defaults are those of datasets and nearly lossless."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="JPEG", quality=quality, subsampling=CHROMAS[chroma])
    return buffer.getvalue()


def encode_at_sizes(
    frame: np.ndarray, sizes: Sequence[Size], quality: int = 100, chroma: str = "4:4:4", resize: str = "lanczos"
) -> list[bytes]:
    """Return one JPEG of `frame` (uint8 H W 3) for each size, each resized from the whole frame.

    `resize` is a key of `training.data.resizing.RESIZERS`.
    """
    if resize == "lanczos":
        return [encode_jpeg(resized, quality, chroma) for resized in resize_to_each(frame, sizes)]
    return [encode_jpeg(RESIZERS[resize](frame[None], size)[0], quality, chroma) for size in sizes]


def encode_stream(frames: Iterable[np.ndarray], sizes: Sequence[Size], num_threads: int) -> Iterator[list[bytes]]:
    """Yield `encode_at_sizes` of each frame, in order, computed by `num_threads` threads a few frames ahead.

    Pillow releases the GIL while it resizes and encodes, so threads keep all cores busy.
    """
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        pending = collections.deque[concurrent.futures.Future[list[bytes]]]()
        for frame in frames:
            pending.append(pool.submit(encode_at_sizes, frame, sizes))
            if len(pending) > 2 * num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
