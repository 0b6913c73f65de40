"""Checks of a whole dataset; dataset_tools.inspect_dataset is the command."""

import collections
import concurrent.futures
import contextlib
import functools
import io
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from dataset_tools import archive
from dataset_tools.frames import Size
from dataset_tools.inspect_codes import codes_folders, inspect_codes, inspect_codes_alone, print_codes
from dataset_tools.inspect_findings import KINDS, Findings, commands
from dataset_tools.inspect_shard import (
    Clip,
    ClipScan,
    Match,
    Shard,
    draw_sheet,
    match_clip,
    mismatch,
    parse_size,
    partition_of,
    same_aspect,
    scan_clip,
)
from dataset_tools.names import LRES_FRAMES, SRES_FRAMES, train_command
from dnnlib.text import one_line
from dnnlib.util import atomic_path, format_time
from training.data.audio_store import AudioStore, has_audio
from training.data.dataset import ASSUMED_FPS, ClipDataset
from training.data.description import DESCRIPTION, MANIFEST, read_description, read_manifest
from training.data.streams import LABEL, LABELS_FILE, StreamStore, stored_streams

_SHOWN_PLACES = 4  # of each kind of problem; the JSON file has more
_QUICK_CLIPS = 64  # clips whose images are compared between sizes


@dataclass
class Tally:
    """The statistics of one size."""

    num_shards: int = 0
    num_frames: int = 0
    num_bytes: int = 0
    num_read: int = 0  # frames
    formats: collections.Counter[tuple[str, int]] = field(default_factory=collections.Counter)
    clips: dict[str, Clip] = field(default_factory=dict)


@dataclass
class Dataset:
    """A dataset under inspection: its zips by folder, its description, and the findings."""

    root: Path
    shards: dict[str, list[Path]]
    description: dict[str, Any] | None = None
    manifest: dict[str, dict[str, Any]] = field(default_factory=dict)
    findings: Findings = field(default_factory=Findings)
    tallies: dict[str, Tally] = field(default_factory=dict)
    matches: list[float] = field(default_factory=list)
    told: set[tuple[str, str]] = field(default_factory=set)  # (kind, clip) of reported problems
    compared: set[str] = field(default_factory=set)  # folders


def _size(folder: str) -> Size:
    size = parse_size(folder)
    assert size is not None, folder
    return size


def _area(folder: str) -> int:
    height, width = _size(folder)
    return height * width


def open_dataset(root: Path) -> Dataset:
    """List the zips of a dataset and read its description; raise ValueError if it has no folder of any size."""
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and parse_size(path.name))
    if not folders:
        inner = sorted(path.parent for path in root.glob("*/[0-9]*x[0-9]*") if parse_size(path.name))
        if parse_size(root.resolve().name):
            advice = f"this is the folder of one size; give {root.resolve().parent}"
        elif inner:
            advice = f"it holds datasets; give {inner[0]}"
        else:
            advice = "give the root of a dataset, or make one: python -m dataset_tools.make_dataset_from_videos --help"
        raise ValueError(f"{root} has no folders of frame sizes such as 0036x0064; {advice}")
    shards = {name: sorted(path for path in (root / name).glob("[!.]*.zip")) for name in folders}
    dataset = Dataset(root, shards)
    findings = dataset.findings
    try:
        dataset.description = read_description(root)
    except ValueError as error:
        findings.report("damaged description", DESCRIPTION, str(error))
    try:
        dataset.manifest = read_manifest(root) if dataset.description is not None else {}
    except ValueError as error:  # training does not read it
        findings.report("stale manifest", MANIFEST, str(error))
    if not (root / DESCRIPTION).exists():
        findings.report("no description", DESCRIPTION)
    for name, paths in shards.items():
        if not paths:
            findings.report("no shards", name)
        for path in sorted([*(root / name).glob(".*.tmp*"), *(root / name).glob("*.lock")]):
            findings.report("leftover", f"{name}/{path.name}")
        for path in paths:
            if partition_of(path) is None:
                findings.report("odd name", f"{name}/{path.name}")
    if len(folders) == 1:
        findings.report("one size", f"there is only {folders[0]}")
    return dataset


# ----------------------------------------------------------------------------
# Reading.


