"""Tests of convolutions with packed weights against `torch.nn.Conv2d`, and of the decoder that has them."""

import copy

import pytest
import torch
from torch import nn

from torch_utils.onednn import has_onednn
from torch_utils.precision import set_precision
from training.modules.conv_autoencoder import ConvAutoencoder
from training.modules.packed_conv import PackedConv2d, pack_convolutions
from training.world.networks import CellConv

needs_onednn = pytest.mark.skipif(not has_onednn(), reason="this build of torch has no oneDNN operators")
FORMATS = [(torch.float32, 1e-5), (torch.bfloat16, 0.03)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@needs_onednn
@pytest.mark.parametrize("options", [
    {"kernel_size": 3, "padding": 1}, {"kernel_size": 4, "stride": 2, "padding": 1}, {"kernel_size": 1, "bias": False},
    {"kernel_size": 3, "padding": (2, 1), "dilation": (2, 1)}, {"kernel_size": 3, "groups": 4}, {"kernel_size": (1, 3)},
])  # fmt: skip
@pytest.mark.parametrize(("dtype", "tolerance"), FORMATS)
def test_values_are_those_of_torch_for_any_shape(options, dtype, tolerance):
    if not has_onednn(dtype):
        pytest.skip("this processor has no instructions for this format")
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, **options).requires_grad_(False)
    packed = PackedConv2d(conv, dtype)
    for shape in ((1, 8, 6, 8), (3, 8, 6, 8), (1, 8, 9, 7), (1, 8, 6, 8)):
        x, expected = random(*shape), conv(random(*shape))
        for given in (x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
            found = packed(given)
            assert found.dtype == dtype
            assert (found.float() - expected).abs().max() <= tolerance * expected.abs().max()


@needs_onednn
@torch.no_grad()
def test_weights_are_packed_again_for_another_number_of_threads():
    """Else some shapes take tens of times as long: findings/torch_packed_convolution_of_other_threads.sh."""
    packed, x, before = PackedConv2d(nn.Conv2d(128, 128, 3, padding=1)), random(1, 128, 6, 8), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append((packed(x), packed.packed))
    finally:
        torch.set_num_threads(before)
    assert found[0][1] is not found[1][1] and found[1][1] is found[2][1]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("options", [{"padding_mode": "reflect", "padding": 1}, {"padding": "same"}])
def test_other_padding_keeps_the_layer(options):
    conv = nn.Conv2d(2, 2, 3, **options)
    packed = pack_convolutions(nn.Sequential(conv, nn.Conv2d(2, 2, 1)))
    assert [type(layer) for layer in packed.children()] == [nn.Conv2d, PackedConv2d]
    with pytest.raises(ValueError, match="cannot be packed"):
        PackedConv2d(conv)


def test_convolutions_of_another_class_are_kept():
    packed = pack_convolutions(nn.Sequential(CellConv(2, 2, (3, 4))))
    assert [type(layer) for layer in packed.children()] == [CellConv]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.no_grad()
def test_a_decoding_copy_equals_the_network_and_leaves_it(precision):
    if precision == "bf16" and not has_onednn(torch.bfloat16):
        pytest.skip("this processor has no instructions for bfloat16")
    torch.manual_seed(0)
    network = ConvAutoencoder(16, 24, widths=(8, 12, 16), blocks=1, embedding_dim=4).eval()
    for parameter in network.parameters():
        parameter.copy_(random(*parameter.shape) * 0.2)
    z = random(2, 4, 3, 2, 3)
    expected, state = network.decode_latents(z), copy.deepcopy(network.state_dict())
    set_precision([network], precision)
    other = network.decoding_copy()
    kinds = [type(layer) for layer in other.modules()]
    assert (PackedConv2d in kinds) == has_onednn()
    found = other.decode_latents(z)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= (1e-5 if precision == "fp32" else 0.05) * expected.abs().max()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert torch.equal(other.latents(expected), network.latents(expected))
