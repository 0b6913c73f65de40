"""The contract between a system and the rest of Longtake: the base class of systems, and the types they exchange.

A system is one published method. It has its own folder under `training/`, with a `spec.py` that describes it to
`training.registry`. Training, previews, generation, metrics and the explorer use a system only through this module
and `training.sampling`; docs/adding_a_system.md explains the contract with a worked example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from torch_utils import distributed
from training.charts import ChartSpec
from training.flags import Flag as Flag
from training.flags import option as option
from training.random import random_state

if TYPE_CHECKING:
    from training.config import TrainOptions
    from training.sampling import Sampler

Size = tuple[int, int]  # height, width
Batch = dict[str, Tensor]

# ----------------------------------------------------------------------------
# Inputs.


@dataclass(frozen=True)
class FrameClip:
    """`count` frames first, first + stride, ... of a window at one size.

    The system receives them as float32 (N, 3, count, height, width) in [-1, 1].
    """

    name: str
    height: int
    width: int
    first: int
    count: int
    stride: int = 1


@dataclass(frozen=True)
class CodeClip:
    """`count` token grids first, first + stride, ... of a window, counted in steps of the token grid.

    One step covers as many frames as the tokenizer's temporal stride. The system receives int64 (N, count, h, w).
    """

    name: str
    first: int
    count: int
    stride: int = 1


@dataclass(frozen=True)
class LatentClip:
    """`count` latents before quantization, first, first + stride, ... of a window, counted in steps of the token grid.

    One step covers as many frames as the tokenizer's temporal stride. The system receives float32 (N, C, count, h, w),
    as the tokenizer's `latents` returns them but for the rounding to float16 in which they are stored.
    """

    name: str
    first: int
    count: int
    stride: int = 1


@dataclass(frozen=True)
class Stream:
    """`count` values of a stream, such as "actions" or "poses", for frames first, first + stride, ... of a window.

    The system receives int64 (N, count) for streams of ints and float32 (N, count, values) for streams of vectors.
    `actions[t]` leads into frame t. A "label" is the same for every frame of a clip. "audio" are spectrograms of the
    sound of each frame (training.data.spectrograms).
    """

    name: str
    first: int
    count: int
    stride: int = 1


@dataclass(frozen=True)
class TextClip:
    """The ids of a description of the clip, `length` of them, made by `Inputs.text_ids`.

    Of several descriptions one is drawn for each clip of a batch. The system receives int64 (N, length).
    """

    name: str
    length: int


Part = FrameClip | CodeClip | LatentClip | Stream | TextClip


@dataclass(frozen=True)
class BatchSpec:
    """A batch of windows of `num_frames` consecutive frames, of which only the named parts are read."""

    num_frames: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Inputs:
    """The dataset parts that a system needs: frames of these sizes, codes and latents of tokenizers, and streams.

    `codes` and `latents` are the SHA-256 of a tokenizer. `text_ids` returns the ids of a description of a clip, ints
    (length,), for a system that reads such.
    """

    sizes: tuple[Size, ...] = ()
    codes: str | None = None
    streams: tuple[str, ...] = ()
    latents: str | None = None
    text_ids: Callable[[str], Sequence[int]] | None = None


@dataclass(frozen=True)
class DataFacts:
    """What the dataset of a run says of the parts that its system reads."""

    fps: float
    # By stream: for whole numbers their count, for vectors their width; and which are vectors.
    num_values: Mapping[str, int] = field(default_factory=dict)
    vectors: frozenset[str] = frozenset()
    # Mean and standard deviation of each channel of the latents over the dataset.
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()
    texts: tuple[str, ...] = ()  # some of the descriptions, where such are read


# ----------------------------------------------------------------------------
# Settings of a run.


@dataclass(frozen=True)
class Run:
    """The settings of the loop that are common to all systems, and therefore not repeated in a system's `Options`."""

    device: torch.device = torch.device("cpu")
    batch: int = 1  # global batch size: clips per step, over all ranks and accumulation rounds
    grad_accum: int = 1  # rounds of gradient accumulation
    seed: int = 0
    precision: str | None = None  # None: the system's default
    compile: bool = False
    steps: int = 0  # last step of training, for learning-rate schedules
    tensor_parallel: int = 1  # ranks with consecutive numbers that process the same clips together

    @property
    def num_readers(self) -> int:
        """Return the number of groups of ranks, each of which reads a part of a batch."""
        return max(distributed.get_world_size() // self.tensor_parallel, 1)

    @property
    def reader(self) -> int:
        """Return the number of this rank's group."""
        return distributed.get_rank() // self.tensor_parallel

    @property
    def local_batch(self) -> int:
        """Return the number of clips of a global batch that this rank processes."""
        return self.batch // self.num_readers

    def rounds(self) -> list[slice]:
        """Return this rank's clips as one slice per accumulation round."""
        size = self.local_batch // self.grad_accum
        return [slice(start, start + size) for start in range(0, self.local_batch, size)]

    def rngs(self, purpose: str, step: int) -> list[np.random.RandomState]:
        """Return one random generator per clip of this rank, keyed by the clip's position in the global batch."""
        first = self.reader * self.local_batch
        return [
            random_state(f"train-{purpose}", self.seed, f"{step}:{position}")
            for position in range(first, first + self.local_batch)
        ]


# ----------------------------------------------------------------------------
# Outputs.


@dataclass(frozen=True)
class Info:
    """Display settings of a system's runs."""

    suffix: str = ""  # suffix of the run directory's name
    status: tuple[str, ...] = ()  # statistics in the status line, besides those that end in _loss
    charts: tuple[ChartSpec, ...] = ()
    preview_frames: int = 64
    preview_videos: int = 4


@dataclass
class Bundle:
    """The contents of a model file: networks by role, and the metadata that the sampler needs.

    `options` are plain values. `tokenizer` is the SHA-256 of the tokenizer whose codes the networks model.
    """

    networks: dict[str, nn.Module]
    system: str
    options: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    fps: float | None = None  # frames per second of the training data
    vocabularies: dict[str, list[str]] = field(default_factory=dict)  # by stream: the names of its integer values
    path: str = ""  # file that it was read from, for messages


@runtime_checkable
class Tokenizer(Protocol):
    """A network, an `nn.Module`, that encodes frames into a grid of tokens and decodes them."""

    height: int  # of the input frames
    width: int
    vocabulary: int  # tokens are 0 ... vocabulary - 1
    stride: tuple[int, int]  # frames per step of the grid, pixels along an edge of a cell
    clip_frames: int  # frames that are encoded together; a longer video is encoded in consecutive clips of this length

    def encode(self, video: Tensor) -> Tensor:
        """Encode a video (N, 3, T, height, width) in [-1, 1] as tokens int64 (N, T / stride[0], h, w)."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """Decode tokens (N, T / stride[0], h, w) into a video (N, 3, T, height, width)."""
        ...


class System:
    """A method in training: networks, optimisers and the training step. Subclasses set the annotated attributes.

    `options` is an instance of `Options` and fixes every size; `run` holds the settings of the loop.
    """

    Options: ClassVar[type]
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)  # precisions that it can train in
    compiles: ClassVar[bool] = False  # whether it supports compilation
    flips: ClassVar[bool] = False  # whether clips may be mirrored, which then is the default
    charts: ClassVar[tuple[ChartSpec, ...]] = ()
    free_options: ClassVar[tuple[str, ...]] = ()  # fields of `Options` that may change when a run is resumed

    modules: dict[str, nn.Module]  # trained or EMA networks: saved, restored, broadcast and compared across ranks
    optimizers: dict[str, torch.optim.Optimizer]
    frozen: Mapping[str, nn.Module] = {}  # used, neither trained nor saved; their SHA-256 is part of the run's identity

    def __init__(self, options: Any, run: Run) -> None:
        self.options, self.run = options, run

    @classmethod
    def check(cls, options: Any, train_options: TrainOptions) -> None:
        """Raise `ValueError` for inconsistent options, before anything is built."""

    @classmethod
    def tensor_parallel(cls, options: Any) -> int:
        """Return the number of ranks that process the same clips together, each a part of the network's width."""
        return 1

    @classmethod
    def read_preset(cls, row: Mapping[str, Any], given: dict[str, Any]) -> Mapping[str, Any]:
        """Return a preset's row, changed by what options name, such as a configuration file of the published code.

        `given` are the fields of `Options` on the command line, which come first; one that is used up may be removed.
        """
        return row

    def inputs(self) -> Inputs:
        """Return the dataset parts that the system needs."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it reads")

    def use_facts(self, facts: DataFacts) -> None:
        """Take what the dataset says of its parts, before any weights or states are loaded.

        Optional. Called once by training. Raises `ValueError` if the system cannot use such data.
        """

    def batch_spec(self, step: int) -> Sequence[BatchSpec]:
        """Return the batches that `step` consumes, in order; a function of the step and the options only."""
        raise NotImplementedError(f"{type(self).__name__} does not say which batches it takes")

    def step(self, batches: Iterator[Batch], step: int) -> dict[str, Tensor]:
        """Take one training step, which consumes exactly the batches of `batch_spec(step)`.

        Returns the values to report by name, tensors of any shape; names begin with "loss/" or "progress/".
        """
        raise NotImplementedError(f"{type(self).__name__} does not define its step")

    def validate(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """Return validation losses, named as by `step`, on the batches of `batch_spec(0)`.

        Optional. Called without gradients, with the networks in training mode and clips of the validation split.
        """
        raise NotImplementedError(f"{type(self).__name__} has no validation")

    @classmethod
    def has_validation(cls) -> bool:
        """Return whether `validate` is defined."""
        return cls.validate is not System.validate

    def gather(self) -> None:
        """Collect from all ranks what `sampler` and `export` need; all ranks call it together before either is used.

        Optional, for systems whose networks are divided among the ranks.
        """

    def sampler(self) -> Sampler:
        """Return the sampler for previews and metrics."""
        raise NotImplementedError(f"{type(self).__name__} has no sampler")

    def export(self) -> Bundle:
        """Return the current networks for generation."""
        raise NotImplementedError(f"{type(self).__name__} exports nothing")

    def state_dict(self) -> dict[str, Any]:
        """Return state that neither `modules` nor `optimizers` hold, as tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        if state:
            raise ValueError(f"unexpected state {', '.join(state)}")

    def init_from(self, weights: Bundle | Mapping[str, Mapping[str, Tensor]]) -> None:
        """Initialise a new run with the weights of an exported file, or of the `modules` of a training state.

        Raises `ValueError` for weights that do not fit.
        """
        raise ValueError(f"{type(self).__name__} cannot begin with other weights: leave out --init-from")

    def info(self) -> Info:
        """Return the display settings of the run."""
        return Info(charts=type(self).charts)
