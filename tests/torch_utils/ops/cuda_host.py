"""Run the CUDA kernels on a CPU: their sources compiled by g++ with host_shim.h."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from torch_utils.ops.cuda import driver as cuda_driver
from torch_utils.ops.cuda.driver import Kernel
from torch_utils.ops.cuda.fir_plan import Gpu

HERE = Path(__file__).parent
SOURCES = Path(cuda_driver.__file__).parent
COMPILER = shutil.which("g++")

# Constants that stay so on the host, because types or preprocessor conditions depend on them.
FIXED = ("DTYPE", "INDEX_64", "VECTOR")

FLAGS: tuple[str, ...] = ()
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")


def precompiled(folder: Path, flags: tuple[str, ...]) -> Path:
    """Compile the standard headers of host_shim.h, which take most of the time of each library; return their folder.

    A compiler that cannot use the result reads the headers themselves.
    """
    before_conditions = (HERE / "host_shim.h").read_text().partition("#if")[0]
    text = "".join(re.findall("^#include <.*\n", before_conditions, re.MULTILINE))
    headers = folder / f"headers-{hashlib.sha256(repr((text, flags)).encode()).hexdigest()[:16]}"
    if not headers.exists():
        temporary = Path(tempfile.mkdtemp(dir=folder))
        (temporary / "standard.h").write_text(text)
        command = [COMPILER, *flags, "-x", "c++-header", str(temporary / "standard.h")]
        subprocess.run([*command, "-o", str(temporary / "standard.h.gch")], capture_output=True)
        try:
            temporary.rename(headers)
        except OSError:  # another process was first
            shutil.rmtree(temporary)
    return headers


def build(
    source: str, function: str, fixed: tuple[tuple[str, int | str], ...], names: tuple[str, ...], flags: tuple
) -> Path:
    """Compile a source for the host, once for all processes of a test run; returns the library."""
    texts = [(SOURCES / source).read_text(), *(path.read_text() for path in sorted(SOURCES.glob("*.cuh")))]
    texts.append((HERE / "host_shim.h").read_text())
    digest = hashlib.sha256(repr((texts, function, fixed, names, flags)).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"cuda-host-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    library = folder / f"{function}-{digest}.so"
    if not library.exists():
        macros = [f"-D{name}={value}" for name, value in fixed]
        macros += [f"-D{name}=constants[{i}]" for i, name in enumerate(names)]
        text = f'#include "standard.h"\n#include "host_shim.h"\n#include "{source}"\nSHIM_ENTRY({function})\n'
        temporary = library.with_suffix(f".{os.getpid()}")
        flags = ("-std=c++17", "-O1", "-w", "-DHOST_SHIM", "-fPIC", *flags)
        command = [COMPILER, *flags, "-shared", *macros, f"-I{precompiled(folder, flags)}", f"-I{HERE}", f"-I{SOURCES}"]
        command += ["-x", "c++", "-", "-o", str(temporary)]
        result = subprocess.run(command, input=text, text=True, capture_output=True)
        assert result.returncode == 0, result.stderr
        temporary.rename(library)
    return library


@functools.cache
def load(source: str, function: str, fixed: tuple, names: tuple[str, ...], flags: tuple) -> ctypes.CDLL:
    return ctypes.CDLL(str(build(source, function, fixed, names, flags)))


@functools.cache
def symbols() -> dict[str, int]:
    """Return values of constants in sources, such as `#define LRELU 3` of bias_act.cu, by "file:NAME"."""
    found = {}
    for path in (*SOURCES.glob("*.cu"), *SOURCES.glob("*.cuh")):
        for line in path.read_text().splitlines():
            words = line.split()
            if len(words) == 3 and words[0] == "#define" and words[2].isdigit():
                found[f"{path.name}:{words[1]}"] = int(words[2])
    return found


class Host:
    """Stands in for a GPU: `launch` runs every block of a kernel, or those that `blocks` selects."""

    def __init__(self) -> None:
        self.seed = 0
        self.kernels: list[Kernel] = []
        self.blocks = lambda count: range(count)

    def launch(self, kernel: Kernel, num_blocks: int, params: ctypes.Structure, device: torch.device) -> None:
        assert device.type == "cpu" and 0 < num_blocks < 2**31 and kernel.threads <= 1024
        self.kernels.append(kernel)
        values = dict(kernel.constants)
        fixed = tuple((name, values.pop(name)) for name in FIXED if name in values)
        names = tuple(sorted(values))
        library = load(kernel.source, kernel.function, fixed, names, FLAGS)
        numbers = [v if isinstance(v, int) else symbols()[f"{kernel.source}:{v}"] for v in (values[n] for n in names)]
        table = (ctypes.c_int * len(names))(*numbers)
        self.seed += 1
        blocks = self.blocks(num_blocks)
        status = library.run(
            table, len(names), blocks.start, blocks.stop, num_blocks, kernel.threads, ctypes.byref(params), self.seed
        )
        assert status == 0, "the threads of a block met at different barriers"


@contextlib.contextmanager
def on_host(gpu: Gpu | None = None) -> Iterator[Host]:
    """Launch kernels on tensors of the CPU while the block runs, planned for `gpu`."""
    host = Host()
    facts = gpu or Gpu(num_sms=2, shared_bytes=64 * 1024)
    with (
        mock.patch.object(cuda_driver, "launch", host.launch),
        mock.patch.object(cuda_driver, "gpu_facts", lambda device: facts),
    ):
        yield host
