"""Alternating timing, and reports as text, Markdown and JSON."""

import json
import math

import click
import pytest
import torch
from click.testing import CliRunner

from benchmarks import harness
from benchmarks.harness import Bar, Report, Table


class Day:
    """A clock that only contestants move."""

    def __init__(self):
        self.now = 0.0
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.now

    def contestant(self, name: str, *seconds: float):
        """Take `seconds` in turn, the last of them for ever."""
        left = list(seconds)

        def call() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_contestants_take_turns_and_warm_up():
    day = Day()
    contestants = {"slow": day.contestant("slow", 1.5, 0.4, 0.6), "fast": day.contestant("fast", 0.25, 0.2)}
    times = harness.interleave(contestants, rounds=3, clock=day.clock)
    assert day.calls == ["slow", "fast"] * 4
    assert times["slow"] == pytest.approx([0.4, 0.6, 0.6]) and times["fast"] == pytest.approx([0.2] * 3)
    assert harness.median(times["slow"]) == pytest.approx(0.6)
    assert harness.ratio(times, "slow", "fast") == pytest.approx(3)


def test_a_slow_first_round_counts():
    day = Day()
    times = harness.interleave({"a": day.contestant("a", 5.0, 0.1)}, rounds=2, clock=day.clock)
    assert times["a"] == pytest.approx([5.0, 0.1]) and day.calls == ["a"] * 2


def test_no_round_begins_after_the_budget():
    day = Day()
    times = harness.interleave({"a": day.contestant("a", 0.1)}, rounds=9, budget_sec=0.0, clock=day.clock)
    assert len(times["a"]) == 1


def test_seconds_are_those_of_the_clock():
    assert harness.seconds(lambda: sum(range(10**5))) > 0
    day = Day()
    assert harness.seconds(day.contestant("a", 7.0), clock=day.clock) == 7


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (None, "-"),
        ("word", "word"),
        (3, "3"),
        (0.0, "0"),
        (1234.5, "1234"),
        (12.345, "12.3"),
        (0.0012345, "0.00123"),
        (-0.5, "-0.500"),
        (math.nan, "nan"),
    ],
)
def test_numbers_have_three_digits(cell, text):
    assert harness.as_text(cell) == text


def test_a_table_is_aligned_as_text_and_plain_as_markdown():
    table = Table("Title", ["name", "seconds"], [["one", 1.0], ["eleven", 0.125], ["none", None]], "A note.")
    assert table.text().splitlines() == [
        "Title",
        "name    seconds",
        "one        1.00",
        "eleven    0.125",
        "none          -",
        "A note.",
    ]
    assert table.markdown().splitlines() == [
        "Title.",
        "",
        "| name | seconds |",
        "| --- | ---: |",
        "| one | 1.00 |",
        "| eleven | 0.125 |",
        "| none | - |",
        "",
        "A note.",
    ]


def test_bars_are_met_or_missed_by_so_much():
    rows = harness.bars_table([Bar("a", 2.0, 2.0), Bar("b", 4.0, 3.0)]).rows
    assert [row[-1] for row in rows] == ["met", "missed by 25%"]


def test_a_report_comes_back_from_its_file(tmp_path, capsys):
    report = harness.begin("something", size="toy")
    report.add(Table("Title", ["name", "seconds"], [["one", 1.5], ["none", None]]))
    report.bars.append(Bar("speed", 2.0, 1.0))
    path = tmp_path / "folder" / "report.json"
    report.finish(path)
    assert Report.read(path) == report
    printed = capsys.readouterr().out
    assert printed.startswith("something: ") and "one" in printed and "missed by 50%" in printed
    assert json.loads(path.read_text())["options"] == {"device": "cpu", "threads": 1, "size": "toy"}


def test_the_machine_is_described():
    facts = harness.machine()
    assert facts["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()
    assert facts["operators"] in ("compiled", "matmul", "ref") and "gpu" not in facts
    line = harness.describe({**facts, "date": "2026-01-02T03:04:05", "commit": "commit abc", "variables": {"A": "1"}})
    assert line.endswith(f"{facts['operators']} operators, A=1; 2026-01-02, commit abc") and facts["cpu"] in line
    assert harness.describe({**facts, "gpu": "H200", "cuda": "13.0"}).startswith("H200, CUDA 13.0; ")


def test_benchmarks_have_the_options_they_obey():
    @click.command()
    @harness.options(rounds=None, threads=None, device=False)
    def few(quick, json_path):
        click.echo(f"{quick} {json_path}")

    assert CliRunner().invoke(few, ["--quick", "--json", "a.json"]).output == "True a.json\n"
    assert CliRunner().invoke(few, ["--rounds", "2"]).exit_code == 2

    @click.command()
    @harness.options(rounds=7)
    def all_of_them(quick, json_path, rounds, threads, device):
        click.echo(f"{rounds} {threads} {device}")

    assert CliRunner().invoke(all_of_them, []).output == "7 2 cpu\n"
    assert CliRunner().invoke(all_of_them, ["--rounds=0"]).exit_code == 2
