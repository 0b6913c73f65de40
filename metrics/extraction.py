"""Run the batches of one side through detectors: features of clips for every request, probes of long videos.

The next batch is made or read in a thread while detectors work on the last one. Ranks work on their own items and meet
every few seconds, so an error on one of them ends all of them at once, with its message.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dnnlib.util import format_time
from metrics.detectors import preprocess
from metrics.families import ClipShape
from metrics.frechet import FeatureStats
from metrics.jackknife import NUM_GROUPS, group_videos
from metrics.samplers import ItemBatch
from torch_utils import distributed

KEEP_BYTES = 512 << 20  # of features of one side; of more only their statistics are kept, where these are enough
REDUCED_ROWS = 65536  # of features that are merged over the ranks at a time
FRAMES_AT_ONCE = 64  # of one pass through a detector of clips, and of one batch of clips unless it is given
ROUND_SEC = 5.0  # after which the ranks meet
REPORT_INTERVAL_SEC = 10.0

Progress = Callable[[str, int, int], None]  # "real" or "generated", clips done, clips in all


@dataclass(frozen=True)
class FeatureRequest:
    """Features that one side must give: of which frames, how many, by which detector.

    Where prompts are windows of footage, `past` and `future` frames of a window come before and after the new frames of
    the clip. The output "pairs" are the values of each frame, compared with that of the original; "frames" are features
    of each frame of a clip by itself.
    """

    # "clips", or of footage also "all" frames, "some", "continuations" of prompts, "others" (the continuations of other
    # prompts), or "copies" (the last frame before the continuation, repeated).
    frames: str
    shape: ClipShape
    num_items: int
    detector: str
    output: str
    past: int = 0
    future: int = 0

    @property
    def is_frame(self) -> bool:
        """Return whether an item is a single frame, of no clip."""
        return self.shape.num_frames == 1 and self.output not in ("pairs", "frames")

    @property
    def rows(self) -> int:
        """Return the number of feature vectors of an item."""
        return self.shape.num_frames if self.output == "frames" else 1

    @property
    def window_span(self) -> int:
        """Return the number of frames of a window."""
        return self.past + self.shape.new_span + self.future


class Printer:
    """Prints progress and the time left, at most once in ten seconds a side, and when a side is complete."""

    def __init__(self) -> None:
        self.begin = time.monotonic()
        self.side = ""
        self.last = self.begin

    def __call__(self, side: str, num_done: int, num_items: int) -> None:
        now = time.monotonic()
        if side != self.side:
            self.side, self.begin = side, self.last
        side += " videos" if side.startswith("long") else " clips"
        if num_done == num_items:
            self._say(f"{num_done} of {num_items} {side} in {format_time(now - self.begin)}")
            self.last = now
        elif now - self.last >= REPORT_INTERVAL_SEC:
            left = (now - self.begin) / num_done * (num_items - num_done)
            self._say(f"{num_done} of {num_items} {side}, {format_time(left)} left")
            self.last = now

    def _say(self, text: str) -> None:
        distributed.print0(text, file=sys.stderr)


class Features:
    """The features of one request, collected batch by batch.

    `values` are float32 (R, d), whole on rank 0 after `merge`; where there are too many to keep they are None, and
    `stats` has their sums by groups of videos. `videos` (R,) says which video each was taken from, `weights` (R,) what
    it counts. An item has `request.rows` of the R rows, and in `colours` (N, 4) the mean red, green, blue and the
    maximum of its first frame. `is_whole` keeps all values, however many they are.
    """

    def __init__(
        self, request: FeatureRequest, videos: Sequence[int], weights: np.ndarray | None = None, is_whole: bool = False
    ) -> None:
        self.request = request
        self.videos = np.repeat(np.asarray(videos), request.rows)
        self.weights = weights
        self.is_whole = is_whole
        self.colours = np.zeros((len(videos), 4), np.float32)
        self.values: Tensor | None = None
        self.stats: FeatureStats | None = None
        self.num_different: int | None = None  # clips that the footage has; None where they never repeat
        self.num_stored = 0  # items that were in the cache
        self.num_groups = min(NUM_GROUPS, len(np.unique(self.videos)))
        self.groups = group_videos(self.videos, self.num_groups)

    def __len__(self) -> int:
        return len(self.colours)

    def _allocate(self, num_features: int) -> None:
        """Make room for values, or begin their sums, unless that is done."""
        if self.values is None and self.stats is None:
            if self.is_whole or len(self.videos) * num_features * 4 <= KEEP_BYTES:
                self.values = torch.zeros(len(self.videos), num_features)
            else:
                self.stats = FeatureStats(num_features, self.num_groups)

    def add(self, items: list[int], features: Tensor, colours: np.ndarray) -> None:
        """Add features (N rows, d) and colours (N, 4) of N items."""
        features = features.float().cpu()
        self._allocate(features.shape[1])
        self.colours[items] = colours
        each = self.request.rows
        rows = (np.asarray(items)[:, None] * each + np.arange(each)).ravel()
        if self.values is not None:
            self.values[rows] = features
        else:
            assert self.stats is not None, "one of both was begun"
            weights = None if self.weights is None else self.weights[rows]
            self.stats.append(features, weights, self.groups[rows])

    def merge(self, device: torch.device) -> None:
        """Merge the features of all ranks."""
        num_features = 0
        for known in (self.values, self.stats and self.stats.mean):
            num_features = num_features if known is None else known.shape[-1]
        total = distributed.all_reduce_sum(torch.tensor([num_features, num_features > 0], device=device)).tolist()
        self._allocate(total[0] // total[1])
        colours = torch.from_numpy(self.colours)
        each = self.request.rows
        for tensor, rows in [(colours, 1)] if self.values is None else [(colours, 1), (self.values, each)]:
            for part in tensor[self.num_stored * rows :].split(REDUCED_ROWS):
                part[:] = distributed.all_reduce_sum(part.to(device)).cpu()
        if self.stats is not None:
            self.stats.reduce(device)

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take stored features, as far as they are wanted; sums are of use only if they are of the very items."""
        num_stored, num_items = len(arrays["colours"]), len(self)
        if "values" not in arrays:
            if num_stored == num_items and not self.is_whole:
                self.colours[:] = arrays["colours"]
                self.stats, self.num_stored = FeatureStats.from_arrays(dict(arrays)), num_items
            return
        num_features, num_rows = arrays["values"].shape[1], len(self.videos)
        if num_stored < num_items and not self.is_whole and num_rows * num_features * 4 > KEEP_BYTES:
            return
        num_stored, values = min(num_stored, num_items), torch.zeros(num_rows, num_features)
        self.colours[:num_stored] = arrays["colours"][:num_stored]
        stored_rows = num_stored * self.request.rows
        values[:stored_rows] = torch.from_numpy(arrays["values"][:stored_rows])
        self.values, self.num_stored = values, num_stored

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays to be stored."""
        if self.values is not None:
            return {"values": self.values.numpy(), "colours": self.colours}
        assert self.stats is not None, "features were merged"
        return {**self.stats.arrays(), "colours": self.colours}


# ----------------------------------------------------------------------------
# One pass over a side.


def run(batches: Iterable[ItemBatch], take: Callable[[ItemBatch], None], device: torch.device) -> None:
    """Call `take` with each batch of this rank. An error on any rank is raised on every one, within seconds."""
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
    """Iterate without gradients; the next item is made in a thread while the last one is in use.

    On a CPU whose cores either of the two keeps busy by itself there is no thread: both would only wait.
    """

    def __init__(self, items: Iterable[ItemBatch], device: torch.device) -> None:
        self.items, self.device = iter(items), device

    def __enter__(self) -> Iterator[ItemBatch]:
        self.pool = ThreadPoolExecutor(1)
        is_busy = self.device.type == "cpu" and 2 * torch.get_num_threads() > (os.cpu_count() or 1)
        return iter(self._next, None) if is_busy else self._ahead()

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def _ahead(self) -> Iterator[ItemBatch]:
        future = self.pool.submit(self._next)
        while (item := future.result()) is not None:
            future = self.pool.submit(self._next)
            yield item

    def _next(self) -> ItemBatch | None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a thread begins on the first GPU
        with torch.no_grad():
            return next(self.items, None)


def at_once(num_frames: int) -> int:
    """Return how many clips of so many frames are computed together."""
    return max(1, FRAMES_AT_ONCE // num_frames)


class Extractor:
    """Extracts features from each batch for all requests; a detector's features of a shape are made once."""

    def __init__(self, wanted: Sequence[Features], detectors: Mapping[str, Any], device: torch.device) -> None:
        self.wanted = sorted(wanted, key=lambda features: features.request.output)  # features before logits
        self.detectors, self.device = detectors, device

    def add(self, batch: ItemBatch) -> None:
        """Extract the features of a batch's clips."""
        colours = {shape: _colours(video) for shape, video in batch.clips.items()}
        made: dict[tuple[ClipShape, str, str], Tensor] = {}
        for features in self.wanted:
            count = sum(features.num_stored <= item < len(features) for item in batch.items)
            shape, name, output = features.request.shape, features.request.detector, features.request.output
            if not count or shape not in batch.clips:
                continue
            skip = sum(item < features.num_stored for item in batch.items)
            part = slice(skip, skip + count)
            if (shape, name, output) not in made:
                if output == "pairs":
                    values = self.detectors[name].compare(batch.clips[shape], batch.originals[shape])
                elif output == "frames":
                    values = self.detectors[name].features(batch.clips[shape].transpose(1, 2).flatten(0, 1))
                else:
                    before = made.get((shape, name, "features"))
                    values = self._extract(self.detectors[name], output, batch.clips[shape], before)
                made[shape, name, output] = values
            rows = slice(part.start * features.request.rows, part.stop * features.request.rows)
            features.add(batch.items[part], made[shape, name, output][rows], colours[shape][part])

    def _extract(self, detector: Any, output: str, clips: Tensor, features: Tensor | None) -> Tensor:
        """Return (N, d) of uint8 (N, 3, T, H, W); a single frame is an image."""
        if output == "logits" and features is not None and hasattr(detector, "logits_of"):
            return detector.logits_of(features)
        extract = getattr(detector, output)
        if clips.shape[2] == 1:
            return extract(clips[:, :, 0])
        # The activations of several clips leave a processor's caches, so there one at a time is faster.
        size = 1 if self.device.type == "cpu" else at_once(clips.shape[2])
        return torch.cat([extract(part) for part in clips.split(size)])


def _colours(clips: Tensor) -> np.ndarray:
    frame = clips[:, :, 0].flatten(2)  # (N, 3, pixels)
    means, highest = frame.float().mean(dim=2), frame.amax(dim=[1, 2]).float()
    return torch.cat([means, highest[:, None]], dim=1).cpu().numpy()
