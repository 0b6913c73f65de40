"""The registration of the compiled operators in PyTorch: schemas, shapes, layouts and derivatives.

The kernels are replaced by literal ones, so that the derivatives are tested without a compiler.
"""

import pytest
import torch

from tests.torch_utils.ops import literal
from torch_utils.ops import backends, spec
from torch_utils.ops.bias_act import activation_funcs, bias_act
from torch_utils.ops.cpu import kernels as cpu_kernels
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from torch_utils.ops.upfirdn2d import upfirdn2d

ACTS = list(activation_funcs)


@pytest.fixture(autouse=True)
def literal_kernels(monkeypatch):
    backends._load.cache_clear()
    monkeypatch.setitem(backends.KERNELS, "cpu", literal)
    for name in ("bias_act", "bias_act_grad", "bias_act_grad2", "upfirdn2d", "filtered_lrelu", "filtered_lrelu_signed"):
        monkeypatch.setattr(cpu_kernels, name, getattr(literal, name), raising=False)
    yield
    backends._load.cache_clear()


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def needs_grad(*tensors):
    return [t.requires_grad_() for t in tensors]


OPTIONS = {"up": (2, 3), "down": (3, 2), "padding": (5, -1, 4, 3)}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("clamp", [None, 0.7])
def test_bias_act_has_the_derivatives_of_its_composition(act, clamp):
    x, b = needs_grad(random(2, 3, 4), random(3, seed=1))
    results = []
    for impl in ("ref", "cpu"):
        y = bias_act(x, b, 1, act, clamp=clamp, gain=1.3, impl=impl)
        dy = random(2, 3, 4, seed=2).requires_grad_()
        dx, db = torch.autograd.grad(y, [x, b], dy, create_graph=True)
        loss = dx.square().sum() + db.pow(3).sum()
        second = torch.autograd.grad(loss, [x, b, dy], allow_unused=True, materialize_grads=True)
        results.append([y, dx, db, *second])
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("act", ["lrelu", "swish"])
def test_bias_act_by_finite_differences(act):
    x, b = needs_grad(random(2, 3, 2), random(3, seed=1))
    assert torch.autograd.gradcheck(lambda x, b: bias_act(x, b, 1, act, impl="cpu"), [x, b])
    assert torch.autograd.gradgradcheck(lambda x, b: bias_act(x, b, 1, act, impl="cpu"), [x, b])


def test_a_third_derivative_of_a_smooth_activation_is_refused():
    (x,) = needs_grad(random(3))
    y = bias_act(x, dim=0, act="swish", impl="cpu")
    for _ in range(2):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match='use impl="ref"'):
        torch.autograd.grad(y.sum(), x)


@pytest.mark.parametrize("f", [None, random(5, seed=3), random(3, 4, seed=3)])
def test_resampling_by_finite_differences(f):
    (x,) = needs_grad(random(2, 2, 5, 4))

    def run(x):
        return upfirdn2d(x, f, **OPTIONS, gain=-1.7, impl="cpu")

    torch.testing.assert_close(run(x), upfirdn2d(x, f, **OPTIONS, gain=-1.7, impl="ref"))
    assert torch.autograd.gradcheck(run, [x]) and torch.autograd.gradgradcheck(run, [x])


@pytest.mark.parametrize("clamp", [None, 0.8])
@pytest.mark.parametrize("flip_filter", [False, True])
def test_filtered_lrelu_by_finite_differences(clamp, flip_filter):
    x, b = needs_grad(random(1, 2, 4, 3), random(2, seed=1))
    fu, fd = random(4, seed=2), random(2, 3, seed=3)

    def run(x, b, impl="cpu"):
        return filtered_lrelu(x, fu, fd, b, 2, 2, (4, 3, -1, 6), clamp=clamp, flip_filter=flip_filter, impl=impl)

    torch.testing.assert_close(run(x, b), run(x, b, "ref"))
    assert torch.autograd.gradcheck(run, [x, b]) and torch.autograd.gradgradcheck(run, [x, b])
    ours, expected = (third_derivative(run, impl) for impl in ("cpu", "ref"))
    torch.testing.assert_close(ours, expected)


def third_derivative(run, impl):
    """Of a function that is linear in pieces, so something after it has to bend."""
    x, b = needs_grad(random(1, 2, 4, 3), random(2, seed=1))
    y = run(x, b, impl).pow(4).sum()
    for _ in range(3):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return y


def test_pytorch_accepts_the_registrations():
    for op, arguments in operator_calls():
        torch.library.opcheck(op, arguments)


