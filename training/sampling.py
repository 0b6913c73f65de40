"""Videos from trained models: what generation, previews, metrics and the explorer consume.

    sampler = open_sampler(["model.pkl"], device="cpu")
    for chunk in sampler.frames(Request(seeds=[0, 1], num_frames=300)):   # num_frames=None: without end
        print(quantize(chunk["video"]).shape)                             # uint8 (2, T, height, width, 3)

Frame t of a video is fixed by (seed, start, prompt), whatever the chunks, the seeds beside it and `num_frames`.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from training import network_file, network_format, registry
from training.config import check_keys
from training.contract import Bundle, Size
from training.network_file import ModelPath

Start = int | Sequence[int]


# ----------------------------------------------------------------------------
# What is asked for.


class Prompt:
    """What is given to a sampler: frames, streams, a label, a text. This one gives nothing.

    Frame numbers are those of the video that is generated: a sampler that continues a video asks for frames
    [start - past, start), one that transforms a video asks for the frames that it makes and some around them. A prompt
    holds as many videos as the request has seeds, or one for all of them.
    """

    label: int | None = None
    text: str | None = None
    fps: float | None = None  # frames a second, where known
    limit: int | None = None  # frames that its streams suffice for, where they end

    def frames(self, start: Start, count: int, size: Size) -> Tensor:
        """Return frames [start, start + count) at `size`: float32 (N or 1, 3, count, height, width) in [-1, 1].

        Fewer are returned only where the video ends. `start` is one int, or one for each video.
        """
        raise ValueError(f"{count} frames of context at {size[0]}x{size[1]} are needed: give --context")

    def stream(self, name: str, start: Start, count: int) -> Tensor:
        """Return values [start, start + count) of a stream: int64 (N or 1, count), or float32 (N or 1, count, V).

        Raises `ValueError` where it is absent or ends before.
        """
        raise ValueError(f"the stream {name!r} is needed for {count} frames: give --{name}")


@dataclass(frozen=True)
class Request:
    """Frames [start, start + num_frames) of the video of each seed; `num_frames` None: without end.

    `start` is one int or one for each seed, and may be negative where a sampler has random access.
    """

    seeds: Sequence[int]
    start: Start = 0
    num_frames: int | None = None
    prompt: Prompt = field(default_factory=Prompt)

    @property
    def starts(self) -> list[int]:
        """Return one first frame for each video."""
        return starts_of(self.start, len(self.seeds))


def starts_of(start: Start, num_videos: int) -> list[int]:
    """Return one first frame for each video."""
    starts = [start] * num_videos if isinstance(start, int) else [int(value) for value in start]
    assert len(starts) == num_videos, f"{len(starts)} start frames for {num_videos} videos"
    return starts


@dataclass(frozen=True)
class Needs:
    """What a sampler needs of its prompt.

    `past` and `future` frames before and after the frames that it makes, at `size`; with `follows` also those
    frames themselves, which it transforms; and streams for all of these.
    """

    past: int = 0
    future: int = 0
    size: Size | None = None
    follows: bool = False
    streams: tuple[str, ...] = ()

    @property
    def frames(self) -> bool:
        """Return whether any frames are needed."""
        return bool(self.past or self.future or self.follows)


# ----------------------------------------------------------------------------
# Samplers.


@dataclass(frozen=True)
class NoOptions:
    """The options of a sampler that has none."""


class Sampler:
    """Makes videos. Subclasses set `outputs` and `networks` and define `frames`.

    A dataclass `Options` declares how videos are drawn; `options` is an instance. `stages` are the samplers whose
    outputs follow each other, each with the one before as its prompt; a sampler of one stage has only itself.
    """

    Options: ClassVar[type] = NoOptions

    outputs: Mapping[str, Size]  # name -> (height, width); "video" is the last, and what is measured
    networks: Sequence[nn.Module] = ()
    needs: Needs = Needs()
    random_access: bool = True  # False: frame t is computed from the frames before it
    period: int = 1  # frames after which the statistics of a video repeat
    block: int = 16  # frames that are computed together
    live_block: int | None = None  # as many for somebody who waits for the first of them; None: as many
    max_batch: int | None = None  # videos at a time at most
    num_labels: int = 0  # classes that a prompt's label may name
    takes_text: bool = False
    num_actions: int | None = None  # for a stream of ints: how many values there are
    vocabularies: Mapping[str, Sequence[str]] = {}  # names of a stream's whole numbers
    depends_on_length: bool = False  # whether frames of a shorter video differ
    default_frames: int | None = None  # the length of a video, where the options fix it
    fps: float | None = None  # frames a second of what it was trained on, where known
    options: Any = NoOptions()
    file_labels: Mapping[str, str] = {}  # of outputs that files and pages do not call by their names

    @property
    def size(self) -> Size:
        """Return height and width of the frames that are measured."""
        return self.outputs["video"]

    @property
    def stages(self) -> Sequence[Sampler]:
        """Return the samplers that it consists of, first to last."""
        return (self,)

    @property
    def labels(self) -> Mapping[str, str]:
        """Return what each output is called in names of files and on pages."""
        return {name: self.file_labels.get(name, name) for name in self.outputs}

    def frames(self, request: Request) -> Iterator[dict[str, Tensor]]:
        """Yield successive frames of each output: name -> float32 (N, 3, T, height, width), not clamped.

        All outputs of a chunk have the same T. Memory does not grow with the number of frames. A sampler that
        follows its prompt ends with it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define its frames")

    def with_options(self, options: Any) -> Sampler:
        """Return a sampler of the same networks with other options, an instance of `Options`.

        This one suits samplers that read their options in `frames` alone. Raises `ValueError` for options that do
        not apply.
        """
        other = copy.copy(self)
        other.options = options
        return other

    def video(self, request: Request) -> Iterator[Tensor]:
        """Yield successive frames of the video: uint8 (N, T, height, width, 3)."""
        for chunk in self.frames(request):
            yield quantize(chunk["video"])


