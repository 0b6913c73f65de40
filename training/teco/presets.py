"""Presets of TECO: named sets of options that differ from the defaults. A released preset never changes.

dmlab, minecraft, habitat and kinetics are the published configurations; the tokenizers' presets of the same names make
what they read. The others are for LabDoom, whose four actions are none, forward, left and right.
"""

from __future__ import annotations

from typing import Any

# Keys besides `model` are fields of training.config.TrainOptions; `model` holds fields of TecoOptions.
Preset = dict[str, Any]


def transformer(width: int, mlp: int, heads: int, layers: int, **more: int) -> dict[str, int]:
    """Return the sizes of a transformer."""
    return {"embed_dim": width, "mlp_dim": mlp, "num_heads": heads, "num_layers": layers, **more}


def sizes(
    blocks: tuple[int, int], temporal: dict[str, int], prior: dict[str, int], depths: tuple[int, ...] = (256, 512)
) -> dict[str, Any]:
    """Return the sizes of the four networks; `blocks` are those of encoder and decoder."""
    encoder, decoder = ({"depths": list(depths), "blocks": count} for count in blocks)
    return {"encoder": encoder, "decoder": decoder, "temporal": temporal, "prior": {"vocab_dim": 256, **prior}}


WIDTHS: dict[str, dict[str, Any]] = {
    "dmlab": sizes((2, 4), transformer(1024, 4096, 16, 8), transformer(512, 2048, 8, 8)),
    "minecraft": sizes((4, 6), transformer(1024, 4096, 16, 12), transformer(768, 3072, 12, 6)),
    "habitat": sizes((4, 8), transformer(1024, 4096, 16, 8), transformer(1024, 4096, 16, 16)),
    "kinetics": sizes((8, 10), transformer(1536, 6144, 24, 24), transformer(1024, 4096, 16, 24)),
    "small": sizes((1, 2), transformer(512, 2048, 8, 6), transformer(256, 1024, 8, 6)),
    "tiny": sizes((1, 1), transformer(256, 1024, 4, 6), transformer(192, 768, 4, 4), (64, 128)),
    "shootout": sizes((1, 1), transformer(192, 768, 4, 6), transformer(160, 640, 4, 5, vocab_dim=128), (64, 96)),
    "toy": sizes((1, 1), transformer(128, 256, 4, 2), transformer(96, 192, 4, 2, vocab_dim=64), (32, 64)),
}


def published(name: str, batch: int, **model: Any) -> Preset:
    """Return a configuration of the release."""
    return {"batch": batch, "steps": 1_000_000, "x_flip": False, "model": {**WIDTHS[name], **model}}


LABDOOM = {"action_dim": 4, "embedding_dim": 64, "num_codes": 1024, "proj_dim": 32}

PRESETS: dict[str, Preset] = {
    "default": published("dmlab", 32),
    "dmlab": published("dmlab", 32),
    "minecraft": published("minecraft", 8, embedding_dim=128, dropout_actions=False),
    "habitat": published("habitat", 32, embedding_dim=256, num_codes=2048, z_ds=4),
    "kinetics": published(
        "kinetics", 32, embedding_dim=256, z_ds=2, seq_len=100, context=20, use_actions=False, dropout_actions=False
    ),
    # For frames of 64x128 by the tokenizer's preset labdoom-2d with --size=64x128, which gives codes on 8x16.
    "labdoom-small": {
        "batch": 16,
        "steps": 200_000,
        "model": {**WIDTHS["small"], **LABDOOM, "z_ds": 0},
    },
    "labdoom-tiny": {
        "batch": 16,
        "steps": 50_000,
        "model": {**WIDTHS["tiny"], **LABDOOM, "z_ds": 0, "lr": 3e-4, "warmup_steps": 1000},
    },
    # Of runs/shootout.sh: 5 M parameters, the nine actions of --walker=person, codes on 6x8. The run ends by time, so
    # the rate is constant.
    "shootout": {
        "batch": 4,
        "steps": 1_000_000,
        "model": {
            **WIDTHS["shootout"], **LABDOOM, "action_dim": 9, "num_codes": 256, "z_ds": 0, "seq_len": 64, "context": 36,
            "lr": 5e-4, "schedule": "constant", "warmup_steps": 50, "drop_loss_rate": 0.75, "ema_beta": 0.99,
        },
    },
    "toy": {
        "batch": 4,
        "steps": 300,
        "tick_steps": 25,
        "checkpoint_steps": 100,
        "sample_steps": 100,
        "model": {
            **WIDTHS["toy"], **LABDOOM, "embedding_dim": 32, "num_codes": 64, "proj_dim": 16, "z_ds": 0, "seq_len": 32,
            "context": 8, "lr": 1e-3, "warmup_steps": 20, "drop_loss_rate": 0.5,
        },
    },
}  # fmt: skip
