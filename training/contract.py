"""What a system is to the rest of Longtake: the base class of systems, and the values that pass between them.

A system is one published method. It lives in a folder of its own under `training/`, with a `spec.py` that describes it
to `training.registry`. Training, previews, generation, metrics and the explorer know a system through this module and
`training.sampling` alone; docs/adding_a_system.md has the same contract with a worked example.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from torch_utils import distributed
from training.charts import ChartSpec
from training.random import random_state

if TYPE_CHECKING:
    from training.config import TrainOptions
    from training.sampling import Sampler

Size = tuple[int, int]  # height, width
Batch = dict[str, Tensor]

# ----------------------------------------------------------------------------
# What a system reads.


@dataclass(frozen=True)
class FrameClip:
    """Frames first, first + stride, ... (`count` of them) of a window at one size.

    The system gets them as float32 (N, 3, count, height, width) in [-1, 1].
    """

    name: str
    height: int
    width: int
    first: int
    count: int
    stride: int = 1


@dataclass(frozen=True)
class CodeClip:
    """Token grids first, first + stride, ... (`count` of them) of a window, counted in steps of the token grid.

    One step covers as many frames as the tokenizer's temporal stride. The system gets int64 (N, count, h, w).
    """

    name: str
    first: int
    count: int
    stride: int = 1


@dataclass(frozen=True)
class Stream:
    """Values of a stream beside the frames, such as "actions" or "poses": those of frames first, first + stride, ...

    The system gets int64 (N, count) for streams of ints and float32 (N, count, values) for streams of vectors.
    `actions[t]` leads into frame t. A "label" is the same for every frame of a clip.
    """

    name: str
    first: int
    count: int
    stride: int = 1


Part = FrameClip | CodeClip | Stream


@dataclass(frozen=True)
class BatchSpec:
    """A batch of windows of `num_frames` consecutive frames, of which only the named parts are read."""

    num_frames: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Inputs:
    """What a system reads from its dataset: frames of these sizes, codes of this tokenizer (SHA-256), these streams."""

    sizes: tuple[Size, ...] = ()
    codes: str | None = None
    streams: tuple[str, ...] = ()


# ----------------------------------------------------------------------------
# Options.


@dataclass(frozen=True)
class Flag:
    """A command-line option of a training script, and the fields of `Options` that it sets.

    Several names in `sets` make an option of several values; "generator.num_filters" sets an entry of a dictionary.
    `kind` is a Python type, a tuple of choices, or "size" for HxW; None takes it from the field's annotation.
    """

    help: str
    name: str | None = None  # with leading dashes; None: the field's name
    kind: Any = None
    sets: tuple[str, ...] = ()
    low: float | None = None  # smallest value
    above: float | None = None  # what it must exceed
    metavar: str | None = None


def option(default: Any, help: str, *more: Flag, factory: bool = False, **arguments: Any) -> Any:
    """Declare a field of an `Options` dataclass that the command line offers, described by `help`.

    `arguments` are those of `Flag`. `more` are further options that set entries of this field. With `factory` the
    default is called to make the value. An empty `help` offers no option for the field itself.
    """
    flags = (*([Flag(help, **arguments)] if help else []), *more)
    metadata = {"flags": flags}
    return field(default_factory=default, metadata=metadata) if factory else field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Run:
    """What the loop decides for every system, said once: none of this is repeated in a system's `Options`."""

    device: torch.device = torch.device("cpu")
    batch: int = 1  # clips in a step's global batch, over all ranks and rounds
    grad_accum: int = 1  # rounds of gradient accumulation
    seed: int = 0
    precision: str | None = None  # None: the system's own choice
    compile: bool = False
    steps: int = 0  # at which training ends, for learning-rate schedules

    @property
    def local_batch(self) -> int:
        """Return the number of clips of a global batch that this rank works on."""
        return self.batch // distributed.get_world_size()

    def rounds(self) -> list[slice]:
        """Return this rank's clips, cut into as many slices as there are rounds of accumulation."""
        size = self.local_batch // self.grad_accum
        return [slice(start, start + size) for start in range(0, self.local_batch, size)]

    def rngs(self, purpose: str, step: int) -> list[np.random.RandomState]:
        """Return one generator for each of this rank's clips, named by its place in the global batch."""
        first = distributed.get_rank() * self.local_batch
        return [
            random_state(f"train-{purpose}", self.seed, f"{step}:{position}")
            for position in range(first, first + self.local_batch)
        ]


# ----------------------------------------------------------------------------
# What a system gives.