def _in_order(jobs: Iterable[tuple[Callable[[], Any], Callable[[Any], None]]], workers: int) -> None:
    """Run jobs in threads, a few ahead, and pass each result to its callback, in order."""
    pending = collections.deque[tuple[concurrent.futures.Future[Any], Callable[[Any], None]]]()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            for job, receive in jobs:
                pending.append((pool.submit(job), receive))
                if len(pending) > 4 * workers:
                    future, receive = pending.popleft()
                    receive(future.result())
            for future, receive in pending:
                receive(future.result())
        finally:
            pool.shutdown(cancel_futures=True)


def scan(dataset: Dataset, all_frames: bool, workers: int) -> None:
    """Read all zips, fill the tallies, and report problems within each zip."""
    total = sum(path.stat().st_size for paths in dataset.shards.values() for path in paths)
    with click.progressbar(length=total, label="Reading frames") as bar:
        _in_order(_scan_jobs(dataset, all_frames, bar), workers)
        bar.update(total - bar.pos)


def _scan_jobs(
    dataset: Dataset, all_frames: bool, bar: Any
) -> Iterator[tuple[Callable[[], Any], Callable[[Any], None]]]:
    listed = (dataset.description or {}).get("hashes", {})
    for folder, paths in dataset.shards.items():
        tally = dataset.tallies[folder] = Tally()
        for path in paths:
            shard = Shard(path)
            dataset.findings.add(shard.problems)
            tally.num_shards += 1
            tally.num_bytes += path.stat().st_size
            if all_frames and shard.name in listed:

                def compare(digest: str, shard: Shard = shard) -> None:
                    if digest != listed[shard.name]:
                        dataset.findings.report("changed shard", shard.name, "", shard.partition)

                yield lambda path=path: archive.file_sha256(path), compare
            for clip in list(shard.clips):
                summary = shard.summary(clip)
                if summary.num_frames:
                    _enter(dataset, tally, shard, clip, summary)
                num_bytes = sum(entry.compress_size for entry in shard.clips[clip])

                def receive(
                    result: ClipScan, shard: Shard = shard, clip: str = clip, num_bytes: int = num_bytes
                ) -> None:
                    _take(dataset, shard, clip, result)
                    bar.update(num_bytes)

                yield lambda shard=shard, clip=clip: scan_clip(shard, clip, all_frames), receive
            yield lambda: None, functools.partial(_close, [shard])


def _enter(dataset: Dataset, tally: Tally, shard: Shard, clip: str, summary: Clip) -> None:
    """Add a clip, as listed in the directory of a zip."""
    place = f"{shard.name}  {clip}"
    if clip in tally.clips:
        first = tally.clips[clip].shard.name
        dataset.findings.report("clip twice", place, f"also in {first}", shard.partition)
        return
    tally.clips[clip] = summary
    tally.num_frames += summary.num_frames
    if summary.num_repeats == summary.num_frames - 1 > 0:
        _tell_once(dataset, "still clip", shard, clip, f"{summary.num_frames} equal frames")
    elif summary.repeats_every:
        detail = f"{summary.num_repeats} of {summary.num_frames} frames, every {summary.repeats_every} frames"
        _tell_once(dataset, "repeated frames", shard, clip, detail)


def _tell_once(dataset: Dataset, kind: str, shard: Shard, clip: str, detail: str) -> None:
    """Report a problem of a clip's frames, unless it was reported for another size."""
    if (kind, clip) not in dataset.told:
        dataset.told.add((kind, clip))
        dataset.findings.report(kind, f"{shard.name}  {clip}", detail, shard.partition)


def _take(dataset: Dataset, shard: Shard, clip: str, result: ClipScan) -> None:
    """Add the result of reading the frames of a clip."""
    folder = shard.path.parent.name
    dataset.findings.add(result.problems)
    tally = dataset.tallies[folder]
    tally.num_read += result.num_frames
    tally.formats.update(result.formats)
    if result.num_blank:
        kind = "blank clip" if result.num_blank == result.num_frames else "blank frames"
        _tell_once(dataset, kind, shard, clip, f"{result.num_blank} of {result.num_frames} frames")
    known = dataset.manifest.get(clip, {}).get("sha256", {}).get(folder, result.sha256)
    if result.sha256 is not None and known != result.sha256:
        dataset.findings.report("stale manifest", f"{shard.name}  {clip}", "another hash", shard.partition)


