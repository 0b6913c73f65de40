"""Revisit consistency: where a walk comes back to a pose, is the view the same as before?

Poses are those of the recorded walks: x, y and the angle of each frame. Two frames of a video are a revisit if their
poses are near and the walk has been elsewhere in between. Each revisit is compared with a pair of frames of the same
video that are as far apart in time, of which the second shows a place that is new: without memory a model gives both
the same distance, and a frozen video does, too. The difference of the two is the measure.

Generated rollouts follow the recorded actions, so that the recorded poses are theirs as long as they obey. A rollout in
which a wall stands elsewhere than in the recorded maze leaves the recorded way; its value is then that of no memory.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from metrics import paired
from metrics.families import LPIPS_ALEX, PSNR, SSIM
from metrics.footage_streams import POSES, poses_of
from metrics.long_video_base import GroupStreams, Measure, ProbeOptions, Rows, chart, jackknife_variance, line
from metrics.there_and_back import short
from training.random import random_state

NEAR_UNITS, NEAR_DEG = 16.0, 10.0  # of a revisit; an eighth of a tile of LabDoom
AWAY = 4.0  # a pose is elsewhere if it is so many times as far away, by distance or by angle
MOST_PAIRS = 32  # of each kind in a video
BINS = (1, 16, 32, 64, 128, 256, 512)  # frames apart, of the curve


# ----------------------------------------------------------------------------
# Pairs.


def pose_distance(poses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return distances in map units and in degrees between all poses (T, 3) of x, y, angle: (T, T), twice."""
    place, angle = poses[:, :2], poses[:, 2]
    units = np.linalg.norm(place[:, None] - place[None], axis=2)
    degrees = np.abs((angle[:, None] - angle[None] + 180) % 360 - 180)
    return units, degrees


def find_pairs(poses: np.ndarray, item: int) -> tuple[np.ndarray, np.ndarray]:
    """Return revisits, and for each a pair as far apart in time that is none: int64 (P, 2), twice.

    `poses` are (T, 3) of x, y in map units and the angle in degrees. Frames i < j are a revisit if they are within 16
    units and 10 degrees of one another, and some frame between them is four times as far from frame j, by either. The
    second frame of a novel pair is four times as far from every frame before it that is not of the same stay. At most
    32 of each, drawn by the number of the video; fewer where no novel pair is as far apart in time.
    """
    units, degrees = pose_distance(np.asarray(poses, float))
    near = (units <= NEAR_UNITS) & (degrees <= NEAR_DEG)
    away = (units >= AWAY * NEAR_UNITS) | (degrees >= AWAY * NEAR_DEG)
    num_frames = len(poses)
    revisits: list[tuple[int, int]] = []
    is_new = np.zeros(num_frames, bool)
    for j in range(1, num_frames):
        elsewhere = np.flatnonzero(away[j, :j])
        left = int(elsewhere[-1]) if len(elsewhere) else 0  # the last frame elsewhere before j
        before = np.flatnonzero(near[j, :left])
        revisits += [(int(i), j) for i in before]
        is_new[j] = len(elsewhere) > 0 and bool(away[j, : left + 1].all())
    random = random_state("revisit-pairs", 0, item)
    chosen, novel = [], []
    for place in random.permutation(len(revisits)):
        i, j = revisits[place]
        ends = np.flatnonzero(is_new[j - i :]) + j - i
        ends = ends[away[ends, ends - (j - i)]] if len(ends) else ends
        if len(ends):
            end = int(ends[random.randint(len(ends))])
            chosen.append((i, j))
            novel.append((end - (j - i), end))
        if len(chosen) == MOST_PAIRS:
            break
    return np.array(chosen, np.int64).reshape(-1, 2), np.array(novel, np.int64).reshape(-1, 2)


# ----------------------------------------------------------------------------
# Probe. Rows are (2, comparisons + 1, bins): sums of each comparison, and the number, of revisits and of novel pairs.


