"""Make a dataset of clips from a folder of video files, at one or more frame sizes in a single pass.

Example:
  python -m dataset_tools.make_dataset_from_videos my_videos data/mine --sizes 36x64,144x256
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from dataset_tools import making
from dataset_tools.frames import Size
from dnnlib import video
from training.data.frames import VIDEO_SUFFIXES, find_videos


def name_clips(videos: list[Path], folder: Path) -> dict[str, Path]:
    """Map clip paths, which are paths inside `folder` without the suffix, to videos; raise ValueError on collisions."""
    clips: dict[str, Path] = {}
    for path in videos:
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in clips:
            raise ValueError(f"{clips[name]} and {path} would make the same clip {name}; rename one of them")
        clips[name] = path
    return clips


def size_of_long_edge(info: video.VideoInfo, long_edge: int) -> Size:
    """Return the size, in whole pixels, of an uncropped video whose longer edge has the given length."""
    scale = long_edge / max(info.height, info.width)
    return max(round(info.height * scale), 1), max(round(info.width * scale), 1)


def choose_size(videos: list[Path], long_edge: int) -> Size:
    """Return the size for --long-edge from the first readable video; raise ValueError if there is none."""
    for path in videos:
        try:
            return size_of_long_edge(video.probe(path), long_edge)
        except ValueError as error:
            reason = error
    raise ValueError(f"none of {len(videos)} videos can be read, so --long-edge leads to no size ({reason})")


def _open(path: Path, long_edge: int | None, recipe: making.Recipe) -> making.Footage:
    if long_edge is not None and (size := size_of_long_edge(video.probe(path), long_edge)) != recipe.sizes[0]:
        raise ValueError(
            f"{path} would be {size[0]}x{size[1]} with --long-edge {long_edge}, but the first video makes it "
            f"{recipe.sizes[0][0]}x{recipe.sizes[0][1]}; give --sizes, which crops, instead"
        )
    return making.open_video(path, recipe)


def _describe(path: Path, long_edge: int | None, recipe: making.Recipe) -> str:
    footage = _open(path, long_edge, recipe)  # decodes nothing until frames are requested
    info, timing = video.probe(path), video.scan(path)
    num_frames = round((timing.duration_sec - recipe.trim_start - recipe.trim_end) * footage.fps)
    return f"{info.height}x{info.width}, {timing.fps:g} fps, {timing.duration_sec:.1f} s, makes {num_frames} frames"


@click.command(epilog="Example: python -m dataset_tools.make_dataset_from_videos my_videos data/mine")
@click.argument("input_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("output_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--long-edge",
    help="Length of the longer edge, instead of a size: the other follows from the first video, as nothing is cropped",
    type=click.IntRange(1, 9999),
)
@making.maker_options()
def main(input_dir: Path, output_dir: Path, long_edge: int | None, recipe: making.Recipe, job: dict[str, Any]) -> None:
    """Store all videos below INPUT_DIR as a dataset in OUTPUT_DIR, each as one clip named by its path.

    Frames are centre-cropped to the aspect ratio of each size. To distribute the work, run the command once for each
    --partition, on any number of machines; repeating a partition replaces it. A broken video is reported and left out.
    """
    videos = find_videos(input_dir)
    if not videos:
        raise ValueError(f"{input_dir} holds no videos, whose names end in {', '.join(VIDEO_SUFFIXES)}")
    if long_edge is not None:
        context = click.get_current_context()
        if any(context.get_parameter_source(name) != ParameterSource.DEFAULT for name in ("sizes", "height", "width")):
            raise click.UsageError("give either --long-edge or a size")
        recipe = dataclasses.replace(recipe, sizes=(choose_size(videos, long_edge),))
    sources = [
        making.Source(
            name, name, functools.partial(_open, path, long_edge), functools.partial(_describe, path, long_edge)
        )
        for name, path in name_clips(videos, input_dir).items()
    ]
    origin, packages = input_dir.resolve().name, ("imageio-ffmpeg", "pillow", "numpy")
    making.make(output_dir, sources, recipe, **job, origin=origin, packages=packages)


if __name__ == "__main__":
    main()
