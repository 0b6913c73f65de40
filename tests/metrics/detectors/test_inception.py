"""Inception-v3 of FID, compared with a literal implementation, and each of its three differences."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metrics.detectors import inception


@pytest.fixture(scope="module")
def net() -> inception.Inception:
    """Random weights that keep activations near one, and statistics that are not the trivial ones."""
    generator = torch.Generator().manual_seed(0)
    net = inception.Inception()
    for name, tensor in net.state_dict().items():
        if name.endswith("conv.weight"):
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(("bn.weight", "running_var")):
            tensor.uniform_(0.8, 1.2, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.1, generator=generator)
    net.identity = {}
    return net


def written_out(
    state: dict[str, Tensor], x: Tensor, last_pool: str = "max", is_padding_counted: bool = False
) -> Tensor:
    """Features from normalised 299x299 images: the published graph, as convolutions and pools."""

    def conv(x: Tensor, name: str, stride: int = 1, padding: int | tuple[int, int] = 0) -> Tensor:
        x = F.conv2d(x, state[f"{name}.conv.weight"], stride=stride, padding=padding)
        mean, var = state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"]
        scale = state[f"{name}.bn.weight"] / (var + 1e-3).sqrt()
        shift = state[f"{name}.bn.bias"] - mean * scale
        return (x * scale[:, None, None] + shift[:, None, None]).clamp_min(0)

    def avg(x: Tensor) -> Tensor:
        total = 9 * F.avg_pool2d(x, 3, 1, 1, count_include_pad=True)
        count = 9 if is_padding_counted else 9 * F.avg_pool2d(torch.ones_like(x), 3, 1, 1, count_include_pad=True)
        return total / count

    def wide(x: Tensor, name: str) -> Tensor:
        a = conv(x, f"{name}.branch1x1")
        b = conv(conv(x, f"{name}.branch5x5_1"), f"{name}.branch5x5_2", padding=2)
        c = conv(conv(x, f"{name}.branch3x3dbl_1"), f"{name}.branch3x3dbl_2", padding=1)
        c = conv(c, f"{name}.branch3x3dbl_3", padding=1)
        return torch.cat([a, b, c, conv(avg(x), f"{name}.branch_pool")], 1)

    def middle(x: Tensor, name: str) -> Tensor:
        across, down = (0, 3), (3, 0)
        b = conv(conv(x, f"{name}.branch7x7_1"), f"{name}.branch7x7_2", padding=across)
        b = conv(b, f"{name}.branch7x7_3", padding=down)
        c = conv(x, f"{name}.branch7x7dbl_1")
        for number, padding in ((2, down), (3, across), (4, down), (5, across)):
            c = conv(c, f"{name}.branch7x7dbl_{number}", padding=padding)
        return torch.cat([conv(x, f"{name}.branch1x1"), b, c, conv(avg(x), f"{name}.branch_pool")], 1)

    def small(x: Tensor, name: str, pool: str) -> Tensor:
        across, down = (0, 1), (1, 0)
        b = conv(x, f"{name}.branch3x3_1")
        b = [conv(b, f"{name}.branch3x3_2a", padding=across), conv(b, f"{name}.branch3x3_2b", padding=down)]
        c = conv(conv(x, f"{name}.branch3x3dbl_1"), f"{name}.branch3x3dbl_2", padding=1)
        c = [conv(c, f"{name}.branch3x3dbl_3a", padding=across), conv(c, f"{name}.branch3x3dbl_3b", padding=down)]
        pooled = F.max_pool2d(x, 3, 1, 1) if pool == "max" else avg(x)
        return torch.cat([conv(x, f"{name}.branch1x1"), *b, *c, conv(pooled, f"{name}.branch_pool")], 1)

    x = conv(conv(x, "Conv2d_1a_3x3", stride=2), "Conv2d_2a_3x3")
    x = F.max_pool2d(conv(x, "Conv2d_2b_3x3", padding=1), 3, 2)
    x = F.max_pool2d(conv(conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"), 3, 2)
    assert x.shape[1:] == (192, 35, 35)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = wide(x, name)
    b = conv(conv(x, "Mixed_6a.branch3x3dbl_1"), "Mixed_6a.branch3x3dbl_2", padding=1)
    b = conv(b, "Mixed_6a.branch3x3dbl_3", stride=2)
    x = torch.cat([conv(x, "Mixed_6a.branch3x3", stride=2), b, F.max_pool2d(x, 3, 2)], 1)
    assert x.shape[1:] == (768, 17, 17)
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = middle(x, name)
    a = conv(conv(x, "Mixed_7a.branch3x3_1"), "Mixed_7a.branch3x3_2", stride=2)
    b = conv(conv(x, "Mixed_7a.branch7x7x3_1"), "Mixed_7a.branch7x7x3_2", padding=(0, 3))
    b = conv(conv(b, "Mixed_7a.branch7x7x3_3", padding=(3, 0)), "Mixed_7a.branch7x7x3_4", stride=2)
    x = torch.cat([a, b, F.max_pool2d(x, 3, 2)], 1)
    assert x.shape[1:] == (1280, 8, 8)
    return small(small(x, "Mixed_7b", "avg"), "Mixed_7c", last_pool).flatten(2).mean(2)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(256, (1, 3, 299, 299), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.fixture(scope="module")
def features(net: inception.Inception, images: Tensor) -> Tensor:
    return net.features(images)


def test_tensors_have_the_published_names_and_count():
    """21,751,136 and 17,216 are what public tables of the architecture count in its convolutions and its channels."""
    state = inception.Inception().state_dict()
    assert sum(tensor.numel() for name, tensor in state.items() if name.endswith("conv.weight")) == 21_751_136
    assert sum(tensor.numel() for name, tensor in state.items() if name.endswith("bn.running_mean")) == 17_216
    assert state["fc.weight"].shape == (1008, 2048)
    assert {"Mixed_7c.branch3x3_2a.bn.running_mean", "Conv2d_1a_3x3.conv.weight"} <= state.keys()


def test_features_equal_the_network_written_out(net: inception.Inception, images: Tensor, features: Tensor):
    expected = written_out(net.state_dict(), (images.float() - 128) * 0.0078125)
    assert expected.std() > 0.1
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [{"last_pool": "avg"}, {"is_padding_counted": True}])
def test_pools_are_those_of_fid(net: inception.Inception, images: Tensor, features: Tensor, change: dict):
    """Either pool as torchvision has it would show."""
    other = written_out(net.state_dict(), (images.float() - 128) / 128, **change)
    assert (features - other).abs().max() > 0.01


def test_logits_of_1008_classes_have_no_bias(net: inception.Inception, images: Tensor, features: Tensor):
    expected = features.double() @ net.fc.weight.double().T
    assert expected.shape == (1, 1008) and net.fc.bias.abs().max() > 0.1
    torch.testing.assert_close(net.logits(images).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.logits_of(features).double(), expected, rtol=1e-4, atol=1e-4)


def test_frames_of_any_size_are_resized_as_tensorflow_1_did(net: inception.Inception):
    """A ramp over two pixels climbs from the very first one, reaches its end half way, and stays there."""
    ramp = torch.tensor([[0, 255], [0, 255]], dtype=torch.uint8).expand(1, 3, 2, 2)
    resized = (torch.arange(299) / 149.5).clamp_max(1) * 255
    expected = net((resized.expand(1, 3, 299, 299) - 128) / 128)
    torch.testing.assert_close(net.features(ramp), expected, rtol=0, atol=1e-4)


class Published(nn.Module):
    """The call of the TorchScript that StyleGAN2-ADA fetches: bytes in, features or class probabilities out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(12.0).reshape(4, 3) / 500)

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False):
        x = img.float().mean(dim=[2, 3])
        if return_features:
            return x
        x = x @ self.weight.t()
        return (x if no_output_bias else x + 1).softmax(dim=1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_both_published_containers_are_read(net: inception.Inception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, images = tmp_path / "inception.pt", torch.randint(256, (2, 3, 5, 6), dtype=torch.uint8)
    torch.save(net.state_dict(), file)
    opened = inception.load("cpu", file)
    assert isinstance(opened, inception.Inception) and not opened.identity["verified"]
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in opened.state_dict().items())
    torch.jit.script(Published()).save(str(file))
    with pytest.raises(ValueError, match="is code, .*expected f58cb9b6.* give the state dict instead, https://"):
        inception.load("cpu", file)
    monkeypatch.setattr(inception, "SCRIPT_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    opened = inception.load("cpu", file)
    assert isinstance(opened, inception.ScriptedInception) and opened.identity["verified"]
    x = images.float().mean(dim=[2, 3])
    torch.testing.assert_close(opened.features(images), x)
    expected = (x @ (torch.arange(12.0).reshape(4, 3) / 500).T).softmax(1)
    torch.testing.assert_close(opened.logits(images).softmax(1), expected)
