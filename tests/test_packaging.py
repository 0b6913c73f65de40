"""The project is used from a clone: a wheel of half the project is refused."""

import subprocess
import sys

BUILD = "import sys; from hatchling import build; print(build.build_wheel(sys.argv[1]))"


def test_a_wheel_is_refused_in_one_sentence(repo, tmp_path):
    done = subprocess.run([sys.executable, "-c", BUILD, tmp_path], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert done.stderr.count("\n") == 1 and "used from a clone" in done.stderr and "make setup" in done.stderr
