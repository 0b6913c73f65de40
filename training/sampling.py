"""Videos from trained models, as used by generation, previews, metrics and the explorer.

    sampler = open_sampler(["model.pkl"], device="cpu")
    for chunk in sampler.frames(Request(seeds=[0, 1], num_frames=300)):   # num_frames=None: without end
        print(quantize(chunk["video"]).shape)                             # uint8 (2, T, height, width, 3)

Frame t of a video is a function of (seed, start, prompt), independent of chunks, other seeds and `num_frames`.
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
# Requests.


class Prompt:
    """The conditioning input of a sampler: frames, streams, a label, a text. The base class is the empty prompt.

    Frame numbers are those of the generated video: a sampler that continues a video requests frames [start - past,
    start), one that transforms a video requests the frames that it generates and some around them. A prompt holds one
    video per seed of the request, or one for all of them.
    """

    label: int | None = None
    text: str | None = None
    fps: float | None = None  # frames per second, if known
    limit: int | None = None  # number of frames that its streams cover, if finite

    def frames(self, start: Start, count: int, size: Size) -> Tensor:
        """Return frames [start, start + count) at `size`: float32 (N or 1, 3, count, height, width) in [-1, 1].

        Fewer are returned only at the end of the video. `start` is one int, or one for each video.
        """
        raise ValueError(f"{count} frames of context at {size[0]}x{size[1]} are needed: give --context")

    def stream(self, name: str, start: Start, count: int) -> Tensor:
        """Return values [start, start + count) of a stream: int64 (N or 1, count), or float32 (N or 1, count, V).

        Raises `ValueError` if the stream is absent or too short.
        """
        raise ValueError(f"the stream {name!r} is needed for {count} frames: give --{name}")

    def padded_stream(self, name: str, start: Start, count: int) -> Tensor:
        """Return what `stream` does, with the last value repeated after the end of the stream.

        For samplers that read further ahead than the frames that they make. The default suits streams without end.
        """
        return self.stream(name, start, count)

    def of(self, seeds: Sequence[int]) -> Prompt:
        """Return the prompt of the videos of these seeds, by default this one."""
        return self

    def close(self) -> None:
        """Release files and processes; the prompt gives nothing afterwards."""


@dataclass(frozen=True)
class Request:
    """Frames [start, start + num_frames) of the video of each seed; `num_frames` None: without end.

    `start` is one int or one for each seed, and may be negative if a sampler has random access.
    """

    seeds: Sequence[int]
    start: Start = 0
    num_frames: int | None = None
    prompt: Prompt = field(default_factory=Prompt)

    @property
    def starts(self) -> list[int]:
        """Return the first frame of each video."""
        return starts_of(self.start, len(self.seeds))


def starts_of(start: Start, num_videos: int) -> list[int]:
    """Return the first frame of each video."""
    starts = [start] * num_videos if isinstance(start, int) else [int(value) for value in start]
    assert len(starts) == num_videos, f"{len(starts)} start frames for {num_videos} videos"
    return starts


@dataclass(frozen=True)
class Needs:
    """The parts of a prompt that a sampler needs.

    `past` and `future` frames before and after the generated frames, at `size`; with `follows` also those frames
    themselves, which it transforms; and streams for all of these.
    """

    past: int = 0
    future: int = 0
    size: Size | None = None
    follows: bool = False
    streams: tuple[str, ...] = ()

    @property
    def frames(self) -> bool:
        """Return whether the sampler needs any frames."""
        return bool(self.past or self.future or self.follows)


# ----------------------------------------------------------------------------
# Samplers.


@dataclass(frozen=True)
class NoOptions:
    """The options of a sampler that has none."""


class Sampler:
    """Generate videos. Subclasses set `outputs` and `networks` and define `frames`.

    The dataclass `Options` declares the sampling options; `options` is an instance. `stages` are the samplers of a
    cascade, each prompted by the output of the previous one; a sampler of one stage has only itself.
    """

    Options: ClassVar[type] = NoOptions

    outputs: Mapping[str, Size]  # name -> (height, width); the last is "video", on which metrics are computed
    networks: Sequence[nn.Module] = ()
    needs: Needs = Needs()
    random_access: bool = True  # False: frame t depends on the frames before it
    period: int = 1  # period in frames of the statistics of a video
    block: int = 16  # frames that are computed together
    live_block: int | None = None  # the same for interactive use; None: `block`
    max_batch: int | None = None  # maximum number of videos per batch
    good_batch: int | None = None  # videos per batch where many cost little more than one; None: it makes no difference
    num_labels: int = 0  # number of classes of a prompt's label
    takes_text: bool = False
    num_actions: int | None = None  # number of values of an integer action stream
    action_values: int | None = None  # number of entries of an action, where actions are vectors
    vocabularies: Mapping[str, Sequence[str]] = {}  # names of a stream's integer values
    depends_on_length: bool = False  # whether frames of a shorter video differ
    default_frames: int | None = None  # the length of a video, if the options fix it
    fps: float | None = None  # frames per second of the training data, if known
    options: Any = NoOptions()
    costs: Mapping[str, Any] = {}  # numbers that belong to every result, such as evaluations per frame
    file_labels: Mapping[str, str] = {}  # names of outputs in file names and links, if different
    titles: Mapping[str, str] = {}  # names of outputs on pages, if different

    @property
    def size(self) -> Size:
        """Return height and width of the output "video"."""
        return self.outputs["video"]

    @property
    def stages(self) -> Sequence[Sampler]:
        """Return the samplers of the cascade, first to last."""
        return (self,)

    @property
    def labels(self) -> Mapping[str, str]:
        """Return the name of each output in file names and on pages."""
        return {name: self.file_labels.get(name, name) for name in self.outputs}

    def frames(self, request: Request) -> Iterator[dict[str, Tensor]]:
        """Yield successive frames of each output: name -> float32 (N, 3, T, height, width), not clamped.

        All outputs of a chunk have the same T. Memory is constant in the number of frames. A sampler that follows its
        prompt ends with it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define its frames")

    def with_options(self, options: Any) -> Sampler:
        """Return a sampler of the same networks with other options, an instance of `Options`.

        The default suits samplers that read their options only in `frames`. Raises `ValueError` for options that do not
        apply.
        """
        other = copy.copy(self)
        other.options = options
        return other

    def interactive(self) -> Sampler:
        """Return a rollout of the same frames for a prompt whose streams are not known in advance, such as a keyboard.

        Its chunks hold `live_block` frames, one if that is None, and it reads the streams of a chunk when the chunk is
        asked for. The default suits samplers whose `frames` makes chunks of `block` frames and reads no further.
        """
        other = copy.copy(self)
        other.block = self.live_block or 1
        return other

    def video(self, request: Request) -> Iterator[Tensor]:
        """Yield successive frames of the video: uint8 (N, T, height, width, 3)."""
        for chunk in self.frames(request):
            yield quantize(chunk["video"])


