"""Commands restart themselves without glibc's caches of small blocks, once, and change nothing else."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from torch_utils import thread_cache

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, os, sys
from torch_utils import thread_cache
thread_cache.restart_without()
given = open("/proc/self/environ").read().split("\\0")
print(json.dumps([sys.argv[1:], sys.flags.dev_mode, "GLIBC_TUNABLES=glibc.malloc.tcache_count=0" in given,
                  [name for name in (thread_cache.RESTARTED, "GLIBC_TUNABLES") if name in os.environ]]))
"""
on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another one")


def run(tmp_path: Path, *arguments: str, **variables: str) -> list:
    """Return the script's arguments, a flag of Python's, whether it was restarted, and variables that are left."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    left_out = (*thread_cache.CHOSEN, thread_cache.SWITCH)
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {"PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-X", "dev", *(arguments or [str(script), "--name", "two words"])]
    output = subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    return json.loads(output)


@on_glibc
def test_a_script_runs_once_without_the_caches_and_with_the_same_arguments(tmp_path):
    assert run(tmp_path) == [["--name", "two words"], True, True, []]


@on_glibc
@pytest.mark.parametrize("variables", [{"MALLOC_TOP_PAD_": "65536"}, {thread_cache.SWITCH: "0"}])
def test_what_the_user_chose_stays(tmp_path, variables):
    assert run(tmp_path, **variables) == [["--name", "two words"], True, False, []]


@on_glibc
def test_tunables_of_the_user_stay(tmp_path):
    chosen = "glibc.malloc.tcache_count=3"
    assert run(tmp_path, GLIBC_TUNABLES=chosen) == [["--name", "two words"], True, False, ["GLIBC_TUNABLES"]]


@on_glibc
def test_a_script_inside_another_program_does_not_replace_it(tmp_path):
    """As by a notebook's %run: the process goes on afterwards."""
    script = str(tmp_path / "script.py")
    program = f"import runpy, sys; sys.argv = ['script.py']; runpy.run_path({script!r}, {{}}, '__main__')"
    assert run(tmp_path, "-c", program) == [[], True, False, []]


@pytest.mark.parametrize("name", ["generate.py", "view.py"])
def test_long_running_commands_begin_with_it(name):
    lines = (ROOT / name).read_text().split('"""', 2)[2].splitlines()
    code = [line for line in lines if line and not line.startswith("from __future__")]
    assert code[:3] == [
        "from torch_utils import thread_cache",
        'if __name__ == "__main__":',
        "    thread_cache.restart_without()",
    ]
