"""Options of a training run: the dataclass, its dictionary form, and the identity of a run.

The dictionary is printed by `--dry-run` and stored in `options.json` and in every checkpoint.
"""

import dataclasses
import difflib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from training import registry

if TYPE_CHECKING:
    import torch

    from training.contract import System

T = TypeVar("T")

# Options that may change when a run is resumed. All others form the identity of the run.
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
    "wait",
    "override",
    "origin",
    "val_dataset",
)

# Options of the run that earlier versions also stored among those of the system.
SHARED_OPTIONS = ("batch", "grad_accum", "seed")


@dataclasses.dataclass
class TrainOptions:
    """All options of the training loop; `model` holds those of the system, the fields of its `Options`.

    Intervals are in steps; 0 means only at the last step. A checkpoint is written after `checkpoint_steps` or
    `checkpoint_minutes`, whichever comes first, and at every evaluation of metrics.
    """

    outdir: str
    dataset: str  # root of a dataset, made absolute
    system: str  # name in training.registry.SYSTEMS
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 100_000
    batch: int = 64  # global batch size: clips per step over all ranks and accumulation rounds
    grad_accum: int = 1
    seed: int = 0
    x_flip: bool | None = None  # mirror half of the clips; None: if the system allows it
    weighting: str = "clip"  # windows are uniform over clips or over frames (training.data.dataset.BatchStream)
    init_from: str | None = None  # network or training state that initialises the weights of a new run
    device: str = "cpu"
    precision: str | None = None  # one that the system supports; None: the system's default
    compile: bool = False  # compile parts of the networks, if the system supports it
    tick_steps: int = 500
    checkpoint_steps: int = 500
    checkpoint_minutes: float = 10.0
    sample_steps: int = 5000
    metric_steps: int = 5000
    metrics: tuple[str, ...] = ()  # the first one selects the best checkpoint
    keep: int = 3  # number of newest checkpoints to keep besides the best
    workers: int = 2
    cache: str = "none"  # storage of decoded frames (training.data.dataset.ClipDataset)
    val_dataset: str | None = None  # validation split, on which the system's losses are evaluated with the metrics
    log: tuple[str, ...] = ()  # the option --logger: loggers besides the files: wandb, tensorboard
    resume: str = "auto"  # auto | latest | never | a run directory | a training state to branch from
    wait: bool = False  # wait for another process that trains in the run, rather than to refuse
    override: bool = False  # resume a run although options differ from its own
    origin: str | None = None  # training state that this run was branched from; set by the loop
    frozen: dict[str, str] = dataclasses.field(default_factory=dict)  # SHA-256 of frozen networks; set by the loop

    def __post_init__(self):
        self.dataset = os.path.abspath(self.dataset)
        if self.init_from is not None and "://" not in self.init_from:
            from training.network_file import locate  # imports torch, which makes --help slow

            self.init_from = os.path.abspath(locate(self.init_from))
        if self.val_dataset is not None:
            self.val_dataset = os.path.abspath(self.val_dataset)
        for name in SHARED_OPTIONS:  # as stored by earlier versions
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

    def check_ranks(self, world_size: int, tensor_parallel: int = 1) -> None:
        """Raise `ValueError` unless ranks divide into groups, the batch into those, and their part into rounds."""
        num_readers, rest = divmod(world_size, tensor_parallel)
        if rest:
            below = num_readers * tensor_parallel
            nearest = " or ".join(str(ranks) for ranks in (below, below + tensor_parallel) if ranks)
            raise ValueError(
                f"{world_size} {'rank does' if world_size == 1 else 'ranks do'} not divide into tensor-parallel groups "
                f"of {tensor_parallel}; start {nearest} ranks with torchrun, or give another --tensor-parallel."
            )
        rounds = num_readers * self.grad_accum
        if self.batch % rounds:
            below = self.batch // rounds * rounds
            nearest = " or ".join(str(batch) for batch in (below, below + rounds) if batch)
            who = "ranks" if tensor_parallel == 1 else f"groups of {tensor_parallel} ranks"
            raise ValueError(
                f"A batch of {self.batch} does not divide by {num_readers} {who} x {self.grad_accum} rounds of "
                f"accumulation; use a batch of {nearest}."
            )


