"""Shared parts of the dataset makers: their options, and the conversion of footage to described partitions of clips."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import math
import os
import queue
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from dataset_tools import archive, names
from dataset_tools.frames import CHROMAS, Size, SizesType, encode_at_sizes
from dataset_tools.shots import ShotDetector
from dnnlib import video
from dnnlib.text import escape, quote, to_text
from training.data.frames import iter_video, reading_rate
from training.data.listing import to_texts
from training.data.resizing import RESIZERS

DEFAULT_SIZES: tuple[Size, ...] = ((36, 64), (144, 256))

# A video is broken if more frames than these are missing, since a few may be coded but never shown.
_MISSING_SHARE, _MISSING_FRAMES = 0.1, 2

_CONTENT = ("fps", "trim_start", "trim_end", "min_frames", "split_shots", "quality", "chroma", "resize")
_JOB = ("partition", "num_partitions", "val_fraction", "split", "workers", "skip_bad", "skip_made", "dry_run")

# Number of sources that are read ahead, and of encoded frames that each may buffer.
_SOURCES_AHEAD, _FRAMES_AHEAD = 8, 64


@dataclass(frozen=True)
class Recipe:
    """All options that determine the contents of a clip; times in seconds, `fps` None: that of the source."""

    sizes: tuple[Size, ...] = DEFAULT_SIZES
    fps: float | None = None
    trim_start: float = 0.0
    trim_end: float = 0.0
    min_frames: int = 1
    split_shots: bool = False
    quality: int = 100
    chroma: str = "4:4:4"
    resize: str | None = None  # None: as the maker does

    def facts(self) -> dict[str, Any]:
        """Return the entries of dataset.json; sizes and frame rate are added when they are known."""
        facts = dataclasses.asdict(self)
        del facts["sizes"]
        if facts["resize"] in (None, "lanczos"):
            del facts["resize"]
        return {"resampled_fps": facts.pop("fps"), **facts}


@dataclass(frozen=True)
class Footage:
    """An opened source: its frame rate, and its frames, each uint8 (H, W, 3).

    The generator raises ValueError if the source is broken or ends early, and is closed when no more frames are needed.
    `streams` returns the values of streams, such as "actions", given the number of frames: one value for each, as JSON
    has them. It raises ValueError for values that do not fit.
    """

    fps: float
    frames: Generator[np.ndarray, None, None]
    streams: Callable[[int], Mapping[str, Sequence[Any]]] | None = None


@dataclass(frozen=True)
class Source:
    """A source of one clip.

    `name` is the clip's path inside the dataset, `group` the video it belongs to, for --val-fraction. `open` may be
    slow, such as for a download, is called in a thread, and raises ValueError naming the source if it is broken,
    `TooShort` if nothing is left of it. `describe`, if given, returns a short description for --dry-run, and raises
    likewise.
    """

    name: str
    group: str
    open: Callable[[Recipe], Footage]
    describe: Callable[[Recipe], str] | None = None


class TooShort(ValueError):
    """A source of which nothing is left after trimming, which is no fault of its."""


def open_video(
    path: str | os.PathLike[str], recipe: Recipe, start_sec: float = 0.0, end_sec: float | None = None
) -> Footage:
    """Open a window of a video file, trimmed at both ends as the recipe says.

    Raises ValueError if the file is broken or cut off, `TooShort` if nothing is left of it.
    The frames raise ValueError if they end before the window does, or before the length that the file states.
    """
    if reason := video.missing_end(path):
        raise ValueError(f"{path} ends early: {reason}")
    timing = video.scan(path)
    end = timing.duration_sec if end_sec is None else end_sec
    start, end = start_sec + recipe.trim_start, end - recipe.trim_end
    if end <= start:
        raise TooShort(f"nothing is left of {path} after trimming: it is {timing.duration_sec:g} s long")
    fps = recipe.fps or timing.fps
    # Unless required, the end is that of the file, whose last frame may be shown a little longer.
    needs_end = end_sec is not None or recipe.trim_end > 0
    frames = iter_video(path, reading_rate(path, recipe.fps)[1], start, end if needs_end else None)
    return Footage(fps, _refuse_early_end(frames, path, math.floor((end - start) * fps)))


def _refuse_early_end(
    frames: Iterator[np.ndarray], path: str | os.PathLike[str], expected_frames: int
) -> Generator[np.ndarray, None, None]:
    num_frames = 0
    for frame in frames:
        yield frame
        num_frames += 1
    if num_frames < max(expected_frames * (1 - _MISSING_SHARE) - _MISSING_FRAMES, 1):
        raise ValueError(f"{path} ends early: only {num_frames} of {expected_frames} frames could be decoded")


def _options(default_sizes: Sequence[Size] | None) -> list[Callable[..., Any]]:
    edge, seconds, count = click.IntRange(1, 9999), click.FloatRange(min=0), click.IntRange(min=1)

    def option(name: str, text: str, kind: click.ParamType, default: Any = None, **more: Any) -> Callable[..., Any]:
        return click.option(name, help=text, type=kind, default=default, show_default=default is not None, **more)

    sizes = ",".join(f"{height}x{width}" for height, width in default_sizes or ()) or "that of the source"
    return [
        option("--sizes", f"Frame sizes to store, height x width  [default: {sizes}]", SizesType(), metavar="HxW,..."),
        option("--height", "Height of the only size to store, with --width", edge),
        option("--width", "Width of the only size to store, with --height", edge),
        option("--fps", "Frames per second to store  [default: as in the source]", click.FloatRange(0, min_open=True)),
        option("--trim-start", "Seconds to leave out at the start of each source", seconds, 0.0),
        option("--trim-end", "Seconds to leave out at the end of each source", seconds, 0.0),
        option("--min-frames", "Leave out clips of fewer frames", count, 1),
        click.option("--split-shots", help="Store each shot between two cuts as a clip of its own", is_flag=True),
        option("--quality", "Quality of the JPEGs", click.IntRange(1, 100), 100),
        option("--chroma", "Colour resolution of the JPEGs: full, or half", click.Choice(list(CHROMAS)), "4:4:4"),
        option(
            "--resize",
            "Crop and filter: lanczos, or as a published system does (docs/dataset.md)  [default: lanczos, or that of "
            "the layout]",
            click.Choice(list(RESIZERS)),
        ),
        option(
            "--val-fraction",
            "Fraction of the sources to hold out; the datasets are OUTPUT_DIR/train and OUTPUT_DIR/val",
            click.FloatRange(0, 1, max_open=True),
            0.0,
        ),
        option("--split", "Split that the dataset is marked as", click.Choice(["train", "val", "test"]), "train"),
        option("--partition", "Make this partition only, from 0 on  [default: all]", click.IntRange(min=0)),
        option("--num-partitions", "Zips to divide the clips of a size into", click.IntRange(1, 9999), 10),
        option("--workers", "Threads that resize and encode  [default: one for each core]", count),
        click.option("--skip-bad", help="Succeed even if some sources are broken", is_flag=True),
        click.option(
            "--skip-made",
            help="Keep partitions that were made with these options from these sources; without it they are made again",
            is_flag=True,
        ),
        click.option("--dry-run", help="List what would be made, and write nothing", is_flag=True),
    ]


def maker_options(
    default_sizes: Sequence[Size] | None = DEFAULT_SIZES,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds the options shared by all makers.

    The command's function gets two arguments for them: `recipe`, a Recipe, and `job`, the keyword arguments of `make`
    that do not affect the contents of clips. Without `default_sizes` the recipe has no sizes unless some are given. A
    ValueError in the function becomes the command's error message.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(sizes: tuple[Size, ...] | None, height: int | None, width: int | None, **others: Any) -> None:
            if (height is None) != (width is None):
                raise click.UsageError("--height and --width go together")
            if height is not None and width is not None:
                if sizes is not None:
                    raise click.UsageError("give either --sizes or --height and --width")
                sizes = ((height, width),)
            content = {name: others.pop(name) for name in _CONTENT}
            job = {name: others.pop(name) for name in _JOB}
            if job["val_fraction"] and job["split"] != "train":
                raise click.UsageError("give either --val-fraction or --split")
            if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show ends nothing
                sys.stdout.reconfigure(errors="backslashreplace")
            try:
                function(recipe=Recipe(sizes or tuple(default_sizes or ()), **content), job=job, **others)
            except ValueError as error:
                raise click.ClickException("\n".join(map(escape, str(error).split("\n")))) from error

        return functools.reduce(lambda wrapped, option: option(wrapped), reversed(_options(default_sizes)), command)

    return decorate


@dataclass(frozen=True)
class _Set:
    """One dataset to make: its folder, its sources, and the facts of its dataset.json."""

    root: Path
    sources: Sequence[Source]
    facts: Mapping[str, Any]


@dataclass
class _Tally:
    """The results of all partitions."""

    num_clips: int = 0
    num_frames: int = 0
    rates: collections.Counter[float] = dataclasses.field(default_factory=collections.Counter)
    broken: list[str] = dataclasses.field(default_factory=list)
    short: list[str] = dataclasses.field(default_factory=list)

    def remarks(self) -> Iterator[str]:
        """Yield remarks for the user, one per line."""
        if len(self.rates) > 1:
            found = ", ".join(f"{rate:g} ({count} clips)" for rate, count in self.rates.most_common())
            yield f"The clips differ in frame rate: {found}; give --fps to make them equal."
        for reason in (*self.short, *self.broken):
            yield f"Left out: {reason}"


def make(
    output_dir: Path,
    sources: Sequence[Source],
    recipe: Recipe,
    *,
    partition: int | None,
    num_partitions: int,
    val_fraction: float,
    split: str,
    workers: int | None,
    skip_bad: bool,
    skip_made: bool,
    dry_run: bool,
    origin: str,
    packages: Sequence[str],
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write the requested partitions of a dataset of all sources, whose order matters, and describe them.

    `origin` and `facts` go to dataset.json, as do the versions of `packages`. Raises ValueError if it would conflict
    with existing files, or if sources are broken and not `skip_bad`; the intact ones are written before that.
    """
    assert len({source.name for source in sources}) == len(sources), "two sources have one name"
    named = zip(sources, to_texts(source.name for source in sources), strict=True)
    sources = [dataclasses.replace(source, name=name, group=to_text(source.group)) for source, name in named]
    origin = to_text(origin)
    facts = {"source": origin, "seed": None, "val_fraction": val_fraction, **recipe.facts(), **(facts or {})}
    sets = _divide(output_dir, sources, val_fraction, split, facts)
    if partition is not None:
        archive.partition(sources, partition, num_partitions)  # raises for a number that is too high
    indices = range(num_partitions) if partition is None else [partition]
    for part in sets:
        archive.refuse_mixture(part.root, recipe.sizes, indices, num_partitions, **part.facts)
    shards = [(part, i, archive.partition(part.sources, i, num_partitions)) for i in indices for part in sets]
    kept: list[dict[str, Any]] = []
    if skip_made:
        shards, kept = _without_made(shards, recipe, num_partitions)
    if recipe.split_shots and shards:
        ShotDetector(1.0)  # raises if its package is missing
    workers = workers or len(os.sched_getaffinity(0))
    total = sum(len(shard_sources) for _, _, shard_sources in shards)
    place = escape(str(output_dir))
    if dry_run:
        tally = _list_shards(shards, recipe, workers)
        click.echo(f"{tally.num_clips} clips would be made in {place}. Next: the same without --dry-run")
    else:
        tally = _make_shards(shards, recipe, num_partitions, packages, workers)
        for line in tally.remarks():
            click.echo(line, err=True)
        tally.num_clips += sum(entry["clips"] for entry in kept)
        tally.num_frames += sum(entry["frames"] for entry in kept)
        done = f"{tally.num_clips} clips, {tally.num_frames} frames are in"
        if partition is not None:
            commands = "; ".join(f"python -m dataset_tools.merge {quote(part.root)}" for part in sets)
            click.echo(f"{done} partition {partition} of {place}. Next, when all are made: {commands}")
        elif tally.num_clips:
            click.echo(f"{done} {place}. Next: {names.train_command(sets[0].root, recipe.sizes)}")
        else:
            raise ValueError(f"no clip came of {total} sources; see above why, and mend them or change the options")
    broken = f"{len(tally.broken)} of {total} sources are broken"
    if tally.broken and not skip_bad:
        raise ValueError(f"{broken}; mend them, or accept that by --skip-bad")
    if tally.broken:
        click.echo(f"{broken} and left out, as --skip-bad allows.", err=True)


