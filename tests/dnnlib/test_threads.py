"""Threads of operators sleep while they wait, if others use the cores."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dnnlib import threads

ROOT = Path(__file__).parents[2]


def choice(busy: float, **environment: str) -> tuple[bool, str]:
    """Whether threads were told to sleep, and what OpenMP then says, in a new process that imports PyTorch."""
    script = f"from dnnlib import threads\nprint(threads.share_cores({busy}))\nimport torch"
    kept = {name: value for name, value in os.environ.items() if name not in (*threads.CHOSEN, "OMP_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT,
        env={**kept, "OMP_DISPLAY_ENV": "verbose", **environment},
    )  # fmt: skip
    return done.stdout.strip() == "True", done.stderr


def test_openmp_follows_the_choice():
    """It reads the environment when PyTorch is imported, not when Python starts."""
    (told, busy), (told_free, free) = choice(90), choice(10)
    assert told and not told_free
    if "GOMP_SPINCOUNT" not in busy:
        pytest.skip("this build of PyTorch has an OpenMP that does not say how it waits")
    assert "GOMP_SPINCOUNT = '0'" in busy and "GOMP_SPINCOUNT = '0'" not in free


@pytest.mark.parametrize(
    "environment", [{"OMP_NUM_THREADS": "1"}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "5"}]
)
def test_what_the_user_has_chosen_stays(environment):
    told, found = choice(90, **environment)
    assert not told and "GOMP_SPINCOUNT = '0'" not in found


@pytest.mark.parametrize("script", ["train.py", "generate.py", "calc_metrics.py", "view.py"])
def test_scripts_choose_before_they_import_pytorch(script):
    """A script that imports PyTorch at its top would choose too late."""
    code = (
        "import runpy, sys\nsys.argv[0] = 'x'\nrunpy.run_path(sys.argv[1], run_name='y')\nprint('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, script], capture_output=True, text=True, check=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.strip() == "False"
    source = (ROOT / script).read_text()
    assert 0 < source.index("    threads.share_cores()\n    import torch\n")
