"""Inspect the token shards of a dataset, as `inspect_dataset` does its frames."""

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from dataset_tools.inspect_shard import Problem, partition_of
from dnnlib.download import file_sha256
from dnnlib.text import one_line
from dnnlib.zips import FAULTS, reason_of
from training.data.codes import MANIFEST, CodeStore, encode_command, read_codes_manifest


@dataclass
class CodesReport:
    """The contents of a folder of tokens, as plain values, and its problems."""

    facts: dict[str, Any]
    problems: list[Problem] = field(default_factory=list)


def codes_folders(root: Path) -> list[Path]:
    """Return the folders of tokens of a dataset."""
    return sorted(path for path in root.glob("codes-*") if path.is_dir())


def inspect_codes(folder: Path, frames: Mapping[str, int] | None, quick: bool) -> CodesReport:
    """Open the tokens of a folder as training does, and read all of them unless `quick`.

    `frames` maps the clips of the dataset to their numbers of frames, None if it has no frames.
    """
    report = CodesReport({"folder": folder.name})
    try:
        manifest = read_codes_manifest(folder)
        report.facts |= {"tokenizer": manifest.tokenizer, "grid": list(manifest.grid), "stride": list(manifest.stride)}
        report.facts["vocabulary"] = manifest.vocabulary
        store = CodeStore(folder.parent, manifest.tokenizer)
        if store.directory != folder:
            raise ValueError(f"{folder / MANIFEST} is of a tokenizer whose tokens belong into {store.directory.name}")
    except ValueError as error:
        report.problems.append(Problem("damaged tokens", folder.name, str(error)))
        return report
    report.facts |= {"shards": len(store.shards), "clips": len(store.clips), "steps": int(store.steps.sum())}
    report.facts["bytes"] = sum(path.stat().st_size for path in store.shards)
    if missing := store.missing_partitions():
        detail = f"{missing} of {manifest.num_partitions} partitions have not been made"
        report.problems.append(Problem("other tokens", folder.name, detail))
    elif frames is not None:
        here = {clip.path: clip.num_frames for clip in store.clips}
        for clip in sorted(here.items() ^ frames.items())[:1]:
            detail = f"{here.get(clip[0], 'no')} frames, {frames.get(clip[0], 'none')} in the dataset"
            report.problems.append(Problem("other tokens", f"{folder.name}  {clip[0]}", detail))
    if not quick:
        report.problems += _damages(store)
    return report


def _damages(store: CodeStore) -> Iterator[Problem]:
    """Yield damages in the contents of shards: checksums, and tokens that are not in the vocabulary."""
    for path in store.shards:
        place = f"{path.parent.name}/{path.name}"
        listed = store.manifest.partitions.get(f"{partition_of(path) or 0:04d}", {})
        try:
            if listed.get("sha256", sha256 := file_sha256(path)) != sha256:
                yield Problem("damaged tokens", place, f"it is not the one that {MANIFEST} describes")
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
            if bad is not None:
                yield Problem("damaged tokens", f"{place}  {bad}", "its checksum is wrong")
        except FAULTS as error:
            yield Problem("damaged tokens", place, reason_of(path, error))
    for number, steps in enumerate(store.steps.tolist()):
        try:
            if steps:
                store.read(number, 0, steps)
        except ValueError as error:
            yield Problem("damaged tokens", f"{store.directory.name}  {store.clips[number].path}", str(error))


def print_codes(facts: Mapping[str, Any]) -> None:
    """Print the contents of a folder of tokens on one line."""
    if "clips" not in facts:
        click.echo(f"  {facts['folder']}  cannot be read")
        return
    grid, (frames, pixels) = "x".join(map(str, facts["grid"])), facts["stride"]
    click.echo(
        f"  {facts['folder']}  tokenizer {facts['tokenizer']}\n    {facts['shards']} shards  {facts['clips']} clips  "
        f"{facts['steps']} steps of {grid} tokens below {facts['vocabulary']}, a step is {frames} frames, a token "
        f"{pixels} pixels  {facts['bytes'] / 1e6:.1f} MB"
    )


def inspect_codes_alone(root: Path, quick: bool) -> None:
    """Inspect a dataset that has tokens but no frames; raise `ValueError` if training would reject them."""
    click.echo(f"{root}: tokens without frames\n")
    errors = []
    for folder in codes_folders(root):
        report = inspect_codes(folder, None, quick)
        print_codes(report.facts)
        for problem in report.problems:
            click.echo(f"    {one_line(problem.place)}: {one_line(problem.detail, 1000)}")
        errors += [problem for problem in report.problems if problem.kind == "damaged tokens"]
    if errors:
        raise ValueError(
            f"{len(errors)} errors: training would reject this; delete the damaged files and make them again: "
            f"{encode_command(root)}"
        )
