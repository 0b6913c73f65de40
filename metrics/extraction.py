"""One pass over the batches of one side: features of clips for every request, probes of long videos, all ranks in step.

The next batch is made or read in a thread while the last one is looked at. Ranks work on their own items and meet every
few seconds, so that what goes wrong on one of them ends all of them at once, with its message.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metrics.detectors import preprocess
from metrics.frechet import FeatureStats
from metrics.jackknife import NUM_GROUPS, group_videos
from metrics.samplers import Batch, ClipShape
from torch_utils import distributed

KEEP_BYTES = 512 << 20  # of features of one side; of more only their statistics are kept, where these are enough
REDUCED_ROWS = 65536  # of features that are merged over the ranks at a time
ROUND_SEC = 5.0  # after which the ranks meet

Progress = Callable[[str, int, int], None]  # "real" or "generated", clips done, clips in all


@dataclass(frozen=True)
class Request:
    """Features that one side has to give: of which frames, how many, by which detector."""

    frames: str  # "clips", or of footage also "all" frames or "some"
    shape: ClipShape
    num_items: int
    detector: str
    output: str


@dataclass
class Features:
    """What a side gave."""

    values: Tensor | None  # float32 (N, d), whole on rank 0; None where there are too many to keep
    stats: FeatureStats | None  # where values are None: by groups of videos
    videos: np.ndarray  # (N,): which video each item was taken from
    weights: np.ndarray | None  # (N,)
    colours: np.ndarray  # (N, 4): mean red, green, blue, and the maximum, of the first frame of each item
    num_different: int | None = None  # clips that the footage has; None where they never repeat

    def __len__(self) -> int:
        return len(self.videos)


class Piece:
    """The features of one request as they come in. `is_whole` keeps all of them, however many they are."""

    def __init__(
        self, request: Request, videos: Sequence[int], weights: np.ndarray | None = None, is_whole: bool = False
    ) -> None:
        self.request = request
        self.videos = np.asarray(videos)
        self.weights = weights
        self.is_whole = is_whole
        self.colours = np.zeros((len(self.videos), 4), np.float32)
        self.values: Tensor | None = None
        self.stats: FeatureStats | None = None
        self.num_done = 0  # items that were there before
        self.num_groups = min(NUM_GROUPS, len(np.unique(self.videos)))
        self.groups = group_videos(self.videos, self.num_groups)

    def begin(self, num_features: int) -> None:
        """Make room for them, or begin their sums, unless that is done."""
        if self.values is None and self.stats is None:
            if self.is_whole or len(self.videos) * num_features * 4 <= KEEP_BYTES:
                self.values = torch.zeros(len(self.videos), num_features)
            else:
                self.stats = FeatureStats(num_features, self.num_groups)

    def add(self, items: list[int], features: Tensor, colours: np.ndarray) -> None:
        """Take in those of some items: (N, d) and (N, 4)."""
        features = features.float().cpu()
        self.begin(features.shape[1])
        self.colours[items] = colours
        if self.values is not None:
            self.values[items] = features
        else:
            assert self.stats is not None, "one of both was begun"
            weights = None if self.weights is None else self.weights[items]
            self.stats.append(features, weights, self.groups[items])

    def merge(self, device: torch.device) -> None:
        """Bring together what the ranks found."""
        num_features = 0
        for known in (self.values, self.stats and self.stats.mean):
            num_features = num_features if known is None else known.shape[-1]
        total = distributed.all_reduce_sum(torch.tensor([num_features, num_features > 0], device=device)).tolist()
        self.begin(total[0] // total[1])
        colours = torch.from_numpy(self.colours)
        for first in range(self.num_done, len(self.videos), REDUCED_ROWS):
            rows = slice(first, first + REDUCED_ROWS)
            for tensor in [colours] if self.values is None else [colours, self.values]:
                tensor[rows] = distributed.all_reduce_sum(tensor[rows].to(device)).cpu()
        if self.stats is not None:
            self.stats.reduce(device)

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over what was stored, as far as it is wanted; sums are of use only if they are of the very items."""
        num_stored, num_items = len(arrays["colours"]), len(self.videos)
        if "values" not in arrays:
            if num_stored == num_items and not self.is_whole:
                self.num_done, self.stats = num_items, FeatureStats.from_arrays(dict(arrays))
                self.colours[:] = arrays["colours"]
            return
        num_features = arrays["values"].shape[1]
        if num_stored < num_items and not self.is_whole and num_items * num_features * 4 > KEEP_BYTES:
            return
        self.num_done = min(num_stored, num_items)
        self.colours[: self.num_done] = arrays["colours"][: self.num_done]
        self.values = torch.zeros(num_items, num_features)
        self.values[: self.num_done] = torch.from_numpy(arrays["values"][: self.num_done])

    def arrays(self) -> dict[str, np.ndarray]:
        """All that is to be stored."""
        if self.values is not None:
            return {"values": self.values.numpy(), "colours": self.colours}
        assert self.stats is not None, "a finished piece"
        return {**self.stats.arrays(), "colours": self.colours}

    def features(self) -> Features:
        """What there is at the end."""
        return Features(self.values, self.stats, self.videos, self.weights, self.colours)


