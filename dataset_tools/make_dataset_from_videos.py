"""Make a dataset of clips from a folder of video files, at one or more frame sizes in a single pass.

Example:
  python -m dataset_tools.make_dataset_from_videos my_videos data/mine --sizes 36x64,144x256
"""

import collections
import os
from pathlib import Path

import click

from dataset_tools import archive
from dataset_tools.frames import Size, SizesType, encode_stream
from dnnlib import video

DEFAULT_SIZES = ((36, 64), (144, 256))
SUFFIXES = (".avi", ".mkv", ".mov", ".mp4", ".webm", ".wmv")
# A video is broken if it ends this much before its stated end; sound may go on a little longer than the pictures.
_MISSING_SEC, _MISSING_SHARE = 1.0, 0.1


def find_videos(folder: Path) -> list[Path]:
    """All videos below a folder, sorted; linked folders are not entered."""
    found = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    return sorted(path for path in found if path.suffix.lower() in SUFFIXES)


def name_clips(videos: list[Path], folder: Path) -> dict[str, Path]:
    """Clip paths, which are paths inside `folder` without the suffix; ValueError where two videos share one."""
    clips: dict[str, Path] = {}
    for path in videos:
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in clips:
            raise ValueError(f"{clips[name]} and {path} would make the same clip {name}; rename one of them")
        clips[name] = path
    return clips


def add_video(
    writer: archive.ShardWriter,
    name: str,
    path: Path,
    fps: float | None,
    trim_start: float,
    trim_end: float,
    num_threads: int,
) -> float:
    """Write one video as a clip and return its frame rate; ValueError, with nothing written, if it is broken."""
    info = video.probe(path)
    end = None
    if info.duration_sec is not None:
        end = info.duration_sec - trim_end
        if end <= trim_start:
            raise ValueError(f"{path} is {info.duration_sec:g} s long, so nothing is left after trimming")
    elif trim_end:
        raise ValueError(f"{path} does not say how long it is, so its end cannot be trimmed")
    rate = fps or info.fps
    frames = video.iter_video_frames(path, fps=fps, start_sec=trim_start, end_sec=end if trim_end else None)
    with writer.clip(name) as add:
        num_frames = 0
        for files in encode_stream(frames, writer.sizes, num_threads):
            add(files)
            num_frames += 1
        expected_sec = end - trim_start if end is not None else 0.0
        if num_frames == 0 or num_frames / rate < expected_sec * (1 - _MISSING_SHARE) - _MISSING_SEC:
            raise ValueError(
                f"{path} ends early: {num_frames} frames could be decoded of {expected_sec:.1f} s at {rate:g} a second"
            )
    return rate


@click.command()
@click.argument("input_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("output_dir", type=click.Path(file_okay=False, path_type=Path))
# fmt: off
@click.option("--sizes", help="Frame sizes to store, height x width  [default: 36x64,144x256]", type=SizesType())
@click.option("--height", help="Height of the only size to store, with --width", type=click.IntRange(1, 9999))
@click.option("--width", help="Width of the only size to store, with --height", type=click.IntRange(1, 9999))
@click.option(
    "--fps", help="Frames a second to store  [default: as in the video]", type=click.FloatRange(min=0, min_open=True)
)
@click.option(
    "--trim-start",
    help="Seconds to leave out at the start of each video",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
)
@click.option(
    "--trim-end",
    help="Seconds to leave out at the end of each video",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
)
@click.option(
    "--partition",
    help="Which partition of the videos to store, counted from 0",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
)
@click.option(
    "--num-partitions",
    help="Partitions that all videos are divided into, one command each",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
)
@click.option(
    "--split",
    help="What the set is for, noted in dataset.json",
    type=click.Choice(["train", "val", "test"]),
    default="train",
    show_default=True,
)
@click.option("--skip-bad", help="Succeed even if some videos are broken", is_flag=True)
@click.option(
    "--workers", help="Threads that resize and encode  [default: one for each core]", type=click.IntRange(min=1)
)
# fmt: on
def main(
    input_dir: Path,
    output_dir: Path,
    sizes: tuple[Size, ...] | None,
    height: int | None,
    width: int | None,
    fps: float | None,
    trim_start: float,
    trim_end: float,
    partition: int,
    num_partitions: int,
    split: str,
    skip_bad: bool,
    workers: int | None,
) -> None:
    """Store all videos below INPUT_DIR as a dataset in OUTPUT_DIR, each as one clip named by its path.

    Frames are cropped around their middle to the aspect of each size. To share the work, run the command once for
    each --partition of --num-partitions, on as many machines as you like; running one again replaces what it wrote.
    """
    sizes = _choose_sizes(sizes, height, width)
    facts = {
        "source": input_dir.resolve().name,
        "split": split,
        "seed": None,
        "trim_start_sec": trim_start,
        "trim_end_sec": trim_end,
    }
    try:
        archive.refuse_mixture(output_dir, sizes, **facts)
        clips = name_clips(find_videos(input_dir), input_dir)
        if len(clips) < num_partitions:
            raise ValueError(
                f"{input_dir} holds {len(clips)} videos ({', '.join(SUFFIXES)}) for {num_partitions} partitions; each "
                "partition needs at least one"
            )
        mine = archive.partition(list(clips.items()), partition, num_partitions)
    except ValueError as error:
        raise click.ClickException(str(error)) from error

    rates: collections.Counter[float] = collections.Counter()
    broken: list[str] = []
    with archive.ShardWriter(output_dir, sizes, partition) as writer:
        with click.progressbar(mine, label="Storing videos") as bar:
            for name, path in bar:
                try:
                    num_threads = workers or os.cpu_count() or 1
                    rates[add_video(writer, name, path, fps, trim_start, trim_end, num_threads)] += 1
                except ValueError as error:
                    broken.append(str(error))
        for reason in broken:
            click.echo(f"Skipped: {reason}", err=True)
        if not rates:
            raise click.ClickException(f"none of {len(mine)} videos could be read, so nothing was written")
    if len(rates) > 1:
        found = ", ".join(f"{rate:g} ({count} videos)" for rate, count in rates.most_common())
        click.echo(f"The videos differ in frame rate: {found}; give --fps to make them equal.", err=True)
    packages = ("imageio-ffmpeg", "pillow", "numpy")
    archive.describe_dataset(
        output_dir, writer.hashes, num_partitions, packages, fps=rates.most_common(1)[0][0], **facts
    )
    click.echo(f"{rates.total()} clips are in {output_dir}. Next: python train_lres.py --dataset={output_dir}")
    if broken and not skip_bad:
        raise click.ClickException(f"{len(broken)} of {len(mine)} videos are broken; accept that with --skip-bad")


def _choose_sizes(sizes: tuple[Size, ...] | None, height: int | None, width: int | None) -> tuple[Size, ...]:
    if (height is None) != (width is None):
        raise click.UsageError("--height and --width go together")
    if height is not None and width is not None:
        if sizes is not None:
            raise click.UsageError("give either --sizes or --height and --width")
        return ((height, width),)
    return sizes or DEFAULT_SIZES


if __name__ == "__main__":
    main()
