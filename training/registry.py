"""Which systems and network classes exist, as strings resolved only when asked for.

Core modules must not import a system's room, so they know it by "module:Class" and import it at the moment of use.
"""

import importlib
from typing import Any

# System name (as options.json has it) -> the class that honours the contract of docs/adding_a_system.md.
SYSTEMS: dict[str, str] = {
    "longvideogan-lres": "training.longvideogan.lres.gan:LowResGAN",
    "longvideogan-sres": "training.longvideogan.sres.gan:SuperResGAN",
}

# Network classes that a file may hold, and what they are called in messages. Each offers `matches(record)` and
# `options_from_record(record)`.
NETWORKS: dict[str, str] = {
    "training.longvideogan.lres.generator:LowResGenerator": "low-resolution generator",
    "training.longvideogan.lres.discriminator:LowResDiscriminator": "low-resolution discriminator",
    "training.longvideogan.sres.generator:SuperResGenerator": "super-resolution generator",
    "training.longvideogan.sres.discriminator:SuperResDiscriminator": "super-resolution discriminator",
}

# What files of models that come with this repository end in: models/<name>-lres.pkl.
ROLES: dict[str, str] = {
    "training.longvideogan.lres.generator:LowResGenerator": "lres",
    "training.longvideogan.sres.generator:SuperResGenerator": "sres",
}


def resolve(spec: str) -> Any:
    """Import "module:Class" and return the class."""
    module, _, name = spec.partition(":")
    return getattr(importlib.import_module(module), name)
