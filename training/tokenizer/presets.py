"""Presets of tokenizers: named sets of options that differ from the defaults. A released preset never changes.

The rows of TATS are its published ones: 8 GPUs x 2 clips x 6 rounds, learning rate 3e-5 x 6 x 2 / 4. TECO and RIVER
publish networks and sizes of codebooks, but train with taming-transformers, whose usual settings the other rows take.

| row | grid of a clip | codes |
|---|---|---|
| ucf101, sky, taichi, default | 4x16x16 of 16x128x128 | 16384 |
| mugen | 4x16x16 of 16x256x256 | 16384 |
| drums | 4x12x12 of 16x96x96 | 16384 |
| drums-audio | 4x8x2 of the sound of 16 frames, 64x16 each | 1024 |
| dmlab; minecraft, habitat, kinetics | 16x16 of 64x64; of 128x128 | 1024 |
| bair-64, kth; bair-256; clevrer | 8x8 of 64x64; 16x16 of 256x256; 16x16 of 128x128 | 16384; 8192 |
| labdoom-2d; labdoom-3d | 9x16 of 72x128; 4x9x16 of 16x72x128 | 1024; 4096 |
| labdoom-soft; shootout | 6x8 of 48x64 | none: 8 channels; 512 |
| toy; toy-3d; toy-audio | 8x16 of 32x64; 4x8x16 of 16x32x64; 4x8x2 of sound | 256; 256; 64 |
"""

from typing import Any

# Keys besides `model` are fields of training.config.TrainOptions; `model` holds fields of TokenizerOptions.
Preset = dict[str, Any]


def tats(size: int = 128, **model: Any) -> Preset:
    """Return a row of TATS: the default network and losses, without restarts."""
    model = {"height": size, "width": size, "quantizer": {"kind": "ema", "restart": False}, **model}
    return {"batch": 96, "grad_accum": 6, "steps": 30_000, "x_flip": False, "model": model}


# Spectrograms: one channel.
SOUND: dict[str, Any] = {"content": "audio", "height": 64, "width": 16}


# The settings of taming-transformers for frames: a learning rate of 4.5e-6 for each frame of the batch.
TAMING: dict[str, Any] = {
    "clip_frames": 1,
    "lr": 4.5e-6 * 32,
    "clip_norm": 0.0,
    "l1_weight": 1.0,
    "perceptual_weight": 1.0,
    "image_gan_weight": 0.8,
    "video_gan_weight": 0.0,
    "feature_weight": 0.0,
    "adaptive": True,
}


def taming(size: int, num_codes: int, embedding_dim: int, network: str = "vqgan2d", **arguments: Any) -> Preset:
    """Return a row of TECO or RIVER: a 2-D network with `arguments`, trained as taming-transformers does."""
    sizes = {"height": size, "width": size, "network": network, "quantizer": {"kind": "vq"}}
    arguments = {"num_codes": num_codes, "embedding_dim": embedding_dim, **arguments}
    return {"batch": 32, "steps": 300_000, "model": {**TAMING, **sizes, "arguments": arguments}}


F8 = {"ch_mult": [1, 2, 2, 4], "z_channels": 4}

# Pixels and codes alone: no network of features has to be fetched, and a CPU trains it in minutes.
PLAIN: dict[str, Any] = {
    "l1_weight": 1.0,
    "l2_weight": 1.0,
    "perceptual_weight": 0.0,
    "lpips": "none",
    "image_gan_weight": 0.0,
    "video_gan_weight": 0.0,
    "feature_weight": 0.0,
    "quantizer": {"kind": "ema", "restart": True},
}
TOY: Preset = {"batch": 16, "steps": 300, "tick_steps": 25, "checkpoint_steps": 100, "sample_steps": 100}