# ----------------------------------------------------------------------------------------------------------------------
# The pass.


def run(batches: Iterable[Batch], take: Callable[[Batch], None], device: torch.device) -> None:
    """Give each batch of this rank to `take`. What goes wrong on any rank is raised on every one, within seconds."""
    with preprocess.exact(device), _Ahead(batches, device) as stream:
        is_done = False
        while not is_done:
            with distributed.together():
                own_done, begin = False, time.monotonic()
                while not own_done and time.monotonic() - begin < ROUND_SEC:
                    batch = next(stream, None)
                    own_done = batch is None
                    if batch is not None:
                        take(batch)
            is_done = not distributed.any_rank([not own_done])[0]


class _Ahead:
    """An iterator whose next item is made in a thread while the last one is in use.

    Not so on a CPU whose cores one of the two keeps busy by itself: their threads would only wait for each other.
    """

    def __init__(self, items: Iterable[Batch], device: torch.device) -> None:
        self.items, self.device = iter(items), device

    def __enter__(self) -> Iterator[Batch]:
        self.pool = ThreadPoolExecutor(1)
        if self.device.type == "cpu" and 2 * torch.get_num_threads() > (os.cpu_count() or 1):
            return self.items
        return self._ahead()

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def _ahead(self) -> Iterator[Batch]:
        future = self.pool.submit(self._next)
        while (item := future.result()) is not None:
            future = self.pool.submit(self._next)
            yield item

    def _next(self) -> Batch | None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a thread begins on the first GPU
        with torch.no_grad():
            return next(self.items, None)


class Taker:
    """Gives the clips of each batch to all pieces that want them, each detector's features of a shape made once."""

    def __init__(self, pieces: Sequence[Piece], detectors: Mapping[str, Any], device: torch.device) -> None:
        self.pieces = sorted(pieces, key=lambda piece: piece.request.output)  # features before logits
        self.detectors, self.device = detectors, device

    def take(self, batch: Batch) -> None:
        """Let every piece have its features of the batch's clips."""
        colours = {shape: _colours(video) for shape, video in batch.clips.items()}
        made: dict[tuple[ClipShape, str, str], Tensor] = {}
        for piece in self.pieces:
            count = sum(piece.num_done <= item < len(piece.videos) for item in batch.items)
            shape, name, output = piece.request.shape, piece.request.detector, piece.request.output
            if not count or shape not in batch.clips:
                continue
            skip = sum(item < piece.num_done for item in batch.items)
            part = slice(skip, skip + count)
            if (shape, name, output) not in made:
                before = made.get((shape, name, "features"))
                made[shape, name, output] = self._extract(self.detectors[name], output, batch.clips[shape], before)
            piece.add(batch.items[part], made[shape, name, output][part], colours[shape][part])

    def _extract(self, detector: Any, output: str, clips: Tensor, features: Tensor | None) -> Tensor:
        """(N, d) of uint8 (N, 3, T, H, W); a single frame is an image."""
        if output == "logits" and features is not None and hasattr(detector, "logits_of"):
            return detector.logits_of(features)
        extract = getattr(detector, output)
        if clips.shape[2] == 1:
            return extract(clips[:, :, 0])
        # The activations of several clips leave a processor's caches, so there one at a time is faster.
        return torch.cat([extract(part) for part in clips.split(1 if self.device.type == "cpu" else len(clips))])


def _colours(clips: Tensor) -> np.ndarray:
    frame = clips[:, :, 0].flatten(2)  # (N, 3, pixels)
    means, highest = frame.float().mean(dim=2), frame.amax(dim=[1, 2]).float()
    return torch.cat([means, highest[:, None]], dim=1).cpu().numpy()
