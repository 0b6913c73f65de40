"""Open checkpoints of MeBT's release: its transformer, and the 3-D tokenizer that each of them holds.

    python -m training.checkpoint convert epoch=99-step=499999.ckpt mebt.pkl

Nothing in the files is run (torch_utils.safe_archive). The list of modes and the number of heads stand only in the
configuration that Lightning saved, as records of OmegaConf, which refer to each other in circles; for a file without
them, a YAML file of the same name beside it is read.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch_utils.safe_archive import Archive, Inert, Stored
from training.contract import Bundle
from training.mebt import config_file
from training.mebt.networks import MeBT
from training.mebt.presets import SAMPLING
from training.modules import published
from training.network_file import content_hash
from training.network_format import build_network, is_torch_archive

OWN = ("mask_emb", "sos_emb", "pos_emb", "tok_emb.weight")  # besides transformer.*
MARK = "transformer.blocks.0.attn.query.weight"
MAX_DEPTH, MAX_ENTRIES = 32, 10_000  # of a configuration


def open_published(path: str) -> Bundle | None:
    """Return the model in a checkpoint of MeBT, None if the file is none.

    Raises `ValueError` naming the file if it is damaged, or if neither it nor a YAML file beside it has the modes.
    """
    if not os.path.isfile(path) or not is_torch_archive(path):
        return None
    with Archive(path) as archive:
        state = published.state_of(archive.content)
        if not {*OWN, MARK} <= state.keys():
            return None
        options = network_options(archive.content, state, path)
        entries = {name: entry for name, entry in state.items() if name in OWN or name.startswith("transformer.")}
        networks = {"prior": build_network(MeBT, options, archive.tensors(entries), path)}
        found = published.find_tokenizer(archive.content)
        if found is not None:
            settings = {**found.settings, **clip_settings(options["shape"])}
            networks["tokenizer"] = published.build(dataclasses.replace(found, settings=settings), archive)
    name = "ucf-128" if options["shape"][0] > 4 else "ucf-16"
    hashed = content_hash(networks["tokenizer"]) if "tokenizer" in networks else None
    return Bundle(networks, "mebt", {"sampling": SAMPLING[name]}, hashed)


def clip_settings(shape: list[int]) -> dict[str, Any]:
    """Return what the tokenizer of a grid encodes together: the release encodes whole clips, of strides 4, 8, 8."""
    return {"sequence_length": 4 * shape[0], "resolution": 8 * shape[1], "sample_every_n_frames": 1}


def network_options(content: Any, state: Mapping[str, Stored], path: str) -> dict[str, Any]:
    """Return the arguments of the network of a checkpoint, from the shapes of its tensors and its configuration."""
    hyper = content.get("hyper_parameters") if isinstance(content, dict) else None
    hyper = hyper if isinstance(hyper, dict) else {}
    config, mask = (parameters(hyper.get(name)) for name in ("transformer_config", "mask_config"))
    beside = Path(path).with_suffix(".yaml")
    if not _modes(config) and beside.is_file():
        section = config_file.load(str(beside))["model"]
        config, mask = parameters(section), parameters(section.get("mask"))
    modes, heads, width = _modes(config), config.get("n_head"), state["pos_emb"].shape[-1]
    if not modes or type(heads) is not int or heads < 1 or width % heads:
        raise ValueError(
            f"{path} is a checkpoint of MeBT without {'the modes' if not modes else 'the number of heads'} of its "
            f"layers: put the YAML file that it was trained with beside it, as {beside.name}"
        )
    layers = published.count(published.Found(MeBT, dict(state), {}), r"transformer\.blocks\.(\d+)\.")
    return {
        "num_codes": state["tok_emb.weight"].shape[0], "shape": _shape(mask.get("shape"), state["pos_emb"], path),
        "width": width, "heads": heads, "latents": state["sos_emb"].shape[1], "modes": modes[:layers],
        "layers": layers, "residual": "normalised",
        **{ours: _share(config.get(theirs)) for ours, theirs in DROPOUTS.items()},
    }  # fmt: skip


DROPOUTS = {
    "embedding_dropout": "embd_pdrop", "attention_dropout": "attn_pdrop", "residual_dropout": "resid_pdrop",
}  # fmt: skip


def parameters(node: Any) -> dict[str, Any]:
    """Return the section `params` of a node of a configuration, or the node itself, as plain values."""
    section = plain_tree(node)
    section = section if isinstance(section, dict) else {}
    inner = section.get("params")
    return inner if isinstance(inner, dict) else section


def plain_tree(node: Any, depth: int = 0, budget: list[int] | None = None) -> Any:
    """Return dictionaries, lists and values in the place of the records of a configuration.

    A record of OmegaConf refers to the one that it is in, and so to all others: only contents are followed, and what is
    too deep, or too much, becomes None.
    """
    budget = [MAX_ENTRIES] if budget is None else budget
    budget[0] -= 1
    if isinstance(node, Inert):
        attributes = node.attributes()
        node = published.plain(node) if {"_content", "_val"} & attributes.keys() else None
    if depth > MAX_DEPTH or budget[0] < 0 or isinstance(node, Inert):
        return None
    if isinstance(node, dict):
        return {str(key): plain_tree(item, depth + 1, budget) for key, item in node.items()}
    if isinstance(node, list | tuple):
        return [plain_tree(item, depth + 1, budget) for item in node]
    return node


def _modes(config: Mapping[str, Any]) -> list[str]:
    """Return the list of modes in a configuration, empty if there is none."""
    return next((list(value) for value in config.values() if config_file.is_modes(value)), [])


def _share(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and 0 <= value < 1 else 0.0


def _shape(given: Any, positions: Stored, path: str) -> list[int]:
    """Return the grid, by default with the published 16 x 16 cells."""
    count = positions.shape[1]
    if isinstance(given, list) and len(given) == 3 and all(type(edge) is int and edge > 0 for edge in given):
        shape = list(given)
    else:
        shape = [count // 256, 16, 16]
    if math.prod(shape) != count:
        raise ValueError(
            f"{path} has {count} positions, which are no grid of {'x'.join(map(str, shape))}: put the YAML file that "
            f"it was trained with beside it, as {Path(path).with_suffix('.yaml').name}"
        )
    return shape
