"""Named recipes: one row a run. A row lists what differs from the published defaults, and is never edited once used.

`default` is the published recipe (LongVideoGAN, appendix B). `toy` is the same mathematics at a size that a CPU trains
in minutes: 18x32 -> 72x128, clips of 32 frames, three temporal doublings.
"""

from typing import Any

# Keys besides `model` are fields of training.config.TrainOptions; `model` holds fields of the stage's options.
Preset = dict[str, Any]

LRES: dict[str, Preset] = {
    "default": {"batch": 64, "grad_accum": 2, "steps": 100_000, "model": {}},
    "toy": {
        "batch": 4,
        "grad_accum": 1,
        "steps": 280,
        "tick_steps": 10,
        "checkpoint_steps": 70,
        "sample_steps": 70,
        "model": {
            "height": 18,
            "width": 32,
            "num_frames": 32,
            "preview_frames": 64,
            "preview_videos": 4,
            # A few hundred steps of four clips: a quick discriminator, and augmentation that leaves colour and layout
            # alone, for there is no time to overfit (docs/LOG.md has what other choices gave).
            "g_lr": 0.002,
            "d_lr": 0.006,
            "beta2": 0.9,
            "gamma": 0.1,
            "diffaug": "cutout",
            "ema_beta": 0.99,
            "ema_rampup_steps": 50,
            "generator": {
                "embedding_channels": 128,
                "num_filters": 32,
                "min_filter_taps": 16,
                "max_filter_taps": 256,
                "w_channels": 128,
                "input_channels": 48,
                "temporal_channels": (48, 48, 48, 32),
                "spatial_channels": (32, 16, 16, 16),
            },
            "discriminator": {"channels": (16, 16, 32, 48, 64), "epilogue_channels": 96},
        },
    },
}

SRES: dict[str, Preset] = {
    "default": {"batch": 32, "grad_accum": 1, "steps": 275_000, "model": {}},
    "toy": {
        "batch": 2,
        "grad_accum": 1,
        "steps": 160,
        "tick_steps": 10,
        "checkpoint_steps": 40,
        "sample_steps": 40,
        "model": {
            "height": 72,
            "width": 128,
            "lres_height": 18,
            "lres_width": 32,
            "preview_frames": 32,
            "preview_videos": 4,
            "ema_beta": 0.99,
            "ema_rampup_steps": 50,
            "generator": {
                "num_layers": 8,
                "channel_base": 2048,
                "channel_max": 32,
                "z_channels": 64,
                "w_channels": 64,
            },
            "discriminator": {"channel_base": 2048, "channel_max": 64},
        },
    },
}

STAGES: dict[str, dict[str, Preset]] = {"longvideogan-lres": LRES, "longvideogan-sres": SRES}
