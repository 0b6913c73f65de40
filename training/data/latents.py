"""Read latent shards, which hold the latents of a dataset's clips before quantization, encoded by a tokenizer.

Layout: `<root>/latents-<first 12 hex digits of the tokenizer's SHA-256>/<shard>.zip` as `training.data.grids`
describes, with arrays float16 (T, C, h, w). The manifest also gives the mean and the standard deviation of each channel
over all clips, which are computed from the moments of each partition.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dnnlib.json_file import JsonError, listed, number, record, whole
from training.data.description import MAX_EDGE
from training.data.grids import GridKind, GridManifest, GridStore

DTYPE = np.dtype("<f2")
LATENTS = GridKind("latents", "latents", DTYPE, " --latents")
MAX_CHANNELS = MAX_EDGE
MAX_VALUE = 1e30  # of moments


@dataclass(frozen=True)
class Moments:
    """The moments of each of C channels: number of values, mean (C,), and sum of squared deviations (C,)."""

    count: int
    mean: np.ndarray
    squares: np.ndarray

    @staticmethod
    def none(channels: int) -> "Moments":
        """Return the moments of no values."""
        return Moments(0, np.zeros(channels), np.zeros(channels))

    @staticmethod
    def of(values: np.ndarray) -> "Moments":
        """Return the moments of latents (T, C, h, w)."""
        flat = np.moveaxis(values.astype(np.float64), 1, 0).reshape(values.shape[1], -1)  # (C, T*h*w)
        if not flat.size:
            return Moments.none(len(flat))
        mean = flat.mean(1)
        return Moments(flat.shape[1], mean, np.square(flat - mean[:, None]).sum(1))

    def __add__(self, other: "Moments") -> "Moments":
        """Return the moments of both sets of values together (Chan et al. 1983)."""
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        shift = other.mean - self.mean
        squares = self.squares + other.squares + np.square(shift) * (self.count * other.count / count)
        return Moments(count, self.mean + shift * (other.count / count), squares)

    @property
    def std(self) -> np.ndarray:
        """Return the standard deviation of each channel: (C,)."""
        return np.sqrt(self.squares / max(self.count, 1))

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self.squares.tolist()}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "Moments":
        """Return the moments that `to_json` described."""
        return Moments(content["count"], np.array(content["mean"]), np.array(content["squares"]))


def statistics(partitions: Iterable[Mapping[str, Any]], channels: int) -> dict[str, list[float]]:
    """Return "mean" and "std" of each channel over partitions of a manifest."""
    total = Moments.none(channels)
    for entry in partitions:
        total = total + Moments.from_json(entry["moments"])
    return {"mean": total.mean.tolist(), "std": total.std.tolist()}


# ----------------------------------------------------------------------------
# The manifest and the shards.


_numbers = listed(number(-MAX_VALUE, MAX_VALUE))


@dataclass(frozen=True)
class LatentsManifest(GridManifest):
    """The manifest of latent shards."""

    channels: int
    mean: tuple[float, ...]  # of each channel, over all partitions that are made
    std: tuple[float, ...]

    kind = LATENTS
    checks = {"channels": whole(1, MAX_CHANNELS), "mean": _numbers, "std": _numbers}
    partition_checks = {"moments": record({"count": whole(0, 1 << 62), "mean": _numbers, "squares": _numbers})}

    @property
    def step_shape(self) -> tuple[int, ...]:
        """See `GridManifest.step_shape`."""
        return (self.channels, *self.grid)

    def check(self) -> None:
        """See `GridManifest.check`."""
        lists = {"mean": self.mean, "std": self.std}
        for index, entry in self.partitions.items():
            lists |= {f"{name} of partition {index}": entry["moments"][name] for name in ("mean", "squares")}
        for name, values in lists.items():
            if len(values) != self.channels:
                raise JsonError(
                    f"has {len(values)} numbers as {name}, expected one for each of {self.channels} channels"
                )

    def facts(self) -> dict[str, Any]:
        """See `GridManifest.facts`."""
        return {name: value for name, value in super().facts().items() if name not in ("mean", "std")}


class LatentStore(GridStore[LatentsManifest]):
    """The latents of all clips of a dataset: float16 (T, C, h, w) a clip. See `GridStore`."""

    Manifest = LatentsManifest

    @property
    def channels(self) -> int:
        """Return the number of channels."""
        return self.manifest.channels

    @property
    def mean(self) -> tuple[float, ...]:
        """Return the mean of each channel."""
        return tuple(self.manifest.mean)

    @property
    def std(self) -> tuple[float, ...]:
        """Return the standard deviation of each channel."""
        return tuple(self.manifest.std)

    def check_values(self, values: np.ndarray) -> str:
        """See `GridStore.check_values`."""
        return "" if np.isfinite(values).all() else "they are not finite"