class Resized(Sampler):
    """Videos of another sampler, resized by bicubic interpolation: what a network that enlarges has to surpass."""

    def __init__(self, base: Sampler, size: Size) -> None:
        self.base = base
        self.outputs = {"video": size}
        self.networks, self.needs, self.random_access = base.networks, base.needs, base.random_access
        self.period, self.block, self.fps = base.period, base.block, base.fps

    def frames(self, request: Request) -> Iterator[dict[str, Tensor]]:
        """See `Sampler.frames`."""
        for chunk in self.base.frames(request):
            images = chunk["video"].transpose(1, 2).flatten(0, 1)
            images = nn.functional.interpolate(images, self.size, mode="bicubic", align_corners=False)
            yield {"video": images.unflatten(0, (len(request.seeds), -1)).transpose(1, 2)}


def quantize(frames: Tensor) -> Tensor:
    """Round float (N, 3, T, H, W) in [-1, 1] to uint8 (N, T, H, W, 3), as published: floor(127.5 x + 128)."""
    return (frames * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)


def pieces(num_frames: int | None, size: int) -> Iterator[int]:
    """Yield lengths of successive pieces of at most `size`; without end if `num_frames` is None."""
    if num_frames is None:
        yield from itertools.repeat(size)
    else:
        yield from (min(size, num_frames - done) for done in range(0, num_frames, size))


# ----------------------------------------------------------------------------
# Options of samplers, from text or values.


def sampler_option(
    default: Any, help: str, *, parse: Callable[[str], Any] | None = None, low: float | None = None,
    high: float | None = None, choices: Sequence[Any] = (), live: bool = False,
) -> Any:  # fmt: skip
    """Declare a field of a sampler's `Options`.

    `parse` reads it from text where its type does not tell how. `live` offers it in the explorer, between `low` and
    `high` or among `choices`.
    """
    metadata = {"help": help, "parse": parse, "low": low, "high": high, "choices": tuple(choices), "live": live}
    return field(default=default, metadata=metadata)


def resolve_options(cls: type, values: Mapping[str, Any], where: str = "this model") -> Any:
    """Return `cls(**values)`, where values that are text are read as their fields want them.

    Raises `ValueError` for a name that `cls` lacks, with the nearest, and for text that cannot be read.
    """
    fields = {item.name: item for item in dataclasses.fields(cls)}
    if values and not fields:
        raise ValueError(f"option {next(iter(values))!r} was given, but {where} has no options: leave out -o")
    check_keys(values, fields, f"the options of {where} (-o)")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _read(value, fields[name], hints[name], name) for name, value in values.items()})


def _read(value: Any, item: dataclasses.Field[Any], hint: Any, name: str) -> Any:
    """Return the value of one field, read from text if it is text."""
    parse = item.metadata.get("parse")
    if parse is not None and isinstance(value, str | list | tuple):
        return parse(value)
    if not isinstance(value, str):
        return value
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType] or [hint]
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kind = kinds[0] if is_union else hint
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[value.lower()]
        return kind(value)
    except (KeyError, TypeError, ValueError):
        words = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, str(kind))
        raise ValueError(f"option {name} is {value!r}: use {words}") from None


# ----------------------------------------------------------------------------
# Opening.


def _wrong_role(model: ModelPath, bundle: Bundle) -> str:
    """Return the message for a file that is another part of a model than the option says that named it."""
    kinds = [network_format.describe(type(network)) for network in bundle.networks.values()]
    wanted = next(next(iter(spec.networks.values())) for spec in registry.specs() if spec.role == model.role)
    flags = {alias.role: alias.flag for alias in registry.aliases() if alias.target == "model"}
    flag, other = flags.get(model.role, "--model"), flags.get(registry.spec(bundle.system).role)
    hint = f"; did you swap {flag} and {other}?" if other else ""
    return f"{flag}: {model.path} is a {' and a '.join(kinds)}, expected a {wanted}{hint}"


def open_sampler(
    models: Sequence[str | ModelPath],
    options: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    trust: bool = False,
) -> Sampler:
    """Return the sampler of one model, given by its file or files: paths, addresses, or names in `models/`.

    Several files are the parts of one model, in any order. `options` are those of the sampler; text is read.

    Raises `ValueError` for files that cannot be opened, do not belong together, or are no generator, and for options
    that the sampler lacks.
    """
    paths = [item for model in models for item in network_file.expand(model)]
    if not paths:
        raise ValueError("there is no model to open: give at least one file")
    found = []
    for item in paths:
        bundle = network_file.load_bundle(item.path, device, trust, item.role)
        if bundle.system not in registry.SYSTEMS:
            raise ValueError(f"{item.path} holds a {bundle.system}, which makes no videos: give a generator")
        if item.role and registry.spec(bundle.system).role != item.role:
            raise ValueError(_wrong_role(item, bundle))
        found.append((item.path, bundle))
    openers = {registry.spec(bundle.system).open_sampler: path for path, bundle in found}
    if len(openers) > 1:
        names = " and ".join(f"{path} of {bundle.system}" for path, bundle in found)
        raise ValueError(f"{names} do not make one model: give files of one system")
    (opener,) = openers
    bundles: list[Bundle] = [bundle for _, bundle in found]
    sampler: Sampler = registry.resolve(opener)(bundles, dict(options or {}))
    sampler.fps = next((bundle.fps for bundle in bundles if bundle.fps is not None), None)
    sampler.vocabularies = {name: names for bundle in bundles for name, names in bundle.vocabularies.items()}
    return sampler
