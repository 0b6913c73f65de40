"""Convolutions by other ways than PyTorch's: the same values and derivatives."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.nn.grad import conv3d_weight
from torch.utils._python_dispatch import TorchDispatchMode

from torch_utils import onednn
from torch_utils.ops import backends, convolution, winograd

# Shapes of input and weight, and the padding: tiles of 2, 3 and 4 outputs, cut at the border, with and without time.
SHAPES = [
    ((2, 3, 1, 7, 9), (4, 3, 1, 3, 3), (0, 2, 2)),
    ((1, 4, 5, 3, 4), (3, 4, 3, 3, 3), (1, 1, 1)),
    ((2, 2, 6, 5, 8), (3, 2, 5, 3, 3), (2, 1, 1)),
    ((1, 3, 4, 6, 37), (2, 3, 3, 3, 3), (0, 1, 0)),
]
TOLERANCE = 1e-5  # of the norm; single precision


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the other way for every shape that it can compute."""
    if backends.select_impl("auto", torch.zeros(1)) != "compiled":
        pytest.skip("there are no compiled kernels here")
    monkeypatch.setattr(convolution, "GAIN", dict.fromkeys(convolution.GAIN, 0.0))
    monkeypatch.setattr(convolution, "SMALLEST", 0)
    monkeypatch.setattr(convolution, "POINTWISE_CHANNELS", 1)
    monkeypatch.setattr(convolution, "POINTWISE_PRODUCTS", 0)


def distance(x: torch.Tensor, reference: torch.Tensor) -> float:
    return float((x.double() - reference).norm() / reference.norm())


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=rng) for shape in shapes]


def penalty(function, dtype, size, kernel, padding):
    """Return a convolution in a format, and its first and second derivatives."""
    x, weight = (tensor.bfloat16().to(dtype).requires_grad_(True) for tensor in tensors(size, kernel))
    y = function(x, weight, padding=padding)
    first = torch.autograd.grad(y.square().sum(), (x, weight), create_graph=True)
    second = torch.autograd.grad(first[0].square().sum() + first[1].sin().sum(), (x, weight))
    return [tensor.detach() for tensor in (y, *first, *second)]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("block", [1, 20_000, winograd.BLOCK_BYTES])
@pytest.mark.parametrize(("size", "kernel", "padding"), SHAPES)
def test_winograd_is_the_direct_convolution(size, kernel, padding, block, monkeypatch):
    monkeypatch.setattr(winograd, "BLOCK_BYTES", block)
    x, weight = tensors(size, kernel)
    y = F.conv3d(x.double(), weight.double(), padding=padding)
    assert distance(winograd.correlate(x, weight, padding), y) < TOLERANCE
    (dy,) = tensors(tuple(y.shape))
    exact = conv3d_weight(x.double(), kernel, dy.double(), padding=padding)
    assert distance(winograd.weight_gradient(x, dy, kernel[2], padding), exact) < TOLERANCE