def _divide(
    output_dir: Path, sources: Sequence[Source], val_fraction: float, split: str, facts: Mapping[str, Any]
) -> list[_Set]:
    """Return the datasets to make; raise ValueError if one would lie inside another."""
    inner = [output_dir / name for name in ("train", "val")]
    for folder in [output_dir] if val_fraction else inner:
        if (folder / archive.DESCRIPTION).exists():
            raise ValueError(
                f"{folder} already holds a dataset, which was made {'without' if val_fraction else 'with'} "
                "--val-fraction; do likewise, or give another output folder"
            )
    if not val_fraction:
        parts = {split: (output_dir, sources)}
    else:
        in_val = [_is_val(source.group, val_fraction) for source in sources]
        chosen = {
            name: [source for source, val in zip(sources, in_val, strict=True) if val == (name == "val")]
            for name in ("train", "val")
        }
        for name, found in chosen.items():
            if not found:
                raise ValueError(
                    f"with --val-fraction {val_fraction:g}, none of {len(sources)} sources falls into {name}; change "
                    "the fraction"
                )
        parts = {path.name: (path, chosen[path.name]) for path in inner}
    return [
        _Set(root, found, {**facts, "split": name, "num_sources": len(found), "sources_sha256": _digest(found)})
        for name, (root, found) in parts.items()
    ]


