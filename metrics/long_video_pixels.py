"""Measures of long videos from their pixels: colour similarity, motion energy, flat frames, seams of chunks."""

from typing import Any

import numpy as np

from metrics.long_video_base import (
    Measure,
    ProbeOptions,
    Rows,
    chart,
    check_same_length,
    curve_gap,
    jackknife_error,
    jackknife_variance,
    line,
)

COLOUR_LEVELS = 20
LONGEST_PERIOD = 128  # of seams
FEWEST_JOINS = 3  # at which a period shows itself
LEAST_CHANGE = 0.01  # of the mean: smaller values are raised to it, since repeated frames would give an infinite ratio
FLAT = 8.0  # grey levels; a frame is flat if the standard deviation of each channel is below
QUANTILES = np.linspace(0, 1, 51)


# ----------------------------------------------------------------------------
# Colour similarity: the content changes as fast as in real video, or it does not.


class ColourProbe:
    """Intersection of each frame's colour histogram with that of the video's first: rows of (T,), 1 at frame 0."""

    def __init__(self, options: ProbeOptions, side: str) -> None:
        # The nearest of 20 levels from 0 to 255, in whole numbers; no value lies half-way between two.
        self.levels = (2 * (COLOUR_LEVELS - 1) * np.arange(256) + 255) // 510
        self.first: np.ndarray | None = None  # (N, bins)
        self.curves: list[np.ndarray] = []

    def add(self, chunk: np.ndarray) -> None:
        """See `Probe`."""
        num_videos, num_frames, height, width, _ = chunk.shape
        num_bins = COLOUR_LEVELS**3
        offset = num_bins * np.arange(num_videos)[:, None]
        for frame in range(num_frames):
            red, green, blue = np.moveaxis(self.levels[chunk[:, frame].reshape(num_videos, -1, 3)], 2, 0)
            index = offset + (red * COLOUR_LEVELS + green) * COLOUR_LEVELS + blue
            counts = np.bincount(index.ravel(), minlength=num_videos * num_bins).reshape(num_videos, num_bins)
            self.first = counts if self.first is None else self.first
            self.curves.append(np.minimum(counts, self.first).sum(axis=1) / (height * width))

    def finish(self) -> np.ndarray:
        """See `Probe`."""
        return np.stack(self.curves, axis=1)


def compare_colour(real: Rows, fake: Rows, options: ProbeOptions) -> dict[str, Any]:
    """Return the published figure, and the mean absolute difference of its two curves from frame 1 on."""
    check_same_length(real.values, fake.values, "color_similarity")
    frames = np.arange(real.values.shape[1])
    lines = [
        line(label, frames, rows.values.mean(axis=0), rows.values.std(axis=0, ddof=1))
        for label, rows in (("generated", fake), ("real", real))
    ]
    real, fake = (rows.of(rows.values[:, 1:]) for rows in (real, fake))
    return {
        "results": {"color_similarity_gap": curve_gap(real.values, fake.values)},
        "errors": {"color_similarity_gap": float(jackknife_error(curve_gap, real, fake))},
        "floors": {"color_similarity_gap": curve_gap(*real.halves())},
        "curves": [
            chart("Color similarity", "frame separation", lines, band="std over videos", limits=[0, 1]),
        ],
        "protocol": {
            "num_frames": len(frames),
            "histogram": f"joint RGB, {COLOUR_LEVELS} levels a channel, the nearest of uint8",
            "similarity": "histogram intersection with the first frame",
            "std": "unbiased, over videos",
            "gap": "mean over frames from 1 on of |mean generated - mean real|",
        },
    }


# ----------------------------------------------------------------------------
# Change: the mean absolute difference of successive frames, in grey levels. Its distribution separates still or jittery
# video from real; its regular outliers are seams.


class ChangeProbe:
    """Rows of (T - 1,): entry t is the mean |difference| of frames t and t + 1, over pixels and channels."""

    def __init__(self, options: ProbeOptions, side: str) -> None:
        self.last: np.ndarray | None = None
        self.changes: list[np.ndarray] = []

    def add(self, chunk: np.ndarray) -> None:
        """See `Probe`."""
        for frame in np.moveaxis(chunk, 1, 0).astype(np.int16):  # (N, H, W, 3)
            if self.last is not None:
                self.changes.append(np.abs(frame - self.last).mean(axis=(1, 2, 3)))
            self.last = frame

    def finish(self) -> np.ndarray:
        """See `Probe`."""
        if len(self.changes) < 1:
            raise ValueError("motion was to be measured in videos of one frame: give longer videos")
        return np.stack(self.changes, axis=1)


