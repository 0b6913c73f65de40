"""Both stages at a tiny size with random data; also run as ranks by tests."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from training import registry
from training.config import resolve
from training.contract import Bundle, Run
from training.longvideogan import sampling
from training.network_format import ONLY
from training.sampling import Prompt, Request

TINY: dict[str, dict[str, Any]] = {
    "longvideogan-lres": {
        "height": 16,
        "width": 16,
        "num_frames": 16,
        "preview_frames": 8,
        "r1_interval": 2,
        "generator": {
            "embedding_channels": 16,
            "num_filters": 4,
            "min_filter_taps": 4,
            "max_filter_taps": 24,
            "w_channels": 8,
            "input_channels": 6,
            "temporal_channels": [6, 6, 4, 4],
            "spatial_channels": [4, 4, 4, 4],
        },
        "discriminator": {"channels": [3, 4, 4, 4, 4], "epilogue_channels": 6},
    },
    "longvideogan-sres": {
        "height": 36,
        "width": 64,
        "lres_height": 18,
        "lres_width": 32,
        "num_frames": 2,
        "preview_frames": 4,
        "r1_interval": 2,
        "ada_interval": 1,
        "generator": {
            "num_layers": 8,
            "channel_base": 256,
            "channel_max": 4,
            "temporal_context": 1,
            "z_channels": 6,
            "w_channels": 6,
        },
        "discriminator": {"channel_base": 256, "channel_max": 6},
    },
}
BATCH = 4
STAGES = list(TINY)


def make(stage: str, dtype: torch.dtype = torch.float64, device: str = "cpu", **changes: Any) -> Any:
    """Return the stage in `dtype`; changes of its options, or of the batch, the rounds and the seed of the run."""
    shared = {"batch": BATCH, "grad_accum": 1, "seed": 0}
    run = Run(torch.device(device), **{name: changes.pop(name, value) for name, value in shared.items()})
    cls = registry.resolve(registry.spec(stage).system)
    system = cls(resolve(cls.Options, {**copy.deepcopy(TINY[stage]), **changes}), run)
    for module in [*system.modules.values(), *(getattr(system, name, None) for name in ("augment", "corrupt"))]:
        if isinstance(module, torch.nn.Module):
            module.to(dtype)
    return system


def batches(
    system: Any, step: int, first: int | None = None, last: int | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """Return the global batches of a step, made up, cut to clips [first, last)."""
    for index, spec in enumerate(system.batch_spec(step)):
        rng = np.random.RandomState(1000 * step + index)
        yield {
            part.name: torch.from_numpy(rng.uniform(-1, 1, (system.run.batch, 3, part.count, part.height, part.width)))[
                first:last
            ]
            for part in spec.parts
        }


def train(system: Any, steps: Iterable[int], **cut: int) -> list[dict[str, torch.Tensor]]:
    """Take `steps`; what each reports."""
    return [system.step(batches(system, step, **cut), step) for step in steps]


def weights(system: Any) -> dict[str, torch.Tensor]:
    """Return copies of all parameters and buffers."""
    return {
        f"{name}.{key}": tensor.clone()
        for name, module in system.modules.items()
        for key, tensor in module.state_dict().items()
    }


def record_gradients(system: Any) -> list[dict[str, torch.Tensor]]:
    """Return a list that each later update adds to: the gradients that its optimiser is about to use, by parameter."""
    updates: list[dict[str, torch.Tensor]] = []
    for name, optimizer in system.optimizers.items():
        parameters = dict(system.modules[name].named_parameters())
        optimizer.register_step_pre_hook(
            lambda *_, name=name, parameters=parameters: updates.append(
                {f"{name}.{key}": p.grad.clone() for key, p in parameters.items() if p.grad is not None}
            )
        )
    return updates


def history(stage: str, dtype: torch.dtype, grad_accum: int, **cut: int) -> dict[str, Any]:
    """Three steps with R1 in the first and the last, and in super-resolution with every augmentation at half strength.

    The gradients of every update, the weights and trackers at the end, the strength of the augmentation, and the
    signs that it follows.
    """
    # With another seed a value may come so close to the kink of the leaky ReLU that rounding to single precision puts
    # it on the other side, which at this size changes the gradient by 1e-4 to 3e-4 (seeds 0 and 1).
    system = make(stage, dtype, grad_accum=grad_accum, seed=3)
    if stage == "longvideogan-sres":
        system.ada.p = 0.4
    updates = record_gradients(system)
    train(system, range(3), **cut)
    return {"gradients": updates, "weights": weights(system), "state": system.state_dict()}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of what was expected, of all tensors together."""
    assert found.keys() == expected.keys()
    difference = sum((found[key] - expected[key]).double().square().sum().item() for key in found)
    return (difference / sum(tensor.double().square().sum().item() for tensor in expected.values())) ** 0.5


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of any two entries."""
    assert found.keys() == expected.keys()
    return max((found[key] - expected[key]).abs().max().item() for key in found)


# Sampling.


class FunctionPrompt(Prompt):
    """Frames that a function of their starts and their number gives: float32 (N, 3, T, h, w)."""

    def __init__(self, function: Any):
        self.function = function

    def frames(self, start: Any, count: int, size: tuple[int, int]) -> torch.Tensor:
        return self.function(start, count)


def make_sampler(*networks: Any, **options: Any) -> Any:
    """Return the sampler of one network or of both."""
    bundles = [Bundle({ONLY: network}, "") for network in networks]
    return sampling.open_sampler(bundles, options)


def outputs(sampler: Any, seeds: Any, start: Any, num_frames: Any, condition: Any = None) -> dict[str, torch.Tensor]:
    """Return all frames of each output of a sampler; `condition(starts, count)` gives its prompt."""
    prompt = FunctionPrompt(condition) if condition else Prompt()
    chunks = list(sampler.frames(Request(seeds, start, num_frames, prompt)))
    return {name: torch.cat([chunk[name] for chunk in chunks], dim=2) for name in chunks[0]}


def video(*arguments: Any) -> torch.Tensor:
    """Return the frames that are measured; see `outputs`."""
    return outputs(*arguments)["video"]
