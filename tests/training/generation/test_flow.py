"""Flow matching: published numbers of the path, the grids and the solvers; orders of convergence."""

import re

import numpy as np
import pytest
import torch

from tests import golden_files
from training.generation import flow


def search(pattern, text):
    match = re.search(pattern, text)
    assert match is not None, text
    return match


@golden_files.entries("river", "path*")
def test_path(entry, golden):
    data, noise = golden_files.normals(_each_with_shape(entry["input"]), golden["about"]["seed"])
    t = torch.tensor(_numbers(entry["input"], "t")).view(-1, *[1] * (data.ndim - 1))
    sigma = float(search(r"sigma ([\d.e-]+)", entry["input"])[1])
    x_t = flow.interpolate(noise, data, t, sigma)
    golden_files.check(x_t, entry["x_t"], single=5e-5)
    golden_files.check(flow.velocity(noise, data, sigma), entry["target_closed_form"], single=5e-5)
    quotient = (data - (1 - sigma) * x_t) / (1 - (1 - sigma) * t)
    golden_files.check(quotient, entry["target"], single=5e-5)
    errors = (quotient - flow.velocity(noise, data, sigma)).abs().flatten(1).amax(1)
    np.testing.assert_allclose(errors, entry["max_abs_difference_per_t"], atol=5e-5)


def _each_with_shape(text):
    """Write "x1=RS(5), x0=RS(6) standard_normal(S)" as terms that each draw."""
    shape = search(r"standard_normal(\(\(.*?\)\))", text)[1]
    return re.sub(r"(RS\(\d+\))(?!\.)", rf"\1.standard_normal{shape}", text)


def _numbers(text, name):
    return [float(part) for part in search(rf"\b{name}=\[(.*?)\]", text)[1].split(",")]


@golden_files.entries("river", "integrators*")
def test_solvers(entry, golden):
    (start,) = re.findall(r"y\([\d.]+\)=\[(.*?)\]", entry["input"])
    begin, end, points = map(float, search(r"linspace\(([\d.]+),([\d.]+),(\d+)\)", entry["input"]).groups())
    assert end == 1
    for solver in entry.keys() - {"input"}:
        calls = 0

        def field(t, y):
            nonlocal calls
            calls += 1
            return torch.stack([y[1] + t, -y[0] * (1 + t)])

        y = torch.tensor([float(part) for part in start.split(",")])
        grid = flow.time_grid(int(points), begin)
        found = flow.integrate(field, y, grid, solver)
        golden_files.check(found, entry[solver]["y"], single=5e-5, where=solver)
        assert calls == entry[solver]["calls"] == flow.evaluations(solver, int(points) - 1)


@golden_files.entries("river", "grid_points*")
def test_published_grids(entry, golden):
    for name, points in entry.items():
        steps, warm_start = search(r"^steps(\d+)_warm([\d.]+)$", name).groups()
        assert flow.published_points(int(steps), float(warm_start)) == points


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("heun3", 3), ("rk4", 4)])
def test_orders(solver, order):
    """Halving the step divides the error by two to the order."""
    errors = []
    for steps in (8, 16):
        grid = np.linspace(0, 1, steps + 1).tolist()
        y = flow.integrate(lambda t, y: -y * (1 + t), torch.ones((), dtype=torch.float64), grid, solver)
        errors.append(abs(float(y) - np.exp(-1.5)))
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


def test_straight_paths_are_integrated_exactly():
    noise, data = torch.randn(2, 3), torch.randn(2, 3)
    v = flow.velocity(noise, data)
    for solver in flow.SOLVERS:
        for start in (0.0, 0.3):
            begin = flow.interpolate(noise, data, start)
            found = flow.integrate(lambda t, y: v, begin, flow.time_grid(4, start), solver)
            torch.testing.assert_close(found, data, atol=1e-5, rtol=1e-5)


def test_steps_may_begin_with_a_call():
    begun = []
    flow.integrate(lambda t, y: y, torch.ones(1), flow.time_grid(5), "rk4", lambda: begun.append(1))
    assert len(begun) == 4
    one = torch.ones(1)
    assert flow.integrate(lambda t, y: y, one, flow.time_grid(1), "rk4") is one


def test_intervals_are_rounded_not_cut():
    assert [flow.num_intervals(10, w) for w in (0, 0.1, 0.8, 0.9, 0.99)] == [10, 9, 2, 1, 1]
    with pytest.raises(ValueError, match="no point"):
        flow.time_grid(0, 0.9)


def test_laws_of_time():
    rng = np.random.RandomState(0)
    uniform = [flow.draw_time(rng) for _ in range(2000)]
    middle = [flow.draw_time(rng, "logit-normal") for _ in range(2000)]
    assert 0 <= min(uniform) and max(uniform) < 1 and 0 < min(middle) and max(middle) < 1
    assert np.std(uniform) == pytest.approx(12**-0.5, rel=0.05)
    assert np.std(middle) == pytest.approx(0.2083, rel=0.05)  # of the logistic function of a normal number
