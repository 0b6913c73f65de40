"""The transformers of TECO divided among groups of ranks by their width (tensor parallelism).

Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model Parallelism", 2019, section
3: of each layer a rank computes some of the heads and some of the hidden channels of the MLP, and two sums over the
group make the results whole. Norms, residual streams and everything outside the layers are the same on all ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from torch_utils import sharding
from training.teco.layers import TransformerLayer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from training.teco.options import TecoOptions


def check_groups(options: TecoOptions) -> None:
    """Raise `ValueError` unless the groups of ranks divide heads and hidden channels of both transformers."""
    count = options.tensor_parallel
    for part in ("temporal", "prior"):
        sizes: dict[str, int] = getattr(options, part)
        for name, what in (("num_heads", "heads"), ("mlp_dim", "hidden channels")):
            if sizes[name] % count:
                raise ValueError(
                    f"Option tensor_parallel is {count}, which does not divide the {sizes[name]} {what} of the "
                    f"{part} transformer; use a divisor"
                )


def plan() -> dict[str, Any]:
    """Return how the linear layers of a `TransformerLayer` are divided."""
    from torch.distributed.tensor import Replicate  # takes a second
    from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel

    # One input for queries, keys and values, so that their gradients are summed over the ranks once.
    shared = PrepareModuleInput(
        input_layouts=(Replicate(), None, None, None, None),
        desired_input_layouts=(Replicate(), None, None, None, None),
    )
    heads = {f"attention.{name}": ColwiseParallel() for name in ("query", "key", "value")}
    mlp = {"wi": ColwiseParallel(), "wo": RowwiseParallel()}
    return {"attention": shared, **heads, "attention.out": RowwiseParallel(), **mlp}


def divide(network: nn.Module, mesh: DeviceMesh) -> None:
    """Divide the transformer layers of a network, which is on its device, among the tensor groups of a mesh."""
    layers = [part for part in network.modules() if isinstance(part, TransformerLayer)]
    sharding.parallelize(layers, mesh, plan())
