"""Read the YAML files with which the release of MeBT is trained, as options of ours.

What has no counterpart here, such as paths of data, is named, so that nothing is dropped silently.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from dnnlib.text import one_line
from training.generation.draft_revise import MASK_SCHEDULES
from training.mebt.masks import growth_steps
from training.mebt.modes import MODES

Path_ = tuple[str, ...]


def _choice(known: Any) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if value not in known:
            raise ValueError(f"use one of {', '.join(known)}")
        return value

    return read


def _modes(value: Any) -> list[str]:
    if not isinstance(value, list) or not value or any(mode not in MODES for mode in value):
        raise ValueError(f"use a list of {', '.join(MODES)}")
    return list(value)


def _prior(value: Any) -> str:
    growth_steps(str(value))
    return str(value)


def _whole(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError("use a whole number from 1 on")
    return value


def _number(value: Any) -> float:
    # PyYAML takes 3e-5, without a point, for text.
    number = float(value)
    if not 0 <= number < float("inf"):
        raise ValueError("use a number from 0 on")
    return number


# Entries of the release -> fields of MeBTOptions, or, with a colon in front, of TrainOptions.
FIELDS: dict[Path_, tuple[str, Callable[[Any], Any]]] = {
    ("model", "params", "n_layer"): ("layers", _whole),
    ("model", "params", "n_head"): ("heads", _whole),
    ("model", "params", "n_embd"): ("width", _whole),
    ("model", "params", "sos_emb"): ("latents", _whole),
    ("model", "params", "embd_pdrop"): ("embedding_dropout", _number),
    ("model", "params", "attn_pdrop"): ("attention_dropout", _number),
    ("model", "params", "resid_pdrop"): ("residual_dropout", _number),
    ("model", "params", "avg_loss"): ("average", _number),
    ("model", "params", "t_prior"): ("window_prior", _prior),
    ("model", "params", "label_smoothing"): ("label_smoothing", _number),
    ("model", "params", "beta_iter"): ("beta_steps", _whole),
    ("model", "mask", "params", "schedule"): ("mask_schedule", _choice(MASK_SCHEDULES)),
    ("model", "mask", "params", "budget"): ("budget", _whole),
    ("data", "sequence_length"): ("num_frames", _whole),
    ("exp", "exact_lr"): ("lr", _number),
    ("exp", "weight_decay"): ("weight_decay", _number),
    ("exp", "warmup_steps"): ("warmup_steps", lambda value: int(_number(value))),
    ("exp", "accumulate_grad_batches"): (":grad_accum", _whole),
    ("data", "num_workers"): (":workers", lambda value: int(_number(value))),
}
PAIRS: dict[Path_, tuple[str, str]] = {
    ("model", "params", "beta_params"): ("beta_a", "beta_b"),
    ("model", "mask", "params", "t_range"): ("t_min", "t_max"),
}
# Entries that are used in another way, or that say what is always so here.
OTHERS = {
    ("model", "params", "unconditional"),
    ("model", "params", "block_size"),
    ("model", "mask", "params", "shape"),
    ("model", "mask", "params", "max_token"),
    ("model", "vqvae", "params", "ckpt_path"),
    ("data", "batch_size"),
    ("exp", "cosine_lr"),
}


def load(path: str) -> dict[str, Any]:
    """Return the content of a YAML file: nested dictionaries.

    Raises `ValueError` naming the file if it is missing, damaged or of another kind, and if pyyaml is missing.
    """
    try:
        import yaml  # an optional dependency
    except ImportError:
        raise ValueError(f"{path} needs the package pyyaml: pip install 'longtake[published]'") from None
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as YAML ({one_line(str(error))}): give a configuration file") from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{path} has no section model: give a configuration file of MeBT's release")
    return content


def leaves(content: Mapping[Any, Any], path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Yield the entries of nested dictionaries that are no dictionaries, with their paths."""
    for key, value in content.items():
        at = (*path, str(key))
        if isinstance(value, dict):
            yield from leaves(value, at)
        else:
            yield at, value


def convert(content: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Return fields of MeBTOptions, fields of TrainOptions, and the entries without a counterpart, of a configuration.

    Raises `ValueError` naming the file `where` and the entry whose value is impossible.
    """
    entries, model, run, ignored = dict(leaves(content)), {}, {}, []
    for path, value in entries.items():
        name = ".".join(path)
        try:
            if path in FIELDS:
                field, read = FIELDS[path]
                (run if field.startswith(":") else model)[field.removeprefix(":")] = read(value)
            elif path in PAIRS:
                model |= dict(zip(PAIRS[path], map(_number, value), strict=True))
            elif path[:2] == ("model", "params") and is_modes(value):
                model["modes"] = _modes(value)
            elif path not in OTHERS:
                ignored.append(name)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {name} is {one_line(repr(value))}: {error}") from None
    _check(entries, where)
    if "batch_size" in content.get("data", {}):
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        batch = entries[("data", "batch_size")]
        run["batch"] = _batch(batch, where) * run.get("grad_accum", 1) * ranks
    if ("exp", "cosine_lr") in entries:
        model["schedule"] = "cosine" if entries[("exp", "cosine_lr")] else "constant"
    checkpoint = entries.get(("model", "vqvae", "params", "ckpt_path"))
    if isinstance(checkpoint, str) and os.path.exists(checkpoint):
        model["tokenizer"] = checkpoint
    elif checkpoint is not None:
        ignored.append("model.vqvae.params.ckpt_path")
    return model, run, ignored


def is_modes(value: Any) -> bool:
    """Return whether a list is one of modes, right or misspelt."""
    return isinstance(value, list) and any(isinstance(mode, str) and mode in MODES for mode in value)


def _batch(value: Any, where: str) -> int:
    try:
        return _whole(value)
    except ValueError as error:
        raise ValueError(f"{where}: data.batch_size is {one_line(repr(value))}: {error}") from None


def _check(entries: Mapping[Path_, Any], where: str) -> None:
    """Refuse what cannot be trained."""
    if not entries.get(("model", "params", "unconditional"), True):
        raise ValueError(
            f"{where}: model.params.unconditional is false, but MeBT is unconditional only: set it to true"
        )
    shape = entries.get(("model", "mask", "params", "shape"))
    size = entries.get(("model", "params", "block_size"))
    if isinstance(shape, list) and all(type(edge) is int for edge in shape) and type(size) is int:
        count = 1
        for edge in shape:
            count *= edge
        if count != size:
            raise ValueError(
                f"{where}: model.params.block_size is {size}, but model.mask.params.shape makes {count} codes: correct "
                "one of them"
            )


def read_row(path: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a preset's row, changed by a configuration file; what is ignored is printed to the standard error."""
    model, run, ignored = convert(load(path), path)
    if ignored and int(os.environ.get("RANK", "0")) == 0:
        click.echo(f"{path}: without a counterpart, and ignored: {', '.join(ignored)}", err=True)
    return {**row, **run, "model": {**row["model"], **model}}
