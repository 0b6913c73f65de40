"""Action following: does generated video show the actions that it was given?

An inverse-dynamics network (`metrics.action_network`), trained on real footage, reads the action between each two
successive frames. What it reads is compared with the action that was given, factor by factor: precision, recall and F1
of each class, their mean over the classes of a factor, and the mean over factors. The same on real video of the dataset
is the ceiling: a wall that stops a step, for instance, hides the action there, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from metrics.families import ACTION_NETWORK
from metrics.footage_streams import ACTIONS
from metrics.long_video_base import GroupStreams, Measure, ProbeOptions, Rows, chart, jackknife_variance, line

NONE = "none"
FACTORS = {"turn": (NONE, "left", "right"), "move": (NONE, "forward", "back")}
PAIRS_AT_ONCE = 256
NAME = "action_following"


# ----------------------------------------------------------------------------
# Factors of actions.


@dataclass(frozen=True)
class Factor:
    """A part of an action: its classes, and the class of each action, int64 (actions,)."""

    name: str
    classes: tuple[str, ...]
    table: np.ndarray


def factors_of(names: Sequence[str]) -> list[Factor]:
    """Return the factors of actions of these names.

    Names of the words none, left, right, forward and back, joined by underscores, have the factors "turn" and "move",
    as far as they occur; other names are the classes of one factor, "action".
    """
    words = [set(name.split("_")) for name in names]
    known = {word for classes in FACTORS.values() for word in classes}
    if not names or not set().union(*words) <= known:
        return [Factor("action", tuple(names), np.arange(len(names)))]
    found = []
    for factor, (_, *classes) in FACTORS.items():
        present = [word for word in classes if any(word in parts for parts in words)]
        if present:
            table = [next((1 + i for i, word in enumerate(present) if word in parts), 0) for parts in words]
            found.append(Factor(factor, (NONE, *present), np.array(table, np.int64)))
    return found


def confusion(predicted: np.ndarray, actions: np.ndarray, factors: Sequence[Factor]) -> np.ndarray:
    """Return how often each class was given and read: int64 (M, factors) and (M,) -> (factors, C, C), given first.

    C is the largest number of classes.
    """
    most = max(len(factor.classes) for factor in factors)
    counts = np.zeros((len(factors), most, most), np.int64)
    for place, factor in enumerate(factors):
        np.add.at(counts[place], (factor.table[actions], predicted[:, place]), 1)
    return counts


def scores(counts: np.ndarray, factors: Sequence[Factor]) -> dict[str, float]:
    """Return precision, recall and F1 of counts (factors, C, C), by name.

    `f1`, `precision` and `recall` are means over factors of the means over their classes, `f1_turn` the mean of a
    factor, `turn_left_f1` that of a class. A class that was never given does not count; one that was never read has
    precision 0.
    """
    found: dict[str, float] = {}
    means: dict[str, list[float]] = {"f1": [], "precision": [], "recall": []}
    for table, factor in zip(np.asarray(counts, float), factors, strict=True):
        by_kind: dict[str, list[float]] = {kind: [] for kind in means}
        for number, name in enumerate(factor.classes):
            hits, given, read = table[number, number], table[number].sum(), table[:, number].sum()
            if not given:
                continue
            values = {"f1": 2 * hits / (given + read), "precision": hits / max(read, 1), "recall": hits / given}
            for kind, value in values.items():
                by_kind[kind].append(value)
                found[f"{factor.name}_{name}_{kind}"] = float(value)
        for kind, values in by_kind.items():
            if values:
                found[f"{kind}_{factor.name}"] = float(np.mean(values))
                means[kind].append(float(np.mean(values)))
    return {**{kind: float(np.mean(values)) for kind, values in means.items() if values}, **found}


# ----------------------------------------------------------------------------
# Probe. A row is (factors C C + T - 1,): the counts of a video, then of each frame from frame 1 on the share of factors
# that were read rightly.


class ActionProbe:
    """Read the action between each two successive frames, and compare it with the one given."""

    def __init__(self, options: ProbeOptions, side: str) -> None:
        self.detector, self.side = options.open(ACTION_NETWORK), side
        self.network = self.detector.network
        self.last: np.ndarray | None = None
        self.frame = 0
        self.actions = np.zeros((0, 0), np.int64)
        self.counts: list[np.ndarray] = []
        self.right: list[np.ndarray] = []  # (N, t) each

    def begin(self, streams: GroupStreams) -> None:
        """See `StreamProbe`. Raises `ValueError` for actions that the network was not trained on."""
        names, actions = list(streams.vocabularies[ACTIONS]), streams.values[ACTIONS]
        unknown = [name for name in names if name not in self.network.names]
        if not names or unknown:
            raise ValueError(
                f"the actions of the {self.side} videos are {', '.join(names) or 'without names'}, and the network for "
                f"{NAME} was trained on {', '.join(self.network.names)}: train one on this kind of footage with  "
                "python -m metrics.action_network train"
            )
        table = np.array([self.network.names.index(name) for name in names])
        self.actions = table[actions]
        factors = self.network.factors
        most = max(len(factor.classes) for factor in factors)
        self.counts = [np.zeros((len(factors), most, most), np.int64) for _ in actions]

    def add(self, chunk: np.ndarray) -> None:
        """See `Probe`. Raises `ValueError` for frames of another size than those that the network was trained on."""
        if chunk.shape[2:4] != self.network.size:
            raise ValueError(
                "the frames are {}x{}, and the network for {} was trained on {}x{}: train one at this size".format(
                    *chunk.shape[2:4], NAME, *self.network.size
                )
            )
        both = chunk if self.last is None else np.concatenate([self.last, chunk], axis=1)
        self.last = chunk[:, -1:].copy()
        first, self.frame = self.frame + (1 if self.frame == 0 else 0), self.frame + chunk.shape[1]
        count = both.shape[1] - 1
        if count == 0:
            return
        frames = torch.from_numpy(both).permute(0, 1, 4, 2, 3)  # (N, t + 1, 3, H, W)
        before, after = frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1)
        parts = zip(before.split(PAIRS_AT_ONCE), after.split(PAIRS_AT_ONCE), strict=True)
        predicted = np.concatenate([self.detector.predict(*part) for part in parts]).reshape(len(chunk), count, -1)
        given = self.actions[:, first : first + count]
        for number, counts in enumerate(self.counts):
            counts += confusion(predicted[number], given[number], self.network.factors)
        wanted = np.stack([factor.table[given] for factor in self.network.factors], axis=2)
        self.right.append((predicted == wanted).mean(axis=2))

    def finish(self) -> np.ndarray:
        """See `Probe`."""
        if not self.right:
            raise ValueError("actions were to be read from videos of one frame: give longer videos")
        counts = np.stack([counts.ravel() for counts in self.counts])
        return np.concatenate([counts, *self.right], axis=1)


def compare_actions(real: Rows, fake: Rows, options: ProbeOptions) -> dict[str, Any]:
    """Return the scores of generated video, those of real video beside them, and accuracy over time."""
    detector = options.open(ACTION_NETWORK)
    factors = detector.network.factors
    most = max(len(factor.classes) for factor in factors)
    num_counts = len(factors) * most * most

    def summed(values: np.ndarray) -> np.ndarray:
        return values[:, :num_counts].sum(axis=0).reshape(-1, most, most)

    found = {side: scores(summed(rows.values), factors) for side, rows in (("real", real), ("generated", fake))}
    keys = list(found["generated"])

    def statistic(values: np.ndarray) -> list[float]:
        left = scores(summed(values), factors)
        return [left.get(key, np.nan) for key in keys]  # without a group of videos a class may not have been given

    errors = np.sqrt(jackknife_variance(statistic, fake))
    lines = []
    for label, rows in (("generated", fake), ("real", real)):
        right = rows.of(rows.values[:, num_counts:])
        band = np.sqrt(jackknife_variance(lambda values: values.mean(axis=0), right))
        lines.append(line(label, np.arange(right.values.shape[1]) + 1, right.values.mean(axis=0), band))
    trained = detector.identity.get("trained", {})
    return {
        "results": {f"action_{key}": value for key, value in found["generated"].items()},
        "errors": {
            f"action_{key}": float(error) for key, error in zip(keys, errors, strict=True) if np.isfinite(error)
        },
        "floors": {f"action_{key}": value for key, value in found["real"].items()},
        "higher_is_better": True,
        "curves": [
            chart("Actions that are followed", "frame", lines, band="standard error over videos", limits=[0, 1])
        ],
        "protocol": {
            "num_frames": fake.values.shape[1] - num_counts + 1,
            "factors": {factor.name: list(factor.classes) for factor in factors},
            "macro": "mean over the classes of a factor that were given, then over factors",
            "floors": "the same network on real video, which is the ceiling",
            "network": f"trained on dataset {trained.get('dataset')}, {trained.get('steps')} steps",
        },
        "detector": detector.identity,
    }


MEASURES = (Measure(NAME, ActionProbe, compare_actions, ACTION_NETWORK, streams=(ACTIONS,)),)
