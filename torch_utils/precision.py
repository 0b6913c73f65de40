"""Precisions in which networks compute: which exist, which devices support them, and how they are set.

| name | meaning |
|---|---|
| fp32 | single precision throughout: the reference |
| tf32 | the same with products and convolutions in TF32, on NVIDIA GPUs from Ampere on |
| fp16 | half-precision features in the later layers of the super-resolution networks, as published; on CUDA |
| bf16 | bfloat16 features in the same layers, and in the blocks of the low-resolution networks |

AUTO, for generation only, is bf16 on CPUs where a probe finds it faster for the networks at hand, and else fp32.

Parameters, gradients, optimisers, styles, demodulation and running averages are always in single precision.
"""

import contextlib
import functools
import platform
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torch_utils.ops.convolution import conv2d, conv3d

AUTO = "auto"
PROBE_ROUNDS = 5
PROBE_GAIN = 1.15  # ratio of the times of one convolution from which bf16 is chosen
PROBE_EDGES = {4: (48, 48), 5: (4, 24, 24)}  # of the probe's input, by the dimensions of the weight
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
HALF_FORMATS = {"fp16": torch.float16, "bf16": torch.bfloat16}


class MixedPrecision(nn.Module):
    """A layer whose features can be in half precision; parameters, styles and averages are not.

    `formats` are the half precisions that it supports and `half` the one in use, by name; None is the precision of the
    parameters. fp16 is used on CUDA only, as it is tens of times slower than fp32 on other devices.
    """

    formats: tuple[str, ...] = ()
    half: str | None = None

    def feature_dtype(self, x: Tensor, parameter: Tensor, force_fp32: bool = False) -> torch.dtype:
        """Return the dtype of the features that this layer computes from `x`; `parameter` is one of its parameters."""
        if self.half is None or force_fp32 or (self.half == "fp16" and not x.is_cuda):
            return parameter.dtype
        return HALF_FORMATS[self.half]

    def in_half(self, x: Tensor) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which products on the device of `x` are in the half precision in use, if any."""
        if self.half is None:
            return contextlib.nullcontext()
        return torch.autocast(x.device.type, HALF_FORMATS[self.half])


def why_not(precision: str, device: torch.device | str) -> str | None:
    """Return why `device` should not compute in `precision`, as the end of a sentence; None if it can."""
    device = torch.device(device)
    assert precision in PRECISIONS, precision
    if precision == "fp32":
        return None
    if device.type == "cuda" and not torch.cuda.is_available():
        return None  # the missing device is reported elsewhere
    if device.type == "cuda":
        # TF32 and bfloat16 exist from Ampere (8.0) on; earlier GPUs emulate them.
        recent = torch.cuda.get_device_capability(device) >= (8, 0)
        return None if recent or precision == "fp16" else "needs an NVIDIA GPU from Ampere on; use fp16 or fp32"
    if precision == "bf16" and device.type == "cpu":
        return None if cpu_has_bf16() else "is slower than fp32 on this CPU, which has no instructions for it; use fp32"
    if precision == "bf16":
        return "is for CUDA and for CPUs that have it; use fp32"
    return f"is for CUDA, and this is {device.type}; use fp32"


def cpu_has_bf16() -> bool:
    """Return whether this CPU multiplies bfloat16 in hardware; emulation with AVX2 is 40 times slower than fp32."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def set_precision(networks: Iterable[nn.Module], precision: str) -> str:
    """Make the layers of `networks` that support a half precision compute in it, all others in that of their weights.

    AUTO is resolved by `fastest`. TF32 is not set for layers: see `tf32`. Returns the precision. Raises ValueError for
    a half precision that no network supports.
    """
    networks = list(networks)
    precision = fastest(networks) if precision == AUTO else precision
    layers = mixed_layers(networks)
    if precision in HALF_FORMATS and not any(precision in layer.formats for layer in layers):
        others = [name for name in HALF_FORMATS if any(name in layer.formats for layer in layers)]
        raise ValueError(f"precision {precision} suits none of these networks; use {' or '.join([*others, 'fp32'])}")
    for layer in layers:
        layer.half = precision if precision in layer.formats else None
    return precision


def mixed_layers(networks: Iterable[nn.Module]) -> list[MixedPrecision]:
    """Return the layers that support a half precision."""
    return [module for network in networks for module in network.modules() if isinstance(module, MixedPrecision)]


def fastest(networks: Iterable[nn.Module]) -> str:
    """Return "bf16" for networks on a CPU whose largest convolution is faster in it, else "fp32"."""
    layers = [layer for layer in mixed_layers(networks) if "bf16" in layer.formats]
    weights = [weight for layer in layers for weight in layer.parameters() if weight.ndim in PROBE_EDGES]
    if not weights or any(weight.device.type != "cpu" for weight in weights) or not cpu_has_bf16():
        return "fp32"
    largest = max(weights, key=lambda weight: weight.numel())
    return "bf16" if _gain(tuple(largest.shape)) >= PROBE_GAIN else "fp32"


@functools.cache
def _gain(shape: tuple[int, ...]) -> float:
    """Return how many times as fast a convolution with such a weight is in bfloat16: the best of some rounds each."""
    convolve = conv2d if len(shape) == 4 else conv3d
    x, weight = torch.ones(1, shape[1], *PROBE_EDGES[len(shape)]), torch.ones(shape)
    best: dict[torch.dtype, float] = {}
    with torch.no_grad():
        for _ in range(PROBE_ROUNDS + 1):  # the first chooses algorithms
            for dtype in (torch.float32, torch.bfloat16):
                inputs = x.to(dtype), weight.to(dtype)
                start = time.process_time()  # so that other programs do not decide
                convolve(*inputs)
                best[dtype] = min(best.get(dtype, float("inf")), time.process_time() - start)
    return best[torch.float32] / max(best[torch.bfloat16], 1e-9)


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in products and convolutions on CUDA while the block runs, then restore the settings."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
