"""The operators for NVIDIA GPUs: CUDA C++ that NVRTC compiles at first use, without an installed CUDA toolkit.

`registered` calls the six functions and defines them and their arguments. Every layer has its own kernels, in which
factors, taps and tile are constants (`fir_plan`); a slower kernel is used for filters that are too large for these.
"""

from __future__ import annotations

from pathlib import Path

import torch

import dnnlib
from torch_utils.ops.binaries import Unavailable
from torch_utils.ops.cuda import driver, nvrtc
from torch_utils.ops.cuda.bias_act import bias_act, bias_act_grad, bias_act_grad2, make_kernel
from torch_utils.ops.cuda.fir import filtered_lrelu, filtered_lrelu_signed, upfirdn2d

__all__ = [
    "bias_act",
    "bias_act_grad",
    "bias_act_grad2",
    "describe",
    "filtered_lrelu",
    "filtered_lrelu_signed",
    "load",
    "supports",
    "upfirdn2d",
]

OLDEST_CAPABILITY = (7, 5)


def supports(dtype: torch.dtype) -> bool:
    """Return whether there are kernels for `dtype`."""
    return dtype in driver.DTYPES


def load() -> None:
    """Load NVRTC and the driver, and compile a first kernel; raises Unavailable with cause and remedy."""
    if not torch.cuda.is_available():
        raise Unavailable("PyTorch sees no CUDA device", "install a PyTorch build for CUDA on a machine that has one")
    index = torch.cuda.current_device()
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CAPABILITY:
        name = f"{torch.cuda.get_device_name(index)} (compute capability {capability[0]}.{capability[1]})"
        raise Unavailable(f"there are no kernels for the {name}", "use a GPU from the Turing generation (7.5) on")
    probe = make_kernel(torch.float32, "linear", order=0, clamp=False, bias=0, vector=4, large=False)
    driver.load_function(probe, index)


def describe() -> dict[str, str]:
    """Return facts for a report: compiler, GPU, driver, cache, or the problem; raises no error."""
    facts = {}
    try:
        compiler = nvrtc.load()
        facts["NVRTC"] = f"{compiler.version} ({compiler.path})"
        if torch.cuda.is_available():
            index = torch.cuda.current_device()
            facts["GPU"] = torch.cuda.get_device_name(index)
            facts["compiled for"] = compiler.target(torch.cuda.get_device_capability(index))
            facts["driver"] = f"CUDA {driver.driver().version()}"
        else:
            facts["GPU"] = "none that PyTorch sees"
    except (Unavailable, RuntimeError, OSError) as error:
        facts["problem"] = str(error)
    folder = Path(dnnlib.make_cache_dir_path("kernels"))
    facts["cache"] = f"{folder} ({len(list(folder.glob('*.cubin')))} CUDA kernels)"
    return facts
