"""Turning: does the picture move to the side that the viewer turns away from, and by as much?

The horizontal shift between each two successive frames is the one at which they differ least, in brightness, where they
overlap. Over windows of frames, shifts are compared with the turns of the recorded poses, which generated rollouts
follow by their actions: a turn to the left moves the picture to the right. The same on real video is what the estimate
of shifts can reach: walls of one colour hide turns there, too.
"""

from typing import Any

import numpy as np

from metrics.footage_streams import POSES, poses_of
from metrics.long_video_base import GroupStreams, Measure, ProbeOptions, Rows, chart, jackknife_variance, line

WINDOW = 8  # frames
LEAST_DEG = 10.0  # of the turn of a window whose sign counts
LARGEST = 0.25  # of the width: the largest shift that is looked for
GRAY = np.array([0.299, 0.587, 0.114], np.float32)
KEYS = ("turn_sign", "turn_correlation")


def shifts(frames: np.ndarray) -> np.ndarray:
    """Return by how many pixels each frame is shifted to the right from the one before: (..., T, H, W) -> (..., T - 1).

    It is the shift of the least mean squared difference where both overlap, refined by a parabola. Raises `ValueError`
    for frames of fewer than 8 columns.
    """
    width = frames.shape[-1]
    most = int(width * LARGEST)
    if most < 2:
        raise ValueError(f"turning is read from frames {width} pixels wide: 8 are the least")
    before, after = frames[..., :-1, :, :], frames[..., 1:, :, :]
    costs = []
    for s in range(-most, most + 1):
        moved = after[..., max(s, 0) : width + min(s, 0)] - before[..., max(-s, 0) : width - max(s, 0)]
        costs.append(np.square(moved).mean(axis=(-2, -1)))
    cost = np.stack(costs, axis=-1)
    # Of equal shifts, as in frames of one colour, the smallest.
    preferred = cost * (1 + 1e-6 * np.abs(np.arange(-most, most + 1))) + 1e-9 * np.abs(np.arange(-most, most + 1))
    best = preferred.argmin(axis=-1)
    middle = best.clip(1, 2 * most - 1)[..., None]
    low, least, high = (np.take_along_axis(cost, middle + step, axis=-1)[..., 0] for step in (-1, 0, 1))
    bend = low - 2 * least + high
    inside = (best == middle[..., 0]) & (bend > 0)
    offset = np.where(inside, (low - high) / np.where(bend > 0, 2 * bend, 1), 0)
    return best - most + offset.clip(-0.5, 0.5)


class TurnProbe:
    """Find the shift between each two successive frames, beside the turn of the poses.

    A row is (2, T - 1): shifts in pixels, turns to the left in degrees.
    """

    def __init__(self, options: ProbeOptions, side: str) -> None:
        self.last: np.ndarray | None = None
        self.turns = np.zeros((0, 0))
        self.found: list[np.ndarray] = []

    def begin(self, streams: GroupStreams) -> None:
        """See `StreamProbe`."""
        turns = np.diff(poses_of(streams)[..., 2].astype(float), axis=1)
        self.turns = (turns + 180) % 360 - 180

    def add(self, chunk: np.ndarray) -> None:
        """See `Probe`."""
        gray = chunk.astype(np.float32) @ GRAY / 255
        both = gray if self.last is None else np.concatenate([self.last, gray], axis=1)
        self.last = gray[:, -1:]
        if both.shape[1] > 1:
            self.found.append(shifts(both))

    def finish(self) -> np.ndarray:
        """See `Probe`. Raises `ValueError` for videos that are too short."""
        found = np.concatenate(self.found, axis=1) if self.found else np.zeros((len(self.turns), 0))
        if found.shape[1] < WINDOW:
            raise ValueError(f"turning needs videos of at least {WINDOW + 1} frames: give longer ones")
        return np.stack([found, self.turns[:, : found.shape[1]]], axis=1)


def in_windows(values: np.ndarray) -> np.ndarray:
    """Return sums over windows of frames: (..., T - 1) -> (..., windows)."""
    count = values.shape[-1] // WINDOW
    return values[..., : count * WINDOW].reshape(*values.shape[:-1], count, WINDOW).sum(axis=-1)


def is_right(windows: np.ndarray) -> np.ndarray:
    """Return whether the sign is right, NaN where windows hardly turn: (N, 2, windows) -> (N, windows)."""
    shift, turn = windows[:, 0], windows[:, 1]
    return np.where(np.abs(turn) >= LEAST_DEG, np.sign(shift) == np.sign(turn), np.nan)


def scores(values: np.ndarray) -> list[float]:
    """Return the share of windows with the right sign, and the correlation of shift and turn, of rows (N, 2, T - 1).

    Raises `ValueError` where no window turns.
    """
    windows = in_windows(values)
    right = is_right(windows)
    if np.isnan(right).all():
        raise ValueError(f"no window of {WINDOW} frames turns by {LEAST_DEG:g} degrees: measure walks that turn")
    shift, turn = windows[:, 0].ravel(), windows[:, 1].ravel()
    spread = shift.std() * turn.std()
    correlation = ((shift - shift.mean()) * (turn - turn.mean())).mean() / spread if spread > 0 else 0.0
    return [float(np.nanmean(right)), float(correlation)]


def compare_turns(real: Rows, fake: Rows, options: ProbeOptions) -> dict[str, Any]:
    """Return the scores of generated video, those of real video beside them, and the sign over time."""
    lines = []
    for label, rows in (("generated", fake), ("real", real)):
        right = is_right(in_windows(rows.values))
        counted = ~np.isnan(right).all(axis=0)
        x = WINDOW * (np.arange(right.shape[1]) + 1)
        lines.append(line(label, x[counted], np.nanmean(right[:, counted], axis=0)))
    errors = np.sqrt(jackknife_variance(scores, fake))
    return {
        "results": dict(zip(KEYS, scores(fake.values), strict=True)),
        "errors": dict(zip(KEYS, errors.tolist(), strict=True)),
        "floors": dict(zip(KEYS, scores(real.values), strict=True)),
        "higher_is_better": True,
        "curves": [chart("Windows that turn to the right side", "frame", lines, limits=[0, 1])],
        "protocol": {
            "num_frames": fake.values.shape[2] + 1,
            "window": WINDOW,
            "sign": f"windows that turn by {LEAST_DEG:g} degrees or more, whose shift has the sign of the turn",
            "floors": "the same on real video, which is the ceiling",
        },
    }


MEASURES = (Measure("turning", TurnProbe, compare_turns, streams=(POSES,)),)
