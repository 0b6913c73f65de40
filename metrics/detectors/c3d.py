"""C3D, the network of the Inception score of video on UCF-101.

Tran et al., "Learning Spatiotemporal Features with 3D Convolutional Networks", ICCV 2015; Saito et al., "Temporal
Generative Adversarial Nets", ICCV 2017, use its class probabilities for clips of 16 frames. The published file is
TorchScript that includes the scaling of its input. Its SHA-256 is not known here, so the user must give the hash to
confirm that the file is trusted; a state dict of the network needs no hash.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnnlib.download import file_sha256, split_hash
from metrics.detectors import preprocess, registry, weights

NAME = "c3d-ucf101"
NUM_FRAMES = 16
NUM_CLASSES = 101
EDGE = 112
WIDE = (128, 171)  # frames are resized to this height and width before the centre crop
MEAN_BGR = (90.0, 98.0, 102.0)
CLIPS_AT_ONCE = 4

# Name, input and output channels; True: followed by a pool that halves space and (except for the first) time.
CONVS = [
    ("conv1", 3, 64, True),
    ("conv2", 64, 128, True),
    ("conv3a", 128, 256, False),
    ("conv3b", 256, 256, True),
    ("conv4a", 256, 512, False),
    ("conv4b", 512, 512, True),
    ("conv5a", 512, 512, False),
    ("conv5b", 512, 512, True),
]


class C3D(nn.Module):
    """The PyTorch network, with the layer names of the common ports.

    A state dict does not record its input format: BGR, stretched to 128x171, centre-cropped to 112x112, minus a mean
    colour, as in the most common port. Scores are comparable only for weights trained that way.
    """

    identity: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        for name, in_channels, out_channels, _ in CONVS:
            self.add_module(name, nn.Conv3d(in_channels, out_channels, 3, padding=1))
        self.fc6 = nn.Linear(512 * 4 * 4, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, NUM_CLASSES)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits: float32 (N, 3, 16, 112, 112), channels B G R minus their means -> (N, 101)."""
        for name, _, _, is_pooled in CONVS:
            x = F.relu_(self.get_submodule(name)(x))
            if is_pooled:
                window = (1, 2, 2) if name == "conv1" else (2, 2, 2)
                x = F.max_pool3d(x, window, padding=(0, 1, 1) if name == "conv5b" else 0)
        x = F.relu_(self.fc6(x.flatten(1)))  # from (N, 512, 1, 4, 4)
        return self.fc8(F.relu_(self.fc7(x)))

    def features(self, video: Tensor) -> Tensor:
        """Return the logits of the Inception score: uint8 (N, 3, 16, H, W) -> float32 (N, 101) on the network's device.

        Raises `ValueError` for clips of another length.
        """
        return preprocess.in_batches(
            lambda clips: self(_prepare(clips)), _checked(video), CLIPS_AT_ONCE, self.fc8.weight.device
        )

    def logits(self, video: Tensor) -> Tensor:
        """Return `features`, under the name that all detectors of Inception scores have."""
        return self.features(video)


class ScriptedC3D:
    """The published TorchScript file, with the same two methods."""

    def __init__(self, script: torch.jit.ScriptModule, device: torch.device, identity: dict[str, Any]) -> None:
        self.script = script.to(device)
        self.device = device
        self.identity = identity

    def features(self, video: Tensor) -> Tensor:
        """Return `C3D.features` up to a constant per clip: the logarithms of the probabilities in the file."""
        run = lambda clips: self.script(clips).log()  # noqa: E731
        return preprocess.in_batches(run, _checked(video), CLIPS_AT_ONCE, self.device)

    def logits(self, video: Tensor) -> Tensor:
        """Return `features`."""
        return self.features(video)


def load(device: torch.device | str = "cpu", file: Path | str | None = None) -> C3D | ScriptedC3D:
    """Load the network from a `file` or URL: a state dict, or TorchScript given as FILE#sha256=HEXDIGITS.

    No hash of published weights is known here, so `identity["verified"]` is always False. Raises `ValueError` naming
    the remedy when no file is given, it holds another network, or it is TorchScript without a hash.
    """
    stored = registry.locate(NAME, file)
    identity = registry.identity(NAME, stored)
    if weights.container(stored) == "torchscript":
        _, vouched = split_hash(str(file))
        remedy = f"if you trust its source, give  --detector-path '{NAME}={stored}#sha256={file_sha256(stored)}'"
        script = weights.load_script(stored, [vouched] if vouched else [], remedy)
        return ScriptedC3D(script, torch.device(device), identity)
    net = C3D()
    weights.fill(net, weights.load_state_dict(stored), stored)
    net.identity = identity
    return net.to(device)


def _checked(video: Tensor) -> Tensor:
    assert video.ndim == 5 and video.shape[1] == 3 and video.dtype == torch.uint8, "uint8 N 3 T H W"
    if video.shape[2] != NUM_FRAMES:
        raise ValueError(f"C3D needs clips of {NUM_FRAMES} frames and got {video.shape[2]}; cut them to that length")
    return video


def _prepare(video: Tensor) -> Tensor:
    """Convert uint8 (N, 3, 16, H, W), R G B, to float32 (N, 3, 16, 112, 112), B G R."""
    frames = preprocess.stretch(video.transpose(1, 2).flatten(0, 1), *WIDE)  # (N 16, 3, 128, 171)
    top, left = (WIDE[0] - EDGE) // 2, (WIDE[1] - EDGE) // 2
    frames = frames[:, :, top : top + EDGE, left : left + EDGE].flip(1)
    frames = frames - torch.tensor(MEAN_BGR, device=frames.device)[:, None, None]
    return frames.unflatten(0, (-1, NUM_FRAMES)).transpose(1, 2).contiguous()
