"""Presets of RIVER and its refiner: named sets of options that differ from the defaults. A released one never changes.

| row | frames | latents | clip, stride | context | tokenizer preset |
|---|---|---|---|---|---|
| bair-64, default | 64x64 | 4 x 8x8 | 16, 1 | 1 | bair-64 |
| bair-256 | 256x256 | 8 x 16x16 | 16, 1 | 1 | bair-256 |
| kth | 64x64 | 4 x 8x8 | 40, 1 | 10 | kth |
| clevrer | 128x128 | 4 x 16x16 | 16, 5 | 2 | clevrer |
| labdoom-small | the tokenizer's | | 32, 1 | 16 | labdoom-2d |
| labdoom-tiny | the tokenizer's | | 24, 1 | 8 | toy |
| shootout | 48x64 | 16 x 6x8 | 24, 1 | 8 | shootout |
| toy | the tokenizer's | | 12, 1 | 4 | toy |

The first four are as published: 300 000 steps (130 000 for bair-256) of 16 clips, no normalisation, no average of
weights.
"""

from typing import Any

# Keys besides `model` are fields of training.config.TrainOptions; `model` holds fields of RiverTrainOptions.
Preset = dict[str, Any]


def published(steps: int = 300_000, **model: Any) -> Preset:
    """Return a row of the release."""
    shared = {"normalise": False, "ema_beta": 0.0}
    return {"batch": 16, "steps": steps, "model": {**shared, **model}}


TOY: Preset = {"batch": 16, "steps": 400, "tick_steps": 25, "checkpoint_steps": 100, "sample_steps": 200}

PRESETS: dict[str, Preset] = {
    "default": published(),
    "bair-64": published(),
    "bair-256": published(out_norm="bn"),
    "kth": published(clip_frames=40, prompt_frames=10),
    "clevrer": published(prompt_frames=2, frame_stride=5, colours=True),
    "labdoom-small": {
        "batch": 64,
        "steps": 200_000,
        "model": {
            "clip_frames": 32,
            "prompt_frames": 16,
            "context_frames": 4,
            "inner_dim": 512,
            "num_actions": 4,
            "time_law": "logit-normal",
            "lr": 2e-4,
            "clip_norm": 1.0,
        },
    },
    "labdoom-tiny": {
        "batch": 16,
        "steps": 30_000,
        "model": {
            "clip_frames": 24,
            "prompt_frames": 8,
            "context_frames": 2,
            "inner_dim": 192,
            "depth": 3,
            "mid_depth": 2,
            "num_actions": 4,
            "time_law": "logit-normal",
            "dropout": 0.0,
            "lr": 5e-4,
            "warmup_steps": 1000,
            "clip_norm": 1.0,
            "ema_beta": 0.999,
        },
    },
    # Of runs/shootout.sh: 5 M parameters, the nine actions of --walker=person. The run ends by time, so the rate is
    # constant.
    "shootout": {
        "batch": 16,
        "steps": 1_000_000,
        "model": {
            "clip_frames": 24,
            "prompt_frames": 8,
            "context_frames": 2,
            "inner_dim": 192,
            "depth": 4,
            "mid_depth": 3,
            "num_actions": 9,
            "time_law": "logit-normal",
            "dropout": 0.0,
            "lr": 5e-4,
            "schedule": "constant",
            "warmup_steps": 50,
            "clip_norm": 1.0,
            "ema_beta": 0.99,
        },
    },
    "toy": {
        **TOY,
        "model": {
            "clip_frames": 12,
            "prompt_frames": 4,
            "context_frames": 2,
            "inner_dim": 96,
            "depth": 2,
            "mid_depth": 1,
            "time_law": "logit-normal",
            "dropout": 0.0,
            "lr": 1e-3,
            "schedule": "constant",
            "warmup_steps": 50,
            "clip_norm": 1.0,
            "ema_beta": 0.98,
        },
    },
}

REFINER_PRESETS: dict[str, Preset] = {
    "default": {"batch": 24, "steps": 20_000, "model": {"warmup_steps": 4000}},
    "bair-64": {"batch": 24, "steps": 20_000, "model": {"warmup_steps": 4000}},
    "toy": {
        **TOY,
        "batch": 4,
        "steps": 100,
        "model": {
            "clip_frames": 5,
            "groups": 1,
            "blocks": 2,
            "width": 16,
            "reduction": 4,
            "perceptual_weight": 0.0,
            "lr": 0.1,
            "warmup_steps": 10,
        },
    },
}
