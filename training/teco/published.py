"""Open models of the published release of TECO: folders written by its flax code, with `args` and `checkpoints`.

    python generate.py --outdir=outputs --seed=0 --model=FOLDER --context=CLIP

The VQGAN is a folder of the same kind, which the arguments name; a copy of it at FOLDER/vqgan comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from torch_utils import flax_file, safe_archive
from training.contract import Bundle
from training.modules.prior import TOKENIZER
from training.modules.published import flatten, newest_checkpoint, plain, read_flax
from training.modules.vqgan2d import VQGAN2D
from training.network_file import content_hash
from training.network_format import build_network
from training.teco.layers import ResBlock, Transformer, TransformerLayer
from training.teco.networks import TECO, TRANSFORMER
from training.teco.sampling import ROLE


class Leaf(NamedTuple):
    """Where a tensor stands in a flax checkpoint: its path, and the conversions of layouts both ways."""

    path: str
    from_flax: Callable[[Tensor], Tensor]
    to_flax: Callable[[Tensor], Tensor]


def same(x: Tensor) -> Tensor:
    """Return a tensor as it is."""
    return x


def transposed(x: Tensor) -> Tensor:
    """Return the weight of a linear layer: (inputs, outputs) <-> (outputs, inputs)."""
    return x.T


def _matrix(path: str) -> Leaf:
    return Leaf(path, transposed, transposed)


def _image(path: str) -> Leaf:
    """Convolutions: (height, width, in, out) <-> (out, in, height, width)."""
    return Leaf(path, lambda x: x.permute(3, 2, 0, 1), lambda x: x.permute(2, 3, 1, 0))


def _layer(ours: str, path: str, bias: str | None = "bias") -> dict[str, Leaf]:
    """Return the leaves of a linear layer; `bias` is where its bias stands beside the kernel, None for none."""
    found = {f"{ours}.weight": _matrix(f"{path}/kernel")}
    return found | ({f"{ours}.bias": Leaf(f"{path}/{bias}", same, same)} if bias else {})


def _conv(ours: str, path: str, bias: str | None = "bias") -> dict[str, Leaf]:
    found = {f"{ours}.weight": _image(f"{path}/kernel")}
    return found | ({f"{ours}.bias": Leaf(f"{path}/{bias}", same, same)} if bias else {})


def _norm(ours: str, path: str) -> dict[str, Leaf]:
    return {f"{ours}.weight": Leaf(f"{path}/scale", same, same), f"{ours}.bias": Leaf(f"{path}/bias", same, same)}


def _res_block(ours: str, path: str, block: ResBlock) -> dict[str, Leaf]:
    found = _norm(f"{ours}.norm1", f"{path}/GroupNorm_0") | _norm(f"{ours}.norm2", f"{path}/GroupNorm_1")
    found |= _conv(f"{ours}.conv1", f"{path}/Conv_0") | _conv(f"{ours}.conv2", f"{path}/Conv_1", None)
    found[f"{ours}.conv2.bias"] = Leaf(f"{path}/AddBias_0/bias", same, same)
    return found | (_conv(f"{ours}.skip", f"{path}/skip", None) if isinstance(block.skip, nn.Conv2d) else {})


def _res_blocks(part: nn.Module, ours: str, path: str) -> dict[str, Leaf]:
    """Return the leaves of all residual blocks of a part, which are numbered through its levels."""
    blocks = [(name, module) for name, module in part.named_modules() if isinstance(module, ResBlock)]
    found: dict[str, Leaf] = {}
    for number, (name, block) in enumerate(blocks):
        found |= _res_block(f"{ours}.{name}", f"{path}/ResNetBlock_{number}", block)
    return found


def _transformer(ours: str, path: str, network: Transformer) -> dict[str, Leaf]:
    found = _layer(f"{ours}.input", f"{path}/Dense_0") | _layer(f"{ours}.head", f"{path}/Dense_1")
    found |= _norm(f"{ours}.norm", f"{path}/LayerNorm_0")
    for number, layer in enumerate(network.layers):
        mine, there = f"{ours}.layers.{number}", f"{path}/TransformerLayer_{number}"
        assert isinstance(layer, TransformerLayer)
        heads, width = layer.attention.heads, layer.attention.query.in_features
        for name in ("query", "key", "value"):
            found |= _heads(f"{mine}.attention.{name}", f"{there}/MultiHeadAttention_0/{name}", heads, width)
        found[f"{mine}.attention.out.weight"] = Leaf(
            f"{there}/MultiHeadAttention_0/out/kernel",
            lambda x: x.flatten(0, 1).T,
            lambda x, heads=heads: x.T.unflatten(0, (heads, -1)),
        )
        found[f"{mine}.attention.out.bias"] = Leaf(f"{there}/MultiHeadAttention_0/out_bias/bias", same, same)
        found |= _norm(f"{mine}.norm1", f"{there}/LayerNorm_0") | _norm(f"{mine}.norm2", f"{there}/LayerNorm_1")
        found |= _layer(f"{mine}.wi", f"{there}/MlpBlock_0/wi") | _layer(f"{mine}.wo", f"{there}/MlpBlock_0/wo", None)
        found[f"{mine}.wo.bias"] = Leaf(f"{there}/MlpBlock_0/wo_bias/bias", same, same)
    return found


def _heads(ours: str, path: str, heads: int, width: int) -> dict[str, Leaf]:
    """Return the leaves of queries, keys or values: (width, heads, D) <-> (heads D, width), and (heads, D)."""
    return {
        f"{ours}.weight": Leaf(
            f"{path}/kernel", lambda x: x.flatten(1).T, lambda x: x.T.unflatten(1, (heads, width // heads))
        ),
        f"{ours}.bias": Leaf(f"{path}/bias", torch.flatten, lambda x: x.unflatten(0, (heads, width // heads))),
    }


def _flipped(x: Tensor) -> Tensor:
    """Return the transposed convolution's kernel, which flax has turned: (s, s, in, out) -> (in, out, s, s)."""
    return x.flip(0, 1).permute(2, 3, 0, 1)


