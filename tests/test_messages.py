"""Commands in messages exist, have the options that they show, and are quoted so that a shell takes any path."""

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from tests.test_docs import find_command, options_of

REPO = Path(__file__).resolve().parents[1]
FOLDERS = ("dnnlib", "torch_utils", "training", "dataset_tools", "metrics", "explorer", "runs")
# Ends of a command inside a sentence.
END = re.compile(r"[;)]|, |: | && |\. |\.$|\n|,$| and ")
SAFE = {"quote", "join", "next_command", "device_count"}  # functions whose results a shell takes as they are


def sources():
    """Yield the Python files of the product."""
    yield from (path for folder in FOLDERS for path in sorted((REPO / folder).rglob("*.py")))
    yield from sorted(REPO.glob("*.py"))


def is_quoted(value):
    """Return whether an expression in a message is safe in a shell: quoted, a number, or an upper-case constant."""
    if value.format_spec is not None:
        return True
    node = value.value
    if isinstance(node, ast.Name) and node.id == "maker":  # the end of the name of a module
        return True
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return name in SAFE
    if isinstance(node, ast.Subscript):  # an edge of a frame
        return ast.unparse(node.value) == "size"
    return isinstance(node, ast.Name) and node.id.isupper()


def commands_in(tree):
    """Yield (line, command with WORD for each value, whether all values are quoted) of each command in a message."""
    inside = {
        part
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in ast.walk(node)
        if part is not node
    }
    for node in ast.walk(tree):
        if node in inside or not isinstance(node, ast.JoinedStr | ast.Constant):
            continue
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        text, marks = "", []
        for part in parts:
            if isinstance(part, ast.FormattedValue):
                marks.append((len(text), is_quoted(part), ast.unparse(part.value)))
                text += "WORD"
            elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                text += part.value
        for match in re.finditer(r"\b(?:python (?:-m )?[a-z]|torchrun |pip install |bash runs/)", text):
            rest = text[match.start() :]
            end = END.search(rest, len("python "))
            command = rest[: end.start() if end else None].strip(' `"')
            within = [
                name
                for place, safe, name in marks
                if match.start() <= place < match.start() + len(command) and not safe
            ]
            yield node.lineno, command, within


FOUND = [
    pytest.param(command, unquoted, id=f"{path.relative_to(REPO)}:{line}")
    for path in sources()
    for line, command, unquoted in commands_in(ast.parse(path.read_text()))
]


def test_commands_are_found():
    tree = ast.parse(
        'raise ValueError(f"mend {x}: run python -m dataset_tools.merge {root} --a={quote(b)}; or leave it")'
    )
    assert list(commands_in(tree)) == [(1, "python -m dataset_tools.merge WORD --a=WORD", ["root"])]
    assert len(FOUND) > 60


@pytest.mark.parametrize(("command", "unquoted"), FOUND)
def test_a_command_in_a_message_works_as_printed(command, unquoted):
    assert not unquoted, f"{command}: quote {unquoted} with shlex.quote"
    words = [word for word in shlex.split(command, comments=True) if word not in ("...", "\\")]
    if words[0] == "pip":
        extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for name in re.findall(r"\[([\w,]+)\]", command):
            assert set(name.split(",")) - {"WORD"} <= set(extras), f"{command}: there is no extra {name}"
        return
    if words[0] == "bash":
        assert (REPO / words[1]).is_file(), command
        return
    scripts = [index for index, word in enumerate(words) if word.endswith(".py") or word == "-m"]
    if not scripts:
        assert words[0] == "torchrun", command
        return
    first = scripts[0]
    module = words[first + 1] if words[first] == "-m" else words[first].removesuffix(".py")
    arguments = words[first + 1 + (words[first] == "-m") :]
    if "WORD" in module:
        return
    found, arguments = find_command(module, arguments)
    known = options_of(found) | {"--help"}
    for word in arguments:
        if word.startswith("-") and not re.fullmatch(r"-\d+", word):
            assert word.split("=")[0] in known, f"{command}: there is no option {word}"
