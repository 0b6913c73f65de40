"""The directories of runs: which one a command continues, its number and name, and the lock of the process in it."""

import contextlib
import dataclasses
import json
import os
import re
import socket
import time
from pathlib import Path
from typing import IO, Any

from dnnlib.locks import open_locked
from torch_utils.safe_pickle import one_line
from training import checkpoint
from training.config import TrainOptions, check_changes, identity
from training.side_files import read_object, warn_once

LOCK = ".lock"


def list_runs(outdir: str | Path) -> list[Path]:
    """Return the run directories in `outdir`, whose names begin with a number, oldest first."""
    outdir = Path(outdir)
    runs = [path for path in outdir.iterdir() if path.is_dir() and path.name[:1].isdigit()] if outdir.is_dir() else []
    return sorted(runs, key=run_number)


def run_number(run_dir: Path) -> int:
    match = re.match(r"\d+", run_dir.name)
    assert match is not None, run_dir
    return int(match.group())


def new_run_dir(options: TrainOptions, suffix: str = "") -> Path:
    """Return the next `<outdir>/<5-digit id>-<dataset>-<batch>batch-<accum>accum[-<suffix>]`, without creating it."""
    number = 1 + max((run_number(path) for path in list_runs(options.outdir)), default=-1)
    name = f"{number:05d}-{options.dataset_name}-{options.batch}batch-{options.grad_accum}accum"
    return Path(options.outdir) / (f"{name}-{suffix}" if suffix else name)


def is_run(run_dir: Path) -> bool:
    """Return whether a directory holds a run, also one whose options.json was lost."""
    return (run_dir / "options.json").is_file() or bool(checkpoint.list_checkpoints(run_dir))


def read_options(run_dir: Path) -> dict[str, Any]:
    """Return the options of a run: those of options.json, or of its newest state if that file is damaged.

    Raises `ValueError` if the directory holds neither.
    """
    stored, schema = read_object(run_dir / "options.json", warns=False), checkpoint.RUN_STATE["options"]
    if checkpoint.find_wrong(stored, schema, "content") is None:
        return stored
    for _, path, state in checkpoint.whole_checkpoints(run_dir):
        if checkpoint.find_wrong(state["options"], schema, "options") is None:
            warn_once(f"{run_dir / 'options.json'} is missing or damaged; the options of the run are those of {path}")
            return state["options"]
    if is_run(run_dir):
        raise ValueError(
            f"{run_dir / 'options.json'} cannot be read, and no whole checkpoint has the options of the run; begin a "
            "new one: --resume=never"
        )
    raise ValueError(
        f"{run_dir} is no run directory: it holds no options.json. --resume takes auto, latest, never, a run "
        "directory, or one of its checkpoints/ckpt-<step>-train.pt; a network alone begins a new run: --init-from."
    )


@dataclasses.dataclass
class Beginning:
    """The run to start from: its directory (None: create one) and the options that differ from the stored ones."""

    run_dir: Path | None = None
    origin: str | None = None  # training state that the run is branched from
    changes: list[str] = dataclasses.field(default_factory=list)


def find_run(options: TrainOptions) -> Beginning:
    """Return the run that `options.resume` selects.

    `auto`: the newest with the same identity. `latest`: the newest. A directory: that run, also if it was given as
    `outdir`. A training state: the newest run of the same identity that was branched from it, else a new one. Except
    for `auto`, raises `ValueError` with the list of differences if options differ from the stored ones, unless
    `options.override`.
    """
    outdir = Path(options.outdir)
    is_state = options.resume.endswith(".pt")
    if is_run(outdir):
        if options.resume == "never" or is_state:
            raise ValueError(
                f"{outdir} is a run directory, in which no other run can begin; give the folder that holds it, "
                f"--outdir={outdir.parent}, or leave out --resume to continue that run."
            )
        if options.resume in ("auto", "latest"):
            options = dataclasses.replace(options, resume=options.outdir)
    if options.resume == "never":
        return Beginning()
    runs = [run for run in list_runs(outdir) if is_run(run)]
    origin = os.path.abspath(options.resume) if is_state else None
    if options.resume == "auto" or is_state:
        for run in reversed(runs):
            try:
                stored = read_options(run)
            except ValueError as error:
                warn_once(f"{error}; this command takes another run")
                continue
            if identity(stored) == identity(options) and stored.get("origin") == origin:
                return Beginning(run, origin)
        return Beginning(None, origin)
    if options.resume == "latest" and not runs:
        raise ValueError(f"There is no run to resume in {outdir}; use --resume=auto to begin one.")
    run_dir = runs[-1] if options.resume == "latest" else Path(options.resume)
    stored = read_options(run_dir)
    return Beginning(run_dir, stored.get("origin"), check_changes(stored, options, str(run_dir)))


class RunLock:
    """The right to write into a run directory: of one process at a time, until the block or the process ends.

    A context manager. The operating system frees the lock of a process that is killed, also over NFS where the server
    has locks; on file systems without any, a warning is printed and nothing is refused.
    """

    def __init__(self) -> None:
        self._path = Path()
        self._file: IO[str] | None = None

    def take(self, run_dir: Path) -> str | None:
        """Take the lock of a run directory; return None, or a description of the other process that holds it."""
        path = run_dir / LOCK
        try:
            file = open_locked(path, "a+", _refuse)
        except BlockingIOError:
            return _describe(path)
        except OSError as error:
            if not os.access(run_dir, os.W_OK):
                raise
            warn_once(f"{run_dir} cannot be locked ({error.strerror}); let no other process train in it")
            return None
        self._path, self._file = path, file
        with contextlib.suppress(OSError):  # a full disk; the lock holds without the text
            file.truncate(0)
            when = time.strftime("%Y-%m-%d %H:%M:%S %z")
            file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": when}) + "\n")
            file.flush()
        return None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
            with contextlib.suppress(OSError):
                self._file.close()


def _refuse() -> None:
    raise BlockingIOError


def _describe(path: Path) -> str:
    """Return which process holds the lock at a path, as it has written there."""
    holder = read_object(path)
    names = ("process", "host", "since")
    if not all(name in holder for name in names):
        return "another process"
    return one_line("process {} on {} since {}".format(*(holder[name] for name in names)))
