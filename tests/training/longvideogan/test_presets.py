"""Presets can be built, have the stated sizes, and take a step."""

import copy
import math
import re

import pytest
import torch

from training import registry
from training.contract import Run
from training.longvideogan import presets
from training.longvideogan.lres.discriminator import LowResDiscriminator
from training.longvideogan.lres.generator import LowResGenerator
from training.longvideogan.sres.discriminator import SuperResDiscriminator
from training.longvideogan.sres.generator import SuperResGenerator

LRES, SRES = presets.STAGES

# Trainable parameters of lres G and D, and of sres G and D.
NUM_PARAMETERS = {
    "published": (83_215_939, 46_424_609, 27_169_940, 23_997_825),
    "labdoom-small": (3_014_051, 3_235_153, 1_998_609, 2_873_953),
    "labdoom-tiny": (761_187, 620_689, 366_484, 374_113),
    "toy": (645_651, 620_689, 366_484, 374_113),
}
SMALL = [(stage, name) for stage in presets.STAGES for name in ("labdoom-small", "labdoom-tiny", "toy")]


def make(stage, name, **changes):
    row = presets.STAGES[stage][name]
    cls = registry.resolve(registry.spec(stage).system)
    return cls(cls.Options(**copy.deepcopy(row["model"])), Run(**{"batch": row["batch"], **changes}))


def num_parameters(*modules):
    return tuple(sum(parameter.numel() for parameter in module.parameters()) for module in modules)


def test_presets_are_the_published_configurations():
    own = ["labdoom-small", "labdoom-tiny"]
    assert list(presets.LRES) == ["default", "horseback-lres", "biking-lres", *own, "shootout", "toy"]
    assert list(presets.SRES) == ["default", "horseback-sres", "biking-sres", *own, "toy"]
    expected = {LRES: (64, 2, 1.0, 100_000), SRES: (32, 1, 1.0, 275_000)}
    rates = {LRES: (0.003, 0.002, 0.99), SRES: (0.003, 0.003, 0.99)}
    for stage, rows in presets.STAGES.items():
        for name in list(rows)[:3]:
            row = rows[name]
            options = registry.resolve(registry.spec(stage).system).Options(**row["model"])
            assert (row["batch"], row["grad_accum"], options.gamma, row["steps"]) == expected[stage]
            assert (options.g_lr, options.d_lr, options.beta2) == rates[stage]
            assert (options.r1_interval, options.ema_beta, options.ema_rampup_steps) == (16, 0.99985, 25_000)
            assert options.generator == options.discriminator == {}


def test_stated_sizes_are_those_of_the_networks():
    published = [LowResGenerator, LowResDiscriminator, SuperResGenerator, SuperResDiscriminator]
    found = {"published": sum((num_parameters(network()) for network in published), ())}
    for name in ("labdoom-small", "labdoom-tiny", "toy"):
        systems = [make(stage, name) for stage in presets.STAGES]
        found[name] = sum((num_parameters(system.G, system.D) for system in systems), ())
    assert found == NUM_PARAMETERS
    assert presets.__doc__ is not None
    for name, counts in NUM_PARAMETERS.items():
        stated = re.search(rf"\| {name} +\|(.*)\|", presets.__doc__)
        assert stated is not None
        assert [float(cell) for cell in stated[1].split("|")] == [round(count / 1e6, 2) for count in counts]
    assert all(count <= 4_000_000 for count in NUM_PARAMETERS["labdoom-small"])


def test_small_recipe_has_long_clips_at_the_published_sizes():
    lres, sres = (registry.resolve(registry.spec(stage).system) for stage in presets.STAGES)
    lres = lres.Options(**presets.LRES["labdoom-small"]["model"])
    sres = sres.Options(**presets.SRES["labdoom-small"]["model"])
    assert lres.num_frames >= 64
    assert (lres.height, lres.width) == (sres.lres_height, sres.lres_width) == (36, 64)
    assert (sres.height, sres.width) == (144, 256)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "name"), SMALL)
def test_small_rows_take_a_step(stage, name):
    system = make(stage, name, batch=1)
    before = [parameter.clone() for module in (system.G, system.D) for parameter in module.parameters()]
    batches = [
        {part.name: torch.rand(1, 3, part.count, part.height, part.width) * 2 - 1 for part in spec.parts}
        for spec in system.batch_spec(0)
    ]
    stats = system.step(iter(batches), 0)
    assert all(value.isfinite().all() for value in stats.values()) and stats["progress/nonfinite_gradients"] == 0
    assert all(stats[f"progress/{name}_grad_norm"].item() > 0 for name in ("G", "D", "R1"))
    after = [parameter for module in (system.G, system.D) for parameter in module.parameters()]
    moved = [not torch.equal(*pair) for pair in zip(before, after, strict=True)]
    assert sum(moved) > 0.9 * len(moved) and math.isfinite(sum(p.sum().item() for p in after))
