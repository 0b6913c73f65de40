"""The choice of the implementation, and the warning if it is not the fastest one."""

import os
import subprocess
import sys
import types
import warnings

import pytest
import torch

from torch_utils.ops import backends
from torch_utils.ops.binaries import Unavailable

X = torch.zeros(1)


def fail():
    raise Unavailable("no compiler was found", "install g++")


@pytest.fixture
def no_kernels(monkeypatch):
    """Return a CPU on which nothing can be compiled."""
    kernels = types.SimpleNamespace(load=fail, supports=lambda dtype: dtype != torch.int32)
    monkeypatch.setitem(backends.KERNELS, "cpu", kernels)
    monkeypatch.setattr(backends, "_default", "auto")
    backends._load.cache_clear()
    yield
    backends._load.cache_clear()


@pytest.fixture
def kernels(no_kernels, monkeypatch):
    monkeypatch.setattr(backends.KERNELS["cpu"], "load", lambda: None)


def test_compiled_operators_are_taken_where_there_are_any(kernels):
    chosen = [backends.select_impl(impl, X) for impl in ("auto", "cpu", "cuda", "ref", "matmul")]
    assert chosen == ["compiled", "compiled", "compiled", "ref", "matmul"]
    assert backends.select_impl("auto", X.to(torch.int32)) == "matmul"
    assert backends.select_impl("auto", X.to("meta")) == "ref"


def test_what_cannot_be_compiled_is_said_once(no_kernels):
    with pytest.warns(UserWarning, match=r"no compiler was found; to fix it, install g\+\+") as caught:
        assert backends.select_impl("auto", X) == "matmul"
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select_impl("auto", X) == "matmul"


def test_what_is_demanded_must_be_there(no_kernels):
    with pytest.warns(UserWarning), pytest.raises(Unavailable, match="no compiler was found; install g++"):
        backends.select_impl("cpu", X)
    with backends.using("strict"), pytest.raises(Unavailable):
        backends.select_impl("auto", X)
    with pytest.raises(Unavailable, match="no compiled operator for torch.int32 on cpu"):
        backends.select_impl("cpu", X.to(torch.int32))


def test_a_default_holds_while_its_block_runs(kernels):
    with backends.using("ref"):
        assert [backends.select_impl(impl, X) for impl in ("auto", "cuda", "matmul")] == ["ref", "compiled", "matmul"]
    assert backends.select_impl("auto", X) == "compiled"
    with pytest.raises(ValueError, match="unknown impl 'fast': choose one of auto, ref"), backends.using("fast"):
        pass


def test_transforms_and_export_take_the_reference(kernels):
    seen = []
    torch.func.grad(lambda x: seen.append(backends.select_impl("auto", x)) or x.sum())(X)
    assert seen == ["ref"]


@pytest.mark.parametrize(("value", "expected"), [("ref", "ref"), ("matmul", "matmul"), ("", None)])
def test_the_environment_sets_the_default(repo, value, expected):
    script = "import torch; from torch_utils.ops import backends; print(backends.select_impl('auto', torch.zeros(1)))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=repo,
        env={**os.environ, backends.VARIABLE: value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected or (expected is None and done.stdout.strip() in ("compiled", "matmul"))


def test_a_wrong_variable_is_named(monkeypatch):
    monkeypatch.setattr(backends, "_default", "quick")
    with pytest.raises(ValueError, match="unknown TORCH_UTILS_OPS 'quick': choose one of"):
        backends.select_impl("auto", X)
