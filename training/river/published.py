"""Open checkpoints of RIVER's release: a predictor with its autoencoder, or a refiner.

    python -m training.checkpoint convert model.pth river.pkl

Nothing in the files is run (torch_utils.safe_archive). A file does not say the size of its frames, for which the
autoencoders of the four published configurations stand: f8 and f8_small differ by the level that has attention.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_utils.safe_archive import Archive, Stored
from training.contract import Bundle
from training.modules import published
from training.modules.latents import LatentScale
from training.modules.vqgan2d import VQGAN2D, RiverVQVAE
from training.network_format import build_network, is_torch_archive
from training.river.networks import VectorField
from training.river.refiner import RCAN

FIELD = "vector_field_regressor."
FIELD_MARK = f"{FIELD}in_blocks.0.norm1.weight"
REFINER_MARK = "body.0.body.0.body.3.conv_du.0.weight"
# Levels, first level with attention -> side of the frames.
SIDES = {(4, 2): 64, (4, 3): 256, (5, 4): 256}
OWN_SIDE = 128  # with the own VQ-VAE


def open_published(path: str) -> Bundle | None:
    """Return the networks in a checkpoint of the release, None if the file is none.

    Raises `ValueError` naming the file if it is damaged or lacks a part.
    """
    if not os.path.isfile(path) or not is_torch_archive(path):
        return None
    with Archive(path) as archive:
        content = archive.content
        state = published.state_of(content)
        if FIELD_MARK in state:
            return _predictor(archive, state)
        refiner = content.get("refiner") if isinstance(content, dict) else None
        entries = published.state_of({"model": refiner}) if isinstance(refiner, dict) else {}
        return _refiner(archive, entries) if REFINER_MARK in entries else None


def _predictor(archive: Archive, state: Mapping[str, Stored]) -> Bundle:
    found = published.find_tokenizer(archive.content)
    if found is None:
        raise ValueError(
            f"{archive.path} holds a vector field of RIVER without its autoencoder (ae.*): download it again"
        )
    tokenizer = _resized(published.build(found, archive))
    entries = {name.removeprefix(FIELD): entry for name, entry in state.items() if name.startswith(FIELD)}
    options = _read(archive, lambda: _field_options(entries, tokenizer))
    field = build_network(VectorField, options, archive.tensors(entries), str(archive.path))
    scale = LatentScale(options["state_size"])
    return Bundle({"field": field, "latents": scale, "tokenizer": tokenizer}, "river", {"published": True})


def _resized(tokenizer: nn.Module) -> Any:
    """Return an autoencoder with the frame size of its published configuration."""
    if isinstance(tokenizer, RiverVQVAE):
        side, options = OWN_SIDE, tokenizer.options
    else:
        assert isinstance(tokenizer, VQGAN2D)
        levels = [level for level, part in enumerate(tokenizer.encoder.down) if len(part.attn)]  # pyright: ignore
        side = SIDES.get((len(tokenizer.encoder.down), levels[0] if levels else -1), tokenizer.height)
        nominal = {"resolution": side, "attn_resolutions": [side >> level for level in levels]}
        options = tokenizer.options | nominal
    with torch.device("meta"):
        other = type(tokenizer)(**{**options, "height": side, "width": side})
    other.load_state_dict(tokenizer.state_dict(), assign=True)
    return other


def _field_options(entries: Mapping[str, Stored], tokenizer: Any) -> dict[str, Any]:
    """Return the arguments of a field; raises `KeyError` naming a tensor that the file lacks."""
    channels, inputs = entries["project_out.4.weight"].shape[0], entries["project_in.1.weight"].shape[1]

    def count(group: str) -> int:
        pattern = re.compile(rf"{group}\.(\d+)\.")
        return len({match[1] for name in entries if (match := pattern.match(name))})

    return {
        "state_size": channels,
        "state_res": [tokenizer.height // tokenizer.stride[1], tokenizer.width // tokenizer.stride[1]],
        "inner_dim": entries["project_in.1.weight"].shape[0],
        "depth": count("in_blocks"),
        "mid_depth": count("mid_blocks"),
        "out_norm": "bn" if "project_out.3.running_mean" in entries else "ln",
        "reference": inputs == 3 * channels,
    }


def _refiner(archive: Archive, entries: Mapping[str, Stored]) -> Bundle:
    def options() -> dict[str, Any]:
        groups = {int(match[1]) for name in entries if (match := re.match(r"body\.(\d+)\.body\.", name))}
        blocks = {int(match[1]) for name in entries if (match := re.match(r"body\.0\.body\.(\d+)\.body\.", name))}
        width = entries["head.weight"].shape[0]
        reduction = width // entries[REFINER_MARK].shape[0]
        tanh = "tail.0.weight" in entries
        return {"groups": len(groups), "blocks": len(blocks), "width": width, "reduction": reduction, "tanh": tanh}

    network = build_network(RCAN, _read(archive, options), archive.tensors(entries), str(archive.path))
    return Bundle({"refiner": network}, "river-refiner")


def _read(archive: Archive, read: Any) -> Any:
    """Return what `read` finds in the tensors of a file; raises `ValueError` naming one that is missing."""
    try:
        return read()
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ValueError(
            f"{archive.path} is a model of RIVER with a missing part: {error.args[0]!r} cannot be read; download it "
            "again"
        ) from error


def to_uint8(frames: Tensor) -> Tensor:
    """Return the bytes that the release shows for frames in [-1, 1]: clamped and rounded down, so that 0 is 127."""
    return ((frames.clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8)
