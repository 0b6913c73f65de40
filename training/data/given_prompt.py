"""The prompt that command lines give: a context, files of streams, a label, a text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from training.data.dataset import ClipDataset
from training.data.prompts import ClipPrompt, StreamReader, open_prompt
from training.data.stream_prompts import with_streams
from training.data.streams import StreamStore, read_stream_file
from training.sampling import Prompt, Sampler


def make_prompt(
    sampler: Sampler,
    context: str | None,
    streams: Mapping[str, Path],
    label: int | None = None,
    text: str | None = None,
    fps: float | None = None,
    num_frames: int | None = None,
) -> Prompt:
    """Return what is given to a sampler: the context at a path, streams from files by name, a label, a text.

    A file of a stream replaces what the context's dataset has: it holds the values of the context frames and then of
    the frames to make, of which there are `num_frames`. With `fps` video files are read at that rate.

    Raises `ValueError`, in one sentence, for what the sampler does not take, lacks, or cannot use.
    """
    needs = sampler.needs
    for name in streams:
        if name not in needs.streams:
            raise ValueError(f"this model takes no {name}: leave out --{name}")
    if label is not None and not 0 <= label < sampler.num_labels:
        known = f"classes 0 to {sampler.num_labels - 1}" if sampler.num_labels else "no classes"
        raise ValueError(f"label {label} was given, but this model knows {known}: leave out --label, or give another")
    if text is not None and not sampler.takes_text:
        raise ValueError("a text was given, but this model takes no text: leave out --text")
    if context is None and needs.frames:
        size = needs.size or sampler.size
        raise ValueError(
            f"this model needs context frames of {size[0]}x{size[1]}, {needs.past} before a video and {needs.future} "
            "after it: give a video or a dataset as --context"
        )
    missing = [name for name in needs.streams if name not in streams]
    if context is None:
        found = Prompt()
    else:
        found = open_prompt(context, sampler, fps, streams=lambda dataset: stream_readers(dataset, sampler, missing))
    values = {name: read_stream_file(path, name, *_range_of(sampler, name)) for name, path in streams.items()}
    sources = {name: str(path) for name, path in streams.items()}
    prompt = with_streams(found, values, needs.past, num_frames, None, sources)
    prompt.label, prompt.text = label, text
    limits = [len(array) - needs.past for array in values.values()]
    if missing and isinstance(found, ClipPrompt):
        ((clip, first),) = found.windows
        limits.append(found.footage.clips[clip].num_frames - first)
    prompt.limit = min(limits, default=None)
    if num_frames is not None and prompt.limit is not None and num_frames > prompt.limit:
        raise ValueError(
            f"{context} has {missing[0]} for {prompt.limit} frames after the context, {num_frames} were asked for: "
            f"make a shorter video, or give --{missing[0]}"
        )
    return prompt


def _range_of(sampler: Sampler, name: str) -> tuple[list[str] | None, int | None]:
    """Return the names of a stream's values, and how many values there are, as far as the sampler knows them."""
    names = sampler.vocabularies.get(name)
    return (list(names) if names else None), (sampler.num_actions if name == "actions" else None)


def stream_readers(dataset: ClipDataset, sampler: Sampler, names: list[str]) -> dict[str, StreamReader]:
    """Return the readers of streams of a dataset, whose names are numbered as the sampler has learnt them."""
    return {
        name: StreamStore(dataset.path, name, dataset.clips, None, sampler.vocabularies.get(name)).read
        for name in names
    }
