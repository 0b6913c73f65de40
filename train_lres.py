"""Train the low-resolution stage: a generator of long clips (LongVideoGAN, section 3.1).

# Smallest command (a CPU, minutes)
python train_lres.py --dataset=datasets/labdoom --preset=toy

# The published recipe on 8 GPUs
torchrun --standalone --nproc_per_node=8 train_lres.py --dataset=datasets/horseback --batch=64 --grad-accum=2

Run the same command again and training goes on where it stopped. --dry-run prints every option of a run.
"""

from typing import Any

import click

from training.longvideogan import command

STAGE = "longvideogan-lres"
NEXT = (
    "python train_sres.py --dataset={dataset}{preset}, and then "
    "python generate.py --outdir=outputs --seed=0 --lres={network}"
)


@click.command(help=str(__doc__).replace("# ", "\b\n"))
@command.common_options(STAGE)
@click.option("--size", help="Frame size, such as 36x64", type=command.Size())
@click.option("--diffaug", help="Augmentations for both networks: any of color,translation,cutout, comma-separated")
@click.option("--temporal-stretch", help="Largest change of speed, in octaves", type=command.WEIGHT)
@click.option(
    "--filter-taps",
    help="Frames that the shortest and the longest temporal filter span",
    type=(int, int),
    metavar="A B",
)
def main(size: tuple[int, int] | None, filter_taps: tuple[int, int] | None, **options: Any) -> None:
    """See the module's docstring."""
    if filter_taps:
        options["generator"] = dict(zip(("min_filter_taps", "max_filter_taps"), filter_taps, strict=True))
    options["height"], options["width"] = size or (None, None)
    command.run(STAGE, next_command=NEXT, **options)


if __name__ == "__main__":
    main()
