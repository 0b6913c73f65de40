"""Build hook of hatchling: only editable installations are built.

The scripts at the top of the repository, its models and its recipes are not importable, so that a wheel would hold half
of the project, under top-level names such as `metrics` that other projects use, too.
"""

import sys
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class RefuseWheel(BuildHookInterface[Any]):
    """Let `pip install -e .` pass, and end any other build with a sentence."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """End the build unless `version` is "editable"."""
        if version != "editable":
            sys.exit(
                "Longtake is used from a clone of its repository, not from a wheel, which would lack its scripts, "
                "models and recipes: run `make setup` in the clone, or `pip install -e .`"
            )
