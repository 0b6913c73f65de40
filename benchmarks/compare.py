"""Compare the speed of two checkouts: CPU time of the same commands, alternating on the same machine.

python -m benchmarks.compare --before=v0.1.0                         a commit, checked out temporarily
python -m benchmarks.compare --before=../longtake --only=help,startup
python -m benchmarks.compare --before=v0.1.0 --only=published_lres,published_sres --precision=bf16

CPU time is measured, so that other load on the machine has little influence. Generation, training and loading run in
both checkouts at once, but in turns, one unit of work at a time, and the times of each unit are compared: the speed of
a shared machine changes from one minute to the next. Of start-up, the whole process with its children is measured.
Subjects of published size, of one clip a step, take minutes and are measured only if they are named.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from PIL import Image

from benchmarks import harness
from benchmarks import subjects as networks
from dataset_tools.archive import ShardWriter
from dataset_tools.frames import encode_at_sizes
from dnnlib.video import VideoWriter
from torch_utils.precision import PRECISIONS
from training.longvideogan.sampling import LRES_CHUNK
from training.network_file import save_network

AT_LEAST = 0.97  # minimum speed relative to before, of everything but help
HELP_AT_LEAST = 1 / 0.8
CONFIDENCE = 0.9
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
SIZES = [(72, 128), (18, 32)]  # of the preset toy
PUBLISHED_SIZES = [(144, 256), (36, 64)]
CLIP_FRAMES, PUBLISHED_FRAMES = 96, 160
NUM_CLIPS = 4
VIDEO_SIZE, VIDEO_FRAMES = (720, 1280), 150
WARM_UP_UNITS = 2  # which compile modules and kernels
# Functions whose calls begin a unit, the same work in every version: 32 frames, and a step.
CHUNK, STEP = "training.longvideogan.streaming:LowResStream.advance", "training.loop:take"
PACER = str(Path(__file__).with_name("pacer.py"))

# Reads batches as training does, or windows of clips unless both checkouts provide batches.
LOADER = """
import builtins, sys
from training.dataset import ClipDataset
root, kind, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
try:
    from training.dataset import BatchSpec, BatchStream, ClipPart
    kinds = ["windows", "batches"]
except ImportError:
    kinds = ["windows"]
size, length = (72, 128), 32
dataset = ClipDataset(root, [size])
if kind == "kinds":
    print(*kinds)
elif kind == "batches":
    spec = BatchSpec(length, (ClipPart("video", *size, 0, length),))
    stream = BatchStream(dataset, seed=0, batch_size=2, num_workers=1)
    for number, batch in enumerate(stream.prefetch((n, spec) for n in range(count))):
        if number % 10 == 0:  # threads read some batches ahead, in units that have to be longer than that
            builtins.pace()
        assert batch["video"].shape[0] == 2
else:
    for index in range(2 * count):
        if index % 20 == 0:
            builtins.pace()
        assert dataset.read(index % len(dataset.clips), size, range(length)).shape == (length, *size, 3)
