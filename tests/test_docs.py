"""The documentation agrees with the commands: every command parses, every option and file that it names exists."""

import ast
import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import training
from torch_utils.precision import cpu_has_bf16
from training import curves, registry
from training.config import FREE_OPTIONS
from training.longvideogan import charts, presets

TRAINING = {"train_lres", "train_sres", "train"}
# Options of other programs.
FOREIGN = {"--standalone", "--nnodes", "--node-rank", "--master-addr", "--master-port", "--nproc-per-node"} | {
    *(
        "--nproc_per_node",
        "--nodes",
        "--gpus-per-node",
        "--time",
        "--signal",
        "--array",
        "--logdir",
        "--shutdown-timeout",
        "--file",
        "--tag",
        "--gpus",
        "--ipc",
        "--user",
        "--volume",
        "--help",
    )
}
REPO = Path(__file__).resolve().parents[1]
EXAMPLE = "walk"  # the system that docs/adding_a_system.md adds
# Pages outside docs/ that the manual links to.
ELSEWHERE = (
    "README.md",
    "CHANGELOG.md",
    "models/labdoom-tiny.md",
    "models/labdoom-walk.md",
    "training/longvideogan/README.md",
    "dataset_tools/youtube_configs/README.md",
)


@pytest.fixture(autouse=True, scope="module")
def example(tmp_path_factory):
    """Register the system of docs/adding_a_system.md, so that the commands of that page are tested too."""
    folder = tmp_path_factory.mktemp("systems")
    for name, code in files_of((REPO / "docs/adding_a_system.md").read_text()).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "__path__", [*training.__path__, str(folder / "training")])
        patch.setitem(registry.SYSTEMS, EXAMPLE, f"training.{EXAMPLE}.spec:SPEC")
        yield
    for name in [name for name in sys.modules if name.startswith(f"training.{EXAMPLE}")]:
        del sys.modules[name]


def files_of(text):
    """Name -> content of the files that a page gives in full."""
    return dict(re.findall(r"^`([\w/.]+)`:\n\n```python\n(.*?)```", text, re.MULTILINE | re.DOTALL))


def pages(repo):
    docs = sorted(path for path in (repo / "docs").glob("*.md") if path.name != "LOG.md")
    return [*docs, *(repo / name for name in ELSEWHERE)]


def commands_of(text):
    """(module, arguments) of every Python command in the code of a page, `torchrun` and `sbatch` before it left out."""
    code = [
        *re.findall(r"```bash\n(.*?)```", text, re.DOTALL),
        *re.findall(r"`((?:python|torchrun|sbatch|docker run) [^`]+)`", text),
    ]
    found = []
    for line in "\n".join(code).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] in (["torchrun"], ["sbatch"]) or words[:2] == ["docker", "run"]:
            scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
            words = ["python", *words[scripts[0] :]] if scripts else []
            words[1:2] = [word.rpartition("/")[2] for word in words[1:2]]
        if words[:2] == ["python", "-m"]:
            found.append((words[2], words[3:]))
        elif words[:1] == ["python"]:
            found.append((words[1].removesuffix(".py"), words[2:]))
    return found


def subcommands(command):
    """Name -> subcommand; a group may make them when they are asked for."""
    if not isinstance(command, click.Group):
        return {}
    context = click.Context(command)
    return {name: command.get_command(context, name) for name in command.list_commands(context)}


def find_command(module, arguments):
    """Return the command of a module, or its subcommand that the first argument names, and the arguments left."""
    command = importlib.import_module(module).main
    known = subcommands(command)
    if known and arguments and not arguments[0].startswith("-"):
        assert arguments[0] in known, f"{module} has no command {arguments[0]}"
        return known[arguments[0]], arguments[1:]
    return command, arguments


def options_of(command):
    """Return all option strings of a command and of its subcommands."""
    return {
        name
        for entry in [command, *subcommands(command).values()]
        for parameter in entry.params
        for name in [*parameter.opts, *parameter.secondary_opts]
    }


