"""Normalisation layers: batch norm over all ranks on any device, and the group norm of published tokenizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torch_utils import distributed


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks; its gradient is summed too, as every rank's loss depends on every rank's addend."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return distributed.all_reduce_sum(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return distributed.all_reduce_sum(grads[0])


class BatchNorm(nn.SyncBatchNorm):
    """Batch norm of (N, C, ...) with any number of axes; eps 1e-5, momentum 0.1, statistics shared by all ranks.

    The statistics of torch's own layer are shared on GPUs only. Every rank must have equally many values.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, ...); in training mode also update the running statistics."""
        if not self.training or distributed.get_world_size() == 1:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        world, shape = distributed.get_world_size(), (1, -1, *[1] * (input.ndim - 2))
        axes = [axis for axis in range(input.ndim) if axis != 1]
        x = input.float()
        mean = _SumOverRanks.apply(x.mean(axes)) / world  # pyright: ignore[reportOperatorIssue]
        centred = x - mean.view(shape)
        var = _SumOverRanks.apply(centred.square().mean(axes)) / world  # pyright: ignore[reportOperatorIssue]
        with torch.no_grad():
            num_values = world * input.numel() // input.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (num_values / max(num_values - 1, 1)), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        scale = (var + self.eps).rsqrt() * self.weight
        return (centred * scale.view(shape) + self.bias.view(shape)).to(input.dtype)


def group_norm(channels: int) -> nn.GroupNorm:
    """Return the group norm of published tokenizers: 32 groups, eps 1e-6.

    Raises `ValueError` unless 32 divides the number of channels.
    """
    if channels % 32:
        raise ValueError(f"a group norm of 32 groups cannot divide {channels} channels: use a multiple of 32")
    return nn.GroupNorm(32, channels, eps=1e-6)


def make_norm(kind: str, channels: int) -> nn.Module:
    """Return the norm "batch" or "group" for a number of channels."""
    if kind not in ("batch", "group"):
        raise ValueError(f"the norm {kind!r} is unknown: use batch or group")
    return BatchNorm(channels) if kind == "batch" else group_norm(channels)
