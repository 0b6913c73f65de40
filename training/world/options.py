"""Options of the world model in training. Imports no torch, so that `--help` is quick."""

from __future__ import annotations

import dataclasses

from training.flags import SCHEDULES, option
from training.modules.options import PriorOptions


@dataclasses.dataclass
class WorldTrainOptions(PriorOptions):
    """Options of a run. The defaults suit latents of 6x8 cells on a CPU."""

    tokenizer: str = option("", "File of the tokenizer in whose latents frames are predicted", needed=True)
    latents: bool = option(True, "Read stored latents (dataset_tools.encode_dataset --latents) instead of frames")
    clip_frames: int = option(193, "Frames of a clip: one is predicted from those before it", low=2)
    targets: int = option(4, "Frames of each clip that are predicted in a step", low=1)
    prompt_frames: int = option(32, "Frames that are given when a video is continued", low=1)
    recent: int = option(4, "Frames of context 1, 2, 4, ... frames before the new one", low=1)
    memory: int = option(3, "Frames of context that are chosen by pose from all before the recent ones", low=0)
    history: int = option(4, "Newest actions that the network sees", low=1)
    width: int = option(160, "Width of the transformer", low=8)
    depth: int = option(5, "Blocks", low=1)
    heads: int = option(5, "Heads of attention, which divide the width", low=1)
    skip: bool = option(True, "Add shares of the noisy frame and of the context to the result, chosen by the condition")
    num_actions: int = option(0, "Number of different actions, where the dataset has numbered ones", low=0)
    action_values: int = option(0, "Values of an action, where the dataset has vectors", low=0)
    poses: bool = option(True, "Learn from the dataset's poses how actions move the viewer, to choose context by pose")
    short_context: float = option(0.15, "Share of frames of which only the newest few before them are given", low=0)
    context_noise: float = option(0.6, "Largest standard deviation of the noise on the context", low=0)
    own_frames: int = option(0, "Most frames before the new one that are the network's own, late in training", low=0)
    own_steps: int = option(2, "Evaluations of the network for each of them", low=1)
    own_start: float = option(0.67, "Share of the steps after which they are used", low=0)
    lr: float = option(1e-3, "Peak of the learning rate", low=0)
    schedule: str = option("cosine", "Course of the learning rate", kind=SCHEDULES)
    warmup_steps: int = option(200, "Steps over which the learning rate rises from 0", low=0)
    weight_decay: float = option(0.01, "Weight decay of AdamW on matrices", low=0)
    clip_norm: float = option(1.0, "Largest norm of the gradient; 0: any", low=0)
    ema_beta: float = option(0.998, "Decay of the moving average of the weights, a step; 0: no average", low=0)

    @property
    def has_actions(self) -> bool:
        """Return whether actions condition the model."""
        return bool(self.num_actions or self.action_values)
