"""Write a dataset as HDF5: shards of RIVER, or a split of an indexed file of TATS and MeBT.

Example:
  python -m dataset_tools.make_hdf5_from_dataset data/mine hdf5/train --size 64x64
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from dataset_tools.frames import SizesType
from dnnlib import util
from dnnlib.text import quote
from training.data.layouts.hdf5 import load_h5py, open_hdf5

if TYPE_CHECKING:  # it imports torch, which the help does without
    from training.data.dataset import ClipDataset, Size

_CONTENT = "longtake_content"  # attribute that tells of which frames a file was made
_CHUNK_FRAMES = 64  # frames that are read at once
SHARD_CLIPS = 100_000  # as published


def write_river_shard(path: Path, dataset: ClipDataset, size: Size, clips: Sequence[int], bar: Any) -> None:
    """Write the given clips as one shard of RIVER, numbered from 0.

    `atomic_path` has locked the file, and HDF5 would refuse it for that.
    """
    h5py = load_h5py()
    with util.atomic_path(path) as temporary, h5py.File(temporary, "w", locking=False) as file:
        file.attrs[_CONTENT] = dataset.store(size).content_key(clips)
        file.create_group("videos")
        lengths = file.create_group("len")
        for number, clip in enumerate(clips):
            num_frames = dataset.clips[clip].num_frames
            lengths.create_dataset(str(number), data=num_frames)
            group = file.create_group(str(number))
            for frame, pixels in enumerate(_frames(dataset, size, clip)):
                group.create_dataset(str(frame), data=pixels, compression="lzf")
            bar.update(1)


def write_river(out: Path, dataset: ClipDataset, size: Size, shard_clips: int, skip_made: bool) -> None:
    """Write a folder of shards; with `skip_made` keep those that were made of the same frames.

    Unlike the published converter it leaves no empty shard after a multiple of `shard_clips` clips.
    """
    out.mkdir(parents=True, exist_ok=True)
    numbers = range(len(dataset.clips))
    shards = [numbers[start : start + shard_clips] for start in range(0, len(numbers), shard_clips)]
    paths = [out / f"shard_{number + 1:04d}.hdf5" for number in range(len(shards))]
    strangers = sorted({path.name for path in out.glob("*.hdf5")} - {path.name for path in paths})
    if strangers:
        raise ValueError(f"{out} holds {strangers[0]}, which would be read as a part of the dataset; delete it")
    with click.progressbar(length=len(numbers), label="Writing clips") as bar:
        for path, clips in zip(paths, shards, strict=True):
            if skip_made and _content_of(path) == dataset.store(size).content_key(clips):
                bar.update(len(clips))
            else:
                write_river_shard(path, dataset, size, clips, bar)


def write_indexed(out: Path, dataset: ClipDataset, size: Size, split: str, skip_made: bool) -> None:
    """Write a split of an indexed file, to which other splits may have been written before."""
    h5py = load_h5py()
    content = dataset.store(size).content_key()
    starts = np.cumsum([0, *(clip.num_frames for clip in dataset.clips)])
    if out.exists():
        with open_hdf5(out) as file:
            held = file.attrs.get(f"{_CONTENT}_{split}") if f"{split}_data" in file else None
            if skip_made and held == content:
                return
            if f"{split}_data" in file:
                raise ValueError(f"{out} already holds the split {split}; delete it, or give another --split")
    out.parent.mkdir(parents=True, exist_ok=True)
    with util.atomic_path(out) as temporary:
        if out.exists():
            shutil.copyfile(out, temporary)
        with h5py.File(temporary, "a", locking=False) as file:
            file.attrs[f"{_CONTENT}_{split}"] = content
            file.create_dataset(f"{split}_idx", data=starts)
            data = file.create_dataset(f"{split}_data", (int(starts[-1]), *size, 3), np.uint8)
            with click.progressbar(range(len(dataset.clips)), label="Writing clips") as clips:
                for clip in clips:
                    for frame, pixels in enumerate(_frames(dataset, size, clip), start=int(starts[clip])):
                        data[frame] = pixels


def _frames(dataset: ClipDataset, size: Size, clip: int):
    """Yield the frames of a clip, uint8 (H, W, 3)."""
    num_frames = dataset.clips[clip].num_frames
    for start in range(0, num_frames, _CHUNK_FRAMES):
        yield from dataset.read(clip, size, range(start, min(start + _CHUNK_FRAMES, num_frames)))


def _content_of(path: Path) -> str | None:
    """Return of which frames a shard was made, None if it is not there, is damaged or of another maker."""
    if not path.exists():
        return None
    try:
        with open_hdf5(path) as file:
            return file.attrs.get(_CONTENT)
    except (OSError, ValueError):
        return None


@click.command(epilog="Example: python -m dataset_tools.make_hdf5_from_dataset data/mine hdf5/train --size 64x64")
@click.argument("root", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--layout",
    help="A folder OUT of shards, or a file OUT with one entry of frames a split",
    type=click.Choice(["river", "indexed"]),
    default="river",
    show_default=True,
)
@click.option("--size", help="Frame size, height x width  [default: the only one that there is]", type=SizesType())
@click.option("--split", help="Split of an indexed file", default="train", show_default=True)
@click.option(
    "--shard-clips", help="Clips in a shard", type=click.IntRange(min=1), default=SHARD_CLIPS, show_default=True
)
@click.option("--skip-made", help="Keep what was made of the same frames", is_flag=True)
def main(
    root: Path,
    out: Path,
    layout: str,
    size: tuple[Size, ...] | None,
    split: str,
    shard_clips: int,
    skip_made: bool,
) -> None:
    """Write the frames of the dataset ROOT as HDF5 to OUT. Actions, poses and labels have no place there."""
    from training.data.dataset import ClipDataset

    try:
        chosen = _choose_size(root, size)
        dataset = ClipDataset(root, [chosen])
        if layout == "river":
            write_river(out, dataset, chosen, shard_clips, skip_made)
        elif not split.isidentifier():
            raise ValueError(f"--split is {split}; give a name such as train")
        else:
            write_indexed(out, dataset, chosen, split, skip_made)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    num_frames = sum(clip.num_frames for clip in dataset.clips)
    back = out if layout == "river" else out / split
    click.echo(
        f"{len(dataset.clips)} clips, {num_frames} frames of {chosen[0]}x{chosen[1]} are in {out}. To make a dataset "
        f"of it again: python -m dataset_tools.make_dataset_from_hdf5 {quote(back)} DATASET"
    )


def _choose_size(root: Path, size: tuple[Size, ...] | None) -> Size:
    from training.data.footage import dataset_sizes

    sizes = list(size or dataset_sizes(root))
    if len(sizes) != 1:
        found = ", ".join("{}x{}".format(*pair) for pair in sizes) or "no folder of frames"
        raise ValueError(f"{root} has {found}: give one size by --size")
    return sizes[0]


if __name__ == "__main__":
    main()
