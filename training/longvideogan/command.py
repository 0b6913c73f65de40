"""What train_lres.py and train_sres.py share: from a preset and command-line options to a running loop."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click
import torch

from dataset_tools.frames import parse_sizes
from metrics import metric_main
from metrics.inputs import Videos
from metrics.plan import Generated
from torch_utils import distributed
from torch_utils.precision import PRECISIONS, tf32, why_not
from training import checkpoint, loop, registry
from training.config import TrainOptions, resolve, to_dict
from training.data.dataset import ClipDataset
from training.longvideogan.presets import STAGES

Decorator = Callable[[Callable[..., None]], Callable[..., None]]
COUNT = click.IntRange(min=1)
INTERVAL = click.IntRange(min=0)
WEIGHT = click.FloatRange(min=0)
RATE = click.FloatRange(min=0, min_open=True)


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


def common_options(stage: str) -> Decorator:
    """The options of both training scripts; those left out take the preset's value."""
    presets = ", ".join(STAGES[stage])
    default = f"runs/{stage.removeprefix('longvideogan-')}"
    options = [
        click.option("--outdir", help="Where the run directory is made", default=default, show_default=True),
        click.option("--dataset", help="Root of the dataset, which holds a directory HHHHxWWWW a size", required=True),
        click.option("--preset", help=f"Recipe to begin with: {presets}", default="default", show_default=True),
        # Hyperparameters.
        click.option("--batch", help="Clips in a step, over all ranks and rounds", type=COUNT),
        click.option("--grad-accum", help="Rounds of gradient accumulation", type=COUNT),
        click.option("--gamma", help="Weight of the R1 penalty", type=WEIGHT),
        click.option("--r1-interval", help="Steps between R1 updates", type=COUNT),
        click.option("--g-lr", help="Learning rate of the generator", type=RATE),
        click.option("--d-lr", help="Learning rate of the discriminator", type=RATE),
        click.option("--ema-beta", help="Decay of the generator's moving average, a step", type=click.FloatRange(0, 1)),
        click.option("--num-frames", help="Frames of the clips the discriminator sees", type=COUNT),
        click.option("--steps", help="Train this many steps in all", type=INTERVAL),
        click.option("--seed", help="Seed of weights, data order and every draw", default=0, show_default=True),
        click.option("--x-flip", help="Mirror half of the clips", type=bool),
        click.option("--weighting", help="What is drawn equally often", type=click.Choice(["clip", "frame"])),
        click.option("--init-from", help="Begin with the weights of this network or ckpt-...-train.pt; path or URL"),
        click.option("--freeze-d", help="Blocks of D, nearest its input, that keep the weights of --init-from",
                     type=INTERVAL),
        # Performance.
        click.option("--device", help="[default: cuda if there is a GPU]", type=click.Choice(["cpu", "cuda"])),
        click.option("--precision", help="Arithmetic of a step  [default: fp32, as published; in super-resolution on "
                     "CUDA fp16, as published]", type=click.Choice(PRECISIONS)),
        click.option("--compile", help="Compile parts of the networks first: minutes, once, for faster steps on a GPU",
                     is_flag=True),
        click.option("--workers", help="Threads that decode frames", type=INTERVAL),
        click.option("--cache", help="Where decoded frames are kept", type=click.Choice(["none", "ram", "memmap"])),
        # Watching and keeping.
        click.option("--metric", "-m", "metrics", help="Measure this while training; repeatable", multiple=True),
        click.option("--tick-steps", help="Steps between status lines", type=COUNT),
        click.option("--sample-steps", help="Steps between previews; 0: only the last", type=INTERVAL),
        click.option("--metric-steps", help="Steps between metrics; 0: only the last", type=INTERVAL),
        click.option("--checkpoint-steps", help="Steps between checkpoints; 0: only by time", type=INTERVAL),
        click.option("--checkpoint-minutes", help="Longest time between checkpoints; 0: only by steps", type=WEIGHT),
        click.option("--keep", help="Newest checkpoints kept, besides the best", type=COUNT),
        click.option("--log", help="Where statistics go besides stats.jsonl; repeatable", multiple=True,
                     type=click.Choice(["none", "wandb", "tensorboard"])),
        click.option(
            "--resume",
            help="auto (newest run of the same options), latest, never, a run directory, or one ckpt-...-train.pt to "
            "branch from, and to continue that branch",
            default="auto",
            show_default=True,
        ),
        click.option("--override", help="Continue the run of --resume although options changed", is_flag=True),
        click.option("--dry-run", help="Print the options as JSON and stop", is_flag=True),
    ]  # fmt: skip

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def make_options(stage: str, preset: str, given: dict[str, Any]) -> TrainOptions:
    """The options of a run: the preset's row, changed by what was given (None or an empty tuple means not given).

    A name that the loop does not know is an option of the stage. What is given of a network changes the preset's.
    """
    if preset not in STAGES[stage]:
        raise click.BadParameter(f"{preset!r} is unknown; there are {', '.join(STAGES[stage])}", param_hint="--preset")
    row = STAGES[stage][preset]
    given = {name: value for name, value in given.items() if value not in (None, ())}
    fields = {field.name for field in dataclasses.fields(TrainOptions)}
    model = {name: given.pop(name) for name in list(given) if name not in fields}
    for part in ("generator", "discriminator"):
        if part in model:
            model[part] = {**row["model"].get(part, {}), **model[part]}
    options = TrainOptions(system=stage, **{**row, **given, "model": {}})
    if model.get("freeze_d") and not (options.init_from or "").endswith(".pt"):
        raise ValueError(
            "--freeze-d keeps weights of a trained discriminator, which only a whole training state holds: add "
            "--init-from=<run directory>/checkpoints/ckpt-<step>-train.pt."
        )
    shared = {"batch": options.batch, "grad_accum": options.grad_accum, "seed": options.seed}
    system = registry.resolve(registry.SYSTEMS[stage])
    resolved = resolve(system.Options, {**row["model"], **model, **shared}, f"the preset {preset}")
    return dataclasses.replace(options, model=dataclasses.asdict(resolved))


