"""Fields of an `Options` dataclass as command-line options. Imports no torch, so that `--help` is quick."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SCHEDULES = ("constant", "cosine", "polynomial")  # of learning rates, see training.optim.Schedule


@dataclass(frozen=True)
class Flag:
    """A command-line option of a training script, and the fields of `Options` that it sets.

    Several names in `sets` make an option with several values; "generator.num_filters" sets an entry of a dictionary.
    `kind` is a Python type, a tuple of choices, or "size" for HxW; None derives it from the field's annotation.
    """

    help: str
    name: str | None = None  # with leading dashes; None: the field's name
    kind: Any = None
    sets: tuple[str, ...] = ()
    low: float | None = None  # minimum, inclusive
    above: float | None = None  # minimum, exclusive
    metavar: str | None = None
    needed: bool = False  # whether a run is refused without it


def option(default: Any, help: str, *more: Flag, factory: bool = False, **arguments: Any) -> Any:
    """Declare a field of an `Options` dataclass as a command-line option with help text `help`.

    `arguments` are those of `Flag`. `more` are further options that set entries of this field. With `factory`,
    `default` is a factory function. With an empty `help` the field itself gets no option.
    """
    flags = (*([Flag(help, **arguments)] if help else []), *more)
    metadata = {"flags": flags}
    return field(default_factory=default, metadata=metadata) if factory else field(default=default, metadata=metadata)


def check_options(options: Any, *, above_zero: Sequence[str] = (), shares: Sequence[str] = ()) -> None:
    """Raise `ValueError` unless fields of a dataclass are positive and finite, or in [0, 1)."""
    names = {item.name for item in dataclasses.fields(options)}
    assert {*above_zero, *shares} <= names
    for name in above_zero:
        if not 0 < getattr(options, name) < math.inf:
            raise ValueError(f"Option {name} is {getattr(options, name)}; it must be above 0, such as 0.002")
    for name in shares:
        if not 0 <= getattr(options, name) < 1:
            raise ValueError(f"Option {name} is {getattr(options, name)}; it must be at least 0 and below 1")
