"""Discriminators: published numbers and sizes."""

import torch

from tests import golden_files
from training.modules.discriminators import PatchDiscriminator


@golden_files.cases("tats", "disc*")
@torch.no_grad()
def test_discriminator(entry, golden):
    is_image = entry["input"].startswith("frame")
    prefix = "image_discriminator." if is_image else "video_discriminator."
    judge = PatchDiscriminator(2 if is_image else 3, entry["x"][1], entry["channels"]).eval()
    state = {prefix + name: value for name, value in judge.state_dict().items()}
    filled = golden_files.wave_fill(state, golden_files.salt_of(golden))
    judge.load_state_dict({name.removeprefix(prefix): value for name, value in filled.items()})
    x = golden_files.wave(entry["x"], 0.05, entry["p"])
    logits, features = judge(x[:, :, 0] if is_image else x)
    golden_files.check(logits, entry["logits"], where="logits")
    assert len(features) == len(entry["features"])
    for found, expected in zip(features, entry["features"], strict=True):
        golden_files.check(found, expected, where="feature")


def test_published_size():
    with torch.device("meta"):
        image, video = (PatchDiscriminator(axes) for axes in (2, 3))
    assert sum(p.numel() for p in image.parameters()) == 2_766_529
    assert sum(p.numel() for p in video.parameters()) == 11_057_857
    assert len(image.state_dict()) == len(video.state_dict()) == 25


@torch.no_grad()
def test_sizes_of_features():
    _, features = PatchDiscriminator(3, width=2)(torch.zeros(1, 3, 16, 128, 128))
    assert [tuple(feature.shape[2:4]) for feature in features] == [(9, 65), (5, 33), (3, 17), (4, 18), (5, 19)]
