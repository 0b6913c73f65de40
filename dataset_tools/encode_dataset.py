"""Encode the frames of a dataset with a tokenizer, for systems that are trained on tokens or on latents.

Example:
    python -m dataset_tools.encode_dataset data/mine --tokenizer=runs/tokenizer/00000/tokenizer.pkl
    python -m dataset_tools.encode_dataset data/mine --tokenizer=runs/tokenizer/00000/tokenizer.pkl --latents
"""

from pathlib import Path
from typing import Any

import click


@click.command(
    epilog="Example: python -m dataset_tools.encode_dataset data/mine --tokenizer=runs/tokenizer/00000/tokenizer.pkl"
)
@click.argument("root", type=click.Path(path_type=Path))
# fmt: off
@click.option("--tokenizer", "tokenizer_path", help="File of the tokenizer", required=True, metavar="FILE")
@click.option("--latents", "is_latents", help="Store latents before quantization instead of tokens", is_flag=True)
@click.option("--out", help="Dataset to write to  [default: ROOT]", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--batch",
    help="Clips of the tokenizer's length per batch",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
)
@click.option("--workers", help="Threads that decode  [default: one for each core]", type=click.IntRange(min=1))
@click.option(
    "--precision",
    help="Arithmetic of the tokenizer; auto: bf16 where that is faster here",
    type=click.Choice(["fp32", "bf16", "auto"]),
    default="fp32",
    show_default=True,
)
@click.option("--device", help="[default: cuda if there is a GPU]", type=click.Choice(["cpu", "cuda"]))
@click.option("--partition", help="Make this partition only, from 0 on  [default: all]", type=click.IntRange(min=0))
@click.option(
    "--num-partitions",
    help="Zips to divide the clips into  [default: as many as there are zips of frames]",
    type=click.IntRange(1, 9999),
)
# fmt: on
def main(root: Path, **options: Any) -> None:
    """Encode all frames of the dataset ROOT and store the tokens, or the latents, beside them.

    Frames are read at the tokenizer's size. Existing partitions are kept, so that an interrupted run continues when the
    command is repeated.
    """
    from dataset_tools.encoding import encode_dataset

    try:
        encode_dataset(root, **options)
    except ValueError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
