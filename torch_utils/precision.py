"""In which arithmetic the networks compute: what there is, where it may be used, and how it is turned on.

| name | what it is |
|---|---|
| fp32 | single precision throughout: the reference |
| tf32 | the same with products and convolutions in TF32, on NVIDIA GPUs from Ampere on |
| fp16 | half-precision features in the later layers of the super-resolution networks, as published; on CUDA |
| bf16 | bfloat16 features in the same layers, and in the blocks of the low-resolution networks |

Parameters, gradients, optimisers, styles, demodulation and running averages are in single precision always.
"""

import contextlib
import platform
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
HALF_FORMATS = {"fp16": torch.float16, "bf16": torch.bfloat16}


class MixedPrecision(nn.Module):
    """A layer that can keep its features in half precision; parameters, styles and averages never are.

    `formats` are the half precisions that suit it and `half` the one in use, by name; None is the parameters' own
    precision. fp16 is used on CUDA alone, as it is tens of times slower than fp32 elsewhere.
    """

    formats: tuple[str, ...] = ()
    half: str | None = None

    def feature_dtype(self, x: Tensor, parameter: Tensor, force_fp32: bool = False) -> torch.dtype:
        """The precision of the features that this layer makes of `x`, where `parameter` is one of its own."""
        if self.half is None or force_fp32 or (self.half == "fp16" and not x.is_cuda):
            return parameter.dtype
        return HALF_FORMATS[self.half]


def why_not(precision: str, device: torch.device | str) -> str | None:
    """Why `device` should not compute in `precision`, as the end of a sentence; None if it may."""
    device = torch.device(device)
    assert precision in PRECISIONS, precision
    if precision == "fp32":
        return None
    if device.type == "cuda" and not torch.cuda.is_available():
        return None  # it is the device that will be refused
    if device.type == "cuda":
        # Ampere (8.0) brought TF32 and bfloat16; earlier GPUs only imitate them.
        recent = torch.cuda.get_device_capability(device) >= (8, 0)
        return None if recent or precision == "fp16" else "needs an NVIDIA GPU from Ampere on; use fp16 or fp32"
    if precision == "bf16" and device.type == "cpu":
        return None if cpu_has_bf16() else "is slower than fp32 on this CPU, which has no instructions for it; use fp32"
    if precision == "bf16":
        return "is for CUDA and for CPUs that have it; use fp32"
    return f"is for CUDA, and this is {device.type}; use fp32"


def cpu_has_bf16() -> bool:
    """True if this CPU multiplies bfloat16 in hardware; one with AVX2 alone imitates it, 40 times slower than fp32."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def set_precision(networks: Iterable[nn.Module], precision: str) -> None:
    """Let the layers of `networks` that suit a half precision compute in it, and all others in that of their weights.

    TF32 is no matter of layers: see `tf32`. Raises ValueError for a half precision that suits none of the networks.
    """
    layers = [module for network in networks for module in network.modules() if isinstance(module, MixedPrecision)]
    if precision in HALF_FORMATS and not any(precision in layer.formats for layer in layers):
        others = [name for name in HALF_FORMATS if any(name in layer.formats for layer in layers)]
        raise ValueError(f"precision {precision} suits none of these networks; use {' or '.join([*others, 'fp32'])}")
    for layer in layers:
        layer.half = precision if precision in layer.formats else None


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow TF32 in products and convolutions on CUDA while the block runs, or forbid it; then all is as before."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
