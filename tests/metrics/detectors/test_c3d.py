"""C3D: its layers, the scaling of pixels, and the accepted files."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metrics.detectors import c3d, preprocess, registry


@pytest.fixture(scope="module")
def net() -> c3d.C3D:
    generator = torch.Generator().manual_seed(0)
    net = c3d.C3D()
    for tensor in net.parameters():
        tensor.uniform_(-1, 1, generator=generator).mul_((6 / tensor[0].numel()) ** 0.5)
    return net


@pytest.fixture(scope="module")
def video() -> Tensor:
    return torch.randint(256, (1, 3, 16, 20, 24), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_features_equal_the_network_written_out(net: c3d.C3D, video: Tensor):
    """Frames at 128x171, the middle 112x112 of them, blue first, less the mean colour; pools after 1, 2, 3b, 4b, 5b."""
    frames = torch.stack([preprocess.stretch(video[:, :, t], 128, 171) for t in range(16)], dim=2)
    x = frames[:, [2, 1, 0], :, 8:120, 29:141] - torch.tensor([90.0, 98, 102]).reshape(3, 1, 1, 1)
    state = net.state_dict()
    for name in ("conv1", "pool1", "conv2", "pool", "conv3a", "conv3b", "pool", "conv4a", "conv4b", "pool"):
        if "pool" in name:
            x = F.max_pool3d(x, (1, 2, 2) if name == "pool1" else 2)
        else:
            x = F.conv3d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1).clamp_min(0)
    assert x.shape[1:] == (512, 2, 7, 7)
    for name in ("conv5a", "conv5b"):
        x = F.conv3d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1).clamp_min(0)
    x = F.max_pool3d(F.pad(x, (1, 1, 1, 1)), 2)  # zeros: what comes is never negative
    x = x.reshape(1, 8192)
    for name in ("fc6", "fc7"):
        x = (x @ state[f"{name}.weight"].T + state[f"{name}.bias"]).clamp_min(0)
    x = x @ state["fc8.weight"].T + state["fc8.bias"]
    assert x.shape == (1, 101) and x.std() > 0.1
    torch.testing.assert_close(net.features(video), x, rtol=1e-3, atol=1e-3 * x.std().item())
    assert sum(tensor.numel() for tensor in state.values()) == 78_409_573


def test_clips_of_another_length_are_refused(net: c3d.C3D, video: Tensor):
    with pytest.raises(ValueError, match="C3D needs clips of 16 frames and got 12"):
        net.features(video[:, :, :12])


class Published(nn.Module):
    """The call of the published TorchScript: video as bytes in, class probabilities out."""

    def forward(self, video: Tensor) -> Tensor:
        return video.float().mean(dim=[2, 3, 4]).div(50).softmax(dim=1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_opened_only_with_its_hash(video: Tensor, tmp_path: Path):
    file = tmp_path / "c3d_ucf101.pt"
    torch.jit.script(Published()).save(str(file))
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=rf"is code, .*--detector-path 'c3d-ucf101={file}#sha256={found}'"):
        registry.open_detector("c3d-ucf101", path=file)
    opened = registry.open_detector("c3d-ucf101", path=f"{file}#sha256={found}")
    assert isinstance(opened, c3d.ScriptedC3D) and not opened.identity["verified"]
    expected = Published()(video)
    torch.testing.assert_close(opened.logits(video).softmax(1), expected)
    with pytest.raises(ValueError, match="C3D needs clips of 16 frames"):
        opened.features(video[:, :, :9])
