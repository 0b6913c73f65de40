"""Skip tests whose weights are not in the cache."""

from collections.abc import Callable
from typing import Any

import pytest

from metrics.detectors import registry


@pytest.fixture(scope="session")
def published() -> Callable[[str], Any]:
    """Open a detector with its published weights, or skips the test, saying how to get them."""

    def opened(name: str) -> Any:
        try:
            registry.path(name)
        except ValueError as error:
            pytest.skip(str(error))
        return registry.open_detector(name)

    return opened
