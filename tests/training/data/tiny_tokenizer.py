"""A fast tokenizer of plain layers, and a script that encodes a dataset with it.

The script, `python tiny_tokenizer.py ARGUMENTS`, runs encode_dataset with the tokenizer registered; with PAUSE_SEC
in the environment it waits that long before each encoding.
"""

import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

from training import registry
from training.registry import Spec

ROOT = Path(__file__).parents[3]
NAME = "tiny-tokens"


class TinyTokenizer(nn.Module):
    """Nearest codebook entries of patches: stride (frames, pixels)."""

    def __init__(self, height=8, width=16, vocabulary=32, stride=(1, 4), clip_frames=4):
        super().__init__()
        self.options = {"height": height, "width": width, "vocabulary": vocabulary, "clip_frames": clip_frames}
        self.options["stride"] = stride
        self.height, self.width, self.vocabulary, self.clip_frames = height, width, vocabulary, clip_frames
        self.stride = (stride[0], stride[1])
        kernel = (stride[0], stride[1], stride[1])
        self.encoder = nn.Conv3d(3, 6, kernel, kernel)
        self.codebook = nn.Embedding(vocabulary, 6)
        self.decoder = nn.ConvTranspose3d(6, 3, kernel, kernel)

    def latents(self, video):
        return self.encoder(video)  # (N, 6, T, h, w)

    def encode(self, video):
        time.sleep(float(os.environ.get("PAUSE_SEC", "0")))
        features = self.latents(video).movedim(1, -1)  # (N, T, h, w, 6)
        return (features[..., None, :] - self.codebook.weight).square().sum(-1).argmin(-1)

    def decode(self, codes):
        return self.decoder(self.codebook(codes).movedim(-1, 1))


SPEC = Spec(
    name=NAME,
    title="Tokens of patches",
    system="tests.training.data.tiny_tokenizer:TinyTokenizer",
    presets="",
    networks={"tests.training.data.tiny_tokenizer:TinyTokenizer": "tiny tokenizer"},
    open_sampler="",
)


def register():
    registry.SYSTEMS[NAME] = "tests.training.data.tiny_tokenizer:SPEC"


def tiny_tokenizer(seed=0, **options):
    torch.manual_seed(seed)
    return TinyTokenizer(**options)


if __name__ == "__main__":
    from dataset_tools.encode_dataset import main

    register()
    torch.set_num_threads(1)
    main(sys.argv[1:])
