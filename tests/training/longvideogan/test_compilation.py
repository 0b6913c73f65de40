"""Compiled parts of the networks: equal values, few graphs, R1 in eager mode, and behaviour without a compiler.

Quick tests trace the networks, but run their graphs by PyTorch itself (`Programs`); Inductor, which generates kernels,
has one quick test and those marked slow.
"""

import copy
import itertools
import os
import pickle
import re
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn

from tests.training.longvideogan import tiny
from tests.training.longvideogan.tiny import video
from torch_utils import compilation
from training.checkpoint import load_network, save_network
from training.config import TrainOptions, check_changes, to_dict
from training.longvideogan.gan import r1_penalty
from training.longvideogan.lres.generator import GeneratorBlock
from training.longvideogan.sampling import LowResSampler, SuperResSampler

TOLERANCE = 1e-5  # of the norm of a gradient or a frame; sums are taken in another order


class Programs:
    """A backend that counts: `made` graphs, and how often they `ran`; they run by `kind`, a backend of PyTorch."""

    def __init__(self, kind: str):
        self.kind, self.made, self.ran = kind, 0, 0

    def __call__(self, graph, inputs):
        import torch._dynamo

        self.made += 1
        program = torch._dynamo.lookup_backend(self.kind)(graph, inputs)

        def run(*args):
            self.ran += 1
            return program(*args)

        return run


@pytest.fixture(autouse=True)
def nothing_given_up(monkeypatch):
    """Begin each test without programs and without a reason to do without them."""
    import torch._dynamo

    torch._dynamo.reset()
    monkeypatch.setattr(compilation, "_problem", None)


@pytest.fixture
def programs(monkeypatch):
    """Set the backend: programs("eager") or programs("aot_eager"), which has backward passes as Inductor has."""

    def use(kind: str) -> Programs:
        monkeypatch.setattr(compilation, "BACKEND", counting := Programs(kind))
        return counting

    return use


def gradients(function, *inputs: Tensor, network: nn.Module, compiled: bool) -> dict[str, Tensor]:
    """Return the result and the gradients of inputs and parameters, of a mean square."""
    network.requires_grad_(True).zero_grad()
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    with compilation.compiled(compiled):
        result = function(*inputs)
    result.square().mean().backward()
    grads = {name: p.grad for name, p in network.named_parameters()}
    grads |= {f"input {i}": x.grad for i, x in enumerate(inputs)}
    return {"result": result.detach()} | {name: grad.clone() for name, grad in grads.items() if grad is not None}


def regions(seeded, stage: str):
    """Return every region of a stage with its network: small, and of sizes that are no multiples of anything."""
    torch.manual_seed(0)
    system = tiny.make(stage, torch.float32)
    if stage == "longvideogan-lres":
        block, x, w, gain = system.G.temporal_layers[1], seeded(0, 2, 6, 5, 4, 4), seeded(1, 2, 8, 5), torch.tensor(0.8)
        assert isinstance(block, GeneratorBlock)
        yield block, lambda x, w: block.hidden(x, w, gain, pad_time=False), (x, w)
        yield block, lambda x, h, w: block.residual(x, gain, h, w, gain), (x, seeded(2, 2, 6, 5, 4, 4), w)
        yield block, lambda y: block.finish(y, (8, 7)), (seeded(3, 2, 6, 5, 4, 4),)
        yield system.D, system.D, (seeded(4, 1, 3, 16, 16, 16),)
    else:
        layers = system.G.SG3.synthesis
        layer = layers.get_submodule(layers.layer_names[2])
        canvas = system.G.SG3.canvases[2]
        x, w = seeded(0, 4, layer.weight.shape[1], canvas[1], canvas[0]), seeded(1, 2, 6)
        yield layer, lambda x, w: layer.filtered(x, w, torch.float32), (x, w)
        yield system.D, system.D, (seeded(2, 1, 3, 2, 18, 32), seeded(3, 1, 3, 2, 36, 64))


def check_regions(seeded, stage: str) -> None:
    for network, function, inputs in regions(seeded, stage):
        expected = gradients(function, *inputs, network=network, compiled=False)
        found = gradients(function, *inputs, network=network, compiled=True)
        assert len(expected) > len(inputs) + 1
        assert tiny.distance(found, expected) < TOLERANCE


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_compiled_regions_have_the_gradients_of_eager_ones(stage, seeded, programs):
    counting = programs("aot_eager")
    check_regions(seeded, stage)
    assert counting.made == counting.ran == sum(1 for _ in regions(seeded, stage))
    assert compilation._problem is None


