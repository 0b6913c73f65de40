"""The comparison of two checkouts: measured times, order of the runs, and the report."""

import dataclasses
import importlib
import math
import operator
import subprocess

import click
import pytest
from click.testing import CliRunner

from benchmarks import compare, harness
from benchmarks.compare import Result, Subject


def test_cpu_time_is_counted_and_waiting_is_not(tmp_path):
    work = "import time; end = time.process_time() + {}\nwhile time.process_time() < end: pass"
    idle, _ = compare.run_child(tmp_path, ["-c", "import time; time.sleep(0.5)"], 1)
    busy, _ = compare.run_child(tmp_path, ["-c", work.format(0.6)], 1)
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work.format(0.6)!r}])"
    parent, _ = compare.run_child(tmp_path, ["-c", nested], 1)
    assert idle < 0.5 < 0.6 <= busy and parent >= 0.6


def test_a_child_runs_in_its_checkout(tmp_path):
    (tmp_path / "there.py").write_text("import os\nprint(os.environ['OMP_NUM_THREADS'])")
    assert compare.run_child(tmp_path, ["-c", "import there"], 3)[1] == "3\n"
    with pytest.raises(click.ClickException, match="no_such_module"):
        compare.run_child(tmp_path, ["-c", "import no_such_module"], 1)


def test_checkouts_take_turns(tmp_path, monkeypatch):
    calls = []

    def run_child(checkout, arguments, threads):
        calls.append(checkout.name)
        return {"before": 2.0, "now": 1.0}[checkout.name], ""

    monkeypatch.setattr(compare, "run_child", run_child)
    result = compare.contest(Subject("name", "what", ("script.py",)), tmp_path / "before", tmp_path / "now", 3, 1, True)
    assert calls == ["before", "now", "before", "now", "now", "before", "before", "now"]
    assert (result.before, result.now, result.ratios) == ([2] * 3, [1] * 3, [2] * 3)


WORK = """
import builtins, os, time, work
for unit in range(6):
    builtins.pace()
    with open("../order", "a") as file:
        file.write(f"{os.path.basename(os.getcwd())} {unit}\\n")
    end = time.process_time() + work.SECONDS
    while time.process_time() < end:
        pass
"""


def test_units_of_work_are_done_in_turns_and_measured_each(tmp_path):
    for name, seconds in (("before", 0.06), ("now", 0.03)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "work.py").write_text(f"SECONDS = {seconds}")
        (tmp_path / name / "script.py").write_text(WORK)
    subject = Subject("name", "what", ("script.py",), paced="builtins:pace")
    result = compare.contest_in_units(subject, tmp_path / "before", tmp_path / "now", 1, warm_up=True)
    order = [line.split() for line in (tmp_path / "order").read_text().splitlines()]
    assert [side for side, _ in order] == ["before", "now", "now", "before"] * 3
    assert [int(unit) for _, unit in order] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    # Nothing is measured of the last unit, which ends with the command, nor of the first two.
    assert len(result.before) == 3 and min(result.before) >= 0.06 and min(result.now) >= 0.03
    assert 1.5 < sorted(result.ratios)[1] < 2.5
    (tmp_path / "order").unlink()
    some = dataclasses.replace(subject, units=4)
    result = compare.contest_in_units(some, tmp_path / "before", tmp_path / "now", 1, warm_up=True)
    assert len(result.now) == 2 and "now 5" not in (tmp_path / "order").read_text()


def test_a_unit_is_a_call_of_a_named_function(tmp_path):
    (tmp_path / "module.py").write_text("class Writer:\n    def write(self, text):\n        return text + '!'")
    code = "from module import Writer\nfor text in 'abc':\n    assert Writer().write(text) == text + '!'\n"
    with compare.Paced(Subject("name", "what", ("-c", code), "module:Writer.write"), tmp_path, 1) as side:
        assert [side.unit() is None for _ in range(3)] == [False, False, True]
    with compare.Paced(
        Subject("name", "what", ("-c", code + "raise ValueError('late')"), "module:Writer.write"), tmp_path, 1
    ) as side:
        with pytest.raises(click.ClickException, match="late"):
            for _ in range(3):
                side.unit()


