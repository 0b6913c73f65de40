"""Compare the speed of two checkouts: CPU time of the same commands, alternating on the same machine.

python -m benchmarks.compare --before=v0.1.0                         a commit, checked out temporarily
python -m benchmarks.compare --before=../longtake --only=help,startup

The user and system time of a process and its children is measured, so that other load on the machine has little
influence. To exclude the start-up of a command, it runs with a large and a small workload, and the difference counts.
"""

from __future__ import annotations

import contextlib
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

from benchmarks import harness
from dataset_tools.archive import ShardWriter
from dataset_tools.frames import encode_at_sizes

AT_LEAST = 0.97  # minimum speed relative to before, of everything but help
HELP_AT_LEAST = 1 / 0.8
CONFIDENCE = 0.9
SIZES = [(72, 128), (18, 32)]  # of the preset toy
CLIP_FRAMES, NUM_CLIPS = 96, 4

# Reads batches as training does, or windows of clips unless both checkouts provide batches.
LOADER = """
import sys
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
    assert sum(len(batch["video"]) for batch in stream.prefetch((n, spec) for n in range(count))) == 2 * count
else:
    for index in range(2 * count):
        assert dataset.read(index % len(dataset.clips), size, range(length)).shape == (length, *size, 3)
"""


@dataclass(frozen=True)
class Subject:
    """The subject of a comparison: `command` with `more`, minus that with `less`; the whole of it if `less` is None."""

    name: str
    what: str  # unit of the time
    command: tuple[str, ...]  # arguments of Python
    more: tuple[str, ...] = ()
    less: tuple[str, ...] | None = None
    at_least: float = AT_LEAST


@dataclass(frozen=True)
class Result:
    """CPU seconds of each round, and the speed relative to before."""

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


