"""Run the benchmarks of operators and networks in sequence, and insert their tables into the documentation.

python -m benchmarks.all --json-dir outputs/benchmarks                                run all
python -m benchmarks.all --json-dir outputs/benchmarks --docs docs/performance.md     and update the page

Each runs in a separate process. Data loading, metrics and streaming have benchmarks of their own: benchmarks.loader,
benchmarks.metrics, benchmarks.generate.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import click

from benchmarks import harness
from dnnlib.util import atomic_path, format_time

NAMES = ("ops", "networks", "train_step", "startup")


def run(name: str, path: Path, arguments: list[str]) -> None:
    """Run one benchmark in a separate process; its report goes to `path`, which is removed first."""
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(path.resolve()), *arguments]
    if subprocess.run(command, cwd=harness.ROOT).returncode:
        raise click.ClickException(f"benchmarks.{name} failed; earlier results are in {path.parent}")


def render(report: harness.Report) -> str:
    """Return the tables of a report for the documentation."""
    return "\n\n".join([f"{harness.describe(report.machine)}.", *(table.markdown() for table in report.tables)])


def slower(reports: list[harness.Report]) -> harness.Table:
    """Return a table of all ratios below one in columns "against ...": cases in which the default is the slower one."""
    table = harness.Table("Slower than", ["what", "than", "times as fast"])
    for entry in (entry for report in reports for entry in report.tables):
        title = entry.title.partition(":")[0]
        for row in entry.rows:
            label = ", ".join([title, *(cell for cell in row if isinstance(cell, str))])
            for column, cell in zip(entry.columns, row, strict=True):
                if column.startswith("against ") and isinstance(cell, float) and cell < 1:
                    table.rows.append([label, column.removeprefix("against "), cell])
    return table


def fill(page: str, name: str, text: str) -> str:
    """Replace the text between the marks of `name` on a page; raise ValueError unless there is exactly one pair."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page needs one line {begin!r} and one line {end!r} where the results of {name} go")
    before, rest = page.split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}\n{text}\n{end}{after}"


def fill_page(path: Path, reports: list[harness.Report]) -> None:
    """Insert the tables of each report at its marks, and the bars of all reports."""
    page = path.read_text()
    for report in reports:
        page = fill(page, f"{report.name} on {report.options['device']}", render(report))
    for device in {report.options["device"] for report in reports}:
        here = [report for report in reports if report.options["device"] == device]
        bars = [bar for report in here for bar in report.bars]
        page = fill(page, f"bars on {device}", harness.bars_table(bars).markdown())
        page = fill(page, f"slower on {device}", slower(here).markdown())
    with atomic_path(path) as temporary:
        temporary.write_text(page)


@click.command()
@click.option(
    "--json-dir", help="Folder of the reports", type=click.Path(path_type=Path, file_okay=False), required=True
)
@click.option("--only", help="One of the benchmarks; repeatable", type=click.Choice(NAMES), multiple=True)
@click.option("--docs", help="Page to update", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--render-only", help="Run nothing: update the page from existing reports", is_flag=True)
@click.option("--quick", help="Toy sizes, one round: a smoke test without meaningful results", is_flag=True)
@click.option("--device", help="Where", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", help="Threads of the CPU", type=click.IntRange(min=1), default=2, show_default=True)
def main(
    json_dir: Path,
    only: tuple[str, ...],
    docs: Path | None,
    render_only: bool,
    quick: bool,
    device: str,
    threads: int,
) -> None:
    """Run all benchmarks of docs/performance.md."""
    begin = time.monotonic()
    arguments = [f"--device={device}", f"--threads={threads}", *(["--quick"] if quick else [])]
    for name in () if render_only else only or NAMES:
        run(name, json_dir / f"{name}.json", arguments)
        click.echo(f"\n{name} is done after {format_time(time.monotonic() - begin)}\n")
    if docs is not None:
        paths = [json_dir / f"{name}.json" for name in NAMES]
        fill_page(docs, [harness.Report.read(path) for path in paths if path.is_file()])
        click.echo(f"{docs} is up to date")


if __name__ == "__main__":
    main()