def all_commands(repo):
    return [
        (str(page.relative_to(repo)), *command) for page in pages(repo) for command in commands_of(page.read_text())
    ]


def test_commands_are_found(repo):
    assert commands_of(
        "```bash\ntorchrun --nnodes=2 train_lres.py --batch=8  # so\nls\n```\n`python -m a.b c --d`"
    ) == [
        ("train_lres", ["--batch=8"]),
        ("a.b", ["c", "--d"]),
    ]
    assert {module for _, module, _ in all_commands(repo)} >= {*TRAINING, "generate", "training.curves"}


def test_every_option_of_every_command_exists(repo):
    for page, module, arguments in all_commands(repo):
        command, arguments = find_command(module, arguments)
        known = options_of(command)
        for word in arguments:
            if word.startswith("-") and not re.fullmatch(r"-\d+", word):
                assert word.split("=")[0] in known | {"--help"}, f"{page}: {module} has no option {word}"


def test_every_command_is_taken_with_its_values(repo, tmp_path, monkeypatch):
    """Each is parsed as it stands; only files that it names need not be there."""
    monkeypatch.chdir(tmp_path)
    for page, module, arguments in all_commands(repo):
        command, arguments = find_command(module, arguments)
        if arguments and "--help" not in arguments:  # else it is only named
            assert command is not None, f"{page}: {module} {shlex.join(arguments)}"
            try:
                command.make_context(module, list(arguments))
            except click.UsageError as error:
                where = f"{page}: {module} {shlex.join(arguments)}"
                assert "does not exist" in error.format_message(), f"{where}: {error.format_message()}"


