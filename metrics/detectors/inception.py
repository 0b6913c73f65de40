"""Inception-v3 of FID: the network of 2015-12-05, in PyTorch.

Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016; FID (Heusel et al., NeurIPS 2017) compares its 2048
pooled features, IS (Salimans et al., NeurIPS 2016) its class probabilities. It differs from torchvision's network of
that name: other weights, average pools that exclude the padding, a maximum pool in the last block in place of an
average pool, and 1008 classes.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metrics.detectors import preprocess, registry, weights

NAME = "inception-2015-12-05"
NUM_FEATURES = 2048
NUM_CLASSES = 1008
EDGE = 299
BATCH_NORM_EPS = 1e-3

# TorchScript of the whole network, as in StyleGAN2-ADA: the only accepted file of code.
SCRIPT_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


class Inception(nn.Module):
    """The network. Parameters and buffers have torchvision's names, as in the published file."""

    identity: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.stem = [_Conv(*row) for row in STEM]
        for conv in self.stem:
            self.add_module(conv.name, _Unit(conv))
        for name, branches in BLOCKS.items():
            self.add_module(name, _Block(branches))
        self.fc = nn.Linear(NUM_FEATURES, NUM_CLASSES)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Return pooled features: float32 (N, 3, 299, 299) in [-1, 1) -> (N, 2048)."""
        for conv in self.stem:
            x = self.get_submodule(conv.name)(x)
            if conv.name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = F.max_pool2d(x, 3, stride=2)
        for name in BLOCKS:  # (N, 192, 35, 35) -> (N, 768, 17, 17) -> (N, 2048, 8, 8)
            x = self.get_submodule(name)(x)
        return x.mean(dim=[2, 3])

    def features(self, images: Tensor) -> Tensor:
        """Return the features of FID: uint8 (N, 3, H, W) -> float32 (N, 2048) on the network's device.

        Images of any size are stretched to 299x299 as in TensorFlow 1, and scaled as (x - 128) / 128.
        """
        return preprocess.in_batches(
            lambda part: self((preprocess.stretch_as_tf1(part, EDGE, EDGE) - 128) / 128),
            _checked(images),
            preprocess.FRAMES_AT_ONCE,
            self.fc.weight.device,
        )

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits of IS: uint8 (N, 3, H, W) -> float32 (N, 1008), without the last layer's bias."""
        return self.logits_of(self.features(images))

    def logits_of(self, features: Tensor) -> Tensor:
        """Return the logits from computed features: (N, 2048) -> (N, 1008)."""
        with preprocess.exact(self.fc.weight.device):
            return F.linear(features, self.fc.weight)


class ScriptedInception:
    """The same network as the TorchScript file of other projects, with the same two methods."""

    def __init__(self, script: torch.jit.ScriptModule, device: torch.device, identity: dict[str, Any]) -> None:
        self.script = script.to(device)
        self.device = device
        self.identity = identity

    def features(self, images: Tensor) -> Tensor:
        """Return `Inception.features`."""
        run = lambda part: self.script(part, return_features=True)  # noqa: E731
        return preprocess.in_batches(run, _checked(images), preprocess.FRAMES_AT_ONCE, self.device)

    def logits(self, images: Tensor) -> Tensor:
        """Return `Inception.logits` up to a constant per image: the logarithms of the probabilities that the file
        returns.
        """
        run = lambda part: self.script(part, no_output_bias=True).log()  # noqa: E731
        return preprocess.in_batches(run, _checked(images), preprocess.FRAMES_AT_ONCE, self.device)


def load(device: torch.device | str = "cpu", file: Path | str | None = None) -> Inception | ScriptedInception:
    """Load the network with the published weights, from the cache, or from a `file` or URL.

    Such a file may be the state dict of pytorch-fid and torch-fidelity, or the TorchScript `inception-2015-12-05.pt` of
    StyleGAN2-ADA, if its SHA-256 is the published one. Raises `ValueError` naming the remedy when the cache lacks the
    weights or the file holds another network.
    """
    stored = registry.locate(NAME, file)
    if weights.container(stored) == "torchscript":
        remedy = f"give the state dict instead, {registry.FILES[NAME].url}"
        script = weights.load_script(stored, [SCRIPT_SHA256], remedy)
        return ScriptedInception(script, torch.device(device), registry.identity(NAME, stored, verified=True))
    net = Inception()
    weights.fill(net, weights.load_state_dict(stored), stored)
    net.identity = registry.identity(NAME, stored)
    return preprocess.place(net, device)


def _checked(images: Tensor) -> Tensor:
    assert images.ndim == 4 and images.shape[1] == 3 and images.dtype == torch.uint8, "uint8 N 3 H W"
    return images


# ----------------------------------------------------------------------------------------------------------------------
# The table. A branch is a chain of convolutions, pools ("avg", "max", "max/2") and, in brackets, forks.


class _Conv(NamedTuple):
    name: str
    in_channels: int
    out_channels: int
    kernel: int | tuple[int, int]
    stride: int = 1
    is_padded: bool = True


