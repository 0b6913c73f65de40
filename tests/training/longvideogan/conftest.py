"""Deterministic random weights, and small networks."""

import numpy as np
import pytest
import torch
from torch import nn

from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.sres.generator import SuperResGenerator


@pytest.fixture(scope="session")
def fill():
    """Fill a network: the k-th parameter by name from RandomState(base + k), mapping weights times 100, and the
    j-th magnitude tracker by name 0.5 + 0.05 j. The golden numbers belong to networks filled this way."""

    def fill(network: nn.Module, base: int) -> nn.Module:
        with torch.no_grad():
            for k, (name, parameter) in enumerate(sorted(network.named_parameters())):
                values = np.random.RandomState(base + k).standard_normal(tuple(parameter.shape))
                mapping = "mapping." in name and name.endswith(".weight")
                parameter.copy_(torch.from_numpy(values.astype(np.float32)) * (100 if mapping else 1))
            trackers = sorted((name, buffer) for name, buffer in network.named_buffers() if "magnitude_ema" in name)
            for j, (_, tracker) in enumerate(trackers):
                tracker.fill_(0.5 + 0.05 * j)
        return network

    return fill


@pytest.fixture(scope="session")
def seeded():
    """RandomState(seed).standard_normal(shape) as float32."""

    def seeded(seed: int, *shape: int) -> torch.Tensor:
        return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))

    return seeded


TINY_LRES = {
    "height": 18,
    "width": 32,
    "embedding_channels": 32,
    "num_filters": 8,
    "min_filter_taps": 10,
    "max_filter_taps": 60,
    "w_channels": 24,
    "input_channels": 16,
    "temporal_channels": (16, 16, 12, 8),
    "spatial_channels": (8, 8, 6, 6),
}
TINY_SRES = {
    "height": 36,
    "width": 64,
    "lres_height": 18,
    "lres_width": 32,
    "z_channels": 16,
    "w_channels": 16,
    "num_layers": 8,
    "channel_base": 512,
    "channel_max": 8,
}


@pytest.fixture
def tiny_lres() -> LowResGenerator:
    """Return an 18x32 generator with temporal scale 8 and default-initialised, seeded weights."""
    torch.manual_seed(0)
    return LowResGenerator(**TINY_LRES).eval().requires_grad_(False)


@pytest.fixture
def tiny_sres() -> SuperResGenerator:
    """Return an 18x32 -> 36x64 generator with seeded weights."""
    torch.manual_seed(1)
    return SuperResGenerator(**TINY_SRES).eval().requires_grad_(False)
