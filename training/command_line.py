"""Shared parts of the command lines: option types, and options built from systems and dataclasses. Imports no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import click

from training import registry
from training.registry import Alias

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
AUTO = "auto"  # torch_utils.precision.AUTO
DEVICES = ("cpu", "cuda", "mps")

Command = Callable[..., Any]


def as_help(text: str | None) -> str:
    """Return a module's docstring as help text; blocks that begin with a line starting with # are not rewrapped."""
    return re.sub(r"^# ", "\b\n", text or "", flags=re.MULTILINE)


class Parsed(click.ParamType):
    """A click type whose values are parsed by a function; its ValueErrors become usage errors."""

    def __init__(self, name: str, parse: Callable[[str], Any]):
        self.name = name
        self.parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Implement `click.ParamType.convert`."""
        try:
            return self.parse(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)


def parse_size(text: str) -> tuple[int, int]:
    """Parse "36x64" as (height, width)."""
    match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; give height x width, such as 36x64")
    return int(match[1]), int(match[2])


def parse_seeds(text: str) -> list[int]:
    """Parse "0-15", "0,3,7" or "0-3,8" as a list of seeds; raise ValueError on anything else or on duplicates."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"{part.strip()!r} names no seeds: they look like 0-15 or 0,3,7")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{text!r} names a seed twice; give each seed once")
    return seeds


def parse_grid(text: str) -> tuple[int, int]:
    """Parse "3x5" as (rows, columns)."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise ValueError(f"{text!r} is not a grid: it looks like 4x4 (rows x columns)")
    return int(match[1]), int(match[2])


def parse_length(text: str) -> int | float:
    """Parse a number of frames, or "inf"."""
    if text == "inf":
        return float("inf")
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise ValueError(f"{text!r} is not a length: use a whole number of frames from 1 on, or inf")
    return int(text)


def parse_assignment(text: str) -> tuple[str, str]:
    """Parse "top_k=100" as (name, value)."""
    name, separator, value = text.partition("=")
    if not separator or not name.strip():
        raise ValueError(f"{text!r} is not an option of the model: it looks like name=value")
    return name.strip().replace("-", "_"), value.strip()


SIZE = Parsed("HxW", parse_size)


def check_device(device: str | None, precision: str) -> str:
    """Return the requested device, by default the best available one.

    Raises click.BadParameter if the device is missing or does not support the precision.
    """
    import torch

    from torch_utils.precision import why_not

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[device]:
        working = ", ".join(name for name, works in available.items() if works)
        raise click.BadParameter(f"PyTorch finds no {device} here; use {working}", param_hint="--device")
    reason = None if precision == AUTO else why_not(precision, device)
    if reason is not None:
        raise click.BadParameter(f"{precision} {reason}", param_hint="--precision")
    return device


@contextlib.contextmanager
def on_ranks() -> Iterator[int]:
    """Run a command that may be one rank of several; give its number and leave the process group at the end.

    Errors of the user become one sentence; an error that all ranks share is printed by rank 0 alone.
    """
    from torch_utils import distributed

    rank = int(os.environ.get("RANK", "0"))
    try:
        yield rank
    except distributed.SharedError as error:
        if rank:
            sys.exit(1)
        raise click.ClickException(str(error)) from error
    except (ValueError, OSError) as error:
        raise click.ClickException(f"rank {rank}: {error}" if rank else str(error)) from error
    finally:
        distributed.shutdown()


# ----------------------------------------------------------------------------
# Models, their options, and the aliases that systems register.


@dataclass
class Given:
    """The model options of a command line."""

    models: list[Any] = field(default_factory=list)  # training.network_file.ModelPath
    options: dict[str, Any] = field(default_factory=dict)
    contexts: list[str] = field(default_factory=list)
    saves: list[str] = field(default_factory=list)  # outputs to write besides the video
    flags: list[str] = field(default_factory=list)  # words that give `models` and `options` to a command
    roles: dict[str, str] = field(default_factory=dict)  # models given by an alias: role -> path


def model_options(*targets: str, default: str = "") -> Callable[[Command], Command]:
    """Return a decorator that adds --model, -o and the aliases whose target begins with one of `targets`.

    `default` says which model is used if none is given, if any is.
    """
    default = default and f"  [default: {default}]"
    options = [
        click.option(
            "--model", "models", multiple=True, metavar="PATH|URL|NAME",
            help=f"File of a model; repeat it where a model is several files{default}",
        ),
        click.option(
            "-o", "assignments", multiple=True, metavar="NAME=VALUE", type=Parsed("NAME=VALUE", parse_assignment),
            help="Option of the model's sampler; repeatable",
        ),
        *(_alias_option(alias) for alias in registry.aliases() if alias.target.partition(":")[0] in targets),
    ]  # fmt: skip
    return combine(options)


def combine(options: Sequence[Callable[[Command], Command]]) -> Callable[[Command], Command]:
    """Return one decorator that adds several options, in order."""

    def decorate(function: Command) -> Command:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _name_of(alias: Alias) -> str:
    return "alias_" + alias.flag.strip("-").replace("-", "_")


def _alias_option(alias: Alias) -> Callable[[Command], Command]:
    shown = "" if alias.default is None else f"  [default: {alias.default}]"
    return click.option(
        alias.flag, _name_of(alias), help=alias.help + shown, metavar=alias.metavar, multiple=alias.multiple,
        type=alias.kind, default=None,
    )  # fmt: skip


def take_model(values: dict[str, Any]) -> Given:
    """Remove the arguments added by `model_options` from those of a command, and return them."""
    from training.network_file import ModelPath

    given = Given()
    for path in values.pop("models", ()):
        given.models.append(ModelPath(path))
        given.flags.append(f"--model={path}")
    given.options |= dict(values.pop("assignments", ()))
    for alias in registry.aliases():
        value = values.pop(_name_of(alias), None)
        if value in (None, ()):
            continue
        target, _, name = alias.target.partition(":")
        if target == "model":
            given.models.append(ModelPath(value, alias.role))
            given.flags.append(f"{alias.flag}={value}")
            given.roles[alias.role] = value
        elif target == "context":
            given.contexts.append(value)
        elif target == "save":
            given.saves += [alias.role] if value else []
        else:
            given.options[name] = value
    for name, value in given.options.items():
        given.flags += ["-o", f"{name}={value}"]
    return given


# ----------------------------------------------------------------------------
# Options from the fields of a system's `Options`.


def field_options(cls: type, besides: Iterable[str] = ()) -> list[Callable[[Command], Command]]:
    """Return a click option for each `Flag` in the fields of a dataclass, except for the fields in `besides`."""
    return [
        click.option(name, _parameter(name), **_arguments(flag, item, cls))
        for item, flag, name in _flags(cls)
        if name not in besides
    ]


def take_fields(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Remove the arguments added by `field_options` from those of a command, and return the given ones: field -> value.

    Values of entries of a dictionary field are {"entry": value}.
    """
    found: dict[str, Any] = {}
    for item, flag, name in _flags(cls):
        value = values.pop(_parameter(name), None)
        if value is None:
            continue
        targets = flag.sets or (item.name,)
        for target, part in zip(targets, value if len(targets) > 1 else [value], strict=True):
            owner, _, entry = target.partition(".")
            if entry:
                found.setdefault(owner, {})[entry] = part
            else:
                found[owner] = part
    return found


