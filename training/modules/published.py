"""Tokenizers out of the checkpoints of published releases: which tensors and settings belong to them.

| release | file | tokenizer |
|---|---|---|
| TATS | Lightning .ckpt of a VQGAN, or of a transformer, which holds its VQGAN as `first_stage_model` | `VQGAN3D` |
| MeBT | Lightning .ckpt of a transformer with the VQGAN of TATS | `VQGAN3D` |
| taming-transformers, latent diffusion | .ckpt of a VQGAN, or of a model with it as `first_stage_model` | `VQGAN2D` |
| RIVER | .pth of its own VQ-VAE, or of a model that holds its autoencoder as `ae` | `RiverVQVAE`, `VQGAN2D` |
| TECO | folder of a VQGAN with `args` and `checkpoints/checkpoint_<step>`, written by flax | `VQGAN2D` |

Sizes are read from the shapes of the tensors; strides, frame size and length of clips from the hyper-parameters where
the file has them. Discriminators, perceptual networks and optimisers are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_utils import flax_file, safe_archive
from torch_utils.safe_archive import Archive, Inert, Stored
from training.data.spectrograms import SIZE as AUDIO_SIZE
from training.modules.vqgan2d import VQGAN2D, RiverVQVAE
from training.modules.vqgan3d import VQGAN3D
from training.network_format import build_network

# Where a tokenizer may stand in a file, after "module." of multi-GPU training; that of sound stands elsewhere.
PREFIXES = ("", "first_stage_model.", "ae.backbone.", "ae.")
AUDIO_PREFIXES = ("cond_stage_model.",)

# The first names of the tensors of each class, and a name that only it has.
PARTS: dict[type[nn.Module], tuple[tuple[str, ...], str]] = {
    VQGAN3D: (("encoder", "decoder", "pre_vq_conv", "post_vq_conv", "codebook"), "encoder.conv_first.conv.weight"),
    VQGAN2D: (
        ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv"),
        "encoder.down.0.block.0.norm1.weight",
    ),
    RiverVQVAE: (("encoder", "decoder", "vector_quantizer"), "encoder.residuals.0.conv1.weight"),
}


@dataclass(frozen=True)
class Found:
    """A tokenizer in a checkpoint: its class, its entries by their own names, and the settings of the file."""

    cls: type[nn.Module]
    entries: dict[str, Stored]
    settings: dict[str, Any]

    def size(self, name: str, axis: int = 0) -> int:
        """Return the size of an axis of an entry; raises `KeyError` if the file lacks it."""
        return self.entries[name].shape[axis]


def find_tokenizer(content: Any, prefixes: Sequence[str] = PREFIXES) -> Found | None:
    """Return the tokenizer in the content of an archive, None if there is none that is known."""
    state = state_of(content)
    for prefix in prefixes:
        for cls, (parts, mark) in PARTS.items():
            if prefix + mark in state:
                pattern = re.compile(rf"{re.escape(prefix)}((?:{'|'.join(parts)})\..+)")
                matches = ((pattern.fullmatch(name), entry) for name, entry in state.items())
                return Found(cls, {match[1]: entry for match, entry in matches if match}, settings_of(content))
    return None


def state_of(content: Any) -> dict[str, Stored]:
    """Return the tensors of the model in a checkpoint, without "module." in front of their names."""
    if not isinstance(content, dict):
        return {}
    entries = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)), content)
    return {str(name).removeprefix("module."): entry for name, entry in entries.items() if isinstance(entry, Stored)}


def settings_of(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the hyper-parameters of a Lightning checkpoint, nested ones too, by name; inner ones come first.

    Namespaces and the nodes of configuration libraries are opened as records.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Inert):
            value = plain(value)
        if isinstance(value, dict):
            for key, item in value.items():
                item = plain(item)
                if isinstance(item, dict | Inert):
                    visit(item)
                else:
                    found.setdefault(str(key), item)

    visit(content.get("hyper_parameters"))
    return found


def plain(value: Any) -> Any:
    """Return the value in a record of a namespace or a configuration node: a plain value, a list or a dictionary."""
    if not isinstance(value, Inert):
        return value
    attributes = value.attributes()
    if "_content" in attributes:  # a dictionary or list of OmegaConf
        inner = attributes["_content"]
        return [plain(item) for item in inner] if isinstance(inner, list) else inner
    return attributes["_val"] if "_val" in attributes else attributes


# ----------------------------------------------------------------------------
# Arguments from tensors and settings.


def options_of(found: Found) -> dict[str, Any]:
    """Return the arguments of the network; raises `KeyError` naming a tensor that the file lacks."""
    make = {VQGAN3D: _options_3d, VQGAN2D: _options_2d, RiverVQVAE: _options_river}[found.cls]
    return make(found)


def count(found: Found, pattern: str) -> int:
    """Return the number of different values of the group in a pattern of names."""
    return len({match[1] for name in found.entries if (match := re.match(pattern, name))})


def _number(settings: Mapping[str, Any], name: str, default: int) -> int:
    value = settings.get(name)
    return value if type(value) is int and value > 0 else default


def _options_3d(found: Found) -> dict[str, Any]:
    settings = found.settings
    levels = count(found, r"encoder\.conv_blocks\.(\d+)\.")
    given = settings.get("downsample")
    # A transformer's file does not name the strides of its VQGAN: all published ones have 4 in time.
    downsample = list(given) if isinstance(given, list | tuple) else [min(4, 1 << levels), 1 << levels, 1 << levels]
    every = _number(settings, "sample_every_n_frames", 1)
    frames = _number(settings, "sequence_length", 16)
    channels = found.size("encoder.conv_first.conv.weight", 1)
    size = _number(settings, "resolution", 128)
    height, width = AUDIO_SIZE if channels == 1 else (size, size)  # the settings are those of the frames
    return {
        "height": height,
        "width": width,
        "clip_frames": frames if settings.get("image_folder") else max(frames // every, downsample[0]),
        "downsample": downsample,
        "hidden": found.size("encoder.conv_first.conv.weight"),
        "embedding_dim": found.size("codebook.embeddings", 1),
        "num_codes": found.size("codebook.embeddings"),
        "channels": channels,
        "norm": "batch" if "encoder.final_block.0.running_mean" in found.entries else "group",
        "padding": settings.get("padding_type") or "replicate",
        "quantizer": {
            "kind": "ema",
            "restart": not settings.get("no_random_restart", False),
            "restart_below": float(settings.get("restart_thres", 1.0)),
        },
    }


def _options_2d(found: Found) -> dict[str, Any]:
    levels = count(found, r"encoder\.down\.(\d+)\.")
    resolution = _number(found.settings, "resolution", 256)
    ch = found.size("encoder.conv_in.weight")
    with_attention = [i for i in range(levels) if f"encoder.down.{i}.attn.0.norm.weight" in found.entries]
    z_channels = found.size("decoder.conv_in.weight", 1)
    return {
        "height": resolution,
        "width": resolution,
        "resolution": resolution,
        "ch": ch,
        "ch_mult": [found.size(f"encoder.down.{i}.block.0.conv1.weight") // ch for i in range(levels)],
        "num_res_blocks": count(found, r"encoder\.down\.0\.block\.(\d+)\."),
        "attn_resolutions": [resolution >> level for level in with_attention],
        "z_channels": z_channels,
        "embedding_dim": found.size("quantize.embedding.weight", 1),
        "num_codes": found.size("quantize.embedding.weight"),
        "channels": found.size("encoder.conv_in.weight", 1),
        "double_z": found.size("encoder.conv_out.weight") == 2 * z_channels,
        "quantizer": {"kind": "vq", "legacy": True},
    }


def _options_river(found: Found) -> dict[str, Any]:
    return {
        "embedding_dim": found.size("vector_quantizer.embedding.weight", 1),
        "num_codes": found.size("vector_quantizer.embedding.weight"),
        "channels": found.size("encoder.conv_in.weight", 1),
        "quantizer": {"kind": "vq", "legacy": True},
    }


def build(found: Found, archive: Archive) -> nn.Module:
    """Return the network of a tokenizer in an archive.

    Raises `ValueError` naming the file if tensors are missing or have other shapes.
    """
    try:
        options = options_of(found)
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"{archive.path} is a tokenizer with a missing part: {error.args[0]!r} cannot be read; download it again"
        ) from error
    tensors = archive.tensors(found.entries)
    if found.cls is VQGAN3D:
        # The release does not say whether the codebook is initialised; it is, in every file that was trained.
        tensors.setdefault("codebook.initialised", torch.ones((), dtype=torch.int64))
    return build_network(found.cls, options, tensors, str(archive.path))


# ----------------------------------------------------------------------------
# Flax.


def flax_names(network: VQGAN2D) -> dict[str, str]:
    """Return the path of each tensor of a VQGAN in TECO's checkpoints: our name -> names joined by "/".

    Layers are numbered by kind in the order of use, which for the decoder's levels is from last to first.
    """
    names = {"quantize.embedding.weight": "stats/quantize/embeddings"}
    for part in ("quant_conv", "post_quant_conv"):
        names |= _leaves(part, part)
    for part in ("encoder", "decoder"):
        counts = {"ResnetBlock": 0, "AttnBlock": 0, "Downsample": 0, "Upsample": 0}
        for name, module in _in_order(network.get_submodule(part), part):
            kind = type(module).__name__
            path = f"{part}/{kind}_{counts[kind]}"
            counts[kind] += 1
            for inner, flax in INNER[kind].items():
                if isinstance(module.get_submodule(inner), nn.Conv2d | nn.GroupNorm):
                    names |= _leaves(f"{name}.{inner}", f"{path}/{flax}")
        for inner, flax in (("conv_in", "Conv_0"), ("norm_out", "GroupNorm_0"), ("conv_out", "Conv_1")):
            names |= _leaves(f"{part}.{inner}", f"{part}/{flax}")
    return names


INNER = {
    "ResnetBlock": {"norm1": "GroupNorm_0", "conv1": "Conv_0", "norm2": "GroupNorm_1", "conv2": "Conv_1"}
    | {"nin_shortcut": "Conv_2"},
    "AttnBlock": {"norm": "GroupNorm_0", "q": "Conv_0", "k": "Conv_1", "v": "Conv_2", "proj_out": "Conv_3"},
    "Downsample": {"conv": "Conv_0"},
    "Upsample": {"conv": "Conv_0"},
}


def _leaves(ours: str, flax: str) -> dict[str, str]:
    """Return the names of the weight and the bias of a layer."""
    weight = "scale" if flax.rpartition("/")[2].startswith("GroupNorm") else "kernel"
    return {f"{ours}.weight": f"{flax}/{weight}", f"{ours}.bias": f"{flax}/bias"}


def _in_order(part: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """Return the blocks of an encoder or a decoder in the order of use."""
    middle = [(f"{name}.mid.{inner}", part.get_submodule(f"mid.{inner}")) for inner in ("block_1", "attn_1", "block_2")]
    down = name == "encoder"
    levels: Any = part.get_submodule("down" if down else "up")
    found = []
    for i in range(len(levels)) if down else reversed(range(len(levels))):
        level, at = levels[i], f"{name}.{'down' if down else 'up'}.{i}"
        for j, block in enumerate(level.block):
            found.append((f"{at}.block.{j}", block))
            found += [(f"{at}.attn.{j}", level.attn[j])] if level.attn else []
        resample = "downsample" if down else "upsample"
        found += [(f"{at}.{resample}", level.get_submodule(resample))] if hasattr(level, resample) else []
    return [*found, *middle] if down else [*middle, *found]


def from_flax(array: Tensor) -> Tensor:
    """Return a tensor of a flax checkpoint in our layout: kernels (height, width, in, out) -> (out, in, ...)."""
    return array.permute(3, 2, 0, 1).contiguous() if array.ndim == 4 else array


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest file checkpoints/checkpoint_<step> of a run of TECO's code, None if the folder is none."""
    found = [path for path in folder.glob("checkpoints/checkpoint_*") if path.name.rpartition("_")[2].isdigit()]
    return max(found, key=lambda path: int(path.name.rpartition("_")[2]), default=None)


