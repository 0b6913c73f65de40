"""Make a dataset of clips from HDF5 files: shards of RIVER, or an indexed file of TATS or MeBT.

`dataset_tools.make_hdf5_from_dataset` goes the other way.

Example:
  python -m dataset_tools.make_dataset_from_hdf5 bair/train data/bair
"""

from pathlib import Path
from typing import Any

import click

from dataset_tools import making
from dataset_tools.layouts import make_from_layout, source_fps_option
from training.data.layouts.find import find_layout
from training.data.layouts.hdf5 import IndexedHdf5, RiverHdf5


@click.command(epilog="Example: python -m dataset_tools.make_dataset_from_hdf5 bair/train data/bair")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("output_dir", type=click.Path(file_okay=False, path_type=Path))
@source_fps_option
@making.maker_options(None)
def main(source: Path, output_dir: Path, source_fps: float | None, recipe: making.Recipe, job: dict[str, Any]) -> None:
    """Store the clips of SOURCE as a dataset in OUTPUT_DIR.

    SOURCE is a folder of shards of RIVER, one such shard, or FILE/SPLIT of an indexed file of TATS or MeBT, where SPLIT
    is train unless given. Frames keep their size unless --sizes is given; they are then resized as RIVER or TATS does.
    """
    layout = find_layout(source)
    if not isinstance(layout, RiverHdf5 | IndexedHdf5):
        raise ValueError(f"{source} is no HDF5 file and no folder of such; give shards of RIVER, or FILE.h5/SPLIT")
    make_from_layout(layout, output_dir, source_fps, recipe, job, ("h5py", "pillow", "numpy"))


if __name__ == "__main__":
    main()
