"""Read a whole dataset, and report its contents, all problems, and the command that fixes each of them.

Example:
    python -m dataset_tools.inspect_dataset data/mine --sheet mine.png
"""

from pathlib import Path

import click

from dataset_tools.names import LRES_FRAMES


@click.command(epilog="Example: python -m dataset_tools.inspect_dataset data/mine --sheet mine.png")
@click.argument("root", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--num-frames",
    help="Frames that a clip must have: 128 for the low-resolution stage, 12 for super-resolution",
    type=click.IntRange(min=1),
    default=LRES_FRAMES,
    show_default=True,
)
@click.option("--json", "json_path", help="File to write the report to as data", type=click.Path(path_type=Path))
@click.option("--sheet", help="PNG file to draw some clips into", type=click.Path(path_type=Path))
@click.option("--workers", help="Threads that decode  [default: one for each core]", type=click.IntRange(min=1))
@click.option("--quick", help="Read the directories of all zips, but only some frames, and no hashes", is_flag=True)
def main(
    root: Path, num_frames: int, json_path: Path | None, sheet: Path | None, workers: int | None, quick: bool
) -> None:
    """Read every frame of the dataset DIR, and report its contents, its problems, and how to fix them.

    The exit code is 0 if training would accept the dataset, and 1 if it would reject it or suffer from it.
    """
    from dataset_tools.inspection import inspect

    inspect(root, num_frames, json_path, sheet, workers, quick)


if __name__ == "__main__":
    main()
