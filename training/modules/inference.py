"""Copies of networks for generation: without gradients, with layers that are faster, made once for a sampler."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Generic, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from torch_utils.precision import mixed_layers

Network = TypeVar("Network", bound=nn.Module)
Layer = TypeVar("Layer", bound=nn.Module)
Result = TypeVar("Result")


def inference_copy(network: Network, dtype: torch.dtype = torch.float32) -> Network:
    """Return a copy of a network without gradients, which shares its tensors, or has them in another `dtype`."""
    tensors: dict[int, Tensor] = {id(tensor): tensor.detach() for tensor in network.buffers()}
    tensors |= {id(tensor): nn.Parameter(tensor.detach(), requires_grad=False) for tensor in network.parameters()}
    other = copy.deepcopy(network, dict(tensors)).eval()
    return other if dtype == torch.float32 else other.to(dtype)


def replace(
    network: nn.Module, other: nn.Module, is_meant: Callable[[nn.Module], TypeGuard[Layer]],
    make: Callable[[Layer], nn.Module],
) -> None:  # fmt: skip
    """Put make(layer) in the place of each layer of a copy that is meant, where `layer` is that of the network."""
    for name, layer in list(network.named_modules()):
        if name and is_meant(layer):
            parent, _, child = name.rpartition(".")
            setattr(other.get_submodule(parent), child, make(layer))


class Prepared(Generic[Result]):
    """What `make` prepares of networks for generation: made when first used, and again if their precision changes.

    Samplers with other options share it, so that there is one copy in memory.
    """

    def __init__(self, make: Callable[[], Result], networks: Sequence[nn.Module]):
        self.make, self.networks = make, list(networks)
        self._made: tuple[list[str | None], Result] | None = None

    def get(self) -> Result:
        """Return it."""
        precision = [layer.half for layer in mixed_layers(self.networks)]
        if self._made is None or self._made[0] != precision:
            self._made = precision, self.make()
        return self._made[1]
