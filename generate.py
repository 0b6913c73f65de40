"""Generate videos of any length from a trained model, straight to files.

# Five seconds of the included world model
python generate.py --outdir=outputs --seed=1

# A model of your own; repeat --model where a model is several files
python generate.py --outdir=outputs --seed=0 --len=64 --model=MODEL.pkl

# Sixteen videos side by side in one, which goes on until Ctrl-C
python generate.py --outdir=outputs --seeds=0-15 --grid=4x4 --len=inf --model=MODEL.pkl

# Continue, enlarge or reconstruct a video of your own, as the model does
python generate.py --outdir=outputs --seed=0 --context=clip.mp4 --model=MODEL.pkl

Models are paths or URLs of files, ours or published ones; opening them never runs code they carry. Frames go to the
encoder as they are made, so memory does not grow with the length. Frame t of a seed is the same for every --len
and --start. docs/generation.md has the details.
"""

from __future__ import annotations

from torch_utils import thread_cache

if __name__ == "__main__":
    thread_cache.restart_without()

import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from dnnlib import threads
from dnnlib.frames_out import SUFFIXES
from dnnlib.util import format_time
from training.command_line import (
    AUTO,
    DEVICES,
    PRECISIONS,
    Given,
    Parsed,
    as_help,
    check_device,
    model_options,
    parse_grid,
    parse_length,
    parse_seeds,
    take_model,
)

if TYPE_CHECKING:
    from training.sampling import Prompt, Sampler
    from training.video_files import VideoPlan

# ----------------------------------------------------------------------------
# While it runs.


class _Stopped(BaseException):
    """Raised where frames are computed; no error, so nothing on the way may take it for one."""


class Stopper:
    """End generation at Ctrl-C or SIGTERM, never in the middle of a frame that is being written.

    A context manager, for the main thread. A second signal is a KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.signal: int | None = None  # the one that came
        self._computing = False

    def __enter__(self) -> Stopper:
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
        """Yield the items until the signal comes: at once while one is computed, else after it."""
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
    """A line of progress on stderr, rewritten in a terminal and repeated every ten seconds elsewhere."""

    def __init__(self, total: int | None) -> None:
        self.total = total
        self.done = 0
        self.first_sec = 0.0
        self.begin = time.monotonic()
        self.shown = self.begin
        self.is_terminal = sys.stderr.isatty()

    def update(self, count: int) -> None:
        """Count more frames, of all videos together."""
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
        """Print the total."""
        total_sec = time.monotonic() - self.begin
        end = "\r\033[K" if self.is_terminal else ""
        click.echo(
            f"{end}{self.done} frames in {format_time(total_sec)}: {self.done / total_sec:.1f} frames/s, the first "
            f"after {self.first_sec:.1f} s",
            err=True,
        )


# ----------------------------------------------------------------------------
# The command.


@click.command(help=as_help(__doc__))
@click.option("--outdir", help="Where the files go", required=True, type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", help="Which video", type=int)
@click.option("--seeds", help="Several videos: 0-15 or 0,3,7", type=Parsed("LIST", parse_seeds))
@model_options("model", "context", "save", "option", default="an included one, without --context")
@click.option(
    "--context",
    help="Video that the model continues or transforms: a video, an npz file, a folder of pictures, "
    "a dataset, or DATASET:CLIP",
    metavar="PATH",
)
@click.option(
    "--actions",
    help="Actions of the context frames and of the frames to make: json, npy, npz or csv",
    metavar="FILE",
    type=click.Path(path_type=Path),
)
@click.option(
    "--audio",
    help="Sound that the video goes with, where the model hears: a sound file or a video",
    metavar="FILE",
    type=click.Path(path_type=Path),
)
@click.option("--label", help="Class of the video, where the model knows classes", type=int)
@click.option("--text", help="Description of the video, where the model takes one")
# Which frames.
@click.option(
    "--len",
    "length",
    help="Frames, or inf: until Ctrl-C  [default: 301, or all of what the context and the options allow]",
    type=Parsed("FRAMES|inf", parse_length),
)
@click.option("--start", help="First frame", default=0, show_default=True, type=int)
# Which files.
@click.option("--save-index", "-i", help="Also write frame N as PNG; repeatable", metavar="N", multiple=True, type=int)
@click.option("--grid", help="One video of all seeds, side by side", type=Parsed("ROWSxCOLUMNS", parse_grid))
@click.option("--fps", help="Frames a second  [default: the context's, the model's, 30]", type=click.FloatRange(min=1))
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
@click.option("--device", help="[default: cuda if there is a GPU]", type=click.Choice(DEVICES))
@click.option(
    "--precision",
    help="fp32 is exact; tf32, fp16 (CUDA) and bf16 are faster where there is hardware; auto: bf16 on a CPU where that "
    "is faster",
    default="fp32",
    show_default=True,
    type=click.Choice([AUTO, *PRECISIONS]),
)
@click.option(
    "--compile",
    "compiles",
    is_flag=True,
    help="Compile the networks first: takes a minute or more, for long videos on a GPU",
)
@click.option("--trust", help="Run the code that came with the model: only for files of your own", is_flag=True)
def main(seed: int | None, seeds: list[int] | None, **arguments: Any) -> None:
    """See the module's docstring."""
    given = take_model(arguments)
    if (seed is None) == (seeds is None):
        raise click.UsageError("which video? Give --seed=0, or several as --seeds=0-15 (one of the two)")
    seeds = seeds or [seed or 0]
    _check_files(seeds, **{name: arguments[name] for name in ("grid", "crf", "file_format")})
    _check_pictures(arguments["save_index"], arguments["start"], arguments["length"])
    _generate(given, seeds, **arguments)


