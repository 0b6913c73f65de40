"""Networks whose parameters, gradients and optimiser states are divided among the ranks.

- `shard`, PyTorch's FSDP2 (Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", VLDB 2023):
  each rank holds a part of every parameter; a block's parameters are gathered while it computes.
- `parallelize`, tensor parallelism (Shoeybi et al., "Megatron-LM", 2019): a group of ranks computes the same clips,
  each of them a part of the width of some layers.

A parameter that is divided is a `DTensor`. Checkpoints hold whole tensors, so that they open on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from torch_utils import distributed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def make_mesh(device: torch.device, tensor_parallel: int) -> DeviceMesh:
    """Return all ranks as a mesh with the axes "data" and "tensor", of which the second has `tensor_parallel` ranks.

    Ranks with consecutive numbers, which usually share a machine, are a tensor group; they read the same clips.
    """
    from torch.distributed.device_mesh import init_device_mesh

    world = distributed.get_world_size()
    assert world % tensor_parallel == 0, (world, tensor_parallel)
    shape = world // tensor_parallel, tensor_parallel
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "tensor"))
    for axis, other in (("data", "tensor"), ("tensor", "data")):
        distributed.set_replicas(mesh[axis], mesh.get_group(other))
    return mesh


def parallelize(blocks: Iterable[nn.Module], mesh: DeviceMesh, plan: Mapping[str, Any]) -> None:
    """Divide layers of blocks among each tensor group of a mesh, by a plan of `torch.distributed.tensor.parallel`.

    The blocks are on their device, with the same values on all ranks, which send nothing.
    """
    from torch.distributed.tensor.parallel import parallelize_module

    for block in blocks:
        parallelize_module(block, mesh["tensor"], dict(plan), src_data_rank=None)


def shard(network: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh | None = None) -> None:
    """Divide the parameters of a network among all ranks; those of each of `blocks` are gathered together.

    The network is on its device, with the same values on all ranks. Its own `forward` must run whatever computes with
    it. With a mesh they are divided along its axis "data", after `parallelize`. Nothing changes where that is one rank.
    """
    if distributed.get_world_size() == 1 or (mesh is not None and mesh.size(0) == 1):
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # takes a second

    device = next(network.parameters()).device
    axis = init_device_mesh(device.type, (distributed.get_world_size(),)) if mesh is None else mesh["data"]
    for block in blocks:
        fully_shard(block, mesh=axis)
    fully_shard(network, mesh=axis, reshard_after_forward=True)


def is_sharded(module: nn.Module) -> bool:
    """Return whether some of a network's parameters are divided among the ranks."""
    return any(distributed.is_divided(parameter) for parameter in module.parameters())


def _whole(value: Any) -> Any:
    """Return nested dictionaries with whole tensors."""
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    return distributed.whole(value) if isinstance(value, Tensor) else value


def whole_state(module: nn.Module) -> dict[str, Any]:
    """Return the state of a network with whole tensors; all ranks call it together."""
    state = module.state_dict()
    return _whole(dict(state)) if is_sharded(module) else state


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state of an optimiser with whole tensors; all ranks call it together."""
    state = optimizer.state_dict()
    # In the order of the parameters, however the optimiser met them: all ranks gather the same tensor.
    return _whole({**state, "state": dict(sorted(state["state"].items()))})


def _part_of(value: Any, like: Any) -> Any:
    """Return a whole tensor, which all ranks have, divided as another if that is; no rank sends anything."""
    if not isinstance(like, Tensor) or not distributed.is_divided(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    value, other = value.to(like.device, like.dtype), cast(DTensor, like)
    return distribute_tensor(value, other.device_mesh, other.placements, src_data_rank=None)


def load_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a state of whole tensors, which all ranks have, into a network."""
    own = module.state_dict()
    module.load_state_dict({name: _part_of(value, own.get(name)) for name, value in state.items()})


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state of whole tensors, which all ranks have, into an optimiser."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {
        number: {name: _part_of(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})
