"""The kinds of problems that `inspect_dataset` finds, their severity, and the command that fixes each."""

import collections
import functools
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dataset_tools import making
from dataset_tools.frames import Size
from dataset_tools.inspect_shard import Problem, parse_size, partition_of
from dnnlib.text import one_line

_KEPT_PLACES = 1000  # of each kind of problem
_SMALL_EDGE = 128  # sizes with a shorter long edge are assumed to be for the low-resolution stage


class Kind(NamedTuple):
    """A kind of problem: whether training would reject the dataset or suffer from it, a description, and the fix.

    In `mend`, {again} stands for the command that makes the affected partitions again, {all} for the one that makes
    everything, {longer} for that without short clips, {other_size} for that at a second size, {one_rate} for that at
    the frame rate of most clips, {root} for the dataset.
    """

    is_error: bool
    title: str
    mend: str


_AGAIN, _MERGE = "{again}", "python -m dataset_tools.merge {root}"
_ENCODE = "python -m dataset_tools.encode_dataset {root} --tokenizer=FILE"

KINDS = {
    "damaged shard": Kind(True, "zips that are not whole", _AGAIN),
    "no index": Kind(True, "zips without a readable frame_paths.json", _AGAIN),
    "no shards": Kind(True, "sizes without any zip", "{all}"),
    "missing shard": Kind(
        True, "zips that dataset.json lists, but that are not there", "{again}  or, without them: " + _MERGE
    ),
    "extra shard": Kind(
        True, "zips that dataset.json does not list", "delete them, or, if they belong there: " + _MERGE
    ),
    "changed shard": Kind(
        True, "zips that are not those which dataset.json describes", "{again}  or, if they are right: " + _MERGE
    ),
    "damaged description": Kind(
        True, "files that should describe the dataset, but cannot be read", "delete them, then: " + _MERGE + " --fps 30"
    ),
    "clip twice": Kind(
        True,
        "clips that are in two zips, as after runs with different --num-partitions",
        "delete the older zips, then: " + _MERGE,
    ),
    "missing frame": Kind(True, "frames that frame_paths.json names, but that are not there", _AGAIN),
    "damaged frame": Kind(True, "frames whose bytes are damaged", _AGAIN),
    "unreadable frame": Kind(True, "frames that are no image", _AGAIN),
    "colour mode": Kind(True, "frames that are not RGB", _AGAIN),
    "frame size": Kind(True, "frames of another size than their folder's", _AGAIN),
    "encrypted entry": Kind(True, "zips with encrypted entries", _AGAIN),
    "unknown compression": Kind(True, "zips with an unsupported compression method", _AGAIN),
    "absent clip": Kind(True, "clips that not all sizes have", _AGAIN),
    "different frames": Kind(True, "clips whose frames differ in number or name between sizes", _AGAIN),
    "other pictures": Kind(True, "clips whose sizes do not show the same images", _AGAIN),
    "blank clip": Kind(True, "clips in which every frame has a single colour", "delete their sources, then: {all}"),
    "still clip": Kind(True, "clips in which nothing ever changes", "delete their sources, then: {all}"),
    "no long clip": Kind(True, "no clip is long enough", "add longer footage, then: {longer}"),
    "refused": Kind(True, "training refuses the dataset", "see the message"),
    "damaged stream": Kind(True, "streams that systems which read them reject", _AGAIN),
    "damaged tokens": Kind(True, "tokens or latents that are damaged", "delete what is damaged, then: " + _ENCODE),
    "compressed entry": Kind(False, "zips that are compressed, which gains nothing and slows reading down", _AGAIN),
    "double entry": Kind(False, "zips that hold entries twice, as when a published tool ran twice", _AGAIN),
    "unlisted entry": Kind(False, "entries that frame_paths.json does not name; they are never read", _AGAIN),
    "empty clip": Kind(False, "clips without frames; they are skipped", _AGAIN),
    "same clip": Kind(
        False,
        "clips that are the same, frame by frame, as another one",
        "delete all but one source of each, then: {all}",
    ),
    "blank frames": Kind(
        False,
        "clips with frames of a single colour",
        "leave them out by --trim-start, --trim-end or --split-shots: {all}",
    ),
    "repeated frames": Kind(
        False,
        "clips in which frames are repeated at regular intervals",
        "the source probably has fewer frames per second; give its rate by --fps: {all}",
    ),
    "short clip": Kind(
        False,
        "clips too short for one or both stages of training; they are skipped",
        "make it without them: {longer}",
    ),
    "one size": Kind(
        False,
        "super-resolution is trained on two sizes",
        "make another as this one was made: {other_size}",
    ),
    "unfinished": Kind(False, "partitions that have not been made", "{again}"),
    "gap": Kind(False, "numbers that lack between those of the zips", "if they were not empty: {again}"),
    "stale manifest": Kind(False, "clips of which manifest.json says something else", _MERGE),
    "no description": Kind(False, "without dataset.json, 30 frames per second are assumed", _MERGE + " --fps 30"),
    "several rates": Kind(False, "clips differ in frame rate", "store all clips at one: {one_rate}"),
    "odd name": Kind(
        False,
        "zips not named like partition_0000.zip; training reads them, other tools do not",
        "rename them, then: " + _MERGE,
    ),
    "other tokens": Kind(
        False, "tokens or latents of other clips than there are; systems trained on them reject them", _ENCODE
    ),
    "leftover": Kind(
        False, "files left behind by a maker that was killed, or in use by one that runs", "if none runs, delete them"
    ),
}


