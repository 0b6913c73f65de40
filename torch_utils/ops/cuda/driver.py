"""Compile kernels for the GPU, cache their binaries, and launch them through the CUDA driver by ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from torch_utils.ops.binaries import Unavailable, cached_file
from torch_utils.ops.cuda import nvrtc
from torch_utils.ops.cuda.fir_plan import Gpu

DTYPES = {torch.float32: "FLOAT32", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}

# From this number of elements on, offsets are 64-bit numbers. The margin to 2^31 is for the part of the last block
# beyond the tensor.
LARGE = 2**31 - 2**22

OPTIONS = ("--std=c++17",)
MAGIC = b"longtake-kernel\0"
DRIVER_REMEDY = "install an NVIDIA driver that is at least as new as the CUDA version of PyTorch"

# Of CUfunction_attribute and CUstreamCaptureMode.
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
CAPTURE_MODE_RELAXED = 2
DEFAULT_SHARED_BYTES = 48 * 1024


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel by its source file, function and compile-time constants; `shared_bytes` is set at launch.

    Kernels are compared by identity, since they are looked up in every call: callers must keep and reuse them.
    """

    source: str
    function: str
    constants: tuple[tuple[str, int | str], ...]
    threads: int
    shared_bytes: int = 0


@functools.cache
def gpu_facts(device: torch.device) -> Gpu:
    """Return the properties of a device that plans depend on."""
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.multi_processor_count, properties.shared_memory_per_block_optin)


# ----------------------------------------------------------------------------------------------------------------------
# Binaries.


@functools.cache
def read_sources() -> dict[str, str]:
    """Return the text of every CUDA source and header by its file name."""
    folder = Path(__file__).parent
    return {path.name: path.read_text() for path in sorted(folder.glob("*.cu*")) if path.suffix in (".cu", ".cuh")}


def compile_kernel(kernel: Kernel, target: str) -> bytes:
    """Return the machine code of a kernel for an architecture ("sm_90"); needs no GPU. See `Nvrtc.compile`."""
    sources = read_sources()
    headers = {name: text for name, text in sources.items() if name.endswith(".cuh")}
    options = [*OPTIONS, *(f"-D{name}={value}" for name, value in kernel.constants)]
    return nvrtc.load().compile(kernel.source, sources[kernel.source], headers, options, target)


def load_binary(kernel: Kernel, target: str) -> bytes:
    """Return the machine code of a kernel from the cache; compile it if it is missing or damaged."""
    sources = read_sources()
    texts = [sources[name] for name in sorted(sources) if name == kernel.source or name.endswith(".cuh")]
    key = repr((texts, kernel.constants, OPTIONS, target, nvrtc.load().version))

    def build(path: Path) -> None:
        binary = compile_kernel(kernel, target)
        path.write_bytes(MAGIC + hashlib.sha256(binary).digest() + binary)

    name = f"{Path(kernel.source).stem}-{target}.cubin"
    for _ in range(2):
        path = cached_file(name, key, build)
        content = path.read_bytes()
        digest, binary = content[len(MAGIC) :][:32], content[len(MAGIC) + 32 :]
        if content.startswith(MAGIC) and hashlib.sha256(binary).digest() == digest:
            return binary
        path.unlink(missing_ok=True)  # truncated or overwritten, by a full disk or a copied cache
    raise Unavailable(
        f"{path} does not contain the data written to it", "set DNNLIB_CACHE_DIR to a folder on another disk"
    )


# ----------------------------------------------------------------------------------------------------------------------
# The driver.


class Driver:
    """The CUDA driver's library; a call that fails raises RuntimeError with the driver's message."""

    def __init__(self) -> None:
        name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        try:
            self._library = ctypes.CDLL(name)
        except OSError as error:
            raise Unavailable(f"the CUDA driver ({name}) cannot be loaded ({error})", DRIVER_REMEDY) from error

    def __call__(self, name: str, *args: object) -> None:
        status = getattr(self._library, name)(*args)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()} ({status})")

    def version(self) -> str:
        """Return the CUDA version of the driver as major.minor."""
        number = ctypes.c_int()
        self("cuDriverGetVersion", ctypes.byref(number))
        return f"{number.value // 1000}.{number.value % 1000 // 10}"


@functools.cache
def driver() -> Driver:
    """Load the driver, once; raises Unavailable if there is none."""
    return Driver()


@functools.cache
def primary_context(index: int) -> ctypes.c_void_p:
    """Return the primary context of a device, which PyTorch uses."""
    torch.cuda.init()
    device, context = ctypes.c_int(), ctypes.c_void_p()
    driver()("cuDeviceGet", ctypes.byref(device), index)
    driver()("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context


class _InContext:
    """Context manager that makes a device's context current; threads of autograd may have none or that of another."""

    def __init__(self, index: int):
        self._context = primary_context(index)
        self._pushed = False

    def __enter__(self) -> None:
        current = ctypes.c_void_p()
        driver()("cuCtxGetCurrent", ctypes.byref(current))
        if current.value != self._context.value:
            driver()("cuCtxPushCurrent_v2", self._context)
            self._pushed = True

    def __exit__(self, *_: object) -> None:
        if self._pushed:
            driver()("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


_functions: dict[tuple[int, Kernel], ctypes.c_void_p] = {}
_lock = threading.Lock()


def load_function(kernel: Kernel, index: int) -> ctypes.c_void_p:
    """Return the kernel's function on a device; the first call compiles and loads it. Thread-safe."""
    function = _functions.get((index, kernel))
    if function is None:
        with _lock:
            function = _functions.get((index, kernel)) or _load_function(kernel, index)
            _functions[index, kernel] = function
    return function


def _load_function(kernel: Kernel, index: int) -> ctypes.c_void_p:
    target = nvrtc.load().target(torch.cuda.get_device_capability(index))
    binary = load_binary(kernel, target)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    mode = ctypes.c_int(CAPTURE_MODE_RELAXED)
    with _InContext(index):
        # Loading may allocate memory, which is an error during capture into a graph unless the mode is relaxed.
        driver()("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        try:
            driver()("cuModuleLoadData", ctypes.byref(module), binary)
            driver()("cuModuleGetFunction", ctypes.byref(function), module, kernel.function.encode())
            if kernel.shared_bytes > DEFAULT_SHARED_BYTES:
                driver()("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_SIZE_BYTES, kernel.shared_bytes)
        except RuntimeError as error:
            cause = f"the CUDA driver ({driver().version()}) cannot load the code of NVRTC {nvrtc.load().version}"
            raise Unavailable(f"{cause} for {target} ({error})", DRIVER_REMEDY) from error
        finally:
            driver()("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    return function


def launch(kernel: Kernel, num_blocks: int, params: ctypes.Structure, device: torch.device) -> None:
    """Queue a kernel with one structure of parameters on the current stream of the device."""
    index = torch.cuda.current_device() if device.index is None else device.index
    function = load_function(kernel, index)
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
    stream = ctypes.c_void_p(torch.cuda.current_stream(index).cuda_stream)
    shape = (num_blocks, 1, 1, kernel.threads, 1, 1, kernel.shared_bytes)
    with _InContext(index):
        driver()("cuLaunchKernel", function, *shape, stream, pointers, None)
