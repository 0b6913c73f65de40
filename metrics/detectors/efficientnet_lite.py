"""EfficientNet-Lite0, trained on ImageNet: frame and motion features with freely available weights.

Tan and Le, "EfficientNet", ICML 2019, in its variant without squeeze-and-excitation and with ReLU6. Its features do not
replace those of Inception or I3D: distances of them have names of their own.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metrics.detectors import preprocess, registry, weights

NAME = "efficientnet-lite0"
MOTION_NAME = "efficientnet-lite0-motion"
EDGE = 224
NUM_FEATURES = 1280
MOTION_STAGE = range(8, 11)  # the blocks that compute the last 14x14 map, of 112 channels
MOTION_GRID = 3
MOTION_MIN_FRAMES = 3  # a second difference spans three
BATCH_NORM_EPS = 1e-3

# Kernel, stride, expansion, output channels, repeats.
STAGES = [
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
]


class EfficientNetLite0(nn.Module):
    """The classifier. Parameters and buffers have the names of the published file."""

    identity: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _Conv(3, 32, 3, stride=2)
        self._bn0 = nn.BatchNorm2d(32, BATCH_NORM_EPS)
        self._blocks = nn.ModuleList()
        channels = 32
        for kernel, stride, expansion, width, repeats in STAGES:
            for number in range(repeats):
                self._blocks.append(_Block(channels, width, kernel, stride if number == 0 else 1, expansion))
                channels = width
        self._conv_head = _Conv(channels, NUM_FEATURES, 1)
        self._bn1 = nn.BatchNorm2d(NUM_FEATURES, BATCH_NORM_EPS)
        self._fc = nn.Linear(NUM_FEATURES, 1000)
        self.eval().requires_grad_(False)

    def maps(self, x: Tensor, num_blocks: int) -> Tensor:
        """Return the map after the first `num_blocks` of the 16 blocks: (N, 3, 224, 224) in [-1, 1] -> (N, C, h, w)."""
        x = F.relu6(self._bn0(self._conv_stem(x)), inplace=True)  # (N, 32, 112, 112)
        for block in self._blocks[:num_blocks]:
            x = block(x)
        return x

    def pooled(self, x: Tensor) -> Tensor:
        """Return pooled features: (N, 3, 224, 224) in [-1, 1] -> (N, 1280)."""
        x = self.maps(x, len(self._blocks))  # (N, 320, 7, 7)
        return F.relu6(self._bn1(self._conv_head(x)), inplace=True).mean(dim=[2, 3])

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of the 1000 classes of ImageNet: (N, 3, 224, 224) in [-1, 1] -> (N, 1000)."""
        return self._fc(self.pooled(x))

    def features(self, images: Tensor) -> Tensor:
        """Return the features of frames: uint8 (N, 3, H, W) -> float32 (N, 1280) on the network's device.

        Frames of any size are stretched to 224x224: bilinear, antialiased, aspect ratio not preserved.
        """
        assert images.ndim == 4 and images.shape[1] == 3 and images.dtype == torch.uint8, "uint8 N 3 H W"
        run = lambda part: self.pooled(prepare(part))  # noqa: E731
        return preprocess.in_batches(run, images, preprocess.FRAMES_AT_ONCE, self._fc.weight.device)


