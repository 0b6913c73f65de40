"""The comparison of two checkouts: measured times, order of the runs, and the report."""

import importlib
import math
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
    costs = {"before": 2.0, "now": 1.0}
    calls = []

    def run_child(checkout, arguments, threads):
        calls.append((checkout.name, arguments[-1]))
        return costs[checkout.name] * int(arguments[-1]) + 5, ""

    monkeypatch.setattr(compare, "run_child", run_child)
    subject = Subject("name", "what", ("script.py",), ("9",), ("1",))
    result = compare.contest(subject, tmp_path / "before", tmp_path / "now", 3, 1, warm_up=True)
    assert calls[:2] == [("before", "1"), ("now", "1")]
    assert calls[2:6] == [("before", "9"), ("before", "1"), ("now", "9"), ("now", "1")]
    assert [name for name, count in calls[2:] if count == "9"] == ["before", "now", "now", "before", "before", "now"]
    assert (result.before, result.now, result.ratios) == ([16] * 3, [8] * 3, [2] * 3)


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
    summary, rounds = compare.tables_of([result])
    assert summary.rows[0][-1] == verdict and rounds.rows == [["name", *ratios]]
    assert all(len(row) == len(table.columns) for table in (summary, rounds) for row in table.rows)


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


def test_from_the_command_to_the_report(repo, tmp_path, monkeypatch):
    def run_child(checkout, arguments, threads):
        assert checkout == repo and threads == 1
        return 3.0, "windows batches\n"

    monkeypatch.setattr(compare, "run_child", run_child)
    command = ["--before", str(repo), "--only=loader,help", "--quick", "--json", str(tmp_path / "report.json")]
    result = CliRunner().invoke(compare.main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    summary, ratios = harness.Report.read(tmp_path / "report.json").tables
    assert summary.text() in result.output and ratios.text() in result.output
    assert [row[0] for row in summary.rows] == [row[0] for row in ratios.rows] == ["loader", "help"]
    assert summary.rows[0][1] == "1 batches" and summary.rows[0][-1] == "too few rounds"
    assert ratios.rows == [["loader", 1.0], ["help", 1.0]]


@pytest.mark.parametrize(("kind", "output"), [("kinds", "windows batches\n"), ("batches", ""), ("windows", "")])
def test_the_loader_reads_the_given_kind(kind, output, tmp_path, monkeypatch, capsys):
    compare.make_dataset(tmp_path)
    monkeypatch.setattr("sys.argv", ["-c", str(tmp_path), kind, "3"])
    exec(compare.LOADER, {})
    assert capsys.readouterr().out.endswith(output)


def test_every_subject_is_a_command_of_this_checkout(repo, tmp_path):
    found = compare.subjects(tmp_path, tmp_path, "windows", quick=False)
    assert tuple(subject.name for subject in found) == compare.NAMES
    for subject in found:
        for extra in (subject.more, subject.less or ()):
            if subject.command[0] == "-c":
                compile(subject.command[1], "LOADER", "exec")
                continue
            main = importlib.import_module(subject.command[0].removesuffix(".py")).main
            arguments = [argument for argument in (*subject.command[1:], *extra) if argument != "--help"]
            required = [] if subject.name != "help" else [f"--outdir={tmp_path}"]
            main.make_context("main", [*arguments, *required])


def test_unknown_subjects_are_refused():
    result = CliRunner().invoke(compare.main, ["--before=.", "--only=help,all"])
    assert result.exit_code == 2 and "'all' is unknown" in result.output
