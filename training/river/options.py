"""Options of RIVER and its refiner in training. Imports no torch, so that `--help` is quick."""

from __future__ import annotations

import dataclasses

from training.flags import SCHEDULES, option
from training.modules.options import PriorOptions

HEADS = ("ln", "bn")
TIME_LAWS = ("uniform", "logit-normal")  # of training.generation.flow
SIGMA = 1e-7


@dataclasses.dataclass
class RiverTrainOptions(PriorOptions):
    """Options of a run. The defaults are those of the release for 64x64, but for the average and the normalisation."""

    tokenizer: str = option("", "File of the tokenizer in whose latents videos are predicted", needed=True)
    latents: bool = option(False, "Read stored latents (dataset_tools.encode_dataset --latents) instead of frames")
    clip_frames: int = option(16, "Frames of a clip, from which three are taken: old ones as far back are seen", low=2)
    frame_stride: int = option(1, "Take every n-th frame of the dataset", low=1)
    prompt_frames: int = option(1, "Frames that are given when a video is continued: targets come after them", low=1)
    context_frames: int = option(1, "Old frames that condition the field at once", low=1)
    inner_dim: int = option(768, "Width of the transformer", low=8)
    depth: int = option(4, "Blocks on either side of the middle, which are joined by skips", low=0)
    mid_depth: int = option(5, "Blocks in the middle", low=0)
    out_norm: str = option("ln", "Norm of the head: ln, or bn for large grids", kind=HEADS)
    num_actions: int = option(0, "Number of different actions, where the dataset has numbered ones", low=0)
    action_values: int = option(0, "Values of an action, where the dataset has vectors", low=0)
    action_dropout: float = option(0.1, "Share of clips whose action is hidden, for guidance", low=0)
    normalise: bool = option(True, "Normalise each channel of the latents")
    time_law: str = option("uniform", "Distribution of t", kind=TIME_LAWS)
    sigma: float = option(SIGMA, "Standard deviation of the path's end", low=0)
    colours: bool = option(False, "Change the colours of clips at random")
    dropout: float = option(0.05, "Share of activations that are dropped", low=0)
    schedule: str = option("polynomial", "Course of the learning rate; polynomial is a square root", kind=SCHEDULES)
    warmup_steps: int = option(5000, "Steps over which the learning rate rises from 0", low=0)
    weight_decay: float = option(5e-6, "Weight decay of AdamW", low=0)
    ema_beta: float = option(0.9999, "Decay of the moving average of the weights, a step; 0: no average", low=0)
    legacy: bool = option(False, "Draw as published: never the frame after the first, by torch's generator")

    @property
    def has_actions(self) -> bool:
        """Return whether actions condition the field."""
        return bool(self.num_actions or self.action_values)


@dataclasses.dataclass
class RefinerOptions(PriorOptions):
    """Options of a run. The defaults are those of the release."""

    tokenizer: str = option("", "File of the tokenizer whose reconstructions are refined", needed=True)
    clip_frames: int = option(17, "Frames of a clip, which give one pair less", low=2)
    groups: int = option(3, "Groups of residual blocks", low=1)
    blocks: int = option(3, "Residual blocks in a group", low=1)
    width: int = option(64, "Width of the network", low=1)
    reduction: int = option(8, "Reduction of channels in their attention", low=1)
    tanh: bool = option(False, "Bound the frames by a tanh")
    l1: bool = option(False, "Absolute differences of pixels instead of squared ones")
    perceptual_weight: float = option(0.1, "Weight of squared differences of I3D's logits; 0: without I3D", low=0)
    lr: float = option(3e-4, "Peak of the learning rate for a batch of 256; it is proportional to the batch", low=0)
    schedule: str = option("cosine", "Course of the learning rate", kind=("cosine",))
    weight_decay: float = option(5e-4, "Weight decay of AdamW", low=0)
