"""A lock has one holder at a time, is freed when the holder dies, and its file is deleted by the last one."""

import os
import subprocess
import sys
import time

from dnnlib.locks import locked, open_locked

COUNT = """
import sys
from pathlib import Path
from dnnlib.locks import locked
folder = Path(sys.argv[1])
for _ in range(200):
    with locked(folder / "lock"):
        number = int((folder / "number").read_text())
        (folder / "number").write_text(str(number + 1))
"""
HOLD = """
import sys, time
from pathlib import Path
from dnnlib.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_one_at_a_time_and_no_file_stays(tmp_path):
    (tmp_path / "number").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", COUNT, str(tmp_path)]) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert (tmp_path / "number").read_text() == "600"
    assert os.listdir(tmp_path) == ["number"]


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        holder.kill()
        holder.wait()
    begin, told = time.monotonic(), []
    with open_locked(path, waiting=lambda: told.append("waiting")) as file:
        assert os.path.samestat(os.fstat(file.fileno()), path.stat())
    assert not told and time.monotonic() - begin < 5
    with locked(path):
        pass
    assert os.listdir(tmp_path) == []
