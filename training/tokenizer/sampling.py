"""Reconstruct videos: what a tokenizer keeps of them bounds everything that is generated from its codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from training.contract import Bundle
from training.data.spectrograms import images_of, is_of_sound
from training.data.streams import AUDIO
from training.modules.autoencoder import Autoencoder
from training.sampling import Needs, NoOptions, Prompt, Request, Sampler, pieces, resolve_options


class Reconstruction(Sampler):
    """The frames of the prompt, encoded and decoded as `dataset_tools.encode_dataset` does: in clips of a fixed length.

    Clips begin at multiples of their length, whatever part of the video is asked for. A video's last clip may be
    shorter; its last frame is repeated until the stride divides it.
    """

    BLOCK = 16  # frames, at least

    def __init__(self, network: Autoencoder):
        self.network, self.networks = network, [network]
        self.outputs = {"video": (network.height, network.width)}
        self.needs = Needs(size=self.outputs["video"], follows=True)
        self.block = -(-self.BLOCK // network.clip_frames) * network.clip_frames

    @torch.no_grad()
    def frames(self, request: Request) -> Iterator[dict[str, Tensor]]:
        """See `Sampler.frames`."""
        length, done = self.network.clip_frames, 0
        weight = next(self.network.parameters())
        for count in pieces(request.num_frames, self.block):
            firsts = [start + done for start in request.starts]
            bases = [first // length * length for first in firsts]
            num_clips = max(-(-(first + count - base) // length) for first, base in zip(firsts, bases, strict=True))
            video = self.read(request.prompt, bases, num_clips * length).to(weight)
            video = video.expand(len(firsts), -1, -1, -1, -1)
            made = torch.cat([self.reconstruct(clip) for clip in video.split(length, dim=2)], dim=2)
            left = min(count, *(made.shape[2] - first + base for first, base in zip(firsts, bases, strict=True)))
            if left > 0:
                offsets = [first - base for first, base in zip(firsts, bases, strict=True)]
                cut = [clip[:, at : at + left] for clip, at in zip(made, offsets, strict=True)]
                yield {"video": torch.stack(cut)}
            if left < count:
                return
            done += count

    def read(self, prompt: Prompt, firsts: Sequence[int], count: int) -> Tensor:
        """Return `count` frames of a prompt, or fewer at its end: (N or 1, 3, T, height, width)."""
        return prompt.frames(firsts, count, self.size)

    def reconstruct(self, clip: Tensor) -> Tensor:
        """Return the reconstruction of a clip (N, 3, T, H, W) with any number of frames."""
        num_frames, step = clip.shape[2], self.network.stride[0]
        missing = -num_frames % step
        if missing:
            clip = torch.cat([clip, clip[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
        if clip.shape[2] == 0:
            return clip
        return self.network.decode_latents(self.network.latents(clip))[:, :, :num_frames]


class SoundReconstruction(Reconstruction):
    """The spectrograms of the prompt's sound, encoded and decoded: grey frames, low frequencies above.

    Without end in sight, its last moment goes on.
    """

    def __init__(self, network: Autoencoder):
        super().__init__(network)
        self.needs = Needs(streams=(AUDIO,))

    def frames(self, request: Request) -> Iterator[dict[str, Tensor]]:
        """See `Sampler.frames`."""
        starts, limit = request.starts, request.prompt.limit
        if request.num_frames is None and limit is not None:
            request = dataclasses.replace(request, num_frames=limit - max(starts))
        if request.num_frames is not None:  # raises if the sound is shorter
            request.prompt.stream(AUDIO, [start + request.num_frames - 1 for start in starts], 1)
        yield from super().frames(request)

    def read(self, prompt: Prompt, firsts: Sequence[int], count: int) -> Tensor:
        """See `Reconstruction.read`."""
        return images_of(prompt.padded_stream(AUDIO, firsts, count))

    def reconstruct(self, clip: Tensor) -> Tensor:
        """See `Reconstruction.reconstruct`."""
        return super().reconstruct(clip).expand(-1, 3, -1, -1, -1)


def make_sampler(network: Autoencoder) -> Sampler:
    """Return the sampler of a tokenizer of frames or of sound."""
    return SoundReconstruction(network) if is_of_sound(network) else Reconstruction(network)


def open_sampler(bundles: Sequence[Bundle], options: Mapping[str, Any]) -> Sampler:
    """Return the sampler of a tokenizer's file; see `training.registry.Spec`."""
    if len(bundles) != 1:
        raise ValueError(f"{len(bundles)} tokenizers were given: reconstruct with one at a time")
    network = next(iter(bundles[0].networks.values()))
    assert isinstance(network, Autoencoder)
    resolve_options(NoOptions, options, "a tokenizer")
    return make_sampler(network)