def check_precision(options: TrainOptions) -> None:
    """Refuse a precision that the device has not, before anything is built."""
    reason = why_not(options.precision or "fp32", options.device)
    if reason is not None:
        raise click.BadParameter(f"{options.precision} {reason}", param_hint="--precision")


def system_maker(options: TrainOptions) -> Callable[[dict[str, Any], torch.device], Any]:
    """What builds the system of a run, set to the options that are no part of its mathematics."""

    def make(model: dict[str, Any], device: torch.device) -> Any:
        system = registry.resolve(registry.SYSTEMS[options.system])(model, device)
        if options.precision is not None:
            system.set_precision(options.precision)
        if options.compile:
            system.set_compile(True)
        return system

    return make


def check_metrics(names: tuple[str, ...]) -> None:
    """Refuse a metric that does not exist before training begins."""
    for name in names:
        metric_main.parse(name)


def metric_function(options: TrainOptions) -> loop.MetricFunction:
    """What the loop calls to measure its system against the dataset it trains on."""

    @tf32(False)
    def measure(names: Sequence[str], system: Any) -> list[dict[str, Any]]:
        clips = ClipDataset(options.dataset, system.dataset_sizes)
        sizes = system.dataset_sizes
        condition = Videos(clips, sizes[0], "dataset") if system.needs_condition else None
        sides = Videos(clips, sizes[-1], "dataset"), Generated(system.source(), condition)
        return metric_main.calc_metrics(names, *sides, seed=options.seed, device=options.device)

    return measure


def run(stage: str, preset: str, dry_run: bool, next_command: str, **given: Any) -> None:
    """Train a stage and say what comes next; what the user can mend becomes a message of one sentence."""
    given["device"] = given["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    rank = int(os.environ.get("RANK", "0"))
    try:
        options = make_options(stage, preset, given)
        check_metrics(options.metrics)
        check_precision(options)
        if dry_run:
            if rank == 0:
                click.echo(json.dumps(to_dict(options), indent=2))
            return
        result = loop.train(system_maker(options), options, metric_function(options))
        if result.finished:
            network = checkpoint.network_path(result.run_dir, result.step)
            same = (
                f" --preset={preset}" if preset != "default" and all(preset in rows for rows in STAGES.values()) else ""
            )
            text = next_command.format(network=network, dataset=given["dataset"], preset=same)
            distributed.print0(f"Next: {text}")
    except distributed.SharedError as error:
        if rank:
            sys.exit(1)
        raise click.ClickException(str(error)) from error
    except (ValueError, OSError) as error:
        raise click.ClickException(f"rank {rank}: {error}" if rank else str(error)) from error
    finally:
        distributed.shutdown()
