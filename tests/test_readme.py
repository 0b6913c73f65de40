"""Every command of the README parses, and the tour runs as it is printed."""

import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest


def blocks(repo):
    return re.findall(r"```bash\n(.*?)```", (repo / "README.md").read_text(), re.DOTALL)


def commands(repo):
    """(module, arguments) of each Python command, variables filled in."""
    found, variables = [], {}
    for line in "\n".join(blocks(repo)).splitlines():
        words = shlex.split(line, comments=True)
        if words and re.fullmatch(r"[A-Z]+=.*", words[0]):
            name, value = words[0].split("=", 1)
            variables[f"${name}"] = value
            continue
        for name, value in variables.items():
            words = [word.replace(name, value) for word in words]
        if words[:1] == ["torchrun"]:
            words = ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]]
        if words[:1] == ["python"]:
            module, arguments = (words[2], words[3:]) if words[1] == "-m" else (words[1][:-3], words[2:])
            found.append((module, arguments))
    return found


def test_every_command_parses(repo, tmp_path, monkeypatch):
    found = commands(repo)
    assert {module for module, _ in found} >= {"train_lres", "train_sres", "generate", "calc_metrics"}
    monkeypatch.chdir(tmp_path)
    for folder in ("my_videos", "data/mine"):
        (tmp_path / folder).mkdir(parents=True)
    for module, arguments in found:
        command = importlib.import_module(module).main
        command.make_context(module, list(arguments))


def test_targets_and_files_exist(repo):
    text = (repo / "README.md").read_text()
    makefile = (repo / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(blocks(repo)), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    for path in re.findall(r"`((?:docs|training|tests)/[\w/.]+)`", text) + re.findall(r"\]\((docs/[^)#]+)", text):
        assert (repo / path).exists(), path


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tour_runs_as_printed(repo, tmp_path):
    (tour,) = [block for block in blocks(repo) if "make_dataset_from_vizdoom" in block]
    for entry in repo.iterdir():
        if entry.name not in {"runs", "outputs", "data", ".git"}:
            (tmp_path / entry.name).symlink_to(entry)
    environment = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", tour], cwd=tmp_path, check=True, env=environment)
    made = {path.name for path in (tmp_path / "outputs").iterdir()}
    assert {"seed=1_len=120_sres.mp4", "seed=1_len=120_sheet.png"} <= made
