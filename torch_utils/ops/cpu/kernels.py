"""The operators for CPUs: C++ that is compiled at first use for the instruction set of the machine.

The sources in this folder are compiled into one library for each instruction set by torch.utils.cpp_extension, and
cached. They include no header of torch: they are functions of pointers, called by ctypes with a structure of all
arguments that are constant between calls. They run on the threads of torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torch_utils.ops import matmul, spec
from torch_utils.ops.binaries import Unavailable, cached_file
from torch_utils.ops.spec import Axes, Axis

FOLDER = Path(__file__).parent
SOURCES = ("bias_act.cpp", "resample.cpp", "threads.cpp", "tiles.cpp")
HEADERS = ("simd.h", "lanes.h", "fir.h", "columns.h")

# Environment variable that selects one of the instruction sets below.
VARIABLE = "TORCH_UTILS_OPS_ISA"

# Compiler flags by instruction set. "plain" exists on every processor of the architecture.
INSTRUCTION_SETS = {
    "plain": ["-DLONGTAKE_VECTOR_BYTES=16"],
    "avx2": ["-DLONGTAKE_VECTOR_BYTES=32", "-mavx2", "-mfma"],
    "avx512": ["-DLONGTAKE_VECTOR_BYTES=64", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
}

FLAGS = ["-O2", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
ACTS = ("linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish")


def supports(dtype: torch.dtype) -> bool:
    """Return whether there are kernels for `dtype`."""
    return dtype in DTYPES


# ----------------------------------------------------------------------------------------------------------------------
# Building and loading.


class Library(NamedTuple):
    """The compiled functions, their instruction set, and the path of the library."""

    resample: Any
    bias_act: Any
    tiles: Any
    instruction_set: str
    path: Path


_library: Library | None = None
_lock = threading.Lock()


def load() -> None:
    """Build the library if it is not in the cache, and load it; later calls return at once.

    Raises Unavailable if there is no compiler or no ninja, or if the build fails, and ValueError if TORCH_UTILS_OPS_ISA
    is an instruction set that this machine does not have.
    """
    global _library
    if _library is None:
        with _lock:
            if _library is None:
                _library = _open(os.environ.get(VARIABLE) or usable_instruction_sets()[-1])


def library() -> Library:
    """Return the library, which must have been loaded."""
    assert _library is not None, "the CPU kernels are not loaded"
    return _library


def usable_instruction_sets() -> list[str]:
    """Return the names of the instruction sets that processor and operating system support, the widest last."""
    capability = torch.backends.cpu.get_cpu_capability()
    return list(INSTRUCTION_SETS)[: {"AVX2": 2, "AVX512": 3}.get(capability, 1)]


@contextlib.contextmanager
def using_instruction_set(name: str) -> Iterator[None]:
    """Use the library of another instruction set while the block runs, in every thread; for tests and benchmarks."""
    global _library
    load()
    previous, _library = _library, _open(name)
    try:
        yield
    finally:
        _library = previous


@functools.cache
def _open(instruction_set: str) -> Library:
    usable = usable_instruction_sets()
    if instruction_set not in usable:
        raise ValueError(f"unknown instruction set {instruction_set!r}: this machine has {', '.join(usable)}")
    compiler = find_compiler()
    build = functools.partial(_build, compiler, instruction_set)
    path = cached_file(f"cpu-{instruction_set}.so", _key(compiler, instruction_set), build)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"{path} cannot be loaded ({error})", "remove that file to build it again") from None
    # Looking up a symbol in a library includes its dependencies, so this finds the OpenMP runtime of torch itself.
    team = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
    library.longtake_use_team(ctypes.cast(team, ctypes.c_void_p) if team is not None else None)
    resample, bias_act, tiles = library.longtake_resample, library.longtake_bias_act, library.longtake_tiles
    resample.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int]
    bias_act.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int] * 2
    tiles.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int]
    resample.restype = bias_act.restype = tiles.restype = None
    return Library(resample, bias_act, tiles, instruction_set, path)


class Compiler(NamedTuple):
    """A command, and the first line of the output of its option --version."""

    command: str
    version: str


@functools.cache
def find_compiler() -> Compiler:
    """Return the C++ compiler that torch would use: $CXX, else c++. Raises Unavailable if it or ninja is missing."""
    command = os.environ.get("CXX", "c++")
    if os.name == "nt":
        raise Unavailable("the CPU kernels cannot be built on Windows", "use Linux, macOS or WSL")
    try:
        words = [*command.split(), "--version"]
        output = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        remedy = "install one (the package g++ or clang of most systems) or name it in the variable CXX"
        raise Unavailable(f"there is no working C++ compiler {command!r}", remedy) from None
    if shutil.which("ninja") is None:
        raise Unavailable("the program ninja is not found", "install it (pip install ninja)")
    return Compiler(command, output.splitlines()[0] if output else "")


def _key(compiler: Compiler, instruction_set: str) -> str:
    sources = b"\0".join((FOLDER / name).read_bytes() for name in (*SOURCES, *HEADERS))
    flags = [*FLAGS, *INSTRUCTION_SETS[instruction_set]]
    machine = [platform.system(), platform.machine()]
    versions = [*compiler, torch.__version__, torch._C._GLIBCXX_USE_CXX11_ABI]
    return repr([hashlib.sha256(sources).hexdigest(), flags, machine, versions])


def _build(compiler: Compiler, instruction_set: str, path: Path) -> None:
    """Compile the library to `path`, in a separate folder: torch's lock files remain when a process is killed."""
    from torch.utils import cpp_extension  # takes almost a second to import, and is needed only here

    remove_old_builds(path.parent)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=path.parent) as folder:
        try:
            cpp_extension.load(
                "longtake_cpu",
                [str(FOLDER / name) for name in SOURCES],
                extra_cflags=[*FLAGS, *INSTRUCTION_SETS[instruction_set]],
                build_directory=folder,
                is_python_module=False,
            )
        except (RuntimeError, OSError) as error:
            lines = [line for line in str(error).splitlines() if "error:" in line] or str(error).splitlines()
            cause = f"{compiler.version} could not compile the CPU kernels ({lines[0].strip()})"
            raise Unavailable(cause, "name another compiler in the variable CXX, and report this") from error
        (built,) = Path(folder).glob("*.so")
        shutil.copyfile(built, path)  # into the file at `path`, whose lock marks it as being written


