"""Presets of MeBT: named sets of options that differ from the defaults. A released preset never changes.

The rows of stl (Sky Timelapse), ucf and taichi are published, with the batch of one GPU; the number of GPUs is not.
They take the 3-D tokenizer of the same data, for taichi-16 encoded from every fourth frame.

| row | grid | sampling: steps, c, top k, bootstrap; parts x rounds at a temperature |
|---|---|---|
| stl-16 | 4x16x16 | 32, 8, all, 0; 2 x 2 at 0.7 |
| ucf-16, default | 4x16x16 | 128, 6, all, 0; 4 x 4 at 0.7 |
| taichi-16 | 4x16x16 | 64, 2, all, 0; 2 x 8 at 0.3 |
| stl-128 | 32x16x16 | 32, 4, 32, 64; 2 x 2 at 0.7 |
| ucf-128 | 32x16x16 | 32, 2, 32, 64; 32 x 2 at 0.1 |
| taichi-128 | 32x16x16 | 32, 4, 32, 64; 2 x 4 at 0.1 |
| labdoom-tiny, toy | of 128 and 16 frames | 24, 4, 64, 16; 4 x 1 at 0.7 |
"""

from typing import Any

from training.mebt.modes import stack

# Keys besides `model` are fields of training.config.TrainOptions; `model` holds fields of MeBTOptions.
Preset = dict[str, Any]

# Of the published commands: steps, choice temperature; parts, rounds, temperature of a revision.
SAMPLING = {
    "stl-16": {"steps": 32, "choice_temperature": 8.0, "revise_parts": 2, "revise_rounds": 2},
    "ucf-16": {"steps": 128, "choice_temperature": 6.0, "revise_parts": 4, "revise_rounds": 4},
    "taichi-16": {"steps": 64, "choice_temperature": 2.0, "revise_parts": 2, "revise_rounds": 8}
    | {"revise_temperature": 0.3},
    "stl-128": {"steps": 32, "choice_temperature": 4.0, "top_k": 32, "bootstrap": 64}
    | {"revise_parts": 2, "revise_rounds": 2},
    "ucf-128": {"steps": 32, "choice_temperature": 2.0, "top_k": 32, "bootstrap": 64}
    | {"revise_parts": 32, "revise_rounds": 2, "revise_temperature": 0.1},
    "taichi-128": {"steps": 32, "choice_temperature": 4.0, "top_k": 32, "bootstrap": 64}
    | {"revise_parts": 2, "revise_rounds": 4, "revise_temperature": 0.1},
}


def published(
    name: str, batch: int, lr: float, decay: float = 1e-4, prior: str = "longest", dropout: float = 0
) -> Preset:
    """Return a published row."""
    model: dict[str, Any] = {
        "num_frames": int(name.partition("-")[2]), "lr": lr, "weight_decay": decay, "window_prior": prior,
        "embedding_dropout": dropout, "attention_dropout": dropout, "residual_dropout": dropout,
        "sampling": SAMPLING[name],
    }  # fmt: skip
    return {"batch": batch, "steps": 2_000_000, "model": model}


def small(num_frames: int, width: int, latents: int, encoders: int, decoders: int, lr: float, **others: Any) -> Preset:
    """Return a row for a CPU."""
    model: dict[str, Any] = {
        "num_frames": num_frames, "width": width, "heads": 4, "latents": latents, "modes": stack(encoders, decoders),
        "lr": lr, "schedule": "cosine", "warmup_steps": 20, "clip_norm": 1.0, "ema_beta": 0.99,
        "sampling": {"steps": 24, "choice_temperature": 4.0, "top_k": 64, "bootstrap": 16, "revise_rounds": 1},
    }  # fmt: skip
    return {"model": model, **others}


def shootout() -> Preset:
    """Return the row of runs/shootout.sh, which continues 36 frames as others do where it is asked to (-o given=36).

    Windows of all lengths are trained on, so that short clips need no draft of 64 frames (-o window=16).
    """
    row = small(64, 192, 64, 3, 3, 5e-4, batch=4, steps=1_000_000)
    return {**row, "model": {**row["model"], "window_prior": "uniform", "schedule": "constant", "warmup_steps": 50}}


PRESETS: dict[str, Preset] = {
    "default": published("ucf-16", 32, 3e-5),
    "stl-16": published("stl-16", 6, 1.08e-5, 0.01, dropout=0.1),
    "stl-128": published("stl-128", 5, 1.8e-5, 0.01, "gaussian2", dropout=0.1),
    "ucf-16": published("ucf-16", 32, 3e-5),
    "ucf-128": published("ucf-128", 6, 3e-5, prior="gaussian100000_2"),
    "taichi-16": published("taichi-16", 32, 3e-5),
    "taichi-128": published("taichi-128", 4, 3e-5, prior="gaussian100000_2"),
    # Whole minutes of LabDoom on two cores; with the tokenizer's preset toy-3d.
    "labdoom-tiny": small(
        128, 128, 64, 3, 3, 1e-3, batch=4, steps=4000, tick_steps=50, sample_steps=1000, checkpoint_steps=500
    ),
    # Of runs/shootout.sh: 5 M parameters. The run ends by time, so the rate is constant.
    "shootout": shootout(),
    "toy": small(16, 96, 64, 2, 2, 2e-3, batch=8, steps=1500, tick_steps=50, sample_steps=500, checkpoint_steps=250),
}
