"""A toy predictor of moving squares: its tokenizer, dataset and options."""

import numpy as np
import torch

from dataset_tools.archive import ShardWriter, describe_dataset
from dataset_tools.frames import encode_jpeg
from training.contract import Run
from training.modules.latents import LatentScale, LatentVideo
from training.modules.vqgan2d import VQGAN2D
from training.network_file import save_network
from training.random import random_state
from training.river.networks import VectorField
from training.river.options import RiverTrainOptions
from training.river.system import River

SIZE = (16, 24)
GRID = (4, 6)
CHANNELS = 3


def tokenizer(seed: int = 0) -> VQGAN2D:
    """A random autoencoder of frames of 16x24 into a grid of 4x6."""
    torch.manual_seed(seed)
    arguments = {"ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "z_channels": 4}
    network = VQGAN2D(*SIZE, 1, 32, embedding_dim=CHANNELS, num_codes=64, **arguments)
    return network.eval().requires_grad_(False)


def field(seed: int = 0, **options) -> VectorField:
    """A random field of those latents."""
    torch.manual_seed(seed)
    sizes = {"inner_dim": 32, "depth": 1, "mid_depth": 1, **options}
    return VectorField(CHANNELS, GRID, **sizes).eval().requires_grad_(False)


def latent_video(network: VQGAN2D | None = None) -> LatentVideo:
    """The latents of the tokenizer, with a scale that is not the trivial one."""
    scale = LatentScale(CHANNELS)
    scale.set(torch.tensor([0.1, -0.2, 0.3]), torch.tensor([0.5, 2.0, 1.0]))
    return LatentVideo(network or tokenizer(), scale)


def options(path, **given) -> RiverTrainOptions:
    """Options of a small run."""
    small = {"clip_frames": 6, "inner_dim": 32, "depth": 1, "mid_depth": 1, "warmup_steps": 1, "lr": 1e-3}
    return RiverTrainOptions(tokenizer=str(path), **{**small, "ema_beta": 0.9, **given})


def system(path, batch=4, grad_accum=1, steps=20, **given) -> River:
    """A small run."""
    return River(options(path, **given), Run(batch=batch, grad_accum=grad_accum, steps=steps))


def save_tokenizer(folder):
    """Write the tokenizer; returns its path."""
    save_network(tokenizer(), folder / "tokenizer.pkl")
    return folder / "tokenizer.pkl"


def clips(step: int, batch: int = 4, frames: int = 6) -> torch.Tensor:
    """Random clips: (N, 3, T, H, W)."""
    values = np.random.RandomState(step).uniform(-1, 1, (batch, 3, frames, 4, 6))
    return torch.from_numpy(values.astype(np.float32)).repeat_interleave(4, 3).repeat_interleave(4, 4)


def write_dataset(root, num_clips: int = 6, num_frames: int = 24):
    """Write clips of a square that moves as the actions say."""
    names = ("left", "right")
    with ShardWriter(root, (SIZE,), 0) as writer:
        for number in range(num_clips):
            rng = random_state("tiny-river", 0, number)
            moves, x = rng.randint(0, 2, num_frames), 10
            with writer.clip(f"clip{number}", actions=[names[move] for move in moves]) as add:
                for move in moves:
                    x = int(np.clip(x + 4 * (2 * move - 1), 0, SIZE[1] - 6))
                    frame = np.full((*SIZE, 3), 40, np.uint8)
                    frame[5:11, x : x + 6] = 220
                    add([encode_jpeg(frame)])
    describe_dataset(root, [writer.report({30: num_clips})], 1, (), actions=list(names))
    return root