class Resized(Sampler):
    """Videos of another sampler, resized by bicubic interpolation: the baseline of networks that enlarge."""

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
# Sampler options, from text or values.


def sampler_option(
    default: Any, help: str, *, parse: Callable[[str], Any] | None = None, low: float | None = None,
    high: float | None = None, choices: Sequence[Any] = (), live: bool = False,
) -> Any:  # fmt: skip
    """Declare a field of a sampler's `Options`.

    `parse` reads it from text, by default according to its type. `live` offers it in the explorer, between `low` and
    `high` or among `choices`.
    """
    metadata = {"help": help, "parse": parse, "low": low, "high": high, "choices": tuple(choices), "live": live}
    return field(default=default, metadata=metadata)


def resolve_options(cls: type, values: Mapping[str, Any], where: str = "this model") -> Any:
    """Return `cls(**values)`; values given as text are parsed according to their fields.

    Raises `ValueError` for an unknown name, with the closest match, and for text that cannot be parsed.
    """
    fields = {item.name: item for item in dataclasses.fields(cls)}
    if values and not fields:
        raise ValueError(f"option {next(iter(values))!r} was given, but {where} has no options: leave out -o")
    check_keys(values, fields, f"the options of {where} (-o)")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _read(value, fields[name], hints[name], name) for name, value in values.items()})


def _read(value: Any, item: dataclasses.Field[Any], hint: Any, name: str) -> Any:
    """Return the value of one field, parsed if it is text."""
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
    """Return the sampler of one model, given by its file or files: paths, URLs, or names in `models/`.

    Several files are the parts of one model, in any order. `options` are those of the sampler; text is parsed.

    Raises `ValueError` for files that cannot be loaded, do not belong together, or hold no generator, and for options
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


def open_reconstruction(models: Sequence[str | ModelPath], device: torch.device | str = "cpu") -> Sampler | None:
    """Return the sampler that reconstructs by the tokenizer in the files of a model, None if they hold none."""
    for item in [item for model in models for item in network_file.expand(model)]:
        bundle = network_file.load_bundle(item.path, device, role=item.role)
        network = bundle.networks.get("tokenizer")
        found = network is not None and registry.find_network(type(network).__name__)
        if network is not None and found:
            alone = Bundle({"tokenizer": network}, found[1].name, fps=bundle.fps)
            sampler: Sampler = registry.resolve(found[1].open_sampler)([alone], {})
            sampler.fps = bundle.fps
            return sampler
    return None
