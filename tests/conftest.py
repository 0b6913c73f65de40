"""Fixtures for all tests: few threads, golden values."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.explorer.browser import browser, downloads

__all__ = ["browser", "downloads"]  # fixtures

# How long an example takes depends on what else the machine does, and is no matter of right and wrong.
settings.register_profile("any_machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any_machine")

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """One torch thread a worker: several workers share the cores, and more threads than cores is far slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repo() -> Path:
    """Return the root of the repository."""
    return REPO


@pytest.fixture(scope="session")
def golden():
    """Read tests/golden/<name>.json."""

    def read(name: str) -> Any:
        return json.loads((REPO / "tests" / "golden" / f"{name}.json").read_text())

    return read
