"""Make a dataset of clips from intervals of videos on YouTube, or other websites, that a config lists.

Example:
    python -m dataset_tools.make_dataset_from_youtube dataset_tools/youtube_configs/example.json data/bunny downloads
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from dataset_tools import archive, making, youtube
from dataset_tools.making import Footage, Recipe, Source
from dnnlib import util, video

# Times on websites are rounded, so an interval may seem to end this much after its video.
_ROUNDING_SEC = 1.0


def open_interval(cache: youtube.VideoCache, interval: youtube.Interval, recipe: Recipe) -> Footage:
    """Open an interval, its end included, of a video, downloaded if necessary; raise ValueError if it is broken."""
    path = cache.fetch(interval.video)
    timing = video.scan(path)  # the length that the file states may be that of its sound
    end = interval.end_sec
    if end is not None:
        if max(interval.start_sec, end - _ROUNDING_SEC) >= timing.duration_sec:
            raise ValueError(f"{interval.name} ends after the video, which is {timing.duration_sec:g} s long")
        end = end + 0.5 / (recipe.fps or timing.fps)  # makes the frame at the end the last one inside
        end = end if end < timing.duration_sec else None
    try:
        return making.open_video(path, recipe, interval.start_sec, end)
    except ValueError as error:
        raise type(error)(f"{interval.name}: {error}") from None


def describe_interval(cache: youtube.VideoCache, interval: youtube.Interval, recipe: Recipe) -> str:
    """Return the description of an interval for --dry-run: its length, and whether its video is cached."""
    where = "in the cache" if cache.find(interval.video) else "to be downloaded"
    if interval.end_sec is None:
        return f"the whole video, {where}"
    length = interval.end_sec - interval.start_sec - recipe.trim_start - recipe.trim_end
    if length <= 0:
        raise making.TooShort(f"{interval.name}: nothing is left after trimming")
    return f"{length:.1f} s, {where}"


def summarize(intervals: Sequence[youtube.Interval]) -> str:
    """Return a summary of a list of intervals."""
    total_sec = sum(interval.end_sec - interval.start_sec for interval in intervals if interval.end_sec is not None)
    num_videos, num_whole = len({i.video for i in intervals}), sum(i.end_sec is None for i in intervals)
    whole = f" and {num_whole} whole videos" if num_whole else ""
    return f"{len(intervals)} intervals of {num_videos} videos, {util.format_time(total_sec)}{whole}"


@click.command(
    epilog="Example: python -m dataset_tools.make_dataset_from_youtube clips.json data/mine downloads --fps 30"
)
@click.argument("clips_config_path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("output_dir", type=click.Path(file_okay=False, path_type=Path))
@click.argument("video_cache_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--max-height",
    help="Maximum shorter edge of the videos to download, if there is a choice",
    type=click.IntRange(min=1),
    default=1080,
    show_default=True,
)
@click.option(
    "--cookies",
    help="File with cookies of a browser, for videos that require signing in; it is only read",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@making.maker_options()
def main(
    clips_config_path: Path,
    output_dir: Path,
    video_cache_dir: Path,
    max_height: int,
    cookies: Path | None,
    recipe: Recipe,
    job: dict[str, Any],
) -> None:
    """Store the intervals that CLIPS_CONFIG_PATH lists as a dataset in OUTPUT_DIR, each as one clip.

    Videos are downloaded into VIDEO_CACHE_DIR shortly before they are needed, without sound, and only those of the
    requested partitions; cached videos are reused. dataset_tools/youtube_configs/README.md describes the format of the
    config, where to find those of the authors, and remedies for failed downloads.
    """
    intervals = youtube.read_config(clips_config_path)
    for warning in youtube.overlaps(intervals):
        click.echo(warning, err=True)
    if job["dry_run"]:
        click.echo(f"The config lists {summarize(intervals)}.")
        if not job["val_fraction"]:
            for index in range(job["num_partitions"]):
                part = archive.partition(intervals, index, job["num_partitions"])
                click.echo(f"Partition {index:04d} takes {summarize(part)}.")
    else:
        youtube.load_yt_dlp()
    cache = youtube.VideoCache(video_cache_dir, max_height, cookies)
    sources = [
        Source(
            interval.name,
            interval.video,
            functools.partial(open_interval, cache, interval),
            functools.partial(describe_interval, cache, interval),
        )
        for interval in intervals
    ]
    packages = ("yt-dlp", "imageio-ffmpeg", "pillow", "numpy")
    facts = {"max_height": max_height}
    making.make(output_dir, sources, recipe, origin=clips_config_path.name, packages=packages, facts=facts, **job)


if __name__ == "__main__":
    main()