def leaves(network: TECO) -> dict[str, Leaf]:
    """Return where each tensor of a network stands in a flax checkpoint of the release."""
    found = {
        "action_embeds.weight": Leaf("action_embeds/embedding", same, same),
        "sos_post": Leaf("sos_post", lambda x: x.permute(2, 0, 1), lambda x: x.permute(1, 2, 0)),
        "temporal.sos": Leaf("sos", same, same),
        "codebook.codebook": Leaf("codebook/codebook", same, same),
        "prior.token_embed": Leaf("z_git/token_embed", same, same),
        "prior.rows": Leaf("z_git/net/BroadcastPositionBiases_0/d_0", same, same),
        "prior.columns": Leaf("z_git/net/BroadcastPositionBiases_0/d_1", same, same),
        "prior.bias": Leaf("z_git/mlm/AddBias_0/bias", same, same),
        "temporal.unproject.weight": Leaf("z_unproj/kernel", _flipped, lambda x: x.permute(2, 3, 0, 1).flip(0, 1)),
    }
    found |= _layer("codebook.project_in", "codebook/Dense_0", None)
    found |= _layer("codebook.project_out", "codebook/Dense_1", None)
    found |= _conv("encoder.conv_in", "encoder/layers_0/Conv_0") | _layer("encoder.out", "encoder/layers_1")
    found |= _res_blocks(network.encoder, "encoder", "encoder/layers_0")
    found |= _conv("temporal.project", "z_proj", None)
    found |= _transformer("temporal.transformer", "z_tfm", network.temporal.transformer)
    found |= _transformer("prior.net", "z_git/net", network.prior.net)
    found |= _layer("prior.head", "z_git/mlm/Dense_0") | _norm("prior.norm", "z_git/mlm/LayerNorm_0")
    found |= _conv("decoder.conv_in", "decoder/Conv_0") | _res_blocks(network.decoder, "decoder", "decoder")
    return found | _norm("decoder.norm", "decoder/LayerNorm_0") | _layer("decoder.out", "decoder/Dense_0")


# ----------------------------------------------------------------------------
# Folders of the release.


def open_published(path: str) -> Bundle | None:
    """Return the model in a folder of the release with its tokenizer, None if the path is no such folder.

    Raises `ValueError` naming the file that is damaged or lacks a part, or the VQGAN that is missing.
    """
    folder = Path(path)
    if not folder.is_dir() or not (folder / "args").is_file():
        return None
    arguments = plain(safe_archive.load_pickle(folder / "args"))
    checkpoint = newest_checkpoint(folder)
    if not isinstance(arguments, dict) or arguments.get("model") != "teco" or checkpoint is None:
        return None
    tokenizer = _read_tokenizer(folder, arguments.get("vqvae_ckpt"))
    tree = flax_file.load(checkpoint)
    try:
        options = options_of(arguments, tokenizer)
        with torch.device("meta"):
            places = leaves(TECO(**options))
        found = flatten(tree["params"])
        tensors = {
            name: leaf.from_flax(torch.from_numpy(np.array(found[leaf.path]))).contiguous()
            for name, leaf in places.items()
        }
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        reason = error.args[0] if error.args else type(error).__name__
        raise ValueError(
            f"{checkpoint} is a model of TECO with a missing part: {reason!r} cannot be read; download it again"
        ) from error
    network = build_network(TECO, options, tensors, str(checkpoint))
    return Bundle({ROLE: network, TOKENIZER: tokenizer}, "teco", tokenizer=content_hash(tokenizer))


def options_of(arguments: Mapping[str, Any], tokenizer: VQGAN2D) -> dict[str, Any]:
    """Return the arguments of the network for those of the release; raises `KeyError` for one that is missing."""
    names = "seq_len encoder decoder embedding_dim z_ds n_cond use_actions action_dim action_embed_dim".split()
    options = {name: arguments[name] for name in names}
    edge, prior = tokenizer.stride[1], arguments["z_git"]
    return options | {
        "grid": [tokenizer.height // edge, tokenizer.width // edge],
        "vocabulary": tokenizer.vocabulary,
        "code_channels": tokenizer.quantizer.channels,
        "num_codes": arguments["codebook"]["n_codes"],
        "proj_dim": arguments["codebook"]["proj_dim"],
        "temporal": {name: arguments["z_tfm_kwargs"][name] for name in TRANSFORMER},
        "prior": {"vocab_dim": prior["vocab_dim"], **{name: prior["tfm_kwargs"][name] for name in TRANSFORMER}},
        "context": arguments["open_loop_ctx"],
    }


def _read_tokenizer(folder: Path, named: Any) -> VQGAN2D:
    """Return the VQGAN of a model: in the folder `vqgan` inside or beside it, else where its arguments say."""
    places = [folder / "vqgan", folder.parent / "vqgan"]
    if isinstance(named, str) and named:
        places += [folder / named, folder.parent / named, folder.parent / Path(named).name]
    for place in places:
        checkpoint = newest_checkpoint(place)
        network = read_flax(place, checkpoint) if checkpoint is not None and (place / "args").is_file() else None
        if isinstance(network, VQGAN2D):
            return network
    raise ValueError(
        f"{folder} is a model of TECO without its VQGAN: copy the folder of the VQGAN, with args and checkpoints, to "
        f"{places[0]}"
    )
