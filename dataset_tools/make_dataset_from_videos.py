"""Make a dataset of clips from a folder of video files, at one or more frame sizes in a single pass.

Values of each frame, such as actions, are stored with a video that has a file of them beside it, named like
`clip.actions.json`, .npy or .csv for `clip.mp4`.

Example:
  python -m dataset_tools.make_dataset_from_videos my_videos data/mine --sizes 36x64,144x256
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from dataset_tools import making
from dataset_tools.frames import Size
from dnnlib import video
from training.data.frames import find_videos as find_videos
from training.data.listing import VIDEO_SUFFIXES, Listing, clip_name, clip_names, list_footage
from training.data.stream_files import fit_length, read_streams, to_list


def name_clips(videos: list[Path], folder: Path) -> dict[str, Path]:
    """Map clip paths to videos: paths inside `folder` without the suffix, or with it if several videos share one."""
    names = clip_names(path.relative_to(folder) for path in videos)
    return {name: folder / path for path, name in names.items()}


def list_videos(folder: Path) -> list[Path]:
    """Return all videos below a folder, sorted, and print what is left out."""
    return find_recordings(folder).videos


def find_recordings(folder: Path) -> Listing:
    """Return the listing of a folder's videos and of the files of streams beside them; print what is left out."""
    listing = list_footage(folder)
    for path, names in listing.pictures.items():
        for name in names:
            listing.remarks.add(
                "Left out, an image, of which make_dataset_from_frames makes clips", (Path(path) / name).as_posix()
            )
    for path in listing.arrays:
        listing.remarks.add("Left out, an array", path.relative_to(folder).as_posix())
    for line in listing.remarks.lines():
        click.echo(line, err=True)
    if not listing.videos:
        remedy = ", but images, which make_dataset_from_frames takes" if listing.pictures else ""
        raise ValueError(f"{folder} holds no videos, whose names end in {', '.join(VIDEO_SUFFIXES)}{remedy}")
    return listing


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


def _streams_of(path: Path, files: Mapping[str, Path], is_after: bool, num_frames: int) -> dict[str, list]:
    """Return the values of each frame of a video; raise ValueError if they are not as many."""
    found = {}
    for name, values in read_streams(files).items():
        fitted = fit_length(values, num_frames, is_after)
        if len(fitted.array) != num_frames:
            raise ValueError(
                f"{path} has {num_frames} frames, but {files.get(name, files.get(''))} has {len(values.array)} {name}: "
                "give one for each frame, or one less, as nothing leads into the first frame"
            )
        found[name] = to_list(fitted)
    return found


def _open(
    path: Path, long_edge: int | None, files: Mapping[str, Path], is_after: bool, recipe: making.Recipe
) -> making.Footage:
    if long_edge is not None and (size := size_of_long_edge(video.probe(path), long_edge)) != recipe.sizes[0]:
        raise ValueError(
            f"{path} would be {size[0]}x{size[1]} with --long-edge {long_edge}, but the first video makes it "
            f"{recipe.sizes[0][0]}x{recipe.sizes[0][1]}; give --sizes, which crops, instead"
        )
    footage = making.open_video(path, recipe)
    if not files:
        return footage
    if recipe.fps is not None or recipe.trim_start or recipe.trim_end:
        name = next(iter(files.values())).name
        raise ValueError(f"{path} has {name}, one value for each of its frames: leave out --fps and --trim-*")
    read_streams(files)  # raises before the video is decoded
    return dataclasses.replace(footage, streams=functools.partial(_streams_of, path, files, is_after))


def _describe(
    path: Path, long_edge: int | None, files: Mapping[str, Path], is_after: bool, recipe: making.Recipe
) -> str:
    footage = _open(path, long_edge, files, is_after, recipe)  # decodes nothing until frames are requested
    info, timing = video.probe(path), video.scan(path)
    num_frames = round((timing.duration_sec - recipe.trim_start - recipe.trim_end) * footage.fps)
    streams = "".join(f", {name or path.suffix}" for name, path in sorted(files.items()))
    return (
        f"{info.height}x{info.width}, {timing.fps:g} fps, {timing.duration_sec:.1f} s{streams}, makes {num_frames} "
        "frames"
    )


@click.command(epilog="Example: python -m dataset_tools.make_dataset_from_videos my_videos data/mine")
@click.argument("input_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("output_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--long-edge",
    help="Length of the longer edge, instead of a size: the other follows from the first video, as nothing is cropped",
    type=click.IntRange(1, 9999),
)
@click.option(
    "--action-timing",
    help="Whether action t of a file led into frame t, or was taken at frame t and leads out of it",
    type=click.Choice(["into", "after"]),
    default="into",
    show_default=True,
)
@making.maker_options()
def main(
    input_dir: Path,
    output_dir: Path,
    long_edge: int | None,
    action_timing: str,
    recipe: making.Recipe,
    job: dict[str, Any],
) -> None:
    """Store all videos below INPUT_DIR as a dataset in OUTPUT_DIR, each as one clip named by its path.

    Frames are centre-cropped to the aspect ratio of each size. To distribute the work, run the command once for each
    --partition, on any number of machines; repeating a partition replaces it. A broken video is reported and left out.

    A file clip.actions.json, .npy, .npz, .csv or .txt beside clip.mp4 has one action for each frame of it, or one less;
    likewise for any other name than actions. They are stored with the clip, such that action t leads into frame t.
    """
    listing = find_recordings(input_dir)
    videos, is_after = listing.videos, action_timing == "after"
    if long_edge is not None:
        context = click.get_current_context()
        if any(context.get_parameter_source(name) != ParameterSource.DEFAULT for name in ("sizes", "height", "width")):
            raise click.UsageError("give either --long-edge or a size")
        recipe = dataclasses.replace(recipe, sizes=(choose_size(videos, long_edge),))
    sources = [
        making.Source(
            name,
            # Videos whose names differ in the suffix alone may show the same, so both train or both validate.
            clip_name(path.relative_to(input_dir).with_suffix("")),
            functools.partial(_open, path, long_edge, listing.streams.get(path, {}), is_after),
            functools.partial(_describe, path, long_edge, listing.streams.get(path, {}), is_after),
        )
        for name, path in name_clips(videos, input_dir).items()
    ]
    origin, packages = input_dir.resolve().name, ("imageio-ffmpeg", "pillow", "numpy")
    facts = {"action_timing": action_timing} if is_after else {}
    making.make(output_dir, sources, recipe, **job, origin=origin, packages=packages, facts=facts)


if __name__ == "__main__":
    main()
