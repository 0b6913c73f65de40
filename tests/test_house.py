"""Rules of the repository: what may import what, which lists must agree, what the command line promises."""

import ast
import importlib
import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from training import registry

PACKAGES = ["dnnlib", "torch_utils", "training", "dataset_tools", "metrics", "explorer", "runs", "benchmarks"]
SCRIPTS = ["train", "train_lres", "train_sres", "generate", "calc_metrics", "view"]
SHARED_SCRIPTS = ["train", "generate", "calc_metrics", "view"]
COMMANDS = {
    "train": "main",
    "train_lres": "main",
    "train_sres": "main",
    "generate": "main",
    "calc_metrics": "main",
    "view": "main",
    "dataset_tools.make_dataset_from_vizdoom": "main",
    "dataset_tools.make_dataset_from_videos": "main",
    "dataset_tools.make_dataset_from_frames": "main",
    "dataset_tools.make_dataset_from_youtube": "main",
    "dataset_tools.make_dataset_from_hdf5": "main",
    "dataset_tools.make_dataset_from_npz": "main",
    "dataset_tools.make_dataset_from_gymnasium": "main",
    "dataset_tools.make_hdf5_from_dataset": "main",
    "dataset_tools.encode_dataset": "main",
    "dataset_tools.inspect_dataset": "main",
    "dataset_tools.merge": "main",
    "metrics.report": "main",
    "metrics.action_network": "main",
    "training.checkpoint": "main",
    "training.curves": "main",
    "metrics.detectors.registry": "main",
    "runs.demo": "main",
    "runs.strip": "main",
    **{
        f"benchmarks.{name}": "main"
        for name in (
            "all",
            "compare",
            "generate",
            "loader",
            "metrics",
            "networks",
            "ops",
            "play",
            "river",
            "startup",
            "tats",
            "teco",
            "tokenizer",
            "train_step",
        )
    },
    "torch_utils.custom_ops": "main",
}

# Modules and recipes that are run once.
NEEDS_TORCH = ["training.checkpoint", "torch_utils.custom_ops", "runs.demo", "runs.strip"]

# Rank of a part: a module imports only parts of a lower rank, and its own.
ORDER = [
    ("dnnlib",),
    ("torch_utils",),
    ("training",),
    ("metrics", "dataset_tools"),
    ("modules",),
    ("system",),
    ("scripts",),
]
RANKS = {part: rank for rank, parts in enumerate(ORDER) for part in parts}


def part_of(module: str, repo: Path) -> tuple[str, str]:
    """Return the part that a module belongs to, and its name: a folder of training/ with a spec.py is a system."""
    names = module.split(".")
    if names[0] != "training" or len(names) == 1:
        part = names[0] if names[0] in RANKS else "scripts"
        return part, part
    if names[1] in ("modules", "generation"):
        return "modules", names[1]
    is_system = (repo / "training" / names[1] / "spec.py").is_file()
    return ("system", names[1]) if is_system else ("training", "training")


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources(repo: Path) -> list[Path]:
    return [path for package in PACKAGES for path in (repo / package).rglob("*.py")] + [
        repo / f"{script}.py" for script in SCRIPTS
    ]


def test_imports_point_one_way(repo):
    """A module imports its own part and parts of lower rank; systems import no other system."""
    for path in sources(repo):
        module = ".".join(path.relative_to(repo).with_suffix("").parts)
        part, own = part_of(module, repo)
        for name in imports_of(path):
            if name.split(".")[0] in {*PACKAGES, *SCRIPTS}:
                other, its = part_of(name, repo)
                assert RANKS[other] < RANKS[part] or (other == part and (part == "scripts" or its == own)), (
                    f"{module} imports {name}"
                )


