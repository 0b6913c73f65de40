"""Presets: named sets of options that differ from the published defaults. A released preset never changes.

`default` is the published configuration (LongVideoGAN, appendix B); the published runs on horseback riding and on
mountain biking have presets of their own. `labdoom-small` is for one GPU, or a slow run on a CPU, at the published
frame sizes. `toy` is the same algorithm at a size that a CPU trains in minutes: 18x32 -> 72x128, clips of 32 frames,
three temporal doublings.

Trainable parameters of G and D, in millions:

| row           | lres G | lres D | sres G | sres D |
|---------------|--------|--------|--------|--------|
| published     |  83.22 |  46.42 |  27.17 |  24.00 |
| labdoom-small |   3.01 |   3.24 |   2.00 |   2.87 |
| labdoom-tiny  |   0.76 |   0.62 |   0.37 |   0.37 |
| shootout      |   4.84 |   2.97 |        |        |
| toy           |   0.65 |   0.62 |   0.37 |   0.37 |
"""

from typing import Any

# Keys besides `model` are fields of training.config.TrainOptions; `model` holds fields of the stage's options.
Preset = dict[str, Any]

# The published runs share one configuration: horseback riding and mountain biking differ in the dataset only.
PUBLISHED_LRES: Preset = {"batch": 64, "grad_accum": 2, "steps": 100_000, "model": {"gamma": 1.0}}
PUBLISHED_SRES: Preset = {"batch": 32, "grad_accum": 1, "steps": 275_000, "model": {"gamma": 1.0}}

