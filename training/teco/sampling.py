"""Generate videos that continue a prompt, under actions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from training.teco.networks import MaskGit


def sample_codes(
    prior: MaskGit, h: Tensor, orders: Tensor, num_parts: Sequence[int], draw: Callable[[Tensor, Tensor, int], Tensor]
) -> Tensor:
    """Return the codes of a frame by draft and revision: (N, cells)."""
    codes = torch.full(orders.shape[1:], prior.num_codes, device=h.device)
    for number, (order, parts) in enumerate(zip(orders, num_parts, strict=True)):
        for wanted in order.tensor_split(parts, dim=1):
            if wanted.shape[1] == 0:
                continue
            codes = codes.scatter(1, wanted, prior.num_codes)
            codes = codes.scatter(1, wanted, draw(prior(codes, h, wanted), wanted, number))
    return codes
