"""Make a dataset of clips from a folder of video files, at one or more frame sizes in a single pass.

Values of each frame, such as actions, are stored with a video that has a file of them beside it, named like
`clip.actions.json`, .npy or .csv for `clip.mp4`.
`--audio` also stores the sound of each frame, as spectrograms.

Example:
  python -m dataset_tools.make_dataset_from_videos my_videos data/mine --sizes 36x64,144x256
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
from click.core import ParameterSource

from dataset_tools import making
from dataset_tools.frames import Size
from dnnlib import video
from training.data.frames import find_videos as find_videos
from training.data.listing import VIDEO_SUFFIXES, Listing, clip_name, clip_names, list_footage
from training.data.stream_files import fit_length, read_streams, to_list
from training.data.streams import AUDIO


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


@dataclasses.dataclass(frozen=True)
class Sound:
    """Where the spectrograms of a video come from: its audio track, or else a file of the release of TATS."""

    is_wanted: bool = False
    file: Path | None = None

    def read(self, path: Path, fps: float, num_frames: int, start_sec: float) -> np.ndarray:
        """Return those of the frames of a video; raise ValueError if there are too few."""
        from training.data.spectrograms import read_published, read_sound  # torch would slow down --help

        if self.file is not None:
            return read_published(self.file, num_frames)
        return read_sound(path, fps, num_frames, start_sec)


def find_spectrograms(folder: Path, name: Path) -> Path:
    """Return the file of spectrograms of a video, given its path inside its own folder."""
    found = [folder / name.with_suffix(suffix) for suffix in (".pickle", ".npy")]
    return next((path for path in found if path.is_file()), found[0])


def _streams_of(
    path: Path, files: Mapping[str, Path], is_after: bool, sound: Sound, fps: float, start_sec: float, num_frames: int
) -> dict[str, Any]:
    """Return the values of each frame of a video; raise ValueError if they are not as many."""
    found: dict[str, Any] = {}
    if sound.is_wanted:
        found[AUDIO] = sound.read(path, fps, num_frames, start_sec)
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
    path: Path, long_edge: int | None, files: Mapping[str, Path], is_after: bool, sound: Sound, recipe: making.Recipe
) -> making.Footage:
    if long_edge is not None and (size := size_of_long_edge(video.probe(path), long_edge)) != recipe.sizes[0]:
        raise ValueError(
            f"{path} would be {size[0]}x{size[1]} with --long-edge {long_edge}, but the first video makes it "
            f"{recipe.sizes[0][0]}x{recipe.sizes[0][1]}; give --sizes, which crops, instead"
        )
    footage = making.open_video(path, recipe)
    if AUDIO in files:
        raise ValueError(f"{path} has {files[AUDIO].name}, but {AUDIO} is its sound: give the file another name")
    fixed = [*files.values(), *([sound.file] if sound.file else [])]
    if fixed and (recipe.fps is not None or recipe.trim_start or recipe.trim_end):
        raise ValueError(f"{path} has {fixed[0].name}, one value for each of its frames: leave out --fps and --trim-*")
    read_streams(files)  # raises before the video is decoded
    if not files and not sound.is_wanted:
        return footage
    streams = functools.partial(_streams_of, path, files, is_after, sound, footage.fps, recipe.trim_start)
    return dataclasses.replace(footage, streams=streams)


def _describe(
    path: Path, long_edge: int | None, files: Mapping[str, Path], is_after: bool, sound: Sound, recipe: making.Recipe
) -> str:
    footage = _open(path, long_edge, files, is_after, sound, recipe)  # decodes nothing until frames are requested
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
@click.option("--audio", "has_audio", help="Store spectrograms of the sound of each frame", is_flag=True)
@click.option(
    "--stft",
    "stft_dir",
    help="Folder of the release of TATS with spectrograms, clip.pickle for clip.mp4, instead of the audio tracks",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
@making.maker_options()
def main(
    input_dir: Path,
    output_dir: Path,
    long_edge: int | None,
    action_timing: str,
    has_audio: bool,
    stft_dir: Path | None,
    recipe: making.Recipe,
    job: dict[str, Any],
) -> None:
    """Store all videos below INPUT_DIR as a dataset in OUTPUT_DIR, each as one clip named by its path.

    Frames are centre-cropped to the aspect ratio of each size. To distribute the work, run the command once for each
    --partition, on any number of machines; repeating a partition replaces it. A broken video is reported and left out.

    A file clip.actions.json, .npy, .npz, .csv or .txt beside clip.mp4 has one action for each frame of it, or one less;
    likewise for any other name than actions. They are stored with the clip, such that action t leads into frame t.

    With --audio each video must have a sound track as long as its frames.
    """
    listing = find_recordings(input_dir)
    videos, is_after = listing.videos, action_timing == "after"
    if long_edge is not None:
        context = click.get_current_context()
        if any(context.get_parameter_source(name) != ParameterSource.DEFAULT for name in ("sizes", "height", "width")):
            raise click.UsageError("give either --long-edge or a size")
        recipe = dataclasses.replace(recipe, sizes=(choose_size(videos, long_edge),))
    if stft_dir is not None and not has_audio:
        raise click.UsageError("--stft says where the spectrograms are that --audio stores: add --audio")
    sources = []
    for name, path in name_clips(videos, input_dir).items():
        inside = path.relative_to(input_dir)
        sound = Sound(has_audio, find_spectrograms(stft_dir, inside) if stft_dir else None)
        parts = path, long_edge, listing.streams.get(path, {}), is_after, sound
        # Videos whose names differ in the suffix alone may show the same, so both train or both validate.
        group = clip_name(inside.with_suffix(""))
        sources.append(
            making.Source(name, group, functools.partial(_open, *parts), functools.partial(_describe, *parts))
        )
    origin, packages = input_dir.resolve().name, ("imageio-ffmpeg", "pillow", "numpy")
    facts: dict[str, Any] = {"action_timing": action_timing} if is_after else {}
    facts |= {"audio": "stft" if stft_dir else "track"} if has_audio else {}
    making.make(output_dir, sources, recipe, **job, origin=origin, packages=packages, facts=facts)


if __name__ == "__main__":
    main()
