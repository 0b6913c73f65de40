"""Replay a network's kernels as one CUDA graph, where a call is short and the host would be the limit.

A small network that is evaluated again and again, as in each step from noise to a frame, queues hundreds of kernels
that take a few microseconds each. A recorded graph starts all of them by one call of the driver.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

SWITCH = "TORCH_UTILS_CUDA_GRAPHS"  # environment variable; 0 turns recording off
WARM_UP = 3  # calls before recording: libraries choose algorithms and allocate work space
MAX_RECORDINGS = 4  # of a network; one for each combination of shapes

Module = TypeVar("Module", bound=nn.Module)
Signature = tuple[tuple[torch.Size, torch.dtype] | None, ...]


class Recording(NamedTuple):
    """A graph, and the tensors that it reads and writes."""

    graph: Any  # torch.cuda.CUDAGraph
    inputs: list[Tensor | None]
    output: Tensor


class Replayed:
    """A network whose calls are replayed; its other attributes are the network's.

    Arguments are tensors on one GPU or None, the result is one tensor. The network must not synchronise with the host
    or draw random numbers, and its weights must stay where they are. Calls on other devices, and those with
    derivatives, are the network's own.
    """

    def __init__(self, network: nn.Module):
        self.network = network
        self.recordings: OrderedDict[Signature, Recording] = OrderedDict()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def __call__(self, *arguments: Tensor | None) -> Tensor:
        """Return network(*arguments)."""
        tensors = [tensor for tensor in arguments if tensor is not None]
        if torch.is_grad_enabled() or not tensors or not all(tensor.is_cuda for tensor in tensors):
            return self.network(*arguments)
        signature = tuple(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in arguments)
        if signature not in self.recordings:
            self.recordings[signature] = self._record(arguments)
            if len(self.recordings) > MAX_RECORDINGS:
                self.recordings.popitem(last=False)
        self.recordings.move_to_end(signature)
        recording = self.recordings[signature]
        for held, given in zip(recording.inputs, arguments, strict=True):
            if held is not None and given is not None:
                held.copy_(given)
        recording.graph.replay()
        return recording.output.clone()  # the next replay writes into it again

    def _record(self, arguments: tuple[Tensor | None, ...]) -> Recording:
        inputs = [None if tensor is None else tensor.clone() for tensor in arguments]
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.network(*inputs)
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those of the explorer, may use the GPU meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self.network(*inputs)
        return Recording(graph, inputs, output)


def replayed(network: Module) -> Module:
    """Return the network with calls that are replayed, or the network itself where its weights are on no GPU."""
    weight = next(network.parameters(), None)
    if weight is None or not weight.is_cuda or os.environ.get(SWITCH) == "0":
        return network
    return cast(Module, Replayed(network))
