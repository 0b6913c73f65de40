"""Replace the streams of a prompt, such as "actions", by values given by the user."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from training.contract import Size
from training.sampling import Prompt, Start


class StreamPrompt(Prompt):
    """A prompt whose streams are replaced by given values, of which entry i leads into frame i - past.

    `streams` are int (T,) or float (T, V). `num_values` limits a stream of ints to 0 ... num_values - 1, `sources`
    names the source of a stream in messages, such as its file. With `num_frames` the values must cover that many
    generated frames. Raises `ValueError` for values that are too few, out of range or not finite.
    """

    def __init__(
        self,
        prompt: Prompt,
        streams: Mapping[str, np.ndarray],
        past: int,
        num_frames: int | None = None,
        num_values: Mapping[str, int] | None = None,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        self.prompt, self.past, self.sources = prompt, past, dict(sources or {})
        self.streams = {name: np.asarray(values) for name, values in streams.items()}
        self.label, self.text, self.fps = prompt.label, prompt.text, prompt.fps
        for name, values in self.streams.items():
            _check_values(values, name, self._source(name), (num_values or {}).get(name))
            if num_frames is not None:
                self._check_length(name, num_frames)

    def frames(self, start: Start, count: int, size: Size) -> Tensor:
        """See `Prompt.frames`."""
        return self.prompt.frames(start, count, size)

    def stream(self, name: str, start: Start, count: int) -> Tensor:
        """See `Prompt.stream`."""
        if name not in self.streams:
            return self.prompt.stream(name, start, count)
        found = []
        for first in [start] if isinstance(start, int) else start:
            if first + self.past < 0:
                raise ValueError(
                    f"{self._source(name)} begins {self.past} frames before the video, but {-first} are needed: put "
                    f"the {name} of {-first - self.past} more frames before"
                )
            self._check_length(name, first + count)
            found.append(self.streams[name][first + self.past : first + self.past + count])
        return stream_tensor(np.stack(found))

    def padded_stream(self, name: str, start: Start, count: int) -> Tensor:
        """See `Prompt.padded_stream`."""
        if name not in self.streams:
            return self.prompt.padded_stream(name, start, count)
        found, values = [], self.streams[name]
        for first in [start] if isinstance(start, int) else start:
            first, stop = pad_range(first + self.past, count, len(values))
            found.append(pad_end(values[first:stop], count))
        return stream_tensor(np.stack(found))

    def close(self) -> None:
        """See `Prompt.close`."""
        self.prompt.close()

    def _source(self, name: str) -> str:
        return self.sources.get(name, f"--{name}")

    def _check_length(self, name: str, num_frames: int) -> None:
        found = len(self.streams[name])
        if found < self.past + num_frames:
            raise ValueError(
                f"{self._source(name)} has {name} for {found} frames, {self.past} for the context and {num_frames} for "
                "the video are needed: add some, or make a shorter video"
            )


def pad_range(start: int, count: int, length: int) -> tuple[int, int]:
    """Return which values to read, [start, stop) with the last one at least, for `count` that `pad_end` completes."""
    return min(start, length - 1), max(min(start + count, length), 1)


def pad_end(values: np.ndarray, count: int) -> np.ndarray:
    """Return `count` values, of which the last given one is repeated where there are too few."""
    missing = count - len(values)
    return np.concatenate([values, np.repeat(values[-1:], missing, axis=0)]) if missing > 0 else values


def with_streams(
    prompt: Prompt,
    streams: Mapping[str, np.ndarray],
    past: int,
    num_frames: int | None = None,
    num_values: Mapping[str, int] | None = None,
    sources: Mapping[str, str] | None = None,
) -> Prompt:
    """Return the prompt with streams replaced by given values; see `StreamPrompt`."""
    return StreamPrompt(prompt, streams, past, num_frames, num_values, sources) if streams else prompt


def _check_values(values: np.ndarray, name: str, source: str, num_values: int | None) -> None:
    """Raise `ValueError` for invalid values of a stream."""
    if values.dtype.kind == "f":
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            raise ValueError(f"{source} has {values[tuple(bad[0])]} at entry {bad[0][0]}: give finite numbers")
        return
    bad = np.flatnonzero((values < 0) | (values >= (np.inf if num_values is None else num_values)))
    if len(bad):
        known = "whole numbers from 0 on" if num_values is None else f"numbers from 0 to {num_values - 1}"
        raise ValueError(f"{source} has {values[bad[0]]} at entry {bad[0]}, but {name} are {known}: correct it")


def stream_tensor(values: np.ndarray) -> Tensor:
    """Return the values of a stream as int64 or float32, of the same shape."""
    return torch.from_numpy(values).to(torch.float32 if values.dtype.kind == "f" else torch.int64)
