"""The command that trains on a dataset, and the lengths of clips that training needs."""

import dataclasses
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from dnnlib.text import quote
from training import registry

LRES_FRAMES, SRES_FRAMES = 128, 12  # clip length that each training stage needs at its published settings


def train_command(root: str | os.PathLike[str], sizes: Iterable[tuple[int, int]]) -> str:
    """Return the command that trains on a dataset of these sizes, by a preset that fits them and this machine."""
    spec = registry.spec("longvideogan-lres")
    # The fields' defaults, as an instance would check itself by modules that import torch.
    published = {item.name: item.default for item in dataclasses.fields(registry.options(spec))}
    sizes = list(sizes)
    models = {name: preset["model"] for name, preset in registry.resolve(spec.presets).items()}
    fitting = [
        name
        for name, model in models.items()
        if (model.get("height", published["height"]), model.get("width", published["width"])) in sizes
    ]
    if fitting:  # the table goes from large networks to small ones
        preset = fitting[0 if has_gpu() else -1]
        option = f" --preset={preset}" if preset != "default" else ""
    else:
        option = " --size={}x{}".format(*min(sizes))
    script = Path(__file__).resolve().parents[1] / "train_lres.py"
    script = script.name if script.parent == Path.cwd() else script
    return f"python {quote(script)} --dataset={quote(root)}{option}"


def has_gpu() -> bool:
    """Return whether there is a GPU of NVIDIA's, without importing torch, which takes as long as making 100 frames."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