"""


@dataclass(frozen=True)
class Subject:
    """The subject of a comparison: a command, as a whole, or the units of work that calls of `paced` begin."""

    name: str
    what: str  # unit of the time
    command: tuple[str, ...]  # arguments of Python
    paced: str = ""  # MODULE:FUNCTION
    at_least: float = AT_LEAST
    now_only: tuple[str, ...] = ()  # more arguments in this checkout
    units: int | None = None  # after which the command is stopped; None: when it ends

    def arguments(self, checkout: Path) -> tuple[str, ...]:
        """Return the arguments of Python in a checkout."""
        return (*self.command, *self.now_only) if checkout == harness.ROOT else self.command


@dataclass(frozen=True)
class Result:
    """CPU seconds of each round or unit of work, and the speed relative to before."""

    subject: Subject
    before: list[float]
    now: list[float]

    @property
    def ratios(self) -> list[float]:
        return [before / now for before, now in zip(self.before, self.now, strict=True)]

    def verdict(self) -> str:
        """Return whether even the upper bound of the interval is below the required speed."""
        interval = median_interval(self.ratios)
        if interval is None:
            return "too few rounds"
        return "missed" if interval[1] < self.subject.at_least else "not missed"


def make_dataset(root: Path, sizes: Sequence[tuple[int, int]], num_frames: int) -> None:
    """Write clips of moving smooth colours."""
    (height, width), rng = sizes[0], np.random.RandomState(0)
    with ShardWriter(root, sizes, 0) as writer:
        for number in range(NUM_CLIPS):
            image = rng.randint(0, 256, (height // 8 + 1, width // 8 + 1, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
            with writer.clip(f"clip_{number}") as clip:
                for t in range(num_frames):
                    clip(encode_at_sizes(np.roll(image, (t, 2 * t), (0, 1))[:height, :width].copy(), sizes))


def make_video(path: Path, num_frames: int) -> None:
    """Write a 720p video of moving smooth colours with grain."""
    rng, (height, width) = np.random.RandomState(0), VIDEO_SIZE
    path.parent.mkdir()
    colours = Image.fromarray(rng.randint(0, 256, (9, 16, 3)).astype(np.uint8)).resize((width, height))
    grain = [rng.randint(0, 9, (height, width, 3)).astype(np.uint8) for _ in range(4)]
    with VideoWriter(path, height, width) as writer:
        for t in range(num_frames):
            frame = np.roll(np.asarray(colours) // 8 * 7, (t, 2 * t), (0, 1)) + grain[t % len(grain)]
            writer.write(frame[None])


def training(stage: str, steps: int, data: Path, common: Sequence[str], *options: str) -> tuple[str, ...]:
    """Return the command that trains a stage without previews and checkpoints."""
    rest = (f"--steps={steps}", "--resume=never", "--sample-steps=0", "--checkpoint-steps=0", "--workers=1")
    return (f"train_{stage}.py", *common, f"--dataset={data}", *options, *rest)


def subjects(data: Path, outdir: Path, kind: str, quick: bool) -> list[Subject]:
    """Return all subjects of the comparison; `kind` is the interface of the loader."""
    networks = [f"--{stage}={harness.ROOT}/models/labdoom-tiny-{stage}.pkl" for stage in ("lres", "sres")]
    common = [f"--outdir={outdir}", "--device=cpu"]
    videos = ("generate.py", *common, *networks, "--seed=0", "--format=npz")
    length, steps, batches = (16, 2, 30) if quick else (512, 34, 400)
    found = [Subject("generation", "32 frames of both stages", (*videos, f"--len={length}"), CHUNK)]
    for stage in ("lres", "sres"):
        command = training(stage, steps, data, common, "--preset=toy")
        found.append(Subject(f"train_{stage}", "a step", command, STEP))
    found.append(
        Subject("loader", f"20 clips in {kind}", ("-c", LOADER, str(data), kind, str(batches)), "builtins:pace")
    )
    maker = ("-m", "dataset_tools.make_dataset_from_videos", str(data.with_name("videos")), str(outdir / "made"))
    sizes = "--sizes=36x64,144x256"
    found.append(Subject("dataset", "720p to 36x64 and 144x256", (*maker, sizes, "--workers=1")))
    found.append(Subject("startup", "generate.py --len=1", (*videos, "--len=1")))
    return [*found, Subject("help", "generate.py --help", ("generate.py", "--help"), at_least=HELP_AT_LEAST)]


def published_subjects(data: Path, outdir: Path, rounds: int, precision: str) -> list[Subject]:
    """Return the subjects of published size; `precision` is that of this checkout."""
    network, common = data.with_suffix(".pkl"), [f"--outdir={outdir}", "--device=cpu", "--precision=fp32"]
    save_network(networks.make_generator(networks.LRES, "default"), network)
    # Of options that are given twice the last counts.
    units, changed = WARM_UP_UNITS + rounds + 1, (f"--precision={precision}",)
    video = ("generate.py", *common, f"--lres={network}", "--seed=0", "--format=npz", f"--len={units * LRES_CHUNK}")
    # What a run does after its last step, such as a preview, would take longer than all of them.
    kind = functools.partial(Subject, now_only=changed, units=units - 1)
    found = [kind("published_video", "32 frames of low resolution", video, CHUNK)]
    for stage in ("lres", "sres"):
        command = training(stage, units, data, common, "--batch=1", "--grad-accum=1")
        found.append(kind(f"published_{stage}", "a step", command, STEP))
    return found


NAMES = ("generation", "train_lres", "train_sres", "loader", "dataset", "startup", "help")
PUBLISHED = ("published_video", "published_lres", "published_sres")


# ----------------------------------------------------------------------------
# Measuring.


def environment(checkout: Path, threads: int) -> dict[str, str]:
    """Return the environment variables of a command that runs in a checkout."""
    return {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}


def run_child(checkout: Path, arguments: Sequence[str], threads: int) -> tuple[float, str]:
    """Run Python in a checkout; return the CPU seconds of it and its children, and its output."""
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=checkout,
            env=environment(checkout, threads),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if child.returncode:
        raise click.ClickException(f"python {' '.join(arguments)} failed in {checkout}:\n{text}")
    return usage.ru_utime + usage.ru_stime, text


class Paced:
    """A command that runs one unit of work at a time; a context manager."""

    def __init__(self, subject: Subject, checkout: Path, threads: int) -> None:
        self.name = f"{subject.name} in {checkout}"
        ours, theirs = os.pipe(), os.pipe()
        self._output = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, PACER, str(ours[0]), str(theirs[1]), subject.paced, *subject.arguments(checkout)],
            cwd=checkout,
            env=environment(checkout, threads),
            pass_fds=[ours[0], theirs[1]],
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        os.close(ours[0])
        os.close(theirs[1])
        self._permissions, self._reports = ours[1], os.fdopen(theirs[0])
        self._seconds = self._next()

    def __enter__(self) -> Paced:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._permissions)
        self._reports.close()
        self._output.close()

    def unit(self) -> float | None:
        """Do a unit of work and return its CPU seconds; None if the command has ended instead."""
        os.write(self._permissions, b"\n")
        before, self._seconds = self._seconds, self._next()
        return None if self._seconds is None or before is None else self._seconds - before

    def _next(self) -> float | None:
        if line := self._reports.readline():
            return float(line)
        if self._process.wait():
            self._output.seek(0)
            raise click.ClickException(f"{self.name} failed:\n{self._output.read()}")
        return None


def contest(subject: Subject, before: Path, now: Path, rounds: int, threads: int, warm_up: bool) -> Result:
    """Measure a subject in both checkouts in each round: before, now, now, before, ..."""
    result = Result(subject, [], [])
    sides = [(before, result.before), (now, result.now)]
    for checkout, _ in sides if warm_up else []:  # compiles modules and kernels, and fills the file system cache
        run_child(checkout, subject.arguments(checkout), threads)
    for number in range(rounds):
        for checkout, seconds in sides if number % 2 == 0 else sides[::-1]:
            seconds.append(run_child(checkout, subject.arguments(checkout), threads)[0])
        click.echo(f"{subject.name}, round {number + 1} of {rounds}: {result.ratios[-1]:.3f} times as fast", err=True)
    return result


def contest_in_units(subject: Subject, before: Path, now: Path, threads: int, warm_up: bool) -> Result:
    """Measure each unit of work of a subject in both checkouts in turns: before, now, now, before, ..."""
    result = Result(subject, [], [])
    with Paced(subject, before, threads) as old, Paced(subject, now, threads) as new:
        sides = [(old, result.before), (new, result.now)]
        for number in itertools.count() if subject.units is None else range(subject.units):
            taken = [(side.unit(), seconds) for side, seconds in (sides if number % 2 == 0 else sides[::-1])]
            if any(time is None for time, _ in taken):
                break
            for time, seconds in taken if number >= WARM_UP_UNITS * warm_up else []:
                assert time is not None
                seconds.append(max(time, 1e-6))
    click.echo(f"{subject.name}: {len(result.now)} units", err=True)
    return result


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Return the shortest interval between order statistics that contains the median with this confidence.

    None if there are too few values: fewer than five at 90 %.
    """
    values, outside = sorted(values), 0.0
    interval = None
    for skipped in range(len(values) // 2):
        outside += 2 * math.comb(len(values), skipped) / 2 ** len(values)
        if 1 - outside < confidence:
            break
        interval = values[skipped], values[-1 - skipped]
    return interval


# ----------------------------------------------------------------------------
# Checkouts, options and tables.


@contextlib.contextmanager
def checkout_of(place: str, repository: Path = harness.ROOT) -> Iterator[Path]:
    """Yield the folder that `place` names, or a temporary worktree of the commit that it names."""
    if Path(place, "generate.py").is_file():
        yield Path(place).resolve()
        return
    git = ["git", "-C", str(repository)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder).resolve() / "before"
        added = subprocess.run([*git, "worktree", "add", "--detach", str(path), place], capture_output=True, text=True)
        if added.returncode:
            raise click.ClickException(f"{place} is neither a checkout nor a commit: {added.stderr.strip()}")
        try:
            yield path
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(path)], check=True, capture_output=True)


