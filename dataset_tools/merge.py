"""Count the contents of the partitions of a dataset, and rewrite dataset.json and manifest.json from the zips.

Run it when all partitions of a job on several machines are done, or after shards were added, removed or copied by hand:
    python -m dataset_tools.merge data/mine
"""

import hashlib
import re
import zipfile
from pathlib import Path
from typing import Any

import click

from dataset_tools import archive
from dnnlib.text import one_line
from dnnlib.zips import FAULTS, reason_of
from training.data.description import read_description, read_frame_paths, read_manifest
from training.data.shards import read_frame


def read_shard(path: Path) -> dict[str, dict[str, Any]]:
    """Return the clips of a zip for the manifest; raise ValueError naming the zip if it is incomplete."""
    name = path.parent.name
    height, _, width = name.partition("x")
    size, clips = (int(height), int(width)), {}
    try:
        with zipfile.ZipFile(path) as shard:
            for clip, frames in read_frame_paths(shard).items():
                if frames:
                    digest = hashlib.sha256()
                    for frame in frames:
                        digest.update(read_frame(shard, shard.getinfo(f"{clip}/{frame}"), size))
                    clips[clip] = {"frames": len(frames), "sha256": {name: digest.hexdigest()}}
    except FAULTS as error:
        reason = reason_of(path, error)
        raise ValueError(f"{path} is not a whole dataset shard ({reason}); make or copy it again") from error
    return clips


def read_partition(root: Path, index: int, size_names: list[str]) -> archive.ShardReport:
    """Return the report of the zips of one partition; raise ValueError if its sizes do not show the same clips."""
    clips: dict[str, dict[str, Any]] = {}
    hashes = {}
    for name in size_names:
        path = root / name / archive.shard_name(index)
        if not path.exists():
            raise ValueError(f"{path} is missing while other sizes of the partition are there; make it again")
        found = read_shard(path)
        here, before = ({clip: entry["frames"] for clip, entry in part.items()} for part in (found, clips or found))
        if odd := sorted(here.items() ^ before.items()):
            clip = one_line(odd[0][0])
            raise ValueError(
                f"{path} does not show the same clips as {size_names[0]} (see {clip}); make partition {index} again at "
                "all sizes"
            )
        for clip, entry in found.items():
            clips.setdefault(clip, entry)["sha256"] |= entry["sha256"]
        hashes[f"{name}/{path.name}"] = archive.file_sha256(path)
    return archive.ShardReport(index, tuple(size_names), hashes, clips, {}, [])


@click.command(epilog="Example: python -m dataset_tools.merge data/mine")
@click.argument("root", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--fps", help="Frames per second, if there is no dataset.json", type=click.FloatRange(min=1))
def main(root: Path, fps: float | None) -> None:
    """Read all zips of the dataset ROOT, rewrite its dataset.json and manifest.json, and print the counts.

    The exit code is 1 if partitions are missing.
    """
    try:
        missing = merge(root, fps)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    if missing:
        raise click.ClickException(
            f"partitions not made yet: {', '.join(map(str, missing))}; make them by the command of the others with "
            f"--partition {missing[0]}" + (" and so on" if missing[1:] else "")
        )


def _known_clips(root: Path) -> dict[str, dict[str, Any]]:
    """Return the clips of manifest.json, which is about to be written anew."""
    try:
        return read_manifest(root)
    except ValueError as error:
        click.echo(f"Left out: {error}", err=True)
        return {}


def merge(root: Path, fps: float | None = None) -> list[int]:
    """Run the command; return the numbers of the partitions that have not been made."""
    size_names = sorted(path.name for path in root.iterdir() if re.fullmatch(r"\d{4,}x\d{4,}", path.name))
    zips = [path for name in size_names for path in (root / name).glob("[!.]*.zip")]
    if not zips:
        raise ValueError(f"{root} holds no zips in folders such as 0036x0064; give the root of a dataset")
    odd = [path for path in zips if archive.index_of(path.name) < 0]
    if odd:
        raise ValueError(f"{odd[0]} is not named like partition_0000.zip; rename it, or move it away")
    present = sorted({archive.index_of(path.name) for path in zips})

    with archive.locked(root):
        known = read_description(root) or {}
        if fps is None and known.get("fps") is None:
            raise ValueError(f"{root} has no dataset.json to tell the frame rate; give it, such as by --fps 30")
        rate = fps or known["fps"]
        with click.progressbar(present, label="Reading shards") as bar:
            reports = [read_partition(root, index, size_names) for index in bar]
        made, manifest = known.get("partitions", {}), _known_clips(root)
        partitions = {index: entry for index, entry in made.items() if not entry.get("clips")}
        clips = {}
        for report in reports:
            entry = report.summary()
            before = made.get(f"{report.index:04d}", {"clips": None})
            unchanged = before["clips"] == entry["clips"] and fps is None
            kept = before if unchanged else {"rates": {f"{rate:g}": entry["clips"]}}
            partitions[f"{report.index:04d}"] = {**kept, "clips": entry["clips"], "frames": entry["frames"]}
            for name, clip in report.clips.items():
                clips[name] = {**manifest.get(name, {}), **clip, "shard": archive.shard_name(report.index)}
        num_partitions = max(known.get("num_partitions", 0), present[-1] + 1)
        facts = {name: value for name, value in known.items() if name not in archive.DERIVED}
        hashes = {path: digest for report in reports for path, digest in report.hashes.items()}
        archive.write_description(
            root, {**facts, "num_partitions": num_partitions}, partitions, hashes, clips, known.get("versions", {})
        )
    for report in reports:
        entry = report.summary()
        click.echo(f"partition {report.index:04d}  {entry['clips']} clips  {entry['frames']} frames")
    num_frames = sum(clip["frames"] for clip in clips.values())
    click.echo(
        f"{root}: {len(clips)} clips, {num_frames} frames, {num_frames / rate / 3600:.2f} hours at "
        f"{', '.join(size_names)}"
    )
    return [index for index in range(num_partitions) if f"{index:04d}" not in partitions]


if __name__ == "__main__":
    main()