def _is_val(group: str, val_fraction: float) -> bool:
    """Return whether a video is held out, by a hash of its name, so that adding videos does not move others."""
    number = int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "little")
    return number < val_fraction * 2**64


def _digest(sources: Sequence[Source]) -> str:
    """Return a hash that identifies a list of clips: partitions of different lists do not fit together."""
    return hashlib.sha256("\n".join(source.name for source in sources).encode()).hexdigest()


_Shard = tuple[_Set, int, Sequence[Source]]


def _without_made(
    shards: Sequence[_Shard], recipe: Recipe, num_partitions: int
) -> tuple[list[_Shard], list[dict[str, Any]]]:
    """Return the shards still to be made, and the entries in dataset.json of the others."""
    parts = {part.root: part for part, _, _ in shards}.values()
    made = {part.root: archive.find_made(part.root, recipe.sizes, num_partitions, **part.facts) for part in parts}
    missing, kept = [], []
    for part, index, sources in shards:
        if index in made[part.root]:
            kept.append(made[part.root][index])
        else:
            missing.append((part, index, sources))
    if kept:
        click.echo(f"{len(kept)} of {len(shards)} partitions were made before and are kept.")
    return missing, kept


def _list_shards(shards: Sequence[_Shard], recipe: Recipe, workers: int) -> _Tally:
    """Print the clips that would be made, one line per source."""

    def describe(source: Source) -> tuple[str, str]:
        try:
            return "", source.describe(recipe) if source.describe else ""
        except TooShort as error:
            return "left out", escape(str(error))
        except ValueError as error:
            return "broken", escape(str(error))

    tally = _Tally()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for part, index, sources in shards:
            for source, (fault, text) in zip(sources, pool.map(describe, sources), strict=True):
                text = f"{fault}: {text}" if fault else text
                click.echo(f"{part.facts['split']}  partition {index:04d}  {escape(source.name)}  {text}".rstrip())
                tally.num_clips += not fault
                if fault == "broken":
                    tally.broken.append(text)
    return tally


