"""Charts."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ChartSpec:
    """A chart of a run."""

    title: str
    values: Mapping[str, str]
    log: bool = False
    guide: float | None = None
    limits: tuple[float, float] | None = None
    exact: bool = False
