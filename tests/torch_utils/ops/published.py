"""The operator calls and shapes of the published networks, recorded on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from torch_utils.ops import backends, spec
from torch_utils.ops.cuda import driver as cuda_driver
from torch_utils.ops.cuda import kernels as cuda_kernels
from torch_utils.ops.cuda.driver import Kernel
from torch_utils.ops.cuda.fir_plan import Gpu
from training.longvideogan.lres.discriminator import LowResDiscriminator
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.sres.discriminator import SuperResDiscriminator
from training.longvideogan.sres.generator import SuperResGenerator

H200 = Gpu(num_sms=132, shared_bytes=227 * 1024)


class Recorder(TorchDispatchMode):
    """Keeps the names and arguments of this project's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.name() if hasattr(func, "name") else ""
        if name.startswith("longtake::"):
            self.calls.append((name.removeprefix("longtake::"), tuple(map(summary, args))))
        return func(*args, **(kwargs or {}))


def summary(value: Any) -> Any:
    """Return a tensor's shape and strides in place of the tensor."""
    if isinstance(value, torch.Tensor):
        return ("tensor", tuple(value.shape), tuple(value.stride()))
    return tuple(value) if isinstance(value, list) else value


def run_low_res() -> None:
    generator, discriminator = LowResGenerator(36, 64), LowResDiscriminator(128, 36, 64)
    noise = torch.randn(2, 8, generator.num_noise_frames(128))
    video = generator.synthesize(noise, 128, magnitude_ema_beta=0.999)
    discriminator(video).sum().backward()
    penalize(lambda x: discriminator(x), torch.randn(2, 3, 128, 36, 64))


def run_super_res() -> None:
    generator, discriminator = SuperResGenerator(144, 256), SuperResDiscriminator()
    lres = torch.randn(2, 3, 12, 36, 64)
    video = generator(lres, torch.randn(2, generator.z_channels))
    discriminator(lres[:, :, 4:8], video).sum().backward()
    with torch.no_grad():
        generator(lres, torch.randn(2, generator.z_channels))
    penalize(lambda x: discriminator(lres[:, :, 4:8], x), torch.randn(2, 3, 4, 144, 256))


def penalize(discriminator: Callable[[torch.Tensor], torch.Tensor], video: torch.Tensor) -> None:
    """Return the gradient penalty R1, with its second derivatives."""
    video.requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(video).sum(), video, create_graph=True)
    gradient.square().sum().backward()


def calls(run: Callable[[], None]) -> list[tuple[str, tuple]]:
    """Return the distinct calls of operators during `run`, in order."""
    recorder = Recorder()
    with mock.patch.object(backends, "select_impl", lambda impl, x: "compiled"), FakeTensorMode(), recorder:
        run()
    return list(dict.fromkeys(recorder.calls))


def kernels(recorded: list[tuple[str, tuple]], dtype: torch.dtype, gpu: Gpu = H200) -> list[Kernel]:
    """Return the distinct kernels that the calls would launch on a GPU, for activations of a type."""
    found: list[Kernel] = []
    with (
        mock.patch.object(cuda_driver, "launch", lambda kernel, *_: found.append(kernel)),
        mock.patch.object(cuda_driver, "gpu_facts", lambda device: gpu),
    ):
        for name, args in recorded:
            getattr(cuda_kernels, name)(*restore(name, args, dtype))
    return list(dict.fromkeys(found))


def restore(name: str, args: tuple, dtype: torch.dtype) -> list[Any]:
    """Return arguments of an operator as its kernel takes them; tensors are empty, their memory is never touched."""
    schema = getattr(torch.ops.longtake, name).default._schema
    values = []
    for argument, value in zip(schema.arguments, args, strict=True):
        if isinstance(value, tuple) and value and value[0] == "tensor":
            is_filter = argument.name in ("f", "fu", "fd", "f1", "f2")
            kind = torch.uint8 if argument.name == "signs" else torch.float32 if is_filter else dtype
            value = torch.empty_strided(value[1], value[2], dtype=kind)
        elif isinstance(value, tuple):
            value = spec.Axes.from_ints(value)
        values.append(value)
    return values
