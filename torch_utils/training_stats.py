"""Running statistics of training, reported from anywhere and collected once in a while.

`report()` adds a tensor of values to per-device counters and never waits for the device. A `Collector` turns what came
in since its last `update()` into number, mean and standard deviation over all values of all ranks. Values that are not
finite, or whose square is not, would spoil the moments for good: they are left out and counted on their own.
"""

import math
import re
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dnnlib.util import EasyDict

T = TypeVar("T")
NUM_MOMENTS = 4  # number of finite values, their sum, the sum of their squares, number of non-finite values

# What this process has seen: reports are made from deep inside a system, which must not carry a collector around.
_rank = 0
_sync_device: torch.device | None = None
_counters: dict[str, dict[torch.device, torch.Tensor]] = {}  # name -> device -> float64 moments since the last sync
_cumulative: dict[str, torch.Tensor] = {}  # name -> float64 moments over all ranks since the process began


def init_multiprocessing(rank: int, sync_device: torch.device | None) -> None:
    """Say which rank this is and where moments are summed over the ranks; None for a single process."""
    global _rank, _sync_device
    _rank, _sync_device = rank, sync_device


@torch.no_grad()
def report(name: str, value: T) -> T:
    """Add every element of `value` (a tensor, array or number, perhaps empty) to statistic `name`; returns `value`.

    The same names must be reported on all ranks, an empty value where a rank has nothing to say.
    """
    # Values and squares are rounded to float32 before float64 sums them: 29 spare bits keep most sums exact, hence the
    # same however a run was interrupted or shared out.
    elements = torch.as_tensor(value).detach().flatten().to(torch.float32)
    finite = elements.square().isfinite()
    elements = torch.where(finite, elements, 0.0)
    sums = [elements.sum(dtype=torch.float64), elements.square().sum(dtype=torch.float64)]
    moments = torch.stack([finite.sum(), *sums, (~finite).sum()])
    counters = _counters.setdefault(name, {})
    if elements.device in counters:
        counters[elements.device].add_(moments)
    else:
        counters[elements.device] = moments
    _cumulative.setdefault(name, torch.zeros(NUM_MOMENTS, dtype=torch.float64))
    return value


def report0(name: str, value: T) -> T:
    """`report()` the value of rank 0 only; called on every rank."""
    report(name, value if _rank == 0 else [])
    return value


def _sync(names: list[str]) -> None:
    """Move what the devices counted for `names` into the totals: one copy per device and one all-reduce."""
    if not names:
        return
    deltas = torch.zeros(len(names), NUM_MOMENTS, dtype=torch.float64)
    for device in {device for name in names for device in _counters[name]}:
        rows = [row for row, name in enumerate(names) if device in _counters[name]]
        deltas[rows] += torch.stack([_counters[names[row]].pop(device) for row in rows]).cpu()
    if _sync_device is not None:
        deltas = deltas.to(_sync_device)
        dist.all_reduce(deltas)
        deltas = deltas.cpu()
    for name, delta in zip(names, deltas, strict=True):
        _cumulative[name] = _cumulative[name] + delta


class Collector:
    """Moments of the statistics whose whole name matches `regex`, over what was reported between two updates.

    Several collectors may watch the same statistics. With `keep_previous`, a statistic that received nothing since
    the last `update()` keeps the moments it had. Making, updating and saving a collector are collective.
    """

    def __init__(self, regex: str = ".*", keep_previous: bool = True):
        self._regex = re.compile(regex)
        self._keep_previous = keep_previous
        self._cumulative: dict[str, torch.Tensor] = {}
        self._moments: dict[str, torch.Tensor] = {}
        self.update()
        self._moments.clear()

    def names(self) -> list[str]:
        """All names reported so far in this process that match, sorted so that all ranks agree on the order."""
        return sorted(name for name in _counters if self._regex.fullmatch(name))

    def update(self) -> None:
        """Take in what was reported since the last update."""
        for name, delta in self._pending().items():
            self._cumulative[name] = _cumulative[name]
            if not self._keep_previous or delta[0] + delta[3] > 0:
                self._moments[name] = delta

    def _pending(self) -> dict[str, torch.Tensor]:
        names = self.names()
        _sync(names)
        zeros = torch.zeros(NUM_MOMENTS, dtype=torch.float64)
        return {name: _cumulative[name] - self._cumulative.get(name, zeros) for name in names}

    def _get(self, name: str) -> list[float]:
        assert self._regex.fullmatch(name), f"{name} is not collected by {self._regex.pattern}"
        return self._moments[name].tolist() if name in self._moments else [0.0] * NUM_MOMENTS

    def num(self, name: str) -> int:
        """Number of finite values."""
        return int(self._get(name)[0])

    def num_nonfinite(self, name: str) -> int:
        """Number of values that were NaN or infinite."""
        return int(self._get(name)[3])

    def mean(self, name: str) -> float:
        """Mean of the finite values; NaN if there are none."""
        num, total = self._get(name)[:2]
        return total / num if num else math.nan

    def std(self, name: str) -> float:
        """Population standard deviation of the finite values; NaN if there are none, 0 for a single one."""
        num, total, squares = self._get(name)[:3]
        if num < 2:
            return 0.0 if num else math.nan
        return math.sqrt(max(squares / num - (total / num) ** 2, 0.0))

    def as_dict(self) -> EasyDict:
        """Name -> {num, mean, std}, with `nonfinite` where values were left out."""
        stats = EasyDict()
        for name in self.names():
            stats[name] = EasyDict(num=self.num(name), mean=self.mean(name), std=self.std(name))
            if self.num_nonfinite(name):
                stats[name].nonfinite = self.num_nonfinite(name)
        return stats

    def __getitem__(self, name: str) -> float:
        """Shorthand for `mean(name)`."""
        return self.mean(name)

    def state_dict(self) -> dict[str, Any]:
        """Plain values: the moments of the last update, and what came in since, so that a resumed run loses nothing."""
        pending = {name: delta.tolist() for name, delta in self._pending().items()}
        return {"moments": {name: moments.tolist() for name, moments in self._moments.items()}, "pending": pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict()` was taken, in this process or another, on any number of ranks."""
        zeros = torch.zeros(NUM_MOMENTS, dtype=torch.float64)
        for name in state["pending"]:
            report(name, [])
        _sync(self.names())
        self._cumulative = {
            name: _cumulative[name] - torch.tensor(state["pending"].get(name, zeros.tolist()), dtype=torch.float64)
            for name in self.names()
        }
        self._moments = {name: torch.tensor(moments, dtype=torch.float64) for name, moments in state["moments"].items()}
