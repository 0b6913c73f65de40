"""The common part of systems that model latents of single frames before quantization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.contract import Bundle, DataFacts, Run
from training.modules.autoencoder import Autoencoder
from training.modules.latents import LatentScale, LatentVideo
from training.modules.prior import Prior

SCALE = "latents"  # role of the scale of latents in checkpoints and in the exported file


class LatentPrior(Prior):
    """Train one network on normalised latents of a frozen tokenizer of frames, under actions if there are any.

    The options have `num_actions`, `action_values` and `has_actions`.
    """

    models_codes = False

    def __init__(self, options: Any, run: Run):
        super().__init__(options, run)
        self.scale = LatentScale(self.tokenizer.quantizer.channels).to(run.device)
        self.modules[SCALE] = self.scale
        self.latents = LatentVideo(self.tokenizer, self.scale)

    @property
    def normalises(self) -> bool:
        """Return whether latents are normalised."""
        return True

    def latent_shape(self) -> tuple[int, tuple[int, int]]:
        """Return the channels and the grid of a frame's latents; raise `ValueError` for a tokenizer of clips."""
        tokenizer = self.tokenizer
        if not isinstance(tokenizer, Autoencoder) or tokenizer.stride[0] != 1:
            raise ValueError(
                f"{self.options.tokenizer} encodes several frames together, but frames are predicted one by one: give "
                "a tokenizer of frames, such as one of train.py tokenizer --network=vqgan2d"
            )
        edge = tokenizer.stride[1]
        return tokenizer.quantizer.channels, (tokenizer.height // edge, tokenizer.width // edge)

    def use_facts(self, facts: DataFacts) -> None:
        """See `System.use_facts`: stored latents come with their scale."""
        o = self.options
        if o.has_actions:
            found, is_vector = facts.num_values["actions"], "actions" in facts.vectors
            kind, wanted = ("action-values", o.action_values) if is_vector else ("num-actions", o.num_actions)
            if found != wanted:
                raise ValueError(f"the actions of the dataset need --{kind}={found}, but it is {wanted}")
        if self.normalises and facts.latents_mean:
            mean, std = np.array(facts.latents_mean), np.array(facts.latents_std)
            self.scale.set(torch.from_numpy(mean), torch.from_numpy(std))

    def init_from(self, weights: Bundle | Mapping[str, Mapping[str, Tensor]]) -> None:
        """See `System.init_from`: with the scale of the latents."""
        if isinstance(weights, Bundle) and self.role in weights.networks and SCALE in weights.networks:
            state = weights.networks[self.role].state_dict()
            names = [name for name in self.modules if name != SCALE]
            weights = dict.fromkeys(names, state) | {SCALE: weights.networks[SCALE].state_dict()}
        super().init_from(weights)

    def export(self) -> Bundle:
        """See `System.export`."""
        bundle = super().export()
        bundle.networks[SCALE] = self.scale
        return bundle
