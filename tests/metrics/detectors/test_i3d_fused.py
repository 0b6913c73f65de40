"""The fused convolutions of I3D against one operator after the other."""

import pytest
import torch

from metrics.detectors import i3d

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


def test_gradients_take_the_plain_way():
    x = torch.randn(1, 8, 4, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert not i3d._has_fused(x)
    unit = made_up(i3d._Unit(8, 4, 3)).requires_grad_(False)
    unit(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
