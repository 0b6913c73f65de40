"""NVRTC compiles kernels for every GPU generation, without a GPU; the cache of binaries recovers from damage."""

import itertools
import multiprocessing
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.torch_utils.ops import published
from torch_utils.ops import backends, spec
from torch_utils.ops.binaries import Unavailable
from torch_utils.ops.cuda import bias_act as cuda_bias_act
from torch_utils.ops.cuda import driver as cuda_driver
from torch_utils.ops.cuda import fir_plan, nvrtc
from torch_utils.ops.cuda import kernels as cuda_kernels

TARGETS = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")


@pytest.fixture(scope="module", autouse=True)
def compiler():
    try:
        return nvrtc.load()
    except Unavailable as problem:
        pytest.skip(str(problem))


def read_cubin(binary):
    """Return facts of a cubin of one kernel: a thread's registers, bytes of stack (spilled registers) and of code."""
    section_table = struct.unpack_from("<Q", binary, 0x28)[0]
    entry_size, count, name_index = struct.unpack_from("<HHH", binary, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", binary, section_table + i * entry_size) for i in range(count)]
    names_start = headers[name_index][4]
    facts = {}
    for name, _, _, _, offset, size in headers:
        start = names_start + name
        section = binary[start : binary.index(b"\0", start)].decode()
        if section.startswith(".text."):
            facts["code"] = size
        position = offset
        while section == ".nv.info" and position < offset + size:
            form, attribute, length = struct.unpack_from("<BBH", binary, position)
            key = {0x2F: "registers", 0x11: "stack"}.get(attribute)
            if form == 4 and key:
                facts[key] = struct.unpack_from("<II", binary, position + 4)[1]
            position += 4 + (length if form == 4 else 0)
    return facts


def check_binary(kernel, target, most_stack=0):
    facts = read_cubin(cuda_driver.compile_kernel(kernel, target))
    context = f"{kernel} for {target}: {facts}"
    assert facts["code"] > 0 and facts["registers"] * kernel.threads <= 65536, context
    assert facts["stack"] <= most_stack, context
    # A block of the oldest supported generation has 64 KB, Ada and small Blackwell 99.
    assert kernel.shared_bytes <= 227 * 1024
    return facts


def images(batch, channels, height, width):
    return torch.empty(batch, channels, height, width)


def layer(mode, up, down, size=(150, 94), slope=0.2):
    """Return the call of a super-resolution layer (StyleGAN3's filters: six taps a sample of the lower rate)."""
    taps_up, taps_down = 6 * up, 6 * down
    first = spec.make_axes(size[::-1], (taps_up,) * 2, (up, up), padding=(9, 8, 9, 8))
    second = spec.make_axes(first.out_size, (taps_down,) * 2, down=(down, down))
    x = ("tensor", (8, 512, size[1], size[0]), images(8, 512, size[1], size[0]).stride())
    fu, fd = (("tensor", (taps,), (1,)) for taps in (taps_up, taps_down))
    if mode != "signed":
        b = ("tensor", (512,), (1,))
        options = (float(up**2), 2**0.5, slope, 256.0, False, mode == "marked")
        return "filtered_lrelu", (x, fu, fd, b, tuple(first.as_ints()), tuple(second.as_ints()), *options)
    shape = (8, 512, first.y.out_size, (first.x.out_size + 3) // 4)
    signs = ("tensor", shape, torch.empty(shape, dtype=torch.uint8).stride())
    y = ("tensor", (8, 512, *second.out_size), images(8, 512, *second.out_size).stride())
    axes = (tuple(second.transposed().as_ints()), tuple(first.transposed().as_ints()))
    return "filtered_lrelu_signed", (y, signs, fd, fu, *axes, 4.0, slope, True)


def resampling(f, up=1, down=1, padding=0, size=(64, 128, 128)):
    shape = (2, *size)
    axes = spec.make_axes(size[1:], (f[-1], f[0]), (up, up), (down, down), spec.parse_padding(padding))
    x = ("tensor", shape, images(*shape).stride())
    return "upfirdn2d", (
        x,
        ("tensor", f, images(1, 1, f[0], f[-1])[0, 0].stride()[-len(f) :]),
        tuple(axes.as_ints()),
        False,
        4.0,
    )


def activation(order, act, shape=(8, 512, 92, 148)):
    x = ("tensor", shape, images(*shape).stride())
    name = ("bias_act", "bias_act_grad", "bias_act_grad2")[order]
    return name, (*[x] * (order + 1), ("tensor", (shape[1],), (1,)), 1, act, 0.2, 2**0.5, 256.0)


REPRESENTATIVE = [
    (layer("plain", 2, 2), torch.float16, "sm_90"),
    (layer("marked", 4, 2), torch.float16, "sm_80"),
    (layer("signed", 2, 2), torch.bfloat16, "sm_100"),
    (layer("marked", 2, 2), torch.float32, "sm_75"),
    (resampling((4, 4), padding=2), torch.float16, "sm_120"),
    (resampling((12,), down=2), torch.bfloat16, "sm_75"),
    (resampling((8,), up=4), torch.float32, "sm_100"),
    (resampling((40, 40)), torch.float16, "sm_75"),
    (activation(0, "lrelu"), torch.bfloat16, "sm_80"),
    (activation(1, "swish"), torch.float16, "sm_120"),
    (activation(2, "softplus"), torch.float32, "sm_90"),
]


@pytest.mark.parametrize("call, dtype, target", REPRESENTATIVE)
def test_kernels_compile_and_keep_everything_in_registers(call, dtype, target):
    (kernel,) = published.kernels([call], dtype)
    check_binary(kernel, target)


def test_layers_of_the_published_networks_leave_registers_for_many_warps():
    (kernel,) = published.kernels([layer("plain", 2, 2)], torch.float32)
    facts = check_binary(kernel, "sm_90")
    assert facts["registers"] <= 128  # so at least 16 warps fit on a multiprocessor


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("run", [published.run_low_res, published.run_super_res])
def test_every_kernel_of_the_published_networks_compiles_for_every_generation(run):
    calls = published.calls(run)
    kernels = [k for dtype in cuda_driver.DTYPES for k in published.kernels(calls, dtype)]
    assert len(kernels) > 50
    small = fir_plan.Gpu(num_sms=40, shared_bytes=64 * 1024)  # Turing's block has 64 KB
    kernels_of = dict.fromkeys(TARGETS, kernels)
    kernels_of["sm_75"] = [k for dtype in cuda_driver.DTYPES for k in published.kernels(calls, dtype, small)]
    assert all(kernel.shared_bytes <= 64 * 1024 for kernel in kernels_of["sm_75"])
    jobs = [(kernel, target) for target in TARGETS for kernel in dict.fromkeys(kernels_of[target])]
    with ThreadPoolExecutor(2) as pool:
        facts = list(pool.map(lambda job: check_binary(*job, most_stack=64), jobs))
    spilled = sum(fact["stack"] > 0 for fact in facts)
    print(
        f"{len(facts)} binaries, at most {max(fact['registers'] for fact in facts)} registers, {spilled} with a stack"
    )
    assert spilled <= len(facts) // 10


# ----------------------------------------------------------------------------------------------------------------------
# Architectures and the cache.


@pytest.mark.parametrize(
    "capability, target",
    [
        ((7, 5), "sm_75"),
        ((8, 6), "sm_86"),
        ((9, 0), "sm_90"),
        ((12, 1), "sm_121"),
        ((9, 9), "sm_90"),
        ((99, 0), "compute_"),
    ],
)
def test_an_unknown_gpu_gets_what_runs_on_it(compiler, capability, target):
    assert compiler.target(capability).startswith(target)


def test_code_for_gpus_of_the_future_is_left_to_the_driver(compiler):
    kernel = cuda_bias_act.make_kernel(torch.float32, "lrelu", 0, True, 1, 4, False)
    text = cuda_driver.compile_kernel(kernel, compiler.target((99, 0)))
    assert b".visible .entry bias_act" in text and b".target sm_" in text


def test_an_older_gpu_is_refused_with_a_reason(compiler):
    with pytest.raises(Unavailable, match=r"compute capability, 6\.1.*Turing"):
        compiler.target((6, 1))


def test_mistakes_in_a_source_show_the_log_of_the_compiler(compiler):
    with pytest.raises(nvrtc.CompileError, match=r"wrong\.cu for sm_90:(.|\n)*undefined"):
        compiler.compile("wrong.cu", "__global__ void f() { missing(); }", {}, [], "sm_90")


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    return cuda_bias_act.make_kernel(torch.float16, "relu", 0, True, 1, 8, False)


def cached(tmp_path):
    return sorted(tmp_path.rglob("*.cubin"))


def test_a_binary_is_compiled_once_and_again_after_damage(kernel, tmp_path, monkeypatch):
    binary = cuda_driver.load_binary(kernel, "sm_80")
    (path,) = cached(tmp_path)
    whole = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(cuda_driver, "compile_kernel", None)
        assert cuda_driver.load_binary(kernel, "sm_80") == binary
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"", whole[:100] + b"!" + whole[101:], b"\x7fELF" + whole):
        path.write_bytes(damaged)
        assert cuda_driver.load_binary(kernel, "sm_80") == binary
        assert path.read_bytes() == whole
    cuda_driver.load_binary(kernel, "sm_90")
    assert len(cached(tmp_path)) == 2


def test_what_a_binary_depends_on_is_in_its_key(kernel, tmp_path, monkeypatch):
    other = cuda_bias_act.make_kernel(torch.float16, "relu", 0, False, 1, 8, False)
    for changed in (kernel, other):
        cuda_driver.load_binary(changed, "sm_80")
    assert len(cached(tmp_path)) == 2
    sources = dict(cuda_driver.read_sources())
    sources["common.cuh"] += "\n"
    monkeypatch.setattr(cuda_driver, "read_sources", lambda: sources)
    cuda_driver.load_binary(kernel, "sm_80")
    assert len(cached(tmp_path)) == 3


def load_in_process(kernel, start, results):
    start.wait()
    results.put(len(cuda_driver.load_binary(kernel, "sm_80")))


def test_four_processes_may_come_first(kernel, tmp_path):
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=load_in_process, args=(kernel, start, results)) for _ in range(4)]
    for process in processes:
        process.start()
    sizes = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert len(set(sizes)) == 1 and len(cached(tmp_path)) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".cubin"]