def _generate(given: Given, seeds: list[int], **arguments: Any) -> None:
    """Open the model, write the videos, and print the command that comes next."""
    threads.share_cores()
    import torch

    from torch_utils import compilation, host_memory
    from training.network_file import DEFAULT_MODEL, ModelPath, list_models

    if not given.models and not given.contexts and not arguments["context"] and DEFAULT_MODEL in list_models():
        given.models, given.flags = [ModelPath(DEFAULT_MODEL)], [f"--model={DEFAULT_MODEL}"]
        click.echo(f"Included model: {DEFAULT_MODEL}", err=True)
    if not given.models:
        raise click.UsageError(
            "--model is missing: give the path or URL of a file that training made, or of a published one "
            "(docs/generation.md)"
        )
    device = check_device(arguments["device"], arguments["precision"])
    host_memory.keep_freed(device)
    reason = compilation.why_not(device) if arguments["compiles"] else None
    if reason is not None:
        raise click.BadParameter(f"nothing can be compiled here: {reason}, or leave it out", param_hint="--compile")
    try:
        sampler = _open(given, device, arguments["precision"], arguments["trust"])
        prompt = _prompt(sampler, given, seeds, **arguments)
        plan = _plan(sampler, prompt, given, **arguments)
        with contextlib.closing(prompt), compilation.compiled(arguments["compiles"]):
            stopper = _write(sampler, seeds, plan, prompt)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        raise click.ClickException(_explain(error, arguments["outdir"], arguments["batch"])) from error
    click.echo(f"Next: python calc_metrics.py --dataset=DATASET {shlex.join(given.flags)} -m fvd2048_16f")
    if stopper.signal is not None and plan.num_frames is not None:
        sys.exit(128 + stopper.signal)


def _check_files(seeds: Sequence[int], grid: tuple[int, int] | None, crf: int | None, file_format: str) -> None:
    if grid and grid[0] * grid[1] != len(seeds):
        raise click.BadParameter(
            f"{grid[0]}x{grid[1]} has {grid[0] * grid[1]} cells, but there are {len(seeds)} seeds; "
            f"use --seeds={seeds[0]}-{seeds[0] + grid[0] * grid[1] - 1}, or another grid",
            param_hint="--grid",
        )
    if crf is not None and file_format not in ("mp4", "webm"):
        raise click.BadParameter(f"--format={file_format} has no such quality; leave it out", param_hint="--crf")


def _check_pictures(save_index: Sequence[int], start: int, num_frames: int | float | None) -> None:
    end = start + (float("inf") if num_frames is None else num_frames)
    for index in save_index:
        if not start <= index < end:
            frames = f"frames from {start} on" if end == float("inf") else f"frames {start} to {end - 1}"
            raise click.BadParameter(
                f"frame {index} was asked for, but the video has {frames}; use another index, --start or --len",
                param_hint="-i",
            )


def _open(given: Given, device: str, precision: str, trust: bool) -> Sampler:
    """Return the sampler of the model, in the precision asked for."""
    import torch

    from torch_utils.precision import fastest, set_precision
    from training.sampling import open_sampler

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    sampler = open_sampler(given.models, given.options, device, trust)
    chosen = set_precision(sampler.networks, precision)
    if precision == AUTO:
        click.echo(f"Precision: {chosen}", err=True)
    elif precision == "fp32" and fastest(sampler.networks) != "fp32":
        click.echo(
            "Faster here, with frames that differ by less than a grey level in the mean: --precision=auto", err=True
        )
    if sampler.costs:
        click.echo("  ".join(f"{name.replace('_', ' ')}: {value}" for name, value in sampler.costs.items()), err=True)
    return sampler


