"""Train the inverse-dynamics network that tells from two successive frames which action led from one to the other.

\b
python -m metrics.action_network train --dataset=data/train --out=a.pkl
python calc_metrics.py --dataset=data/val --model=WORLD.pkl -m action_following --detector-path=action-network=a.pkl

The names of actions are taken apart: forward_left turns left and moves forward. The network has one answer for each of
these factors; names of other words are one factor of their own. It is trained on real footage alone. Clips that are
held out say how well it does there: the file holds those numbers, and `calc_metrics.py` prints the network's own
accuracy on real video of the dataset that it measures against, which no model can surpass by following its actions.
"""

from pathlib import Path

import click

from dnnlib.text import quote
from metrics.families import ACTION_NETWORK

HELD_OUT = 0.1  # of the clips, unless a validation dataset is given


@click.group(help=__doc__)
def main() -> None:
    """See the module's docstring."""


@main.command("train")
@click.option(
    "--dataset",
    "root",
    required=True,
    help="Dataset with actions that have names",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
@click.option(
    "--val-dataset",
    "val_root",
    help="Held-out clips  [default: a tenth of the dataset]",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
@click.option("--out", required=True, help="File to write", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--size", help="Height and width, where the dataset has several", metavar="HxW")
@click.option("--steps", help="Training steps", default=3000, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--batch", help="Runs of eight pairs in a step", default=16, show_default=True, type=click.IntRange(min=1)
)
@click.option("--lr", help="Learning rate", default=1e-3, show_default=True, type=click.FloatRange(min=0))
@click.option("--channels", help="Width of the network", default=32, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", help="Decides weights and clips", default=0, show_default=True)
@click.option("--device", help="[default: cuda if there is a GPU]", type=click.Choice(["cpu", "cuda"]))
def train(
    root: Path, val_root: Path | None, out: Path, size: str | None, steps: int, batch: int, lr: float, channels: int,
    seed: int, device: str | None,
) -> None:  # fmt: skip
    """Train a network on the footage of a dataset, and test it on clips that are held out."""
    try:
        numbers = train_network(root, val_root, out, size, steps, batch, lr, channels, seed, device)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo("On held-out clips: " + ", ".join(f"{name} {value:.3f}" for name, value in numbers.items()))
    click.echo(
        f"Next: python calc_metrics.py --dataset={quote(str(val_root or root))} --model=MODEL.pkl -m action_following "
        f"--detector-path={ACTION_NETWORK}={quote(str(out))}"
    )


def train_network(
    root: Path, val_root: Path | None, out: Path, size: str | None, steps: int, batch: int, lr: float, channels: int,
    seed: int, device: str | None,
) -> dict[str, float]:  # fmt: skip
    """Train, test and write a network; return its scores on held-out clips, which the file holds, too.

    Raises `ValueError` for a dataset whose actions have no names.
    """
    import torch

    from metrics.detectors.actions import ActionNetwork, Pairs, fit, test
    from training.contract import Bundle
    from training.data.dataset import ClipDataset
    from training.data.footage import open_videos
    from training.network_file import save_bundle
    from training.random import random_state

    given = None
    if size is not None:
        height, _, width = size.partition("x")
        if not (height.isdecimal() and width.isdecimal()):
            raise ValueError(f"{size!r} is not a size: give height x width, such as 48x64")
        given = int(height), int(width)
    videos = open_videos(str(root), given)
    shape = videos.size
    dataset = ClipDataset(root, [shape], streams=["actions"])
    names = dataset.vocabularies().get("actions")
    if not names:
        raise ValueError(f"the actions of {root} have no names: list them as actions in its dataset.json")
    order = random_state("action-network-split", seed, 0).permutation(len(dataset.clips)).tolist()
    num_held = 0 if val_root is not None else max(1, round(HELD_OUT * len(order)))
    if num_held >= len(order):
        raise ValueError(f"{root} has one clip, so none can be held out: give --val-dataset, or more clips")
    val = dataset
    if val_root is not None:
        val = ClipDataset(val_root, [shape], streams=["actions"], vocabularies={"actions": names})
    held_out = Pairs(val, shape, order[:num_held] if val_root is None else range(len(val.clips)))
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(seed)
    network = ActionNetwork(names, *shape, channels).to(where)
    fit(network, Pairs(dataset, shape, order[num_held:]), steps, batch, lr, seed, where)
    numbers = test(network.eval(), held_out, where)
    facts = {"dataset": videos.content, "steps": steps, "seed": seed, "held_out": numbers}
    save_bundle(Bundle({"actions": network}, "action-network", facts, fps=dataset.fps), out)
    return numbers


if __name__ == "__main__":
    main()
