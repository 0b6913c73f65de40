"""Which frames the world model sees, and where they were seen from.

Poses (x, y, angle in radians) follow from actions alone, by how each of them moves the viewer on average, so that they
are known before a frame is made; walls that stop the viewer make them wrong, in training as in use. Besides recent
frames the context holds those of the past that were seen from poses near to that of the new one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

GEOMETRY = 6  # numbers that describe a frame of context: see `geometry`
UNIT = 8.0  # largest steps of an action in a unit of pose
ANGLE = math.radians(20.0)  # that counts as much as `DISTANCE` when near poses are searched for
DISTANCE = 0.75  # units of pose
APART = 4  # frames between two that are chosen


def measure_motions(actions: Tensor, poses: Tensor, num_actions: int) -> Tensor:
    """Return how each action moves the viewer, medians over transitions: (num_actions, 3), see `WorldModel`.

    `actions` are int64 (N, T), `poses` (N, T, 3) with x, y in any unit and the angle in degrees, counterclockwise. An
    action that does not occur has zeros.
    """
    angle = torch.deg2rad(poses[..., 2].double())
    dx, dy = (poses[:, 1:, axis].double() - poses[:, :-1, axis].double() for axis in (0, 1))
    cos, sin = angle[:, 1:].cos(), angle[:, 1:].sin()
    turn = torch.remainder(angle.diff(dim=1) + math.pi, 2 * math.pi) - math.pi
    steps = torch.stack([cos * dx + sin * dy, cos * dy - sin * dx, turn], dim=2)
    motions = torch.zeros(num_actions, 3, dtype=torch.float64, device=poses.device)
    for action in range(num_actions):
        found = steps[actions[:, 1:] == action]
        if len(found):
            motions[action] = found.median(0).values
    longest = motions[:, :2].norm(dim=1).max() if num_actions else motions.new_zeros(())
    motions[:, :2] /= (UNIT * longest).clamp(min=1e-9)
    return motions.float()


def dead_reckon(actions: Tensor, motions: Tensor, start: Tensor | None = None) -> Tensor:
    """Return the poses after each action: int64 (N, T) -> (N, T, 3), x and y in units of pose, the angle in radians.

    `start` (N, 3) is the pose before the first action, by default zeros. A turn comes before its step.
    """
    moved = motions[actions]  # (N, T, 3)
    angle = moved[..., 2].cumsum(1) + (0 if start is None else start[:, None, 2])
    cos, sin = angle.cos(), angle.sin()
    x = (cos * moved[..., 0] - sin * moved[..., 1]).cumsum(1)
    y = (sin * moved[..., 0] + cos * moved[..., 1]).cumsum(1)
    if start is not None:
        x, y = x + start[:, None, 0], y + start[:, None, 1]
    return torch.stack([x, y, angle], dim=2)


def relative(poses: Tensor, target: Tensor) -> Tensor:
    """Return poses (N, S, 3) as seen from a target (N, 3): forwards, to the left, and the angle in (-pi, pi]."""
    d = poses - target.unsqueeze(1)
    cos, sin = target[:, 2:].cos(), target[:, 2:].sin()
    turn = torch.remainder(d[..., 2] + math.pi, 2 * math.pi) - math.pi
    return torch.stack([cos * d[..., 0] + sin * d[..., 1], cos * d[..., 1] - sin * d[..., 0], turn], dim=2)


@dataclass(frozen=True)
class Chosen:
    """Frames of context: their numbers, int64 (N, slots), and which of them there are, bool (N, slots)."""

    numbers: Tensor
    present: Tensor


def choose(poses: Tensor, targets: Tensor, firsts: Tensor, recent: list[int], memory: int) -> Chosen:
    """Choose the frames of context of the frames `targets` (N,), of which those from `firsts` (N,) on are known.

    `poses` (N, T, 3) are those of all frames. First come the recent ones, 1, 2, 4, ... frames before the target, then
    those before them whose pose is nearest to that of the target, at least `APART` frames from each other. Where all
    poses are equal, as when actions do not tell them, the newest ones are chosen.
    """
    ages = torch.arange(poses.shape[1], device=poses.device)
    numbers = [targets - offset for offset in recent]
    present = [number >= firsts for number in numbers]
    if memory:
        rows = torch.arange(len(poses), device=poses.device)
        near = relative(poses, poses[rows, targets])
        cost = (near[..., :2] / DISTANCE).square().sum(2) + (near[..., 2] / ANGLE).square()
        cost = cost - ages * 1e-4  # of equals, the newer
        oldest = (targets - max(recent)).unsqueeze(1)
        cost = cost.masked_fill((ages >= oldest) | (ages < firsts.unsqueeze(1)), math.inf)
        for _ in range(memory):
            least, number = cost.min(1)
            numbers.append(number)
            present.append(least < math.inf)
            cost = cost.masked_fill((ages - number.unsqueeze(1)).abs() < APART, math.inf)
    found, known = torch.stack(numbers, 1), torch.stack(present, 1)
    return Chosen(torch.where(known, found, 0).clamp(min=0), known)


def geometry(poses: Tensor, targets: Tensor, chosen: Chosen) -> Tensor:
    """Return a description of each frame of context: (N, slots, GEOMETRY), zeros where there is none.

    Its place as seen from the target, in units of pose up to 8; sine and cosine of its angle; the age's logarithm; 1.
    """
    rows = torch.arange(len(poses), device=poses.device)
    near = relative(poses[rows.unsqueeze(1), chosen.numbers], poses[rows, targets])
    place = near[..., :2].clamp(-8, 8)
    age = (targets.unsqueeze(1) - chosen.numbers).clamp(min=1).to(place.dtype).log()
    numbers = [place, near[..., 2:].sin(), near[..., 2:].cos() - 1, age.unsqueeze(2), torch.ones_like(near[..., :1])]
    return torch.cat(numbers, dim=2) * chosen.present.unsqueeze(2)


def pick(latents: Tensor, chosen: Chosen) -> Tensor:
    """Return the latents of the frames of context, zeros where there is none: (N, T, ...) -> (N, slots, ...)."""
    rows = torch.arange(len(latents), device=latents.device).unsqueeze(1)
    found = latents[rows, chosen.numbers]
    return found * chosen.present.view(*chosen.present.shape, *[1] * (found.ndim - 2))