LRES: dict[str, Preset] = {
    "default": {"batch": 64, "grad_accum": 2, "steps": 100_000, "model": {}},
    "horseback-lres": PUBLISHED_LRES,
    "biking-lres": PUBLISHED_LRES,
    # Maze videos are simple, their clips have 300 frames, and a walker revisits places within seconds: a fifth of the
    # published widths, four temporal doublings instead of five, clips of half the length, and filters of 1 to 34
    # seconds at 30 fps instead of 4 to 167. A shorter run needs a shorter EMA: its half-life is 693 steps. A clip takes
    # 0.9 GB, so that a round of eight fits GPUs of 12 GB.
    "labdoom-small": {
        "batch": 16,
        "grad_accum": 2,
        "steps": 50_000,
        "model": {
            "num_frames": 64,
            "ema_beta": 0.999,
            "ema_rampup_steps": 5000,
            "generator": {
                "embedding_channels": 256,
                "num_filters": 32,
                "min_filter_taps": 32,
                "max_filter_taps": 1024,
                "w_channels": 256,
                "input_channels": 96,
                "temporal_channels": (96, 96, 96, 80, 64),
                "spatial_channels": (64, 48, 32, 32),
            },
            "discriminator": {"channels": (16, 32, 64, 96, 128), "epilogue_channels": 256},
        },
    },
    # What a CPU learns in one or two hours of walks through mazes of one look (docs/results.md). Published learning
    # rates except for a slower discriminator, and an R1 weight that is larger as batches are smaller: with the
    # published values D soon classifies every clip correctly. No DiffAugment, since there are many clips and few steps.
    # Filters end at 8 seconds, after which a walker is somewhere else.
    "labdoom-tiny": {
        "batch": 4,
        "grad_accum": 1,
        "steps": 2500,
        "keep": 100,  # 24 MB each, of which the best is selected
        "precision": "bf16",
        "tick_steps": 50,
        "checkpoint_steps": 250,
        "sample_steps": 500,
        "model": {
            "height": 18,
            "width": 32,
            "num_frames": 32,
            "preview_frames": 64,
            "preview_videos": 9,
            "d_lr": 0.001,
            "gamma": 20.0,
            "diffaug": "",
            "temporal_stretch": 0.0,
            "ema_beta": 0.998,
            "ema_rampup_steps": 2000,
            "generator": {
                "embedding_channels": 128,
                "num_filters": 32,
                "min_filter_taps": 16,
                "max_filter_taps": 256,
                "w_channels": 128,
                "input_channels": 48,
                "temporal_channels": (48, 48, 48, 48),
                "spatial_channels": (48, 32, 32, 32),
            },
            "discriminator": {"channels": (16, 16, 32, 48, 64), "epilogue_channels": 96},
        },
    },
    # Of runs/shootout.sh: five million parameters in G, most of them where frames are small and time is coarse, as
    # others cost a CPU minutes a step; the losses' weights of labdoom-tiny, for small batches. The run ends by time.
    "shootout": {
        "batch": 4,
        "grad_accum": 1,
        "steps": 1_000_000,
        "model": {
            "height": 48,
            "width": 64,
            "num_frames": 32,
            "d_lr": 0.001,
            "gamma": 20.0,
            "diffaug": "",
            "temporal_stretch": 0.0,
            "ema_beta": 0.99,
            "ema_rampup_steps": 200,
            "preview_frames": 64,
            "generator": {
                "embedding_channels": 256,
                "num_filters": 32,
                "min_filter_taps": 16,
                "max_filter_taps": 512,
                "w_channels": 256,
                "input_channels": 128,
                "temporal_channels": (184, 152, 96, 48),
                "spatial_channels": (48, 32, 16, 16),
            },
            "discriminator": {"channels": (16, 32, 64, 96, 128), "epilogue_channels": 256},
        },
    },
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
            # A few hundred steps of four clips: the R1 weight of labdoom-tiny, and no augmentation, since the run is
            # too short to overfit (docs/LOG.md has the results of other choices).
            "gamma": 20.0,
            "diffaug": "",
            "temporal_stretch": 0.0,
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
    "horseback-sres": PUBLISHED_SRES,
    "biking-sres": PUBLISHED_SRES,
    # All layers of the published schedule at a quarter of its widths, since layers near full resolution dominate the
    # cost. A clip takes 0.65 GB.
    "labdoom-small": {
        "batch": 16,
        "grad_accum": 2,
        "steps": 50_000,
        "model": {
            "ema_beta": 0.999,
            "ema_rampup_steps": 5000,
            "generator": {"channel_base": 8192, "channel_max": 128, "z_channels": 128, "w_channels": 128},
            "discriminator": {"channel_base": 4096, "channel_max": 192},
        },
    },
    # The second stage: the networks of `toy`. A slower discriminator and a larger R1 weight here too, and no
    # augmentation: with this many clips the discriminator does not overfit.
    "labdoom-tiny": {
        "batch": 2,
        "grad_accum": 1,
        "steps": 1750,
        "keep": 100,
        "precision": "bf16",
        "tick_steps": 50,
        "checkpoint_steps": 250,
        "sample_steps": 500,
        "model": {
            "height": 72,
            "width": 128,
            "lres_height": 18,
            "lres_width": 32,
            "preview_frames": 32,
            "preview_videos": 4,
            "d_lr": 0.001,
            "gamma": 40.0,
            "augment": "none",
            "ema_beta": 0.998,
            "ema_rampup_steps": 2000,
            "generator": {
                "num_layers": 8,
                "channel_base": 4096,
                "channel_max": 64,
                "z_channels": 64,
                "w_channels": 64,
            },
            "discriminator": {"channel_base": 2048, "channel_max": 64},
        },
    },
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
            "d_lr": 0.001,
            "gamma": 40.0,
            "augment": "none",
            "ema_beta": 0.99,
            "ema_rampup_steps": 50,
            "generator": {
                "num_layers": 8,
                "channel_base": 4096,
                "channel_max": 64,
                "z_channels": 64,
                "w_channels": 64,
            },
            "discriminator": {"channel_base": 2048, "channel_max": 64},
        },
    },
}

STAGES: dict[str, dict[str, Preset]] = {"longvideogan-lres": LRES, "longvideogan-sres": SRES}