def remove_old_builds(folder: Path) -> None:
    """Remove folders in `folder` of builds that were killed more than a day ago."""
    for left in folder.glob(".build-*"):
        if left.stat().st_mtime < time.time() - 24 * 3600:
            shutil.rmtree(left, ignore_errors=True)


def describe() -> dict[str, str]:
    """Return facts for a report: compiler, instruction set, path of the library, or the problem; raises no error."""
    facts = {}
    try:
        facts["compiler"] = find_compiler().version
        load()
        assert _library is not None
        facts["instruction set"] = f"{_library.instruction_set} (usable: {', '.join(usable_instruction_sets())})"
        facts["library"] = str(_library.path)
    except (Unavailable, ValueError) as problem:
        facts["problem"] = str(problem)
    return facts


# ----------------------------------------------------------------------------------------------------------------------
# Arguments of the C++ functions.


class _Axis(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("size", "taps", "up", "down", "pad0", "out_size")]


class _Filter(ctypes.Structure):
    _fields_ = [
        ("x", _Axis),
        ("y", _Axis),
        *((name, ctypes.POINTER(ctypes.c_double)) for name in ("taps_x", "taps_y", "taps_2d")),
    ]


class _Resample(ctypes.Structure):
    _fields_ = [
        ("batch_size", ctypes.c_int64),
        ("num_channels", ctypes.c_int64),
        ("first", _Filter),
        ("second", _Filter),
        *((name, ctypes.c_double) for name in ("gain", "slope", "clamp")),
        *((name, ctypes.c_int32) for name in ("dtype", "channels_last", "middle")),
    ]