@dataclass
class Findings:
    """Problems, grouped by kind."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    kept: dict[str, list[Problem]] = field(default_factory=dict)
    partitions: dict[str, set[int]] = field(default_factory=dict)

    def add(self, problems: Iterable[Problem]) -> None:
        """Add problems; of each kind only the first ones are kept, the others are counted."""
        for problem in problems:
            assert problem.kind in KINDS, problem
            self.counts[problem.kind] += 1
            kept = self.kept.setdefault(problem.kind, [])
            if len(kept) < _KEPT_PLACES:
                place, detail = one_line(problem.place, 1000), one_line(problem.detail, 1000)
                kept.append(problem._replace(place=place, detail=detail))
            if problem.partition is not None:
                self.partitions.setdefault(problem.kind, set()).add(problem.partition)

    def report(self, kind: str, place: str, detail: str = "", partition: int | None = None) -> None:
        """Add one problem."""
        self.add([Problem(kind, place, detail, partition)])

    @property
    def num_errors(self) -> int:
        """Return the number of problems that would stop or degrade training."""
        return sum(count for kind, count in self.counts.items() if KINDS[kind].is_error)


def commands(
    root: Path,
    facts: Mapping[str, Any],
    shards: Mapping[str, Sequence[Path]],
    partitions: Iterable[int],
    num_frames: int,
    fps: float,
) -> dict[str, str]:
    """Return the values of the placeholders of `Kind.mend`; clips need `num_frames`, `fps` is the usual rate."""
    again = functools.partial(command_again, root, facts, shards)
    return {
        "root": shlex.quote(str(root)),
        "again": again(partitions),
        "all": again(()),
        "longer": again((), changes={"min_frames": num_frames, "frames_per_clip": num_frames}),
        "other_size": again((), sizes=[_counterpart(size) for name in shards if (size := parse_size(name))]),
        "one_rate": again((), changes={"resampled_fps": fps}),
    }


def _counterpart(size: Size) -> Size:
    """Return the usual size of the other training stage: four times as large, or as small."""
    height, width = size
    return (height * 4, width * 4) if max(size) < _SMALL_EDGE else (max(height // 4, 1), max(width // 4, 1))


def command_again(
    root: Path,
    facts: Mapping[str, Any],
    shards: Mapping[str, Sequence[Path]],
    partitions: Iterable[int],
    changes: Mapping[str, Any] | None = None,
    sizes: Iterable[Size] | None = None,
) -> str:
    """Return the command that makes partitions again, all if none are given, according to dataset.json.

    `shards` are the existing zips, by the folder of their size; `changes` are applied to the facts of dataset.json, as
    far as its maker has such an option, and `sizes` replace the existing ones.
    """
    facts = {**facts, **(changes or {})}
    sizes = sorted(filter(None, map(parse_size, shards))) if sizes is None else sizes
    sizes_text = ",".join(f"{height}x{width}" for height, width in sizes)
    source, versions = f"path/to/{facts.get('source', 'footage')}", facts.get("versions", {})
    if "vizdoom" in versions:
        names = {
            "clips": "requested_clips",
            "frames": "frames_per_clip",
            **{name: name for name in ("split", "seed", "walker", "difficulty", "looks", "textures")},
        }
        options = {option: facts[name] for option, name in names.items() if name in facts}
        return _command("vizdoom", [root], {**options, "sizes": sizes_text})
    split = facts.get("split", "train")
    if facts.get("val_fraction"):
        root = root.resolve().parent
    if "yt-dlp" in versions:
        maker, arguments = "youtube", [source, root, "path/to/cache"]
    elif "gymnasium" in versions:
        maker, arguments = "gymnasium", [str(facts.get("source", "ENV")), root]
    elif "layout" in facts:
        maker, arguments = "hdf5" if "h5py" in versions else "npz", [source, root]
    else:
        maker = "videos" if "imageio-ffmpeg" in versions or not versions else "frames"
        arguments = [source, root]
    usual = {**making.Recipe().facts(), "val_fraction": 0.0, "source_fps": None, "max_height": None, "resize": None}
    usual |= {"action_timing": "into"}
    if maker == "gymnasium":
        usual |= dict.fromkeys(("seed", "policy", "hold", "frame_skip", "frames"))
        facts["clips"] = facts.get("num_sources")
        usual["clips"] = None
        arguments += [f"--env-arg={name}={json.dumps(value)}" for name, value in facts.get("env_args", {}).items()]
    options = {name: facts[name] for name, value in usual.items() if name in facts and facts[name] != value}
    options["fps"] = options.pop("resampled_fps", None)
    options["split"] = split if split != "train" and not facts.get("val_fraction") else None
    indices = [partition_of(path) for paths in shards.values() for path in paths]
    highest = max((index for index in indices if index is not None), default=0)
    options["num_partitions"] = facts.get("num_partitions", highest + 1)
    wanted = sorted(partitions)
    options["partition"] = wanted[0] if wanted else None
    command = _command(maker, arguments, {**options, "sizes": sizes_text})
    if len(wanted) > 1:
        command += f"  (likewise partition {', '.join(map(str, wanted[1:20]))}{', ...' if wanted[20:] else ''})"
    return command


def _command(maker: str, arguments: Sequence[str | Path], options: Mapping[str, Any]) -> str:
    words = ["python", "-m", f"dataset_tools.make_dataset_from_{maker}", *map(str, arguments)]
    for name, value in options.items():
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [f"{value}"])]
    return shlex.join(words)
