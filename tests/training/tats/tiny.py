"""Networks of toy size."""

from typing import Any

import torch

from tests import golden_files
from training.contract import Bundle as Bundle
from training.modules.vqgan3d import VQGAN3D
from training.tats.networks import SEGMENT, TATSTransformer
from training.tats.sampling import Facts, LongVideos, Writing

CODES = 4  # of a latent frame


def tokenizer(**options: Any) -> VQGAN3D:
    """Return a tokenizer of 8 frames of 8x8, two latent frames of 2x2 codes of 9."""
    network = VQGAN3D(8, 8, 8, [4, 4, 4], hidden=2, embedding_dim=4, num_codes=9, **options)
    network.load_state_dict(golden_files.wave_fill(network.state_dict()))
    return network.eval()


def sound_tokenizer() -> VQGAN3D:
    """Return a tokenizer of the sound of 8 frames: 2x8x2 codes of 7."""
    network = VQGAN3D(64, 16, 8, hidden=2, embedding_dim=4, num_codes=7, channels=1)
    network.load_state_dict(golden_files.wave_fill(network.state_dict()))
    return network.eval()


def transformer(
    seed: int = 0, conditions: int = 1, latents: int = 4, length: int = 1, **options: Any
) -> TATSTransformer:
    """Return a transformer with large weights, so that its draws differ."""
    torch.manual_seed(seed)
    network = TATSTransformer(9, conditions, length, length - 1 + latents * CODES, 2, 2, 16, **options)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5 if "emb" in name or "head" in name else 0.2)
    return network.eval()


def filler(seed: int = 1, conditions: int = 1) -> TATSTransformer:
    """Return a transformer that fills in between key frames."""
    return transformer(seed, conditions, SEGMENT, unmasked=CODES)


def sampler(hierarchical: bool = False, condition: str = "none", conditions: int = 1, **options: Any) -> LongVideos:
    """Return a sampler."""
    facts = Facts(condition, 4 if hierarchical else 1)
    second = (filler(conditions=conditions), Facts(condition)) if hierarchical else None
    return LongVideos(transformer(conditions=conditions), tokenizer(), facts, second, Writing(**options))


def hearing_sampler(every: int = 1, latents: int = 2, **options: Any) -> LongVideos:
    """Return a sampler that hears what its window covers: with `every` 1, 8 frames and 2 latent frames."""
    length = ((latents - 1) * every + 1) * 16  # ids of a window's sound
    network = transformer(conditions=7, latents=latents, length=length)
    return LongVideos(network, tokenizer(), Facts("audio", every), None, Writing(**options), sound_tokenizer())
