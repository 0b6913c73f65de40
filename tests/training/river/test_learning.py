"""A small predictor learns how squares move, in less than a minute."""

import numpy as np
import pytest
import torch

from tests.training.river import tiny
from training.contract import Run
from training.random import random_state
from training.river.sampling import RiverSampler
from training.river.system import River
from training.sampling import Request

ROWS, CELLS = tiny.SIZE[0] // 4, tiny.SIZE[1] // 4


def squares():
    """A square in each place: (places, 3, H, W)."""
    frames = torch.full((ROWS * CELLS, 3, *tiny.SIZE), -0.7)
    for place, frame in enumerate(frames):
        y, x = 4 * (place // CELLS), 4 * (place % CELLS)
        frame[:, y : y + 4, x : x + 4] = 0.8
    return frames


def moving(rngs, num_frames):
    """Places of squares that go round, to the left or to the right: int64 (N, T)."""
    found = []
    for rng in rngs:
        first, step, row = rng.randint(CELLS), 2 * rng.randint(2) - 1, rng.randint(ROWS)
        found.append([row * CELLS + (first + t * step) % CELLS for t in range(num_frames)])
    return np.array(found)


@pytest.mark.slow
def test_squares_move_on(tmp_path):
    """The error of four predicted frames is a small part of that of standing still, in latents, which show all."""
    path = tiny.save_tokenizer(tmp_path)
    sizes = {"inner_dim": 64, "depth": 1, "mid_depth": 2, "dropout": 0.0, "time_law": "logit-normal"}
    given = {"lr": 2e-3, "ema_beta": 0.98, "clip_norm": 1.0, "prompt_frames": 2, "warmup_steps": 20, "clip_frames": 4}
    run = Run(batch=16, steps=400)
    system = River(tiny.options(path, latents=True, **sizes, **given), run)
    table = system.tokenizer.latents(squares().unsqueeze(2))[:, :, 0]  # (places, C, h, w)
    for step in range(run.steps):
        places = moving(run.rngs("squares", step), 4)
        system.step(iter([{"latents": table[places].transpose(1, 2)}]), step)
    held_out = moving([random_state("held-out", 0, number) for number in range(16)], 6)
    true = system.scale.normalise(table[held_out])
    sampler = system.sampler()
    assert isinstance(sampler, RiverSampler)
    rollout = sampler.rollout(Request(list(range(16))), true[:, :2])
    made = torch.stack([next(rollout) for _ in range(4)], dim=1)
    error, standing = (float((z - true[:, 2:]).square().mean()) for z in (made, true[:, 1:2]))
    assert error < 0.25 * standing