def _prompt(sampler: Sampler, given: Given, seeds: Sequence[int], **arguments: Any) -> Prompt:
    """Return what is given to the sampler."""
    from training.data.given_prompt import begin_with, make_prompt, starts_beside

    contexts = [*given.contexts, *([arguments["context"]] if arguments["context"] else [])]
    if len(contexts) > 1:
        raise ValueError(f"{' and '.join(contexts)} are two contexts: give one")
    length = arguments["length"]
    streams = {name: arguments[name] for name in ("actions", "audio") if arguments[name]}
    num_frames = None if length in (None, float("inf")) else arguments["start"] + length

    def prompt(context: str | None) -> Prompt:
        return make_prompt(
            sampler, context, streams, arguments["label"], arguments["text"], arguments["fps"], num_frames
        )

    def begin(context: str) -> Prompt:
        click.echo(f"Begins with {context}", err=True)
        return prompt(context)

    starts = starts_beside(given.models, sampler) if not contexts else None
    return prompt(contexts[0] if contexts else None) if starts is None else begin_with(starts, begin, seeds)


def _plan(sampler: Sampler, prompt: Prompt, given: Given, **arguments: Any) -> VideoPlan:
    """Return which frames become which files."""
    from training.video_files import DEFAULT_CRF, DEFAULT_FPS, DEFAULT_FRAMES, VideoPlan

    length, start, follows = arguments["length"], arguments["start"], sampler.needs.follows
    if start < 0 and (follows or not sampler.random_access):
        raise click.BadParameter("the frames of this model begin with 0", param_hint="--start")
    limit = None if prompt.limit is None else max(prompt.limit - start, 1)  # as far as its streams go
    num_frames = None if follows else sampler.default_frames or min(DEFAULT_FRAMES, limit or DEFAULT_FRAMES)
    if length is not None:
        num_frames = limit if length == float("inf") else int(length)
    elif num_frames is not None:
        _check_pictures(arguments["save_index"], start, num_frames)
    unknown = [name for name in given.saves if name not in sampler.outputs and name not in sampler.labels.values()]
    if unknown:
        raise ValueError(f"the model has no output {unknown[0]!r}: it makes {', '.join(sampler.outputs)}")
    context = arguments["context"] or (given.contexts or [""])[0]
    return VideoPlan(
        arguments["outdir"],
        start=start,
        num_frames=num_frames,
        outputs={name: label for name, label in sampler.labels.items() if name == "video" or name in given.saves},
        save_index=arguments["save_index"],
        fps=arguments["fps"] or prompt.fps or sampler.fps or DEFAULT_FPS,
        format=arguments["file_format"],
        crf=DEFAULT_CRF if arguments["crf"] is None else arguments["crf"],
        grid=arguments["grid"],
        batch=arguments["batch"],
        prefix=f"{_stem(context)}_" if context else "",
        depends_on_length=sampler.depends_on_length,
    )


def _stem(context: str) -> str:
    """Return what a context is called in names of files: its name, and that of the clip of a dataset."""
    if os.path.exists(context):
        return Path(context).stem
    root, _, clip = context.partition(":")
    return f"{Path(root).name}-{clip.replace('/', '-')}"


def _write(sampler: Sampler, seeds: Sequence[int], plan: VideoPlan, prompt: Prompt) -> Stopper:
    """Write the videos and print their names; returns what may have stopped it."""
    from torch_utils import host_memory
    from training.video_files import VideoFiles, write_videos

    memory = host_memory.Limit()

    def advance(count: int) -> None:
        progress.update(count)
        memory.check()

    progress = Progress(plan.num_frames and plan.num_frames * len(seeds))
    videos: list[VideoFiles] = []
    with Stopper() as stopper:
        for video in write_videos(sampler, seeds, plan, prompt, stopper.guard, advance):
            videos.append(video)
            for path in video.files:
                click.echo(_describe(path))
    if not videos:
        raise ValueError("stopped before the first frame: nothing was written")
    progress.finish()
    length = videos[-1].num_frames
    if stopper.signal is not None:
        num_left = len(seeds) - sum(len(video.seeds) for video in videos)
        rest = f"; {num_left} seeds were not begun" if num_left else ""
        click.echo(f"Stopped after {length} frames{rest}.")
    elif plan.num_frames not in (None, length):
        click.echo(f"The context ended: only {length} frames were made.")
    missed = [index for index in plan.save_index if index >= plan.start + length]
    if missed:
        click.echo(f"Not reached: frame {', '.join(map(str, missed))} of -i.")
    return stopper


def _describe(path: Path) -> str:
    """Return the name and the size of a file or folder."""
    sizes = [entry.stat().st_size for entry in (path.iterdir() if path.is_dir() else [path])]
    return f"{os.fspath(path)}  {sum(sizes) / 2**20:.2f} MiB"


def _explain(error: Exception, outdir: Path, batch: int) -> str:
    """Return one sentence about an error."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return f"the GPU has too little memory for --batch={batch}: use a smaller one, or --device=cpu"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot write {error.filename or f'to {outdir}'}: {error.strerror}"
    return str(error)


if __name__ == "__main__":
    main()
