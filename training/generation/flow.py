"""Flow matching: the path from noise to data, and the integration of a velocity field along it.

Lipman et al., "Flow Matching for Generative Modeling", ICLR 2023, section 4.1: noise x0 at t = 0 and data x1 at t = 1
are joined by straight lines x_t = (1 - (1 - sigma) t) x0 + t x1, whose velocity x1 - (1 - sigma) x0 a network learns.

Solvers have fixed steps, and evaluate the field at the places that torchdiffeq's methods of the same names do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

SIGMA = 1e-7  # standard deviation of the path's end around the data
TIME_LAWS = ("uniform", "logit-normal")

Field = Callable[[float, Tensor], Tensor]  # (t, y) -> dy/dt


# ----------------------------------------------------------------------------
# The path.


def interpolate(noise: Tensor, data: Tensor, t: Tensor | float, sigma: float = SIGMA) -> Tensor:
    """Return the point of the path at `t`, a number or a tensor that broadcasts: x_t, shaped as the data."""
    return (1 - (1 - sigma) * t) * noise + t * data


def velocity(noise: Tensor, data: Tensor, sigma: float = SIGMA) -> Tensor:
    """Return the velocity of the path, which does not depend on t.

    The quotient (x1 - (1 - sigma) x_t) / (1 - (1 - sigma) t) of the paper is the same number, but loses all digits in
    float32 towards t = 1.
    """
    return data - (1 - sigma) * noise


def draw_time(rng: np.random.RandomState, law: str = "uniform") -> float:
    """Draw t in (0, 1) for training: uniform, or the logistic function of a standard normal number.

    The latter prefers the middle of the path, where the velocity is hardest to tell (Esser et al. 2024, section 3.1).
    """
    assert law in TIME_LAWS, law
    return float(rng.random_sample() if law == "uniform" else 1 / (1 + math.exp(-rng.standard_normal())))


# ----------------------------------------------------------------------------
# Grids.


def published_points(steps: int, warm_start: float = 0.0) -> int:
    """Return the number of points of RIVER's grid on [warm_start, 1]: the integer part of a product in float64.

    There is one interval less. 100 steps from 0.8 give 19 points, not 20.
    """
    return int((1 - warm_start) * steps)


def num_intervals(steps: int, warm_start: float = 0.0) -> int:
    """Return the number of intervals on [warm_start, 1] that are about as long as `steps` equal ones on [0, 1]."""
    return max(1, round((1 - warm_start) * steps))


def time_grid(num_points: int, start: float = 0.0) -> list[float]:
    """Return evenly spaced points from `start` to 1, as float32 has them; raises `ValueError` if there is none."""
    if num_points < 1:
        raise ValueError(f"the grid from {start:g} to 1 has no point: use more steps, or a warm start further from 1")
    return torch.linspace(start, 1, num_points).tolist()


# ----------------------------------------------------------------------------
# Solvers.


def _euler(f: Field, t: float, d: float, y: Tensor) -> Tensor:
    return y + d * f(t, y)


def _midpoint(f: Field, t: float, d: float, y: Tensor) -> Tensor:
    return y + d * f(t + d / 2, y + d / 2 * f(t, y))


def _heun(f: Field, t: float, d: float, y: Tensor) -> Tensor:
    k1 = f(t, y)
    return y + d / 2 * (k1 + f(t + d, y + d * k1))


def _heun3(f: Field, t: float, d: float, y: Tensor) -> Tensor:
    k1 = f(t, y)
    k2 = f(t + d / 3, y + d / 3 * k1)
    return y + d / 4 * (k1 + 3 * f(t + 2 * d / 3, y + 2 * d / 3 * k2))


def _rk4(f: Field, t: float, d: float, y: Tensor) -> Tensor:
    """Take a step of the 3/8 rule (Kutta 1901)."""
    k1 = f(t, y)
    k2 = f(t + d / 3, y + d / 3 * k1)
    k3 = f(t + 2 * d / 3, y + d * (k2 - k1 / 3))
    k4 = f(t + d, y + d * (k1 - k2 + k3))
    return y + d / 8 * (k1 + 3 * (k2 + k3) + k4)


# Name -> a step of length d from t, and its evaluations of the field.
SOLVERS: dict[str, tuple[Callable[[Field, float, float, Tensor], Tensor], int]] = {
    "euler": (_euler, 1),
    "midpoint": (_midpoint, 2),
    "heun": (_heun, 2),
    "heun3": (_heun3, 3),
    "rk4": (_rk4, 4),
}


def integrate(
    field: Field, y: Tensor, grid: Sequence[float], solver: str = "rk4", before_step: Callable[[], None] | None = None
) -> Tensor:
    """Return the solution of dy/dt = field(t, y) at the last point of the grid, from `y` at its first point.

    Nothing is reused between steps, as the field may be random. `before_step` is called before each of them.
    """
    step, _ = SOLVERS[solver]
    for t, after in zip(grid, grid[1:], strict=False):
        if before_step is not None:
            before_step()
        y = step(field, t, after - t, y)
    return y


def evaluations(solver: str, intervals: int) -> int:
    """Return how often `integrate` evaluates the field."""
    return SOLVERS[solver][1] * intervals
