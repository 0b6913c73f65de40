"""Report which implementation each operator uses on this machine and why, and check its numbers."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import dnnlib
from torch_utils import host_memory
from torch_utils.ops import backends
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.binaries import Unavailable
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from torch_utils.ops.upfirdn2d import setup_filter, upfirdn2d

# Largest deviation from the reference in double precision, relative to the largest value.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def probes() -> dict[str, Callable[..., Tensor]]:
    """Return each operator by name, as a function of x (N, C, H, W), a bias (C,), a filter and `impl`."""
    return {
        "bias_act": lambda x, b, f, impl: bias_act(x, b, act="lrelu", clamp=2.0, impl=impl),
        "upfirdn2d": lambda x, b, f, impl: upfirdn2d(x, f, up=2, down=(1, 2), padding=(6, 5, 7, -2), gain=4, impl=impl),
        "filtered_lrelu": lambda x, b, f, impl: filtered_lrelu(x, f, f, b, 2, 2, (9, 8, 9, 8), clamp=2.0, impl=impl),
    }


def self_test(device: str, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Return the largest relative errors (values, derivatives) of each operator on a device, against the reference."""
    rng = torch.Generator().manual_seed(0)
    x, b = torch.randn(2, 5, 37, 29, generator=rng), torch.randn(5, generator=rng)
    f = setup_filter(torch.hann_window(14, periodic=False)[1:-1])
    errors = {}
    for name, probe in probes().items():
        results = []
        for place, kind, impl in (("cpu", torch.float64, "ref"), (device, dtype, "auto")):
            # Both use the same rounded inputs.
            inputs = [t.to(dtype).to(device=place, dtype=kind).detach().requires_grad_() for t in (x, b)]
            y = probe(*inputs, f.to(place), impl)
            dx, db = torch.autograd.grad(y, inputs, y.detach().sign(), materialize_grads=True)
            results.append([t.detach().double().cpu() for t in (y, dx, db)])
        deviations = [_relative_error(found, expected) for expected, found in zip(*results, strict=True)]
        errors[name] = (deviations[0], max(deviations[1:]))
    return errors


def _relative_error(found: Tensor, expected: Tensor) -> float:
    if not found.isfinite().all():
        return float("inf")
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def examine(device: str) -> Iterator[tuple[str, bool]]:
    """Yield lines about the operators on a device, each with False if it reports wrong numbers."""
    try:
        backends.KERNELS[device].load()
        facts = backends.KERNELS[device].describe()
        yield f"{device}: compiled ({', '.join(f'{key} {value}' for key, value in facts.items())})", True
    except Unavailable as problem:
        substitute = backends.SUBSTITUTES.get(device, "ref")
        yield f"{device}: {substitute}, since {problem.cause}", True
        yield f"    to compile them, {problem.remedy}", True
    for dtype, tolerance in TOLERANCES.items():
        if dtype != torch.float32 and device == "cpu":
            continue
        impl = backends.select_impl("auto", torch.empty(0, dtype=dtype, device=device))
        for name, (value, derivative) in self_test(device, dtype).items():
            good = max(value, derivative) <= tolerance
            verdict = "good" if good else f"WRONG: expected at most {tolerance:g}"
            kind = str(dtype).removeprefix("torch.")
            yield (
                f"    {name:15s} {kind:9s} {impl:9s} error {value:.1e}, of derivatives {derivative:.1e}: {verdict}",
                good,
            )


def report() -> bool:
    """Print the report; return whether every operator computes correct numbers."""
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads")
    folder = Path(dnnlib.make_cache_dir_path("kernels"))
    files = [path for path in folder.glob("*") if path.is_file()] if folder.is_dir() else []
    size = sum(path.stat().st_size for path in files)
    print(f"cache {folder}: {len(files)} files, {size / 1e6:.1f} MB (DNNLIB_CACHE_DIR moves it; it may be deleted)")
    print(f"memory: {host_memory.describe('cpu')}")
    print(f"{backends.VARIABLE}={os.environ.get(backends.VARIABLE) or 'auto'}")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    all_good = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report contains the operators' warnings
        for device in devices:
            for line, good in examine(device):
                print(line, flush=True)
                all_good = all_good and good
    if "cuda" not in devices:
        reason = "this torch was built without CUDA" if torch.version.cuda is None else "torch sees no NVIDIA GPU"
        print(f"cuda: not used, since {reason}")
    return all_good
