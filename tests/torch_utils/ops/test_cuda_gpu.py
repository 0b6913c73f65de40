"""The operators on a GPU: the checks that also run on a CPU with host_shim.h, and those that need a GPU."""

import os
import statistics
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.torch_utils.ops import test_cuda_kernels as kernels
from tests.torch_utils.ops import test_golden
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from torch_utils.ops.upfirdn2d import setup_filter, upfirdn2d

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@few
@given(data=st.data())
def test_upfirdn2d_is_the_literal_composition(data):
    kernels.check_upfirdn2d(data, "cuda")


@few
@given(case=kernels.lrelu_cases(), write_signs=st.booleans())
def test_filtered_lrelu_is_the_literal_composition(case, write_signs):
    kernels.check_filtered_lrelu(case, write_signs, "cuda")


@few
@given(data=st.data())
def test_bias_act_is_the_literal_composition(data):
    kernels.check_bias_act(data, "cuda")


@pytest.mark.filterwarnings("ignore:Input #:UserWarning")
def test_operators_have_their_derivatives_by_finite_differences():
    kernels.check_derivatives("cuda")


@pytest.mark.parametrize("name", ["upfirdn2d", "bias_act", "filtered_lrelu"])
def test_operators_give_the_stored_numbers_of_the_published_code(name, monkeypatch):
    make, close = test_golden.normal, test_golden.close
    monkeypatch.setattr(test_golden, "normal", lambda *args: make(*args).cuda())
    monkeypatch.setattr(test_golden, "close", lambda tensor, *rest: close(tensor.cpu(), *rest))
    for index in range(len(test_golden.GOLDEN[name])):
        getattr(test_golden, f"test_{name}")(index, "cuda")


def layer_arguments(dtype, layout=torch.contiguous_format, batch=2):
    """Return a layer of the super-resolution generator: x, bias, filter, and the rest by name."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 64, 94, 150, generator=rng).to("cuda", dtype).contiguous(memory_format=layout)
    f = setup_filter(torch.hann_window(14, periodic=False)[1:-1]).cuda()
    return (
        x,
        torch.randn(64, generator=rng).to("cuda", dtype),
        f,
        {"up": 2, "down": 2, "padding": [9, 8, 9, 8], "clamp": 256},
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
def test_a_layer_and_its_gradients_equal_the_reference(dtype, tolerance, layout):
    x, b, f, options = layer_arguments(dtype, layout)
    results = []
    for impl, kind in (("ref", torch.float64), ("cuda", dtype)):
        inputs = [t.to(kind).requires_grad_() for t in (x, b)]
        y = filtered_lrelu(inputs[0], f, f, inputs[1], impl=impl, **options)
        results.append([y, *torch.autograd.grad(y, inputs, y.detach().sign())])
    assert results[1][0].is_contiguous(memory_format=layout)
    for expected, found in zip(*results, strict=True):
        error = (found.double() - expected).abs()
        # Derivatives jump where an element is within a rounding error of zero.
        assert (error > tolerance * expected.abs().max()).double().mean() < 1e-3


def test_operators_work_on_the_current_stream():
    x, b, f, options = layer_arguments(torch.float32)
    expected = filtered_lrelu(x, f, f, b, impl="cuda", **options)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        late = torch.zeros_like(x)
        torch.cuda._sleep(200_000_000)  # until the copy, an operator on another stream would see zeros
        late.copy_(x)
        found = filtered_lrelu(late, f, f, b, impl="cuda", **options)
    side.synchronize()
    assert torch.equal(found, expected)


def test_operators_can_be_captured_in_a_graph():
    x, b, f, options = layer_arguments(torch.float16)

    def run():
        y = filtered_lrelu(x, f, f, b, impl="cuda", **options)
        return bias_act(upfirdn2d(y, f, down=2, padding=5, impl="cuda"), b, act="lrelu", impl="cuda")

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, run())


def test_more_elements_than_31_bits_can_count():
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GB of GPU memory")
    x = torch.zeros(2**31 // 8 + 1000, 8, dtype=torch.float16, device="cuda")
    x[-1000:] = torch.randn(1000, 8)
    b = torch.randn(8, device="cuda").half()
    y = bias_act(x, b, act="lrelu", impl="cuda")
    assert torch.equal(y[-1000:], bias_act(x[-1000:].clone(), b, act="lrelu", impl="cuda"))
    images = x[: 2**31 // 8].view(1, 8, 2**14, 2**14)
    images[0, 7, -100:, -100:] = torch.randn(100, 100)
    f = setup_filter([1, 3, 3, 1]).cuda()
    y = upfirdn2d(images, f, padding=[2, 1, 2, 1], impl="cuda")
    corner = upfirdn2d(images[:, 7:, -64:, -64:].clone(), f, padding=[2, 1, 2, 1], impl="cuda")
    assert torch.equal(y[:, 7:, -60:, -60:], corner[:, :, -60:, -60:])


def test_four_processes_may_use_the_operators_first(tmp_path):
    script = "import torch\nfrom torch_utils.ops import doctor\nassert doctor.self_test('cuda', torch.float32)\n"
    environment = {**os.environ, "DNNLIB_CACHE_DIR": str(tmp_path), "TORCH_UTILS_OPS": "strict"}
    commands = [subprocess.Popen([sys.executable, "-c", script], env=environment) for _ in range(4)]
    assert [command.wait(timeout=240) for command in commands] == [0] * 4
    assert all(path.suffix == ".cubin" for path in tmp_path.rglob("*") if path.is_file())


def milliseconds(function, repeats=20):
    """Median time of a call on the GPU."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_operators_against_the_bandwidth_of_a_copy(dtype, capsys):
    """Prints, and asserts nothing about, the share of the time that reading the input and writing the output takes."""
    batch = 32 * 4 // dtype.itemsize
    x, b, f, options = layer_arguments(dtype, batch=batch)
    binomial = setup_filter([1, 3, 3, 1]).cuda()
    operators = {
        "bias_act lrelu": lambda: bias_act(x, b, act="lrelu", clamp=256, impl="cuda"),
        "upfirdn2d 4x4": lambda: upfirdn2d(x, binomial, padding=[2, 1, 2, 1], impl="cuda"),
        "upfirdn2d 4x4, down 2": lambda: upfirdn2d(x, binomial, down=2, padding=1, impl="cuda"),
        "upfirdn2d 12 taps, up 2": lambda: upfirdn2d(x, f, up=2, padding=[6, 5, 6, 5], gain=4, impl="cuda"),
        "upfirdn2d 12 taps, down 2": lambda: upfirdn2d(x, f, down=2, padding=5, impl="cuda"),
        "filtered_lrelu 2x, 12 taps": lambda: filtered_lrelu(x, f, f, b, impl="cuda", **options),
    }
    speed = 2 * x.nbytes / milliseconds(x.clone)
    lines = [f"{torch.cuda.get_device_name()}, {dtype}, {x.nbytes / 1e6:.0f} MB, copies at {speed / 1e9:.2f} TB/s"]
    for name, operator in operators.items():
        time = milliseconds(operator)
        floor = (x.nbytes + operator().nbytes) / speed
        lines.append(f"{name:28s} {time:8.3f} ms, {100 * floor / time:5.1f} % of copy bandwidth ({time / floor:.2f}x)")
        assert time > 0
    with capsys.disabled():
        print("\n" + "\n".join(lines))