class _BiasAct(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_elements", "num_biases", "inner")),
        *((name, ctypes.c_double) for name in ("alpha", "gain", "clamp")),
        ("act", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    ]


# A filter by its values, so that a filter changed in place has another key in the caches.
Values = tuple[bytes, torch.dtype, torch.Size] | None


def _values(f: Tensor | None) -> Values:
    if f is None:
        return None
    if f.dtype != torch.float32 and f.dtype != torch.float64:
        f = f.float()
    f = f.contiguous()
    return ctypes.string_at(f.data_ptr(), f.nbytes), f.dtype, f.shape


def _make_filter(values: Values, axes: Axes, flip: bool, gain: float, dtype: torch.dtype) -> _Filter:
    """Return a filter in correlation order with its gain, as two 1-D ones if it is an outer product."""
    f, tolerance = None, 0.0
    if values is not None:
        content, f_dtype, shape = values
        f = np.frombuffer(content, np.float32 if f_dtype == torch.float32 else np.float64).reshape(shape)
        tolerance = matmul.outer_product_tolerance(f_dtype, dtype)
    pair = matmul.split_filter(f, tolerance, flip, gain)
    if pair is not None:
        arrays = _doubles(pair[1]), _doubles(pair[0]), None
    else:
        assert f is not None
        arrays = None, None, _doubles((f if flip else f[::-1, ::-1]) * np.float64(gain))
    return _Filter(_make_axis(axes.x), _make_axis(axes.y), *arrays)


def _doubles(taps: np.ndarray) -> ctypes.Array[ctypes.c_double]:
    return (ctypes.c_double * taps.size)(*taps.ravel().tolist())


def _make_axis(axis: Axis) -> _Axis:
    return _Axis(axis.size, axis.taps, axis.up, axis.down, axis.pad0, axis.out_size)


# The operation of a kernel between two filters.
NOTHING, LEAKY, SIGNS = range(3)


class _Job(NamedTuple):
    """The part of a call that depends on shapes, dtype and options only."""

    address: int
    structure: _Resample  # at `address`; this reference keeps it in memory
    out_shape: tuple[int, ...]
    out_layout: torch.memory_format
    signs_shape: tuple[int, ...]


def _make_job(
    x: tuple[torch.Size, torch.dtype, bool],
    filters: tuple[Values, Values],
    axes: tuple[Axes, Axes],
    gains: tuple[float, float, float],
    flip: bool,
    middle: int = NOTHING,
    slope: float = 1.0,
    clamp: float = -1.0,
) -> _Job:
    """Return the job for `x` (shape, dtype, channels-last or not); `gains` are those of filter, middle, filter."""
    shape, dtype, channels_last = x
    first = _make_filter(filters[0], axes[0], flip, gains[0], dtype)
    second = _make_filter(filters[1], axes[1], flip, gains[2], dtype)
    clamp = math.inf if clamp < 0 else clamp
    numbers = gains[1], slope, clamp, DTYPES[dtype], channels_last, middle
    structure = _Resample(shape[0], shape[1], first, second, *numbers)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    height, width = axes[0].out_size
    signs_shape = (shape[0], shape[1], height, (width + 3) // 4)
    return _Job(ctypes.addressof(structure), structure, (*shape[:2], *axes[1].out_size), layout, signs_shape)


def _describe(x: Tensor) -> tuple[torch.Size, torch.dtype, bool]:
    return x.shape, x.dtype, not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _run(job: _Job, x: Tensor, b: Tensor | None = None, signs: Tensor | None = None) -> Tensor:
    y = torch.empty(job.out_shape, dtype=x.dtype, memory_format=job.out_layout)
    if y.numel():
        assert _library is not None
        pointers = None if b is None else b.data_ptr(), None if signs is None else signs.data_ptr()
        _library.resample(job.address, x.data_ptr(), y.data_ptr(), *pointers, torch.get_num_threads())
    return y


# ----------------------------------------------------------------------------------------------------------------------
# The operators; see `registered` for their definitions.


@functools.lru_cache(maxsize=1024)
def _upfirdn2d_job(x: tuple, f: Values, axes: Axes, flip: bool, gain: float) -> _Job:
    shape, out_size = x[0], axes.out_size
    if shape[3] == 1 < shape[2] and axes.x.is_identity:
        # A column of samples has the memory layout of a row, which is faster to filter.
        job = _upfirdn2d_job(
            (torch.Size((*shape[:2], 1, shape[2])), *x[1:]),
            None if f is None else (*f[:2], torch.Size(f[2][::-1])),
            Axes(axes.y, axes.x),
            flip,
            gain,
        )
        return job._replace(out_shape=(*shape[:2], *out_size))
    if math.prod(out_size) > math.prod(shape[2:]):  # along y first, as there are fewer columns before
        return _make_job(x, (f, None), (axes, _identity(out_size)), (gain, 1.0, 1.0), flip)
    return _make_job(x, (None, f), (_identity(shape[2:]), axes), (1.0, 1.0, gain), flip)


def _identity(size: Sequence[int]) -> Axes:
    return spec.make_axes(size, (1, 1))


def upfirdn2d(x: Tensor, f: Tensor | None, axes: Axes, flip: bool, gain: float) -> Tensor:
    """Resample x (N, C, H, W), contiguous or channels-last."""
    return _run(_upfirdn2d_job(_describe(x), _values(f), axes, flip, gain), x)


@functools.lru_cache(maxsize=1024)
def _filtered_lrelu_job(
    x: tuple,
    fu: Values,
    fd: Values,
    up: Axes,
    down: Axes,
    up_gain: float,
    gain: float,
    slope: float,
    clamp: float,
    flip: bool,
) -> _Job:
    # A positive gain commutes with the leaky ReLU, so it can be included in the first filter at no cost.
    gains = (up_gain * gain, 1.0, 1.0) if gain > 0 and fu is not None else (up_gain, gain, 1.0)
    return _make_job(x, (fu, fd), (up, down), gains, flip, LEAKY, slope, clamp)


def filtered_lrelu(
    x: Tensor,
    fu: Tensor | None,
    fd: Tensor | None,
    b: Tensor | None,
    up: Axes,
    down: Axes,
    up_gain: float,
    gain: float,
    slope: float,
    clamp: float,
    flip: bool,
    write_signs: bool,
) -> tuple[Tensor, Tensor]:
    """Apply a leaky ReLU between two filters; return the result and the signs (empty unless written)."""
    options = up, down, up_gain, gain, slope, clamp, flip
    job = _filtered_lrelu_job(_describe(x), _values(fu), _values(fd), *options)
    signs = torch.empty(job.signs_shape if write_signs else (0,), dtype=torch.uint8)
    return _run(job, x, b, signs if write_signs else None), signs


@functools.lru_cache(maxsize=1024)
def _signed_job(
    v: tuple, f1: Values, f2: Values, first: Axes, second: Axes, gain: float, slope: float, flip: bool
) -> _Job:
    return _make_job(v, (f1, f2), (first, second), (1.0, gain, 1.0), flip, SIGNS, slope)


def filtered_lrelu_signed(
    v: Tensor,
    signs: Tensor,
    f1: Tensor | None,
    f2: Tensor | None,
    first: Axes,
    second: Axes,
    gain: float,
    slope: float,
    flip: bool,
) -> Tensor:
    """Apply the derivative of a filtered leaky ReLU, or its transpose, to v by the recorded signs."""
    return _run(_signed_job(_describe(v), _values(f1), _values(f2), first, second, gain, slope, flip), v, signs=signs)


@functools.lru_cache(maxsize=1024)
def _bias_act_job(
    shape: torch.Size,
    stride: tuple[int, ...],
    dtype: torch.dtype,
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float,
) -> _BiasAct:
    num_biases, inner = (shape[dim], max(stride[dim], 1)) if shape else (1, 1)
    clamp = math.inf if clamp < 0 else clamp
    return _BiasAct(math.prod(shape), num_biases, inner, alpha, gain, clamp, ACTS.index(act), DTYPES[dtype])


def _bias_act(order: int, x: Tensor, b: Tensor | None, dy: Tensor | None, ddx: Tensor | None, *options: Any) -> Tensor:
    y = torch.empty_like(x)
    if y.numel():
        job = _bias_act_job(x.shape, x.stride(), x.dtype, *options)
        assert _library is not None
        pointers = [None if t is None else t.data_ptr() for t in (x, b, dy, ddx, y)]
        _library.bias_act(ctypes.addressof(job), *pointers, order, torch.get_num_threads())
    return y


def bias_act(x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float) -> Tensor:
    """Return clamp(gain * act(x + b)) of a dense x of any rank, with its strides."""
    if act == "linear" and b is None and gain == 1 and clamp >= 0:
        return x.clamp(-clamp, clamp)  # PyTorch does this in one pass, too, with less overhead
    return _bias_act(0, x, b, None, None, dim, act, alpha, gain, clamp)


def bias_act_grad(
    dy: Tensor, saved: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float
) -> Tensor:
    """Return the gradient of x for dy; `saved` is the output of bias_act for piecewise linear activations, else x."""
    return _bias_act(1, saved, b, dy, None, dim, act, alpha, gain, clamp)


def bias_act_grad2(
    ddx: Tensor,
    dy: Tensor,
    x: Tensor,
    b: Tensor | None,
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float,
) -> Tensor:
    """Return the gradient of x for ddx, the gradient of the output of bias_act_grad."""
    return _bias_act(2, x, b, dy, ddx, dim, act, alpha, gain, clamp)
