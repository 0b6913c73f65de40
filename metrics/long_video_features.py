"""Measures of long videos from feature networks: similarity of frames by lag, and drift of quality over time."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from metrics import checks
from metrics.frechet import frechet_distance_from_features
from metrics.kernel import polynomial_distance
from metrics.long_video_base import (
    Measure,
    ProbeOptions,
    Rows,
    chart,
    curve_gap,
    jackknife_error,
    line,
    slope_per_100,
)

LAGS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
IMAGES_AT_ONCE = 32
FRAME_DETECTOR, CLIP_DETECTOR, MOTION_DETECTOR = "efficientnet-lite0", "i3d-kinetics-400", "efficientnet-lite0-motion"


# ----------------------------------------------------------------------------
# Feature similarity: how fast frames become dissimilar.


class SimilarityProbe:
    """Rows of (number of lags,): mean cosine of the features of frames that far apart; NaN where there are none."""

    def __init__(self, options: ProbeOptions, side: str) -> None:
        self.detector = options.open(FRAME_DETECTOR)
        self.lags = options.lags or LAGS
        self.held: np.ndarray | None = None  # (N, up to the longest lag, d), of length one
        self.totals, self.counts = np.zeros(len(self.lags)), np.zeros(len(self.lags))

    def add(self, chunk: np.ndarray) -> None:
        """See `Probe`."""
        images = chunk.reshape(-1, *chunk.shape[2:]).transpose(0, 3, 1, 2)  # (N T, 3, H, W)
        pieces = [images[i : i + IMAGES_AT_ONCE] for i in range(0, len(images), IMAGES_AT_ONCE)]
        features = np.concatenate([_features(self.detector, piece) for piece in pieces])
        features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        features = features.reshape(*chunk.shape[:2], -1)
        held = features if self.held is None else np.concatenate([self.held, features], axis=1)
        new = held.shape[1] - chunk.shape[1]  # the first frame that was not there before
        totals = np.zeros((len(held), len(self.lags)))
        for i, lag in enumerate(self.lags):
            later = held[:, max(new, lag) :]
            earlier = held[:, max(new, lag) - lag : held.shape[1] - lag] if later.shape[1] else later
            totals[:, i] = np.einsum("ntd,ntd->n", later, earlier)
            self.counts[i] += later.shape[1]
        self.totals = self.totals + totals
        self.held = held[:, -max(self.lags) :]

    def finish(self) -> np.ndarray:
        """See `Probe`."""
        return np.where(self.counts, self.totals / np.maximum(self.counts, 1), np.nan)


def compare_similarity(real: Rows, fake: Rows, options: ProbeOptions) -> dict[str, Any]:
    """Return the two curves over lags, and their mean absolute difference."""
    seen = np.isfinite(real.values[0]) & np.isfinite(fake.values[0])
    if not seen.any():
        raise ValueError("no two frames are as far apart as the shortest lag: give longer videos or shorter lags")
    lags = np.array(options.lags or LAGS)[seen]
    real, fake = (rows.of(rows.values[:, seen]) for rows in (real, fake))
    lines = [
        line(label, lags, rows.values.mean(axis=0), rows.values.std(axis=0, ddof=1))
        for label, rows in (("generated", fake), ("real", real))
    ]
    detector = options.open(FRAME_DETECTOR)
    return {
        "results": {"feature_similarity_gap": curve_gap(real.values, fake.values)},
        "errors": {"feature_similarity_gap": float(jackknife_error(curve_gap, real, fake))},
        "floors": {"feature_similarity_gap": curve_gap(*real.halves())},
        "curves": [chart("Feature similarity", "lag in frames", lines, band="std over videos", log_x=True)],
        "protocol": {
            "lags": lags.tolist(),
            "similarity": "mean cosine of the features of all pairs of frames at a lag",
            "gap": "mean over lags of |mean generated - mean real|",
        },
        "detector": detector.identity,
    }


# ----------------------------------------------------------------------------
# Drift: the distance of clips that begin at frame s from the same real clips, over s. As many clips at every s, one a
# video on either side, so that what a small sample adds to a distance is the same everywhere.


class WindowProbe:
    """Rows of (number of clips, d): features of the clips of generated videos, of the first clip of real ones."""

    def __init__(self, options: ProbeOptions, side: str, detector: str) -> None:
        self.detector = options.open(detector)
        self.window, self.stride = options.window, options.stride
        self.most = 1 if side == "real" else math.inf
        self.held: np.ndarray | None = None
        self.skip = 0  # frames to come before the next clip begins
        self.features: list[np.ndarray] = []

    def add(self, chunk: np.ndarray) -> None:
        """See `Probe`."""
        held = chunk if self.held is None else np.concatenate([self.held, chunk], axis=1)
        while held.shape[1] >= self.skip + self.window and len(self.features) < self.most:
            clip = held[:, self.skip : self.skip + self.window]
            self.features.append(_features(self.detector, clip.transpose(0, 4, 1, 2, 3)))
            self.skip += self.stride
        drop = min(self.skip, held.shape[1])
        self.held, self.skip = held[:, drop:].copy(), self.skip - drop

    def finish(self) -> np.ndarray:
        """See `Probe`."""
        if not self.features:
            raise ValueError(f"the videos are shorter than a clip of {self.window} frames: give longer ones")
        return np.stack(self.features, axis=1)


def compare_drift(
    real: Rows, fake: Rows, options: ProbeOptions, name: str, detector: str, distance: Callable[..., float]
) -> dict[str, Any]:
    """Return the curve over the first frame of the clip, its slope per 100 frames, and its ends."""
    has_no_bias = distance is polynomial_distance
    if not has_no_bias:
        distance = functools.partial(distance, is_unbiased=options.is_unbiased)
    starts = options.stride * np.arange(fake.values.shape[1])
    if len(starts) < 3:
        raise ValueError(
            f"{name} was asked for {len(starts)} clips a video, but a slope with an error needs at least 3: give "
            f"videos of at least {options.window + 2 * options.stride} frames"
        )

    def statistic(real: np.ndarray, fake: np.ndarray) -> np.ndarray:
        """Return slope, first, last, then the whole curve."""
        curve = np.array([distance(real[:, 0], fake[:, i]) for i in range(len(starts))])
        return np.concatenate([[slope_per_100(starts, curve), curve[0], curve[-1]], curve])

    values, errors = statistic(real.values, fake.values), jackknife_error(statistic, real, fake)
    lines = [line("generated", starts, values[3:], errors[3:])]
    names = [f"{name}_{part}" for part in ("slope", "first", "last")]
    network = options.open(detector)
    own = [distance(fake.values[:, 0], fake.values[:, i]) for i in range(1, len(starts))]
    title = name.removesuffix("_drift").upper()
    warning = None if has_no_bias else checks.size_warning(name, len(real), len(fake))
    halves = [half[:, 0] for half in real.halves()]
    floors = dict.fromkeys(names[1:], distance(*halves)) if min(map(len, halves)) > 1 else {}
    return {
        **({"warning": warning} if warning else {}),
        "results": dict(zip(names, values[:3].tolist(), strict=True)),
        "errors": dict(zip(names, errors[:3].tolist(), strict=True)),
        "floors": floors,
        "curves": [
            chart(f"{title} of clips from here on", "first frame", lines, band="standard error"),
            chart(f"{title} from the first clips of all videos", "first frame", [line("generated", starts[1:], own)]),
        ],
        "protocol": {
            "window": options.window,
            "stride": options.stride,
            "real_clips": "the first of each video, the same for every first frame",
            "slope": "least squares, per 100 frames",
            "errors": "delete-a-group jackknife over videos of both sides",
            "floors": "two halves of the real clips",
            **({} if has_no_bias else {"covariance": "N - 1" if options.is_unbiased else "N"}),
        },
        "detector": network.identity,
    }


def _drift(name: str, detector: str, distance: Callable[..., float], probe: Callable[..., Any]) -> Measure:
    compare = functools.partial(compare_drift, name=name, detector=detector, distance=distance)
    return Measure(name, probe, compare, detector, needs_real_clips=True)


def _features(detector: Any, video: np.ndarray) -> np.ndarray:
    """Return float32 (N, d) of uint8 images or clips, channels first."""
    return detector.features(torch.from_numpy(np.ascontiguousarray(video))).float().cpu().numpy()


_clip_probe = functools.partial(WindowProbe, detector=CLIP_DETECTOR)
MEASURES = (
    Measure("feature_similarity", SimilarityProbe, compare_similarity, FRAME_DETECTOR),
    _drift("fvd_drift", CLIP_DETECTOR, frechet_distance_from_features, _clip_probe),
    _drift("kvd_drift", CLIP_DETECTOR, polynomial_distance, _clip_probe),
    _drift(
        "fmd_drift",
        MOTION_DETECTOR,
        frechet_distance_from_features,
        functools.partial(WindowProbe, detector=MOTION_DETECTOR),
    ),
)