@pytest.mark.parametrize("tile", winograd.TILES)
def test_matrices_are_exact_for_whole_numbers(tile):
    outputs, weights, inputs = winograd.matrices(tile)
    x, w = torch.arange(tile + 2.0) - 2, torch.tensor([3.0, -1.0, 2.0])
    y = outputs @ ((weights @ w) * (inputs @ x))
    torch.testing.assert_close(y, F.conv1d(x[None, None], w[None, None])[0, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(("size", "kernel", "padding"), [*SHAPES[:2], ((2, 4, 3, 5, 5), (3, 4, 1, 1, 1), (0, 0, 0))])
def test_first_and_second_derivatives(size, kernel, padding):
    if kernel[3] == 1 and not (onednn.is_amd() and onednn.has_onednn()):
        pytest.skip("products are as fast as convolutions on this processor")

    for found, exact in zip(
        penalty(convolution.conv3d, torch.float32, size, kernel, padding),
        penalty(F.conv3d, torch.float64, size, kernel, padding),
        strict=True,
    ):
        assert found.dtype == torch.float32
        assert distance(found, exact) < 5 * TOLERANCE


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(("size", "kernel", "padding"), SHAPES[:2])
def test_bfloat16_is_rounded_less_than_by_torch(size, kernel, padding, monkeypatch):
    """Products and sums are of single precision; only what goes in and comes out is rounded."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    exact = penalty(F.conv3d, torch.float64, size, kernel, padding)
    by_torch = penalty(F.conv3d, torch.bfloat16, size, kernel, padding)
    monkeypatch.setattr(F, "conv3d", None)
    found = penalty(convolution.conv3d, torch.bfloat16, size, kernel, padding)
    for ours, theirs, reference in zip(found, by_torch, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert distance(ours, reference) < 1.1 * distance(theirs, reference) < 0.02


@pytest.mark.usefixtures("always")
def test_bfloat16_is_left_to_tiles_where_there_are_any(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(winograd, "correlate", None)
    x, weight = (tensor.bfloat16() for tensor in tensors((1, 4, 8, 8), (4, 4, 3, 3)))
    convolution.conv2d(x, weight, padding=1)
    with pytest.raises(TypeError):
        convolution.conv2d(x.float(), weight.float(), padding=1)


class _Weights(TorchDispatchMode):
    """Collects the weights that oneDNN's products are given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.seen.append(args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("always")
@pytest.mark.skipif(not onednn.has_onednn(), reason="needs oneDNN's products")
def test_frames_of_a_clip_are_not_multiplied_where_they_lie(monkeypatch):
    """Of a weight with gaps between its rows, oneDNN's product takes a thousand times as long."""
    monkeypatch.setattr(onednn, "is_amd", lambda: True)
    clip, weight = tensors((2, 6, 9, 4, 5), (7, 6, 1, 1, 1))
    with _Weights() as weights, torch.no_grad():
        for part in (clip[:, :, 2:7], clip[:, :, :, 1:], clip[:, 1:], clip):
            kernel = weight[:, : part.shape[1]]
            assert distance(convolution.conv3d(part, kernel), F.conv3d(part.double(), kernel.double())) < TOLERANCE
    assert len(weights.seen) == 8
    assert all(found.is_contiguous() or found.t().is_contiguous() for found in weights.seen)


def test_layers_are_those_of_torch():
    for ours, theirs, size in ((convolution.Conv2d, torch.nn.Conv2d, (2, 3, 8, 6)),
                               (convolution.Conv3d, torch.nn.Conv3d, (1, 3, 4, 8, 6))):  # fmt: skip
        layers = []
        for layer in (ours, theirs):
            torch.manual_seed(0)
            layers.append(layer(3, 5, 3, padding=1))
        (x,) = tensors(size)
        assert layers[0].state_dict().keys() == layers[1].state_dict().keys()
        assert distance(layers[0](x).detach(), layers[1](x).detach().double()) < TOLERANCE


@pytest.mark.usefixtures("always")
def test_what_only_torch_computes_is_left_to_it(monkeypatch):
    monkeypatch.setattr(winograd, "correlate", None)
    x, weight = tensors((1, 4, 8, 8), (4, 4, 3, 3))
    convolution.conv2d(x, weight, stride=2)
    convolution.conv2d(x, weight, dilation=2)
    convolution.conv2d(x, weight[:, :2], groups=2)
    convolution.conv2d(x.double(), weight.double())
    convolution.conv2d(x, weight, padding=3)
    with torch.autocast("cpu", torch.bfloat16):
        convolution.conv2d(x, weight)
    with backends.using("ref"):
        convolution.conv2d(x, weight)
    with pytest.raises(RuntimeError, match="channels"):
        convolution.conv2d(x[:, :3], weight)
    with pytest.raises(TypeError):
        convolution.conv2d(x, weight)  # the way that the lines above did not take


def test_the_choice_is_by_shape():
    assert convolution.winograd_gain((1, 512, 1, 128, 128), (512, 512, 1, 3, 3), (0, 1, 1)) > 2
    assert convolution.winograd_gain((1, 512, 20, 3, 4), (512, 512, 3, 3, 3), (1, 1, 1)) < 1
    assert convolution.winograd_gain((1, 8, 1, 64, 64), (8, 8, 1, 3, 3), (0, 1, 1)) < 1
