"""Generate videos of any length from trained networks, straight to files.

# Smallest command (a CPU, low resolution only)
python generate.py --outdir=outputs --seed=0 --len=64 --lres=LRES.pkl

# Both stages: ten seconds at full size, with two frames as pictures
python generate.py --outdir=outputs --seed=0 --len=301 --lres=LRES.pkl --sres=SRES.pkl -i 0 -i 150

# Sixteen videos side by side in one, which goes on until Ctrl-C
python generate.py --outdir=outputs --seeds=0-15 --grid=4x4 --len=inf --lres=LRES.pkl --sres=SRES.pkl

# Sharpen a small video of your own
python generate.py --outdir=outputs --seed=0 --lres-video=clip.mp4 --sres=SRES.pkl

Networks are paths or URLs of pickles, ours or published ones; opening them never runs code they carry. Frames go to
the encoder as they are made, so memory does not grow with the length. Frame t of a seed is the same for every --len
and --start. docs/generation.md tells the rest.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import click
import torch
from torch import nn

from dnnlib.frames_out import SUFFIXES
from dnnlib.util import format_time
from torch_utils import compilation, host_memory
from torch_utils.precision import PRECISIONS, set_precision, why_not
from training.longvideogan.given_video import GivenVideo, frame_rate
from training.longvideogan.sampling import LowResSource, Sampling, SuperResSource, open_source
from training.network_file import default_pair
from training.video_files import Film, Plan, Videos, make_films

# ----------------------------------------------------------------------------
# What is given on the command line.


def parse_seeds(text: str) -> list[int]:
    """Read "0-15", "0,3,7" or "0-3,8"; ValueError on anything else or on a repeat."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"{part.strip()!r} names no seeds: they look like 0-15 or 0,3,7")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{text!r} names a seed twice; give each seed once")
    return seeds


def parse_grid(text: str) -> tuple[int, int]:
    """Read "3x5" as rows and columns."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise ValueError(f"{text!r} is not a grid: it looks like 4x4 (rows x columns)")
    return int(match[1]), int(match[2])


def parse_length(text: str) -> int | float:
    """Read a number of frames, or "inf"."""
    if text == "inf":
        return float("inf")
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise ValueError(f"{text!r} is not a length: use a whole number of frames from 1 on, or inf")
    return int(text)


def parse_blend(text: str) -> tuple[int, int]:
    """Read "7@300": seed 7, reached at frame 300."""
    match = re.fullmatch(r"(-?\d+)@(\d+)", text)
    if match is None:
        raise ValueError(
            f"{text!r} is not a blend: it looks like 7@300 (the seed, and the frame at which it is reached)"
        )
    return int(match[1]), int(match[2])


class Parsed(click.ParamType):
    """A value that a function reads, whose ValueErrors are shown."""

    def __init__(self, name: str, parse: Callable[[str], Any]):
        self.name = name
        self.parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.parse(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)


# ----------------------------------------------------------------------------
# While it runs.


class _Stopped(BaseException):
    """Raised where frames are computed; no error, so nothing on the way may take it for one."""


class Stopper:
    """Ends the making of frames at Ctrl-C or SIGTERM, without ever tearing a frame that is being written.

    A context manager, for the main thread. A second signal is a KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.signal: int | None = None  # the one that came
        self._computing = False

    def __enter__(self) -> "Stopper":
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        # Written past Python's streams, one of which may be at work when the signal comes.
        os.write(2, b"\nStopping: what there is will be finished (once more to throw it away).\n")
        if self._computing:
            raise _Stopped

    def guard(self, items: Iterator[Any]) -> Iterator[Any]:
        """The items, until the signal comes: at once while an item is computed, else after the item at hand."""
        while self.signal is None:
            try:
                self._computing = True
                item = next(items)
            except (_Stopped, StopIteration):
                return
            finally:
                self._computing = False
            yield item


