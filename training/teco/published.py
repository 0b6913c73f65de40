"""Open models of the published release of TECO: folders written by its flax code, with `args` and `checkpoints`.

    python generate.py --model=FOLDER --context=CLIP

The arguments name the folder of the VQGAN; one that lies elsewhere is given by putting it beside as `vqgan`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.teco.layers import ResBlock, Transformer
from training.teco.networks import TECO


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