@pytest.mark.slow
@pytest.mark.parametrize("stage", tiny.STAGES)
def test_inductor_has_the_gradients_of_eager_regions(stage, seeded):
    from torch._dynamo.utils import counters

    counters.clear()
    check_regions(seeded, stage)
    assert counters["stats"]["unique_graphs"] == sum(1 for _ in regions(seeded, stage))
    assert not counters["graph_break"] and compilation._problem is None


@pytest.mark.slow
def test_inductor_has_the_gradients_of_an_eager_layer(seeded):
    *_, (network, function, inputs) = itertools.islice(regions(seeded, "longvideogan-lres"), 3)
    expected = gradients(function, *inputs, network=network, compiled=False)
    assert tiny.distance(gradients(function, *inputs, network=network, compiled=True), expected) < TOLERANCE
    assert compilation._problem is None


def steps_of(stage: str, compiles: bool, steps, counting: Programs | None = None):
    """Return gradients of every update and the weights at the end; if counted, also programs of each step."""
    system = tiny.make(stage, torch.float32, batch=2, seed=3)
    system.compiling = compiles
    updates, counts = tiny.record_gradients(system), []
    for step in steps:
        before = (counting.made, counting.ran) if counting else (0, 0)
        tiny.train(system, [step])
        counts.append((counting.made - before[0], counting.ran - before[1]) if counting else (0, 0))
    return system, updates, counts


def check_steps(stage: str, steps, counting: Programs | None = None, tolerance: float = TOLERANCE) -> None:
    """Compiled steps equal eager ones; all programs are made in the first of them, and R1 has none."""
    eager, expected, _ = steps_of(stage, False, steps)
    system, found, counts = steps_of(stage, True, steps, counting)
    assert compilation._problem is None
    assert len(found) == len(expected) > 2 * len(steps)
    assert max(tiny.distance(a, b) for a, b in zip(found, expected, strict=True)) < tolerance
    assert tiny.distance(tiny.weights(system), tiny.weights(eager)) < tolerance
    if counting is not None:
        made, ran = zip(*counts, strict=True)
        assert made[0] > 0 and not any(made[1:])
        # Of these, every other one has an R1 update too: it ran no program.
        assert len(set(ran)) == 1 and ran[0] >= made[0]