def test_every_training_command_passes_a_dry_run(repo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    found = [command for command in all_commands(repo) if command[1] in TRAINING and command[2] != ["--help"]]
    assert len(found) >= 10 and {module for _, module, _ in found} == TRAINING
    refused = set() if cpu_has_bf16() else {"--precision=bf16"}  # by a processor without it
    for page, module, arguments in found:
        words = [word for word in arguments if word not in refused]
        result = runner.invoke(importlib.import_module(module).main, [*words, "--dry-run"])
        assert result.exit_code == 0, f"{page}: {module} {shlex.join(arguments)}: {result.output}"
    assert list(tmp_path.iterdir()) == []


def test_every_option_named_in_the_text_exists(repo):
    modules = {module for _, module, _ in all_commands(repo)} | {*TRAINING, "generate", "calc_metrics", "runs.shootout"}
    makers = [f"dataset_tools.{path.stem}" for path in (repo / "dataset_tools").glob("make_dataset_from_*.py")]
    known = {name for module in [*modules, *makers] for name in options_of(importlib.import_module(module).main)}
    for page in pages(repo):
        named = {
            match
            for code in re.findall(r"`([^`\n]+)`", page.read_text())
            for match in re.findall(r"--[a-z][\w-]*", code)
        }
        assert named <= known | FOREIGN, f"{page.relative_to(repo)} names {named - known - FOREIGN}"


def slugs_of(page):
    """Return the anchors of a page, as GitHub makes them of its headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_every_link_and_file_exists(repo):
    for page in [*pages(repo), repo / "docs/LOG.md"]:
        text = page.read_text()
        where = page.relative_to(repo)
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            name, _, anchor = target.partition("#")
            linked = page.parent / name if name else page
            assert linked.exists(), f"{where} links to {name}"
            assert not anchor or anchor in slugs_of(linked), f"{where} links to {target}"
        for path in re.findall(
            r"`((?:docs|training|tests|dataset_tools|metrics|runs|torch_utils)/[\w./]+\.(?:py|md|sh|sbatch|yaml|json))`",
            text,
        ):
            if path not in files_of(text):
                assert (repo / path).exists(), f"{where} names {path}"
        for path in re.findall(r"`?\b(runs/\w+\.(?:sh|sbatch|yaml))", text):
            assert (repo / path).exists(), f"{where} names {path}"


def test_every_page_is_in_the_index_and_links_to_another(repo):
    index = (repo / "docs/README.md").read_text()
    assert "](docs/README.md)" in (repo / "README.md").read_text()
    for page in (repo / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, f"docs/README.md leaves out {page.name}"
        if page.name not in ("LOG.md", "README.md"):
            assert re.search(r"\]\((\.\./)*[\w/]+\.md", page.read_text()), f"docs/{page.name} links to no other page"
    for name in ELSEWHERE[1:]:
        assert f"](../{name})" in index


def test_every_place_of_the_map_exists(repo):
    """`file.py: Class.method` in the table of the paper, relative to its folder or to the root."""
    folder = repo / "training/longvideogan"
    places = re.findall(r"`([\w/]+\.py): ([\w.]+)`", (folder / "README.md").read_text())
    assert len(places) > 50
    for file, name in places:
        path = next((root / file for root in (folder, repo) if (root / file).is_file()), None)
        assert path is not None, f"{file} is not there"
        body = ast.parse(path.read_text()).body
        for part in name.split("."):
            found = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == part]
            assert found, f"{file} has no {name}"
            body = found[0].body


def test_python_in_the_pages_is_python(repo):
    for page in pages(repo):
        for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and node.module:
                    module = importlib.import_module(node.module)
                    for alias in node.names:
                        known = hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
                        assert known, f"{page.relative_to(repo)}: {node.module} has no {alias.name}"


def test_options_that_may_change_when_a_run_is_resumed_are_listed(repo):
    text = (repo / "docs/checkpoints.md").read_text()
    listed = text[text.index("**Which options make a run") : text.index("and the number of ranks")]
    for name in FREE_OPTIONS:
        if name != "origin":  # which is no option of a command
            option = "-m" if name == "metrics" else f"--{name.replace('_', '-')}"
            assert f"`{option}`" in listed, f"docs/checkpoints.md leaves out {option}"


def test_variables_named_for_recipes_exist(repo):
    page = (repo / "docs/recipes.md").read_text()
    named = set(re.findall(r"`([A-Z][A-Z_]+)`", page)) | set(re.findall(r"\b([A-Z][A-Z_]+)=", page))
    text = "".join((repo / f"runs/{name}.sh").read_text() for name in ("labdoom", "own_videos", "horseback_8gpu"))
    assert len(named) > 10
    for name in named:
        assert f"{name}=${{{name}" in text, f"no recipe has a variable {name}"


def test_extras_named_for_installing_exist(repo):
    project = (repo / "pyproject.toml").read_text()
    for page in pages(repo):
        for extra in re.findall(r"pip install -e '\.\[(\w+)\]'", page.read_text()):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), f"{page.relative_to(repo)}: no extra {extra}"


def test_charts_options_and_presets_of_training_are_documented(repo):
    text = (repo / "docs/training.md").read_text()
    for chart in (*charts.CHARTS, *curves.CHARTS):
        assert f"| {chart.title} |" in text
    for stage in TRAINING - {"train"}:
        for name in options_of(importlib.import_module(stage).main) - {"--metric", "--dry-run"}:
            assert f"`{name}`" in text, f"docs/training.md leaves out {name} of {stage}"
    for name in {name for rows in presets.STAGES.values() for name in rows}:
        assert f"`{name}`" in text


def test_the_tests_that_keep_promises_exist(repo):
    path, found = "", 0
    for name, test in re.findall(r"`(tests/[\w/]+\.py)?(?:::(test_\w+))?`", (repo / "docs/limits.md").read_text()):
        path = name or path
        if path and (name or test):
            assert f"def {test}" in (repo / path).read_text(), f"docs/limits.md: {path} has no {test}"
            found += 1
    assert found > 60
