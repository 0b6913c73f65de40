"""No module imports itself, directly or indirectly."""

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGES = ("dnnlib", "torch_utils", "training", "metrics", "dataset_tools", "explorer")


def module_files(root: Path, packages: tuple[str, ...]) -> dict[str, Path]:
    """Return the files of all modules of packages in the folder `root`, by dotted module name."""
    paths = [path for package in packages for path in sorted((root / package).rglob("*.py"))]
    names = [".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return dict(zip(names, paths, strict=True))


def imported_modules(path: Path, modules: dict[str, Path]) -> set[str]:
    """Return which of `modules` a file imports anywhere in it, function bodies included.

    A package counts where names are taken from its __init__.py, not where a module inside it is imported. Names that
    are resolved from text at run time ("module:name") and those that only annotations need do not count.
    """
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = [ast.Pass()]  # never run
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in names}
    return found & modules.keys()


def find_cycle(root: Path, packages: tuple[str, ...]) -> list[str] | None:
    """Return the modules of an import cycle, with the first one repeated at the end, or None if there is none."""
    modules = module_files(root, packages)
    graph = {name: imported_modules(path, modules) for name, path in modules.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def test_there_is_no_import_cycle(repo):
    assert len(module_files(repo, PACKAGES)) > 100
    assert find_cycle(repo, PACKAGES) is None


@pytest.mark.parametrize("text", ["import p.b", "from p import b", "def f():\n    from p.b import value"])
def test_a_cycle_is_found(tmp_path, text):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "__init__.py").write_text("")
    (tmp_path / "p" / "a.py").write_text(text)
    (tmp_path / "p" / "b.py").write_text("value = 1\nname = 'p.a:f'\n")
    assert find_cycle(tmp_path, ("p",)) is None
    (tmp_path / "p" / "b.py").write_text("from p import a\nvalue = 1\n")
    assert set(find_cycle(tmp_path, ("p",)) or []) == {"p.a", "p.b"}