# ----------------------------------------------------------------------------------------------------------------------
# Without a GPU.


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_kernels_are_unavailable_with_a_remedy():
    with pytest.raises(Unavailable, match="PyTorch sees no CUDA device") as caught:
        cuda_kernels.load()
    assert "install" in caught.value.remedy
    assert "none" in cuda_kernels.describe()["GPU"]
    with pytest.raises(Unavailable, match=r"libcuda|nvcuda"):
        cuda_driver.Driver()


def test_supported_types():
    assert all(cuda_kernels.supports(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16))
    assert not any(cuda_kernels.supports(dtype) for dtype in (torch.float64, torch.int32, torch.complex64))
    assert set(backends.KERNELS["cuda"].__all__) >= {"load", "describe", "supports", "bias_act", "upfirdn2d"}


def test_a_missing_library_is_reported_with_the_attempts(monkeypatch):
    monkeypatch.setattr(nvrtc, "library_paths", lambda: iter(["/nowhere/libnvrtc.so.13"]))
    with pytest.raises(Unavailable, match=r"NVRTC.*not found.*/nowhere") as caught:
        nvrtc.load.__wrapped__()
    assert "pip install" in caught.value.remedy


@pytest.mark.parametrize("taps, up, down", list(itertools.product((1, 4, 12, 24, 40), (1, 2, 4), (1, 2, 4))))
def test_plans_fit_the_smallest_and_the_largest_gpu(taps, up, down):
    x, y = (fir_plan.AxisFilters(200, 190 * up // down, up, taps, 3, step=s, down=d) for s, d in ((down, 1), (1, down)))
    for channels_last in (False, True):
        problem = fir_plan.Problem(x, y, 4, 64, channels_last, 2, shared_taps=True)
        for gpu in (fir_plan.Gpu(14, 64 * 1024), published.H200):
            plan = fir_plan.make_plan(problem, gpu)
            assert plan is not None and plan.shared_bytes <= gpu.shared_bytes and plan.threads <= 256
            constants, fields = plan.constants, plan.fields
            assert fields["strips"] * constants["TILE_W"] >= x.out_size
            assert fields["segments"] * fields["segment_rows"] >= y.out_size
            assert constants["TILE_W"] * down % up == 0 and fields["segment_rows"] * down % up == 0
