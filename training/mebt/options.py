"""Options of training MeBT. Imports no torch, so that `--help` is quick."""

import dataclasses
from typing import Any

from training.command_line import Parsed
from training.flags import option
from training.mebt.modes import MODES, PUBLISHED_MODES, RESIDUALS
from training.modules.options import PriorOptions

# Keys of training.generation.draft_revise.MASK_SCHEDULES.
SCHEDULES = ("cosine", "cosine_plus", "linear", "quadratic", "convex", "square", "cube", "sqrt")
PRIORS = ("longest", "uniform", "gaussian2", "gaussian100000_2")


def parse_modes(text: str) -> list[str]:
    """Parse "latent_enc,latent_dec", or "published"."""
    modes = PUBLISHED_MODES if text == "published" else [part.strip() for part in text.split(",")]
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"{mode!r} is not a mode: use {', '.join(MODES)}, or published for the published list")
    return list(modes)


@dataclasses.dataclass
class MeBTOptions(PriorOptions):
    """Options of a run. The defaults are those of the published models of 16 frames."""

    config: str = option("", "Take what is not given here from a YAML file of the release")
    num_frames: int = option(16, "Frames of a clip, which are modelled together", low=1)
    width: int = option(1024, "Width of the network", low=1)
    heads: int = option(16, "Heads of its attention", low=1)
    latents: int = option(256, "Vectors through which all positions meet", low=1)
    modes: list[str] = option(
        lambda: list(PUBLISHED_MODES), "Modes of the layers, or published", kind=Parsed("MODE,...", parse_modes),
        factory=True,
    )  # fmt: skip
    layers: int = option(0, "Layers; those without a mode are maskgit  [0: as many as modes]", low=0)
    residual: str = option("plain", "What attention is added to: queries before or after the norm", kind=RESIDUALS)
    embedding_dropout: float = option(0.0, "Dropout of embeddings", low=0)
    attention_dropout: float = option(0.0, "Dropout of attention weights", low=0)
    residual_dropout: float = option(0.0, "Dropout of what attention and MLPs add", low=0)
    mask_schedule: str = option("linear", "Share of masked codes at a masking time", kind=SCHEDULES)
    t_min: float = option(0.0, "Range of masking times", name="--t-range", kind=float, sets=("t_min", "t_max"), low=0)
    t_max: float = option(1.0, "")
    beta_steps: int = option(0, "Draw masking times from a Beta distribution that is uniform after these steps", low=0)
    beta_a: float = option(1.0, "Its first parameters", name="--beta", kind=float, sets=("beta_a", "beta_b"), above=0)
    beta_b: float = option(1.0, "")
    budget: int = option(0, "Predict at most this many of the masked codes; 0: all", low=0)
    window_prior: str = option("longest", "Lengths of the windows that are trained on", kind=PRIORS)
    curriculum: float = option(0.5, "Share of the run in which windows of the gaussian priors grow", above=0)
    masks_of: int = option(4, "Clips of a batch that share a masking time and a window", low=1)
    average: float = option(
        1.0, "1: mean over masked codes; 0: over all codes, so that steps weigh what they mask", low=0
    )
    label_smoothing: float = option(0.0, "Label smoothing", low=0)
    lr: float = option(3e-5, "Peak of the learning rate", low=0)
    weight_decay: float = option(0.01, "Weight decay of AdamW on linear layers", low=0)
    legacy: bool = option(False, "Train exactly as published, with the faults that the README lists")
    sampling: dict[str, Any] = option(dict, "", factory=True)
