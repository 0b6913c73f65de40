"""Presets of the world model: named sets of options that differ from the defaults. A released preset never changes."""

from __future__ import annotations

from typing import Any

# Keys besides `model` are fields of training.config.TrainOptions; `model` holds fields of WorldTrainOptions.
Preset = dict[str, Any]

CPU: Preset = {"tick_steps": 100, "checkpoint_steps": 500, "sample_steps": 1000, "metric_steps": 1000}

PRESETS: dict[str, Preset] = {
    "default": {"batch": 16, "steps": 20_000, "model": {}},
    # LabDoom with --walker=person --textures=soft --sizes=48x64 and the tokenizer labdoom-soft; an hour on two cores
    # with AMX and --precision=bf16.
    "labdoom-soft": {
        **CPU, "batch": 32, "steps": 4_300, "model": {"num_actions": 9, "width": 192, "heads": 6},
    },
    "toy": {
        "batch": 8,
        "steps": 300,
        "tick_steps": 25,
        "checkpoint_steps": 100,
        "sample_steps": 100,
        "model": {
            "clip_frames": 33, "targets": 2, "prompt_frames": 8, "recent": 3, "memory": 2, "width": 64, "depth": 2,
            "heads": 2, "warmup_steps": 20,
        },
    },
}  # fmt: skip
