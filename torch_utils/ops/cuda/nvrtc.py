"""NVRTC, NVIDIA's run-time compiler of CUDA C++, through ctypes: it is part of PyTorch and needs no GPU."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch_utils.ops.binaries import Unavailable

REMEDY = "install a PyTorch build for CUDA, or `pip install nvidia-cuda-nvrtc` of its CUDA version"


class CompileError(RuntimeError):
    """The compiler's log: the source is wrong, or the compiler is too old for it."""


def library_paths() -> Iterator[str]:
    """Yield possible paths of NVRTC: in NVIDIA's package, in PyTorch's folder, then by name for the system's search."""
    windows = sys.platform == "win32"
    pattern = "nvrtc64_*.dll" if windows else "libnvrtc.so*"
    folders = []
    for package, parts in (("nvidia", "*/lib"), ("nvidia", "*/bin"), ("torch", "lib")):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec is not None else []:
            folders += sorted(Path(root).glob(parts), reverse=True)
    folders += [Path(os.environ["CUDA_HOME"]) / "lib64"] if "CUDA_HOME" in os.environ else []
    for folder in folders:
        # A versioned name first: one without a version is a link, or a stub.
        yield from (str(path) for path in sorted(folder.glob(pattern), reverse=True) if ".alt." not in path.name)
    yield from ("nvrtc64_130_0.dll", "nvrtc64_120_0.dll") if windows else ("libnvrtc.so.13", "libnvrtc.so.12")


class Nvrtc:
    """A loaded NVRTC library."""

    def __init__(self, path: str):
        self.path = path
        # NVRTC opens this library by its name, which finds one that is already loaded.
        if os.path.isabs(path):
            for companion in Path(path).parent.glob("*nvrtc-builtins*"):
                if ".alt." not in companion.name:
                    ctypes.CDLL(str(companion))
        self._library = ctypes.CDLL(path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        archs = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", archs)
        self.archs = sorted(archs)

    def _call(self, name: str, *args: object) -> None:
        status = getattr(self._library, name)(*args)
        if status:
            raise CompileError(f"{name}: {self._library.nvrtcGetErrorString(status).decode()}")

    def target(self, capability: tuple[int, int]) -> str:
        """Return the architecture to compile for a device of compute capability (major, minor).

        Machine code ("sm_90") runs on devices of the same major version that are not older; if this compiler does
        not support the device's major version, the driver compiles portable code ("compute_100"). Raises Unavailable
        if the device is older than all architectures of the compiler.
        """
        wanted = capability[0] * 10 + capability[1]
        same = [arch for arch in self.archs if arch // 10 == capability[0] and arch <= wanted]
        older = [arch for arch in self.archs if arch <= wanted]
        if not older:
            name = f"{capability[0]}.{capability[1]}"
            raise Unavailable(
                f"this GPU's compute capability, {name}, is older than what NVRTC {self.version} compiles for",
                "use a GPU from the Turing generation (7.5) on",
            )
        return f"sm_{same[-1]}" if same else f"compute_{older[-1]}"

    def compile(self, name: str, source: str, headers: dict[str, str], options: Sequence[str], target: str) -> bytes:
        """Return the machine code (cubin) of a source, or PTX for a "compute" target; raises CompileError."""
        program = ctypes.c_void_p()
        texts = (ctypes.c_char_p * len(headers))(*(text.encode() for text in headers.values()))
        names = (ctypes.c_char_p * len(headers))(*(key.encode() for key in headers))
        self._call(
            "nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), len(headers), texts, names
        )
        try:
            flags = [f"--gpu-architecture={target}", *options]
            encoded = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
            if self._library.nvrtcCompileProgram(program, len(flags), encoded):
                raise CompileError(f"{name} for {target}:\n{self._read(program, 'nvrtcGetProgramLog').decode()}")
            return self._read(program, "nvrtcGetCUBIN" if target.startswith("sm_") else "nvrtcGetPTX")
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, getter: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"{getter}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(getter, program, text)
        return text.raw


@functools.cache
def load() -> Nvrtc:
    """Load NVRTC, once; raises Unavailable if it is not found."""
    problems = []
    for path in library_paths():
        try:
            return Nvrtc(path)
        except (OSError, AttributeError, CompileError) as error:
            problems.append(f"{path}: {error}")
    raise Unavailable(f"NVRTC, the run-time compiler of CUDA, was not found ({'; '.join(problems[:2])})", REMEDY)
