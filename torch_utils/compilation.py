"""Compile parts of networks with `torch.compile`: `region` marks them, `compiled` turns compilation on.

| region | runs in |
|---|---|
| `GeneratorBlock.hidden`, `.residual`, `.finish` of low resolution | generator and discriminator updates, generation |
| `SynthesisLayer.filtered` of super-resolution | the same |
| both discriminators, whole | generator and discriminator updates |

Regions end where running magnitudes are updated, which may be a collective of all ranks, and where features of a piece
of a video are stored for the next one. The remaining parts are small: mapping, styles of a frame, the FFT of the noise,
augmentation. Every region is one graph, without breaks, for one set of shapes; there are few sets, as clips of a run
have one size and pieces of a video have three: the first, the middle and the last one.

**R1 is not compiled.** It needs a second derivative, which compiled programs do not have: PyTorch raises
`RuntimeError`, and with `torch.func.grad` the result would be wrong without an error. So `GAN` turns compilation on for
the updates of G and D, and off for R1; metrics and previews of a run are not compiled either.

Nothing of this is stored in a module: state dicts, copies, pickles and `G_ema` are the same with and without it.
Without `compiled`, a region calls the original function, and PyTorch's compiler is not imported.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")

# Maximum number of programs of one region, shared by all layers of a class: ten layers, three lengths and two batch
# sizes are 60.
MAX_PROGRAMS = 128

BACKEND = "inductor"  # of `torch.compile`
_MARK = "_dynamo_static_input_type"
_backend: str | None = None  # set inside `compiled`
_modules: set[nn.Module] = set()  # whose regions have run inside `compiled`
_problem: str | None = None  # why this process no longer compiles


def region(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function or method of tensors: inside `compiled` it is compiled, otherwise it is unchanged.

    Tensor arguments are made contiguous, so that there is one program for one set of shapes and all strides.
    """
    programs: dict[str, Callable[..., Any]] = {}  # by backend

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if _backend is None or _problem is not None or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if _backend not in programs:
            # Dynamic shapes would add checks and slow down every kernel to avoid one or two compilations.
            programs[_backend] = torch.compile(function, fullgraph=True, dynamic=False, backend=_backend)
        _modules.update(value for value in args[:1] if isinstance(value, nn.Module))
        try:
            return programs[_backend](*map(_dense, args), **{name: _dense(value) for name, value in kwargs.items()})
        except Exception as error:
            if not _is_of_the_compiler(error):
                raise
            _give_up(error)
        return function(*args, **kwargs)

    return call


def _dense(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


@contextlib.contextmanager
def compiled(wanted: bool = True) -> Iterator[None]:
    """Compile regions while the block runs, in every thread, if `wanted`; otherwise run them uncompiled.

    If a region cannot be compiled, one warning is given and the process continues without compilation, with the same
    numbers.
    """
    global _backend
    before, _backend = _backend, BACKEND if wanted else None
    try:
        with _settings() if wanted else contextlib.nullcontext():
            yield
    finally:
        _backend = before
        _unmark()


def _unmark() -> None:
    """Remove the attributes that the compiler set on parameters and buffers, which would be pickled with them."""
    for module in _modules:
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            if hasattr(tensor, _MARK):
                delattr(tensor, _MARK)
    _modules.clear()


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    import torch._dynamo.config
    import torch._functorch.config

    # Backward passes are compiled together with forward passes, where a failure can still fall back to eager execution.
    limit = torch._dynamo.config.patch(recompile_limit=MAX_PROGRAMS, accumulated_recompile_limit=2 * MAX_PROGRAMS)
    early = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    with limit, early:
        yield


@functools.cache
def why_not(device: str) -> str | None:
    """Return why `device` cannot compile here, and the remedy; None if a small program was compiled.

    The first call in a process takes some seconds, as it loads and runs the compiler.
    """
    x = torch.ones(64, device=device, requires_grad=True)
    try:
        torch.compile(lambda x: (2 * x).sin().cos(), dynamic=False)(x).sum().backward()
    except Exception as error:
        return explain(error)
    return None


def explain(error: BaseException) -> str:
    """Return cause and remedy of an error of the compiler, as part of a sentence."""
    chain = [error]
    while (link := getattr(chain[-1], "inner_exception", None) or chain[-1].__cause__) not in (None, *chain):
        chain.append(link)
    names = {type(link).__name__ for link in chain}
    text = "\n".join(str(link) for link in chain)
    if "InvalidCxxCompiler" in names or "InvalidCxxCompiler" in text:
        return "there is no working C++ compiler; install g++ (on Windows, MSVC's cl), or name one in CXX"
    if "Python.h" in text:
        return "the headers of this Python are missing; install them (python3-dev on Debian and Ubuntu)"
    if "TritonMissing" in names or "TritonMissing" in text:
        return "Triton, which compiles for GPUs, is missing; install triton (on Windows, triton-windows)"
    if "GPUTooOldForTriton" in names or "GPUTooOldForTriton" in text:
        return "this GPU is too old for Triton, which needs compute capability 7.0; use another one"
    if "FailOnRecompileLimitHit" in names:
        return f"one region met more than {MAX_PROGRAMS} shapes; use fewer sizes of batches and pieces"
    lines = [line.strip() for line in str(chain[-1]).splitlines() if line.strip()]
    wrong = [line.strip() for line in text.splitlines() if "error: " in line]  # of a C++ compiler, after its command
    reason = [*wrong, *lines, "no reason is given"][0]
    return f"{type(chain[-1]).__name__}: {reason[:200]}; try torch.compile on a small program for details"


def _is_of_the_compiler(error: Exception) -> bool:
    """Return whether `error` was raised by compilation rather than by execution, such as a GPU out of memory."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return isinstance(error, TorchDynamoException | FailOnRecompileLimitHit)


def _give_up(error: Exception) -> None:
    global _problem
    _problem = explain(error)
    warnings.warn(
        f"a part of the networks could not be compiled ({_problem}); this process goes on without --compile, with the "
        "same numbers at the usual speed",
        stacklevel=3,
    )