def test_the_interval_of_a_median_is_that_of_the_sign_test():
    for count in range(1, 5):
        assert compare.median_interval([1.0] * count) is None
    assert compare.median_interval([5, 3, 1, 2, 4]) == (1, 5)  # holds the median but in 2 cases of 2^5
    assert compare.median_interval([7, 6, 5, 4, 3, 2, 1]) == (1, 7)  # without the extremes: 16 of 2^7
    assert compare.median_interval(list(range(8))) == (1, 6)  # without the extremes: 18 of 2^8
    for count in (9, 20, 41):
        low, high = map(int, compare.median_interval(range(count)) or (0, 0))
        assert low + high == count - 1
        tails = [2 * sum(math.comb(count, k) for k in range(low + more)) / 2**count for more in (1, 2)]
        assert 1 - tails[0] >= compare.CONFIDENCE > 1 - tails[1]


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([0.9] * 7, "missed"),
        ([0.9] * 6 + [0.98], "not missed"),  # it may be as fast
        ([1.1] * 7, "not missed"),
        ([0.5] * 4, "too few rounds"),
    ],
)
def test_only_what_is_surely_slower_has_missed(ratios, verdict):
    result = Result(Subject("name", "what", ()), ratios, [1.0] * len(ratios))
    assert result.verdict() == verdict
    summary, spread = compare.tables_of([result])
    assert summary.rows[0][-1] == verdict
    assert spread.rows[0][:3] == ["name", len(ratios), min(ratios)] and spread.rows[0][-1] == max(ratios)
    assert all(len(row) == len(table.columns) for table in (summary, spread) for row in table.rows)


def test_a_commit_is_checked_out_for_the_time_it_takes(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.com"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    git("init", "--quiet")
    (tmp_path / "generate.py").write_text("old")
    git("add", ".")
    git("commit", "--quiet", "--message=One")
    (tmp_path / "generate.py").write_text("new")
    with compare.checkout_of("HEAD", tmp_path) as checkout:
        assert (checkout / "generate.py").read_text() == "old"
        assert compare.commit_of(checkout) == git("rev-parse", "--short", "HEAD").strip()
    assert not checkout.exists() and len(git("worktree", "list").splitlines()) == 1
    with compare.checkout_of(str(tmp_path)) as checkout:
        assert checkout == tmp_path.resolve()
    with pytest.raises(click.ClickException, match="nowhere is neither a checkout nor a commit"):
        with compare.checkout_of("nowhere", tmp_path):
            pass


@pytest.mark.slow
def test_from_the_command_to_the_report(repo, tmp_path):
    command = ["--before", str(repo), "--only=loader,dataset,help", "--quick", "--json", str(tmp_path / "report.json")]
    result = CliRunner().invoke(compare.main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    summary, spread = harness.Report.read(tmp_path / "report.json").tables
    assert summary.text() in result.output and spread.text() in result.output
    assert [row[0] for row in summary.rows] == [row[0] for row in spread.rows] == ["loader", "dataset", "help"]
    assert summary.rows[0][1] == "20 clips in batches" and summary.rows[0][-1] == "too few rounds"
    assert [row[1] for row in spread.rows] == [2, 1, 1]  # units, of which the last has no end, or rounds


@pytest.mark.parametrize(("kind", "output"), [("kinds", "windows batches\n"), ("batches", ""), ("windows", "")])
def test_the_loader_reads_the_given_kind(kind, output, tmp_path, monkeypatch, capsys):
    compare.make_dataset(tmp_path, compare.SIZES, compare.CLIP_FRAMES)
    monkeypatch.setattr("sys.argv", ["-c", str(tmp_path), kind, "11"])
    units = []
    monkeypatch.setattr("builtins.pace", lambda: units.append(None), raising=False)
    exec(compare.LOADER, {})
    assert capsys.readouterr().out.endswith(output)
    assert len(units) == {"kinds": 0, "batches": 2, "windows": 2}[kind]


def test_every_subject_is_a_command_of_this_checkout(repo, tmp_path):
    (tmp_path / "videos").mkdir()
    found = compare.subjects(tmp_path / "data", tmp_path, "windows", quick=False)
    found += compare.published_subjects(tmp_path / "published", tmp_path, 5, "bf16")
    assert tuple(subject.name for subject in found) == (*compare.NAMES, *compare.PUBLISHED)
    for subject in found:
        if subject.paced and subject.paced != "builtins:pace":
            module, function = subject.paced.split(":")
            assert callable(operator.attrgetter(function)(importlib.import_module(module)))
        if subject.command[0] == "-c":
            compile(subject.command[1], "LOADER", "exec")
            continue
        given = [argument for argument in subject.arguments(harness.ROOT) if argument not in ("-m", "--help")]
        main = importlib.import_module(given[0].removesuffix(".py")).main
        arguments = given[1:]
        required = [] if subject.name != "help" else [f"--outdir={tmp_path}"]
        context = main.make_context("main", [*arguments, *required])
        if subject.now_only:
            assert context.params["precision"] == "bf16" and "--precision=fp32" in subject.arguments(tmp_path)


def test_unknown_subjects_are_refused():
    result = CliRunner().invoke(compare.main, ["--before=.", "--only=help,all"])
    assert result.exit_code == 2 and "'all' is unknown" in result.output
