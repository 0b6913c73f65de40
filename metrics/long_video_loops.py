"""Detect videos that repeat themselves, in circles or there and back, from 9 x 12 thumbnails.

The distance of two frames is the mean square difference of their thumbnails, each without its mean colour. A circle
is a valley of the mean distance at some lag. There-and-back is a frame about which the video is its own mirror image:
a valley of the mean distance of the frames on either side. A score is the depth of the valley as a share of the lower
of its two shoulders, so 1 is a perfect repeat; what counts as one is what 99 % of real videos stay below.
"""

from typing import Any

import numpy as np

from metrics.long_video_base import Measure, ProbeOptions, Rows, chart, jackknife_variance, line

THUMBNAIL = (9, 12)
SHORTEST_LAG = 8
FEWEST_FRAMES = 8 * SHORTEST_LAG
LONGEST_SPAN = 128  # frames on either side of a turning point, together
SHOULDER = 24  # frames within which a turning point has its shoulders
REAL_QUANTILE = 0.99
ENOUGH_REAL = 100  # below, that quantile is about the largest value
SAME_DEPTH = 0.8  # valleys of at least this share of the deepest count as repeats of it


class ThumbnailProbe:
    """Rows of (5,): the four numbers of `find_repeats`, and how many frames there were."""

    def __init__(self, options: ProbeOptions, side: str) -> None:
        self.thumbnails: list[np.ndarray] = []

    def add(self, chunk: np.ndarray) -> None:
        """See `Probe`."""
        for frame in np.moveaxis(chunk, 1, 0):  # (N, H, W, 3)
            small = area_mean(area_mean(frame, 1, THUMBNAIL[0]), 2, THUMBNAIL[1])
            small -= small.mean(axis=(1, 2), keepdims=True)
            self.thumbnails.append(small.reshape(len(frame), -1).astype(np.float32))

    def finish(self) -> np.ndarray:
        """See `Probe`."""
        num_frames = len(self.thumbnails)
        if num_frames < FEWEST_FRAMES:
            raise ValueError(
                f"loops were looked for in videos of {num_frames} frames, but need at least {FEWEST_FRAMES}: give "
                "longer videos"
            )
        videos = np.stack(self.thumbnails, axis=1)  # (N, T, 324)
        return np.array([[*find_repeats(video).values(), num_frames] for video in videos])