def compare_energy(real: Rows, fake: Rows, options: ProbeOptions) -> dict[str, Any]:
    """Return the Wasserstein-1 distance between the motion energies of clips of `options.window` frames."""
    sides = [rows.of(clip_energies(rows.values, options.window)) for rows in (real, fake)]
    lines = [
        line(label, QUANTILES, np.quantile(rows.values, QUANTILES))
        for label, rows in (("generated", sides[1]), ("real", sides[0]))
    ]

    def statistic(real: np.ndarray, fake: np.ndarray) -> list[float]:
        return [energy_distance(real, fake), fake.mean() / max(real.mean(), 1e-12)]

    names = ("motion_energy_w1", "motion_energy_ratio")
    return {
        "results": dict(zip(names, map(float, statistic(sides[0].values, sides[1].values)), strict=True)),
        "errors": dict(zip(names, jackknife_error(statistic, sides[0], sides[1]).tolist(), strict=True)),
        "floors": {"motion_energy_w1": energy_distance(*sides[0].halves()), "motion_energy_ratio": 1.0},
        "curves": [chart("Motion energy of clips, in grey levels a frame", "share of clips", lines)],
        "protocol": {
            "clips": f"successive, of {options.window} frames; a video of fewer is one clip",
            "energy": "mean |difference| of successive frames in grey levels",
            "ratio": "mean generated energy / mean real energy",
        },
    }


def compare_motion(real: Rows, fake: Rows, options: ProbeOptions) -> dict[str, Any]:
    """Return the mean absolute difference of successive frames, and its curve over time."""
    return _mean_over_time(
        real, fake, "motion_energy", "Motion energy, grey levels a frame", 1,
        {"energy": "mean |difference| of successive frames over pixels and channels, in grey levels"},
    )  # fmt: skip


def _mean_over_time(
    real: Rows, fake: Rows, name: str, title: str, first_frame: int, protocol: dict[str, Any]
) -> dict[str, Any]:
    """Return the mean of rows (N, T) with its error, that of the real side, and both curves over frames."""
    lines = []
    for label, rows in (("generated", fake), ("real", real)):
        error = np.sqrt(jackknife_variance(lambda values: values.mean(axis=0), rows))
        lines.append(line(label, np.arange(rows.values.shape[1]) + first_frame, rows.values.mean(axis=0), error))
    return {
        "results": {name: float(fake.values.mean())},
        "errors": {name: float(np.sqrt(jackknife_variance(np.mean, fake)))},
        "floors": {name: float(real.values.mean())},
        "curves": [chart(title, "frame", lines, band="standard error over videos")],
        "protocol": {"num_frames": fake.values.shape[1] + first_frame, **protocol, "floors": "real videos"},
    }


def clip_energies(changes: np.ndarray, window: int) -> np.ndarray:
    """Return the mean change within each whole clip of `window` frames: (N, T - 1) -> (N, number of clips)."""
    window = min(window, changes.shape[1] + 1)
    starts = range(0, changes.shape[1] + 2 - window, window)
    return np.stack([changes[:, start : start + window - 1].mean(axis=1) for start in starts], axis=1)


def energy_distance(real: np.ndarray, fake: np.ndarray) -> float:
    """Return the Wasserstein-1 distance between the distributions of all entries."""
    from scipy.stats import wasserstein_distance  # as slow to import as all the rest of a script

    return float(wasserstein_distance(real.ravel(), fake.ravel()))


# ----------------------------------------------------------------------------
# Flat frames: a rollout that has lost its content fills frames with one colour.


class FlatProbe:
    """Rows of (T,): 1 where the standard deviation over pixels of every channel is below `FLAT`, else 0."""

    def __init__(self, options: ProbeOptions, side: str) -> None:
        self.flat: list[np.ndarray] = []  # (N,) each

    def add(self, chunk: np.ndarray) -> None:
        """See `Probe`."""
        for frames in np.moveaxis(chunk, 1, 0):  # (N, H, W, 3)
            self.flat.append((frames.std(axis=(1, 2)).max(axis=1) < FLAT).astype(float))

    def finish(self) -> np.ndarray:
        """See `Probe`."""
        return np.stack(self.flat, axis=1)


