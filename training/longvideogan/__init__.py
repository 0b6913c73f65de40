"""LongVideoGAN. The source text in older pickles, which --trust runs, imports two modules from here."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """Import a module from its current location."""
    if name in ("compilation", "precision"):
        return importlib.import_module(f"torch_utils.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