def check_clips(dataset: Dataset) -> None:
    """Compare the clips between sizes, and with each other, by the directories of the zips."""
    findings = dataset.findings
    names = sorted({clip for tally in dataset.tallies.values() for clip in tally.clips})
    for name in names:
        found = {folder: tally.clips.get(name) for folder, tally in dataset.tallies.items() if tally.num_shards}
        present = {folder: clip for folder, clip in found.items() if clip is not None}
        first, reference = next(iter(present.items()))
        partition = partition_of(reference.shard)
        for folder in found.keys() - present.keys():
            findings.report("absent clip", f"{folder}  {name}", f"it is in {first}", partition)
        for folder, clip in present.items():
            if clip.num_frames != reference.num_frames:
                detail = f"{clip.num_frames} frames, but {reference.num_frames} in {first}"
                findings.report("different frames", f"{folder}  {name}", detail, partition)
            elif clip.names != reference.names:
                findings.report("different frames", f"{folder}  {name}", f"other names than in {first}", partition)
        if dataset.manifest and dataset.manifest.get(name, {}).get("frames") != reference.num_frames:
            detail = f"{dataset.manifest[name].get('frames')} frames" if name in dataset.manifest else "not in it"
            findings.report("stale manifest", f"{first}  {name}", detail, partition)
    for name in dataset.manifest.keys() - set(names):
        findings.report("stale manifest", name, "no zip has it")
    clips = next((tally.clips for tally in dataset.tallies.values() if tally.clips), {})
    by_content: dict[tuple[int, bytes], str] = {}
    for name, clip in clips.items():
        twin = by_content.setdefault((clip.num_frames, clip.content), name)
        if twin != name:
            findings.report("same clip", name, f"as {twin}", partition_of(clip.shard))