def _flags(cls: type) -> list[tuple[Any, Any, str]]:
    return [
        (item, flag, flag.name or "--" + item.name.replace("_", "-"))
        for item in dataclasses.fields(cls)
        for flag in item.metadata.get("flags", ())
    ]


def _parameter(name: str) -> str:
    return "field_" + name.strip("-").replace("-", "_")


def _arguments(flag: Any, item: Any, cls: type) -> dict[str, Any]:
    """Return the arguments of click.option for a flag."""
    kind = flag.kind or typing.get_type_hints(cls)[item.name]
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    arguments: dict[str, Any] = {"help": flag.help, "default": None, "metavar": flag.metavar}
    if kind == "size":
        return {**arguments, "type": SIZE}
    if isinstance(kind, tuple):
        return {**arguments, "type": click.Choice(kind)}
    if kind is int and flag.low is not None:
        kind = click.IntRange(min=int(flag.low))
    elif kind is float and flag.above is not None:
        kind = click.FloatRange(min=flag.above, min_open=True)
    elif kind is float and flag.low is not None:
        kind = click.FloatRange(min=flag.low)
    if len(flag.sets) > 1:
        return {**arguments, "type": (kind,) * len(flag.sets)}
    return {**arguments, "type": kind}


def merge_fields(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` updated by `changes`; dictionaries are merged entry by entry."""
    merged = {**base, **changes}
    for name, value in changes.items():
        if isinstance(value, dict):
            merged[name] = {**base.get(name, {}), **value}
    return merged
