"""Make a dataset of clips with actions from the folders of TECO: npz files, or videos with a npz file beside each.

Example:
  python -m dataset_tools.make_dataset_from_npz dmlab/train data/dmlab/train
"""

from pathlib import Path
from typing import Any

import click

from dataset_tools import making
from dataset_tools.layouts import make_from_layout, source_fps_option
from training.data.layouts.find import find_layout
from training.data.layouts.folder import Folder


@click.command(epilog="Example: python -m dataset_tools.make_dataset_from_npz dmlab/train data/dmlab/train")
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("output_dir", type=click.Path(file_okay=False, path_type=Path))
@source_fps_option
@making.maker_options(None)
def main(source: Path, output_dir: Path, source_fps: float | None, recipe: making.Recipe, job: dict[str, Any]) -> None:
    """Store the clips below SOURCE as a dataset in OUTPUT_DIR, with their actions.

    A clip is a npz file with video, uint8 (T, H, W, 3), and actions, or a video with a npz file of the same name that
    has actions; further arrays with a value for each frame are stored likewise. Of a folder that holds train and test,
    train is taken. Frames keep their size unless --sizes is given.
    """
    layout = find_layout(source)
    if not isinstance(layout, Folder):
        raise ValueError(f"{source} holds no npz files or videos; give a folder of TECO, such as dmlab/train")
    make_from_layout(layout, output_dir, source_fps, recipe, job, ("imageio-ffmpeg", "pillow", "numpy"))


if __name__ == "__main__":
    main()
