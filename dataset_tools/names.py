"""Names of sources as text, and commands as a shell reads them."""

import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path

from dnnlib.text import quote
from training import registry

_NOT_TEXT = re.compile(r"[\ud800-\udfff]")  # as which Python holds bytes of file names that are not UTF-8


def to_text(name: str) -> str:
    """Return a name in which bytes that are not UTF-8 are written as %XX, as in URLs."""
    return _NOT_TEXT.sub(lambda found: f"%{ord(found[0]) & 0xFF:02X}", name)


def to_texts(names: Iterable[str]) -> list[str]:
    """Return different names, all of them text, for different names; those that are text stay the same."""
    names = list(names)
    used = {name for name in names if not _NOT_TEXT.search(name)}
    texts = []
    for name in names:
        text = to_text(name)
        if text != name:
            text = next(
                t for t in itertools.chain([text], (f"{text}_{n}" for n in itertools.count(2))) if t not in used
            )
            used.add(text)
        texts.append(text)
    return texts


def train_command(root: str | os.PathLike[str], sizes: Iterable[tuple[int, int]]) -> str:
    """Return the command that trains on a dataset of these sizes, by a preset that fits them and this machine."""
    import torch

    spec = registry.spec("longvideogan-lres")
    published = registry.resolve(spec.system).Options()
    sizes = list(sizes)
    models = {name: preset["model"] for name, preset in registry.resolve(spec.presets).items()}
    fitting = [
        name
        for name, model in models.items()
        if (model.get("height", published.height), model.get("width", published.width)) in sizes
    ]
    if fitting:  # the table goes from large networks to small ones
        preset = fitting[0 if torch.cuda.is_available() else -1]
        option = f" --preset={preset}" if preset != "default" else ""
    else:
        option = " --size={}x{}".format(*min(sizes))
    script = Path(__file__).resolve().parents[1] / "train_lres.py"
    script = script.name if script.parent == Path.cwd() else script
    return f"python {quote(script)} --dataset={quote(root)}{option}"