STEM = [
    ("Conv2d_1a_3x3", 3, 32, 3, 2, False),
    ("Conv2d_2a_3x3", 32, 32, 3, 1, False),
    ("Conv2d_2b_3x3", 32, 64, 3),  # followed by a maximum pool
    ("Conv2d_3b_1x1", 64, 80, 1),
    ("Conv2d_4a_3x3", 80, 192, 3, 1, False),  # followed by a maximum pool
]

Branch = list[tuple | list[tuple] | str]


def _block_35(channels: int, pooled: int) -> list[Branch]:
    return [
        [("branch1x1", channels, 64, 1)],
        [("branch5x5_1", channels, 48, 1), ("branch5x5_2", 48, 64, 5)],
        [("branch3x3dbl_1", channels, 64, 1), ("branch3x3dbl_2", 64, 96, 3), ("branch3x3dbl_3", 96, 96, 3)],
        ["avg", ("branch_pool", channels, pooled, 1)],
    ]


def _block_17(width: int) -> list[Branch]:
    return [
        [("branch1x1", 768, 192, 1)],
        [
            ("branch7x7_1", 768, width, 1),
            ("branch7x7_2", width, width, (1, 7)),
            ("branch7x7_3", width, 192, (7, 1)),
        ],
        [
            ("branch7x7dbl_1", 768, width, 1),
            ("branch7x7dbl_2", width, width, (7, 1)),
            ("branch7x7dbl_3", width, width, (1, 7)),
            ("branch7x7dbl_4", width, width, (7, 1)),
            ("branch7x7dbl_5", width, 192, (1, 7)),
        ],
        ["avg", ("branch_pool", 768, 192, 1)],
    ]


def _block_8(channels: int, pool: str) -> list[Branch]:
    return [
        [("branch1x1", channels, 320, 1)],
        [
            ("branch3x3_1", channels, 384, 1),
            [("branch3x3_2a", 384, 384, (1, 3)), ("branch3x3_2b", 384, 384, (3, 1))],
        ],
        [
            ("branch3x3dbl_1", channels, 448, 1),
            ("branch3x3dbl_2", 448, 384, 3),
            [("branch3x3dbl_3a", 384, 384, (1, 3)), ("branch3x3dbl_3b", 384, 384, (3, 1))],
        ],
        [pool, ("branch_pool", channels, 192, 1)],
    ]


BLOCKS: dict[str, list[Branch]] = {
    "Mixed_5b": _block_35(192, 32),
    "Mixed_5c": _block_35(256, 64),
    "Mixed_5d": _block_35(288, 64),
    "Mixed_6a": [
        [("branch3x3", 288, 384, 3, 2, False)],
        [("branch3x3dbl_1", 288, 64, 1), ("branch3x3dbl_2", 64, 96, 3), ("branch3x3dbl_3", 96, 96, 3, 2, False)],
        ["max/2"],
    ],
    "Mixed_6b": _block_17(128),
    "Mixed_6c": _block_17(160),
    "Mixed_6d": _block_17(160),
    "Mixed_6e": _block_17(192),
    "Mixed_7a": [
        [("branch3x3_1", 768, 192, 1), ("branch3x3_2", 192, 320, 3, 2, False)],
        [
            ("branch7x7x3_1", 768, 192, 1),
            ("branch7x7x3_2", 192, 192, (1, 7)),
            ("branch7x7x3_3", 192, 192, (7, 1)),
            ("branch7x7x3_4", 192, 192, 3, 2, False),
        ],
        ["max/2"],
    ],
    "Mixed_7b": _block_8(1280, "avg"),
    "Mixed_7c": _block_8(2048, "max"),
}


class _Unit(nn.Module):
    """Convolution without bias, batch normalisation with its stored statistics, ReLU."""

    def __init__(self, conv: _Conv) -> None:
        super().__init__()
        height, width = conv.kernel if isinstance(conv.kernel, tuple) else (conv.kernel, conv.kernel)
        padding = (height // 2, width // 2) if conv.is_padded else (0, 0)
        self.conv = nn.Conv2d(
            conv.in_channels, conv.out_channels, (height, width), conv.stride, padding=padding, bias=False
        )
        self.bn = nn.BatchNorm2d(conv.out_channels, BATCH_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.bn(self.conv(x)))


class _Block(nn.Module):
    """One Inception block: branches over the same input, concatenated."""

    def __init__(self, branches: list[Branch]) -> None:
        super().__init__()
        self.branches = branches
        for step in (step for branch in branches for step in branch):
            for row in step if isinstance(step, list) else [step] if isinstance(step, tuple) else []:
                self.add_module(row[0], _Unit(_Conv(*row)))

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self.branches:
            y = x
            for step in branch:
                y = self._step(step, y)
            outputs.append(y)
        return torch.cat(outputs, dim=1)

    def _step(self, step: tuple | list[tuple] | str, x: Tensor) -> Tensor:
        if step == "avg":
            return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        if step == "max":
            return F.max_pool2d(x, 3, stride=1, padding=1)
        if step == "max/2":
            return F.max_pool2d(x, 3, stride=2)
        if isinstance(step, list):
            return torch.cat([self.get_submodule(row[0])(x) for row in step], dim=1)
        return self.get_submodule(step[0])(x)