class RevisitProbe:
    """Compare frames of equal pose, and of new ones; only frames of chosen pairs are kept."""

    def __init__(self, options: ProbeOptions, side: str, comparisons: Sequence[str]) -> None:
        self.comparisons = [
            paired.open_comparison(name, options.device, options.detector_paths.get(name)) for name in comparisons
        ]
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self.wanted: list[set[int]] = []
        self.kept: list[dict[int, np.ndarray]] = []
        self.num_frames = 0

    def begin(self, streams: GroupStreams) -> None:
        """See `StreamProbe`. Raises `ValueError` for poses other than x, y and angle."""
        poses = poses_of(streams)
        self.pairs = [find_pairs(row, item) for row, item in zip(poses, streams.items, strict=True)]
        self.wanted = [{int(frame) for kind in both for frame in kind.ravel()} for both in self.pairs]
        self.kept = [{} for _ in self.pairs]

    def add(self, chunk: np.ndarray) -> None:
        """See `Probe`."""
        for video, wanted, kept in zip(chunk, self.wanted, self.kept, strict=True):
            for place, frame in enumerate(video, start=self.num_frames):
                if place in wanted:
                    kept[place] = frame.copy()
        self.num_frames += chunk.shape[1]

    def finish(self) -> np.ndarray:
        """See `Probe`."""
        sums = np.zeros((len(self.pairs), 2, len(self.comparisons) + 1, len(BINS)))
        for number, (both, kept) in enumerate(zip(self.pairs, self.kept, strict=True)):
            for kind, pairs in enumerate(both):
                if not len(pairs):
                    continue
                bins = np.searchsorted(BINS[1:], pairs[:, 1] - pairs[:, 0], side="right")
                first, second = (
                    torch.from_numpy(np.stack([kept[int(frame)] for frame in pairs[:, side]])).permute(3, 0, 1, 2)[None]
                    for side in (0, 1)
                )
                for place, comparison in enumerate(self.comparisons):
                    np.add.at(sums[number, kind, place], bins, comparison.compare(first, second).numpy()[0])
                np.add.at(sums[number, kind, -1], bins, 1)
        return sums


# ----------------------------------------------------------------------------
# Results.


def compare_revisits(
    real: Rows, fake: Rows, options: ProbeOptions, name: str, comparisons: Sequence[str]
) -> dict[str, Any]:
    """Return the mean of each comparison over revisits, and its difference to that of novel pairs.

    Videos without a revisit do not count. Raises `ValueError` if there are no revisits at all.
    """
    kept = {}
    for side, rows in (("real", real), ("generated", fake)):
        has_any = rows.values[:, 0, -1].sum(axis=1) > 0
        if has_any.sum() < 2:
            raise ValueError(
                f"{int(has_any.sum())} of {len(rows)} {side} videos come back to a place, and {name} needs two: "
                "measure longer videos (--num-frames), more of them (--num-videos), or footage of --walker=person"
            )
        kept[side] = Rows(rows.values[has_any], rows.videos[has_any])

    def statistic(values: np.ndarray) -> np.ndarray:
        """Return the means of revisits, then their differences to novel pairs."""
        totals = values.sum(axis=(0, 3))  # (2, comparisons + 1)
        means = totals[:, :-1] / totals[:, -1:]
        return np.concatenate([means[0], means[0] - means[1]])

    keys = [f"{name}_{short(item)}{end}" for end in ("", "_difference") for item in comparisons]
    values = {side: statistic(rows.values) for side, rows in kept.items()}
    error = np.sqrt(jackknife_variance(statistic, kept["generated"]))
    curves = []
    for place, item in enumerate(comparisons):
        lines = []
        for side, rows in kept.items():
            for kind, what in enumerate(("revisits", "novel pairs")):
                totals = rows.values[:, kind].sum(axis=0)  # (comparisons + 1, bins)
                seen = totals[-1] > 0
                lines.append(line(f"{side}, {what}", np.array(BINS)[seen], totals[place, seen] / totals[-1, seen]))
        curves.append(chart(f"{paired.TITLES[item]} of revisits", "frames apart, at least", lines, log_x=True))
    return {
        "results": dict(zip(keys, values["generated"].tolist(), strict=True)),
        "errors": dict(zip(keys, error.tolist(), strict=True)),
        "floors": dict(zip(keys, values["real"].tolist(), strict=True)),
        "facts": {
            f"{name}_pairs": int(kept["generated"].values[:, 0, -1].sum()),
            f"{name}_videos": len(kept["generated"]),
        },
        "curves": curves,
        "protocol": {
            "revisit": f"poses within {NEAR_UNITS:g} map units and {NEAR_DEG:g} degrees, having been {AWAY:g} times as "
            "far in between",
            "novel": f"pairs as far apart in time whose later pose is {AWAY:g} times as far from all before it",
            "pairs": f"at most {MOST_PAIRS} of each kind in a video",
            "difference": "mean of revisits - mean of novel pairs; 0 without memory",
            "floors": "recorded videos, which remember everything",
        },
    }


def _measure(name: str, comparisons: tuple[str, ...]) -> Measure:
    return Measure(
        name,
        functools.partial(RevisitProbe, comparisons=comparisons),
        functools.partial(compare_revisits, name=name.removesuffix("_lpips"), comparisons=comparisons),
        streams=(POSES,),
        detector=LPIPS_ALEX if LPIPS_ALEX in comparisons else None,
    )


MEASURES = (_measure("revisit", (PSNR, SSIM)), _measure("revisit_lpips", (LPIPS_ALEX,)))