class Progress:
    """A line on stderr about how far it is, renewed in a terminal and repeated now and then elsewhere."""

    def __init__(self, total: int | None) -> None:
        self.total = total
        self.done = 0
        self.first_sec = 0.0
        self.begin = time.monotonic()
        self.shown = self.begin
        self.is_terminal = sys.stderr.isatty()

    def update(self, count: int) -> None:
        """`count` more frames were made, of all videos together."""
        now = time.monotonic()
        self.first_sec = self.first_sec or now - self.begin
        self.done += count
        if now - self.shown < (0.2 if self.is_terminal else 10.0):
            return
        self.shown = now
        speed = self.done / (now - self.begin)
        line = f"frame {self.done}, {speed:.1f} frames/s"
        if self.total is not None:
            left = format_time((self.total - self.done) / speed)
            line = f"frame {self.done} of {self.total}, {speed:.1f} frames/s, {left} left"
        click.echo(f"\r{line}\033[K" if self.is_terminal else line, err=True, nl=not self.is_terminal)

    def finish(self) -> None:
        """Sum up."""
        total_sec = time.monotonic() - self.begin
        end = "\r\033[K" if self.is_terminal else ""
        click.echo(
            f"{end}{self.done} frames in {format_time(total_sec)}: {self.done / total_sec:.1f} frames/s, the first "
            f"after {self.first_sec:.1f} s",
            err=True,
        )


# ----------------------------------------------------------------------------
# The command.


