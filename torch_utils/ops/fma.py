"""Fused multiply-add with broadcasting."""

from __future__ import annotations

import torch


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Returns a * b + c; the three broadcast against each other."""
    return torch.addcmul(c, a, b)