def match_sizes(dataset: Dataset, all_clips: bool, workers: int) -> None:
    """Check that the images of each clip are the same in all sizes of an aspect ratio, in some frames of it."""
    largest = sorted(dataset.tallies, key=_area, reverse=True)
    pairs = []
    for folder in largest:
        reference = next(other for other in largest if same_aspect(_size(folder), _size(other)))
        if reference == folder:
            continue
        dataset.compared |= {folder, reference}
        small, large = dataset.tallies[folder].clips, dataset.tallies[reference].clips
        names = [name for name in small if name in large and small[name].num_frames == large[name].num_frames]
        step = 1 if all_clips else max(len(names) // _QUICK_CLIPS, 1)
        pairs += [(small[name].shard, large[name].shard, name) for name in names[::step]]

    def jobs(bar: Any) -> Iterator[tuple[Callable[[], Any], Callable[[Any], None]]]:
        for paths, group in itertools.groupby(sorted(pairs), key=lambda pair: pair[:2]):
            shards = [Shard(path) for path in paths]
            for _, _, name in group:

                def receive(
                    match: Match | None, shard: Shard = shards[0], large: Shard = shards[1], name: str = name
                ) -> None:
                    bar.update(1)
                    if match is not None:
                        dataset.matches.append(match.distance)
                        if detail := mismatch(match):
                            place = f"{shard.name}  {name}"
                            detail = f"{detail} against {large.path.parent.name}"
                            dataset.findings.report("other pictures", place, detail, shard.partition)

                yield lambda shards=shards, name=name: match_clip(shards[0], shards[1], name), receive
            yield lambda: None, functools.partial(_close, shards)

    if pairs:
        with click.progressbar(length=len(pairs), label="Comparing sizes") as bar:
            _in_order(jobs(bar), workers)


def _close(shards: Sequence[Shard], _: None) -> None:
    for shard in shards:
        shard.close()


def check_description(dataset: Dataset) -> None:
    """Compare dataset.json with the existing zips."""
    findings, description = dataset.findings, dataset.description
    here = {f"{folder}/{path.name}": path for folder, paths in dataset.shards.items() for path in paths}
    indices = {index for path in here.values() if (index := partition_of(path)) is not None}
    if description is None:
        for index in sorted(set(range(max(indices, default=-1) + 1)) - indices):
            findings.report("gap", archive.shard_name(index), "", index)
        return
    listed = description.get("hashes")
    if listed is not None:
        for name in sorted(listed.keys() - here.keys()):
            findings.report("missing shard", name, "", partition_of(Path(name)))
        for name in sorted(here.keys() - listed.keys()):
            findings.report("extra shard", name, "", partition_of(Path(name)))
    made = description.get("partitions", {})
    for index in range(description.get("num_partitions", 0) if "partitions" in description else 0):
        if f"{index:04d}" not in made:
            findings.report("unfinished", f"partition {index}", "", index)
    rates = collections.Counter[str]()
    for entry in made.values():
        rates.update(entry.get("rates", {}))
    if len(rates) > 1:
        for rate, count in rates.most_common():
            findings.report("several rates", f"{rate} frames per second", f"{count} clips")


# ----------------------------------------------------------------------------
# The report.


def ask_loader(dataset: Dataset, num_frames: int) -> float:
    """Open the dataset as training does, report the error if that fails, and return the frame rate."""
    sizes = [_size(folder) for folder in dataset.shards]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # its messages are among the findings
            clips = ClipDataset(dataset.root, sizes)
    except ValueError as error:
        dataset.findings.report("refused", str(error))
        return float((dataset.description or {}).get("fps") or ASSUMED_FPS)
    try:
        clips.eligible(num_frames)
    except ValueError as error:
        dataset.findings.report("no long clip", str(error))
    _ask_for_streams(dataset, clips)
    return clips.fps


def _ask_for_streams(dataset: Dataset, clips: ClipDataset) -> None:
    """Open all streams as systems that read them do, and report those that are refused."""
    root = dataset.root
    names = {name for paths in dataset.shards.values() for path in paths for name in stored_streams(path)}
    for name in [*sorted(names), *([LABEL] if (root / LABELS_FILE).exists() else [])]:
        try:
            StreamStore(root, name, clips.clips)
        except ValueError as error:
            dataset.findings.report("damaged stream", str(error))
    try:
        if has_audio(root):
            store = AudioStore(root, clips.clips)
            for clip in range(len(clips.clips)):
                store.read_all(clip)
    except ValueError as error:
        dataset.findings.report("damaged stream", str(error))


def histogram(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return clips by length in about ten round steps: first and last length, number of clips."""
    low, high = min(lengths), max(lengths)
    step = next(s for e in range(9) for s in (10**e, 2 * 10**e, 5 * 10**e) if (high - low) // s < 10)
    counts = collections.Counter(length // step for length in lengths)
    return [(k * step, (k + 1) * step - 1, counts[k]) for k in range(low // step, high // step + 1)]


def build_report(dataset: Dataset, num_frames: int, quick: bool) -> dict[str, Any]:
    """Return the report as plain values; opens the dataset as training does first."""
    tallies, findings = dataset.tallies, dataset.findings
    clips = max((tally.clips for tally in tallies.values()), key=len, default={})
    lengths = [clip.num_frames for clip in clips.values()]
    needs = {"training": num_frames} if num_frames != LRES_FRAMES else {"low resolution": LRES_FRAMES}
    needs["super-resolution"] = SRES_FRAMES
    for name, clip in clips.items():
        if clip.num_frames < max(needs.values()):
            findings.report("short clip", name, f"{clip.num_frames} frames", partition_of(clip.shard))
    codes = [
        inspect_codes(folder, {n: c.num_frames for n, c in clips.items()}, quick)
        for folder in codes_folders(dataset.root)
    ]
    findings.add(problem for found in codes for problem in found.problems)
    rate = ask_loader(dataset, num_frames)
    makers = functools.partial(
        commands, dataset.root, dataset.description or {}, dataset.shards, num_frames=max(needs.values()), fps=rate
    )
    sizes = {
        folder: {
            "shards": tally.num_shards,
            "clips": len(tally.clips),
            "frames": tally.num_frames,
            "frames_read": tally.num_read,
            "bytes": tally.num_bytes,
            "chroma": dict(_fold(tally.formats, 0)),
            "quality": {str(quality): count for quality, count in sorted(_fold(tally.formats, 1).items()) if quality},
        }
        for folder, tally in tallies.items()
    }
    return {
        "root": str(dataset.root),
        "accepted": not findings.num_errors,
        "quick": quick,
        "fps": rate,
        "sizes": sizes,
        "codes": [found.facts for found in codes],
        "clips": len(clips),
        "frames": sum(lengths),
        "hours": sum(lengths) / rate / 3600,
        "lengths": [{"from": a, "to": b, "clips": n} for a, b, n in histogram(lengths)] if lengths else [],
        "long_enough": {
            stage: {"frames": count, "clips": sum(length >= count for length in lengths)}
            for stage, count in needs.items()
        },
        "matching": {
            "clips_compared": len(dataset.matches),
            "not_compared": sorted(sizes.keys() - dataset.compared) if len(sizes) > 1 else [],
            "median_distance": float(np.median(dataset.matches)) if dataset.matches else None,
        },
        "findings": [
            {
                "kind": kind,
                "severity": "error" if KINDS[kind].is_error else "remark",
                "title": KINDS[kind].title,
                "count": findings.counts[kind],
                "places": [{"place": p.place, "detail": p.detail} for p in findings.kept[kind]],
                "mend": KINDS[kind].mend.format(**makers(partitions=findings.partitions.get(kind, set()))),
            }
            for kind in KINDS
            if kind in findings.counts
        ],
    }


def _fold(formats: Mapping[tuple[str, int], int], part: int) -> collections.Counter[Any]:
    counts = collections.Counter[Any]()
    for key, count in formats.items():
        counts[key[part]] += count
    return counts


def print_report(report: Mapping[str, Any]) -> None:
    """Print the report as text."""
    click.echo(
        f"\n{report['root']}: {report['clips']} clips, {report['frames']} frames, {report['hours']:.2f} hours at "
        f"{report['fps']:g} frames per second\n"
    )
    for folder, size in report["sizes"].items():
        chroma = ", ".join(size["chroma"])
        quality = "-".join(dict.fromkeys([*list(size["quality"])[:1], *list(size["quality"])[-1:]]))
        click.echo(
            f"  {folder}  {size['shards']} shards  {size['clips']} clips  {size['frames']} frames  "
            f"{size['bytes'] / 1e6:.1f} MB  chroma {chroma or 'unknown'}  quality {quality or 'unknown'}"
        )
    for facts in report["codes"]:
        print_codes(facts)
    if report["lengths"]:
        click.echo("\n  frames         clips")
        most = max(entry["clips"] for entry in report["lengths"])
        for entry in report["lengths"]:
            bar = "#" * -(-40 * entry["clips"] // most)
            click.echo(f"  {entry['from']:>5} - {entry['to']:<5} {entry['clips']:>6}  {bar}".rstrip())
    click.echo()
    for stage, entry in report["long_enough"].items():
        click.echo(f"  {entry['clips']} of {report['clips']} clips have the {entry['frames']} frames for {stage}")
    if report["matching"]["clips_compared"]:
        click.echo(
            f"  {report['matching']['clips_compared']} clips compared between sizes; their images differ by "
            f"{report['matching']['median_distance']:.1f} grey levels (median)"
        )
    if report["matching"]["not_compared"]:
        click.echo(
            f"  not compared, without a size of equal aspect ratio: {', '.join(report['matching']['not_compared'])}"
        )
    for finding in sorted(report["findings"], key=lambda finding: finding["severity"]):
        number = f": {finding['count']}" if finding["count"] > 1 else ""
        color = "red" if finding["severity"] == "error" else "yellow"
        click.echo(f"\n{click.style(finding['severity'].upper(), fg=color)}  {finding['title']}{number}")
        for entry in finding["places"][:_SHOWN_PLACES]:
            click.echo(f"    {entry['place']}{': ' if entry['detail'] else ''}{entry['detail']}")
        if finding["count"] > _SHOWN_PLACES:
            click.echo(f"    and {finding['count'] - _SHOWN_PLACES} more")
        click.echo(f"  mend: {one_line(finding['mend'], 2000)}")


def inspect(
    root: Path, num_frames: int, json_path: Path | None, sheet: Path | None, workers: int | None, quick: bool
) -> None:
    """Check a dataset and print the report; raise `click.ClickException` if training would reject it."""
    workers = workers or len(os.sched_getaffinity(0))
    try:
        if codes_folders(root) and not any(parse_size(path.name) for path in root.iterdir()):
            return inspect_codes_alone(root, quick)
        dataset = open_dataset(root)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    start = time.monotonic()
    scan(dataset, not quick, workers)
    seconds = time.monotonic() - start
    check_clips(dataset)
    check_description(dataset)
    has_clips = any(tally.clips for tally in dataset.tallies.values())
    if has_clips:
        match_sizes(dataset, not quick, workers)
    report = build_report(dataset, num_frames, quick)
    num_read = sum(tally.num_read for tally in dataset.tallies.values())
    report |= {"seconds": seconds, "frames_per_sec": num_read / seconds}
    print_report(report)
    click.echo(f"\n{num_read} frames read in {format_time(seconds)}, {num_read / seconds:.0f} frames per second")
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(json_path) as path:
            Path(path).write_text(json.dumps(report, indent=2) + "\n")
    if sheet is not None and has_clips:
        draw_sheet(dataset.tallies[max(dataset.tallies, key=_area)].clips, sheet)
        click.echo(f"{sheet} shows some clips")
    if not report["accepted"]:
        raise click.ClickException(f"{dataset.findings.num_errors} errors: training would reject or suffer from this")
    click.echo(f"Training would accept it. Next: {train_command(root, filter(None, map(parse_size, dataset.tallies)))}")