def test_shared_code_knows_no_system(repo):
    """But for its registry, and words that files and examples need."""
    words = re.compile(r"lres|sres|longvideogan|low-res|super-res|discriminator|\bgamma\b", re.IGNORECASE)
    files = [*(repo / "training").glob("*.py"), *(repo / "metrics").glob("*.py"), *(repo / "explorer").rglob("*.*")]
    files += [*(repo / "training" / "data").glob("*.py"), *(repo / f"{name}.py" for name in SHARED_SCRIPTS)]
    texts = {path: path.read_text() for path in files if path.suffix in (".py", ".js", ".html", ".css")}
    del texts[repo / "training" / "registry.py"]
    found = [f"{path.name}: {line}" for path, text in texts.items() for line in text.splitlines() if words.search(line)]
    assert len(found) <= 4, "\n".join(found)


def test_dnnlib_knows_no_torch(repo):
    for path in (repo / "dnnlib").rglob("*.py"):
        assert not any(name.split(".")[0] == "torch" for name in imports_of(path))


def test_dependencies_agree(repo):
    project = tomllib.loads((repo / "pyproject.toml").read_text())["project"]
    conda = re.findall(r"^ {6}- (\S+)$", (repo / "environment.yml").read_text(), re.MULTILINE)
    assert sorted(project["dependencies"]) == sorted(conda)
    assert len(conda) == 10
    names = [re.split(r"[>=]", line)[0] for line in conda]
    assert sorted(names) == sorted("torch ninja numpy pillow click scipy imageio-ffmpeg psutil wandb requests".split())


def test_everything_tested_is_pinned(repo):
    project = tomllib.loads((repo / "pyproject.toml").read_text())["project"]
    pinned = {line.split("==")[0].lower() for line in (repo / "constraints.txt").read_text().splitlines()}
    names = ("demo", "dev", "fast", "plots", "safetensors", "shots", "youtube")
    extras = [project["optional-dependencies"][name] for name in names]
    wanted = itertools.chain(project["dependencies"], *extras)
    assert {re.split(r"[>=]", line)[0].lower() for line in wanted} <= pinned


def test_importing_does_no_work(repo):
    modules = [".".join(path.relative_to(repo).with_suffix("").parts) for path in sources(repo)]
    modules = [module.removesuffix(".__init__") for module in modules]
    script = f"""
import importlib, os, sys, threading
before = set(os.listdir("."))
import generate, train_lres, train_sres
assert not {{"scipy", "torch._dynamo"}} & set(sys.modules), "either takes as long to import as all the rest"
for name in {modules!r}:
    importlib.import_module(name)
import torch
assert not torch.cuda.is_initialized()
assert not {{"wandb", "vizdoom", "matplotlib"}} & set(sys.modules)
assert threading.active_count() == 1
assert set(os.listdir(".")) - before <= {{"__pycache__"}}
"""
    subprocess.run([sys.executable, "-c", script], cwd=repo, check=True)


def test_help_imports_no_torch(repo):
    """Torch takes most of a second: usage and help of every command that a user needs do without it."""
    names = [name for name in COMMANDS if name.partition(".")[0] != "benchmarks" and name not in NEEDS_TORCH]
    lines = [[name, "--help"] for name in names]
    lines += [["train", name, "--help"] for name, place in registry.SYSTEMS.items() if registry.spec(name).options]
    script = f"""
import importlib, io, contextlib, sys
for name, *words in {lines!r}:
    command = getattr(importlib.import_module(name), {COMMANDS!r}[name])
    with contextlib.redirect_stdout(io.StringIO()) as text:
        command(words, standalone_mode=False)
    assert "--help" in text.getvalue()
    assert not {{"torch", "scipy"}} & set(sys.modules), [name, *words]
"""
    subprocess.run([sys.executable, "-c", script], cwd=repo, check=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name):
    command = getattr(importlib.import_module(name), COMMANDS[name])
    commands = [command]
    if isinstance(command, click.Group):
        context = click.Context(command)
        commands = [command.get_command(context, entry) for entry in command.list_commands(context)]
    for entry in commands:
        assert entry is not None and (entry.help or getattr(entry.callback, "__doc__", None))
        for parameter in entry.params:
            assert not isinstance(parameter, click.Option) or parameter.help, f"{name}: {parameter.name}"


def test_files_are_of_readable_size(repo):
    for path in sources(repo):
        assert len(path.read_text().splitlines()) <= 600, f"{path} is too long: divide it"