def read_flax(folder: Path, checkpoint: Path) -> nn.Module | None:
    """Return the VQGAN in a run of TECO's code, which has its arguments beside the checkpoints; None if it has another.

    Raises `ValueError` naming the file that is damaged or lacks a part.
    """
    arguments = plain(safe_archive.load_pickle(folder / "args"))
    if not isinstance(arguments, dict) or arguments.get("model") != "vqgan":
        return None
    tree = flax_file.load(checkpoint)
    try:
        options = {
            "height": arguments["resolution"],
            "width": arguments["resolution"],
            "embedding_dim": arguments["embed_dim"],
            "num_codes": arguments["n_embed"],
            "double_z": bool(arguments.get("double_z")),
            "quantizer": {"kind": "vq", "legacy": True},
        }
        names = ("resolution", "ch", "ch_mult", "num_res_blocks", "attn_resolutions", "z_channels")
        options |= {name: arguments[name] for name in names}
        with torch.device("meta"):
            wanted = flax_names(VQGAN2D(**options))
        trees = flatten(tree["params"]) | flatten(tree["model_state"])
        tensors = {ours: from_flax(torch.from_numpy(trees[path])) for ours, path in wanted.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{checkpoint} is a tokenizer with a missing part: {error.args[0]!r} cannot be read; download it again"
        ) from error
    return build_network(VQGAN2D, options, tensors, str(checkpoint))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries by their paths, joined by "/"."""
    found: dict[str, Any] = {}
    for key, item in tree.items():
        found |= flatten(item, f"{prefix}{key}/") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return found
