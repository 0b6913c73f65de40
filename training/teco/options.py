"""Options of TECO's training. Imports no torch, so that `--help` is quick."""

import dataclasses
from typing import Any

from training.flags import Flag, option
from training.modules.options import PriorOptions
from training.teco.presets import WIDTHS

POSITIONS = ("sinusoid", "rotary")  # of the temporal transformer


def entry(help: str, name: str, place: str, low: int = 1) -> Flag:
    """Return the flag of a size of the network."""
    return Flag(help, name=name, kind=int, sets=(place,), low=low)


@dataclasses.dataclass
class TecoOptions(PriorOptions):
    """Options of a run. The defaults are those of the release for DMLab."""

    schedule: str = option("cosine", "Course of the learning rate after warming up", kind=("cosine", "constant"))
    warmup_steps: int = option(5000, "Steps over which the learning rate rises from 0", low=0)
    weight_decay: float = option(1e-5, "Weight decay of AdamW on all parameters", low=0)
    seq_len: int = option(300, "Frames of a clip, and of the memory", low=2)
    context: int = option(36, "Frames of context that videos continue by default", low=1)
    n_cond: int = option(1, "First frames that are given, not predicted", low=1)
    embedding_dim: int = option(64, "Width of z", low=1)
    num_codes: int = option(1024, "Codes of z", low=2)
    proj_dim: int = option(32, "Width of the codebook", low=1)
    z_ds: int = option(8, "Edge of the patches of z that are tokens of the temporal transformer; 0: the largest", low=0)
    positions: str = option(
        "sinusoid", "Positions of the temporal transformer; rotary ones have no end", kind=POSITIONS
    )
    encoder: dict[str, Any] = option(
        lambda: dict(WIDTHS["dmlab"]["encoder"]), "",
        entry("Residual blocks at each level of the encoder", "--encoder-blocks", "encoder.blocks"), factory=True,
    )  # fmt: skip
    decoder: dict[str, Any] = option(
        lambda: dict(WIDTHS["dmlab"]["decoder"]), "",
        entry("Residual blocks at each level of the decoder", "--decoder-blocks", "decoder.blocks"), factory=True,
    )  # fmt: skip
    temporal: dict[str, int] = option(
        lambda: dict(WIDTHS["dmlab"]["temporal"]), "",
        entry("Width of the temporal transformer", "--temporal-width", "temporal.embed_dim"),
        entry("Its layers", "--temporal-layers", "temporal.num_layers"), factory=True,
    )  # fmt: skip
    prior: dict[str, int] = option(
        lambda: dict(WIDTHS["dmlab"]["prior"]), "",
        entry("Width of the prior's transformer", "--prior-width", "prior.embed_dim"),
        entry("Its layers", "--prior-layers", "prior.num_layers"), factory=True,
    )  # fmt: skip
    use_actions: bool = option(True, "Condition on the stream of actions")
    action_dim: int = option(6, "Number of different actions", low=1)
    action_embed_dim: int = option(16, "Width of an action", low=1)
    dropout_actions: bool = option(True, "Hide the actions of half of the clips, so that videos need none")
    drop_loss_rate: float = option(0.9, "Share of frames whose loss is left out in a step; 0: none", low=0)
    mask_schedule: str = option(
        "cosine", "Share of codes that the prior has to predict: cosine, uniform, pow2, log, exp"
    )
    encode_frames: bool = option(False, "Encode frames in each step rather than read their codes; slower")
    shard: bool = option(False, "Divide parameters and optimiser states among the ranks, block by block (FSDP2)")
    tensor_parallel: int = option(
        1, "Ranks of a group that computes the same clips, each some heads and channels of the transformers", low=1
    )
    recompute: bool = option(False, "Compute activations again for gradients, rather than keep them in memory")
    legacy: bool = option(False, "Draw kept frames as published, with the fault that the README describes")
