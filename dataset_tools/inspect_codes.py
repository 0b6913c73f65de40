"""Inspect the token and latent shards of a dataset, as `inspect_dataset` does its frames."""

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
from training.data.codes import CODES, CodeStore
from training.data.grids import MANIFEST, GridStore
from training.data.latents import LATENTS, LatentStore

STORES: tuple[type[GridStore], ...] = (CodeStore, LatentStore)


@dataclass
class CodesReport:
    """The contents of a folder of tokens or latents, as plain values, and its problems."""

    facts: dict[str, Any]
    problems: list[Problem] = field(default_factory=list)


def codes_folders(root: Path) -> list[Path]:
    """Return the folders of tokens and of latents of a dataset."""
    found = [path for kind in (CODES, LATENTS) for path in root.glob(f"{kind.name}-*")]
    return sorted(path for path in found if path.is_dir())


def inspect_codes(folder: Path, frames: Mapping[str, int] | None, quick: bool) -> CodesReport:
    """Open the tokens or latents of a folder as training does, and read all of them unless `quick`.

    `frames` maps the clips of the dataset to their numbers of frames, None if it has no frames.
    """
    report = CodesReport({"folder": folder.name})
    opener = next(store for store in STORES if folder.name.startswith(f"{store.Manifest.kind.name}-"))
    try:
        manifest = opener.Manifest.read(folder)
        report.facts |= {"tokenizer": manifest.tokenizer, "grid": list(manifest.grid), "stride": list(manifest.stride)}
        store = opener(folder.parent, manifest.tokenizer)
        if isinstance(store, CodeStore):
            report.facts["vocabulary"] = store.vocabulary
        if isinstance(store, LatentStore):
            report.facts |= {"channels": store.channels, "mean": list(store.mean), "std": list(store.std)}
        if store.directory != folder:
            noun = store.kind.noun
            raise ValueError(f"{folder / MANIFEST} is of a tokenizer whose {noun} belong into {store.directory.name}")
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


def _damages(store: GridStore) -> Iterator[Problem]:
    """Yield damages in the contents of shards: checksums, and values that cannot be."""
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
    """Print the contents of a folder of tokens or latents on one line."""
    if "clips" not in facts:
        click.echo(f"  {facts['folder']}  cannot be read")
        return
    grid, (frames, pixels) = "x".join(map(str, facts["grid"])), facts["stride"]
    if "vocabulary" in facts:
        what, one = f"{grid} tokens below {facts['vocabulary']}", "a token"
    else:
        what, one = f"{facts['channels']}x{grid} latents", "a cell"
    click.echo(
        f"  {facts['folder']}  tokenizer {facts['tokenizer']}\n    {facts['shards']} shards  {facts['clips']} clips  "
        f"{facts['steps']} steps of {what}, a step is {frames} frames, {one} {pixels} pixels  "
        f"{facts['bytes'] / 1e6:.1f} MB"
    )


def inspect_codes_alone(root: Path, quick: bool) -> None:
    """Inspect a dataset that has tokens or latents but no frames; raise `ValueError` if training would reject them."""
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
            f"{CODES.command(root)}"
        )