class Motion:
    """Motion features: mean absolute first and second temporal differences of an intermediate feature map.

    The map (14x14, 112 channels) is averaged over a grid of 3x3 cells, so that motion within a cell has less influence
    than appearance and disappearance; each channel is divided by its standard deviation over ImageNet, as given by the
    scales of batch normalisation. Static content gives zero.
    """

    def __init__(self, net: EfficientNetLite0) -> None:
        self.net = net
        self.identity = net.identity

    def features(self, video: Tensor) -> Tensor:
        """Return uint8 (N, 3, T, H, W) -> float32 (N, 224): |first difference| of 112 channels, then |second
        difference|.

        Raises `ValueError` for clips of fewer than 3 frames.
        """
        assert video.ndim == 5 and video.shape[1] == 3 and video.dtype == torch.uint8, "uint8 N 3 T H W"
        num_clips, num_frames = video.shape[0], video.shape[2]
        if num_frames < MOTION_MIN_FRAMES:
            raise ValueError(
                f"{MOTION_NAME} needs clips of at least {MOTION_MIN_FRAMES} frames and got {num_frames}; measure "
                "longer ones"
            )
        frames = video.transpose(1, 2).flatten(0, 1)  # (N T, 3, H, W)
        device = self.net._fc.weight.device
        cells = preprocess.in_batches(self._cells, frames, preprocess.FRAMES_AT_ONCE, device)
        cells = cells.unflatten(0, (num_clips, num_frames))  # (N, T, 112, 3, 3)
        return torch.cat([cells.diff(n=order, dim=1).abs().mean(dim=[1, 3, 4]) for order in (1, 2)], dim=1)

    def _cells(self, frames: Tensor) -> Tensor:
        maps = self.net.maps(prepare(frames), MOTION_STAGE.stop)
        scale = self._scale()[:, None, None]
        return F.adaptive_avg_pool2d(maps, MOTION_GRID) / scale  # (N, 112, 3, 3)

    def _scale(self) -> Tensor:
        """Return the standard deviation of each channel of the map: the variances of the residual blocks of a stage add
        up.
        """
        scales: list[Tensor] = [self.net.get_parameter(f"_blocks.{number}._bn2.weight") for number in MOTION_STAGE]
        return torch.stack(scales).norm(dim=0)


def prepare(images: Tensor) -> Tensor:
    """Convert uint8 (N, 3, H, W) to float32 (N, 3, 224, 224), scaled as in training: (x - 127) / 128."""
    return (preprocess.stretch(images, EDGE, EDGE, antialias=True) - 127) / 128


def load(device: torch.device | str = "cpu", file: Path | str | None = None) -> EfficientNetLite0:
    """Load the network with the published weights, from the cache, or from a `file` or URL of the same layout.

    Raises `ValueError` naming the remedy when the cache lacks the weights or the file holds another network.
    """
    return _load(NAME, device, file)


def load_motion(device: torch.device | str = "cpu", file: Path | str | None = None) -> Motion:
    """Load the motion descriptor on the same network; raises the errors of `load`."""
    return Motion(_load(MOTION_NAME, device, file))


def _load(name: str, device: torch.device | str, file: Path | str | None) -> EfficientNetLite0:
    stored = registry.locate(name, file)
    net = EfficientNetLite0()
    weights.fill(net, weights.load_state_dict(stored), stored)
    net.identity = registry.identity(name, stored)
    return preprocess.place(net, device)


class _Block(nn.Module):
    """Expand, filter each channel, project; the input is added if the shapes allow."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        self.is_residual = stride == 1 and in_channels == out_channels
        self.is_expanded = expansion > 1
        if self.is_expanded:
            self._expand_conv = _Conv(in_channels, width, 1)
            self._bn0 = nn.BatchNorm2d(width, BATCH_NORM_EPS)
        self._depthwise_conv = _Conv(width, width, kernel, stride, groups=width)
        self._bn1 = nn.BatchNorm2d(width, BATCH_NORM_EPS)
        self._project_conv = _Conv(width, out_channels, 1)
        self._bn2 = nn.BatchNorm2d(out_channels, BATCH_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x)), inplace=True) if self.is_expanded else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)), inplace=True)
        y = self._bn2(self._project_conv(y))
        return x + y if self.is_residual else y


class _Conv(nn.Conv2d):
    """Convolution without bias and with TensorFlow's SAME padding: the extra pixel of an odd number is at the end."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        if self.stride == (1, 1):
            return F.conv2d(input, self.weight, padding=self.kernel_size[0] // 2, groups=self.groups)
        pads = []
        for size in (input.shape[3], input.shape[2]):
            total = max((-(-size // self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(input, pads))