PRESETS: dict[str, Preset] = {
    "default": tats(),
    "ucf101": tats(),
    "sky": tats(),
    "taichi": tats(frame_stride=4),
    "mugen": tats(256, arguments={"downsample": [4, 16, 16]}),
    "drums": tats(96),
    # 8 GPUs x 6 clips x 2 rounds.
    "drums-audio": {
        **tats(
            **SOUND,
            image_gan_weight=0.0,
            video_gan_weight=0.0,
            feature_weight=0.0,
            arguments={"num_codes": 1024, "channels": 1},
        ),
        "grad_accum": 2,
    },
    "dmlab": taming(64, 1024, 256, resolution=64, ch_mult=[1, 2, 4], attn_resolutions=[16]),
    "minecraft": taming(128, 1024, 256, resolution=128, ch_mult=[1, 2, 2, 4], attn_resolutions=[16]),
    "habitat": taming(128, 1024, 256, resolution=128, ch_mult=[1, 2, 2, 4], attn_resolutions=[16]),
    "kinetics": taming(128, 1024, 256, resolution=128, ch_mult=[1, 2, 2, 4], attn_resolutions=[16]),
    "bair-64": taming(64, 16384, 4, resolution=64, attn_resolutions=[16], **F8),
    "kth": taming(64, 16384, 4, resolution=64, attn_resolutions=[16], **F8),
    "bair-256": taming(256, 16384, 8, resolution=256, attn_resolutions=[16], ch_mult=[1, 1, 2, 2, 4], z_channels=8),
    "clevrer": taming(128, 8192, 4, network="river-vqvae"),
    # One GPU. Mazes have few textures, so that codes are narrow and few; restarts keep all of them in use.
    "labdoom-2d": {
        "batch": 32,
        "steps": 60_000,
        "model": {
            **TAMING,
            "height": 72,
            "width": 128,
            "network": "vqgan2d",
            "lpips": "alex",
            "quantizer": {"kind": "ema", "restart": True},
            "arguments": {
                "resolution": 128,
                "ch": 64,
                "ch_mult": [1, 2, 2, 4],
                "attn_resolutions": [],
                "z_channels": 64,
                "embedding_dim": 32,
                "num_codes": 1024,
            },
        },
    },
    "labdoom-3d": {
        "batch": 16,
        "grad_accum": 2,
        "steps": 60_000,
        "model": {
            "height": 72,
            "width": 128,
            "lpips": "alex",
            "gan_ramp": 5000,
            "quantizer": {"kind": "ema", "restart": True},
            "arguments": {"hidden": 24, "embedding_dim": 64, "num_codes": 4096},
        },
    },
    # A CPU, a quarter of an hour: continuous latents of frames with soft textures, for systems that model latents.
    "labdoom-soft": {
        "batch": 32,
        "steps": 5000,
        "tick_steps": 100,
        "checkpoint_steps": 500,
        "sample_steps": 1000,
        "metric_steps": 1000,
        "model": {
            **PLAIN,
            "network": "conv2d",
            "height": 48,
            "width": 64,
            "clip_frames": 1,
            "lr": 1e-3,
            "schedule": "cosine",
            "warmup_steps": 100,
            "l1_weight": 0.3,
            "l2_weight": 10.0,
            "quantizer": {"kind": "none"},
            "arguments": {"widths": [32, 96, 128], "blocks": 2, "embedding_dim": 8},
        },
    },
    # Of runs/shootout.sh: frames alone, so that every system of codes and latents can share it.
    "shootout": {
        "batch": 16,
        "steps": 1_000_000,
        "model": {
            **PLAIN,
            "network": "vqgan2d",
            "height": 48,
            "width": 64,
            "clip_frames": 1,
            "lr": 1e-3,
            "warmup_steps": 50,
            "arguments": {
                "resolution": 64,
                "ch": 32,
                "ch_mult": [1, 1, 2, 2],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "z_channels": 32,
                "embedding_dim": 16,
                "num_codes": 512,
            },
        },
    },
    "toy": {
        **TOY,
        "model": {
            **PLAIN,
            "network": "vqgan2d",
            "height": 32,
            "width": 64,
            "clip_frames": 1,
            "lr": 1e-3,
            "warmup_steps": 20,
            "arguments": {
                "resolution": 64,
                "ch": 32,
                "ch_mult": [1, 1, 2],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "z_channels": 16,
                "embedding_dim": 16,
                "num_codes": 256,
            },
        },
    },
    "toy-3d": {
        **TOY,
        "batch": 4,
        "model": {
            **PLAIN,
            "height": 32,
            "width": 64,
            "lr": 1e-3,
            "warmup_steps": 20,
            "arguments": {"downsample": [4, 4, 4], "hidden": 12, "embedding_dim": 16, "num_codes": 256},
        },
    },
    "toy-audio": {
        **TOY,
        "batch": 4,
        "model": {
            **PLAIN,
            **SOUND,
            "lr": 1e-3,
            "warmup_steps": 20,
            "arguments": {"hidden": 12, "embedding_dim": 16, "num_codes": 64, "channels": 1},
        },
    },
}
