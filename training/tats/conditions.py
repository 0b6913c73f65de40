"""What videos of TATS are given: a class, a description, or the sound that they go with.

Ge et al., ECCV 2022, and its release: ids of the condition come before the codes. Those of sound are the codes of a
tokenizer of spectrograms.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.data.spectrograms import SIZE, images_of, is_of_sound
from training.random import random_state
from training.sampling import Needs, Prompt, Sampler
from training.tats.networks import TATSTransformer
from training.tats.options import AUDIO, LABEL, TEXT
from training.tats.text import BytePairs, read_merges


@dataclass(frozen=True)
class Facts:
    """What a file says about its network besides sizes.

    `condition` is what videos are given, and `every` the number of latent frames from one that it writes to the next.
    `texts` are descriptions of training, and `merges` the lines of the list of merges, of a model that takes text.
    """

    condition: str = "none"
    every: int = 1
    texts: Sequence[str] = ()
    merges: str = ""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Facts:
        """Return what the options of a file say."""
        return cls(**{item.name: options[item.name] for item in fields(cls) if item.name in options})


# ----------------------------------------------------------------------------
# Sound.


def check_sound(tokenizer: Any, path: str) -> None:
    """Raise `ValueError` unless a network, from the file at `path`, is a tokenizer of sound."""
    if not is_of_sound(tokenizer) or (tokenizer.height, tokenizer.width) != SIZE:
        raise ValueError(
            f"{path} encodes {tokenizer.height}x{tokenizer.width} frames, expected a tokenizer of sound: train one by "
            "train.py tokenizer --preset=drums-audio"
        )


def codes_of_frame(tokenizer: Any) -> int:
    """Return the number of codes of a latent frame of a tokenizer."""
    edge = tokenizer.stride[1]
    return (tokenizer.height // edge) * (tokenizer.width // edge)


def num_ids(tokenizer: Any, num_frames: int) -> int:
    """Return the number of ids of the sound of some frames; raises `ValueError` unless the stride divides them."""
    step = tokenizer.stride[0]
    if num_frames % step:
        raise ValueError(
            f"the condition is the sound of {num_frames} frames, but its tokenizer encodes {step} together: use a "
            f"number of --frames that makes a multiple of {step}"
        )
    return num_frames // step * codes_of_frame(tokenizer)


def sound_ids(tokenizer: Any, values: Tensor) -> Tensor:
    """Return the ids of the stream "audio" (N, T, V), in order of time, frequency, time in a frame: int64 (N, C)."""
    weight = next(tokenizer.parameters())
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):  # so that codes are those of sampling
        return tokenizer.encode(images_of(values.to(weight))).flatten(1)


class Sound:
    """The tokenizer of sound of a network, and `span`: the number of frames that the network hears at once.

    Raises `ValueError` if they do not fit.
    """

    def __init__(self, network: TATSTransformer, tokenizer: Any):
        found, length = codes_of_frame(tokenizer), network.condition_length
        if network.conditions != tokenizer.vocabulary or length % found:
            raise ValueError(
                f"the transformer is given {length} of {network.conditions} ids of sound, but the tokenizer of sound "
                f"makes {found} of {tokenizer.vocabulary} at a time: give the one that it was trained with"
            )
        self.tokenizer, self.span = tokenizer, length // found * tokenizer.stride[0]


# ----------------------------------------------------------------------------
# All conditions.


class Conditioned(Sampler):
    """What both samplers share: a condition for each video."""

    network: TATSTransformer
    facts: Facts
    options: Any  # training.tats.sampling.Writing
    sound: Sound | None
    step: int  # frames from one latent frame that is written to the next

    def set_condition(self, network: TATSTransformer, facts: Facts, tokenizer: Any, sound: Any = None) -> None:
        """Set what is said about conditions; `sound` is the tokenizer of sound.

        Raises `ValueError` if it is missing or does not fit.
        """
        self.network, self.facts = network, facts
        self.num_labels = network.conditions if facts.condition == LABEL else 0
        self.takes_text = facts.condition == TEXT
        self.step, self.sound = tokenizer.stride[0] * facts.every, None
        if facts.condition == AUDIO:
            if sound is None:
                raise ValueError("this model hears, but its file has no tokenizer of sound: train or download it again")
            self.sound, self.needs = Sound(network, sound), Needs(streams=(AUDIO,))

    def conditions(self, seeds: Sequence[int], prompt: Prompt) -> Iterator[Tensor]:
        """Yield the ids of the condition of each video (N, condition_length) for each window, the first and others."""
        if self.sound is None:
            yield from itertools.repeat(self.condition_ids(seeds, prompt))
        for window in itertools.count():
            yield self.condition_ids(seeds, prompt, window)

    def condition_ids(self, seeds: Sequence[int], prompt: Prompt, window: int = 0) -> Tensor:
        """Return the ids of the condition of each video: int64 (N, condition_length).

        Without a label or a text it is drawn from the seed, among the classes or descriptions of training. Sound is
        that of the window which begins with latent frame number `window`; after its end its last moment goes on. Raises
        `ValueError` if there are none.
        """

        def draw(count: int) -> list[int]:
            return [random_state("tats-condition", seed, 0).randint(count) for seed in seeds]

        if self.facts.condition == LABEL:
            labels = draw(self.num_labels) if prompt.label is None else [prompt.label] * len(seeds)
            ids = torch.tensor(labels).unsqueeze(1)
        elif self.facts.condition == TEXT:
            known = list(self.facts.texts)
            if prompt.text is None and not known:
                raise ValueError("this model is given a description of each video: give --text")
            texts = [known[i] for i in draw(len(known))] if prompt.text is None else [prompt.text] * len(seeds)
            pairs = byte_pairs(self.facts.merges, self.options.merges)
            ids = torch.from_numpy(np.stack([pairs.ids_of(text, self.network.condition_length) for text in texts]))
        elif self.sound is not None:
            values = prompt.padded_stream(AUDIO, window * self.step, self.sound.span)
            ids = sound_ids(self.sound.tokenizer, values).expand(len(seeds), -1)
        else:
            ids = torch.zeros(len(seeds), 1, dtype=torch.int64)
        return ids.to(self.network.pos_emb.device)


@functools.lru_cache(maxsize=2)
def byte_pairs(merges: str, path: str | None = None) -> BytePairs:
    """Return the encoding of the merges in a file of a model, else at a path or in the cache."""
    return BytePairs(merges.split("\n") if merges and path is None else read_merges(path))
