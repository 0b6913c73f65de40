"""Rollouts of TECO: one frame after another, with the keys and values of past ones kept.

Up to the trained length the caches hold all slots, and a frame costs one slot, the prior's passes and the decoder.
After it there are two ways (Yan et al., ICML 2023, and the release):

- with sinusoid positions the window slides: its first frame begins a new video, frames that were generated enter by the
  posterior as real ones do, and all slots are computed again, as their positions have changed. What does not depend on
  the window is kept: each frame is encoded once, except for the first ones of the window.
- with rotary positions nothing is computed again: the caches forget their oldest slot.

Memory is constant in the number of frames.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from training.modules.autoencoder import Autoencoder
from training.teco.networks import TECO

# h of a frame (N, E, h, w) -> its codes int64 (N, cells).
CodeSampler = Callable[[Tensor], Tensor]


class Rollout:
    """A batch of videos in generation.

    `codes` (N, C, H, W) are those of the tokenizer for the context frames, n_cond <= C < seq_len, and `actions` (N, C)
    lead into them, -1 where unknown.
    """

    def __init__(self, network: TECO, tokenizer: Autoencoder, codes: Tensor, actions: Tensor):
        num_context = codes.shape[1]
        assert network.n_cond <= num_context < network.seq_len, num_context
        self.network, self.tokenizer, self.temporal = network, tokenizer, network.temporal
        self.frame = num_context  # number of the next frame, from the first of the context
        self.codes, self.actions = codes[:, -network.seq_len + 1 :], actions  # of the last seq_len - 1 frames
        self.caches = self.temporal.caches()
        self.slots: Tensor | None = None  # (N, seq_len - 2, n, width): tokens of the sliding window, from frame 1 on
        cond, z, _ = network.posterior(self.embed(codes))
        latents = torch.cat([cond, z], dim=1)
        self.last = latents[:, -1:]  # z of the newest frame, (N, 1, E, h, w)
        x = self.temporal.slots(latents[:, :-1], network.embed_actions(actions[:, 1:]))
        self.temporal.run(torch.cat([self.temporal.begin(len(codes)), x], dim=1), 0, self.caches)

    def embed(self, codes: Tensor) -> Tensor:
        """Return embedded frames (N, T, D, H, W) of codes (N, T, H, W)."""
        return self.tokenizer.quantizer.lookup(codes).transpose(1, 2)

    @property
    def slides(self) -> bool:
        """Return whether the next frame lies beyond the trained length and moves the window."""
        return self.temporal.positions == "sinusoid" and self.frame >= self.network.seq_len

    def step(self, action: Tensor, sample: CodeSampler) -> Tensor:
        """Generate the next frame after the actions into it (N,): codes of the tokenizer (N, H, W)."""
        network, limit = self.network, self.network.seq_len - 1
        if self.slides:
            h = self.sliding(action)
        else:
            x = self.temporal.slots(self.last, network.embed_actions(action.unsqueeze(1)))
            x = self.temporal.run(x, self.frame, self.caches)
            h = self.temporal.to_latents(x)[:, 0]
        z = network.lookup(sample(h).unflatten(1, network.cells).unsqueeze(1))
        codes = network.decode(h, z[:, 0]).argmax(1)
        self.last = z
        self.codes = torch.cat([self.codes, codes.unsqueeze(1)], dim=1)[:, -limit:]
        self.actions = torch.cat([self.actions, action.unsqueeze(1)], dim=1)[:, -limit:]
        self.frame += 1
        return codes

    def sliding(self, action: Tensor) -> Tensor:
        """Return h (N, E, h, w) of a frame beyond the trained length, for the window of the frames before it."""
        network, temporal, n = self.network, self.temporal, self.temporal.num_tokens
        actions = torch.cat([self.actions[:, 1:], action.unsqueeze(1)], dim=1)  # into the frame after each
        embedded, c = network.embed_actions(actions), network.n_cond
        if self.slots is None:
            self.caches = []
            x = self.embed(self.codes)  # seq_len - 1 frames
            z = network.quantize(network.encode(x[:, 1:], x[:, :1])).output
            self.slots = temporal.slots(z, embedded[:, 1:])
        else:
            x = self.embed(self.codes[:, -2:])
            z = network.quantize(network.encode(x[:, 1:], x[:, :1])).output
            self.slots = torch.cat([self.slots[:, n:], temporal.slots(z, embedded[:, -1:])], dim=1)
        cond = temporal.slots(network.encode(self.embed(self.codes[:, :c])), embedded[:, :c])
        tokens = torch.cat([temporal.begin(len(cond)), cond, self.slots[:, (c - 1) * n :]], dim=1)
        return temporal.to_latents(temporal.run(tokens, last_only=True))[:, -1]
