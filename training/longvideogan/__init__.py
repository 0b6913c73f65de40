"""LongVideoGAN; the source text inside older pickles, which --trust runs, imports two modules from here."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("compilation", "precision"):  # imported on demand, so that `spec` can be read without torch
        return importlib.import_module(f"torch_utils.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
