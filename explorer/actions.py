"""The actions that a model takes, how they are written in requests, and which keys stand for them at first.

An action is a whole number, which may have a name, or a vector of numbers. The page knows five intents, those of the
arrow keys and that of no key, and four of two keys at once; `bindings` chooses an action for each from the names of a
vocabulary, or from the ranges of vectors.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.sampling import Sampler

Action = int | tuple[float, ...]

MAX_VALUES = 32  # entries of a vector that a page can show
MAX_NUMBER = 1e6  # of an entry

# Words that name an intent, most usual first. A name of several words, such as "turn_left", is divided into them.
_WORDS = {
    "still": ("none", "noop", "nothing", "still", "stay", "wait", "idle", "stand", "stop"),
    "up": ("forward", "forwards", "up", "ahead", "north", "accelerate", "gas"),
    "down": ("back", "backward", "backwards", "down", "reverse", "south", "brake"),
    "left": ("left", "west"),
    "right": ("right", "east"),
}
DIAGONALS = ("up-left", "up-right", "down-left", "down-right")
INTENTS = (*_WORDS, *DIAGONALS)
_UNNAMED = {"still": 0, "up": 1, "left": 2, "right": 3, "down": 4}  # numbers without names, as far as there are so many


@dataclass(frozen=True)
class ActionSpace:
    """The actions of a model: `names` of whole numbers, or usual `ranges` (low, high) of the entries of vectors."""

    names: tuple[str, ...] = ()
    ranges: tuple[tuple[float, float], ...] = ()

    @property
    def still(self) -> Action:
        """Return the action that stands for none."""
        return (0.0,) * len(self.ranges) if self.ranges else 0

    @property
    def zeros(self) -> np.ndarray:
        """Return the value of no action: int64 () or float32 (V,)."""
        return np.zeros(len(self.ranges), np.float32) if self.ranges else np.zeros((), np.int64)

    def parse(self, text: str) -> Action:
        """Read an action: a number or a name, or numbers with commas between them. Raises `ValueError` for others."""
        if self.ranges:
            return self._parse_vector(text)
        if text in self.names:
            return self.names.index(text)
        if re.fullmatch(r"[0-9]{1,6}", text) and int(text) < len(self.names):
            return int(text)
        known = ", ".join(self.names[:8]) + (", ..." if len(self.names) > 8 else "")
        raise ValueError(f"the action is {text[:40]!r}: use one of {known}, or its number")

    def _parse_vector(self, text: str) -> Action:
        words = text.split(",")
        if len(words) != len(self.ranges):
            raise ValueError(f"the action has {len(words)} numbers: this model takes {len(self.ranges)}")
        for word in words:
            if not re.fullmatch(r"[+-]?([0-9]{1,9}(\.[0-9]{0,17})?|\.[0-9]{1,17})(e-?[0-9]{1,2})?", word.strip()):
                raise ValueError(f"the action has {word[:40]!r} as an entry: use numbers, such as 0.5")
        values = tuple(float(np.float32(word)) for word in words)
        if not all(abs(value) <= MAX_NUMBER for value in values):
            raise ValueError(f"the action has an entry beyond {MAX_NUMBER:g}: use smaller numbers")
        return values

    def text(self, action: Action) -> str:
        """Return an action as `parse` reads it."""
        return str(action) if isinstance(action, int) else ",".join(f"{value:.9g}" for value in action)

    def stored(self, action: Action) -> Any:
        """Return an action as files of actions hold it: its name, its number, or a list."""
        if not isinstance(action, int):
            return [float(f"{value:.9g}") for value in action]
        is_named = any(name != str(number) for number, name in enumerate(self.names))
        return self.names[action] if is_named else action

    def of_array(self, values: np.ndarray) -> list[Action]:
        """Return actions from an array int (T,) or float (T, V); raise `ValueError` for those that do not suit."""
        if self.ranges:
            if values.ndim != 2 or values.shape[1] != len(self.ranges):
                raise ValueError(f"the actions are not vectors of {len(self.ranges)} numbers, which the model takes")
            return [tuple(float(value) for value in row) for row in values]
        if values.ndim != 1 or values.dtype.kind == "f" or not all(0 <= value < len(self.names) for value in values):
            raise ValueError(
                f"the actions are not whole numbers from 0 to {len(self.names) - 1}, which the model takes"
            )
        return [int(value) for value in values]


def as_array(actions: Sequence[Action]) -> np.ndarray:
    """Return actions as int64 (T,) or float32 (T, V)."""
    return np.array(actions, np.int64 if not actions or isinstance(actions[0], int) else np.float32)


def is_steered(sampler: Sampler) -> bool:
    """Return whether the frames of a sampler follow actions, one after another."""
    needs = sampler.needs
    return "actions" in needs.streams and not (sampler.random_access or needs.follows or needs.future)


def check_steered(sampler: Sampler, name: str) -> None:
    """Raise `ValueError` for a sampler whose frames do not follow actions, or need other streams too."""
    needs = sampler.needs
    if not is_steered(sampler):
        raise ValueError(f"{name} takes no actions, so there is nothing to steer: see its videos in the explorer")
    if len(needs.streams) > 1:
        others = ", ".join(stream for stream in needs.streams if stream != "actions")
        raise ValueError(f"{name} needs {others} beside the actions, which no key gives: use generate.py")


def action_space(sampler: Sampler, name: str, examples: np.ndarray | None = None) -> ActionSpace:
    """Return the actions of a sampler; `examples` of a dataset, (T,) or (T, V), tell the ranges of vectors.

    Raises `ValueError` for a sampler of which nothing tells its actions, or one with vectors that are too long.
    """
    names = tuple(sampler.vocabularies.get("actions", ()))
    vectors = examples if examples is not None and examples.ndim == 2 else None
    width = sampler.action_values
    if width is None and sampler.num_actions is None and not names and vectors is not None:
        width = vectors.shape[1]
    if width is not None:
        if not 1 <= width <= MAX_VALUES:
            raise ValueError(f"{name} has actions of {width} numbers, a page shows 1 to {MAX_VALUES}: use generate.py")
        if vectors is not None and vectors.shape[1] != width:
            raise ValueError(
                f"{name} has actions of {width} numbers, those of its --context have {vectors.shape[1]}: give another"
            )
        return ActionSpace(ranges=tuple(_range_of(None if vectors is None else vectors[:, i]) for i in range(width)))
    count = sampler.num_actions or len(names)
    if not count:
        raise ValueError(f"{name} does not say which actions it takes: give a dataset that has them as --context")
    return ActionSpace((*names, *map(str, range(len(names), count)))[:count])


def _range_of(values: np.ndarray | None) -> tuple[float, float]:
    """Return what an entry usually lies between, with 0 inside: all but the 5 % at either end; else -1 and 1."""
    if values is None or not len(values):
        return -1.0, 1.0
    low, high = (float(f"{value:.3g}") for value in np.quantile(values, (0.05, 0.95)))
    low, high = min(low, 0.0), max(high, 0.0)
    return (low, high) if high > low else (-1.0, 1.0)


def bindings(space: ActionSpace) -> dict[str, str | None]:
    """Return the action of each intent as text; None where the model has none.

    Of vectors the first entry leads ahead; the second one, or the only one, turns, to the left where it is positive.
    """
    if space.ranges:
        return _vector_bindings(space)
    is_named = any(name != str(number) for number, name in enumerate(space.names))
    if not is_named:
        found = {intent: number for intent, number in _UNNAMED.items() if number < len(space.names)}
        return {intent: str(found[intent]) if intent in found else None for intent in INTENTS}
    words = [set(re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())) for name in space.names]
    chosen: dict[str, str | None] = {}
    for intent in _WORDS:
        others = {word for other in _WORDS if other != intent for word in _WORDS[other]}
        ranked = [
            (place, len(found), number)
            for number, found in enumerate(words)
            for place, word in enumerate(_WORDS[intent])
            if word in found and not found & others
        ]
        chosen[intent] = str(min(ranked)[2]) if ranked else None
    if chosen["still"] is None and "0" not in chosen.values():
        chosen["still"] = "0"
    for intent in DIAGONALS:
        parts = [set(_WORDS[part]) for part in intent.split("-")]
        both = [number for number, found in enumerate(words) if all(found & part for part in parts)]
        chosen[intent] = str(both[0]) if both else None
    return chosen


def _vector_bindings(space: ActionSpace) -> dict[str, str | None]:
    """Return the action of each intent where actions are vectors."""
    turning = min(1, len(space.ranges) - 1)
    entries = {"left": turning, "right": turning, **({"up": 0, "down": 0} if turning else {})}
    found: dict[str, str | None] = {}
    for intent in INTENTS:
        vector = [0.0] * len(space.ranges)
        for part in intent.split("-"):
            if part in entries:
                low, high = space.ranges[entries[part]]
                vector[entries[part]] = high if part in ("up", "left") else low
        found[intent] = space.text(tuple(vector)) if intent == "still" or any(vector) else None
    return found
