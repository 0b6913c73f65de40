"""A copy of the repository, made of links, with additional registered systems, as in docs/adding_a_system.md."""

import contextlib
import glob
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
TIMEOUT_SEC = 240


class Overlay:
    """A folder like the repository, with more files and more lines in training/registry.py; runs its scripts."""

    def __init__(self, root: Path, files: dict[str, str], lines: str) -> None:
        self.root = root
        root.mkdir()
        for path in REPO.iterdir():
            if path.suffix == ".py":  # a script that is a link would look for its modules where it is linked from
                shutil.copy(path, root / path.name)
            elif path.is_dir() and not path.name.startswith(".") and path.name not in ("training", "outputs"):
                (root / path.name).symlink_to(path)
        (root / "training").mkdir()
        for path in (REPO / "training").iterdir():
            (root / "training" / path.name).symlink_to(path)
        registry = root / "training" / "registry.py"
        text = registry.read_text()
        registry.unlink()
        registry.write_text(text + "\n" + lines + "\n")
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(content)

    def command(self, *words: object) -> tuple[list[str], dict[str, str]]:
        """Return the words of a command, such as "train.py", NAME or "-m", MODULE; and its environment."""
        environment = {**os.environ, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"}
        return [sys.executable, *map(str, words)], environment

    def run(self, *words: object, fails: bool = False) -> str:
        """Return what a command prints; it must end well, or with `fails` not, in one sentence."""
        command, environment = self.command(*words)
        done = subprocess.run(
            command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SEC
        )
        output = done.stdout + done.stderr
        assert (done.returncode != 0) == fails, output
        assert "Traceback" not in output or not fails, output
        return output

    @contextlib.contextmanager
    def serving(self, *words: object) -> Iterator[str]:
        """Run a command that serves a page until it is told to stop; give the page's URL."""
        command, environment = self.command(*words)
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, cwd=self.root, env={**environment, "PYTHONUNBUFFERED": "1"}, **pipes)
        assert process.stdout is not None
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if found := re.search(r"http://\S+", line):
                    break
            else:
                raise AssertionError("".join(lines))
            yield found[0]
            process.send_signal(signal.SIGINT)
            output = process.stdout.read()
            assert process.wait(TIMEOUT_SEC) == 0 and "Next: python generate.py" in output, output
        finally:
            process.kill()
            process.wait()

    def kill_when(self, path: Path, *words: object) -> None:
        """Start a command and kill it, with all that it has started, as soon as there is something at a path."""
        command, environment = self.command(*words)
        with open(self.root / "killed.txt", "w") as file:
            process = subprocess.Popen(
                command, cwd=self.root, env=environment, stdout=file, stderr=file, start_new_session=True
            )
            end = time.monotonic() + TIMEOUT_SEC
            try:
                while not glob.glob(str(path)):
                    assert process.poll() is None, (self.root / "killed.txt").read_text()
                    assert time.monotonic() < end, "it took too long"
                    time.sleep(0.01)
            finally:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
