"""A step does not depend on the division of its batch into ranks and rounds; more rounds need less memory."""

import os
import subprocess
import sys

import pytest
import torch

from tests.ranks import run_ranks
from tests.training.longvideogan import tiny
from training.longvideogan.layers import collect_magnitudes

# What is compared between one process and two: gradients of every update, norm-relative, and weights after 3 steps.
VARIANTS = [(torch.float64, 1), (torch.float64, 2), (torch.float32, 1)]

RANK_SCRIPT = """
import sys, torch
from tests.training.longvideogan import test_rounds_and_ranks, tiny
from torch_utils import distributed
torch.set_num_threads(1)
distributed.init("cpu")
stage, path = sys.argv[1:]
half = tiny.BATCH // 2
first = distributed.get_rank() * half
found = [tiny.history(stage, *variant, first=first, last=first + half) for variant in test_rounds_and_ranks.VARIANTS]
torch.save(found, f"{path}/rank{distributed.get_rank()}.pt")
distributed.shutdown()
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", tiny.STAGES)
def test_two_ranks_are_one(stage, tmp_path):
    ranks = run_ranks(RANK_SCRIPT, stage, tmp_path, timeout=240)
    assert [code for code, *_ in ranks] == [0, 0], ranks
    both = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for (dtype, grad_accum), *together in zip(VARIANTS, *both, strict=True):
        alone = tiny.history(stage, dtype, grad_accum)
        assert len(alone["gradients"]) == 8  # G and D three times, R1 twice
        tolerance = 1e-10 if dtype == torch.float64 else 1e-4
        for found in together:
            distances = [
                tiny.distance(mine, theirs) for mine, theirs in zip(found["gradients"], alone["gradients"], strict=True)
            ]
            print(stage, dtype, grad_accum, f"gradients {max(distances):.2g}")
            assert max(distances) < tolerance
            assert found["state"] == alone["state"]
            if dtype == torch.float64:
                print(f"weights {tiny.largest_difference(found['weights'], alone['weights']):.2g}")
                assert tiny.largest_difference(found["weights"], alone["weights"]) < 1e-8
        assert tiny.largest_difference(together[0]["weights"], together[1]["weights"]) == 0
        names = [name for name in alone["weights"] if name.endswith(("magnitude_ema", "w_avg")) and "G." in name]
        assert names and all((alone["weights"][name] != 1).any() for name in names)


def freeze_magnitudes_in_one_round(system):
    """Let the single round of a D update do what several do: see one network, and move its averages at the end."""
    update = system.update_discriminator

    def update_with_collection(*args):
        with collect_magnitudes(system.G):
            return update(*args)

    system.update_discriminator = update_with_collection


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_rounds_do_not_change_gradients_or_averages(stage):
    one = tiny.make(stage)
    freeze_magnitudes_in_one_round(one)
    updates = tiny.record_gradients(one)
    stats = tiny.train(one, [1, 2])
    for grad_accum in (2, 4):
        system = tiny.make(stage, grad_accum=grad_accum)
        found = tiny.record_gradients(system)
        found_stats = tiny.train(system, [1, 2])
        distances = [tiny.distance(mine, theirs) for mine, theirs in zip(found, updates, strict=True)]
        print(
            stage,
            grad_accum,
            f"{max(distances):.2g} {tiny.largest_difference(tiny.weights(system), tiny.weights(one)):.2g}",
        )
        assert len(distances) == 5 and max(distances) < 1e-10
        assert tiny.largest_difference(tiny.weights(system), tiny.weights(one)) < 1e-8
        for mine, theirs in zip(found_stats, stats, strict=True):
            assert mine.keys() == theirs.keys()
            assert all(mine[name].mean().item() == pytest.approx(theirs[name].mean().item()) for name in theirs)


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_collected_averages_are_means_of_all_that_was_seen(stage):
    system = tiny.make(stage)
    batch = next(tiny.batches(system, 0)) if system.needs_condition else {}
    rngs = system.run.rngs("D-fake", 0)
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(name, module):  # what each tracker averages, told from outside
        if hasattr(module, "magnitude_ema"):
            name = f"{name}.magnitude_ema"
            module.register_forward_pre_hook(
                lambda _, args: seen.setdefault(name, []).append(args[0].square().flatten())
            )
        elif hasattr(module, "w_avg"):
            name = f"{name}.w_avg"
            module.register_forward_hook(lambda _m, _args, w: seen.setdefault(name, []).append(w))

    for name, module in system.G.named_modules():
        watch(name, module)
    before = {name: buffer.clone() for name, buffer in system.G.named_buffers()}
    with torch.no_grad():
        whole = system.fakes(batch, rngs)["video"]
        expected = {}
        for name, (values,) in seen.items():
            beta = 0.998 if name.endswith("w_avg") else 0.999
            expected[name] = values.mean(dim=0) * (1 - beta) + before[name] * beta
        with collect_magnitudes(system.G):
            for piece in (slice(0, 3), slice(3, 4)):  # the mean of the rounds' means would be another
                part = {name: value[piece] for name, value in batch.items()}
                video = system.fakes(part, system.run.rngs("D-fake", 0)[piece], update_emas=True)["video"]
                # Styles of super-resolution are scaled by their mean over the batch, which cancels but for an epsilon.
                assert torch.allclose(video, whole[piece], rtol=0, atol=1e-8)
            assert all(torch.equal(buffer, before[name]) for name, buffer in system.G.named_buffers())
    after = dict(system.G.named_buffers())
    assert len(expected) > 8 and all(not torch.equal(after[name], before[name]) for name in expected)
    assert all(torch.allclose(after[name], value, rtol=0, atol=1e-10) for name, value in expected.items())
    assert all(torch.equal(after[name], before[name]) for name in after.keys() - expected.keys())


def test_collected_averages_stay_when_a_round_fails():
    system = tiny.make("longvideogan-lres")
    before = tiny.weights(system)
    with pytest.raises(RuntimeError, match="stop"), torch.no_grad(), collect_magnitudes(system.G):
        system.fakes({}, system.run.rngs("D-fake", 0), update_emas=True)
        raise RuntimeError("stop")
    assert tiny.largest_difference(tiny.weights(system), before) == 0
    with torch.no_grad():
        system.fakes({}, system.run.rngs("D-fake", 0), update_emas=True)
    assert tiny.largest_difference(tiny.weights(system), before) > 0


class Saved:
    """A tensor that a graph keeps for its backward pass; `now` and `peak` are the bytes of all of them."""

    now = peak = 0

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
        Saved.now += tensor.nbytes
        Saved.peak = max(Saved.peak, Saved.now)

    def __del__(self):
        Saved.now -= self.tensor.nbytes


def peak_of_graphs(stage: str, grad_accum: int) -> int:
    """Return bytes that the graphs of a step with R1 keep at most."""
    system = tiny.make(stage, grad_accum=grad_accum)
    Saved.now = Saved.peak = 0
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        system.step(tiny.batches(system, 0), 0)
    return Saved.peak


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_more_rounds_keep_less(stage):
    peaks = [peak_of_graphs(stage, grad_accum) for grad_accum in (1, 2, 4)]
    print(stage, peaks)
    assert peaks[1] < 0.6 * peaks[0] and peaks[2] < 0.35 * peaks[0]


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_no_clip_is_made_before_its_round(stage):
    system = tiny.make(stage, grad_accum=4)
    sizes = []
    fakes = system.fakes
    system.fakes = lambda batch, rngs, **kwargs: sizes.append(len(rngs)) or fakes(batch, rngs, **kwargs)
    tiny.train(system, [1])
    assert sizes == [1] * 8  # four rounds of G and four of D


PEAK_SCRIPT = """
import re, sys, torch
from training import registry
from training.contract import Run
from training.longvideogan.presets import STAGES
stage, grad_accum = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
cls = registry.resolve(registry.spec(stage).system)
system = cls(cls.Options(**STAGES[stage]["toy"]["model"]), Run(batch=8, grad_accum=grad_accum))
batches = [
    {part.name: torch.zeros(8, 3, part.count, part.height, part.width) for part in spec.parts}
    for spec in system.batch_spec(1)
]
def peak():  # of this program alone, which getrusage does not tell from that of the one that started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
system.step(iter(batches), 1)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="only Linux tells the peak of a process")
@pytest.mark.parametrize("stage", tiny.STAGES)
def test_more_rounds_take_less_memory(stage, repo):
    def peak(grad_accum: int) -> int:
        command = [sys.executable, "-c", PEAK_SCRIPT, stage, str(grad_accum)]
        return int(subprocess.run(command, cwd=repo, check=True, capture_output=True, text=True).stdout)

    peaks = [peak(grad_accum) for grad_accum in (1, 2, 4)]
    print(stage, peaks)
    assert peaks[1] < 0.8 * peaks[0] and peaks[2] < 0.65 * peaks[0]
