"""The fused convolutions of I3D against one operator after the other."""

import pytest
import torch

from metrics.detectors import i3d
from torch_utils.ops import convolution

needs_fused = pytest.mark.skipif(not i3d._has_fused(torch.zeros(1)), reason="needs oneDNN's fused convolution on x86")


def made_up(unit):
    generator = torch.Generator().manual_seed(0)
    unit.weight.data.normal_(0, 0.1, generator=generator)
    unit.beta.data.normal_(0, 0.1, generator=generator)
    unit.moving_mean.normal_(0, 0.1, generator=generator)
    unit.moving_variance.uniform_(0.5, 2, generator=generator)
    return unit


@needs_fused
@pytest.mark.parametrize(("channels", "kernel", "stride"), [((3, 16), 7, 2), ((16, 24), 3, 1), ((24, 8), 1, 1)])
def test_a_fused_unit_is_the_plain_one_up_to_rounding(channels, kernel, stride):
    inputs, outputs = channels
    unit = made_up(i3d._Unit(inputs, outputs, kernel, stride)).requires_grad_(False)
    x = torch.randn(2, channels[0], 6, 15, 17, generator=torch.Generator().manual_seed(1))
    found, expected = unit.fused(x), unit.plain(x)
    assert found.shape == expected.shape
    assert (found - expected).norm() < 1e-6 * expected.norm()


@needs_fused
def test_a_unit_by_winograds_way_is_the_plain_one_up_to_rounding():
    unit = made_up(i3d._Unit(64, 192, 3)).requires_grad_(False)
    x = torch.randn(1, 64, 8, 56, 56, generator=torch.Generator().manual_seed(1))
    if not convolution.has_kernels(x):
        pytest.skip("needs compiled kernels")
    assert unit._suits_winograd(x)
    found, expected = unit.fused(x), unit.plain(x)
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    assert (found - expected).norm() < 5e-6 * expected.norm()


@pytest.mark.parametrize(("kernel", "stride"), [((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (1, 1, 1)), ((2, 2, 2), (2, 2, 2))])
@pytest.mark.parametrize("shape", [(2, 5, 6, 14, 14), (1, 3, 7, 15, 8), (1, 4, 1, 7, 7)])
def test_maxima_are_the_same_in_both_layouts(kernel, stride, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x[0, 0, 0, 0, 0] = float("nan")
    found = i3d._max_pool(x.contiguous(memory_format=torch.channels_last_3d), kernel, stride)
    torch.testing.assert_close(found, i3d._max_pool(x, kernel, stride), rtol=0, atol=0, equal_nan=True)


def test_gradients_take_the_plain_way():
    x = torch.randn(1, 8, 4, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert not i3d._has_fused(x)
    unit = made_up(i3d._Unit(8, 4, 3)).requires_grad_(False)
    unit(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
