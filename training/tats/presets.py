"""Presets of TATS: named sets of options that differ from the defaults. A released preset never changes.

The published rows are those of the release: 24 blocks of width 1024, a learning rate of 4.5e-6 for each clip of the
batch. Each is for the tokenizer of the same name (`train.py tokenizer`).

| row | clip | codes | condition |
|---|---|---|---|
| default, ucf101, sky, taichi | 16 frames of 128x128 | 4x16x16 | none |
| ucf101-class | 16 frames of 128x128 | 4x16x16 | 101 classes |
| mugen | 16 frames of 256x256 | 4x16x16 | a description of 256 ids |
| drums | 16 frames of 96x96 | 4x12x12 | their sound, 64 ids of the tokenizer drums-audio |
| sky-keyframes, taichi-keyframes | every 4th latent frame of 64 frames | 4x16x16 | none |
| labdoom-tiny, labdoom-tiny-keyframes | the same, of 72x128 | 4x9x16, of labdoom-3d | none |
| toy, toy-keyframes | the same, of 32x64 | 4x8x16, of toy-3d | none |
| toy-audio | 16 frames of 32x64 | 4x8x16, of toy-3d | their sound, 64 ids of toy-audio |

In-filling has the same names, with clips of five latent frames.
"""

from typing import Any

from training.tats.options import BASE_LR

# Keys besides `model` are fields of training.config.TrainOptions; `model` holds fields of the system's options.
Preset = dict[str, Any]


PUBLISHED_STEPS = 500_000  # released files stop at 330,000 to 530,000


def published(batch: int = 24, **model: Any) -> Preset:
    """Return a published row."""
    return {"batch": batch, "steps": PUBLISHED_STEPS, "x_flip": False, "model": {"lr": BASE_LR * batch, **model}}


def key_frames(batch: int = 32) -> Preset:
    """Return a published row of key frames."""
    return published(batch, frames=64, every=4)


# A network that a CPU trains in minutes.
SMALL: dict[str, Any] = {"layers": 2, "heads": 4, "width": 96, "lr": 2e-3, "warmup_steps": 20, "clip_norm": 1.0}
TOY: Preset = {"batch": 4, "steps": 300, "tick_steps": 25, "checkpoint_steps": 100, "sample_steps": 100, "model": SMALL}

# One GPU, on codes of the tokenizer's preset labdoom-3d.
LABDOOM: Preset = {
    "batch": 32,
    "steps": 100_000,
    "model": {"layers": 8, "heads": 8, "width": 512, "lr": 3e-4, "warmup_steps": 1000, "clip_norm": 1.0},
}

# Of runs/shootout.sh: 5 M parameters, on codes of the tokenizer of the same name. The run ends by time, so the rate is
# constant.
SHOOTOUT: Preset = {
    "batch": 4,
    "steps": 1_000_000,
    "model": {
        "layers": 6, "heads": 4, "width": 256, "lr": 5e-4, "warmup_steps": 50, "clip_norm": 1.0, "ema_beta": 0.99,
    },
}  # fmt: skip

TATS: dict[str, Preset] = {
    "default": published(),
    "ucf101": published(),
    "ucf101-class": published(condition="label", classes=101),
    "sky": published(),
    "taichi": published(),
    "mugen": published(condition="text"),
    "drums": published(condition="audio"),
    "sky-keyframes": key_frames(),
    "taichi-keyframes": key_frames(),
    "labdoom-tiny": LABDOOM,
    "labdoom-tiny-keyframes": {**LABDOOM, "model": {**LABDOOM["model"], "frames": 64, "every": 4}},
    "shootout": SHOOTOUT,
    "toy": TOY,
    "toy-keyframes": {**TOY, "model": {**SMALL, "frames": 64, "every": 4}},
    "toy-audio": {**TOY, "model": {**SMALL, "condition": "audio"}},
}

INTERPOLATION: dict[str, Preset] = {
    "default": published(),
    "ucf101": published(),
    "sky": published(),
    "taichi": published(),
    "labdoom-tiny": LABDOOM,
    "toy": TOY,
}
