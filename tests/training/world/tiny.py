"""A toy world: its autoencoder, options, and batches of random clips with actions and poses."""

import numpy as np
import torch

from training.contract import Run
from training.modules.conv_autoencoder import ConvAutoencoder
from training.modules.latents import LatentScale, LatentVideo
from training.network_file import save_network
from training.world.networks import WorldModel
from training.world.options import WorldTrainOptions
from training.world.system import World

SIZE, GRID, CHANNELS, ACTIONS = (16, 24), (4, 6), 3, 4
# none, forward, left, right: a step of 10 units, turns of 30 degrees.
MOTIONS = np.array([[0, 0, 0], [10, 0, 0], [0, 0, 30], [0, 0, -30]], np.float64)


def tokenizer(seed: int = 0) -> ConvAutoencoder:
    """A random autoencoder of frames of 16x24 into latents of 3x4x6."""
    torch.manual_seed(seed)
    return ConvAutoencoder(*SIZE, 1, (8, 8), 1, CHANNELS).eval().requires_grad_(False)


def network(seed: int = 0, **given) -> WorldModel:
    """A random world model of those latents, which knows how actions move."""
    torch.manual_seed(seed)
    options = {"width": 32, "depth": 2, "heads": 2, "recent": [1, 2], "memory": 2, "num_actions": ACTIONS, **given}
    model = WorldModel(CHANNELS, GRID, **options)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)  # the initial values make every block the identity
    if model.num_actions:
        model.motions.copy_(units(MOTIONS)[: model.num_actions])
    return model.eval().requires_grad_(False)


def units(motions: np.ndarray) -> torch.Tensor:
    """Motions in map units and degrees as a model holds them: the longest step is an eighth of a unit."""
    return torch.tensor(np.concatenate([motions[:, :2] / 80, np.radians(motions[:, 2:])], axis=1)).float()


def latent_video() -> LatentVideo:
    """The latents of the autoencoder, with a scale that is not the trivial one."""
    scale = LatentScale(CHANNELS)
    scale.set(torch.tensor([0.1, -0.2, 0.3]), torch.tensor([0.5, 2.0, 1.0]))
    return LatentVideo(tokenizer(), scale)


def walk(rng: np.random.RandomState, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Random actions (T,) and the poses (T, 3) after each, in map units and degrees."""
    actions, pose, poses = rng.randint(0, ACTIONS, num_frames), rng.uniform(-180, 180, 3), []
    for action in actions:
        forward, left, turn = MOTIONS[action]
        pose[2] = (pose[2] + turn + 180) % 360 - 180
        cos, sin = np.cos(np.radians(pose[2])), np.sin(np.radians(pose[2]))
        pose[:2] += cos * forward - sin * left, sin * forward + cos * left
        poses.append(pose.copy())
    return actions, np.array(poses)


def batch(step: int, count: int = 4, frames: int = 12) -> dict[str, torch.Tensor]:
    """A batch of clips."""
    rng = np.random.RandomState(step)
    walks = [walk(rng, frames) for _ in range(count)]
    video = rng.uniform(-1, 1, (count, 3, frames, *GRID)).astype(np.float32)
    return {
        "clip": torch.from_numpy(video).repeat_interleave(4, 3).repeat_interleave(4, 4),
        "actions": torch.from_numpy(np.stack([actions for actions, _ in walks])),
        "poses": torch.from_numpy(np.stack([poses for _, poses in walks]).astype(np.float32)),
    }


def save_tokenizer(folder):
    """Write the autoencoder; returns its path."""
    save_network(tokenizer(), folder / "tokenizer.pkl")
    return folder / "tokenizer.pkl"


def system(path, batch=4, grad_accum=1, steps=20, **given) -> World:
    """A small run."""
    small = {
        "clip_frames": 12, "targets": 2, "prompt_frames": 4, "recent": 2, "memory": 2, "width": 32, "depth": 1,
        "heads": 2, "num_actions": ACTIONS, "warmup_steps": 1, "ema_beta": 0.9, "latents": False, "own_start": 0.1,
        "own_frames": 3,
        **given,
    }  # fmt: skip
    return World(WorldTrainOptions(tokenizer=str(path), **small), Run(batch=batch, grad_accum=grad_accum, steps=steps))
