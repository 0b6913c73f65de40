"""Options of tokenizers. Imports no torch, so that `--help` is quick."""

import dataclasses
from typing import Any

from training.command_line import Parsed
from training.flags import SCHEDULES, Flag, option

NETWORKS = ("vqgan3d", "vqgan2d", "river-vqvae", "conv2d")  # keys of training.tokenizer.networks.NETWORKS
QUANTIZERS = ("ema", "vq", "cosine", "fsq", "lfq", "none")  # training.modules.quantizers.KINDS
FRAMES, AUDIO = CONTENTS = "frames", "audio"


def parse_integers(text: str) -> list[int]:
    """Parse "4,8,8" as a list."""
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"{text!r} is not a list of whole numbers, such as 4,8,8")
    return [int(part) for part in parts]


INTEGERS = Parsed("N,N,...", parse_integers)


def argument(help: str, name: str, kind: Any = int, low: float | None = 1) -> Flag:
    """Return the flag of an argument of the network."""
    return Flag(help, name=f"--{name.replace('_', '-')}", kind=kind, sets=(f"arguments.{name}",), low=low)


@dataclasses.dataclass
class TokenizerOptions:
    """Options of a run. The defaults are those of the published 3-D VQGAN of TATS."""

    network: str = option("vqgan3d", "Kind of network", kind=NETWORKS)
    content: str = option(FRAMES, "What is encoded: frames, or spectrograms of their sound", kind=CONTENTS)
    height: int = option(128, "Frame size, such as 128x128", name="--size", kind="size", sets=("height", "width"))
    width: int = option(128, "")
    clip_frames: int = option(16, "Frames of a clip, which are encoded together", low=1)
    frame_stride: int = option(1, "Take every n-th frame of the dataset", low=1)
    arguments: dict[str, Any] = option(
        dict, "",
        argument("Number of codes", "num_codes", low=2),
        argument("Width of a code", "embedding_dim"),
        argument("Strides of the 3-D network in frames, height and width", "downsample", INTEGERS, None),
        argument("Width of the 3-D network's first level", "hidden"),
        argument("Norm of the 3-D network", "norm", ("batch", "group"), None),
        argument("Width of the 2-D network's first level", "ch"),
        argument("Widths of the 2-D network's levels, in multiples of --ch", "ch_mult", INTEGERS, None),
        argument("Residual blocks at each level of the 2-D network", "num_res_blocks"),
        argument("Widths of the levels of conv2d; there is a stride of 2 for each", "widths", INTEGERS, None),
        argument("Residual blocks at each level of conv2d", "blocks"),
        factory=True,
    )  # fmt: skip
    quantizer: dict[str, Any] = option(
        lambda: {"kind": "ema"}, "",
        Flag("Kind of codebook; none: no codes", name="--quantizer", kind=QUANTIZERS, sets=("quantizer.kind",)),
        Flag("Replace codes that are not used", name="--restart", kind=bool, sets=("quantizer.restart",)),
        Flag("Levels of FSQ, such as 8,8,8,5,5,5", name="--levels", kind=INTEGERS, sets=("quantizer.levels",)),
        factory=True,
    )  # fmt: skip
    lr: float = option(9e-5, "Learning rate of both optimisers", low=0)
    schedule: str = option("constant", "Course of the learning rate", kind=SCHEDULES)
    warmup_steps: int = option(0, "Steps over which it rises from 0", low=0)
    clip_norm: float = option(1.0, "Largest norm of each optimiser's gradient; 0: any", low=0)
    l1_weight: float = option(4.0, "Weight of absolute differences", low=0)
    l2_weight: float = option(0.0, "Weight of squared differences", low=0)
    perceptual_weight: float = option(4.0, "Weight of LPIPS", low=0)
    lpips: str = option("vgg", "Network of LPIPS", kind=("vgg", "alex", "none"))
    image_gan_weight: float = option(1.0, "Weight of the discriminator of frames", low=0)
    video_gan_weight: float = option(1.0, "Weight of the discriminator of clips", low=0)
    feature_weight: float = option(4.0, "Weight of matching the discriminators' features", low=0)
    gan_loss: str = option("hinge", "Loss of the discriminators", kind=("hinge", "vanilla"))
    gan_start: int = option(10000, "Step at which the discriminators join", low=0)
    gan_ramp: int = option(0, "Steps over which their terms then grow", low=0)
    adaptive: bool = option(False, "Weigh the generator's GAN terms by the ratio of gradients")
    disc_channels: int = option(64, "Width of the discriminators' first level", low=1)
    disc_layers: int = option(3, "Levels of the discriminators", low=1)
    legacy: bool = option(False, "Train exactly as published, with the faults that the README lists")
