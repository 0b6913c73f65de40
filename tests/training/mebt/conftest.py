"""A tokenizer and a network of toy size."""

from typing import Any

import pytest
import torch

from training.contract import Bundle
from training.mebt.networks import MeBT
from training.modules.vqgan3d import VQGAN3D
from training.network_file import save_bundle

MODES = ["latent_enc", "latent_self", "latent_enc", "latent_dec", "lt2l", "latent_dec"]


def make_tokenizer():
    torch.manual_seed(0)
    tokenizer = VQGAN3D(16, 16, 8, [4, 8, 8], hidden=2, embedding_dim=6, num_codes=12).eval().requires_grad_(False)
    features = tokenizer.latents(torch.rand(2, 3, 8, 16, 16) * 4 - 2)  # of which codes are spread
    codebook: Any = tokenizer.codebook
    codebook.embeddings.copy_(features.movedim(1, -1).flatten(0, 3)[:12])
    codebook.initialised.fill_(1)
    return tokenizer


def make_network(frames=4, num_codes=12, modes=MODES, gain=3, **others):
    """A network whose predictions differ from each other."""
    torch.manual_seed(1)
    network = MeBT(num_codes, (frames, 2, 2), 16, 2, 3, modes, **others).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.mul_(gain)
    return network


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("mebt") / "tokenizer.pkl"
    save_bundle(Bundle({"tokenizer": make_tokenizer()}, "tokenizer"), path)
    return str(path)
