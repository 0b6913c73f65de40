"""Train the super-resolution stage: a generator that makes low-resolution videos sharp (LongVideoGAN, section 3.2).

# Smallest command (a CPU, minutes)
python train_sres.py --dataset=datasets/labdoom --preset=toy

# The published recipe on 8 GPUs
torchrun --standalone --nproc_per_node=8 train_sres.py --dataset=datasets/horseback --batch=32 --gamma=1.0

It needs real clips at both sizes, but no low-resolution network: the two stages may train side by side. Run the same
command again and training goes on where it stopped. --dry-run prints every option of a run.
"""

from typing import Any

import click

from training.longvideogan import command

STAGE = "longvideogan-sres"
NEXT = "python generate.py --outdir=outputs --seed=0 --lres=<low-resolution network> --sres={network}"


@click.command(help=str(__doc__).replace("# ", "\b\n"))
@command.common_options(STAGE)
@click.option("--size", help="Frame size put out, such as 144x256", type=command.Size())
@click.option("--lres-size", help="Frame size taken in, such as 36x64", type=command.Size())
@click.option("--augment", help="Adaptive augmentation of what the discriminator sees: bgc, or none")
@click.option("--ada-target", help="How sure of the reals D may be before augmentation grows", type=float)
@click.option("--ada-interval", help="Steps between changes of the augmentation", type=command.COUNT)
def main(size: tuple[int, int] | None, lres_size: tuple[int, int] | None, **options: Any) -> None:
    """See the module's docstring."""
    options["height"], options["width"] = size or (None, None)
    options["lres_height"], options["lres_width"] = lres_size or (None, None)
    command.run(STAGE, next_command=NEXT, **options)


if __name__ == "__main__":
    main()
