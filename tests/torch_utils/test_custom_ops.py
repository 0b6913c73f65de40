"""The report on the compiled operators."""

import subprocess
import sys

import pytest

from torch_utils import custom_ops
from torch_utils.ops import doctor


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))


def test_the_report_accepts_correct_operators(repo):
    done = subprocess.run(
        [sys.executable, "-m", "torch_utils.custom_ops"], cwd=repo, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": good") >= 3 and "cuda: " in done.stdout and done.stderr == ""


def test_the_report_finds_a_wrong_operator(monkeypatch, capsys):
    wrong = doctor.probes()
    right = wrong["upfirdn2d"]
    wrong["upfirdn2d"] = lambda x, b, f, impl: right(x, b, f, impl) * (1 if impl == "ref" else 1.001)
    monkeypatch.setattr(doctor, "probes", lambda: wrong)
    with pytest.raises(SystemExit, match="1"):
        custom_ops.main([])
    assert capsys.readouterr().out.count("WRONG: expected at most 1e-05") == 1
