"""Shared optimisation: gradient accumulation, clipping, learning-rate schedules, exponential moving averages.

No function synchronises with the device: return values are tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torch_utils import distributed, sharding
from training.contract import Batch
from training.flags import SCHEDULES as SCHEDULES
from training.flags import check_options as check_options

T = TypeVar("T")


class Report:
    """The values that a step reports by name, collected over its accumulation rounds."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}

    def add(self, group: str, **values: Tensor) -> None:
        """Add values of each "group/name"."""
        for name, value in values.items():
            self._values.setdefault(f"{group}/{name}", []).append(value.detach().flatten())

    def values(self) -> dict[str, Tensor]:
        """Return all values of each name, concatenated to 1-D tensors."""
        return {name: torch.cat(values) for name, values in self._values.items()}


def update(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    rounds: Sequence[slice],
    *losses: Callable[[slice], Tensor],
    gain: float = 1.0,
    frozen: Sequence[nn.Module] = (),
    clip_norm: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Take one optimiser step on the sum of `losses`, averaged over rounds and ranks and multiplied by `gain`.

    Each of `losses` takes the clips of one round and is differentiated before the next one is computed, so only one
    graph is in memory. Only `network`, except for its parts in `frozen`, requires gradients meanwhile. Gradients are
    scaled to a norm of at most `clip_norm`.

    Returns the number of non-finite entries of the gradient, which are replaced by zeros, and the gradient's norm
    before clipping, averaged over ranks and multiplied by `gain`.
    """
    network.requires_grad_(True)
    for part in frozen:
        part.requires_grad_(False)
    optimizer.zero_grad(set_to_none=True)
    for piece in rounds:
        for loss in losses:
            loss(piece).backward()
    network.requires_grad_(False)
    return apply_gradients(network.parameters(), optimizer, gain / len(rounds), clip_norm)


def apply_gradients(
    parameters: Iterable[Tensor], optimizer: torch.optim.Optimizer, gain: float = 1.0, clip_norm: float | None = None
) -> tuple[Tensor, Tensor]:
    """Average the gradients over ranks, times `gain`, clip their norm, and take one optimiser step; see `update`."""
    parameters = list(parameters)
    num_nonfinite = distributed.sync_grads(parameters, gain)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = distributed.total_norm(gradients)
    if clip_norm is not None and not (norm.device.type == "cpu" and norm.item() <= clip_norm):
        parts = [distributed.own_part(gradient) for gradient in gradients]
        torch._foreach_mul_(parts, (clip_norm / norm.clamp(min=1e-12)).clamp(max=1.0))  # pyright: ignore
    _step(optimizer, parameters)
    return num_nonfinite, norm


def _step(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> None:
    """Take an optimiser's step, first of what is whole, then of what is divided: its kernels do not take both."""
    gradients = [(parameter, parameter.grad) for parameter in parameters]
    for kind in sorted({distributed.is_divided(parameter) for parameter in parameters}):
        for parameter, gradient in gradients:  # an optimiser leaves out parameters without one
            parameter.grad = gradient if distributed.is_divided(parameter) == kind else None
        optimizer.step()
    for parameter, gradient in gradients:
        parameter.grad = gradient


def make_adam(
    networks: nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
) -> torch.optim.Adam:
    """Return Adam over all parameters, or AdamW with weight decay, fused if torch supports it.

    The state has the same layout in both cases: `step`, on the device for the fused kernel, and two moments.
    """
    parameters: Any = list(networks.parameters() if isinstance(networks, nn.Module) else networks)
    tensors = [p for item in parameters for p in (item["params"] if isinstance(item, dict) else [item])]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in tensors)
    kind: Any = torch.optim.AdamW if weight_decay else torch.optim.Adam
    return kind(parameters, lr=lr, betas=betas, eps=1e-8, fused=fused, weight_decay=weight_decay)


class Rates:
    """A learning rate by step; subclasses define `at`."""

    def at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        raise NotImplementedError(f"{type(self).__name__} does not define its rates")

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set and return the rate of a step; the rate of a group is multiplied by its "lr_scale", if any."""
        rate = self.at(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        return rate


@dataclass(frozen=True)
class Schedule(Rates):
    """A learning rate by step: linear warm-up to `peak`, then constant, half a cosine, or a polynomial to `end`."""

    peak: float
    kind: str = "constant"
    warmup: int = 0  # steps
    steps: int = 0  # step at which the rate reaches `end`
    end: float = 0.0
    power: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"learning-rate schedule {self.kind!r} is unknown: use {', '.join(SCHEDULES)}")
        if not 0 < self.peak < math.inf:
            raise ValueError(f"learning rate is {self.peak}; it must be above 0, such as 0.001")
        if self.kind != "constant" and self.steps <= self.warmup:
            raise ValueError(
                f"a {self.kind} schedule of {self.steps} steps ends within its warm-up of {self.warmup}: train longer "
                "or warm up for fewer steps"
            )

    def at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.kind == "constant":
            return self.peak
        done = min((step - self.warmup) / (self.steps - self.warmup), 1.0)
        share = (1 + math.cos(math.pi * done)) / 2 if self.kind == "cosine" else (1 - done) ** self.power
        return self.end + (self.peak - self.end) * share


def ema_decay(beta: float, rampup_steps: int, step: int) -> float:
    """Return the EMA decay at a step: its half-life grows linearly over the first `rampup_steps`."""
    return min(beta ** ((rampup_steps + 1) / (step + 1)), beta)


@torch.no_grad()
def update_ema(average: nn.Module, current: nn.Module, beta: float) -> None:
    """Update the EMA `average` from `current`: parameters and floating-point buffers; other buffers are copied."""
    averages, currents = ([*module.parameters(), *module.buffers()] for module in (average, current))
    is_float = [tensor.is_floating_point() for tensor in averages]
    if all(is_float):
        torch._foreach_lerp_(averages, currents, 1 - beta)  # pyright: ignore[reportPrivateImportUsage]
        return
    for old, new in zip(averages, currents, strict=True):
        old.lerp_(new, 1 - beta) if old.is_floating_point() else old.copy_(new)


def cut(batch: Batch, piece: slice) -> Batch:
    """Return the clips of one accumulation round."""
    return {name: part[piece] for name, part in batch.items()}


def seeded(seed: int, build: Callable[[], T]) -> T:
    """Call `build` with torch's CPU generator seeded by `seed`, and restore the generator's state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def load_weights(modules: Mapping[str, nn.Module], weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Load state dicts into the modules of the same names, after checking all of them.

    Raises `ValueError` with the first name or shape that differs.
    """
    for name, state in weights.items():
        check_fit(name, state, modules[name].state_dict())
    for name, state in weights.items():
        sharding.load_state(modules[name], state)


def check_fit(name: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` unless the weights `found` for module `name` have the names and shapes of `wanted`."""

    def describe(state: Mapping[str, Tensor], key: str) -> str:
        return "x".join(map(str, state[key].shape)) or "one number" if key in state else "absent"

    for key in [*wanted, *found]:
        there, here = describe(found, key), describe(wanted, key)
        if there != here:
            raise ValueError(
                f"The weights to begin with do not fit these options: {name}.{key} is {there} there and {here} here; "
                "give the frame sizes, clip length and widths that those weights were trained with"
            )
