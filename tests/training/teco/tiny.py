"""A tiny TECO with its tokenizer, and prompts for it."""

import functools

import numpy as np
import torch

from training.contract import Run
from training.modules.vqgan2d import VQGAN2D
from training.network_file import save_network
from training.sampling import Prompt
from training.teco.networks import TECO
from training.teco.sampling import TecoSampler
from training.teco.system import TecoOptions, TecoTraining

HEIGHT, WIDTH, GRID, ACTIONS = 16, 32, (8, 16), 4
TRANSFORMER = {"embed_dim": 32, "mlp_dim": 48, "num_heads": 2, "num_layers": 2}
SIZES = {
    "encoder": {"depths": [32, 32], "blocks": 1},
    "decoder": {"depths": [32, 32], "blocks": 1},
    "embedding_dim": 16,
    "num_codes": 24,
    "proj_dim": 8,
    "z_ds": 4,
    "temporal": TRANSFORMER,
    "prior": {**TRANSFORMER, "vocab_dim": 16},
    "seq_len": 8,
    "context": 3,
    "action_dim": ACTIONS,
    "action_embed_dim": 4,
}


@functools.cache
def tokenizer() -> VQGAN2D:
    """Return a tokenizer of frames of 16x32 with cells of 2x2 and 32 codes."""
    torch.manual_seed(1)
    network = VQGAN2D(HEIGHT, WIDTH, 1, 16, 32, [1, 1], 1, [], 4, 6, 32, quantizer={"kind": "vq"})
    torch.nn.init.normal_(network.quantizer.get_parameter("embedding.weight"))
    return network.eval().requires_grad_(False)


TABLES = ("sos", "sos_post", "token_embed", "rows", "columns", "codebook")


def network(seed=0, **changes) -> TECO:
    """Return a network in which biases and tables are large enough to matter."""
    torch.manual_seed(seed)
    made = TECO(GRID, 32, 6, **{**SIZES, **changes})
    for name, parameter in made.named_parameters():
        if parameter.ndim == 1 and not name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
        elif name.rpartition(".")[2] in TABLES:  # these start small
            parameter.data.mul_(25)
    return made.eval().requires_grad_(False)


def codes(num_videos: int, num_frames: int, seed=0) -> torch.Tensor:
    """Return random codes of the tokenizer: (N, T, 8, 16)."""
    drawn = np.random.RandomState(seed).randint(0, 32, (num_videos, num_frames, *GRID))
    return torch.from_numpy(drawn)


def actions(num_videos: int, num_frames: int, seed=0) -> torch.Tensor:
    """Return random actions: (N, T)."""
    return torch.from_numpy(np.random.RandomState(seed + 77).randint(0, ACTIONS, (num_videos, num_frames)))


class RandomPrompt(Prompt):
    """Frames and actions of a video for each key, functions of the frame's number."""

    def __init__(self, keys=(0,), changed_from: int | None = None):
        self.keys, self.changed_from = keys, changed_from
        self.asked: list[tuple[int, int]] = []

    def frames(self, start, count, size):
        assert isinstance(start, int)
        self.asked.append((start, count))
        drawn = [
            [
                np.random.RandomState(1000 * key + frame + 500).standard_normal((3, *size))
                for frame in range(start, start + count)
            ]
            for key in self.keys
        ]
        return torch.from_numpy(np.array(drawn, np.float32)).transpose(1, 2).tanh()

    def stream(self, name, start, count):
        assert name == "actions" and isinstance(start, int)
        drawn = [
            [
                (np.random.RandomState(1000 * key + frame + 500).randint(ACTIONS) + (frame == self.changed_from))
                % ACTIONS
                for frame in range(start, start + count)
            ]
            for key in self.keys
        ]
        return torch.tensor(drawn)


def sampler(options=None, **changes) -> TecoSampler:
    """Return the sampler of a network."""
    made = TecoSampler(network(**changes), tokenizer())
    return made if options is None else TecoSampler(made.network, made.tokenizer, options)


def system(folder, batch=4, **changes) -> TecoTraining:
    """Return a run, whose tokenizer is written to a folder; changes are of its options or of `Run`."""
    path = folder / "tokenizer.pkl"
    if not path.exists():
        save_network(tokenizer(), path)
    shared = {name: changes.pop(name) for name in ("grad_accum", "precision", "seed") if name in changes}
    options = {**SIZES, "tokenizer": str(path), "lr": 3e-3, "warmup_steps": 2, "drop_loss_rate": 0.5, **changes}
    shared["tensor_parallel"] = options.get("tensor_parallel", 1)
    return TecoTraining(TecoOptions(**options), Run(batch=batch, steps=20, **shared))


def batch(step: int, size=4, first=0, last=None) -> dict[str, torch.Tensor]:
    """Return the clips [first, last) of the batch of a step."""
    piece = slice(first, last)
    seq_len = SIZES["seq_len"]
    return {"codes": codes(size, seq_len, step)[piece], "actions": actions(size, seq_len, step)[piece]}