def area_mean(values: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Return the mean over `size` equal parts of an axis; pixels on a border count in proportion."""
    length = values.shape[axis]
    edges = np.linspace(0, length, size + 1)
    pixels = np.arange(length)
    share = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights = share.clip(min=0) * size / length  # (size, length)
    return np.moveaxis(np.tensordot(values, weights, axes=(axis, 1)), -1, axis)


def distance_profiles(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for one video's thumbnails (T, d) the mean distance at each lag, (7/8 T,), and that of the frames
    mirrored about each half frame, as a multiple of the mean at their lags, (2 T - 1,); NaN where too few are mirrored.
    """
    num_frames = len(frames)
    by_lag = np.zeros(num_frames - num_frames // 8)
    mirrored, usual = np.zeros((2, 2 * num_frames - 1))
    for lag in range(1, len(by_lag)):
        distances = np.square(frames[lag:] - frames[:-lag]).mean(axis=1)  # (T - lag,)
        by_lag[lag] = distances.mean()
        if SHORTEST_LAG <= lag <= LONGEST_SPAN:
            centres = slice(lag, lag + 2 * len(distances), 2)  # twice the frame number
            mirrored[centres] += distances
            usual[centres] += by_lag[lag]
    near_end = np.minimum(np.arange(2 * num_frames - 1), np.arange(2 * num_frames - 1)[::-1])
    # Near the ends there are few lags to take part, and a pause would pass for a turn.
    mirrored[near_end < 4 * SHORTEST_LAG] = np.nan
    return by_lag, np.divide(mirrored, usual, out=np.full_like(usual, np.nan), where=usual > 0)


def valleys(profile: np.ndarray, first: int, reach: int) -> np.ndarray:
    """Return the depth of each entry from `first` on as a share of its lower shoulder, the largest value within
    `reach` on either side: 0 to 1, and 0 at the ends and where the profile is NaN."""
    depth = np.zeros(len(profile))
    filled = np.where(np.isfinite(profile), profile, 0.0)
    for i in range(first, len(profile) - 1):
        shoulder = min(filled[max(0, i - reach) : i].max(initial=0.0), filled[i + 1 : i + 1 + reach].max())
        if np.isfinite(profile[i]) and shoulder > 1e-9:
            depth[i] = max(0.0, 1 - filled[i] / shoulder)
    return depth


def find_repeats(frames: np.ndarray) -> dict[str, float]:
    """Return scores and periods of one video's thumbnails (T, d). A period is 0 where there is none: where the score
    is 0, or where there is only one turning point."""
    by_lag, mirrored = distance_profiles(frames)
    lag_depth = valleys(by_lag, SHORTEST_LAG, len(by_lag))
    turn_depth = valleys(mirrored, 0, 2 * SHOULDER)
    turns = bottoms(turn_depth)
    return {
        "circle_score": float(lag_depth.max()),
        "circle_period": float(bottoms(lag_depth)[0]) if lag_depth.max() > 0 else 0.0,
        "mirror_score": float(turn_depth.max()),
        "mirror_period": float(np.median(np.diff(turns))) if len(turns) > 1 else 0.0,  # two turns, in half frames
    }


def bottoms(depth: np.ndarray) -> np.ndarray:
    """Return the bottoms of valleys about as deep as the deepest, at least `SHORTEST_LAG` entries apart."""
    deep = np.flatnonzero((depth > 0) & (depth >= SAME_DEPTH * depth.max()))
    around = [slice(max(0, i - SHORTEST_LAG), i + SHORTEST_LAG + 1) for i in deep]
    return np.array([i for i, near in zip(deep, around, strict=True) if near.start + depth[near].argmax() == i], int)


def compare_loops(real: Rows, fake: Rows, options: ProbeOptions) -> dict[str, Any]:
    """Return the share of generated videos that repeat themselves more than 99 % of real ones do, with periods."""
    lengths = int(real.values[0, 4]), int(fake.values[0, 4])
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"loop_rate compares videos of one length, but the real ones have {lengths[0]} and the generated ones "
            f"{lengths[1]} frames: cut both to {min(lengths)}"
        )
    kinds = ("circle", "mirror")
    scores = [rows.values[:, [0, 2]] for rows in (real, fake)]
    limits = np.quantile(scores[0], REAL_QUANTILE, axis=0)
    above = scores[1] > limits
    repeats = np.column_stack([above.any(axis=1), above]).astype(float)  # (N, 3)
    variances = jackknife_variance(lambda values: values.mean(axis=0), fake.of(repeats))
    keys = ("loop_rate", "loop_rate_circle", "loop_rate_mirror")
    share = np.linspace(0, 1, 101)
    charts = [
        chart(
            f"Depth of repeats, {title}",
            "share of videos",
            [
                line(label, share, np.quantile(side[:, i], share))
                for label, side in (("generated", scores[1]), ("real", scores[0]))
            ],
            limits=[0, 1],
            guide=float(limits[i]),
        )
        for i, title in enumerate(("circles", "there and back"))
    ]
    result = {
        "results": dict(zip(keys, repeats.mean(axis=0).tolist(), strict=True)),
        "errors": dict(zip(keys, np.sqrt(variances).tolist(), strict=True)),
        "floors": {"loop_rate": float((scores[0] > limits).any(axis=1).mean())},
        "limits": dict(zip(kinds, limits.tolist(), strict=True)),
        "repeating_videos": [
            {"video": i, "kind": kind, "score": float(row[2 * k]), "period": float(row[2 * k + 1]) or None}
            for k, kind in enumerate(kinds)
            for i, row in enumerate(fake.values)
            if above[i, k]
        ],
        "curves": charts,
        "protocol": {
            "num_frames": lengths[0],
            "thumbnails": f"{THUMBNAIL[0]}x{THUMBNAIL[1]} area means without the mean colour",
            "shortest_lag": SHORTEST_LAG,
            "repeat": f"depth above the {REAL_QUANTILE:.0%} quantile of real videos, of circles or of mirrors",
        },
    }
    if len(real) < ENOUGH_REAL:
        result["warning"] = (
            f"the {REAL_QUANTILE:.0%} quantile was taken from {len(real)} real videos, fewer than {ENOUGH_REAL}, so "
            "it is about their largest value"
        )
    return result


MEASURES = (Measure("loop_rate", ThumbnailProbe, compare_loops),)
