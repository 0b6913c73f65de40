"""Options of the systems of TATS. Imports no torch, so that `--help` is quick."""

import dataclasses

from training.flags import option
from training.modules.options import PriorOptions

NONE, LABEL, TEXT, AUDIO = CONDITIONS = "none", "label", "text", "audio"
BASE_LR = 4.5e-6  # a clip of the batch, as published
TEXT_LENGTH = 256  # ids of a description, as published


@dataclasses.dataclass
class NetworkOptions(PriorOptions):
    """Options of both systems. The defaults are those of the published models: 8 GPUs x 3 clips."""

    lr: float = option(BASE_LR * 24, "Peak of the learning rate", low=0)
    weight_decay: float = option(0.01, "Weight decay of the weights of linear layers", low=0)
    condition: str = option(NONE, "What videos are given", kind=(NONE, LABEL))
    classes: int = option(0, "Number of classes of --condition=label", low=0)
    layers: int = option(24, "Number of blocks", low=1)
    heads: int = option(16, "Heads of attention", low=1)
    width: int = option(1024, "Width of the network", low=1)
    legacy: bool = option(False, "Train exactly as published, with the faults that the README lists")


@dataclasses.dataclass
class TATSOptions(NetworkOptions):
    """Options of a run of `tats`."""

    condition: str = option(NONE, "What videos are given", kind=CONDITIONS)
    text_length: int = option(TEXT_LENGTH, "Ids of a description", low=3)
    merges: str = option("", "Descriptions: file of CLIP's list of merges; default: that in the cache")
    audio_tokenizer: str = option("", "Sound: file of its tokenizer (train.py tokenizer --preset=drums-audio)")
    frames: int = option(16, "Frames of a clip", low=1)
    every: int = option(1, "Take every n-th latent frame of a clip: 4 for key frames", low=1)
    table: bool = option(False, "Add a table of positions in time, rows and columns")