def make_dataset(root: Path) -> None:
    """Write clips of moving smooth colours, at the sizes of the preset toy."""
    (height, width), rng = SIZES[0], np.random.RandomState(0)
    with ShardWriter(root, SIZES, 0) as writer:
        for number in range(NUM_CLIPS):
            image = rng.randint(0, 256, (height // 8 + 1, width // 8 + 1, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
            with writer.clip(f"clip_{number}") as clip:
                for t in range(CLIP_FRAMES):
                    clip(encode_at_sizes(np.roll(image, (t, 2 * t), (0, 1))[:height, :width].copy(), SIZES))


def subjects(data: Path, outdir: Path, kind: str, quick: bool) -> list[Subject]:
    """Return all subjects of the comparison; `kind` is the interface of the loader."""
    networks = [f"--{stage}={harness.ROOT}/models/labdoom-tiny-{stage}.pkl" for stage in ("lres", "sres")]
    common = [f"--outdir={outdir}", "--device=cpu"]
    videos = ("generate.py", *common, *networks, "--seed=0", "--format=npz")
    lengths, steps, batches = ((4, 1), (1, 0), (2, 1)) if quick else ((80, 16), (6, 2), (120, 20))
    found = [Subject("generation", f"{lengths[0] - lengths[1]} frames of both stages", videos, *pair("--len", lengths))]
    for stage in ("lres", "sres"):
        rest = ("--preset=toy", "--resume=never", "--sample-steps=0", "--checkpoint-steps=0", "--workers=1")
        command = (f"train_{stage}.py", *common, f"--dataset={data}", *rest)
        found.append(Subject(f"train_{stage}", f"{steps[0] - steps[1]} steps", command, *pair("--steps", steps)))
    read = ("-c", LOADER, str(data), kind)
    more, less = ((str(count),) for count in batches)
    found.append(Subject("loader", f"{batches[0] - batches[1]} {kind}", read, more, less))
    found.append(Subject("startup", "generate.py --len=1", (*videos, "--len=1")))
    return [*found, Subject("help", "generate.py --help", ("generate.py", "--help"), at_least=HELP_AT_LEAST)]


NAMES = ("generation", "train_lres", "train_sres", "loader", "startup", "help")


def pair(option: str, values: Sequence[int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the arguments that set an option to its larger and its smaller value."""
    more, less = values
    return (f"{option}={more}",), (f"{option}={less}",)


# ----------------------------------------------------------------------------
# Measuring.


def run_child(checkout: Path, arguments: Sequence[str], threads: int) -> tuple[float, str]:
    """Run Python in a checkout; return the CPU seconds of it and its children, and its output."""
    variables = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(
            [sys.executable, *arguments], cwd=checkout, env=variables, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if child.returncode:
        raise click.ClickException(f"python {' '.join(arguments)} failed in {checkout}:\n{text}")
    return usage.ru_utime + usage.ru_stime, text


def measure(subject: Subject, checkout: Path, threads: int) -> float:
    """Return CPU seconds of a subject in a checkout."""
    seconds, _ = run_child(checkout, [*subject.command, *subject.more], threads)
    if subject.less is not None:
        seconds -= run_child(checkout, [*subject.command, *subject.less], threads)[0]
    return max(seconds, 1e-3)  # for toys the difference may be zero


def contest(subject: Subject, before: Path, now: Path, rounds: int, threads: int, warm_up: bool) -> Result:
    """Measure a subject in both checkouts in each round: before, now, now, before, ..."""
    result = Result(subject, [], [])
    sides = [(before, result.before), (now, result.now)]
    for checkout, _ in sides if warm_up else []:  # compiles modules and kernels, and fills the file system cache
        run_child(checkout, [*subject.command, *(subject.less if subject.less is not None else subject.more)], threads)
    for number in range(rounds):
        for checkout, seconds in sides if number % 2 == 0 else sides[::-1]:
            seconds.append(measure(subject, checkout, threads))
        click.echo(f"{subject.name}, round {number + 1} of {rounds}: {result.ratios[-1]:.3f} times as fast", err=True)
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
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is unknown; there are {', '.join(NAMES)}")
    return names


def tables_of(results: Sequence[Result]) -> list[harness.Table]:
    """Return the table of results, and the table of the ratios of each round."""
    summary = harness.Table(
        "CPU seconds, and how many times as fast now is as before",
        ["subject", "what", "before", "now", "times as fast", "from", "to", "wanted", "verdict"],
        note=f"Medians; from and to bound the median with {CONFIDENCE:.0%} confidence. Missed: even the upper bound "
        "is below what is wanted.",
    )
    rounds = range(1, 1 + len(results[0].ratios))
    ratios = harness.Table("Times as fast in each round", ["subject", *map(str, rounds)])
    for result in results:
        subject, medians = result.subject, [statistics.median(times) for times in (result.before, result.now)]
        figures = [statistics.median(result.ratios), *(median_interval(result.ratios) or (None, None))]
        summary.rows.append([subject.name, subject.what, *medians, *figures, subject.at_least, result.verdict()])
        ratios.rows.append([subject.name, *result.ratios])
    return [summary, ratios]


@click.command()
@click.option("--before", help="Checkout or commit to compare with", metavar="PATH|COMMIT", required=True)
@click.option("--only", help="What to compare, comma-separated", callback=parse_only, default=",".join(NAMES),
              show_default=True)  # fmt: skip
@harness.options(rounds=7, threads=1, device=False)
def main(before: str, only: list[str], rounds: int, threads: int, quick: bool, json_path: Path | None) -> None:
    """Print the speed of this checkout relative to another one."""
    rounds = 1 if quick else rounds
    report = harness.begin("compare", threads=threads, before=before, rounds=rounds, only=only)
    with checkout_of(before) as old, tempfile.TemporaryDirectory() as folder:
        data, outdir = Path(folder, "data"), Path(folder, "out")
        make_dataset(data)
        report.options["commits"] = [commit_of(old), commit_of(harness.ROOT)]
        click.echo(f"before: {report.options['commits'][0]}, now: {report.options['commits'][1]}")
        kind = "windows"
        if "loader" in only:
            kinds = [
                run_child(side, ["-c", LOADER, str(data), "kinds", "0"], threads)[1] for side in (old, harness.ROOT)
            ]
            kind = "batches" if all("batches" in text.split() for text in kinds) else "windows"
        chosen = [subject for subject in subjects(data, outdir, kind, quick) if subject.name in only]
        results = [contest(subject, old, harness.ROOT, rounds, threads, not quick) for subject in chosen]
    for table in tables_of(results):
        report.add(table)
    report.finish(json_path)


if __name__ == "__main__":
    main()
