"""The CPU kernels under the address and undefined-behaviour sanitisers, with vectors of every length.

Calls with random arguments are recorded, and replayed by a program of the same sources on memory of exactly the sizes
that the kernels may access. Vectors longer than the machine's are emulated by several, so their code is tested as well.
"""

import ctypes
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.torch_utils.ops import literal
from tests.torch_utils.ops.test_cpu_kernels import (
    NETWORK_AXES,
    factors,
    filters,
    images,
    layer,
    padded,
    run_everything,
    size_of,
)
from torch_utils.ops import spec, winograd
from torch_utils.ops.bias_act import activation_funcs
from torch_utils.ops.cpu import kernels as cpu_kernels
from torch_utils.ops.cpu.kernels import Library, _BiasAct, _Resample

SANITISERS = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ITEMS = [np.float32, np.float64, np.float16, np.uint16]


class Recorder:
    """Stands in for the library: passes calls on to it, and writes down what they got and gave."""

    def __init__(self, library):
        self.library = library
        self.calls = []
        self.results = []

    def as_library(self):
        return Library(self.resample, self.bias_act, self.tiles, self.library.instruction_set, self.library.path)

    def resample(self, address, x, y, b, signs, threads):
        job = _Resample.from_address(address)
        images, item = job.batch_size * job.num_channels, np.dtype(ITEMS[job.dtype]).itemsize
        middle = job.first.y.out_size * ((job.first.x.out_size + 3) // 4)
        sizes = {
            "x": images * job.first.x.size * job.first.y.size * item,
            "b": job.num_channels * item,
            "signs": images * middle,
            "y": images * job.second.x.out_size * job.second.y.out_size * item,
        }
        blocks: list[bytes | None] = [bytes([0]), bytes(job)]
        for f in (job.first, job.second):
            for pointer, taps in ((f.taps_x, f.x.taps), (f.taps_y, f.y.taps), (f.taps_2d, f.x.taps * f.y.taps)):
                blocks.append(copy(ctypes.cast(pointer, ctypes.c_void_p).value, taps * 8))
        blocks += [copy(x, sizes["x"]), copy(b, sizes["b"]), copy(signs, sizes["signs"]), bytes(sizes["y"])]
        self.library.resample(address, x, y, b, signs, threads)
        self.calls += blocks
        self.results += [(job.dtype, copy(y, sizes["y"])), (None, copy(signs, sizes["signs"]))]

    def bias_act(self, address, x, b, dy, ddx, y, order, threads):
        job = _BiasAct.from_address(address)
        item = np.dtype(ITEMS[job.dtype]).itemsize
        size = job.num_elements * item
        self.calls += [bytes([1]), bytes(job), bytes([order]), copy(x, size), copy(b, job.num_biases * item)]
        self.calls += [copy(dy, size), copy(ddx, size), bytes(size)]
        self.library.bias_act(address, x, b, dy, ddx, y, order, threads)
        self.results.append((job.dtype, copy(y, size)))

    def tiles(self, address, image, pixels, points, threads):
        job = winograd._Job.from_address(address)
        size = 4 * job.batch * job.image_strides[0]
        point = 4 * job.batch * job.channels * job.frames * job.tiles_y * job.tiles_x
        addresses = list(points)
        self.calls += [bytes([2]), bytes(job), copy(image, size), bytes(size) if pixels else None]
        self.calls += [copy(at, point) if pixels else bytes(point) for at in addresses]
        self.library.tiles(address, image, pixels, points, threads)
        found = [copy(pixels, size)] if pixels else [copy(at, point) for at in addresses]
        self.results += [(0, content) for content in found]


def copy(address, size):
    return None if address is None else ctypes.string_at(address, size)


def write_blocks(path, blocks):
    path.write_bytes(b"".join(struct.pack("q", -1) if b is None else struct.pack("q", len(b)) + b for b in blocks))


def read_blocks(path):
    content, at, blocks = path.read_bytes(), 0, []
    while at < len(content):
        (size,) = struct.unpack_from("q", content, at)
        blocks.append(None if size < 0 else content[at + 8 : at + 8 + size])
        at += 8 + max(size, 0)
    return blocks


# The same calls in every run: what differs between runs is for the other tests.
few = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@few
@given(data=st.data(), x=images(), f=filters(), up=factors, down=factors)
def resample_any(data, x, f, up, down):
    axes = spec.make_axes(x.shape[2:], size_of(f), up, down, data.draw(padded(x.shape[2:], size_of(f), up)))
    cpu_kernels.upfirdn2d(x, f, axes, False, 1.0)


@few
@given(data=st.data(), x=images(most=30), axes=st.tuples(*[st.sampled_from(NETWORK_AXES)] * 2))
def resample_as_networks(data, x, axes):
    up, down, taps = zip(*axes, strict=True)
    pads = data.draw(padded(x.shape[2:], taps, up))
    f = torch.ones(taps[1], taps[0])
    cpu_kernels.upfirdn2d(x, f, spec.make_axes(x.shape[2:], taps, up, down, pads), False, 1.0)


@few
@given(
    data=st.data(), x=images(), fu=filters(), fd=filters(), up=factors, down=factors, slope=st.sampled_from([0.2, -1])
)
def filtered_lrelu_and_back(data, x, fu, fd, up, down, slope):
    taps = [a + b - 1 for a, b in zip(size_of(fu), size_of(fd), strict=True)]
    pads = data.draw(padded(x.shape[2:], taps, up))
    first = spec.make_axes(x.shape[2:], size_of(fu), up, (1, 1), pads)
    second = spec.make_axes(first.out_size, size_of(fd), (1, 1), down)
    options = first, second, 4.0, 1.4, slope, 1.0, False, True
    y, signs = cpu_kernels.filtered_lrelu(x, fu, fd, x[0, :, 0, 0].contiguous(), *options)
    back = second.transposed(), first.transposed()
    cpu_kernels.filtered_lrelu_signed(y, signs, fd, fu, *back, 5.6, slope, True)


@few
@given(x=images(), act=st.sampled_from(list(activation_funcs)), dim=st.integers(0, 3), with_bias=st.booleans())
def bias_act_and_back(x, act, dim, with_bias):
    b = torch.ones(x.shape[dim], dtype=x.dtype) if with_bias else None
    options = dim, act, 0.2, 1.4, 0.8
    y = cpu_kernels.bias_act(x, b, *options)
    if act in literal.SLOPES:
        cpu_kernels.bias_act_grad(x, y, None, *options)
    else:
        cpu_kernels.bias_act_grad(x, x, b, *options)
        cpu_kernels.bias_act_grad2(x, x, x, b, *options)


@few
@given(
    size=st.tuples(*(st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.integers(1, 21), st.integers(1, 40))),
    pads=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def tiles_and_back(size, pads):
    x, padding = torch.ones(size), (0, *pads)
    y = winograd.correlate(x, torch.ones(2, size[1], 1, 3, 3), padding)
    winograd.weight_gradient(x, y, 1, padding)


@pytest.fixture(scope="module")
def recorded():
    cpu_kernels.load()
    library = cpu_kernels._library
    recorder = Recorder(library)
    cpu_kernels._library = recorder.as_library()
    try:
        for make_calls in (
            resample_any,
            resample_as_networks,
            filtered_lrelu_and_back,
            bias_act_and_back,
            tiles_and_back,
        ):
            make_calls()
        *tensors, up, down = layer()
        run_everything(tensors, (up, down))
    finally:
        cpu_kernels._library = library
    return recorder


@pytest.mark.parametrize(
    "num_bytes", [16, pytest.param(32, marks=pytest.mark.slow), pytest.param(64, marks=pytest.mark.slow)]
)
def test_sanitisers_find_nothing(recorded, num_bytes, tmp_path):
    program, replay = tmp_path / "replay", Path(__file__).with_name("cpu_replay.cpp")
    isa = cpu_kernels.INSTRUCTION_SETS[recorded.library.instruction_set][1:] if num_bytes > 16 else []
    flags = [*cpu_kernels.FLAGS, *SANITISERS, *isa, f"-DLONGTAKE_VECTOR_BYTES={num_bytes}"]
    command = [*cpu_kernels.find_compiler().command.split(), "-std=c++17", f"-I{cpu_kernels.FOLDER}", *flags]
    built = subprocess.run([*command, str(replay), "-o", str(program), "-lpthread"], capture_output=True, text=True)
    if built.returncode and "cannot find" in built.stderr:
        pytest.skip("this compiler comes without sanitisers")
    assert built.returncode == 0, built.stderr
    write_blocks(tmp_path / "calls", recorded.calls)
    run = subprocess.run([program, tmp_path / "calls", tmp_path / "results"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    compare(recorded.results, read_blocks(tmp_path / "results"))


def compare(expected, found):
    assert len(expected) == len(found) > 400
    for (dtype, a), b in zip(expected, found, strict=True):
        if dtype is None:
            assert (a is None) == (b is None) and (a is None or len(a) == len(b))
            continue
        a, b = (to_float(np.frombuffer(content, ITEMS[dtype]), dtype) for content in (a, b))
        tolerance = {0: 1e-4, 1: 1e-11, 2: 1e-2, 3: 5e-2}[dtype]
        different = np.abs(a - b) > tolerance * (1 + np.abs(a).max(initial=0))
        assert different.mean() < 0.01 if different.size > 1000 else not different.any()


def to_float(values, dtype):
    return (values.astype(np.uint32) << 16).view(np.float32) if dtype == 3 else values.astype(np.float64)
