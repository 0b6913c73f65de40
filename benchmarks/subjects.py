"""Subjects of the network benchmarks: both stages at the size of a preset, with random weights and clips."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import click
import torch
from torch import Tensor

from training import registry
from training.contract import Bundle, FrameClip, Run
from training.longvideogan.gan import GAN, r1_penalty
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.presets import STAGES
from training.longvideogan.sampling import open_sampler
from training.longvideogan.sres.generator import SuperResGenerator
from training.network_format import ONLY
from training.sampling import Prompt, Start

DTYPES = ("float32", "float16", "bfloat16")
SIZES = ("toy", "labdoom-small", "default")  # presets that both stages have; `default` is the published size
NAMES = {"longvideogan-lres": "low resolution", "longvideogan-sres": "super-resolution"}
LRES, SRES = NAMES
SRES_FRAMES = 1  # frames that the super-resolution generator computes at once here; four in training


def shape_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --size, --dtype and --budget of the benchmarks that time every shape of the networks."""
    for option in (
        click.option("--budget", help="Seconds after which no new round of a row begins", type=float, default=4.0),
        click.option("--dtype", help="Of tensors", type=click.Choice(DTYPES), default=DTYPES[0], show_default=True),
        click.option("--size", help="Whose", type=click.Choice(SIZES), default="default", show_default=True),
    ):
        function = option(function)
    return function


def make_system(stage: str, size: str, device: str = "cpu", **changes: Any) -> GAN:
    """Return a stage at the size of a preset, with untrained weights of equal cost; R1 is due at step 0 only."""
    row = STAGES[stage][size]
    shared = {"batch": row["batch"], "precision": None, "grad_accum": 1}
    run = Run(torch.device(device), **{name: changes.pop(name, value) for name, value in shared.items()})
    cls = registry.resolve(registry.spec(stage).system)
    return cls(cls.Options(**{**copy.deepcopy(row["model"]), "r1_interval": 10**9, **changes}), run)


def make_generator(stage: str, size: str, device: str = "cpu") -> Any:
    """Return the generator of a stage, with untrained weights."""
    torch.manual_seed(0)
    model = STAGES[stage][size]["model"]
    edges = {name: model[name] for name in ("height", "width", "lres_height", "lres_width") if name in model}
    network = {LRES: LowResGenerator, SRES: SuperResGenerator}[stage](**edges, **model.get("generator", {}))
    return network.eval().requires_grad_(False).to(device)


class RepeatedPrompt(Prompt):
    """The first frames of one clip (1, 3, T, h, w), for any requested frames."""

    def __init__(self, clip: Tensor) -> None:
        self.clip = clip

    def frames(self, start: Start, count: int, size: tuple[int, int]) -> Tensor:
        """See `Prompt.frames`."""
        return self.clip[:, :, :count]


def make_sampler(*networks: Any) -> Any:
    """Return the sampler of one generator or of both."""
    return open_sampler([Bundle({ONLY: network}, "") for network in networks], {})


def make_batches(system: GAN, step: int) -> list[dict[str, Tensor]]:
    """Return clips of noise for a step, on the device."""
    rng = torch.Generator().manual_seed(step)
    return [
        {
            part.name: (torch.rand(system.run.batch, 3, part.count, part.height, part.width, generator=rng) * 2 - 1).to(
                system.device
            )
            for part in spec.parts
            if isinstance(part, FrameClip)
        }
        for spec in system.batch_spec(step)
    ]


def passes(system: Any) -> dict[str, Callable[[], object]]:
    """Return the passes of training, one clip at a time; gradients are reset to None."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(system.device)

    opts, G, D = system.options, system.G, system.D
    if system.needs_condition:
        condition = normal(1, 3, SRES_FRAMES + 2 * system.context, opts.lres_height, opts.lres_width) * 0.5
        z, lres = normal(1, G.z_channels), normal(1, 3, opts.num_frames, opts.lres_height, opts.lres_width)
        make: Callable[[], Tensor] = lambda: G(condition, z)  # noqa: E731
        judge: Callable[[Tensor], Tensor] = lambda video: D(lres, video)  # noqa: E731
    else:
        noise = normal(1, G.noise_channels, G.num_noise_frames(opts.num_frames))
        make = lambda: G.synthesize(noise, opts.num_frames)  # noqa: E731
        judge = D
    video = normal(1, 3, opts.num_frames, opts.height, opts.width) * 0.5

    def forward(network: torch.nn.Module, function: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            function()

    def backward(network: torch.nn.Module, function: Callable[[], Tensor]) -> None:
        network.requires_grad_(True)
        function().square().mean().backward()
        network.requires_grad_(False).zero_grad(set_to_none=True)

    def penalty() -> Tensor:
        clip = video.detach().requires_grad_(True)
        return r1_penalty(judge(clip), clip)

    return {
        "G forward": lambda: forward(G, make),
        "G forward + backward": lambda: backward(G, make),
        "D forward": lambda: forward(D, lambda: judge(video)),
        "D forward + backward": lambda: backward(D, lambda: judge(video)),
        "D R1": lambda: backward(D, penalty),
    }


def num_frames(system: Any, name: str) -> int:
    """Return the number of frames that a pass of `passes` processes."""
    return SRES_FRAMES if system.needs_condition and name.startswith("G") else system.options.num_frames
