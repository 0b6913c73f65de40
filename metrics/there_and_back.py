"""There-and-back consistency: a model turns away and back, and the way back should show what the way there showed.

Of N generated frames the first half follows some actions, the second half their inverses in reverse order: frame
N/2 + k shows what frame N/2 - 1 - k showed. The action into frame N/2 is "none", where the way turns round. A model
that ignores its actions and stands still has equal frames too: motion energy, the mean absolute difference of
successive frames, is therefore part of each result, and a value counts only where motion is near that of real footage.

`there_and_back` turns, left in every other video and right in the others. In LabDoom a turn has an exact inverse, and a
step has none: forward moves 8 map units a frame and back 5, and either ends at walls. `there_and_back_walk` follows the
recorded actions and returns by the opposite ones, which is exact only where both directions are equally fast and
nothing is in the way; in LabDoom it is a lower bound.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metrics import paired
from metrics.families import LPIPS_ALEX, PSNR, SSIM
from metrics.footage_streams import ACTIONS
from metrics.long_video_base import (
    GroupStreams,
    Measure,
    ProbeOptions,
    Rows,
    chart,
    jackknife_variance,
    line,
)
from training.contract import Size
from training.data.stream_prompts import stream_tensor
from training.sampling import Prompt, Start, starts_of

NONE, LEFT, RIGHT, FORWARD, BACK = "none", "left", "right", "forward", "back"
OPPOSITES = {LEFT: RIGHT, RIGHT: LEFT, FORWARD: BACK, BACK: FORWARD, NONE: NONE}
TURNS = {NONE, LEFT, RIGHT}  # actions with an exact inverse
MOST_RETURNS = 32  # pairs of frames of a real video that are compared

Names = Sequence[str]


# ----------------------------------------------------------------------------
# Actions.


def inverse_actions(names: Names) -> np.ndarray:
    """Return for each action the number of its opposite: int64 (actions,).

    The words of a name are exchanged one by one: forward_left becomes back_right. Raises `ValueError` for names of
    other words, and if an opposite is missing.
    """
    inverse = []
    for name in [*names, NONE]:
        words = name.split("_")
        opposite = "_".join(OPPOSITES.get(word, word) for word in words)
        if not set(words) <= OPPOSITES.keys() or opposite not in names:  # "none" must be among them, for the pause
            raise ValueError(
                f"the action {name!r} has no opposite among {', '.join(names) or 'numbers without names'}: going there "
                "and back needs names of the words none, left, right, forward and back, each with its opposite"
            )
        inverse.append(list(names).index(opposite))
    return np.array(inverse[:-1], np.int64)


def turns_there(items: Sequence[int], names: Names, count: int) -> np.ndarray:
    """Return `count` turns of each video, left for even numbers and right for odd ones: int64 (N, count)."""
    missing = [name for name in (NONE, LEFT, RIGHT) if name not in names]
    if missing:
        raise ValueError(
            f"the model's actions are {', '.join(names) or 'numbers without names'}, and turning away and back needs "
            f"{missing[0]!r}: measure a model whose dataset names none, left and right"
        )
    numbers = [list(names).index((LEFT, RIGHT)[item % 2]) for item in items]
    return np.repeat(np.array(numbers, np.int64)[:, None], count, axis=1)


def and_back(there: np.ndarray, inverse: np.ndarray, none: int) -> np.ndarray:
    """Return actions followed by a pause and by their inverses in reverse order: int (N, h) -> int64 (N, 2 h).

    Frame h + k then shows what frame h - 1 - k shows. The first action leads into frame 0, to which the way returns, so
    that it has no inverse.
    """
    pause = np.full((len(there), 1), none, np.int64)
    return np.concatenate([there, pause, inverse[there[:, :0:-1]]], axis=1)


class _Steered(Prompt):
    """A prompt whose actions from frame 0 on are replaced by others, int64 (N, T)."""

    def __init__(self, prompt: Prompt, actions: np.ndarray) -> None:
        self.prompt, self.actions = prompt, actions
        self.label, self.text, self.fps, self.limit = prompt.label, prompt.text, prompt.fps, prompt.limit

    def frames(self, start: Start, count: int, size: Size) -> Tensor:
        """See `Prompt.frames`."""
        return self.prompt.frames(start, count, size)

    def stream(self, name: str, start: Start, count: int) -> Tensor:
        """See `Prompt.stream`."""
        if name != ACTIONS:
            return self.prompt.stream(name, start, count)
        rows = []
        for number, first in enumerate(starts_of(start, len(self.actions))):
            past = min(max(-first, 0), count)  # frames of the context keep their actions
            given = self.prompt.stream(name, first, past)[number].numpy() if past else self.actions[number, :0]
            rows.append(np.concatenate([given, self.actions[number, max(first, 0) : max(first + count, 0)]]))
            if len(rows[-1]) < count:
                raise ValueError(f"actions were planned for {self.actions.shape[1]} frames, and more are needed")
        return stream_tensor(np.stack(rows))

    def close(self) -> None:
        """See `Prompt.close`."""
        self.prompt.close()


def steer(prompt: Prompt, items: Sequence[int], names: Names, num_frames: int, turns: bool) -> Prompt:
    """Return the prompt with actions there and back: turns, or the recorded ones.

    An odd number of frames ends with a pause. Raises `ValueError` for actions without inverses.
    """
    half = num_frames // 2
    if turns:
        there, inverse = turns_there(items, names, half), np.arange(len(names))
        left, right = list(names).index(LEFT), list(names).index(RIGHT)
        inverse[[left, right]] = right, left
    else:
        inverse = inverse_actions(names)
        there = prompt.stream(ACTIONS, [0] * len(items), half).numpy() if items else np.zeros((0, half), np.int64)
    none = list(names).index(NONE)
    actions = and_back(there, inverse, none)
    return _Steered(prompt, np.pad(actions, ((0, 0), (0, num_frames - 2 * half)), constant_values=none))


def turning_returns(actions: np.ndarray, names: Names) -> np.ndarray:
    """Return pairs of frames i < j of equal view in one video, by its actions int (T,) alone: int64 (pairs, 2).

    Between the two there are turns only, at least two of them, which cancel; of several earlier frames of the same view
    the last is taken from which the view has moved. Where nothing but turns moves the view, both frames are equal.
    """
    step = np.zeros(len(names), np.int64)
    for name, turn in ((LEFT, 1), (RIGHT, -1)):
        if name in names:
            step[list(names).index(name)] = turn
    is_turn = np.array([name in TURNS for name in names])
    pairs: list[tuple[int, int]] = []
    heading, last_seen = 0, {0: 0}  # of each heading the last frame in this stretch of turns
    for frame in range(1, len(actions)):
        action = int(actions[frame])
        if not is_turn[action]:
            heading, last_seen = 0, {0: frame}
            continue
        heading += int(step[action])
        if step[action] and heading in last_seen:
            pairs.append((last_seen[heading], frame))
        last_seen[heading] = frame
    return np.array(pairs, np.int64).reshape(-1, 2)


# ----------------------------------------------------------------------------
# Probe. Rows are (lines, h): for each comparison its values over k; then the same of returns of real footage, summed by
# k, and their number; and motion. Entry k is of frames that are 2 k + 1 apart.


class ThereAndBackProbe:
    """Compare each frame of the first half of a video with that as far from the middle in the second half."""

    def __init__(self, options: ProbeOptions, side: str, comparisons: Sequence[str]) -> None:
        self.comparisons = [
            paired.open_comparison(name, options.device, options.detector_paths.get(name)) for name in comparisons
        ]
        self.is_real = side == "real"
        self.returns: list[np.ndarray] = []  # of each video (pairs, 2)
        self.chunks: list[np.ndarray] = []
        self.last: np.ndarray | None = None
        self.motion: list[np.ndarray] = []  # (N,) each

    def begin(self, streams: GroupStreams) -> None:
        """See `StreamProbe`."""
        self.returns = [np.zeros((0, 2), np.int64)] * len(streams.items)
        actions, names = streams.values[ACTIONS], streams.vocabularies[ACTIONS]
        if self.is_real and len(names) and actions.ndim == 2:
            found = [turning_returns(row, names) for row in actions]
            self.returns = [pairs[:: -(-len(pairs) // MOST_RETURNS) or 1] for pairs in found]

    def add(self, chunk: np.ndarray) -> None:
        """See `Probe`."""
        both = chunk if self.last is None else np.concatenate([self.last, chunk], axis=1)
        steps = np.abs(np.diff(both.astype(np.int16), axis=1)).mean(axis=(2, 3, 4))
        self.motion += list(steps.T)
        self.last = chunk[:, -1:].copy()
        self.chunks.append(chunk.copy())

    def finish(self) -> np.ndarray:
        """See `Probe`."""
        video = torch.from_numpy(np.concatenate(self.chunks, axis=1)).permute(0, 4, 1, 2, 3)  # (N, 3, T, H, W)
        half = video.shape[2] // 2
        if half < 2:
            raise ValueError(f"going there and back takes at least 4 frames, and there are {video.shape[2]}: give more")
        there, back = video[:, :, :half].flip(2), video[:, :, half : 2 * half]
        rows = [comparison.compare(there, back).numpy().astype(float) for comparison in self.comparisons]
        sums = np.zeros((len(video), len(rows) + 1, half))
        for number, pairs in enumerate(self.returns):
            pairs = pairs[(pairs[:, 1] - pairs[:, 0]) < 2 * half]
            if len(pairs):
                bins = (pairs[:, 1] - pairs[:, 0]) // 2
                first, second = (video[number : number + 1, :, pairs[:, side]] for side in (0, 1))
                for place, comparison in enumerate(self.comparisons):
                    np.add.at(sums[number, place], bins, comparison.compare(first, second).numpy()[0])
                np.add.at(sums[number, -1], bins, 1)
        motion = np.broadcast_to(np.mean(self.motion, axis=0)[:, None, None], (len(video), 1, half))
        return np.concatenate([np.stack(rows, axis=1), sums, motion], axis=1)


# ----------------------------------------------------------------------------
# Results.


def compare_there_and_back(
    real: Rows, fake: Rows, options: ProbeOptions, name: str, comparisons: Sequence[str], plan: str
) -> dict[str, Any]:
    """Return the mean of each comparison over all pairs, and motion energy, beside both of real footage."""
    count = len(comparisons)
    keys = [f"{name}_{short(comparison)}" for comparison in comparisons] + [f"{name}_motion"]

    def means(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values[:, :count].mean(axis=(0, 2)), [values[:, -1].mean()]])

    value, error = means(fake.values), np.sqrt(jackknife_variance(means, fake))
    apart = 2 * np.arange(fake.values.shape[2]) + 1
    totals = real.values[:, count : 2 * count + 1].sum(axis=0)  # (count + 1, h)
    seen = totals[-1] > 0
    curves, ceilings = [], {}
    for place, comparison in enumerate(comparisons):
        own = fake.values[:, place]
        band = np.sqrt(jackknife_variance(lambda values: values.mean(axis=0), fake.of(own)))
        lines = [
            line("generated", apart, own.mean(axis=0), band),
            line("real, without a return", 2 * np.arange(real.values.shape[2]) + 1, real.values[:, place].mean(axis=0)),
        ]
        if seen.any():
            x = 2 * np.flatnonzero(seen) + 1
            lines.append(line("real, turned away and back", x, totals[place, seen] / totals[-1, seen]))
            ceilings[keys[place]] = float(totals[place].sum() / totals[-1].sum())
        title = f"{paired.TITLES[comparison]} of frames there and back"
        curves.append(chart(title, "frames apart", lines, band="standard error over videos"))
    floors = dict(zip(keys, means(real.values).tolist(), strict=True))
    return {
        "results": dict(zip(keys, value.tolist(), strict=True)),
        "errors": dict(zip(keys, error.tolist(), strict=True)),
        "floors": floors,
        **({"baselines": {"real, turned away and back": ceilings}} if ceilings else {}),
        "facts": {f"{name}_real_returns": int(totals[-1].sum())},
        "curves": curves,
        "protocol": {
            "num_frames": 2 * fake.values.shape[2],
            "actions": plan,
            "pairs": "frame N/2 - 1 - k with frame N/2 + k",
            "motion": "mean |difference| of successive frames in grey levels",
            "floors": "the same frames of recorded videos, which do not go back",
            "baselines": "frames of recorded videos between which there are turns only, which cancel",
        },
    }


def short(comparison: str) -> str:
    """Return the name of a comparison in results."""
    return comparison.partition("-")[0]


_turn, _walk = (functools.partial(steer, turns=turns) for turns in (True, False))  # measures of one way share videos


def _measure(name: str, comparisons: tuple[str, ...], way: Any = _turn) -> Measure:
    plan = "turns, left or right by the number of the video, and back" if way is _turn else (
        "recorded ones, and their opposites; approximate where directions differ in speed or walls are in the way"
    )  # fmt: skip
    return Measure(
        name,
        functools.partial(ThereAndBackProbe, comparisons=comparisons),
        functools.partial(compare_there_and_back, name=name.removesuffix("_lpips"), comparisons=comparisons, plan=plan),
        streams=(ACTIONS,),
        detector=LPIPS_ALEX if LPIPS_ALEX in comparisons else None,
        steer=way,
    )


MEASURES = (
    _measure("there_and_back", (PSNR, SSIM)),
    _measure("there_and_back_lpips", (LPIPS_ALEX,)),
    _measure("there_and_back_walk", (PSNR, SSIM), _walk),
)