def _make_shards(
    shards: Sequence[_Shard],
    recipe: Recipe,
    num_partitions: int,
    packages: Sequence[str],
    workers: int,
) -> _Tally:
    """Write the shards in sequence under a progress bar, each described when it is complete."""
    tally = _Tally()
    all_sources = [source for _, _, sources in shards for source in sources]
    with contextlib.ExitStack() as stack:
        readers = stack.enter_context(contextlib.closing(_read_ahead(all_sources, recipe, workers)))
        bar = stack.enter_context(
            click.progressbar(
                length=len(all_sources),
                label="Storing clips",
                item_show_func=lambda item: None if item is None else str(item)[-40:],
            )
        )
        for part, index, sources in shards:
            rates: collections.Counter[float] = collections.Counter()
            left_out = []
            with archive.ShardWriter(part.root, recipe.sizes, index) as writer:
                for source in sources:
                    known, num_dropped = len(writer.frame_paths), len(writer.dropped)
                    reader = next(readers)
                    try:
                        _store(writer, source, reader, recipe, bar)
                    except ValueError as error:
                        (tally.short if isinstance(error, TooShort) else tally.broken).append(escape(str(error)))
                        left_out.append(escape(str(error)))
                    rates[reader.fps] += len(writer.frame_paths) - known
                    if num_short := len(writer.dropped) - num_dropped:
                        reason = (
                            f"{source.name}: {num_short} of {num_short + len(writer.frame_paths) - known} clips have "
                            f"fewer than {recipe.min_frames} frames"
                        )
                        tally.short.append(reason)
                        left_out.append(reason)
                    bar.update(1, source.name)
            report = writer.report(+rates, left_out)
            archive.describe_dataset(part.root, [report], num_partitions, packages, **part.facts)
            tally.rates.update(+rates)
            tally.num_clips += len(report.clips)
            tally.num_frames += sum(clip["frames"] for clip in report.clips.values())
    return tally


