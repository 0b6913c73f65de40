"""Chooses the implementation of an operator from what the caller asked for and from where the tensor lives."""

from __future__ import annotations

import torch

CHOICES = ("auto", "ref", "matmul", "cuda")

# What "auto" means on each type of device; devices that are not named use the reference.
AUTO = {"cpu": "matmul", "cuda": "ref"}


def select_impl(impl: str, device: torch.device) -> str:
    """Returns "ref" or "matmul" for a requested `impl` ("auto", "ref", "matmul", "cuda").

    "cuda" asks for the fastest path wherever the tensor lives, so it is the same as "auto". Inside `torch.compile`,
    `torch.export` and the transforms of `torch.func`, "auto" is the reference, which consists of plain operations.
    Raises ValueError for an unknown name.
    """
    if impl not in CHOICES:
        raise ValueError(f"unknown impl {impl!r}: choose one of {', '.join(CHOICES)}")
    if impl in ("ref", "matmul"):
        return impl
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return "ref"
    return AUTO.get(device.type, "ref")
