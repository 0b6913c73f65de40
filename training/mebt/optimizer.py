"""The parameter groups of MeBT: weight decay spares embeddings, norms and biases."""

from __future__ import annotations

from typing import Any

from torch import nn

from training.mebt.networks import MeBT

BETAS = (0.9, 0.95)


def parameter_groups(network: MeBT, weight_decay: float) -> list[dict[str, Any]]:
    """Return the groups of the release, in its order: decayed weights, embeddings, other weights, positions."""
    own = dict(network.transformer.named_parameters())
    linear = {f"{name}.weight" for name, module in network.transformer.named_modules() if isinstance(module, nn.Linear)}
    decayed, others = (sorted(name for name in own if (name in linear) == wanted) for wanted in (True, False))
    embeddings = [network.mask_emb, network.sos_emb, network.tok_emb.weight]
    return [
        {"params": [own[name] for name in decayed], "weight_decay": weight_decay},
        {"params": embeddings, "weight_decay": 0.0},
        {"params": [own[name] for name in others], "weight_decay": 0.0},
        {"params": [network.pos_emb], "weight_decay": 0.0},
    ]
