"""What can be shown of a model, and what is asked for: kinds of frames, live options, views and their composition.

The outputs of a sampler, by their labels, are the kinds of frames, and all of them beside each other are one more. The
fields of its `Options` that are live are the controls.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from explorer.blocks import BlockName, Options, block_size, join
from training.contract import Size
from training.sampling import Prompt, Sampler, resolve_options

SIDE_BY_SIDE = "side-by-side"  # the kind that shows all others

MAX_FRAME = 10**12  # beyond, slow motion would run out of the digits of float64
MAX_SEED = 10**15  # what a browser counts exactly
MAX_CELLS = 36
MAX_TEXT = 100  # letters of an option
MAX_ANSWER_BYTES = 32 << 20
MAX_ANSWER_FRAMES = 256


@dataclass(frozen=True)
class View:
    """A video, or a grid of them, and how it is drawn. Raises `ValueError` for what no model can show."""

    model: str
    kind: str
    options: Options = ()
    seed: int = 0
    grid: tuple[int, int] = (1, 1)  # rows, columns; seeds ascend from `seed`, row by row

    def __post_init__(self) -> None:
        rows, columns = self.grid
        if abs(self.seed) > MAX_SEED:
            raise ValueError(f"seed is {self.seed}: use a number from -{MAX_SEED} to {MAX_SEED}")
        if rows < 1 or columns < 1 or rows * columns > MAX_CELLS:
            raise ValueError(f"a grid of {rows}x{columns} was asked for: use 1 to {MAX_CELLS} cells, such as 3x3")

    @property
    def seeds(self) -> list[int]:
        """Return the seeds of all cells."""
        return list(range(self.seed, self.seed + math.prod(self.grid)))


@dataclass(frozen=True)
class Control:
    """A live option of a sampler, as a page offers it."""

    name: str
    kind: str  # "number", "whole", "flag", "choice" or "text"
    help: str
    default: Any
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] = ()


def controls_of(sampler: Sampler) -> tuple[Control, ...]:
    """Return the live options of a sampler; defaults are the options that it has."""
    hints, kinds = typing.get_type_hints(sampler.Options), {float: "number", int: "whole", bool: "flag"}
    found = []
    for item in dataclasses.fields(sampler.Options):
        if item.metadata.get("live"):
            types_ = [kind for kind in typing.get_args(hints[item.name]) if kind is not types.NoneType]
            choices = item.metadata.get("choices", ())
            kind = "choice" if choices else kinds.get(types_[0] if types_ else hints[item.name], "text")
            low, high = item.metadata.get("low"), item.metadata.get("high")
            value = getattr(sampler.options, item.name)
            found.append(Control(item.name, kind, item.metadata.get("help", ""), value, low, high, choices))
    return tuple(found)


class Part(NamedTuple):
    """Where the frames of a kind come from: an output of a stage, its size, frames computed together, and its title."""

    stage: int
    output: str
    size: Size
    block: int
    title: str


@dataclass(frozen=True)
class About:
    """What is known of a model once it has been opened."""

    options: type  # the sampler's `Options`
    controls: tuple[Control, ...]
    parts: Mapping[str, Part]  # kind -> what it shows, in the sampler's order; "video" is the last
    first: int | None  # the first frame; None where videos have frames before 0

    @property
    def kinds(self) -> dict[str, tuple[str, ...]]:
        """Return kind -> the kinds that it shows beside each other."""
        single: dict[str, tuple[str, ...]] = {kind: (kind,) for kind in self.parts}
        return {**single, SIDE_BY_SIDE: tuple(self.parts)} if len(self.parts) > 1 else single

    def size(self, kind: str) -> Size:
        """Return height and width of a kind of frames; smaller ones are enlarged beside larger ones."""
        sizes = [self.parts[part].size for part in self.kinds[kind]]
        height = max(height for height, _ in sizes)
        return height, sum(round(width * height / own) for own, width in sizes)

    def block(self, kind: str) -> int:
        """Return how many frames of a kind are computed together."""
        return self.parts[self.kinds[kind][-1]].block

    def frame_size(self, view: View) -> Size:
        """Return height and width of one frame of a view."""
        height, width = self.size(view.kind)
        return view.grid[0] * height, view.grid[1] * width

    def most_frames(self, view: View) -> int:
        """Return how many frames one answer may have."""
        return min(MAX_ANSWER_FRAMES, max(1, MAX_ANSWER_BYTES // (3 * math.prod(self.frame_size(view)))))

    def runs(self, view: View) -> Iterator[tuple[Part, BlockName]]:
        """Yield what a view is composed of, seed by seed: where frames come from, and the name of block 0."""
        for seed in view.seeds:
            for kind in self.kinds[view.kind]:
                part = self.parts[kind]
                yield part, BlockName(view.model, view.options, seed, part.stage, part.output, 0)

    def check(self, view: View, start: int, count: int = 1) -> None:
        """Raise `ValueError` for a view, or a range of frames, that the model lacks."""
        if view.kind not in self.kinds:
            raise ValueError(f"kind is {view.kind[:40]!r}: use one of {', '.join(self.kinds)}")
        if self.first is not None and start < self.first:
            raise ValueError(f"frame {start} was asked for: videos of {view.model} begin at frame {self.first}")
        if abs(start) > MAX_FRAME:
            raise ValueError(f"frame {start} was asked for: use a number from -{MAX_FRAME} to {MAX_FRAME}")
        if count < 1:
            raise ValueError(f"{count} frames were asked for: use a positive number")

    def read_options(self, texts: Mapping[str, str], model: str) -> Options:
        """Return the values of all live options, of which `texts` gives some. Raises `ValueError` for wrong ones."""
        controls = {control.name: control for control in self.controls}
        for name, text in texts.items():
            if name not in controls:
                raise ValueError(f"{name[:40]!r} is nothing that can be given here: leave it out")
            if len(text) > MAX_TEXT:
                raise ValueError(f"{name} has {len(text)} letters: use at most {MAX_TEXT}")
        read = resolve_options(self.options, texts, model)
        values = {name: getattr(read, name) if name in texts else control.default for name, control in controls.items()}
        for name in texts:
            _check_range(controls[name], values[name])
        return tuple(values.items())


def _check_range(control: Control, value: Any) -> None:
    """Raise `ValueError` for a value outside the limits or choices of an option."""
    if control.choices and value not in control.choices:
        raise ValueError(f"{control.name} is {value!r}: use one of {', '.join(map(str, control.choices))}")
    low = -math.inf if control.low is None else control.low
    high = math.inf if control.high is None else control.high
    if control.kind in ("number", "whole") and value is not None and not low <= value <= high:
        limits = f"from {low} to {high}" if high < math.inf else f"from {low} on"
        raise ValueError(f"{control.name} is {value}: use a number {limits if low > -math.inf else f'up to {high}'}")


def describe(sampler: Sampler) -> About:
    """Return what is known of a sampler. Each output is computed by the first stage that calls one of its own so."""
    stages, parts = sampler.stages, {}
    for output, size in sampler.outputs.items():
        label = sampler.labels[output]
        places = [(i, own) for i, stage in enumerate(stages) for own in stage.outputs if stage.labels[own] == label]
        index, own = (len(stages) - 1, "video") if output == "video" else (*places, (len(stages) - 1, output))[0]
        title = sampler.titles.get(output, label.replace("_", " ").capitalize())
        parts[label] = Part(index, own, size, block_size(stages, index), title)
    is_endless = not sampler.needs.follows and all(one.random_access for one in (sampler, *stages))
    return About(sampler.Options, controls_of(sampler), parts, None if is_endless else 0)


def check_sampler(sampler: Sampler, name: str, prompt: Prompt) -> None:
    """Raise `ValueError` for a sampler that cannot be shown, such as one whose prompt lacks what it needs."""
    if sampler.depends_on_length:
        raise ValueError(f"{name} has options (-o) with which frames depend on the length of the video: leave them out")
    if not all(stage.random_access for stage in sampler.stages[1:]):
        raise ValueError(f"{name} has a later stage without random access, which cannot be shown: use generate.py")
    needs = sampler.needs
    try:
        if needs.frames:
            assert needs.size is not None
            prompt.frames(0 if needs.follows else -needs.past, 1 if needs.follows else needs.past, needs.size)
        for stream in needs.streams:
            prompt.stream(stream, 0, 1)
    except ValueError as error:
        raise ValueError(f"{name} needs more than a seed: {error}") from error


# ----------------------------------------------------------------------------
# Frames side by side.


def compose(view: View, about: About, found: Sequence[Sequence[np.ndarray]], start: int, count: int) -> np.ndarray:
    """Return frames [start, start + count) of a view, cut from its blocks: uint8 (T, height, width, 3).

    `found` has the blocks of each of `about.runs`. Fewer frames are returned where a video ends, and `ValueError` is
    raised if there is none.
    """
    runs, (height, _) = list(about.runs(view)), about.size(view.kind)
    parts = []
    for (part, _), blocks in zip(runs, found, strict=True):
        skip = start % part.block
        parts.append(_enlarge(join(list(blocks))[skip : skip + count], height))
    num_frames = min(map(len, parts))
    if not num_frames:
        raise ValueError(f"the video ends before frame {start}: use a frame before it")
    rows, columns = view.grid
    width = len(about.kinds[view.kind]) * columns  # in parts
    lines = [parts[row * width : (row + 1) * width] for row in range(rows)]
    return np.concatenate([np.concatenate([part[:num_frames] for part in line], axis=2) for line in lines], axis=1)


def _enlarge(frames: np.ndarray, height: int) -> np.ndarray:
    """Return frames (T, h, w, 3) at another height, by repeating pixels."""
    _, own, width, _ = frames.shape
    if own == height:
        return frames
    rows = np.arange(height) * own // height
    columns = np.arange(round(width * height / own)) * own // height
    return frames[:, rows][:, :, columns.clip(max=width - 1)]
