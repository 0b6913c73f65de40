"""Running statistics of training, reported from any module and collected at intervals.

`report()` adds a tensor of values to per-device counters and never waits for the device. A `Collector` computes number,
mean and standard deviation of the values that all ranks reported since its last `update()`. Values that are not finite,
or whose square is not, would make all moments NaN: they are left out and counted separately.
"""

import math
import re
import weakref
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dnnlib.util import EasyDict

T = TypeVar("T")
NUM_MOMENTS = 4  # number of finite values, their sum, the sum of their squares, number of non-finite values

# State of the process, so that networks and losses can report without being passed a collector.
_rank = 0
_sync_device: torch.device | None = None
_counters: dict[str, dict[torch.device, torch.Tensor]] = {}  # name -> device -> float64 moments since the last sync
_collectors: "weakref.WeakSet[Collector]" = weakref.WeakSet()


def init_multiprocessing(rank: int, sync_device: torch.device | None) -> None:
    """Set the rank of this process and the device on which moments are summed over ranks; None for a single process."""
    global _rank, _sync_device
    _rank, _sync_device = rank, sync_device


@torch.no_grad()
def report(name: str, value: T) -> T:
    """Add every element of `value` (a tensor, array or number, possibly empty) to statistic `name`; return `value`.

    The same names must be reported on all ranks, with an empty value where a rank has none.
    """
    # Values and squares are rounded to float32 before they are summed in float64: the 29 additional bits keep most sums
    # exact, hence independent of interruptions and of the number of ranks.
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
    return value


def report0(name: str, value: T) -> T:
    """Report the value of rank 0 only; every rank must call it. Return `value`."""
    report(name, value if _rank == 0 else [])
    return value


def _sync(names: list[str]) -> None:
    """Move the counters of all devices for `names` to the collectors: one copy per device and one all-reduce."""
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
    for collector in _collectors:
        collector.add(names, deltas)


class Collector:
    """Moments of the statistics whose full name matches `regex`, of the values reported between two updates.

    Several collectors may use the same statistics. With `keep_previous`, a statistic without values since the last
    `update()` keeps its previous moments. Creating, updating and saving a collector are collective operations.
    """

    def __init__(self, regex: str = ".*", keep_previous: bool = True):
        self._regex = re.compile(regex)
        self._keep_previous = keep_previous
        # A collector sums what is new by itself. Differences of sums since the process began would be rounded by all
        # that came before, and a resumed run, where less came before, would differ in the last bits.
        self._pending: dict[str, torch.Tensor] = {}  # name -> float64 moments over all ranks since the last update
        self._moments: dict[str, torch.Tensor] = {}
        _sync(self.names())
        _collectors.add(self)

    def names(self) -> list[str]:
        """Return the matching names reported so far in this process, sorted so that the order is equal on all ranks."""
        return sorted(name for name in _counters if self._regex.fullmatch(name))

    def add(self, names: list[str], moments: torch.Tensor) -> None:
        """Add `moments`, float64 of shape (len(names), NUM_MOMENTS), of those of `names` that match."""
        for name, delta in zip(names, moments, strict=True):
            if self._regex.fullmatch(name):
                self._pending[name] = self._pending[name] + delta if name in self._pending else delta.clone()

    def update(self) -> None:
        """Compute the moments of the values reported since the last update."""
        _sync(self.names())
        for name, delta in self._pending.items():
            if not self._keep_previous or delta[0] + delta[3] > 0:
                self._moments[name] = delta
        self._pending = {name: torch.zeros_like(delta) for name, delta in self._pending.items()}

    def _get(self, name: str) -> list[float]:
        assert self._regex.fullmatch(name), f"{name} is not collected by {self._regex.pattern}"
        return self._moments[name].tolist() if name in self._moments else [0.0] * NUM_MOMENTS

    def num(self, name: str) -> int:
        """Return the number of finite values."""
        return int(self._get(name)[0])

    def num_nonfinite(self, name: str) -> int:
        """Return the number of values that were NaN or infinite."""
        return int(self._get(name)[3])

    def mean(self, name: str) -> float:
        """Return the mean of the finite values; NaN if there are none."""
        num, total = self._get(name)[:2]
        return total / num if num else math.nan

    def std(self, name: str) -> float:
        """Return the population standard deviation of the finite values; NaN if there are none, 0 for a single one."""
        num, total, squares = self._get(name)[:3]
        if num < 2:
            return 0.0 if num else math.nan
        return math.sqrt(max(squares / num - (total / num) ** 2, 0.0))

    def as_dict(self) -> EasyDict:
        """Return {name: {num, mean, std}}, with the key `nonfinite` where values were left out."""
        stats = EasyDict()
        for name in self.names():
            stats[name] = EasyDict(num=self.num(name), mean=self.mean(name), std=self.std(name))
            if self.num_nonfinite(name):
                stats[name].nonfinite = self.num_nonfinite(name)
        return stats

    def __getitem__(self, name: str) -> float:
        """Return `mean(name)`."""
        return self.mean(name)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values: the moments of the last update and those of values reported since, for a resumed run."""
        _sync(self.names())
        moments, pending = (
            {name: values.tolist() for name, values in found.items()} for found in (self._moments, self._pending)
        )
        return {"moments": moments, "pending": pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of `state_dict()`, from this or another process, with any number of ranks."""
        for name in state["pending"]:
            report(name, [])
        _sync(self.names())
        self._moments, self._pending = (
            {name: torch.tensor(values, dtype=torch.float64) for name, values in state[key].items()}
            for key in ("moments", "pending")
        )
