"""Options of a training run: a dataclass, its plain nested dictionary, its identity, and its run directory.

The dictionary is what `--dry-run` prints, what `options.json` holds, and what every checkpoint carries.
"""

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# What may change when a run is continued: how long, on what, and how closely watched. All else is what the run is.
FREE_OPTIONS = (
    "outdir",
    "steps",
    "device",
    "workers",
    "tick_steps",
    "checkpoint_steps",
    "sample_steps",
    "metrics",
    "keep",
    "log",
    "resume",
)


@dataclasses.dataclass
class TrainOptions:
    """All that the training loop needs to know; `model` is handed to the system as it is.

    Intervals are counted in steps; 0 turns previews or checkpoints off except at the last step.
    """

    outdir: str
    dataset: str  # root of a dataset, made absolute
    system: str  # name in training.registry.SYSTEMS
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 100_000
    batch: int = 64  # clips in a step's batch over all ranks and all rounds of accumulation
    grad_accum: int = 1
    seed: int = 0
    x_flip: bool = True
    device: str = "cpu"
    tick_steps: int = 500
    checkpoint_steps: int = 5000
    sample_steps: int = 5000
    metrics: tuple[str, ...] = ()  # evaluated with each checkpoint; the first one decides which checkpoint is best
    keep: int = 3  # newest checkpoints kept besides the best
    workers: int = 2
    log: str = "none"  # none | wandb
    resume: str = "auto"  # auto | latest | never | a run directory

    def __post_init__(self):
        self.dataset = os.path.abspath(self.dataset)
        self.metrics = tuple(self.metrics)
        for name in ("batch", "grad_accum", "tick_steps", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"Option {name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("steps", "checkpoint_steps", "sample_steps", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"Option {name} is {getattr(self, name)}; it must not be negative.")

    @property
    def dataset_name(self) -> str:
        return Path(self.dataset).name

    def check_ranks(self, world_size: int) -> None:
        """Raise `ValueError` unless the batch divides into ranks and those into rounds of accumulation."""
        rounds = world_size * self.grad_accum
        if self.batch % rounds:
            below = self.batch // rounds * rounds
            nearest = " or ".join(str(batch) for batch in (below, below + rounds) if batch)
            raise ValueError(
                f"A batch of {self.batch} does not divide by {world_size} ranks x {self.grad_accum} rounds of "
                f"accumulation; use a batch of {nearest}."
            )


def check_keys(values: Iterable[str], allowed: Iterable[str], where: str) -> None:
    """Raise `ValueError` for the first of `values` that is not among `allowed`, with the closest that is."""
    allowed = list(allowed)
    for key in values:
        if key not in allowed:
            close = difflib.get_close_matches(key, allowed, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(allowed))}."
            raise ValueError(f"Unknown name {key!r} in {where}; {hint}")


def merge(base: Mapping[str, Any], changes: Mapping[str, Any], where: str = "the options") -> dict[str, Any]:
    """A copy of the nested dictionary `base` with `changes` in it; a key that `base` lacks is a `ValueError`."""
    check_keys(changes, base, where)
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(base[key], Mapping) and isinstance(value, Mapping)
        merged[key] = merge(base[key], value, f"{where}.{key}") if nested else value
    return merged


def resolve(cls: type[T], values: Mapping[str, Any], where: str = "the options") -> T:
    """Build the dataclass `cls` from a dictionary; an unknown key or one that is missing is a `ValueError`."""
    fields = [field for field in dataclasses.fields(cls) if field.init]  # pyright: ignore[reportArgumentType]
    check_keys(values, [field.name for field in fields], where)
    for field in fields:
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise ValueError(f"Option {field.name!r} is missing in {where}.")
    return cls(**values)


def to_dict(options: Any) -> dict[str, Any]:
    """The plain nested dictionary of a dataclass, as it reads back from JSON (tuples are lists)."""
    return json.loads(json.dumps(dataclasses.asdict(options)))


def identity(options: TrainOptions | Mapping[str, Any]) -> dict[str, Any]:
    """What makes a run the run it is: its options without `FREE_OPTIONS`. Equal identities may be resumed."""
    values = to_dict(options) if isinstance(options, TrainOptions) else dict(options)
    return {key: value for key, value in values.items() if key not in FREE_OPTIONS}


def differences(stored: Any, wanted: Any, name: str = "") -> list[str]:
    """One line for each leaf in which two nested dictionaries differ."""
    if isinstance(stored, Mapping) and isinstance(wanted, Mapping):
        lines = []
        for key in [*stored, *(key for key in wanted if key not in stored)]:
            path = f"{name}.{key}" if name else key
            lines += differences(stored.get(key, "(absent)"), wanted.get(key, "(absent)"), path)
        return lines
    return [] if stored == wanted else [f"{name}: {stored} in the run, {wanted} asked for"]


def list_runs(outdir: str | Path) -> list[Path]:
    """The run directories in `outdir`, which begin with a number, oldest first."""
    outdir = Path(outdir)
    runs = [path for path in outdir.iterdir() if path.is_dir() and path.name[:1].isdigit()] if outdir.is_dir() else []
    return sorted(runs, key=run_number)


def run_number(run_dir: Path) -> int:
    match = re.match(r"\d+", run_dir.name)
    assert match is not None, run_dir
    return int(match.group())


def new_run_dir(options: TrainOptions) -> Path:
    """The next `<outdir>/<5-digit id>-<dataset>-<batch>batch-<accum>accum[-<gamma>gamma]`, not made yet."""
    number = 1 + max((run_number(path) for path in list_runs(options.outdir)), default=-1)
    name = f"{number:05d}-{options.dataset_name}-{options.batch}batch-{options.grad_accum}accum"
    gamma = options.model.get("gamma")
    return Path(options.outdir) / (name if gamma is None else f"{name}-{float(gamma)}gamma")


def read_options(run_dir: Path) -> dict[str, Any]:
    """The stored options of a run; `ValueError` when the directory does not hold any."""
    try:
        return json.loads((run_dir / "options.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{run_dir} is no run directory: it holds no options.json.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{run_dir / 'options.json'} cannot be read: {error}.") from None


def find_run(options: TrainOptions) -> Path | None:
    """The run directory that `options.resume` asks to continue, None for a new one.

    `auto`: the newest with the same identity. `latest`: the newest. A path: that one. For the last two, options that
    differ from the stored ones are a `ValueError` that lists the differences.
    """
    if options.resume == "never":
        return None
    runs = list_runs(options.outdir)
    if options.resume == "auto":
        whole = [run for run in runs if (run / "options.json").is_file()]
        same = [run for run in whole if identity(read_options(run)) == identity(options)]
        return same[-1] if same else None
    if options.resume == "latest" and not runs:
        raise ValueError(f"There is no run to resume in {options.outdir}; use --resume=auto to begin one.")
    run_dir = runs[-1] if options.resume == "latest" else Path(options.resume)
    lines = differences(identity(read_options(run_dir)), identity(options))
    if lines:
        raise ValueError(
            f"{run_dir} was trained with other options:\n  " + "\n  ".join(lines) + "\n"
            "Repeat the options of the run to continue it, or use --resume=never to begin a new one."
        )
    return run_dir