def compare_flat(real: Rows, fake: Rows, options: ProbeOptions) -> dict[str, Any]:
    """Return the share of frames that are flat, and its curve over time."""
    return _mean_over_time(
        real, fake, "flat_frames", "Share of flat frames", 0,
        {"flat": f"standard deviation over pixels of every channel below {FLAT:g} grey levels"},
    )  # fmt: skip


# ----------------------------------------------------------------------------
# Seams.


def compare_seams(real: Rows, fake: Rows, options: ProbeOptions) -> dict[str, Any]:
    """Return the period whose joins differ most from all other changes, and how much; real videos for reference."""
    num_frames = fake.values.shape[1] + 1
    scans = [seam_scan(rows.values) for rows in (real, fake)]
    if not len(scans[1][0]):
        raise ValueError(
            f"seams were looked for in videos of {num_frames} frames, but need at least {2 * FEWEST_JOINS + 1}: "
            "give longer videos"
        )
    best = int(np.argmax(scans[1][3]))
    period, phase = (int(values[best]) for values in scans[1][:2])

    variance = jackknife_variance(lambda rows: join_ratio(mean_profile(rows), period, phase), fake)
    common = {8, 16, 32, 64} & set(scans[1][0].tolist())
    by_period = {
        str(number): {"ratio": float(scans[1][2][i]), "phase": int(scans[1][1][i])}
        for i, number in enumerate(scans[1][0].tolist())
        if number in common
    }
    lines = [line(label, scan[0], scan[2]) for label, scan in (("generated", scans[1]), ("real", scans[0]))]
    return {
        "results": {
            "seam_ratio": float(scans[1][2][best]),
            "seam_score": float(scans[1][3][best]),
        },
        "errors": {"seam_ratio": float(np.sqrt(variance))},
        "floors": {"seam_ratio": 1.0, "seam_score": float(scans[0][3].max(initial=0.0))},
        "facts": {"seam_period": period, "seam_phase": phase},
        "periods": by_period,
        "curves": [chart("Change at joins / elsewhere", "period in frames", lines)],
        "protocol": {
            "num_frames": num_frames,
            "change": "mean |difference| of successive frames over that of the video, less a parabolic trend",
            "phase": "the first frame of a chunk, modulo the period: the one that stands out most",
            "score": "|ratio - 1| sqrt(joins in a video), the greatest over periods and phases",
        },
    }


def mean_profile(changes: np.ndarray) -> np.ndarray:
    """Return the mean over videos of each one's change, (N, T - 1), divided by its own mean and without its trend:
    (T - 1,), around 1. A trend, here a parabola, would be taken for a seam of a long period."""
    means = changes.mean(axis=1, keepdims=True)
    profile = np.divide(changes, means, out=np.ones_like(changes), where=means > 0).mean(axis=0)
    frames = np.linspace(-1, 1, len(profile))
    return profile / np.polynomial.Polynomial.fit(frames, profile, 2)(frames).clip(min=LEAST_CHANGE)


def join_ratio(profile: np.ndarray, period: int, phase: int) -> float:
    """Return the mean change into the frames that are `phase` modulo `period`, over the mean of all others."""
    joins = np.arange(1, len(profile) + 1) % period == phase
    return float(profile[joins].mean() / max(profile[~joins].mean(), LEAST_CHANGE))


def seam_scan(changes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return, for every period from 2 on of which a video holds three joins, the period, the phase of the highest
    score, the ratio of changes at joins to those elsewhere at that phase, and the score. All (number of periods,)."""
    profile = mean_profile(changes)
    frames = np.arange(1, len(profile) + 1)
    periods = np.arange(2, min(LONGEST_PERIOD, len(profile) // FEWEST_JOINS) + 1)
    found = []
    for period in periods:
        count = np.bincount(frames % period, minlength=period)
        total = np.bincount(frames % period, weights=profile, minlength=period)
        elsewhere = (profile.sum() - total) / (len(profile) - count)
        ratio = total / count / np.maximum(elsewhere, LEAST_CHANGE)
        score = np.abs(ratio - 1) * np.sqrt(count)
        phase = int(np.argmax(score))
        found.append((phase, ratio[phase], score[phase]))
    phases, ratios, scores = np.array(found).reshape(-1, 3).T
    return periods, phases.astype(int), ratios, scores


MEASURES = (
    Measure("color_similarity", ColourProbe, compare_colour),
    Measure("motion_energy_w1", ChangeProbe, compare_energy),
    Measure("motion_energy", ChangeProbe, compare_motion),
    Measure("flat_frames", FlatProbe, compare_flat),
    Measure("seam_ratio", ChangeProbe, compare_seams),
)