@dataclass(frozen=True)
class Info:
    """How a run of a system is shown."""

    suffix: str = ""  # of the run directory's name
    status: tuple[str, ...] = ()  # statistics in the status line, besides those that end in _loss
    charts: tuple[ChartSpec, ...] = ()
    preview_frames: int = 64
    preview_videos: int = 4


@dataclass
class Bundle:
    """All that generation needs, as one file: networks by role, and what the sampler must know besides.

    `options` are plain values. `tokenizer` is the SHA-256 of the tokenizer whose codes the networks model.
    """

    networks: dict[str, nn.Module]
    system: str
    options: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    fps: float | None = None  # frames a second of what the networks were trained on
    vocabularies: dict[str, list[str]] = field(default_factory=dict)  # names of a stream's whole numbers, by stream
    path: str = ""  # of the file that it was read from, for messages


@runtime_checkable
class Tokenizer(Protocol):
    """A network, an `nn.Module`, that turns frames into a grid of tokens and back."""

    height: int  # of the frames that it takes
    width: int
    vocabulary: int  # tokens are 0 ... vocabulary - 1
    stride: tuple[int, int]  # frames in a step of the grid, pixels along an edge of a cell
    clip_frames: int  # frames that are encoded together; a longer video is encoded in successive clips of so many

    def encode(self, video: Tensor) -> Tensor:
        """Return tokens int64 (N, T / stride[0], h, w) of a video (N, 3, T, height, width) in [-1, 1]."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Return the video (N, 3, T, height, width) of tokens (N, T / stride[0], h, w)."""
        ...


class System:
    """One method in training: networks, optimisers and one whole step. Subclasses set what is annotated here.

    `options` is an instance of `Options`. Every size comes from it; what the loop decides is in `run`.
    """

    Options: ClassVar[type]
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)  # that training may be told to use
    compiles: ClassVar[bool] = False  # whether training can be told to compile
    flips: ClassVar[bool] = False  # whether clips may be mirrored, which also makes it the default
    charts: ClassVar[tuple[ChartSpec, ...]] = ()

    modules: dict[str, nn.Module]  # trained or averaged: saved, restored, broadcast and checked over ranks
    optimizers: dict[str, torch.optim.Optimizer]
    frozen: Mapping[str, nn.Module] = {}  # used, not trained, not saved; their SHA-256 is part of the run's identity

    def __init__(self, options: Any, run: Run) -> None:
        self.options, self.run = options, run

    @classmethod
    def check(cls, options: Any, train_options: TrainOptions) -> None:
        """Raise `ValueError` for options that do not go together, before anything is built."""

    def inputs(self) -> Inputs:
        """Return what it reads from the dataset."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it reads")

    def batch_spec(self, step: int) -> Sequence[BatchSpec]:
        """Return the batches that `step` takes, in order; a function of the step and the options alone."""
        raise NotImplementedError(f"{type(self).__name__} does not say which batches it takes")

    def step(self, batches: Iterator[Batch], step: int) -> dict[str, Tensor]:
        """Take one whole step, which consumes exactly the batches of `batch_spec(step)`.

        Returns the values to report by name, tensors of any shape; names begin with "loss/" or "progress/".
        """
        raise NotImplementedError(f"{type(self).__name__} does not define its step")

    def validate(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """Return held-out losses by the names that `step` gives them, on the batches of `batch_spec(0)`.

        Optional. Called without gradients, in training mode as the networks are, with clips of the validation split.
        """
        raise NotImplementedError(f"{type(self).__name__} has no validation")

    @classmethod
    def has_validation(cls) -> bool:
        """Return whether `validate` is defined."""
        return cls.validate is not System.validate

    def sampler(self) -> Sampler:
        """Return the sampler that previews and metrics use."""
        raise NotImplementedError(f"{type(self).__name__} has no sampler")

    def export(self) -> Bundle:
        """Return what generation needs, as it is now."""
        raise NotImplementedError(f"{type(self).__name__} exports nothing")

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values that neither `modules` nor `optimizers` hold."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        if state:
            raise ValueError(f"unexpected state {', '.join(state)}")

    def init_from(self, weights: Bundle | Mapping[str, Mapping[str, Tensor]]) -> None:
        """Begin a new run with the weights of an exported file, or of the `modules` of a training state.

        Raises `ValueError` for weights that do not fit.
        """
        raise ValueError(f"{type(self).__name__} cannot begin with other weights: leave out --init-from")

    def info(self) -> Info:
        """Return how the run is shown."""
        return Info(charts=type(self).charts)
