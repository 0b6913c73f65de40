"""Fused multiply-add with broadcasting."""

from __future__ import annotations

import torch


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Return a * b + c; the three tensors are broadcast."""
    return torch.addcmul(c, a, b)
