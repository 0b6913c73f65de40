"""Options of a training run: a dataclass, its plain nested dictionary, its identity, its run directory, its system.

The dictionary is what `--dry-run` prints, what `options.json` holds, and what every checkpoint carries.
"""

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from training import registry
from training.network_file import locate

if TYPE_CHECKING:
    import torch

    from training.contract import System

T = TypeVar("T")

# Options that may change when a run is continued. All others are its identity.
FREE_OPTIONS = (
    "outdir",
    "steps",
    "device",
    "precision",
    "compile",
    "workers",
    "cache",
    "tick_steps",
    "checkpoint_steps",
    "checkpoint_minutes",
    "sample_steps",
    "metric_steps",
    "metrics",
    "keep",
    "log",
    "resume",
    "override",
    "origin",
    "val_dataset",
)

# Options of the run that files of earlier versions repeat among those of the system.
SHARED_OPTIONS = ("batch", "grad_accum", "seed")


@dataclasses.dataclass
class TrainOptions:
    """All options of the training loop; `model` holds those of the system, as its `Options` names them.

    Intervals are counted in steps; 0 means only at the last step. A checkpoint is written
    after `checkpoint_steps` or `checkpoint_minutes`, whichever is first, and wherever metrics are due.
    """

    outdir: str
    dataset: str  # root of a dataset, made absolute
    system: str  # name in training.registry.SYSTEMS
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 100_000
    batch: int = 64  # clips in a step's batch over all ranks and all rounds of accumulation
    grad_accum: int = 1
    seed: int = 0
    x_flip: bool | None = None  # mirror half of the clips; None: where the system allows it
    weighting: str = "clip"  # what a draw of data is uniform over: clip | frame (training.data.dataset.BatchStream)
    init_from: str | None = None  # network or training state whose weights a new run begins with
    device: str = "cpu"
    precision: str | None = None  # of a step's arithmetic, one that the system has; None: its own choice
    compile: bool = False  # compile parts of the networks, where the system can
    tick_steps: int = 500
    checkpoint_steps: int = 500
    checkpoint_minutes: float = 10.0
    sample_steps: int = 5000
    metric_steps: int = 5000
    metrics: tuple[str, ...] = ()  # the first one decides which checkpoint is best
    keep: int = 3  # newest checkpoints kept besides the best
    workers: int = 2
    cache: str = "none"  # where decoded frames are kept (training.data.dataset.ClipDataset)
    val_dataset: str | None = None  # held-out clips, on which the system's losses are measured at metric steps
    log: tuple[str, ...] = ()  # listeners besides the files: wandb, tensorboard
    resume: str = "auto"  # auto | latest | never | a run directory | one training state, to branch from it
    override: bool = False  # continue a run although options differ from its own
    origin: str | None = None  # the training state that this run was branched from; set by the loop
    frozen: dict[str, str] = dataclasses.field(default_factory=dict)  # SHA-256 of networks used, not trained; likewise

    def __post_init__(self):
        self.dataset = os.path.abspath(self.dataset)
        if self.init_from is not None and "://" not in self.init_from:
            self.init_from = os.path.abspath(locate(self.init_from))
        if self.val_dataset is not None:
            self.val_dataset = os.path.abspath(self.val_dataset)
        for name in SHARED_OPTIONS:  # as files of earlier versions have them
            if self.model.get(name, getattr(self, name)) != getattr(self, name):
                raise ValueError(
                    f"Option {name} is {getattr(self, name)} for the run but {self.model[name]} for the system; give "
                    "it once, for the run."
                )
        self.metrics = tuple(self.metrics)
        self.log = tuple(name for name in self.log if name != "none")
        for name in ("batch", "grad_accum", "tick_steps", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"Option {name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("steps", "checkpoint_steps", "checkpoint_minutes", "sample_steps", "metric_steps", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"Option {name} is {getattr(self, name)}; it must not be negative.")
        if self.override and self.resume in ("auto", "never"):
            raise ValueError(
                f"Options are overridden in a run that is named, not with --resume={self.resume}; add --resume=latest "
                "or --resume=<run directory>."
            )

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
    """Return the identity of a run: its options without `FREE_OPTIONS`. Runs of equal identity may be resumed.

    An option that a run does not mention, because it was begun before there was such an option, is at its default.
    """
    values = to_dict(options) if isinstance(options, TrainOptions) else defaults(TrainOptions) | dict(options)
    if values.get("system") in registry.SYSTEMS:
        cls = system_class(values["system"])
        values["model"] = defaults(cls.Options) | own_options(cls.Options, values["model"])
        values["x_flip"] = cls.flips if values["x_flip"] is None else values["x_flip"]
    return {key: value for key, value in values.items() if key not in FREE_OPTIONS}


def own_options(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of a system without those of the run that files of earlier versions repeat among them."""
    fields = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if name in fields or name not in SHARED_OPTIONS}


def system_class(system: "str | type[System]") -> "type[System]":
    """Return the class of a system, given by its registered name or itself; `ValueError` for an unknown name."""
    if not isinstance(system, str):
        return system
    check_keys([system], registry.SYSTEMS, "the registry of systems")
    return registry.resolve(registry.spec(system).system)


def settle(options: TrainOptions, cls: "type[System]") -> TrainOptions:
    """Return the options with the system's own choices filled in, after refusing what it cannot do: `ValueError`."""
    if options.precision is not None and options.precision not in cls.precisions:
        raise ValueError(
            f"precision {options.precision} was asked for, but {options.system} trains in {', '.join(cls.precisions)}; "
            "use one of these, or leave out --precision"
        )
    if options.compile and not cls.compiles:
        raise ValueError(f"{options.system} cannot be compiled; leave out --compile")
    if options.x_flip and not cls.flips:
        raise ValueError(f"{options.system} does not allow mirrored clips; use --x-flip=false")
    if options.val_dataset is not None and not cls.has_validation():
        raise ValueError(f"{options.system} has no held-out losses; leave out --val-dataset")
    return dataclasses.replace(options, x_flip=cls.flips if options.x_flip is None else options.x_flip)


def make_system(system: "str | type[System]", options: TrainOptions, device: "torch.device | str") -> "System":
    """Build the system of a run on a device; `ValueError` for options that it lacks, or that do not go together."""
    import torch

    from training.contract import Run

    cls = system_class(system)
    own = resolve(cls.Options, own_options(cls.Options, options.model), f"the options of {options.system}")
    cls.check(own, options)
    shared = {name: getattr(options, name) for name in (*SHARED_OPTIONS, "precision", "compile", "steps")}
    return cls(own, Run(device=torch.device(device), **shared))


def defaults(cls: type) -> dict[str, Any]:
    """What the fields of a dataclass are where nothing is said, as it reads back from JSON."""
    values = {}
    for field in dataclasses.fields(cls):
        if field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            values[field.name] = field.default
    return json.loads(json.dumps(values))


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


def new_run_dir(options: TrainOptions, suffix: str = "") -> Path:
    """Return the next `<outdir>/<5-digit id>-<dataset>-<batch>batch-<accum>accum[-<suffix>]`, not made yet."""
    number = 1 + max((run_number(path) for path in list_runs(options.outdir)), default=-1)
    name = f"{number:05d}-{options.dataset_name}-{options.batch}batch-{options.grad_accum}accum"
    return Path(options.outdir) / (f"{name}-{suffix}" if suffix else name)


def read_options(run_dir: Path) -> dict[str, Any]:
    """The stored options of a run; `ValueError` when the directory does not hold any."""
    try:
        return json.loads((run_dir / "options.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{run_dir} is no run directory: it holds no options.json. --resume takes auto, latest, never, a run "
            "directory, or one of its checkpoints/ckpt-<step>-train.pt; a network alone begins a new run: --init-from."
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{run_dir / 'options.json'} cannot be read: {error}.") from None


@dataclasses.dataclass
class Beginning:
    """Where a run goes on: its directory (None: a new one is to be made), and in what it differs from what it was."""

    run_dir: Path | None = None
    origin: str | None = None  # the training state that the run branches or was branched from
    changes: list[str] = dataclasses.field(default_factory=list)


def find_run(options: TrainOptions) -> Beginning:
    """The run that `options.resume` asks to continue.

    `auto`: the newest with the same identity. `latest`: the newest. A directory: that one, also if it was given as
    `outdir`. A training state: the newest run of the same identity that was branched from it, else a new one that is to
    be. Except for `auto`, options that differ from the stored ones are a `ValueError` that lists the differences,
    unless `options.override`.
    """
    outdir = Path(options.outdir)
    is_state = options.resume.endswith(".pt")
    if (outdir / "options.json").is_file():
        if options.resume == "never" or is_state:
            raise ValueError(
                f"{outdir} is a run directory, in which no other run can begin; give the folder that holds it, "
                f"--outdir={outdir.parent}, or leave out --resume to continue that run."
            )
        if options.resume in ("auto", "latest"):
            options = dataclasses.replace(options, resume=options.outdir)
    if options.resume == "never":
        return Beginning()
    runs = [run for run in list_runs(outdir) if (run / "options.json").is_file()]
    origin = os.path.abspath(options.resume) if is_state else None
    if options.resume == "auto" or is_state:
        for run in reversed(runs):
            stored = read_options(run)
            if identity(stored) == identity(options) and stored.get("origin") == origin:
                return Beginning(run, origin)
        return Beginning(None, origin)
    if options.resume == "latest" and not runs:
        raise ValueError(f"There is no run to resume in {outdir}; use --resume=auto to begin one.")
    run_dir = runs[-1] if options.resume == "latest" else Path(options.resume)
    stored = read_options(run_dir)
    return Beginning(run_dir, stored.get("origin"), check_changes(stored, options, str(run_dir)))


def check_changes(stored: Mapping[str, Any], options: TrainOptions, where: str) -> list[str]:
    """What `options` change in the identity of a run; `ValueError` if that is anything and was not asked for."""
    lines = differences(identity(stored), identity(options))
    if lines and not options.override:
        raise ValueError(
            f"{where} was trained with other options:\n  " + "\n  ".join(lines) + "\n"
            "Repeat the options of the run to continue it, add --override to change them from here on, or use "
            "--resume=never to begin a new one."
        )
    return lines
