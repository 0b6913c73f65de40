"""What train_lres.py and train_sres.py share: from a preset and command-line options to a running loop."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import click
import torch

from dataset_tools.frames import parse_sizes
from metrics import metric_main
from torch_utils import distributed
from training import loop, registry
from training.config import TrainOptions, resolve, to_dict
from training.dataset import ClipDataset
from training.longvideogan.presets import STAGES

MODEL_OPTIONS = ("gamma", "r1_interval", "ada_interval", "num_frames", "height", "width", "lres_height", "lres_width")


class Size(click.ParamType):
    """A frame size such as 36x64: (height, width)."""

    name = "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Parse; anything else is refused with an example."""
        if isinstance(value, tuple):
            return value
        try:
            (size,) = parse_sizes(value)
        except ValueError:
            self.fail(f"{value!r} is not a size; give height x width, such as 36x64", param, ctx)
        return size


def common_options(stage: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options of both training scripts; those left out take the preset's value."""
    presets = ", ".join(STAGES[stage])
    default = f"runs/{stage.removeprefix('longvideogan-')}"
    options = [
        click.option("--outdir", help="Where the run directory is made", default=default, show_default=True),
        click.option("--dataset", help="Root of the dataset, which holds a directory HHHHxWWWW a size", required=True),
        click.option("--preset", help=f"Recipe to begin with: {presets}", default="default", show_default=True),
        # Hyperparameters.
        click.option("--batch", help="Clips in a step, over all ranks and rounds", type=click.IntRange(min=1)),
        click.option("--grad-accum", help="Rounds of gradient accumulation", type=click.IntRange(min=1)),
        click.option("--gamma", help="Weight of the R1 penalty", type=click.FloatRange(min=0)),
        click.option("--r1-interval", help="Steps between R1 updates", type=click.IntRange(min=1)),
        click.option("--num-frames", help="Frames of the clips the discriminator sees", type=click.IntRange(min=1)),
        click.option("--steps", help="Train this many steps in all", type=click.IntRange(min=0)),
        click.option("--seed", help="Seed of weights, data order and every draw", default=0, show_default=True),
        # Performance.
        click.option("--device", help="[default: cuda if there is a GPU]", type=click.Choice(["cpu", "cuda"])),
        click.option("--workers", help="Threads that decode frames", type=click.IntRange(min=0)),
        # Watching and keeping.
        click.option("--metric", "-m", "metrics", help="Measure at each checkpoint; repeatable", multiple=True),
        click.option("--tick-steps", help="Steps between status lines", type=click.IntRange(min=1)),
        click.option("--sample-steps", help="Steps between previews", type=click.IntRange(min=0)),
        click.option("--checkpoint-steps", help="Steps between checkpoints", type=click.IntRange(min=0)),
        click.option("--keep", help="Newest checkpoints kept, besides the best", type=click.IntRange(min=1)),
        click.option("--log", help="Where statistics go besides stats.jsonl", type=click.Choice(["none", "wandb"])),
        click.option(
            "--resume",
            help="auto (newest run of the same options), latest, never, or a run directory",
            default="auto",
            show_default=True,
        ),
        click.option("--dry-run", help="Print the options as JSON and stop", is_flag=True),
    ]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def make_options(stage: str, preset: str, given: dict[str, Any]) -> TrainOptions:
    """The options of a run: the preset's row, changed by what was given (None means not given)."""
    if preset not in STAGES[stage]:
        raise click.BadParameter(f"{preset!r} is unknown; there are {', '.join(STAGES[stage])}", param_hint="--preset")
    row = STAGES[stage][preset]
    given = {name: value for name, value in given.items() if value is not None}
    model = {name: given.pop(name) for name in MODEL_OPTIONS if name in given}
    options = TrainOptions(system=stage, **{**row, **given, "model": {}})
    shared = {"batch": options.batch, "grad_accum": options.grad_accum, "seed": options.seed}
    system = registry.resolve(registry.SYSTEMS[stage])
    resolved = resolve(system.Options, {**row["model"], **model, **shared}, f"the preset {preset}")
    return dataclasses.replace(options, model=dataclasses.asdict(resolved))


def check_metrics(names: tuple[str, ...]) -> None:
    """Refuse a metric that does not exist before training begins."""
    for name in names:
        metric_main.parse(name)


def metric_function(options: TrainOptions) -> loop.MetricFunction:
    """What the loop calls to measure its system against the dataset it trains on."""

    def measure(name: str, system: Any) -> dict[str, Any]:
        return metric_main.calc_metric(
            name,
            real=ClipDataset(options.dataset, system.dataset_sizes),
            size=system.dataset_sizes[-1],
            fake_source=system.source(),
            condition_size=system.dataset_sizes[0] if system.needs_condition else None,
            seed=options.seed,
            device=options.device,
        )

    return measure


def run(stage: str, preset: str, dry_run: bool, next_command: str, **given: Any) -> None:
    """Train a stage and say what comes next; what the user can mend becomes a message of one sentence."""
    given["device"] = given["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        options = make_options(stage, preset, given)
        check_metrics(options.metrics)
        if dry_run:
            click.echo(json.dumps(to_dict(options), indent=2))
            return
        result = loop.train(stage, options, metric_function(options))
        if result.finished:
            network = sorted((result.run_dir / "checkpoints").glob("ckpt-*-G-ema.pkl"))[-1]
            distributed.print0(f"Next: {next_command.format(network=network, dataset=given['dataset'])}")
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    finally:
        distributed.shutdown()