@click.command(help=re.sub(r"^# ", "\b\n", str(__doc__), flags=re.MULTILINE))
@click.option("--outdir", help="Where the files go", required=True, type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", help="Which video", type=int)
@click.option("--seeds", help="Several videos: 0-15 or 0,3,7", type=Parsed("LIST", parse_seeds))
@click.option("--lres", "lres_path", help="Low-resolution network", metavar="PATH|URL|NAME")
@click.option(
    "--sres", "sres_path", help="Super-resolution network; low resolution only without", metavar="PATH|URL|NAME"
)
@click.option(
    "--lres-video",
    help="Enlarge this instead of what a low-resolution network makes: a video, an npz file, a folder of pictures",
    type=click.Path(path_type=Path, exists=True),
)
# Which frames.
@click.option(
    "--len",
    "length",
    help="Frames, or inf: until Ctrl-C  [default: 301, a whole --loop, a whole --lres-video]",
    type=Parsed("FRAMES|inf", parse_length),
)
@click.option("--start", help="First frame", default=0, show_default=True, type=int)
@click.option("--truncation", help="Below 1: more usual, less varied", default=1.0, show_default=True)
@click.option("--temporal-scale", help="Below 1: slow motion; above: fast", default=1.0, show_default=True)
@click.option(
    "--blend",
    help="Turn into another seed's video, reached at this frame; repeatable",
    multiple=True,
    type=Parsed("SEED@FRAME", parse_blend),
)
@click.option("--loop", help="Repeat exactly after so many frames", metavar="FRAMES", type=click.IntRange(min=1))
@click.option(
    "--rng",
    help="How noise is drawn; legacy: in the published order, of which every frame depends on --len",
    default="blocks",
    show_default=True,
    type=click.Choice(["blocks", "legacy"]),
)
# Which files.
@click.option("--save-lres", help="Also write the low-resolution video", default=False, show_default=True, type=bool)
@click.option("--save-index", "-i", help="Also write frame N as PNG; repeatable", metavar="N", multiple=True, type=int)
@click.option("--grid", help="One video of all seeds, side by side", type=Parsed("ROWSxCOLUMNS", parse_grid))
@click.option("--fps", help="Frames a second  [default: 30, that of --lres-video]", type=click.FloatRange(min=1))
@click.option(
    "--format",
    "file_format",
    help="png (a folder) and npz lose nothing",
    default="mp4",
    show_default=True,
    type=click.Choice(list(SUFFIXES)),
)
@click.option(
    "--crf", help="Of mp4 and webm: lower is better and larger  [default: 18]", type=click.IntRange(min=0, max=51)
)
# How it is computed.
@click.option("--batch", help="Seeds computed at once", default=4, show_default=True, type=click.IntRange(min=1))
@click.option("--device", help="[default: cuda if there is a GPU]", type=click.Choice(["cpu", "cuda", "mps"]))
@click.option(
    "--precision",
    help="fp32 is exact; tf32 (CUDA), fp16 (CUDA, super-resolution) and bf16 are faster where there is hardware",
    default="fp32",
    show_default=True,
    type=click.Choice(PRECISIONS),
)
@click.option(
    "--compile",
    "compiles",
    help="Compile the networks first: takes a minute or more, for long videos on a GPU",
    is_flag=True,
)
@click.option("--trust", help="Run the code that came with the networks: only for files of your own", is_flag=True)
def main(
    outdir: Path,
    seed: int | None,
    seeds: list[int] | None,
    lres_path: str | None,
    sres_path: str | None,
    lres_video: Path | None,
    length: int | float | None,
    start: int,
    truncation: float,
    temporal_scale: float,
    blend: tuple[tuple[int, int], ...],
    loop: int | None,
    rng: str,
    save_lres: bool,
    save_index: tuple[int, ...],
    grid: tuple[int, int] | None,
    fps: float | None,
    file_format: str,
    crf: int | None,
    batch: int,
    device: str | None,
    precision: str,
    compiles: bool,
    trust: bool,
) -> None:
    """See the module's docstring."""
    if (seed is None) == (seeds is None):
        raise click.UsageError("which video? Give --seed=0, or several as --seeds=0-15 (one of the two)")
    seeds = seeds or [seed or 0]
    if grid and grid[0] * grid[1] != len(seeds):
        raise click.BadParameter(
            f"{grid[0]}x{grid[1]} has {grid[0] * grid[1]} cells, but there are {len(seeds)} seeds; "
            f"use --seeds={seeds[0]}-{seeds[0] + grid[0] * grid[1] - 1}, or another grid",
            param_hint="--grid",
        )
    if crf is not None and file_format not in ("mp4", "webm"):
        raise click.BadParameter(f"--format={file_format} has no such quality; leave it out", param_hint="--crf")
    num_frames = _number_of_frames(length, loop, lres_video)
    _check_pictures(save_index, start, num_frames)
    if lres_path is None and sres_path is None and lres_video is None:
        lres_path, sres_path = default_pair() or (None, None)
        if lres_path:
            click.echo(f"Networks that come along: {lres_path}, {sres_path}", err=True)
    _check_networks(lres_path, sres_path, lres_video, start)
    device = check_device(device, precision)
    host_memory.keep_freed(device)
    _check_compile(compiles, device)
    try:
        sampling = Sampling(truncation, temporal_scale, blend, loop, rng)
        if lres_video and sampling != Sampling(truncation):
            raise ValueError(
                "--lres-video has frames of its own: leave out --temporal-scale, --blend, --loop and --rng"
            )
        source = _open(lres_path, sres_path, lres_video, device, precision, trust, sampling)
        plan = Plan(
            outdir,
            start=start,
            num_frames=num_frames,
            kinds=("lres",) * (save_lres or not sres_path) + ("sres",) * bool(sres_path),
            save_index=save_index,
            fps=fps or (frame_rate(lres_video) if lres_video else None) or Plan.fps,
            format=file_format,
            crf=Plan.crf if crf is None else crf,
            grid=grid,
            batch=batch,
            prefix=f"{lres_video.stem}_" if lres_video else "",
            depends_on_length=rng == "legacy",
        )
        with compilation.compiled(compiles):
            stopper = _make(source, seeds, plan)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        raise click.ClickException(_explain(error, outdir, batch)) from error
    networks = " ".join(f"--{name}={path}" for name, path in (("lres", lres_path), ("sres", sres_path)) if path)
    click.echo(f"Next: python calc_metrics.py --dataset=DATASET {networks} -m fvd2048_16f")
    if stopper.signal is not None and num_frames is not None:
        sys.exit(128 + stopper.signal)


def _number_of_frames(length: int | float | None, loop: int | None, lres_video: Path | None) -> int | None:
    """How many frames are asked for; None for as many as there are, or without end."""
    if length is not None:
        return None if length == float("inf") else int(length)
    return None if lres_video else loop or Plan.num_frames


def _check_pictures(save_index: Sequence[int], start: int, num_frames: int | None) -> None:
    end = float("inf") if num_frames is None else start + num_frames
    for index in save_index:
        if not start <= index < end:
            frames = f"frames {start} to {end - 1}" if num_frames else f"frames from {start} on"
            raise click.BadParameter(
                f"frame {index} was asked for, but the video has {frames}; use another index, --start or --len",
                param_hint="-i",
            )


def _check_networks(lres_path: str | None, sres_path: str | None, lres_video: Path | None, start: int) -> None:
    if lres_video is None:
        if lres_path is None:
            raise click.UsageError(
                "--lres is missing: the low-resolution network decides what happens in a video; give a path or URL, of "
                "a network that train_lres.py made or of a published one (docs/generation.md)"
            )
        return
    if lres_path is not None:
        raise click.UsageError("--lres-video stands in for a low-resolution network: leave out --lres")
    if sres_path is None:
        raise click.UsageError("--lres-video is there to be enlarged: give a super-resolution network, --sres")
    if start < 0:
        raise click.BadParameter("the frames of --lres-video begin with 0", param_hint="--start")


def check_device(device: str | None, precision: str) -> str:
    """The device asked for, or else the best there is; refused where it is missing or lacks the precision."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[device]:
        working = ", ".join(name for name, works in available.items() if works)
        raise click.BadParameter(f"PyTorch finds no {device} here; use {working}", param_hint="--device")
    reason = why_not(precision, device)
    if reason is not None:
        raise click.BadParameter(f"{precision} {reason}", param_hint="--precision")
    return device


def _check_compile(compiles: bool, device: str) -> None:
    reason = compilation.why_not(device) if compiles else None
    if reason is not None:
        raise click.BadParameter(f"nothing can be compiled here: {reason}, or leave it out", param_hint="--compile")


def _open(
    lres_path: str | None,
    sres_path: str | None,
    lres_video: Path | None,
    device: str,
    precision: str,
    trust: bool,
    sampling: Sampling,
) -> Videos:
    """The source of frames for what is given, in the precision asked for."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    source = open_source(lres_path, sres_path, device, trust, sampling)
    if isinstance(source, SuperResSource):
        assert lres_video is not None
        source = GivenVideo(lres_video, source)
    set_precision(networks_of(source), precision)
    return source


def networks_of(source: Videos) -> list[nn.Module]:
    """The networks that make the frames of a source."""
    if isinstance(source, LowResSource):
        return [source.network]
    return [source.sres.network] if isinstance(source, GivenVideo) else [source.lres.network, source.sres.network]


def _make(source: Videos, seeds: Sequence[int], plan: Plan) -> Stopper:
    """Make the videos and tell of them; returns what may have stopped it."""
    progress = Progress(plan.num_frames and plan.num_frames * len(seeds))
    films: list[Film] = []
    with Stopper() as stopper:
        for film in make_films(source, seeds, plan, stopper.guard, progress.update):
            films.append(film)
            for path in film.files:
                click.echo(_describe(path))
    if not films:
        raise ValueError("stopped before the first frame: nothing was written")
    progress.finish()
    length = films[-1].num_frames
    if stopper.signal is not None:
        num_left = len(seeds) - sum(len(film.seeds) for film in films)
        rest = f"; {num_left} seeds were not begun" if num_left else ""
        click.echo(f"Stopped after {length} frames{rest}.")
    elif plan.num_frames not in (None, length):
        click.echo(f"Only {length} frames were there to be enlarged.")
    missed = [index for index in plan.save_index if index >= plan.start + length]
    if missed:
        click.echo(f"Not reached: frame {', '.join(map(str, missed))} of -i.")
    return stopper


def _describe(path: Path) -> str:
    """A file or folder and how large it is."""
    sizes = [entry.stat().st_size for entry in (path.iterdir() if path.is_dir() else [path])]
    return f"{os.fspath(path)}  {sum(sizes) / 2**20:.2f} MiB"


def _explain(error: Exception, outdir: Path, batch: int) -> str:
    """One sentence about what went wrong."""
    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU has too little memory for --batch={batch}: use a smaller one, or --device=cpu"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot write {error.filename or f'to {outdir}'}: {error.strerror}"
    return str(error)


if __name__ == "__main__":
    main()