def commit_of(checkout: Path) -> str:
    """Return the short name of the checked-out commit, or the folder's name if it is unknown."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else str(checkout)


def parse_only(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    """Parse the comma-separated names of subjects."""
    names = [name.strip() for name in value.split(",")]
    unknown = [name for name in names if name not in (*NAMES, *PUBLISHED)]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is unknown; there are {', '.join((*NAMES, *PUBLISHED))}")
    return names


def tables_of(results: Sequence[Result]) -> list[harness.Table]:
    """Return the table of results, and the table of the ratios of each round."""
    summary = harness.Table(
        "CPU seconds, and how many times as fast now is as before",
        ["subject", "what", "before", "now", "times as fast", "from", "to", "wanted", "verdict"],
        note=f"Medians; from and to bound the median with {CONFIDENCE:.0%} confidence. Missed: even the upper bound "
        "is below what is wanted.",
    )
    ratios = harness.Table("Times as fast: the spread", ["subject", "count", *(f"{share:.0%}" for share in QUANTILES)])
    for result in results:
        subject, medians = result.subject, [statistics.median(times) for times in (result.before, result.now)]
        figures = [statistics.median(result.ratios), *(median_interval(result.ratios) or (None, None))]
        summary.rows.append([subject.name, subject.what, *medians, *figures, subject.at_least, result.verdict()])
        ratios.rows.append([subject.name, len(result.ratios), *np.quantile(result.ratios, QUANTILES).tolist()])
    return [summary, ratios]


@click.command()
@click.option("--before", help="Checkout or commit to compare with", metavar="PATH|COMMIT", required=True)
@click.option("--only", help="What to compare, comma-separated", callback=parse_only, default=",".join(NAMES),
              show_default=True)  # fmt: skip
@click.option("--precision", help="Of this checkout and subjects of published size; the other computes in fp32",
              type=click.Choice(list(PRECISIONS)), default="fp32", show_default=True)  # fmt: skip
@harness.options(rounds=7, threads=1, device=False)
def main(
    before: str, only: list[str], precision: str, rounds: int, threads: int, quick: bool, json_path: Path | None
) -> None:  # fmt: skip
    """Print the speed of this checkout relative to another one."""
    rounds = 1 if quick else rounds
    report = harness.begin("compare", threads=threads, before=before, rounds=rounds, only=only, precision=precision)
    with checkout_of(before) as old, tempfile.TemporaryDirectory() as folder:
        data, outdir = Path(folder, "data"), Path(folder, "out")
        make_dataset(data, SIZES, CLIP_FRAMES)
        report.options["commits"] = [commit_of(old), commit_of(harness.ROOT)]
        click.echo(f"before: {report.options['commits'][0]}, now: {report.options['commits'][1]}")
        kind = "windows"
        if "loader" in only:
            kinds = [
                run_child(side, ["-c", LOADER, str(data), "kinds", "0"], threads)[1] for side in (old, harness.ROOT)
            ]
            kind = "batches" if all("batches" in text.split() for text in kinds) else "windows"
        if "dataset" in only:
            make_video(data.with_name("videos") / "a.mp4", 2 if quick else VIDEO_FRAMES)
        found = subjects(data, outdir, kind, quick)
        if not set(only).isdisjoint(PUBLISHED):
            data = Path(folder, "published")
            make_dataset(data, PUBLISHED_SIZES, PUBLISHED_FRAMES)
            found += published_subjects(data, outdir, rounds, precision)
        chosen = [subject for subject in found if subject.name in only]
        results = [
            contest_in_units(subject, old, harness.ROOT, threads, not quick)
            if subject.paced
            else contest(subject, old, harness.ROOT, rounds, threads, not quick)
            for subject in chosen
        ]
    for table in tables_of(results):
        report.add(table)
    report.finish(json_path)


if __name__ == "__main__":
    main()
