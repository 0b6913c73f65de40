"""Build the prompt that the command line specifies: context frames, files of streams, a label, a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import click
import numpy as np

from dnnlib.text import escape
from training import network_file
from training.data.dataset import ASSUMED_FPS, ClipDataset
from training.data.footage import dataset_sizes, is_dataset
from training.data.prompts import ClipPrompt, FilePrompt, SeededPrompt, StreamReader, open_prompt
from training.data.spectrograms import read_sound
from training.data.stream_prompts import with_streams
from training.data.streams import AUDIO, read_stream_file
from training.network_file import ModelPath
from training.sampling import Prompt, Sampler


def starts_beside(models: Sequence[str | ModelPath], sampler: Sampler) -> str | None:
    """Return the dataset NAME.starts beside a model's file NAME.pkl, whose clips begin its videos.

    Returns None if there is none, or if the sampler does not continue videos.
    """
    if sampler.needs.follows or not sampler.needs.frames:
        return None
    for item in [item for model in models for item in network_file.expand(model)]:
        beside = Path(item.path).with_suffix(".starts")
        if beside.is_dir() and is_dataset(beside):
            return str(beside)
    return None


def begin_with(root: str, make: Callable[[str], Prompt], seeds: Sequence[int] = (0,)) -> SeededPrompt:
    """Return the prompt of videos that begin with clips of a dataset, which seeds choose.

    `make` returns the prompt of a context, and `seeds` are those that are known to be used.
    """
    clips = ClipDataset(root, dataset_sizes(root)[:1]).clips
    if not clips:
        raise ValueError(f"{root} has no clips, of which videos could begin with one: add some, or give a context")
    return SeededPrompt(lambda number: make(f"{root}:{clips[number].path}"), len(clips), seeds)


def make_prompt(
    sampler: Sampler,
    context: str | None,
    streams: Mapping[str, Path],
    label: int | None = None,
    text: str | None = None,
    fps: float | None = None,
    num_frames: int | None = None,
) -> Prompt:
    """Return the prompt of a sampler: context frames at a path, streams from files by name, a label, a text.

    A file of a stream replaces that of the context's dataset: it holds the values of the context frames followed by
    those of the `num_frames` frames to generate. With `fps` video files are resampled to that rate. The stream
    "audio" is the sound of any file that has some; of a context of which no frames are needed, its own.

    Raises `ValueError` with a one-line message for inputs that the sampler does not accept, lacks, or cannot use.
    """
    needs = sampler.needs
    if context is not None and not needs.frames and needs.streams == (AUDIO,) and _is_file(context):
        if AUDIO in streams:
            raise ValueError(f"--{AUDIO} and the sound of {context} are two: leave out --context")
        context, streams = None, {AUDIO: Path(context)}
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
        for line in found.remarks.lines() if isinstance(found, FilePrompt) else ():
            click.echo(f"{escape(context)}: {line}", err=True)
    values = {name: _read(path, name, sampler, fps) for name, path in streams.items()}
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


def _is_file(context: str) -> bool:
    return Path(context).is_file() and not is_dataset(context)


def _read(path: Path, name: str, sampler: Sampler, fps: float | None) -> np.ndarray:
    """Return the values of a stream in a file: (T,) or (T, V)."""
    if name == AUDIO:
        return read_sound(path, fps or sampler.fps or ASSUMED_FPS)
    return read_stream_file(path, name, *_range_of(sampler, name))


def _range_of(sampler: Sampler, name: str) -> tuple[list[str] | None, int | None]:
    """Return the names of a stream's values, and their number, as far as the sampler defines them."""
    names = sampler.vocabularies.get(name)
    return (list(names) if names else None), (sampler.num_actions if name == "actions" else None)


def stream_readers(dataset: ClipDataset, sampler: Sampler, names: list[str]) -> dict[str, StreamReader]:
    """Return readers of a dataset's streams, with names numbered by the sampler's vocabularies."""
    return {name: dataset.open_stream(name, sampler.vocabularies.get(name)).read for name in names}