def test_training_steps_are_compiled_but_for_r1(programs):
    check_steps("longvideogan-sres", range(3), programs("eager"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", tiny.STAGES)
@pytest.mark.parametrize("kind", ["aot_eager", "inductor"])
def test_training_steps_of_both_stages_are_compiled_but_for_r1(stage, kind, programs):
    check_steps(stage, range(3), programs(kind), tolerance=3e-4 if kind == "inductor" else TOLERANCE)


def test_the_second_derivative_of_a_program_is_refused(programs, seeded):
    """Why R1 is not compiled; were it, training would stop rather than go wrong."""
    programs("aot_eager")
    weight, video = torch.ones(3, requires_grad=True), seeded(0, 1, 3, 2, 4, 4).requires_grad_()
    square = compilation.region(lambda video: (video * weight[:, None, None, None]).square().sum())
    with compilation.compiled(), pytest.raises(RuntimeError, match="double backward"):
        r1_penalty(square(video), video).sum().backward()
    with compilation.compiled(), compilation.compiled(False):  # as a step does it
        r1_penalty(square(video), video).sum().backward()
    assert weight.grad is not None and weight.grad.norm() > 0


# The last piece has five frames each time, or is as long as the others.
@pytest.mark.parametrize(
    ("kind", "lengths"), [("eager", (16, 32)), pytest.param("inductor", (21, 45, 61), marks=pytest.mark.slow)]
)
def test_pieces_of_a_video_share_their_programs(kind, lengths, tiny_lres, tiny_sres, seeded, programs):
    counting, clip = programs(kind), seeded(0, 1, 3, 60, 18, 32)
    sources = (
        (LowResSampler(tiny_lres, block=8), None),
        (SuperResSampler(tiny_sres, block=4), lambda s, n: clip[:, :, :n]),
    )
    for source, condition in sources:
        made = []
        for num_frames in lengths:
            with compilation.compiled(False):
                expected = video(source, [0], 0, num_frames, condition)
            with compilation.compiled():
                found = video(source, [0], 0, num_frames, condition)
            assert (found - expected).norm() <= TOLERANCE * expected.norm()
            made.append(counting.made)
        assert made[0] > 0 and len(set(made)) == 1
        counting.made = 0
    assert compilation._problem is None


def test_networks_are_unaware_of_compilation(programs, tiny_sres, seeded, tmp_path):
    programs("eager")
    state, names = pickle.dumps(tiny_sres), list(tiny_sres.state_dict())
    inputs = seeded(0, 1, 3, 9, 18, 32), seeded(1, 1, 16)
    with compilation.compiled():
        frames = tiny_sres(*inputs)
        twin = copy.deepcopy(tiny_sres)
        assert torch.equal(twin(*inputs), frames)
    assert pickle.dumps(tiny_sres) == state and list(tiny_sres.state_dict()) == names
    save_network(tiny_sres, tmp_path / "network.pkl")
    assert torch.equal(load_network(str(tmp_path / "network.pkl"), "cpu")(*inputs), frames)


def test_a_run_may_be_continued_with_and_without():
    options = [TrainOptions("runs", "data", "longvideogan-lres", compile=compiles) for compiles in (False, True)]
    old = to_dict(options[0])
    del old["compile"]  # a run that was begun before there was such an option
    for stored, wanted in itertools.product([*map(to_dict, options), old], options):
        assert check_changes(stored, wanted, "run") == []


@pytest.fixture
def layer():
    """Return a region of a few numbers, and what it makes of ones."""
    return compilation.region(lambda x: x.sin() + 1), torch.ones(3).sin() + 1


def test_what_cannot_be_compiled_is_said_once_and_goes_on(layer, monkeypatch):
    function, expected = layer

    def backend(graph, inputs):
        raise RuntimeError("the linker is out of ideas")

    monkeypatch.setattr(compilation, "BACKEND", backend)
    with (
        compilation.compiled(),
        pytest.warns(UserWarning, match="the linker is out of ideas.* goes on without") as seen,
    ):
        assert torch.equal(function(torch.ones(3)), expected)
    assert len(seen) == 1
    with compilation.compiled(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(function(torch.ones(3)), expected)


def test_too_many_shapes_are_said_once_and_go_on(layer, programs, monkeypatch):
    function, _ = layer
    counting = programs("eager")
    monkeypatch.setattr(compilation, "MAX_PROGRAMS", 3)
    with compilation.compiled(), pytest.warns(UserWarning, match="more than 3 shapes; use fewer sizes"):
        for size in range(2, 8):
            assert function(torch.ones(size)).shape == (size,)
    assert counting.made == 3


def test_what_fails_in_a_program_is_not_taken_for_a_fault_of_the_compiler(layer, monkeypatch):
    function, _ = layer

    def backend(graph, inputs):
        def run(*args):
            raise torch.OutOfMemoryError("the GPU is full")

        return run

    monkeypatch.setattr(compilation, "BACKEND", backend)
    with compilation.compiled(), pytest.raises(torch.OutOfMemoryError, match="the GPU is full"):
        function(torch.ones(3))
    assert compilation._problem is None


def test_causes_have_remedies():
    from torch._inductor import exc

    for error, cause, remedy in [
        (exc.InvalidCxxCompiler("no-such-compiler"), "no working C..? compiler", r"install g\+\+"),
        (exc.CppCompileError(["g++"], "fatal error: Python.h: No such file"), "headers of this Python", "python3-dev"),
        (exc.TritonMissing(None), "Triton, which compiles for GPUs, is missing", "install triton"),
        (exc.CppCompileError(["g++"], "main.cpp:3: error: no room"), "error: no room", "for details"),
        (NotImplementedError("this moon\nlong"), "NotImplementedError: this moon", "for details"),
    ]:
        sentence = compilation.explain(exc.InductorError(error, None))
        assert re.fullmatch(rf"[^;\n]*{cause}[^;\n]*; [^;\n]*{remedy}[^;\n]*", sentence), sentence


NO_COMPILER = """
import generate, train_lres
from click.testing import CliRunner
for command, arguments in (
    (generate.main, ["--outdir=out", "--seed=0", "--lres=nothing.pkl", "--device=cpu"]),
    (train_lres.main, ["--dataset=nothing", "--preset=toy", "--device=cpu"]),
):
    result = CliRunner(env={"COLUMNS": "400"}).invoke(command, [*arguments, "--compile"])
    print(result.exit_code, " ".join(result.output.split()))
"""


def test_without_a_compiler_the_option_is_refused_in_one_sentence(repo, tmp_path):
    environment = os.environ | {
        "CXX": "no-such-compiler",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(repo),
    }
    command = [sys.executable, "-c", NO_COMPILER]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line[:2] for line in lines] == ["2 ", "1 "], done.stdout
    for line in lines:
        assert "nothing can be compiled here: there is no working C++ compiler; install g++" in line
        assert ", or leave " in line and "Traceback" not in line
    assert not (tmp_path / "out").exists() and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_here_something_can_be_compiled():
    assert compilation.why_not("cpu") is None
    for stage in tiny.STAGES:
        system = tiny.make(stage, torch.float32)
        system.set_compile(True)
        assert system.compiling
        system.set_compile(False)
        assert not system.compiling
