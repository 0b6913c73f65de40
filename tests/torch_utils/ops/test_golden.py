"""Outputs, first and second derivatives of the operators compared with stored values of the published code."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from torch_utils.ops.upfirdn2d import downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "ops.json").read_text())
IMPLS = ["ref", "matmul", "cpu"]


def normal(seed, shape, scale=1.0):
    return torch.from_numpy((np.random.RandomState(seed).standard_normal(shape) * scale).astype(np.float32))


def close(tensor, expected, case):
    """Compare samples, mean and deviation, relative to the spread of the stored tensor."""
    values = tensor.detach().flatten().double().numpy()
    scale = max(expected["std"], np.abs(expected["val"]).max(), 1e-12)
    found = {"val": values[expected["idx"]], "mean": values.mean(), "std": values.std()}
    for key, value in found.items():
        np.testing.assert_allclose(value / scale, np.asarray(expected[key]) / scale, atol=1e-5, err_msg=f"{key} {case}")


def check_derivatives(case, y, x, b=None):
    assert list(y.shape) == case["out_shape"]
    close(y, case["y"], case)
    dy = normal(case["seed"] + 1, y.shape).requires_grad_()
    inputs = [x] if b is None else [x, b]
    grads = torch.autograd.grad(y, inputs, dy, create_graph=True)
    close(grads[0], case["dx"], case)
    if b is not None:
        close(grads[1], case["db"], case)
    if "d_dy" in case:
        close(torch.autograd.grad(grads[0].square().sum(), dy)[0], case["d_dy"], case)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("index", range(len(GOLDEN["upfirdn2d"])))
def test_upfirdn2d(index, impl):
    case = GOLDEN["upfirdn2d"][index]
    x = normal(case["seed"], case["x"]).requires_grad_()
    f = None if case["f"] is None else normal(case["seed"] + 5, case["f"])
    options = {key: case[key] for key in ("up", "down", "padding", "flip_filter", "gain") if key in case}
    check_derivatives(case, upfirdn2d(x, f, impl=impl, **options), x)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("index", range(len(GOLDEN["bias_act"])))
def test_bias_act(index, impl):
    case = GOLDEN["bias_act"][index]
    x = normal(case["seed"], case["x"]).requires_grad_()
    b = normal(case["seed"] + 5, [case["x"][case["dim"]]]).requires_grad_()
    options = {key: case[key] for key in ("dim", "act", "alpha", "gain", "clamp") if key in case}
    check_derivatives(case, bias_act(x, b, impl=impl, **options), x, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("index", range(len(GOLDEN["filtered_lrelu"])))
def test_filtered_lrelu(index, impl):
    case = GOLDEN["filtered_lrelu"][index]
    x = normal(case["seed"], case["x"]).requires_grad_()
    b = normal(case["seed"] + 5, [case["x"][1]]).requires_grad_()
    fu = None if case["fu"] is None else normal(case["seed"] + 6, case["fu"], 0.4)
    fd = None if case["fd"] is None else normal(case["seed"] + 7, case["fd"], 0.4)
    options = {key: case[key] for key in ("up", "down", "padding", "gain", "slope", "clamp", "flip_filter")}
    check_derivatives(case, filtered_lrelu(x, fu, fd, b, impl=impl, **options), x, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("index", range(len(GOLDEN["wrappers"])))
def test_wrappers(index, impl):
    case = GOLDEN["wrappers"][index]
    function = {"upsample2d": upsample2d, "downsample2d": downsample2d, "filter2d": filter2d}[case["function"]]
    f = normal(case["seed"] + 5, case["f"])
    options = {key: case[key] for key in ("up", "down", "padding", "flip_filter", "gain") if key in case}
    y = function(normal(case["seed"], case["x"]), f, impl=impl, **options)
    assert list(y.shape) == case["out_shape"]
    close(y, case["y"], case)


@pytest.mark.parametrize("case", GOLDEN["setup_filter"])
def test_setup_filter(case):
    options = {key: value for key, value in case.items() if key not in ("f", "result")}
    f = setup_filter(case["f"], **options)
    assert f.dtype == torch.float32
    np.testing.assert_allclose(f.numpy(), np.asarray(case["result"], np.float32), rtol=1e-6, strict=True)