def check_keys(values: Iterable[str], allowed: Iterable[str], where: str) -> None:
    """Raise `ValueError` for the first of `values` that is not in `allowed`, naming the closest match."""
    allowed = list(allowed)
    for key in values:
        if key not in allowed:
            close = difflib.get_close_matches(key, allowed, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(allowed))}."
            raise ValueError(f"Unknown name {key!r} in {where}; {hint}")


def resolve(cls: type[T], values: Mapping[str, Any], where: str = "the options") -> T:
    """Build the dataclass `cls` from a dictionary; raise `ValueError` for an unknown or missing key."""
    fields = [field for field in dataclasses.fields(cls) if field.init]  # pyright: ignore[reportArgumentType]
    check_keys(values, [field.name for field in fields], where)
    for field in fields:
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise ValueError(f"Option {field.name!r} is missing in {where}.")
    return cls(**values)


def to_dict(options: Any) -> dict[str, Any]:
    """Return the nested dictionary of a dataclass, as it reads back from JSON (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(options)))


def identity(options: TrainOptions | Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity of a run: its options without `FREE_OPTIONS`. Runs of equal identity may be resumed.

    An option that is absent, because the run is older than the option, has its default value.
    """
    values = to_dict(options) if isinstance(options, TrainOptions) else defaults(TrainOptions) | dict(options)
    if values.get("system") in registry.SYSTEMS:
        cls = system_class(values["system"])
        model = defaults(cls.Options) | own_options(cls.Options, values["model"])
        values["model"] = {name: value for name, value in model.items() if name not in cls.free_options}
        values["x_flip"] = cls.flips if values["x_flip"] is None else values["x_flip"]
    return {key: value for key, value in values.items() if key not in FREE_OPTIONS}


def own_options(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a system without those of the run, which earlier versions stored there too."""
    fields = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if name in fields or name not in SHARED_OPTIONS}


def system_class(system: "str | type[System]") -> "type[System]":
    """Return the class of a system, given as a registered name or a class; raise `ValueError` for an unknown name."""
    if not isinstance(system, str):
        return system
    check_keys([system], registry.SYSTEMS, "the registry of systems")
    return registry.resolve(registry.spec(system).system)


def settle(options: TrainOptions, cls: "type[System]") -> TrainOptions:
    """Fill in the system's defaults; raise `ValueError` for options that the system does not support."""
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
    """Build the system of a run on a device; raise `ValueError` for unknown or inconsistent options."""
    import torch

    from training.contract import Run

    cls = system_class(system)
    own = options_of_system(cls, options)
    cls.check(own, options)
    shared = {name: getattr(options, name) for name in (*SHARED_OPTIONS, "precision", "compile", "steps")}
    return cls(own, Run(device=torch.device(device), tensor_parallel=cls.tensor_parallel(own), **shared))


def options_of_system(cls: "type[System]", options: TrainOptions) -> Any:
    """Return the system's own options of a run; raise `ValueError` for unknown ones."""
    return resolve(cls.Options, own_options(cls.Options, options.model), f"the options of {options.system}")


def defaults(cls: type) -> dict[str, Any]:
    """Return the default values of a dataclass, as they read back from JSON."""
    values = {}
    for field in dataclasses.fields(cls):
        if field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            values[field.name] = field.default
    return json.loads(json.dumps(values))


def differences(stored: Any, wanted: Any, name: str = "") -> list[str]:
    """Return one line for each leaf in which two nested dictionaries differ."""
    if isinstance(stored, Mapping) and isinstance(wanted, Mapping):
        lines = []
        for key in [*stored, *(key for key in wanted if key not in stored)]:
            path = f"{name}.{key}" if name else key
            lines += differences(stored.get(key, "(absent)"), wanted.get(key, "(absent)"), path)
        return lines
    return [] if stored == wanted else [f"{name}: {stored} in the run, {wanted} asked for"]


def check_changes(stored: Mapping[str, Any], options: TrainOptions, where: str) -> list[str]:
    """Return the differences between `options` and the identity of a run.

    Frozen networks are compared once their hashes are known. Raises `ValueError` if there are any differences, unless
    `options.override`.
    """
    stored = stored if options.frozen else {**stored, "frozen": {}}
    lines = differences(identity(stored), identity(options))
    if lines and not options.override:
        raise ValueError(
            f"{where} was trained with other options:\n  " + "\n  ".join(lines) + "\n"
            "Repeat the options of the run to continue it, add --override to change them from here on, or use "
            "--resume=never to begin a new one."
        )
    return lines
