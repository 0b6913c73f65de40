"""The registry of systems. Modules are named by strings and imported on demand.

`SYSTEMS[name]` is "module:SPEC", a `Spec` in the `spec.py` of the system's folder; such a module imports neither torch
nor the system, so that command lines can be built from it quickly.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

SYSTEMS: dict[str, str] = {
    "longvideogan-lres": "training.longvideogan.spec:LRES",
    "longvideogan-sres": "training.longvideogan.spec:SRES",
    # Systems with a tokenizer in their published files come before the tokenizer, which would take it out of them.
    "river": "training.river.spec:SPEC",
    "river-refiner": "training.river.spec:REFINER",
    "tats": "training.tats.spec:SPEC",
    "tats-interpolation": "training.tats.spec:INTERPOLATION",
    "mebt": "training.mebt.spec:SPEC",
    "teco": "training.teco.spec:SPEC",
    "world": "training.world.spec:SPEC",
    "tokenizer": "training.tokenizer.spec:SPEC",
}


@dataclass(frozen=True)
class Alias:
    """An additional option of generate.py, calc_metrics.py and view.py that stands for a general one.

    `target` is "model", "context", "save" (an additional output), or "option:<name>" for `-o <name>=VALUE`.
    """

    flag: str
    target: str
    help: str
    metavar: str | None = None
    default: Any = None  # shown in the help; the effective default is that of the sampler's options
    multiple: bool = False
    kind: Any = str
    role: str = ""  # of the model that it names, or the output that it saves


@dataclass(frozen=True)
class Spec:
    """The description of a system, available without importing it."""

    name: str
    title: str  # one line, for the list of systems
    system: str  # "module:Class" of the `training.contract.System`
    presets: str  # "module:TABLE": name of a preset -> fields of TrainOptions, and under "model" those of Options
    networks: Mapping[str, str]  # "module:Class" of every network that a file may hold -> its name in messages
    open_sampler: str  # "module:function": (list of Bundle, options) -> training.sampling.Sampler
    options: str = ""  # "module:Class" of `System.Options` in a module that imports no torch; "": that of the system
    role: str = ""  # suffix of its file names in models/, if a model consists of several files
    published_adapters: tuple[str, ...] = ()  # "module:function": path -> Bundle, or None for a file of another release
    next_command: str = "python generate.py --outdir=outputs --seed=0 --model={network}"
    outdir: str = ""  # parent of run directories made by train.py; "": runs/<name>
    aliases: tuple[Alias, ...] = field(default=())
    protocols: str = ""  # "module:TABLE": name -> `metrics.protocols.EvalProtocol`, for `calc_metrics.py --protocol`


def resolve(path: str) -> Any:
    """Import "module:name" and return the object."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def options(spec: Spec) -> Any:
    """Return the `Options` of a system, if it can be done without importing the system."""
    return resolve(spec.options) if spec.options else resolve(spec.system).Options


def spec(name: str) -> Spec:
    """Return the spec of a registered system; raise `KeyError` if there is none."""
    return resolve(SYSTEMS[name])


def specs() -> Iterator[Spec]:
    """Yield the specs of all systems."""
    for name in SYSTEMS:
        yield spec(name)


def networks() -> dict[str, str]:
    """Return "module:Class" -> name in messages, for every network class that a file may hold."""
    return {path: words for item in specs() for path, words in item.networks.items()}


def find_network(class_name: str) -> tuple[str, Spec] | None:
    """Return "module:Class" and the spec of the network class of this name, None if no system has it."""
    for item in specs():
        for path in item.networks:
            if path.endswith(f":{class_name}"):
                return path, item
    return None


def aliases() -> list[Alias]:
    """Return the aliases of all systems, each flag once."""
    return list({alias.flag: alias for item in specs() for alias in item.aliases}.values())
