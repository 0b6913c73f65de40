"""Bias and activation compared with NumPy and finite differences, and their handling of layout and NaN."""

import numpy as np
import pytest
import scipy.special
import torch

from torch_utils.ops.bias_act import activation_funcs, bias_act

IMPLS = ["ref", "cpu"]

FORMULAS = {
    "linear": lambda x, alpha: x,
    "relu": lambda x, alpha: np.maximum(x, 0),
    "lrelu": lambda x, alpha: np.where(x < 0, x * alpha, x),
    "tanh": lambda x, alpha: np.tanh(x),
    "sigmoid": lambda x, alpha: scipy.special.expit(x),
    "elu": lambda x, alpha: np.where(x < 0, np.expm1(x), x),
    "selu": lambda x, alpha: 1.0507009873554805 * np.where(x < 0, 1.6732632423543772 * np.expm1(x), x),
    "softplus": lambda x, alpha: np.logaddexp(x, 0),
    "swish": lambda x, alpha: x * scipy.special.expit(x),
}


def random(seed, *shape):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("act", FORMULAS)
@pytest.mark.parametrize("track", [False, True])
def test_equals_numpy(impl, act, track):
    x, b = random(0, 3, 4, 5) * 3, random(1, 5)
    before = x.clone()
    y = bias_act(x.requires_grad_(track), b, dim=2, act=act, clamp=1.5, impl=impl).detach()
    spec = activation_funcs[act]
    expected = spec.def_gain * FORMULAS[act](x.detach().numpy() + b.numpy(), spec.def_alpha)
    np.testing.assert_allclose(y, np.clip(expected, -1.5, 1.5), rtol=1e-9, atol=1e-8)
    y = bias_act(x, None, act=act, alpha=0.4, gain=-0.7, impl=impl).detach()
    np.testing.assert_allclose(y, -0.7 * FORMULAS[act](x.detach().numpy(), 0.4), rtol=1e-9, atol=1e-8)
    assert torch.equal(x.detach(), before)


def test_default_gains():
    root = {name for name, spec in activation_funcs.items() if spec.def_gain == pytest.approx(2**0.5)}
    assert root == {"relu", "lrelu", "swish"}
    assert all(spec.def_gain == 1 for name, spec in activation_funcs.items() if name not in root)
    assert set(activation_funcs) == set(FORMULAS) and activation_funcs["lrelu"].def_alpha == 0.2


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("act", FORMULAS)
def test_gradcheck(impl, act):
    x, b = random(0, 2, 3, 4).requires_grad_(), random(1, 3).requires_grad_()

    def function(x, b):
        return bias_act(x, b, act=act, gain=1.3, clamp=1.1, impl=impl)

    assert torch.autograd.gradcheck(function, (x, b))
    assert torch.autograd.gradgradcheck(function, (x, b))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("act", FORMULAS)
def test_nan_and_channels_last_are_kept(impl, act):
    x = random(0, 2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    x[1, 2, 3, 4] = torch.nan
    y = bias_act(x, random(1, 3), act=act, clamp=1, impl=impl)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y.isnan(), x.isnan())


def test_malformed_arguments_are_refused():
    with pytest.raises(ValueError, match="unknown activation 'gelu'.*lrelu"):
        bias_act(torch.ones(1, 1), act="gelu")
    with pytest.raises(ValueError, match="clamp"):
        bias_act(torch.ones(1, 1), clamp=-1)
    with pytest.raises(ValueError, match="unknown impl"):
        bias_act(torch.ones(1, 1), impl="native")
