"""Make datasets of footage in published layouts: the common part of the makers that read such."""

import dataclasses
import functools
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from dataset_tools import making
from dataset_tools.make_dataset_from_frames import choose_frames
from training.data.layouts.base import Layout
from training.data.streams import StreamStore

source_fps_option = click.option(
    "--source-fps",
    help="Frames per second at which the frames were recorded  [default: that of the files, else 30]",
    type=click.FloatRange(0, min_open=True),
)


def make_from_layout(
    layout: Layout,
    output_dir: Path,
    source_fps: float | None,
    recipe: making.Recipe,
    job: dict[str, Any],
    packages: Sequence[str],
) -> None:
    """Write the clips of a layout, with the streams that it has, as a dataset; see `making.make`.

    Frames are stored at their own size, and resized as the publisher does, unless the recipe says otherwise.
    """
    for line in layout.remarks.lines():
        click.echo(line, err=True)
    fps = source_fps or layout.fps or 30.0
    recipe = dataclasses.replace(recipe, sizes=recipe.sizes or (layout.size,), resize=recipe.resize or layout.resizer)
    streams = open_streams(layout)
    if streams and recipe.fps is not None and recipe.fps != fps:
        raise ValueError(f"{layout.path} has {', '.join(streams)}, one value for each frame: leave out --fps")
    sources = [
        making.Source(
            clip.path,
            clip.path,
            functools.partial(_open, layout, number, fps, streams),
            functools.partial(_describe, layout, number, fps),
        )
        for number, clip in enumerate(layout.clips)
    ]
    facts = {"source_fps": fps, "layout": layout.title}
    making.make(output_dir, sources, recipe, **job, origin=layout.name, packages=packages, facts=facts)


def open_streams(layout: Layout) -> dict[str, StreamStore]:
    """Return the streams of a layout, checked against its clips."""
    root, clips = layout.root, layout.clips
    return {
        name: StreamStore(root, name, clips, (), None, layout.stream_shards(name)) for name in layout.stream_names()
    }


def _open(
    layout: Layout, number: int, fps: float, streams: Mapping[str, StreamStore], recipe: making.Recipe
) -> making.Footage:
    chosen = choose_frames(layout.clips[number].num_frames, fps, recipe)
    if not chosen:
        raise making.TooShort(f"nothing is left of {layout.clips[number].path} of {layout.path} after trimming")

    def read_streams(num_frames: int) -> dict[str, list[Any]]:
        return {name: values_of(store, number, chosen[:num_frames]) for name, store in streams.items()}

    return making.Footage(recipe.fps or fps, _read(layout, number, chosen), read_streams if streams else None)


def values_of(store: StreamStore, clip: int, frames: Sequence[int]) -> list[Any]:
    """Return the values of a stream of the given frames of a clip as JSON has them, names as names."""
    values = store.read(clip, 0, store.clips[clip].num_frames)[list(frames)].tolist()
    return values if store.vocabulary is None else [store.vocabulary[value] for value in values]


def _read(layout: Layout, number: int, chosen: Sequence[int]) -> Generator[np.ndarray, None, None]:
    """Yield the chosen frames, which ascend and may repeat."""
    frames = enumerate(layout.iterate(number))
    place, pixels = next(frames, (-1, None))
    for wanted in chosen:
        while pixels is not None and place < wanted:
            place, pixels = next(frames, (-1, None))
        if pixels is None:
            raise ValueError(
                f"{layout.path} has only a part of the {layout.clips[number].num_frames} frames of "
                f"{layout.clips[number].path}: its file is damaged, so make or copy it again"
            )
        yield pixels


def _describe(layout: Layout, number: int, fps: float, recipe: making.Recipe) -> str:
    height, width = layout.read(number, [0]).shape[1:3]
    num_frames = layout.clips[number].num_frames
    made = len(choose_frames(num_frames, fps, recipe))
    return f"{num_frames} frames of {height}x{width}, make {made} frames"