def operator_calls():
    """Return each operator with arguments for it."""
    x, b = needs_grad(random(2, 3, 6, 5, dtype=torch.float32), random(3, seed=1, dtype=torch.float32))
    fu, fd = random(4, seed=2, dtype=torch.float32), random(3, seed=3, dtype=torch.float32)
    up = spec.make_axes((6, 5), (4, 4), (2, 2), (1, 1), (3, 2, 4, 1))
    down = spec.make_axes(up.out_size, (3, 3), (1, 1), (2, 2))
    act = (1, "swish", 0.0, 1.4, 0.8)
    ops = torch.ops.longtake
    y, signs = ops.filtered_lrelu(x, fu, fd, b, up.as_ints(), down.as_ints(), 4.0, 1.4, 0.2, 0.9, False, True)
    dy = torch.ones_like(y).requires_grad_()
    transposed = (down.transposed().as_ints(), up.transposed().as_ints())
    return [
        (ops.bias_act.default, (x, b, *act)),
        (ops.bias_act_grad.default, (x, x, b, *act)),
        (ops.bias_act_grad2.default, (x.detach(), x.detach(), x.detach(), b.detach(), *act)),
        (ops.upfirdn2d.default, (x, fu, up.as_ints(), False, 1.5)),
        (ops.filtered_lrelu.default, (x, fu, fd, b, up.as_ints(), down.as_ints(), 4.0, 1.4, 0.2, 0.9, False, True)),
        (ops.filtered_lrelu_signed.default, (dy, signs.detach(), fd, fu, *transposed, 1.4, 0.2, True)),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_stays(dtype):
    x = random(2, 3, 8, 6).to(dtype=dtype, memory_format=torch.channels_last)
    f = random(4, seed=2, dtype=torch.float32)
    for y in (
        bias_act(x, act="lrelu", impl="cpu"),
        upfirdn2d(x, f, 2, 1, 3, impl="cpu"),
        filtered_lrelu(x, f, f, None, 2, 2, 6, impl="cpu"),
    ):
        assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == dtype


def test_tensors_with_gaps_are_accepted():
    x = random(4, 6, 9, 8)[::2, ::3, 1:8, 2:7]
    expected = upfirdn2d(x.contiguous(), random(4), 2, 1, 3, impl="ref")
    torch.testing.assert_close(upfirdn2d(x, random(4), 2, 1, 3, impl="cpu"), expected)
    y = bias_act(x, random(7), 2, "lrelu", impl="cpu")
    torch.testing.assert_close(y, bias_act(x, random(7), 2, "lrelu", impl="ref"))


def test_signs_cover_the_grid_between_the_filters():
    x = random(1, 2, 5, 7)
    up = spec.make_axes((5, 7), (1, 1), (1, 1), (1, 1), (0, 0, 0, 0))
    arguments = (x, None, None, None, up.as_ints(), up.as_ints(), 1.0, 2.0, 0.5, 1.0, False, True)
    y, signs = torch.ops.longtake.filtered_lrelu(*arguments)
    negative, clamped = literal.unpack(signs, 7)
    assert signs.shape == (1, 2, 5, 2)
    assert torch.equal(negative, x <= 0) and torch.equal(clamped, torch.where(x > 0, x, x * 0.5).abs() * 2 > 1)
    assert torch.equal(y, (torch.where(x > 0, x, x * 0.5) * 2).clamp(-1, 1))


def test_inference_records_nothing(monkeypatch):
    x, f = random(1, 1, 6, 6), random(4)
    asked = []
    monkeypatch.setattr(
        cpu_kernels,
        "filtered_lrelu",
        lambda *arguments: asked.append(arguments[-1]) or literal.filtered_lrelu(*arguments),
    )
    filtered_lrelu(x, f, f, None, 2, 2, 6, impl="cpu")
    filtered_lrelu(x.requires_grad_(), f, f, None, 2, 2, 6, impl="cpu")
    with torch.no_grad():
        filtered_lrelu(x, f, f, None, 2, 2, 6, impl="cpu")
    assert asked == [False, True, False]


def test_compiled_networks_keep_their_gradients():
    f = random(4, dtype=torch.float32)

    def loss(x, b):
        y = filtered_lrelu(bias_act(x, b, act="lrelu", impl="cpu"), f, f, b, 2, 2, 6, clamp=1.0, impl="cpu")
        return upfirdn2d(y, f, 1, 2, 2, impl="cpu").square().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x, b = needs_grad(random(1, 2, 6, 6, dtype=torch.float32), random(2, seed=1, dtype=torch.float32))
        results.append(torch.autograd.grad(function(x, b), [x, b]))
    torch.testing.assert_close(results[0], results[1])


def test_functional_transforms_take_the_reference():
    x, f = random(1, 1, 6, 6), random(4)

    def energy(x):
        return filtered_lrelu(x, f, f, None, 2, 2, 6).pow(2).sum()

    expected = torch.autograd.grad(energy(x.requires_grad_()), x)[0]
    torch.testing.assert_close(torch.func.grad(energy)(x.detach()), expected)