def _store(writer: archive.ShardWriter, source: Source, reader: "_Reader", recipe: Recipe, bar: Any) -> None:
    """Write one source as a clip, or shot by shot; if it is broken, write nothing and raise ValueError."""
    facts = {"fps": reader.start(), "group": source.group}
    with writer.clip(source.name, recipe.min_frames, facts) as clip:
        num_frames = -1
        for num_frames, files in enumerate(reader):
            clip(files)
            if num_frames % 100 == 99:
                bar.current_item = f"{source.name}, frame {num_frames + 1}"
                bar.render_progress()
        clip.cuts = reader.cuts
        if reader.streams is not None:
            clip.notes = dict(reader.streams(num_frames + 1))


def _read_ahead(sources: Sequence[Source], recipe: Recipe, workers: int) -> Generator["_Reader", None, None]:
    """Yield readers of all sources in order, and start some of the next ones ahead.

    This keeps all cores busy while programs start or downloads run, even if each source is very short.
    """
    budget = threading.Semaphore(2 * workers)  # frames in memory, over all sources
    readers = collections.deque[_Reader]()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            for source in sources:
                readers.append(_Reader(source, recipe, pool, budget))
                if len(readers) == min(_SOURCES_AHEAD, workers + 1):
                    yield readers[0]
                    readers.popleft()
            while readers:
                yield readers[0]
                readers.popleft()
        finally:
            for reader in readers:
                reader.stop()


class _Reader:
    """Open, read and encode one source in a background thread, at most some frames ahead.

    Call `start()`, then iterate over the files of each frame, then read `cuts`.
    """

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        pool: concurrent.futures.Executor,
        budget: threading.Semaphore,
    ) -> None:
        self.fps = 0.0
        self.cuts: list[int] | None = None
        self.streams: Callable[[int], Mapping[str, Sequence[Any]]] | None = None
        self._source, self._recipe, self._pool, self._budget = source, recipe, pool, budget
        self._results = queue.SimpleQueue[Any]()
        self._room = threading.Semaphore(_FRAMES_AHEAD)
        self._stopped = False
        threading.Thread(target=self._run, daemon=True).start()

    def start(self) -> float:
        """Wait until the source is open; return its frame rate."""
        self.fps = self._next()
        return self.fps

    def __iter__(self) -> Iterator[list[bytes]]:
        while (future := self._next()) is not None:
            yield future.result()
            self._room.release()

    def stop(self) -> None:
        """Tell the background thread to stop soon."""
        self._stopped = True
        self._room.release()

    def _next(self) -> Any:
        result = self._results.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def _run(self) -> None:
        try:
            footage = self._source.open(self._recipe)
            self.streams = footage.streams
            self._results.put(footage.fps)
            with contextlib.closing(footage.frames):
                self._read(footage)
            self._results.put(None)
        except BaseException as error:  # raised where the results are awaited
            self._results.put(error)

    def _read(self, footage: Footage) -> None:
        recipe = self._recipe
        detector = ShotDetector(footage.fps) if recipe.split_shots else None
        for frame in footage.frames:
            self._room.acquire()
            if self._stopped:
                return
            self._budget.acquire()
            how = (recipe.quality, recipe.chroma, recipe.resize or "lanczos")
            future = self._pool.submit(encode_at_sizes, frame, recipe.sizes, *how)
            future.add_done_callback(lambda _: self._budget.release())
            self._results.put(future)
            if detector is not None:
                detector.add(frame)
        self.cuts = None if detector is None else detector.finish()
